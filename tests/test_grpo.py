"""The mathematics of grpo.py against loops that a reader can check, in float64."""

import math

import pytest
import torch

from grpo import (
    VARIANTS,
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    loss_normalizer,
    policy_loss,
    token_entropy,
    token_logps,
)

CLOSE = {"rtol": 0, "atol": 1e-10}


def random_batch(seed=0, B=6, T=7):
    """Log-probabilities of three policies and a ragged mask; a row of one token, a full row, junk under the mask."""
    generator = torch.Generator().manual_seed(seed)
    logps, old_logps, ref_logps = -3 * torch.rand(3, B, T, generator=generator, dtype=torch.float64)
    old_logps = logps + 0.5 * (old_logps - old_logps.mean())  # ratios on both sides of the clip
    lengths = torch.tensor([1, T - 1, 2, 3, T - 3, T - 2])
    start = torch.tensor([3, 1, 2, 1, 2, 2])
    position = torch.arange(T)
    mask = (position >= start[:, None]) & (position < (start + lengths)[:, None])
    for junk, values in zip((1e4, -1e4, 777.0), (logps, old_logps, ref_logps)):
        values[~mask] = junk
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    return logps.requires_grad_(), old_logps, ref_logps, advantages, mask


def objective_by_loops(logps, old_logps, ref_logps, advantages, mask, eps_low, eps_high, beta):
    """Eq. 3 of DeepSeekMath, one token at a time."""
    total = 0.0
    for i in range(len(mask)):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in steps:
            ratio = torch.exp(logps[i, t] - old_logps[i, t])
            clipped = min(max(ratio, ratio.new_tensor(1 - eps_low)), ratio.new_tensor(1 + eps_high))
            advantage = advantages[i] if advantages.dim() == 1 else advantages[i, t]
            surrogate = min(ratio * advantage, clipped * advantage)
            ref_ratio = torch.exp(ref_logps[i, t] - logps[i, t])
            kl = ref_ratio - torch.log(ref_ratio) - 1
            total = total + (surrogate - beta * kl) / len(steps)
    return total / len(mask)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradient_equal_eq_3_written_as_loops(beta, per_token):
    logps, old_logps, ref_logps, advantages, mask = random_batch()
    if per_token:
        advantages = advantages[:, None] * torch.linspace(-1, 2, mask.shape[1], dtype=torch.float64)
    loss, metrics = policy_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=ref_logps, beta=beta)
    (gradient,) = torch.autograd.grad(loss, logps)
    expected = -objective_by_loops(logps, old_logps, ref_logps, advantages, mask, 0.2, 0.2, beta)
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE)
    assert gradient[mask].abs().max() > 0.01
    assert metrics["clip_low"] + metrics["clip_high"] > 0, "the batch should reach the clip"


def test_padding_and_prompt_get_exactly_no_gradient_whatever_lies_there():
    logps, old_logps, ref_logps, advantages, mask = random_batch()
    loss, _ = policy_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=ref_logps, beta=0.1)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert (gradient[~mask] == 0).all()


def test_more_padding_changes_neither_loss_nor_metrics():
    logps, old_logps, ref_logps, advantages, mask = random_batch()

    def padded(x, value):
        return torch.nn.functional.pad(x, (0, 5), value=value)

    one = policy_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=ref_logps, beta=0.1)
    two = policy_loss(
        padded(logps, 9.0),
        advantages,
        padded(mask, False),
        old_logps=padded(old_logps, -50.0),
        ref_logps=padded(ref_logps, 1e5),
        beta=0.1,
    )
    torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[5, 2], [0, 4], [1, 3]], [[3], [0], [5], [1], [4], [2]]])
def test_micro_batches_of_any_size_and_order_add_up_to_the_gradient_of_the_step(parts):
    logps, old_logps, ref_logps, advantages, mask = random_batch()
    whole, whole_metrics = policy_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=ref_logps, beta=0.1)
    (expected,) = torch.autograd.grad(whole, logps)
    gradient, metrics = torch.zeros_like(logps), dict.fromkeys(whole_metrics, 0)
    for rows in parts:
        loss, sums = policy_loss(
            logps[rows],
            advantages[rows],
            mask[rows],
            old_logps=old_logps[rows],
            ref_logps=ref_logps[rows],
            beta=0.1,
            normalizer=loss_normalizer(mask),
        )
        gradient += torch.autograd.grad(loss, logps)[0]
        metrics = {name: metrics[name] + sums[name] for name in sums}
    torch.testing.assert_close(gradient, expected, **CLOSE)
    torch.testing.assert_close(metrics, whole_metrics, **CLOSE)


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(1, 0.5, 1), (1, 1.0, 1), (1, 1.5, 0), (-1, 0.5, 0), (-1, 1.0, -1), (-1, 1.5, -1)],
)
def test_clip_stops_the_gradient_only_where_the_ratio_has_gone_the_way_that_pays(advantage, ratio, slope):
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    clipped_surrogate(ratio, torch.tensor(float(advantage)), 0.2, 0.2).backward()
    assert ratio.grad == slope


def test_clip_metrics_count_the_tokens_whose_gradient_the_clip_stops():
    ratios = torch.tensor([[1.0, 0.5, 0.5, 1.0, 1.5, 1.5], [1.0, 0.5, 1.5, 1.5, 1.5, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]).bool()
    _, metrics = policy_loss(ratios.log(), torch.tensor([-1.0, 1.0]), mask, old_logps=torch.zeros(2, 6))
    assert metrics["clip_low"] == 2, "A < 0 and the ratio low: the first row's two"
    assert metrics["clip_high"] == 3, "A > 0 and the ratio high: the second row's three"
    assert metrics["tokens"] == 9


def test_clip_bounds_can_be_set_apart_and_switched_off():
    logps, old_logps, _, advantages, mask = random_batch()
    infinite, metrics = policy_loss(logps, advantages, mask, old_logps=old_logps, clip_low=math.inf, clip_high=math.inf)
    unclipped = -(((logps - old_logps).exp() * advantages[:, None]).masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(infinite, unclipped, **CLOSE)
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    higher, _ = policy_loss(logps, advantages, mask, old_logps=old_logps, clip_high=0.5)
    expected = -objective_by_loops(logps, old_logps, old_logps, advantages, mask, 0.2, 0.5, 0.0)
    torch.testing.assert_close(higher, expected, **CLOSE)


def test_without_old_logps_the_ratio_is_1_and_the_gradient_is_that_of_reinforce():
    logps, _, _, advantages, mask = random_batch()
    loss, metrics = policy_loss(logps, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logps)
    reinforce = -((logps * advantages[:, None]).masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, logps)[0], **CLOSE)
    assert metrics["ratio"] / metrics["tokens"] == 1


def test_loss_of_a_fresh_group_is_zero_and_its_gradient_is_not():
    """The first thing that newcomers trip over."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    logps, _, _, _, mask = random_batch()
    loss, _ = policy_loss(logps, group_advantages(rewards, 3), mask)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, logps)[0].abs().max() > 0.01


def test_shapes_that_would_broadcast_wrongly_are_refused():
    logps, _, _, advantages, mask = random_batch()
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(logps, advantages[:, None], mask)
    with pytest.raises(ValueError, match="mask"):
        policy_loss(logps, advantages, mask[:, 1:])
    for name in ("old_logps", "ref_logps"):
        with pytest.raises(ValueError, match=name):
            policy_loss(logps, advantages, mask, **{name: logps.detach()[:, :1]})
    with pytest.raises(ValueError, match="needs ref_logps"):
        policy_loss(logps, advantages, mask, beta=0.1)
    with pytest.raises(ValueError, match='"ppo" is not among grpo'):
        policy_loss(logps, advantages, mask, variant="ppo")


def test_advantages_equal_the_loop_with_the_n_minus_1_deviation():
    rewards = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    for scale in ("std", "none"):
        expected = []
        for group in rewards.tolist()[:4], rewards.tolist()[4:]:
            mean = sum(group) / 4
            std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / 3)
            expected += [(reward - mean) / (std + 1e-4 if scale == "std" else 1) for reward in group]
        advantages = group_advantages(rewards, 4, scale)
        torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_a_group_of_equal_rewards_gets_exactly_zero_even_where_its_mean_is_rounded():
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.mean() != 0).any(), "this value should be one whose mean is off by a rounding"
    assert (group_advantages(rewards, 7) == 0).all()
    assert (group_advantages(torch.cat((rewards, torch.arange(7.0))), 7)[:7] == 0).all()


def test_rewards_of_one_prompt_do_not_reach_another():
    rewards = torch.tensor([1.0, 0.0, 5.0, 9.0])
    changed = torch.tensor([1.0, 0.0, -3.0, 9.0])
    assert torch.equal(group_advantages(rewards, 2)[:2], group_advantages(changed, 2)[:2])


@pytest.mark.parametrize(("count", "group_size", "scale"), [(7, 2, "std"), (4, 1, "std"), (4, 2, "median")])
def test_groups_that_cannot_be_are_refused(count, group_size, scale):
    with pytest.raises(ValueError, match=r"group|scale"):
        group_advantages(torch.arange(float(count)), group_size, scale)


def test_token_logps_speak_of_the_token_in_their_own_column():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 4, (2, 5), generator=generator)
    logps = token_logps(logits, tokens, temperature=0.7)
    assert logps.dtype == torch.float64
    assert (logps[:, 0] == 0).all()
    for i in range(2):
        for t in range(1, 5):
            scores = [math.exp(value / 0.7) for value in logits[i, t - 1].tolist()]
            assert logps[i, t].item() == pytest.approx(math.log(scores[tokens[i, t]] / sum(scores)), abs=1e-12)


def test_log_probabilities_of_bfloat16_logits_are_float32():
    logits = torch.randn(1, 3, 4, dtype=torch.bfloat16)
    assert token_logps(logits, torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.float32


def test_entropy_of_a_uniform_policy_is_log_v_and_temperature_counts():
    assert token_entropy(torch.zeros(1, 3, 5))[0].tolist() == pytest.approx([0, math.log(5), math.log(5)])
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-1.0))
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert token_entropy(logits, temperature=2.0)[0, 1].item() == pytest.approx(expected)


def test_k3_is_an_unbiased_estimate_of_the_kl_and_never_negative():
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    estimates = kl_penalty(policy.log(), reference.log())
    assert (estimates >= 0).all()
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * estimates).sum(), exact, **CLOSE)


def test_every_variant_names_a_scale_that_group_advantages_knows():
    for variant in VARIANTS.values():
        assert group_advantages(torch.tensor([0.0, 1.0]), 2, variant.scale).abs().sum() > 0
