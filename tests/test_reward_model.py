"""The loss of a reward model, against a loop in float64."""

import math

import pytest
import torch

from rlhf.reward_model import preference_loss

CLOSE = {"rtol": 0, "atol": 1e-10}


def test_the_loss_is_bradley_and_terrys_likelihood():
    """Its gradient is the share that it gives to the wrong order, also where exp would overflow."""
    chosen = torch.tensor([0.3, -1.0, 2.0, -900.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 1.5, -3.0, 900.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(chosen, rejected)
    total, wrong = 0.0, []
    for a, b in zip(chosen.tolist(), rejected.tolist()):
        p = 1 / (1 + math.exp(min(b - a, 700.0)))
        total += -math.log(p) if b - a < 700 else b - a
        wrong.append((1 - p) / 5)
    assert loss.item() == pytest.approx(total / 5, abs=1e-10)
    loss.backward()
    torch.testing.assert_close(chosen.grad, -torch.tensor(wrong).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(rejected.grad, -chosen.grad, **CLOSE)


def test_a_lead_of_1_is_preferred_in_73_percent_and_levels_do_not_matter():
    chosen, rejected = torch.tensor([3.0]), torch.tensor([2.0])
    assert torch.exp(-preference_loss(chosen, rejected)).item() == pytest.approx(0.731, abs=1e-3)
    same = preference_loss(chosen + 5, rejected + 5)
    torch.testing.assert_close(same, preference_loss(chosen, rejected))


@pytest.mark.parametrize(
    ("chosen", "rejected", "complaint"),
    [
        (torch.zeros(3), torch.zeros(1), r"rejected \(1,\) must have the shape of chosen \(3,\)"),
        (torch.zeros(3, 1), torch.zeros(3, 1), r"chosen must be \(N,\), not \(3, 1\)"),
        (torch.zeros(3).bfloat16(), torch.zeros(3), "chosen must be .*, not torch.bfloat16"),
        (torch.zeros(3), torch.zeros(3).long(), "rejected must be .*, not torch.int64"),
        (torch.zeros(0), torch.zeros(0), "no pair"),
    ],
)
def test_pairs_that_would_broadcast_are_refused(chosen, rejected, complaint):
    with pytest.raises(ValueError, match=complaint):
        preference_loss(chosen, rejected)
