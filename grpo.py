"""The mathematics of GRPO (DeepSeekMath, Shao et al. 2024, section 4.1), in the paper's order.

For each question q, sample a group of G outputs o_1 ... o_G from the old policy and score them: r_1 ... r_G. Then

    A_i      = (r_i - mean(r)) / std(r)                                            the advantage of every token of o_i
    ratio_it = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)
    KL_it    = pi_ref / pi - log(pi_ref / pi) - 1                                  the k3 estimator, eq. 4
    J        = 1/G sum_i 1/|o_i| sum_t [ min(ratio_it A_i, clip(ratio_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]   eq. 3

and go up the gradient of J. There is no value model: the group's mean is the baseline.

Pure functions of tensors. B rows, the G of one question adjacent; T token positions; V vocabulary. Entry [:, t] of
`mask`, `logps` and `entropy` speaks of `tokens[:, t]` given `tokens[:, :t]`, so column 0 is always 0; only
`token_logps` and `token_entropy` know of the shift between logits and tokens.

The loss is about 0 and its value means nothing: where the ratio is 1 it is minus the mean of advantages that sum to
0. Its gradient is what it is for. Watch the rewards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """Advantages (B,) of `rewards` (B,), float: each reward against its group of `group_size` adjacent rows.

    scale "std" divides by the group's standard deviation (n - 1 in its denominator) plus `eps`; "none" only takes the
    mean away. A group of equal rewards gets exactly 0. Raises ValueError where B is no multiple of the group size,
    where scale is unknown, and for a group of 1, which has no spread to measure.
    """
    if group_size < 2:
        raise ValueError("group advantages need a group of at least 2 completions")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} are not groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (P, G)
    centered = groups - groups.mean(dim=1, keepdim=True)
    # Told by equality, not by the deviation: rounding of the mean can leave 1e-8, which 1 / std would blow up.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    centered = centered.masked_fill(equal, 0.0)
    if scale == "std":
        centered = centered / (groups.std(dim=1, keepdim=True) + eps)
    elif scale != "none":
        raise ValueError(f'scale is "std" or "none", not "{scale}"')
    return centered.flatten()


def token_logps(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(o_t | o_<t), (B, T), of `tokens` (B, T) under `logits` (B, T, V), in float32 (float64 for float64).

    `temperature` is the one that the tokens were sampled at: the policy that is trained is the one that was sampled.
    """
    logits = _upcast(logits[:, :-1]) / temperature
    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return _shift(chosen - logits.logsumexp(dim=-1))


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats, (B, T), of the distribution that each token was drawn from, given `logits` (B, T, V)."""
    logps = (_upcast(logits[:, :-1]) / temperature).log_softmax(dim=-1)
    return _shift(-(logps.exp() * logps).sum(dim=-1))


def kl_penalty(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || pi_ref) at each token, (B, T), never negative (eq. 4; Schulman 2020).

    Unbiased as a value. As a term of the loss it is what the paper does, but its expected gradient is that of the
    other direction, KL(pi_ref || pi).
    """
    delta = ref_logps - logps
    return torch.expm1(delta) - delta


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """What eq. 3 maximises at each token, before the KL: the lesser of the two products, for either sign of A."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


@dataclass(frozen=True)
class Variant:
    """One objective. `scale` is for `group_advantages`; the ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    scale: str
    clip_low: float
    clip_high: float


VARIANTS = {
    "grpo": Variant(scale="std", clip_low=0.2, clip_high=0.2),  # DeepSeekMath eq. 3; R1 clips far wider, at 10
}


def loss_normalizer(mask: Tensor, variant: str = "grpo") -> int:
    """What the loss of a whole optimizer step is divided by: its number of outputs. Counted over the step, before it
    is cut into micro-batches, it makes their gradients add up to the gradient of the step."""
    return len(mask)


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    variant: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    beta: float = 0.0,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus J of eq. 3: a scalar to call backward() on, and its metrics.

    logps (B, T) carry the gradient; old_logps (B, T) are those of the policy that sampled, None where that is this
    very policy; ref_logps (B, T) are needed where beta > 0; advantages are (B,), or (B, T) for one per token; mask
    (B, T) bool is True on the tokens of the outputs. clip_low and clip_high replace the variant's own. `normalizer`
    is `loss_normalizer` of the optimizer step that these rows are part of; None takes these rows for the whole.

    The metrics are sums over the tokens of the mask, so that micro-batches add up; divide by "tokens". Raises
    ValueError for an unknown variant, for shapes that would broadcast, and for beta > 0 without ref_logps.
    """
    if variant not in VARIANTS:
        raise ValueError(f'variant "{variant}" is not among {", ".join(VARIANTS)}')
    if beta > 0 and ref_logps is None:
        raise ValueError("beta > 0 needs ref_logps")
    for name, x in (("mask", mask), ("old_logps", old_logps), ("ref_logps", ref_logps)):
        if x is not None and x.shape != logps.shape:
            raise ValueError(f"{name} {tuple(x.shape)} must have the shape of logps {tuple(logps.shape)}")
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise ValueError(f"advantages {tuple(advantages.shape)} must be (B,) or have the shape of logps")
    row = VARIANTS[variant]
    clip_low = row.clip_low if clip_low is None else clip_low
    clip_high = row.clip_high if clip_high is None else clip_high
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # the same for every token of an output
    old_logps = logps.detach() if old_logps is None else old_logps  # on-policy: the ratio is 1, its gradient is not 0
    # Padding holds anything, so nothing below may see it: exp of junk is inf, and the gradient of 0 * inf is nan.
    logps, old_logps = logps.masked_fill(~mask, 0.0), old_logps.masked_fill(~mask, 0.0)

    ratio = (logps - old_logps).exp()
    objective = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    metrics = {
        "tokens": mask.sum(),
        "ratio": (ratio * mask).sum(),
        "clip_low": ((ratio < 1 - clip_low) & (advantages < 0) & mask).sum(),
        "clip_high": ((ratio > 1 + clip_high) & (advantages > 0) & mask).sum(),
    }
    if beta > 0:
        kl = kl_penalty(logps, ref_logps.masked_fill(~mask, 0.0))
        objective = objective - beta * kl
        metrics["kl"] = kl.sum()

    lengths = mask.sum(dim=1).clamp(min=1)  # |o_i|
    per_output = objective.masked_fill(~mask, 0.0).sum(dim=1) / lengths
    loss = -per_output.sum() / (loss_normalizer(mask, variant) if normalizer is None else normalizer)
    return loss, {name: value.detach() for name, value in metrics.items()}


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _shift(x: Tensor) -> Tensor:
    """Move (B, T-1) to the column of the token that each entry speaks of; no logits speak of token 0."""
    return torch.nn.functional.pad(x, (1, 0))
