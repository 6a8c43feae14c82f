"""A reward model: a `model.ScalarModel` that learns from pairs of answers which one people prefer.

Its score of a text is its number at the text's last token.
"""

import torch.nn.functional as F
from torch import Tensor

from rlhf import check_alike


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Minus the log-likelihood of the preferences, a scalar, mean over N pairs: -log sigma(chosen -
    rejected) (InstructGPT, Ouyang et al. 2022, eq. 1; the model is Bradley and Terry's, 1952).

    chosen, rejected  (N,) float32 or float64: scores of the two answers to one prompt

    A score is a log-odds: a lead of 1 is preferred in 73 % of comparisons. What all scores have in
    common, the loss cannot see. Raises ValueError for other shapes and types, and for no pair.
    """
    check_alike("(N,)", chosen=chosen, rejected=rejected)
    if len(chosen) == 0:
        raise ValueError("no pair: there is nothing to learn from")
    return -F.logsigmoid(chosen - rejected).mean()
