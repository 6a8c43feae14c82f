"""Proximal policy optimization (Schulman et al. 2017) as RLHF uses it: the baseline is a value
model, learned beside the policy.

Where GRPO compares an output with its group, PPO asks at each token how much better things went
than the value model had expected. The clipped loss is GRPO's own, `grpo.policy_loss`, with one
advantage for each token.

Column t of `mask`, `logps` and `values` speaks of `tokens[:, t]` given `tokens[:, :t]`. So a value
is what the value model expected before it saw the token. B rows; T token positions. The mask is
True on sampled tokens; places outside of it may hold anything.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ScalarModel
from rlhf import check_alike

# -------------------------------------------------------------------------------------- equations


def token_rewards(
    rewards: Tensor, logps: Tensor, ref_logps: Tensor | None, mask: Tensor, beta: float
) -> Tensor:
    """What each token earns, (B, T), 0 outside the mask: at the last token of a row its reward, and
    at every token the price of leaving the reference, -beta log(pi / pi_ref) (Ziegler et al. 2019,
    eq. 2; InstructGPT, Ouyang et al. 2022, eq. 2).

    rewards    (B,) float32 or float64, a row's own
    logps      (B, T) float32 or float64, in nats, of the policy that sampled
    ref_logps  (B, T), like logps, of the reference; None where beta is 0
    mask       (B, T) bool, at least one token in each row
    beta       the price of a nat, at least 0

    No gradient flows through it. Reads the mask back, so call it once a step. Raises ValueError for
    other shapes and types, for a row without a token, and for beta > 0 without ref_logps.
    """
    others = {} if ref_logps is None else {"ref_logps": ref_logps}
    check_alike("(B, T)", logps=logps, mask=mask, **others)
    check_alike("(B,)", rewards=rewards)
    if len(rewards) != len(mask):
        raise ValueError(f"rewards {tuple(rewards.shape)} must be a number for each row of logps")
    if not 0 <= beta < math.inf or (beta > 0 and ref_logps is None):
        raise ValueError(f"beta {beta} must be at least 0, and needs ref_logps above it")
    if not mask.any(dim=1).all():
        raise ValueError("a row of the mask holds no token: its reward has no place")
    ahead = mask.flip(1).cumsum(dim=1).flip(1)  # how many tokens are still to come, with this one
    earned = rewards.detach()[:, None] * (mask & (ahead == 1))
    if beta > 0:
        earned = earned - beta * (logps - ref_logps).detach().masked_fill(~mask, 0.0)
    return earned


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and the returns that a value model should learn, (B, T) each,
    exactly 0 outside the mask (Schulman et al. 2016, eq. 16):

        delta_t = r_t + gamma V_t+1 - V_t                     the TD error
        A_t     = delta_t + gamma lam A_t+1
        return  = A_t + V_t

    rewards  (B, T) float32 or float64, what each token earns: `token_rewards`
    values   (B, T), like rewards: `values_of`
    mask     (B, T) bool; tokens outside of it are passed over
    gamma    the discount of a token, from 0 to 1
    lam      from 0 to 1. At 0, the advantage is the TD error (eq. 17). At 1, it is the sum of the
             rewards to come, less the value (eq. 18)

    After a row's last token nothing is expected, even where the row was cut: the rules score a cut
    row as it stands. No gradient flows. Raises ValueError for other shapes, types and values.
    """
    check_alike("(B, T)", rewards=rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma {gamma} and lam {lam} must be from 0 to 1")
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    returns = advantages + values
    return advantages.masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (B, T) float32 or float64 with mean 0 and standard deviation 1, over n - 1, on the mask
    (B, T) bool; 0 outside. Equal numbers give 0.

    Whiten advantages, not returns: the value model learns what is earned. Reads the mask back, so
    call it once a step. Raises ValueError for other shapes and types, and for an empty mask.
    """
    check_alike("(B, T)", x=x, mask=mask)
    inside = x[mask]
    if len(inside) == 0:
        raise ValueError(f"mask {tuple(mask.shape)} holds no token")
    if (inside == inside[0]).all():  # by comparison: a rounded mean leaves a deviation of 1e-8
        return torch.zeros_like(x)
    return ((x - inside.mean()) / inside.std()).masked_fill(~mask, 0.0)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    normalizer: float | None = None,
) -> Tensor:
    """Half the mean over the mask of the greater of two squared errors, a scalar: of the value, and
    of the value that moved by `clip` at most (Schulman et al. 2017, eq. 9, with the clip of
    OpenAI's baselines).

        0.5 mean max( (V - return)^2, (V_old + clip(V - V_old, -clip, clip) - return)^2 )

    values      (B, T) float32 or float64; the gradient flows through them alone
    old_values  (B, T), like values, of the value model before the step
    returns     (B, T), like values, as `gae` gives them: not whitened
    mask        (B, T) bool
    clip        at least 0, in units of the reward; inf for no clip
    normalizer  the tokens of the optimizer step that these rows are part of; None takes these rows
                for the whole step, and reads their mask back

    Raises ValueError for other shapes, types and values, and for an empty mask.
    """
    check_alike("(B, T)", values=values, old_values=old_values, returns=returns, mask=mask)
    normalizer = int(mask.sum()) if normalizer is None else normalizer
    if not normalizer > 0:
        raise ValueError(f"{normalizer} tokens: there is nothing to learn from")
    if not clip >= 0:
        raise ValueError(f"clip must be at least 0, not {clip}")
    # Fill before any product: junk in the padding would be nan in the gradient.
    values = values.masked_fill(~mask, 0.0)
    old_values, returns = (x.detach().masked_fill(~mask, 0.0) for x in (old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum() / normalizer


def values_of(model: ScalarModel, tokens: Tensor, first: int = 0) -> Tensor:
    """The values (B, T - first) of `tokens` (B, T) int64 from column `first` on: what the model
    expected before each token, which is its number one place to the left. The first column is 0."""
    return F.pad(model(tokens, first=first)[:, :-1], (1, 0))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask, a scalar, given (B, T) each. It is 1
    where the values tell all, 0 where they tell no more than the mean of the returns does, and less
    where they mislead. Equal returns leave nothing to explain: 0. Reads the mask back. Raises
    ValueError for other shapes and types."""
    check_alike("(B, T)", values=values, returns=returns, mask=mask)
    values, returns = values[mask], returns[mask]
    if len(returns) == 0 or (returns == returns[0]).all():
        return values.new_zeros(())
    return 1 - (returns - values).var() / returns.var()
