"""The losses of DPO, against loops in float64."""

import math

import pytest
import torch

from rlhf.dpo import DPO_LOSSES, dpo_loss

FORMULAS = {  # of the gap h and beta, as the papers write them
    "sigmoid": lambda h, beta: math.log(1 + math.exp(-beta * h)),
    "ipo": lambda h, beta: (h - 1 / (2 * beta)) ** 2,
}


def random_pairs(N=7, seed=0):
    """Sums of log-probabilities: chosen and rejected, of the policy and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(N, generator=generator, dtype=torch.float64) for _ in range(4)]


def gaps(logps):
    chosen, rejected, ref_chosen, ref_rejected = (x.tolist() for x in logps)
    return [
        (chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i]) for i in range(len(chosen))
    ]


@pytest.mark.parametrize("kind", DPO_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_equals_the_papers_equations(kind, smoothing, beta):
    logps = random_pairs()
    loss, metrics = dpo_loss(*logps, beta=beta, label_smoothing=smoothing, kind=kind)
    formula, h = FORMULAS[kind], gaps(logps)
    right = [(1 - smoothing) * formula(x, beta) + smoothing * formula(-x, beta) for x in h]
    assert loss.item() == pytest.approx(sum(right) / 7, rel=1e-12)
    assert metrics["margin"].item() == pytest.approx(sum(beta * x for x in h) / 7, rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(sum(x > 0 for x in h) / 7)


@pytest.mark.parametrize("kind", DPO_LOSSES)
def test_gradients_equal_finite_differences(kind):
    """And none flows into the reference."""
    logps, step = [x.requires_grad_() for x in random_pairs()], 1e-6
    dpo_loss(*logps, label_smoothing=0.1, kind=kind)[0].backward()
    assert logps[2].grad is None and logps[3].grad is None
    for which in (0, 1):
        for i in range(7):
            ends = []
            for sign in (1, -1):
                moved = [x.detach().clone() for x in logps]
                moved[which][i] += sign * step
                ends.append(dpo_loss(*moved, label_smoothing=0.1, kind=kind)[0].item())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert logps[which].grad[i].item() == pytest.approx(slope, abs=1e-7)
            assert abs(slope) > 1e-4


def test_at_the_start_nothing_is_preferred():
    """The policy is the reference: log 2, a margin of 0, and no pair is right by a tie."""
    chosen, rejected, *_ = random_pairs()
    loss, metrics = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone())
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0


def test_ipo_and_smoothing_stop_where_dpo_goes_on():
    """With sure labels DPO wants ever more; IPO wants 1 / (2 beta) nats, cDPO the margin whose
    sigmoid is the share of right labels."""

    def slope(gap, **how):
        chosen = torch.tensor([float(gap)], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        dpo_loss(chosen, zero, zero, zero, beta=0.1, **how)[0].backward()
        return chosen.grad.item()

    assert slope(100) < 0
    assert slope(5, kind="ipo") == pytest.approx(0, abs=1e-12) and slope(9, kind="ipo") > 0
    assert slope(10 * math.log(0.9 / 0.1), label_smoothing=0.1) == pytest.approx(0, abs=1e-12)


def test_bad_pairs_and_settings_are_refused():
    logps, one = random_pairs(), torch.zeros(1, dtype=torch.float64)
    for i, name in enumerate(
        ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    ):
        with pytest.raises(ValueError, match=f"{name}.* must" if i else "must have the shape of"):
            dpo_loss(*(one if j == i else x for j, x in enumerate(logps)))
        with pytest.raises(ValueError, match=f"{name} must be .*, not torch.float16"):
            dpo_loss(*(x.half() if j == i else x for j, x in enumerate(logps)))
    with pytest.raises(ValueError, match=r"chosen_logps must be \(N,\), not \(7, 1\)"):
        dpo_loss(*(x[:, None] for x in logps))
    with pytest.raises(ValueError, match="no pair"):
        dpo_loss(*(x[:0] for x in logps))
    for how, complaint in (
        ({"kind": "hinge"}, '"hinge" is not among sigmoid, ipo'),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": math.nan}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": -0.1}, "from 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            dpo_loss(*logps, **how)
