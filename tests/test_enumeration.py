"""Exact expectations: every output of a tiny policy, and every group of outputs, enumerated by
experiments/lessons/bias.py."""

import itertools

import pytest
import torch

from experiments.lessons.bias import (
    LENGTHS,
    MASK,
    OUTPUTS,
    PREFIXES,
    REWARDS,
    all_groups,
    angle,
    cosine,
    distance,
    expected_gradient,
    gradient,
    kl_gradient,
    kl_term_gradient,
    output_logps,
    prefix_probabilities,
    probabilities,
    random_logits,
    true_gradient,
    weight_of_question,
)
from grpo import ADVANTAGES, KL_ESTIMATORS, kl_penalty

CLOSE = {"rtol": 0, "atol": 1e-10}
SEEDS = (0, 1, 2)
KINDS = ("k1", "k2", "k3", "k3_ratio")


# -------------------------------------------------------------------------- the enumeration itself


def test_all_outputs_are_there_and_probabilities_add_up_to_1():
    words = map("".join, itertools.product("ab.", repeat=3))
    assert sorted(OUTPUTS) == sorted({word[: word.find(".") + 1] or word for word in words})
    assert len(OUTPUTS) == 15
    logits = random_logits(0)
    assert probabilities(logits).sum().item() == pytest.approx(1, abs=1e-12)
    assert (output_logps(logits)[~MASK] == 0).all()
    chances = dict(zip(PREFIXES, logits.softmax(dim=1).tolist()))  # of "a", "b" and "."
    ba_stop = chances[""][1] * chances["b"][0] * chances["ba"][2]
    assert probabilities(logits)[OUTPUTS.index("ba.")].item() == pytest.approx(ba_stop)
    past_b = prefix_probabilities(logits)[PREFIXES.index("b")].item()
    assert past_b == pytest.approx(chances[""][1])


@pytest.mark.parametrize("size", [2, 3])
def test_the_groups_stand_for_every_ordered_choice_of_outputs(size):
    groups = all_groups(size)
    assert sum(orders for _, orders in groups) == 15**size
    counted = {tuple(group): orders for group, orders in groups}
    ordered = [tuple(sorted(choice)) for choice in itertools.product(range(15), repeat=size)]
    assert all(ordered.count(group) == counted[group] for group in list(counted)[::50])


def test_the_true_gradient_equals_finite_differences():
    logits, found = random_logits(0), true_gradient(random_logits(0), REWARDS)

    def expected_reward(logits):
        return (probabilities(logits) * REWARDS).sum().item()

    for i, j in itertools.product(range(7), range(3)):
        step = torch.zeros_like(logits)
        step[i, j] = 1e-6
        slope = (expected_reward(logits + step) - expected_reward(logits - step)) / 2e-6
        assert found[i, j].item() == pytest.approx(slope, abs=1e-8)


# -------------------------------------------------------------------------------- policy gradients


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_leave_one_out_gives_the_true_policy_gradient(seed, group_size):
    logits = random_logits(seed)
    found = expected_gradient(logits, REWARDS, group_size, "rloo")
    torch.testing.assert_close(found, true_gradient(logits, REWARDS), **CLOSE)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize(("variant", "divisor"), [("reinforce", 1), ("dr_grpo", 3)])
def test_mean_only_gives_1_minus_1_over_g_of_the_true_gradient(variant, divisor, group_size):
    """The mean holds the output's own reward. dr_grpo divides by the limit of 3 tokens too."""
    logits = random_logits(0)
    found = expected_gradient(logits, REWARDS, group_size, variant)
    target = (1 - 1 / group_size) * true_gradient(logits, REWARDS)
    torch.testing.assert_close(found * divisor, target, **CLOSE)


@pytest.mark.parametrize(
    ("variant", "group_size", "degrees", "length"),
    [
        ("grpo", 2, 19.52, 0.2876),
        ("grpo", 3, 19.76, 0.4679),
        ("gspo", 2, 19.52, 0.2876),
        ("gspo", 3, 19.76, 0.4679),
        ("dapo", 2, 5.00, 0.2913),
        ("dapo", 3, 4.15, 0.4964),
        ("cispo", 2, 5.00, 0.2913),
        ("cispo", 3, 4.15, 0.4964),
    ],
)
def test_the_other_variants_are_as_biased_as_they_are(variant, group_size, degrees, length):
    """The numbers that experiments/lessons/bias.py prints: how far the expected gradient turns from
    the true gradient, and how long it is."""
    logits = random_logits(0)
    found = expected_gradient(logits, REWARDS, group_size, variant)
    target = true_gradient(logits, REWARDS)
    assert angle(found, target) == pytest.approx(degrees, abs=0.01)
    assert (found.norm() / target.norm()).item() == pytest.approx(length, abs=1e-4)


def test_at_ratio_1_the_ratio_and_the_clip_make_no_difference():
    """Variants that differ in ratio and clip alone have the same gradient there."""
    logits = random_logits(1)
    for one, other in (("grpo", "gspo"), ("dapo", "cispo")):
        first, second = (expected_gradient(logits, REWARDS, 2, variant) for variant in (one, other))
        torch.testing.assert_close(first, second, **CLOSE)


def test_a_mean_over_tokens_turns_the_gradient_a_sum_does_not():
    """The length normaliser alone: mean-only advantages, with 1/|o_i| and without it."""
    logits = random_logits(0)
    target, longer = true_gradient(logits, REWARDS), true_gradient(logits, LENGTHS)
    by_output = expected_gradient(logits, REWARDS, 2, "grpo", scale="none")
    assert angle(by_output, target) > 15
    assert angle(expected_gradient(logits, REWARDS, 2, "reinforce", scale="none"), target) < 1e-4
    assert cosine(by_output, longer) < cosine(target, longer) - 0.2


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("scale", [*ADVANTAGES, "own"])
def test_with_two_rewards_the_scale_changes_the_weight_alone(scale, group_size, monkeypatch):
    """Where outputs are right or wrong, the scale changes a question's weight, not its direction.
    This holds for a user's own row too, which need not subtract the mean."""
    monkeypatch.setitem(ADVANTAGES, "own", lambda groups, eps: 3 * groups - 1)
    logits, right = random_logits(0), (REWARDS == 2).double()
    pass_rate = (probabilities(logits) * right).sum().item()
    found = expected_gradient(logits, right, group_size, "reinforce", scale=scale)
    weight = weight_of_question(pass_rate, group_size, scale)
    torch.testing.assert_close(found, weight * true_gradient(logits, right), **CLOSE)


def test_the_deviation_weighs_hard_and_easy_questions_more():
    """And where rewards have grades, dividing by it turns the gradient."""
    weights = [weight_of_question(rate, 8, "std") for rate in (0.01, 0.5, 0.99)]
    assert weights == pytest.approx([2.440, 1.735, 2.440], abs=1e-3)
    for rate in (0.01, 0.5, 0.99):
        assert weight_of_question(rate, 8, "leave_one_out") == pytest.approx(1, abs=1e-6)
        assert weight_of_question(rate, 8, "none") == pytest.approx(7 / 8, abs=1e-6)
    logits = random_logits(0)
    found = expected_gradient(logits, REWARDS, 2, "reinforce", scale="std")
    assert angle(found, true_gradient(logits, REWARDS)) == pytest.approx(1.5, abs=0.05)


# --------------------------------------------------------------------- the KL's gradient in a loss


def is_close(one, other):
    return torch.allclose(one, other, **CLOSE)


def both_gradients(logits, reference):
    """The gradients of the reverse KL and of the forward KL, over what the policy samples."""
    return (kl_gradient(logits, reference, logits, reverse) for reverse in (True, False))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_kl_kind_gives_the_gradient_its_docstring_says(seed):
    """For tokens that the policy itself sampled: in the loss, and from `kl_penalty` alone."""
    logits, reference = random_logits(seed), random_logits(seed + 10)
    reverse, forward = both_gradients(logits, reference)
    targets = {"k1": torch.zeros_like(logits), "k2": reverse, "k3": forward, "k3_ratio": reverse}
    assert min(distance(forward, reverse), distance(reverse, forward)) > 0.1
    for kind in targets:
        found = kl_term_gradient(logits, reference, logits, kind)
        for name, target in targets.items():
            assert is_close(found, target) == is_close(targets[kind], target), (kind, name)
        policy = logits.clone().requires_grad_()
        by_token = kl_penalty(output_logps(policy), output_logps(reference), kind)
        alone = gradient((probabilities(logits) * by_token.sum(dim=1)).sum(), policy)
        torch.testing.assert_close(alone, found, **CLOSE)


def test_off_policy_only_k3_ratio_gives_the_reverse_kl():
    """For tokens that an older policy sampled, only the kind that has the ratio does."""
    logits, reference, older = (random_logits(seed) for seed in SEEDS)
    target = kl_gradient(logits, reference, older, reverse=True)
    for kind in KINDS:
        found = kl_term_gradient(logits, reference, older, kind)
        assert is_close(found, target) == (kind == "k3_ratio"), kind


def test_a_kl_times_the_ratio_has_the_gradient_of_its_mean(monkeypatch):
    """A row of a user's own, off-policy: k2 times the ratio follows the mean of k2."""
    monkeypatch.setitem(KL_ESTIMATORS, "own", lambda log_x, ratio: ratio * log_x**2 / 2)
    logits, reference, older = (random_logits(seed) for seed in SEEDS)
    policy = logits.clone().requires_grad_()
    logps = policy.log_softmax(dim=1)
    mean = (logps.exp() * (reference.log_softmax(dim=1) - logps) ** 2 / 2).sum(dim=1)
    target = gradient((prefix_probabilities(older) * mean).sum(), policy)
    found = kl_term_gradient(logits, reference, older, "own")
    torch.testing.assert_close(found, target, **CLOSE)
    assert distance(found, kl_gradient(logits, reference, older, reverse=True)) > 0.1


def test_k3_ratio_is_exact_for_all_but_lost_tokens_k3_is_not():
    """The policy has all but lost a token beyond a ratio of e^10, where k3 is clamped."""
    logits, reference = random_logits(0), random_logits(1)
    logits[:, 1] -= 30
    assert (reference.log_softmax(1) - logits.log_softmax(1)).max() > 20
    reverse, forward = both_gradients(logits, reference)
    found = kl_term_gradient(logits, reference, logits, "k3_ratio")
    torch.testing.assert_close(found, reverse, rtol=1e-8, atol=1e-15)
    assert distance(kl_term_gradient(logits, reference, logits, "k3"), forward) > 0.1


def test_the_kls_gradient_holds_the_sampled_prefixes_fixed():
    """By hand: the sum over prefixes of a prefix's probability times the KL there. The KL of whole
    outputs has a second part, which no per-token estimator sees: other prefixes become likelier."""
    logits, reference = random_logits(0), random_logits(1)
    policy = logits.clone().requires_grad_()
    pair = (torch.distributions.Categorical(logits=x) for x in (policy, reference))
    by_prefix = torch.distributions.kl_divergence(*pair)
    weighted = gradient((prefix_probabilities(logits) * by_prefix).sum(), policy)
    torch.testing.assert_close(kl_gradient(logits, reference, logits, True), weighted, **CLOSE)
    policy = logits.clone().requires_grad_()
    whole = probabilities(policy) * (output_logps(policy) - output_logps(reference)).sum(dim=1)
    assert not is_close(gradient(whole.sum(), policy), weighted)


@pytest.mark.parametrize("kind", KINDS)
def test_one_over_the_length_departs_from_every_target(kind):
    """1/|o_i| is known only when the output has ended. So a token that makes outputs longer weighs
    less."""
    logits, reference = random_logits(0), random_logits(1)
    found = kl_term_gradient(logits, reference, logits, kind, variant="grpo")
    for direction in (True, False):
        target = kl_gradient(logits, reference, logits, direction)
        best = target * (found * target).sum() / target.pow(2).sum()
        assert (found - best).norm() > 0.02 * found.norm(), "no multiple of the target either"
    assert found.norm() > 0.05, "k1 too has an effect"
