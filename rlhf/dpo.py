"""Direct preference optimization (Rafailov et al. 2023): pairs of answers train the policy itself,
without a reward model, a value model or sampling."""

import math

import torch.nn.functional as F
from torch import Tensor

from rlhf import check_alike

# row(gap, beta) gives the loss of each pair, (N,), where the chosen answer has gained `gap` nats on
# the rejected answer since the reference.
DPO_LOSSES = {
    "sigmoid": lambda gap, beta: -F.logsigmoid(beta * gap),  # Rafailov et al. 2023, eq. 7
    "ipo": lambda gap, beta: (gap - 1 / (2 * beta)) ** 2,  # Azar et al. 2023, eq. 17
}


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a scalar, mean over N pairs, and its metrics, means over the pairs.

    logps            (N,) float32 or float64, in nats: sums over a completion's tokens, its end of
                     sequence included, of the policy and of the reference; no gradient flows into
                     the reference's
    beta             how dear it is to leave the reference; above 0
    label_smoothing  the share of pairs that are labelled the wrong way round, from 0 to below 0.5:
                     the loss is the mean over both ways (for "sigmoid" cDPO, Mitchell 2023, eq. 3)
    kind             a row of DPO_LOSSES. "ipo" aims at a gap of 1 / (2 beta) nats and stops there;
                     the paper's sums are used, not the means over tokens that some libraries take

    "margin" is beta times the gap: the difference of the two implicit rewards. "accuracy" is the
    share of margins above 0. Both log-probabilities may fall while the margin rises: log both.
    Raises ValueError for other shapes, types and values, and for no pair.
    """
    check_alike(
        "(N,)",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    if len(chosen_logps) == 0:
        raise ValueError("no pair: there is nothing to learn from")
    if kind not in DPO_LOSSES:
        raise ValueError(f'kind "{kind}" is not among {", ".join(DPO_LOSSES)}')
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be from 0 to below 0.5, not {label_smoothing}")

    chosen_gain = chosen_logps - ref_chosen_logps.detach()
    rejected_gain = rejected_logps - ref_rejected_logps.detach()
    gap, row = chosen_gain - rejected_gain, DPO_LOSSES[kind]
    loss = (1 - label_smoothing) * row(gap, beta)
    if label_smoothing:
        loss = loss + label_smoothing * row(-gap, beta)
    margin = beta * gap.detach()
    return loss.mean(), {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}
