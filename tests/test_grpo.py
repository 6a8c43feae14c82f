"""The mathematics of grpo.py against loops that a reader can check, in float64."""

import itertools
import math

import pytest
import torch

from grpo import (
    ADVANTAGES,
    KL_ESTIMATORS,
    VARIANTS,
    Variant,
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    loss_normalizer,
    policy_loss,
    sequence_ratio,
    token_entropy,
    token_logps,
)

CLOSE = {"rtol": 0, "atol": 1e-10}
ON_POLICY = ("reinforce", "rloo")
CLIPS = {  # DAPO's and GSPO's are their papers', CISPO's is ScaleRL's, 0.2 is PPO's
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (math.inf, 4.0),
    "reinforce": (math.inf, math.inf),
    "rloo": (math.inf, math.inf),
}
MAX_TOKENS = 11
KL_FORMULAS = {  # of x = pi_ref / pi and of the ratio pi / pi_old
    "k1": lambda x, ratio: -torch.log(x),
    "k2": lambda x, ratio: torch.log(x) ** 2 / 2,
    "k3": lambda x, ratio: x - torch.log(x) - 1,
    "k3_ratio": lambda x, ratio: ratio * (x - torch.log(x) - 1),
    "own": lambda x, ratio: ratio * torch.log(x) ** 2 / 2,
}
# A test of a paper's equation is for the rows named above. A test of an invariance is for every row
# of a table, so it holds a new row to the invariance at once.
KL_KINDS, SCALES = (*KL_ESTIMATORS, "own"), (*ADVANTAGES, "own")


def by_rank(groups, eps):
    """The share of the group that an output beats, less the share that beats it."""
    return (groups[:, :, None] - groups[:, None]).sign().mean(dim=2)


@pytest.fixture(autouse=True)
def own_rows(monkeypatch):
    """Rows of a user's own: an advantage that is no division, and a KL that needs the ratio."""
    monkeypatch.setitem(ADVANTAGES, "own", by_rank)
    monkeypatch.setitem(KL_ESTIMATORS, "own", lambda log_x, ratio: ratio * log_x**2 / 2)


def random_batch(seed=0, B=6, T=7):
    """Log-probabilities of three policies, advantages, and a ragged mask: a row of one token, a
    full row, junk outside of the mask."""
    generator = torch.Generator().manual_seed(seed)
    logps, old_logps, ref_logps = -3 * torch.rand(3, B, T, generator=generator, dtype=torch.float64)
    old_logps = logps + 0.5 * (old_logps - old_logps.mean())  # ratios on both sides of the clip
    lengths = torch.tensor([1, T - 1, 2, 3, T - 3, T - 2])
    start = torch.tensor([3, 1, 2, 1, 2, 2])
    position = torch.arange(T)
    mask = (position >= start[:, None]) & (position < (start + lengths)[:, None])
    for junk, values in zip((math.nan, -math.inf, math.nan), (logps, old_logps, ref_logps)):
        values[~mask] = junk
    # Rows 0 and 1 are a group, and so are rows 2 and 3; rows 4 and 5 are a group of equal rewards.
    advantages = group_advantages(torch.tensor([0.0, 2, 1.5, 1, 1, 1], dtype=torch.float64), 2)
    return logps.requires_grad_(), old_logps, ref_logps, advantages, mask


def by_token(advantages, mask):
    """Advantages that differ by token, with junk in the padding."""
    slope = torch.linspace(-1, 2, mask.shape[1], dtype=torch.float64)
    return (advantages[:, None] * slope + 0.1).masked_fill(~mask, math.nan)


def loss_by_loops(
    variant,
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    *,
    beta=0.0,
    kl="k3",
    clip=None,
    held=None,
):
    """The loss of each paper, one token at a time. `held` are the policy's log-probabilities in the
    factors through which no gradient flows. Finite differences hold them still."""
    held = logps.detach() if held is None else held
    old_logps = held if old_logps is None else old_logps
    clip_low, clip_high = CLIPS[variant] if clip is None else clip

    def clipped(ratio):
        return min(max(ratio, ratio.new_tensor(1 - clip_low)), ratio.new_tensor(1 + clip_high))

    total, tokens = 0.0, 0
    for i in range(len(mask)):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        tokens += len(steps)
        for t in steps:
            advantage = advantages[i] if advantages.dim() == 1 else advantages[i, t]
            ratio = torch.exp(logps[i, t] - old_logps[i, t])
            if variant in ("grpo", "dr_grpo", "dapo"):  # DeepSeekMath eq. 3, DAPO eq. 8
                objective = min(ratio * advantage, clipped(ratio) * advantage)
            elif variant == "gspo" and advantages.dim() == 1:  # GSPO eq. 5 and 7
                s = torch.exp(sum(logps[i, u] - old_logps[i, u] for u in steps) / len(steps))
                objective = min(s * advantage, clipped(s) * advantage)
            elif variant == "gspo":  # GSPO-token, eq. 13 and 14
                s = torch.exp(sum(held[i, u] - old_logps[i, u] for u in steps) / len(steps))
                s = s * torch.exp(logps[i, t]) / torch.exp(held[i, t])
                objective = min(s * advantage, clipped(s) * advantage)
            elif variant == "cispo":  # MiniMax-M1 eq. 4 and 5
                weight = clipped(torch.exp(held[i, t] - old_logps[i, t]))
                objective = weight * advantage * logps[i, t]
            else:  # REINFORCE, RLOO
                objective = advantage * logps[i, t]
            if beta:
                x = torch.exp(ref_logps[i, t] - logps[i, t])
                objective = objective - beta * KL_FORMULAS[kl](x, ratio)
            total = total + objective / (len(steps) if variant in ("grpo", "gspo") else 1)
    counts = {"dapo": tokens, "cispo": tokens, "dr_grpo": len(mask) * MAX_TOKENS}
    return -total / counts.get(variant, len(mask))


def compute(variant, logps, old_logps, ref_logps, advantages, mask, **options):
    """policy_loss with the arguments that the variant takes."""
    options = {"variant": variant, "ref_logps": ref_logps, "max_tokens": MAX_TOKENS, **options}
    if VARIANTS[variant].ratio:
        options["old_logps"] = old_logps
    return policy_loss(logps, advantages, mask, **options)


def gradient_of(loss, logps):
    return torch.autograd.grad(loss, logps)[0]


# ---------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("per_token", [False, True], ids=["one advantage", "by token"])
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), *((0.3, kl) for kl in KL_FORMULAS)])
@pytest.mark.parametrize("variant", CLIPS)
def test_loss_and_gradient_equal_the_papers_equations(variant, beta, kl, per_token):
    """The equations are written as loops over tokens."""
    logps, old_logps, ref_logps, advantages, mask = random_batch()
    if variant in ON_POLICY:
        old_logps = None
    if per_token:
        advantages = by_token(advantages, mask)
    batch = (variant, logps, old_logps, ref_logps, advantages, mask)
    loss, _ = compute(*batch, beta=beta, kl=kl)
    expected = loss_by_loops(*batch, beta=beta, kl=kl)
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradient = gradient_of(loss, logps)
    torch.testing.assert_close(gradient, gradient_of(expected, logps), **CLOSE)
    assert (gradient[~mask] == 0).all(), "padding and prompt get exactly none, whatever lies there"
    assert gradient[mask].abs().max() > 0.001


def boundary_batch(clip_low, clip_high):
    """Outputs of 3 tokens, for either sign of the advantage and a ratio just below or above either
    bound. Each token of an output has the same ratio, so that it is the output's ratio too."""
    near = [1 - clip_low * 1.05, 1 - clip_low * 0.95, 1 + clip_high * 0.95, 1 + clip_high * 1.05]
    ratio = torch.tensor([r for r in near for _ in range(2)], dtype=torch.float64)
    advantages = torch.tensor([0.7, -0.7] * len(near), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    old_logps = -3 * torch.rand(len(ratio), 4, generator=generator, dtype=torch.float64)
    logps = old_logps + ratio.log()[:, None]
    mask = torch.tensor([False, True, True, True]).expand_as(logps)
    return logps.requires_grad_(), old_logps, advantages, mask


@pytest.mark.parametrize("variant", CLIPS)
def test_gradients_equal_finite_differences_around_each_clip(variant):
    """On both sides of each boundary of the clip, for either sign of the advantage."""
    clip = (0.3, 0.4) if variant == "cispo" or variant in ON_POLICY else CLIPS[variant]
    bounds = {} if variant in ON_POLICY else {"clip_low": clip[0], "clip_high": clip[1]}
    logps, old_logps, advantages, mask = boundary_batch(*clip)
    loss, metrics = compute(variant, logps, old_logps, None, advantages, mask, **bounds)
    gradient = gradient_of(loss, logps)
    fixed = (None if variant in ON_POLICY else old_logps, None, advantages, mask)
    epsilon = 1e-6
    for i in range(len(mask)):
        for t in range(1, mask.shape[1]):
            sides = []
            for sign in (-1, 1):
                moved = logps.detach().clone()
                moved[i, t] += sign * epsilon
                sides.append(loss_by_loops(variant, moved, *fixed, clip=clip, held=logps.detach()))
            slope = (sides[1] - sides[0]) / (2 * epsilon)
            assert gradient[i, t].item() == pytest.approx(slope.item(), abs=1e-7), (i, t)
    if variant not in ON_POLICY:
        stopped = (gradient == 0).all(dim=1)
        low, high = (metrics[name].item() for name in ("clip_low", "clip_high"))
        if variant == "cispo":
            assert not stopped.any(), "CISPO stops no token"
            assert (low, high) == (6, 6)
        else:
            # A < 0 below the interval, A > 0 above it.
            assert stopped.nonzero().flatten().tolist() == [1, 6]
            assert (low, high) == (3, 3)


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(1, 0.5, 1), (1, 1.0, 1), (1, 1.5, 0), (-1, 0.5, 0), (-1, 1.0, -1), (-1, 1.5, -1)],
)
def test_clip_stops_the_gradient_only_where_moving_on_pays(advantage, ratio, slope):
    """The gradient is 0 only where the ratio has left the interval the way that pays."""
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    clipped_surrogate(ratio, ratio.log(), torch.tensor(float(advantage)), 0.2, 0.2).backward()
    assert ratio.grad == slope


@pytest.mark.parametrize("variant", [name for name in CLIPS if name not in ON_POLICY])
def test_clip_bounds_can_be_set_apart_and_switched_off(variant):
    logps, old_logps, _, advantages, mask = random_batch()
    for clip in ((0.1, 0.5), (math.inf, 0.1), (0.0, math.inf), (math.inf, math.inf)):
        bounds = {"clip_low": clip[0], "clip_high": clip[1]}
        loss, metrics = compute(variant, logps, old_logps, None, advantages, mask, **bounds)
        expected = loss_by_loops(variant, logps, old_logps, None, advantages, mask, clip=clip)
        torch.testing.assert_close(loss, expected, **CLOSE)
        torch.testing.assert_close(gradient_of(loss, logps), gradient_of(expected, logps), **CLOSE)
        assert (metrics["clip_low"] == 0) >= (clip[0] == math.inf)
        assert (metrics["clip_high"] == 0) >= (clip[1] == math.inf)


def test_the_sequence_ratio_is_the_geometric_mean():
    """And the gradients of an output's tokens add up to the gradient of that mean."""
    generator = torch.Generator().manual_seed(4)
    log_ratio = torch.randn(1, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, True, False]])
    ratio = sequence_ratio(log_ratio.masked_fill(~mask, 0), mask)
    mean = log_ratio[0, 1:4].mean().exp()
    torch.testing.assert_close(ratio[mask], mean.expand(3), **CLOSE)
    token_form = gradient_of(ratio[mask].mean(), log_ratio)
    torch.testing.assert_close(token_form, gradient_of(mean, log_ratio), **CLOSE)


# --------------------------------------------------------------------------------------- on-policy


@pytest.mark.parametrize("variant", CLIPS)
def test_without_old_logps_the_gradient_is_reinforces(variant):
    """The ratio is 1 by definition: its value says nothing, so no metric is about it."""
    logps, _, ref_logps, advantages, mask = random_batch()
    options = {"ref_logps": ref_logps, "variant": variant, "max_tokens": MAX_TOKENS}
    loss, metrics = policy_loss(logps, advantages, mask, **options)
    weights = mask.double()
    if variant in ("grpo", "gspo"):
        weights = weights / weights.sum(dim=1, keepdim=True)
    count = {"dapo": mask.sum(), "cispo": mask.sum(), "dr_grpo": 6 * MAX_TOKENS}.get(variant, 6)
    expected = -weights * advantages[:, None] / count
    torch.testing.assert_close(gradient_of(loss, logps), expected, **CLOSE)
    assert set(metrics) == {"tokens", "k1_ref", "k3_ref"}


@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_flows_into_old_or_reference_logps(variant, kl):
    """Not even where they carry a graph: the gradients of logps and old_logps would cancel, and
    whoever forgets to detach them would train nothing."""
    logps, old_logps, ref_logps, advantages, mask = random_batch()
    options = {"beta": 0.3, "kl": kl}
    expected, _ = compute(variant, logps, old_logps, ref_logps, advantages, mask, **options)
    graph = (logps - logps.detach()).masked_fill(~mask, 0.0)  # 0, with the gradient of logps
    old_logps, ref_logps = old_logps + graph, ref_logps + graph
    attached, _ = compute(variant, logps, old_logps, ref_logps, advantages, mask, **options)
    torch.testing.assert_close(gradient_of(attached, logps), gradient_of(expected, logps), **CLOSE)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].ratio])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_that_would_overflow_stays_finite(variant, advantage):
    logps = torch.tensor([[0.0, -0.5, -1.0]], requires_grad=True)
    old_logps, mask = torch.tensor([[0.0, -300.0, -300.0]]), torch.tensor([[False, True, True]])
    settings = {"old_logps": old_logps, "variant": variant, "max_tokens": 2}
    loss, metrics = policy_loss(logps, torch.tensor([advantage]), mask, **settings)
    assert loss.isfinite() and gradient_of(loss, logps).isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("gap", [-15.0, -50.0, 5.5, 8.0, 15.0])
def test_ratios_far_from_1_are_those_of_the_equation(gap):
    for variant in ("grpo", "gspo", "cispo", "dapo"):
        old_logps = torch.full((2, 4), -20.0, dtype=torch.float64)
        logps = (old_logps + gap).requires_grad_()
        mask = torch.tensor([[False, True, True, True]] * 2)
        advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
        batch = (logps, old_logps, old_logps - 60, advantages, mask)
        loss, metrics = compute(variant, *batch, beta=0.001)
        expected = loss_by_loops(variant, *batch, beta=0.001)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        gradients = (gradient_of(loss, logps), gradient_of(expected, logps))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
        assert metrics["ratio"].item() == pytest.approx(6 * math.exp(gap))


def test_a_small_beta_counts():
    batch = random_batch()
    losses = (compute("grpo", *batch, beta=beta)[0] for beta in (0.0, 0.001))
    without, small = (gradient_of(loss, batch[0]) for loss in losses)
    assert (without - small).abs().max() > 1e-5


def test_loss_of_a_fresh_group_is_zero_and_its_gradient_is_not():
    """The first thing that newcomers trip over."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    logps, _, _, _, mask = random_batch()
    loss, _ = policy_loss(logps, group_advantages(rewards, 3), mask)
    assert abs(loss.item()) < 1e-12
    assert gradient_of(loss, logps).abs().max() > 0.01


# ------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_more_padding_changes_neither_loss_nor_metrics(variant, kl):
    logps, old_logps, ref_logps, advantages, mask = random_batch()

    def padded(x, value):
        return torch.nn.functional.pad(x, (2, 5), value=value)

    options = {"beta": 0.1, "kl": kl}
    one = compute(variant, logps, old_logps, ref_logps, advantages, mask, **options)
    wide = [padded(x, value) for x, value in ((logps, 9.0), (old_logps, -50.0), (ref_logps, 1e5))]
    two = compute(variant, *wide, advantages, padded(mask, False), **options)
    torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize(
    "parts",
    [[[0, 1, 2, 3, 4, 5]], [[5, 2], [0, 4], [1, 3]], [[3], [0], [5], [1], [4], [2]]],
    ids=str,
)
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_the_gradient_of_the_step(variant, kl, parts):
    """Micro-batches of any size and in any order; their losses and metrics add up as well."""
    logps, _, _, _, mask = batch = random_batch()
    options = {"beta": 0.1, "kl": kl}
    whole, whole_metrics = compute(variant, *batch, **options)
    options["normalizer"] = loss_normalizer(mask, variant, MAX_TOKENS)
    total, gradient, metrics = 0.0, torch.zeros_like(logps), dict.fromkeys(whole_metrics, 0)
    for rows in parts:
        loss, sums = compute(variant, *(x[rows] for x in batch), **options)
        total, gradient = total + loss, gradient + gradient_of(loss, logps)
        metrics = {name: metrics[name] + sums[name] for name in sums}
    torch.testing.assert_close(total, whole, **CLOSE)
    torch.testing.assert_close(gradient, gradient_of(whole, logps), **CLOSE)
    torch.testing.assert_close(metrics, whole_metrics, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_advantage_may_be_dropped_once_counted(variant):
    logps, old_logps, _, advantages, mask = random_batch()
    whole, _ = compute(variant, logps, old_logps, None, advantages, mask)
    rows = advantages.nonzero().flatten()
    assert len(rows) == 4
    normalizer = loss_normalizer(mask, variant, MAX_TOKENS)
    batch = (logps[rows], old_logps[rows], None, advantages[rows], mask[rows])
    kept, _ = compute(variant, *batch, normalizer=normalizer)
    torch.testing.assert_close(gradient_of(kept, logps), gradient_of(whole, logps), **CLOSE)


@pytest.mark.parametrize(
    "order",
    [[1, 0, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3], [2, 5, 0, 4, 1, 3]],
    ids=["group", "prompts", "rows"],
)
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_rows_and_of_prompts_does_not_matter(variant, kl, order):
    batch, options = random_batch(), {"beta": 0.1, "kl": kl}
    one, one_metrics = compute(variant, *batch, **options)
    two, two_metrics = compute(variant, *(x[order] for x in batch), **options)
    torch.testing.assert_close((one, one_metrics), (two, two_metrics), **CLOSE)
    torch.testing.assert_close(gradient_of(one, batch[0]), gradient_of(two, batch[0]), **CLOSE)


@pytest.mark.parametrize("variant", CLIPS)
def test_an_output_that_is_masked_out_adds_nothing_but_counts(variant):
    """It has no gradient, and is still counted among the outputs."""
    logps, old_logps, _, advantages, mask = random_batch()
    mask[1] = False
    loss, _ = compute(variant, logps, old_logps, None, advantages, mask)
    assert (gradient_of(loss, logps)[1] == 0).all()
    expected = loss_by_loops(variant, logps, old_logps, None, advantages, mask)
    torch.testing.assert_close(loss, expected, **CLOSE)


def test_the_bounds_of_each_variant():
    for variant, bounds in CLIPS.items():
        if variant not in ON_POLICY:
            assert (VARIANTS[variant].clip_low, VARIANTS[variant].clip_high) == bounds


def test_a_given_normalizer_is_used_as_it_is():
    logps, old_logps, _, advantages, mask = random_batch()
    for variant in VARIANTS:
        counted, _ = compute(variant, logps, old_logps, None, advantages, mask)
        given, _ = compute(variant, logps, old_logps, None, advantages, mask, normalizer=2.5)
        normalizer = loss_normalizer(mask, variant, MAX_TOKENS)
        torch.testing.assert_close(2.5 * given, normalizer * counted, **CLOSE)


# ----------------------------------------------------------------------------------------- metrics


def test_metrics_are_sums_over_the_tokens_of_the_mask():
    logps, old_logps, ref_logps, advantages, mask = random_batch()
    _, metrics = compute("grpo", logps, old_logps, ref_logps, advantages, mask)
    expected = dict.fromkeys(metrics, 0.0)
    for i, t in mask.nonzero().tolist():
        policy, old, reference = (x[i, t].item() for x in (logps, old_logps, ref_logps))
        ratio, ref_ratio = math.exp(policy - old), math.exp(reference - policy)
        advantage = advantages[i].item()
        expected["tokens"] += 1
        expected["ratio"] += ratio
        expected["clip_low"] += ratio < 0.8 and advantage < 0
        expected["clip_high"] += ratio > 1.2 and advantage > 0
        expected["k1_old"] += -math.log(ratio)
        expected["k3_old"] += ratio - 1 - math.log(ratio)
        expected["k1_ref"] += -math.log(ref_ratio)
        expected["k3_ref"] += ref_ratio - 1 - math.log(ref_ratio)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(expected, abs=1e-10)
    assert metrics["clip_low"] > 0 and metrics["clip_high"] > 0
    assert not any(value.requires_grad for value in metrics.values())


def test_k1_old_and_k3_old_average_to_the_kl_from_old_to_new():
    old, new = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.2, 0.3]], dtype=torch.float64).log()
    exact = (old.exp() * (old - new)).sum()
    # A row for each token that can be sampled, each as often as the old policy samples it.
    counts = (10 * old.exp()).round().int()
    old_logps, logps = (x.repeat_interleave(counts)[:, None] for x in (old, new))
    _, metrics = policy_loss(logps, torch.zeros(10), torch.ones(10, 1).bool(), old_logps=old_logps)
    for name in ("k1_old", "k3_old"):
        assert metrics[name].item() / 10 == pytest.approx(exact.item(), abs=1e-12)


def test_clip_metrics_know_wide_bounds_too():
    """R1 clips at 10: a ratio of 10.5 is inside, a ratio of 11.5 outside."""
    logps = torch.tensor([[0.0, math.log(10.5), math.log(11.5)]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True]])
    settings = {"old_logps": torch.zeros_like(logps), "clip_high": 10.0}
    assert policy_loss(logps, torch.ones(1), mask, **settings)[1]["clip_high"] == 1


# ------------------------------------------------------------------------------------------ the KL


def test_kl_estimates_equal_the_formulas():
    logps = torch.tensor([-0.1, -2.0, -3.0], dtype=torch.float64)
    ref_logps = torch.tensor([-2.0, -0.1, -3.0], dtype=torch.float64)
    x = ref_logps.exp() / logps.exp()
    for kind, formula in KL_FORMULAS.items():
        value = kl_penalty(logps, ref_logps, kind)
        torch.testing.assert_close(value, formula(x, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_penalty_is_the_kl_of_the_loss_on_policy(kind):
    """Its ratio has the value 1, and carries the gradient."""
    logps, _, ref_logps, advantages, mask = random_batch()
    options = {"ref_logps": ref_logps, "normalizer": 1, "variant": "reinforce"}
    loss, _ = policy_loss(logps, 0 * advantages, mask, beta=1.0, kl=kind, **options)
    alone = kl_penalty(logps[mask], ref_logps[mask], kind).sum()
    torch.testing.assert_close(alone, loss, **CLOSE)
    gradients = (gradient_of(alone, logps), gradient_of(loss, logps))
    torch.testing.assert_close(*gradients, **CLOSE)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    """As estimates of the KL; k2 is biased, and k1 can be negative."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    estimates = {kind: kl_penalty(policy.log(), reference.log(), kind) for kind in KL_ESTIMATORS}
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy * estimates[kind]).sum(), exact, **CLOSE)
    assert ((policy * estimates["k2"]).sum() - exact).abs() > 0.03
    assert (estimates["k3"] >= 0).all() and (estimates["k1"] < 0).any()


def test_the_clamp_is_on_one_side_only():
    """A token that the reference finds e^-50 times as likely is far from overflow: its value and
    gradient stay."""
    logps = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    value = kl_penalty(logps, logps.detach() - 50)
    assert value.item() == pytest.approx(49)
    assert gradient_of(value.sum(), logps).item() == pytest.approx(1)


@pytest.mark.parametrize("kl", ["k3", "k3_ratio"])
def test_a_token_that_the_policy_all_but_lost_has_a_finite_kl(kl):
    """And the KL never pushes such a token further down."""
    logps = torch.tensor([[0.0, -200.0, -1.0]], requires_grad=True)
    ref_logps = torch.tensor([[0.0, -1.0, -2.0]])
    mask = torch.tensor([[False, True, True]])
    assert (ref_logps - logps).exp().isinf().any(), "without the clamp the batch would overflow"
    loss, metrics = policy_loss(logps, torch.zeros(1), mask, ref_logps=ref_logps, beta=1.0, kl=kl)
    lost, kept = math.exp(10) - 11, math.exp(-1) + 1 - 1
    assert loss.isfinite()
    assert metrics["k3_ref"].item() == pytest.approx(lost + kept, rel=1e-6)
    gradient = gradient_of(loss, logps)[0]
    assert gradient.isfinite().all()
    # The loss is a mean over two tokens. k3 is constant; k3_ratio has the reverse KL's gradient,
    # unclamped.
    assert gradient[1].item() == pytest.approx(-199 / 2 if kl == "k3_ratio" else 0, rel=1e-6)


# -------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("scale", ["std", "none", "batch", "leave_one_out", "own"])
def test_advantages_equal_the_formulas_written_as_loops(scale):
    rewards = [0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 1.0]

    def deviation(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))

    expected = []
    for group in rewards[:4], rewards[4:]:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            centered = reward - sum(group) / 4
            expected.append(
                {
                    "std": centered / (deviation(group) + 1e-4),
                    "none": centered,
                    "batch": centered / (deviation(rewards) + 1e-4),
                    "leave_one_out": reward - sum(others) / 3,
                    "own": sum((reward > other) - (reward < other) for other in others) / 4,
                }[scale]
            )
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), 4, scale)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_equal_rewards_gets_exactly_zero(scale):
    """Exactly, even where their mean is rounded."""
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.mean() != 0).any(), "the mean of these rewards should be off"
    assert (group_advantages(rewards, 7, scale) == 0).all()
    assert (group_advantages(torch.cat((rewards, torch.arange(7.0))), 7, scale)[:7] == 0).all()


def test_a_group_of_nearly_equal_rewards_is_a_group_with_signal():
    """Rewards are compared, not their deviation with a threshold: `eps` alone makes a small
    difference small."""
    advantages = group_advantages(torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-5], dtype=torch.float64), 4)
    assert advantages[3].item() == pytest.approx(0.75e-5 / (0.5e-5 + 1e-4), rel=1e-6)
    assert (group_advantages(torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64), 2) != 0).all()


@pytest.mark.parametrize("scale", ["std", "none", "leave_one_out"])
def test_rewards_of_one_prompt_do_not_reach_another(scale):
    rewards = torch.tensor([1.0, 0.0, 5.0, 9.0])
    changed = torch.tensor([1.0, 0.0, -3.0, 9.0])
    one, two = (group_advantages(x, 2, scale) for x in (rewards, changed))
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one, two)


@pytest.mark.parametrize("scale", SCALES)
def test_permuting_prompts_or_outputs_permutes_the_advantages(scale):
    """So outputs of equal reward have one advantage: a rank by argsort, with its ties, has not."""
    rewards = torch.tensor([0.0, 1, 2, 0, 1, 1, 3, 0, 0], dtype=torch.float64)
    advantages = group_advantages(rewards, 3, scale)
    for order in ([6, 7, 8, 0, 1, 2, 3, 4, 5], [2, 0, 1, 5, 4, 3, 6, 8, 7]):
        permuted = group_advantages(rewards[order], 3, scale)
        torch.testing.assert_close(permuted, advantages[order], **CLOSE)


# ------------------------------------------------------------------------------- log-probabilities


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
            expected = math.log(scores[tokens[i, t]] / sum(scores))
            assert logps[i, t].item() == pytest.approx(expected, abs=1e-12)


def test_half_precision_logits_are_made_float32_first():
    """Before anything is computed from them."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, 6), generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        logits = (4 * torch.randn(2, 6, 50, generator=generator)).to(dtype)
        for function in (lambda x: token_logps(x, tokens, 0.7), lambda x: token_entropy(x, 0.7)):
            assert function(logits).dtype == torch.float32
            exact = function(logits.double())
            torch.testing.assert_close(function(logits).double(), exact, rtol=0, atol=1e-5)


def test_unlikely_tokens_keep_their_log_probability():
    logits = torch.tensor([[[0.0, -300.0], [0.0, 0.0]]])
    assert token_logps(logits, torch.tensor([[0, 1]]))[0, 1].item() == -300


def test_entropy_of_a_uniform_policy_is_log_v():
    """And the temperature counts."""
    entropy = token_entropy(torch.zeros(1, 3, 5))[0].tolist()
    assert entropy == pytest.approx([0, math.log(5), math.log(5)])
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-1.0))
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert token_entropy(logits, temperature=2.0)[0, 1].item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_impossible_token_adds_nothing_to_the_entropy(dtype):
    """Logits of -inf, as top-k leaves them: the entropy and its gradient are those of the rest."""
    generator = torch.Generator().manual_seed(5)
    rest = torch.randn(2, 4, 3, generator=generator).to(dtype).requires_grad_()
    impossible = torch.full((2, 4, 6), -math.inf, dtype=dtype)
    expected = token_entropy(rest, 0.7)
    found = token_entropy(torch.cat((impossible, rest), dim=2), 0.7)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(8.0).view(2, 4).to(found.dtype)
    wanted = gradient_of((weights * expected).sum(), rest)
    torch.testing.assert_close(gradient_of((weights * found).sum(), rest), wanted)
    logits = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]], dtype=dtype, requires_grad=True)
    entropy = token_entropy(logits)
    assert entropy.tolist() == [[0, 0]] and not gradient_of(entropy.sum(), logits).any()


# --------------------------------------------------------------------------------------- bad input


def test_bad_input_to_the_loss_is_refused_with_what_was_seen():
    logps, old_logps, ref_logps, advantages, mask = random_batch()

    def refused(message, *, advantages=advantages, mask=mask, **options):
        with pytest.raises(ValueError, match=message):
            policy_loss(logps, advantages, mask, **options)

    refused(r"advantages \(6, 1\)", advantages=advantages[:, None])
    refused(r"advantages \(7,\)", advantages=torch.zeros(7))
    refused(r"mask \(6, 6\).*\(6, 7\)", mask=mask[:, 1:])
    refused("mask must be bool, not torch.int64", mask=mask.long())
    refused("holds no token", mask=torch.zeros_like(mask))
    refused(r"old_logps \(6, 1\)", old_logps=old_logps[:, :1])
    refused(r"ref_logps \(6, 1\)", ref_logps=ref_logps[:, :1])
    refused('variant "ppo" is not among .*grpo, ', variant="ppo")
    refused(f'kl "k9" is not among {", ".join(KL_ESTIMATORS)}', kl="k9")
    refused("beta 0.1 needs ref_logps", beta=0.1)
    refused("beta .* not -1", beta=-1, ref_logps=ref_logps)
    refused("beta .* not nan", beta=math.nan, ref_logps=ref_logps)
    refused("clip_low -0.1", clip_low=-0.1)
    refused("clip_high nan", clip_high=math.nan)
    refused("max_tokens", variant="dr_grpo")
    refused("max_tokens.* is -5", variant="dr_grpo", max_tokens=-5)
    for normalizer in (0, -1, math.nan):
        refused(f"normalizer must be above 0, not {normalizer}", normalizer=normalizer)
    refused("beta .* not inf", beta=math.inf, ref_logps=ref_logps)
    refused("beta 0.001 needs ref_logps", beta=0.001)
    for variant in ON_POLICY:
        refused("on-policy", variant=variant, old_logps=old_logps)
        refused("has no clip", variant=variant, clip_high=0.3)
        refused("has no clip", variant=variant, clip_low=0.3)
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        seen = rf"logps must be \(B, T\), float32 or float64, not \(6, 7\) {dtype}$"
        refused(f"^old_{seen}", old_logps=old_logps.to(dtype))
        refused(f"^ref_{seen}", ref_logps=ref_logps.to(dtype))
        with pytest.raises(ValueError, match=f"^{seen}"):
            policy_loss(logps.detach().to(dtype), advantages, mask)
    with pytest.raises(ValueError, match=r"logps must be \(B, T\).* not \(7,\)"):
        policy_loss(logps[0], advantages[0], mask)


@pytest.mark.parametrize(
    "choices",
    [
        {"surrogate": lambda ratio, logps, advantages, *bounds: ratio.mean()},
        {"surrogate": lambda ratio, logps, advantages, *bounds: ratio.sum(1, keepdim=True)},
        {"per_output": lambda objective, mask: objective.sum()},
        {"clip_low": None},
        {"clip_high": None},
    ],
)
def test_a_new_row_that_does_not_fit_is_refused_by_name(choices, monkeypatch):
    monkeypatch.setitem(VARIANTS, "mine", Variant("a test", **choices))
    logps, old_logps, _, advantages, mask = random_batch()
    with pytest.raises(ValueError, match='variant "mine"'):
        policy_loss(logps, advantages, mask, old_logps=old_logps, variant="mine")


@pytest.mark.parametrize("share", [lambda x: x.mean(), lambda x: x[..., :1]], ids=["()", "(B, 1)"])
def test_a_row_that_gives_another_shape_is_refused_by_name(share, monkeypatch):
    """It would broadcast. What each row must give, and what this row gave, is told."""
    monkeypatch.setitem(ADVANTAGES, "mine", lambda groups, eps: share(groups))
    monkeypatch.setitem(KL_ESTIMATORS, "mine", lambda ref_log_ratio, ratio: share(ref_log_ratio))
    logps, _, ref_logps, advantages, mask = random_batch()
    with pytest.raises(ValueError, match=r'^scale "mine" must give the shape \(2, 3\), not \('):
        group_advantages(torch.arange(6.0), 3, "mine")
    with pytest.raises(ValueError, match=r'^kind "mine" must give the shape \(6, 7\), not \('):
        kl_penalty(logps, ref_logps, "mine")
    with pytest.raises(ValueError, match=r'^kl "mine" must give the shape \(6, 7\), not \('):
        policy_loss(logps, advantages, mask, ref_logps=ref_logps, beta=0.1, kl="mine")


def test_bad_input_to_other_functions_is_refused():
    rewards, infinite = torch.zeros(4), torch.tensor([0.0, math.nan, 1.0, math.inf])
    logits, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.ones(2, 3).bool()
    for message, function, *arguments in (
        (r"\(7,\).*groups of 2", group_advantages, torch.zeros(7), 2),
        (r"\(0,\).*groups of 2", group_advantages, torch.zeros(0), 2),
        (r"\(2, 2\).*groups of 2", group_advantages, torch.zeros(2, 2), 2),
        ("floating-point numbers, not torch.int64", group_advantages, rewards.long(), 2),
        ("at least 2 outputs, not 1", group_advantages, rewards, 1),
        ("2 of 4 are not, the first is nan", group_advantages, infinite, 2),
        ('scale "median" is not among std, none', group_advantages, rewards, 2, "median"),
        (r"\(2, 3, 5\).*\(2, 2\)", token_logps, logits, tokens[:, 1:]),
        (r"\(3, 5\).*\(3,\)", token_logps, logits[0], tokens[0]),
        ("temperature 0 above 0", token_logps, logits, tokens, 0),
        ("temperature nan above 0", token_entropy, logits, math.nan),
        ("temperature inf above 0", token_entropy, logits, math.inf),
        (r"logits \(3, 5\)", token_entropy, logits[0]),
        (r"ref_logps \(2, 3\)", kl_penalty, torch.zeros(2, 4), torch.zeros(2, 3)),
        ('kind "k9" is not among k1, k2, k3, k3_ratio', kl_penalty, rewards, rewards, "k9"),
        ("holds no token", loss_normalizer, ~mask),
        (r"\(3,\)", loss_normalizer, mask[0]),
        (r"\(2, 3, 1\)", loss_normalizer, mask[..., None]),
        ("torch.float32", loss_normalizer, mask.float()),
        ('variant "ppo"', loss_normalizer, mask, "ppo"),
        ("max_tokens", loss_normalizer, mask, "dr_grpo"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_the_loss_with_a_normalizer_reads_nothing_back():
    """It runs on "meta" tensors, which have no values: whatever reads one back would raise."""
    logps, old_logps, ref_logps, advantages, mask = (x.detach().to("meta") for x in random_batch())
    logps.requires_grad_()
    for variant, kl in itertools.product(VARIANTS, KL_KINDS):
        options = {"beta": 0.1, "kl": kl, "normalizer": 6}
        compute(variant, logps, old_logps, ref_logps, advantages, mask, **options)[0].backward()
