"""Bugs that trainers of this kind have had, each as a sentence: the wrong formula beside ours, told
apart by a number.

All of them train, and most learn something: so they were found late or not at all.
"""

import math
from dataclasses import replace

import pytest
import torch

import train
from data.problem import sample_problems, stream
from experiments.lessons.bias import kl_gradient, kl_term_gradient, random_logits
from grpo import (
    KL_ESTIMATORS,
    VARIANTS,
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    loss_normalizer,
    policy_loss,
    token_entropy,
    token_logps,
)
from sample import decode_completions, generate
from tests import small
from tests.small import SMALL, run_grpo, small_model, tokenizer

CLOSE = {"rtol": 0, "atol": 1e-10}


def ragged(lengths=(5, 2, 7, 1), seed=0):
    """Two policies' log-probabilities, advantages and a mask, for outputs of these lengths after a
    prompt of 2."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), 2 + max(lengths)
    logps = -2 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    old_logps = logps + 0.3 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    position = torch.arange(T)
    mask = (position >= 2) & (position < 2 + torch.tensor(lengths)[:, None])
    return logps.requires_grad_(), old_logps, advantages, mask


def some_problems(count):
    return sample_problems(stream(0, "any"), small.CHAINS, [2], count)


def rollout_of(model, temperature=1.0, group_size=4, count=2):
    prompts = [tokenizer.encode(problem.prompt) for problem in some_problems(count)]
    settings = {"max_new_tokens": 12, "temperature": temperature, "eos_id": tokenizer.eos_id}
    return generate(model, prompts, group_size=group_size, **settings)


# ------------------------------------------------------------------------------------ the surrogate


def test_the_clip_is_a_minimum_for_negative_advantages_too():
    """Wrong: the maximum where A < 0, so that the lower bound can never hold anything back."""

    def wrong(ratio, advantage):
        choose = torch.minimum if advantage >= 0 else torch.maximum
        return choose(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)

    slopes = {}
    for name, objective in (
        ("wrong", wrong),
        ("ours", lambda r, a: clipped_surrogate(r, r.log(), a, 0.2, 0.2)),
    ):
        for value in (0.5, 1.5):
            ratio = torch.tensor(value, requires_grad=True)
            objective(ratio, torch.tensor(-1.0)).backward()
            slopes[name, value] = ratio.grad.item()
    assert (slopes["ours", 0.5], slopes["ours", 1.5]) == (0, -1)
    assert (slopes["wrong", 0.5], slopes["wrong", 1.5]) == (-1, 0)


def test_a_sequence_ratio_is_a_mean_of_log_ratios_and_not_their_sum():
    """Wrong: exp of the sum, clipped at the bounds of a token: long outputs are then always
    clipped."""
    log_ratio = torch.full((1, 101), 0.003, dtype=torch.float64)
    mask = torch.ones(1, 101).bool()
    mask[0, 0] = False
    assert (log_ratio * mask).sum().exp() > 1.2
    settings = {"old_logps": torch.zeros_like(log_ratio), "variant": "gspo", "clip_high": 0.2}
    _, metrics = policy_loss(log_ratio, torch.ones(1), mask, **settings)
    assert metrics["clip_high"] == 0
    assert (metrics["ratio"] / metrics["tokens"]).item() == pytest.approx(math.exp(0.003))


# ------------------------------------------------------------------------------------------- the KL


def test_k1_in_the_loss_pulls_nowhere():
    """Wrong: beta * (logp - ref_logp) as a penalty. Its expected gradient is 0, so it only adds
    noise."""
    logits, reference = random_logits(0), random_logits(1)
    assert kl_term_gradient(logits, reference, logits, "k1").abs().max() < 1e-12
    assert kl_gradient(logits, reference, logits, reverse=True).norm() > 0.1
    assert kl_term_gradient(logits, reference, logits, "k3").norm() > 0.1


def test_the_kl_ratio_is_the_reference_over_the_policy():
    """Wrong: k3 of logp - ref_logp. On the policy's samples this is no estimate of KL(pi || ref),
    nor is -k1 of it."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    ours = (policy * kl_penalty(policy.log(), reference.log(), "k3")).sum()
    flipped = (policy * kl_penalty(reference.log(), policy.log(), "k3")).sum()
    torch.testing.assert_close(ours, exact, **CLOSE)
    assert flipped > 1.2 * exact
    assert (policy * kl_penalty(reference.log(), policy.log(), "k1")).sum() < 0, (
        "this one would reward drift"
    )


def test_the_log_ratio_is_clamped_before_the_exponential():
    """Wrong: exp first, clamp the result. The value is finite, the gradient is 0 * inf = nan."""
    logps = torch.tensor([[-200.0]], requires_grad=True)
    wrong = ((-1.0 - logps).exp()).clamp(max=1e4)
    assert torch.autograd.grad(wrong.sum(), logps)[0].isnan().all()
    ours = kl_penalty(logps, torch.tensor([[-1.0]]))
    assert torch.autograd.grad(ours.sum(), logps)[0].isfinite().all()


def test_a_kl_that_needs_the_ratio_is_a_row_like_any_other(monkeypatch):
    """Wrong: the loss knows one such estimator by name. A second is taken as a flag, and ends the
    training."""
    assert train.Config.CHOICES["kl"] == list(KL_ESTIMATORS)
    given = []

    def own(ref_log_ratio, ratio):
        given.append(ratio.detach())
        return ratio * ref_log_ratio**2 / 2

    monkeypatch.setitem(KL_ESTIMATORS, "own", own)
    config = replace(SMALL, beta=1.0, steps=1)
    weights = [
        run_grpo(replace(config, kl=kl), policy=small_model(1))[0].state_dict()
        for kl in ("own", "k2")
    ]
    assert (given[0] - 1).abs().max() < 1e-3 < (given[-1] - 1).abs().max()
    assert any(not torch.equal(w, weights[1][name]) for name, w in weights[0].items())


# ---------------------------------------------------------------------------------- the aggregation


def token_weights(variant, lengths=(2, 8)):
    """What the log-probability of a token weighs in an output of each length, advantages equal."""
    logps, _, _, mask = ragged(lengths)
    loss, _ = policy_loss(
        logps, torch.ones(len(lengths)).double(), mask, variant=variant, max_tokens=10
    )
    (gradient,) = torch.autograd.grad(loss, logps)
    return [-row[chosen][0].item() for row, chosen in zip(gradient, mask)]


def test_dr_grpo_has_no_length_bias_left():
    """Wrong: to drop the standard deviation and keep the mean over each output's tokens."""
    short, long = token_weights("dr_grpo")
    assert short == long == pytest.approx(1 / 20)
    short, long = token_weights("grpo")
    assert short == pytest.approx(4 * long), "half of Dr. GRPO is GRPO in this respect"
    assert VARIANTS["dr_grpo"].scale == "none", "and the other half is in the row as well"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_weighs_the_same_whatever_micro_batch_it_came_in(variant):
    """Wrong: to divide each micro-batch by its own number of tokens and call it DAPO's
    normaliser."""
    logps, old_logps, advantages, mask = ragged()
    old_logps = None if VARIANTS[variant].ratio is None else old_logps

    def gradient_of(parts, count):
        total = 0.0
        for rows in parts:
            old = None if old_logps is None else old_logps[rows]
            normalizer = count(mask[rows])
            options = {"variant": variant, "max_tokens": 10, "normalizer": normalizer}
            total = (
                total
                + policy_loss(logps[rows], advantages[rows], mask[rows], old_logps=old, **options)[
                    0
                ]
            )
        return torch.autograd.grad(total, logps)[0]

    step = loss_normalizer(mask, variant, 10)
    parts = [[0, 1], [2], [3]]
    whole = gradient_of([[0, 1, 2, 3]], lambda part: step)
    torch.testing.assert_close(gradient_of(parts, lambda part: step), whole, **CLOSE)
    local = gradient_of(parts, lambda part: len(parts) * loss_normalizer(part, variant, 10))
    assert not torch.allclose(local, whole, rtol=0.05)


def test_padding_is_not_counted_among_the_tokens():
    """Wrong: a divisor that is counted over the padded width, so that one long output shrinks a
    whole step."""
    logps, old_logps, advantages, mask = ragged()
    wider = [torch.nn.functional.pad(x, (0, 10)) for x in (logps, old_logps, mask)]
    for variant in ("grpo", "dapo", "dr_grpo"):
        settings = {"variant": variant, "max_tokens": 10}
        one, _ = policy_loss(logps, advantages, mask, old_logps=old_logps, **settings)
        two, _ = policy_loss(wider[0], advantages, wider[2], old_logps=wider[1], **settings)
        torch.testing.assert_close(one, two, **CLOSE)
    assert loss_normalizer(mask, "dapo") == 15 != mask[:, 2:].numel()


def test_the_loss_does_not_write_into_its_inputs():
    """Wrong: labels[~mask] = 0 through a view of the batch, so that what is counted later is
    another mask."""
    batch = ragged()
    before = [x.clone() for x in batch]
    logps, old_logps, advantages, mask = batch
    policy_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=old_logps, beta=0.1)
    assert all(torch.equal(x, y) for x, y in zip(batch, before))


# ----------------------------------------------------------------- between the sampler and the loss


def test_the_temperature_is_in_the_log_probabilities():
    """Wrong: to sample at 0.7 and to train at 1: the policy that is updated is not the one that
    sampled."""
    model = small_model()
    rollout = rollout_of(model, temperature=0.7)
    with torch.no_grad():
        ours, wrong = (token_logps(model(rollout.tokens), rollout.tokens, t) for t in (0.7, 1.0))
    assert (ours - rollout.logps)[rollout.mask].abs().max() < 1e-4
    assert (wrong - rollout.logps)[rollout.mask].abs().max() > 0.01


def test_nothing_is_cut_off_the_distribution_that_is_sampled():
    """Wrong: to sample from the k likeliest tokens and to score with all of them: the ratio is then
    the kept mass."""
    model = small_model()
    rollout = rollout_of(model, group_size=200, count=1)
    assert rollout.tokens[rollout.mask].unique().numel() > 300, (
        "a nearly uniform model says nearly anything"
    )
    with torch.no_grad():
        logits = model(rollout.tokens)
    kept = logits.topk(50).values.logsumexp(-1)[:, :-1]
    top_k = logits.gather(2, rollout.tokens.roll(-1, 1)[..., None])[:, :-1, 0] - kept
    ratio = (rollout.logps[:, 1:] - top_k).exp()[rollout.mask[:, 1:]]
    assert ratio.mean() < 0.5, "what the wrong sampler's ratio would be"


def test_the_end_token_is_trained_and_padding_is_not_though_both_may_be_one_token():
    """Wrong: mask = tokens != pad where pad is the end token, or to leave the end out: stopping is
    never learned."""
    model = small_model()
    rollout = rollout_of(model, group_size=400)
    ended = rollout.finished.nonzero().flatten()
    assert len(ended) > 5
    last = rollout.mask.int().cumsum(dim=1).argmax(dim=1)
    assert (rollout.tokens[ended, last[ended]] == tokenizer.eos_id).all()
    logps = token_logps(model(rollout.tokens), rollout.tokens).detach().requires_grad_()
    policy_loss(logps, torch.ones(len(logps)), rollout.mask, old_logps=rollout.logps)[0].backward()
    assert (logps.grad[ended, last[ended]] != 0).all()
    assert (logps.grad[~rollout.mask] == 0).all()
    wrong = rollout.mask & (rollout.tokens != tokenizer.eos_id)
    assert rollout.mask.sum() - wrong.sum() == len(ended), "each of them would be lost"


def test_the_tokens_that_are_trained_are_those_that_were_sampled():
    """Wrong: to decode, clean and encode again: a text has several spellings in tokens, and the
    model chose one."""
    rollout = rollout_of(small_model(), group_size=32)
    texts = decode_completions(rollout, tokenizer)
    sampled = [row[chosen].tolist() for row, chosen in zip(rollout.tokens, rollout.mask)]
    again = [tokenizer.encode(text, tags=True) for text in texts]
    assert any(
        one != [*other, tokenizer.eos_id] and one != other for one, other in zip(sampled, again)
    )


# ------------------------------------------------------------------------------- groups and rewards


def accuracy_of(problems, texts):
    rollout = small.rollout_of(problems, texts)
    return train.rules({"accuracy": 1.0}, tokenizer)(problems, rollout, 0)["accuracy"]


def test_a_completion_is_scored_against_its_own_prompt():
    """Wrong: prompts repeated as AABB and completions sampled as ABAB."""
    problems = some_problems(4)
    right = [f"<think> x</think><answer> {problem.answer}</answer>" for problem in problems]
    assert len({problem.answer for problem in problems}) > 1
    adjacent = [text for text in right for _ in range(2)]
    assert accuracy_of(problems, adjacent).tolist() == [1] * 8
    assert accuracy_of(problems, right * 2).sum() < 8
    order = [2, 0, 3, 1]
    asked = [problems[i] for i in order]
    assert accuracy_of(asked, adjacent).sum() < 8
    moved = [text for i in order for text in adjacent[2 * i : 2 * i + 2]]
    assert accuracy_of(asked, moved).tolist() == [1] * 8


def test_prompts_that_are_equal_are_still_groups_of_their_own():
    """Wrong: to group completions by the text of their prompt."""
    rewards = torch.tensor([1.0, 0.0, 5.0, 5.0])
    one_group = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert not torch.allclose(group_advantages(rewards, 2), one_group)
    assert group_advantages(rewards, 2)[2:].tolist() == [0, 0]


def test_the_reward_is_the_weighted_sum_of_its_parts_each_counted_once():
    """Wrong: reward += inside the loop over rules, and then a sum over rules."""
    problems = some_problems(1)
    texts = [f"<think> x</think><answer> {problems[0].answer}</answer>", "nothing"]
    rollout = small.rollout_of(problems, texts)
    rewards = train.rules({"accuracy": 2.0, "format": 0.5}, tokenizer)(problems, rollout, 0)
    assert rewards["reward"].tolist() == [2.5, 0.0]
    torch.testing.assert_close(rewards["reward"], 2 * rewards["accuracy"] + 0.5 * rewards["format"])


def test_advantages_that_do_not_line_up_with_the_tokens_are_refused():
    """Wrong: (B, T) times (B, T - 1), which raises at best and broadcasts at worst."""
    logps, old_logps, advantages, mask = ragged()
    for shape in (logps[:, 1:].shape, (4, 1), (1, 9), (9,)):
        with pytest.raises(ValueError, match="advantages"):
            policy_loss(logps, torch.zeros(shape), mask, old_logps=old_logps)
    with pytest.raises(ValueError, match="mask"):
        policy_loss(logps, advantages, mask[:, 1:], old_logps=old_logps)


# -------------------------------------------------------------------------------------- the metrics


def test_metrics_leave_padding_out():
    """Wrong: kl.mean() over the padded width."""
    logps, old_logps, advantages, mask = ragged()
    _, metrics = policy_loss(logps, advantages, mask, old_logps=old_logps, ref_logps=old_logps)
    log_ratio = (logps - old_logps).detach()
    right = (log_ratio.exp() - 1 - log_ratio)[mask].mean()
    torch.testing.assert_close(metrics["k3_old"] / metrics["tokens"], right, **CLOSE)
    assert not torch.isclose((log_ratio.exp() - 1 - log_ratio).mean(), right, rtol=1e-3)


def test_the_kl_that_is_logged_has_the_right_sign():
    """Wrong: the mean of ref_logp - logp, which is minus the KL."""
    policy, reference = (
        torch.tensor(p, dtype=torch.float64).log() for p in ([0.9, 0.1], [0.5, 0.5])
    )
    rows = torch.tensor([0] * 9 + [1])  # as often as the policy samples them
    mask = torch.ones(10, 1).bool()
    _, metrics = policy_loss(
        policy[rows, None], torch.zeros(10), mask, ref_logps=reference[rows, None]
    )
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert exact > 0.3
    assert metrics["k1_ref"].item() / 10 == pytest.approx(exact)
    assert metrics["k3_ref"].item() / 10 == pytest.approx(exact)


def test_entropy_is_that_of_the_distribution_and_not_of_the_tokens_drawn_from_it():
    """Wrong: minus the mean log-probability of the sampled tokens, divided by their number a second
    time."""
    assert token_entropy(torch.zeros(1, 3, 5))[0].tolist() == pytest.approx(
        [0, math.log(5), math.log(5)]
    )
    logits, tokens = torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 1]])
    likely = 1 / (1 + math.exp(-5))
    entropy = -likely * math.log(likely) - (1 - likely) * math.log(1 - likely)
    assert token_entropy(logits)[0, 1].item() == pytest.approx(entropy, rel=1e-5)
    assert -token_logps(logits, tokens)[0, 1].item() > 100 * entropy / 2, (
        "an unlikely token was drawn"
    )


def test_the_loss_that_is_logged_is_that_of_the_whole_step():
    """Wrong: the last micro-batch's."""
    logps, old_logps, advantages, mask = ragged()
    whole, _ = policy_loss(logps, advantages, mask, old_logps=old_logps)
    parts = [
        policy_loss(
            logps[rows], advantages[rows], mask[rows], old_logps=old_logps[rows], normalizer=4
        )[0]
        for rows in ([0, 1], [2], [3])
    ]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)
    assert not torch.isclose(parts[-1], whole, rtol=0.1)


def test_the_learning_rate_that_is_logged_is_the_optimizers(monkeypatch):
    """Wrong: a constant in the log and a flag in the optimizer."""
    used = []
    honest = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        used.append({group["lr"] for group in optimizer.param_groups})
        return honest(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    _, records = run_grpo(
        replace(SMALL, prompts=2, group_size=2, max_new_tokens=4, steps=3, minibatches=1, lr=0.123)
    )
    assert used == [{record["lr"]} for record in records]
    assert records[0]["lr"] == pytest.approx(0.123 / 5), "the first of five steps of warm-up"


def test_what_a_step_sees_does_not_depend_on_the_steps_before_it():
    """Wrong: to find the place after a restart by drawing again from a generator, once too few: a
    batch comes twice."""
    model = small_model()
    fresh = train.sample(SMALL, model, 7)[0]
    for step in range(7):
        assert train.sample(SMALL, model, step)[0] != fresh
    assert train.sample(SMALL, model, 7)[0] == fresh
