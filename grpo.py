"""The mathematics of GRPO (DeepSeekMath, Shao et al. 2024, section 4.1), in the paper's order, and of its family.

For each question q, sample a group of G outputs o_1 ... o_G from the old policy and score them: r_1 ... r_G. Then

    A_i      = (r_i - mean(r)) / std(r)                                            the advantage of every token of o_i
    ratio_it = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)
    KL_it    = pi_ref / pi - log(pi_ref / pi) - 1                                  the k3 estimator, eq. 4
    J        = 1/G sum_i 1/|o_i| sum_t [ min(ratio_it A_i, clip(ratio_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]   eq. 3

and go up the gradient of J, averaged over the questions. There is no value model: the group's mean is the baseline.

Pure functions of tensors. B rows, the G of one question adjacent; T token positions; V vocabulary. Entry [:, t] of
`mask`, `logps` and `entropy` speaks of `tokens[:, t]` given `tokens[:, :t]`, so column 0 is always 0; only
`token_logps` and `token_entropy` know of the shift between logits and tokens. Every log-probability is that of the
distribution that was sampled from, its temperature included.

The value of the loss means nothing. At ratio 1 that of GRPO is minus the mean of advantages that sum to 0, so it is 0
whatever the policy does; its gradient is what it is for. Watch the rewards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------- advantages

SCALES = {  # what rewards less their group's mean are divided by, given the groups (P, G)
    "std": lambda groups, eps: groups.std(dim=1, keepdim=True) + eps,
    "none": lambda groups, eps: 1.0,
    "batch": lambda groups, eps: groups.std() + eps,  # one deviation for all questions
    "leave_one_out": lambda groups, eps: 1 - 1 / groups.shape[1],  # makes it r_i - mean of the others
}


def group_advantages(rewards: Tensor, group_size: int, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """Advantages (B,) of `rewards` (B,), float: each reward against its group of `group_size` adjacent rows.

    The group's mean is taken away; then `scale` "std" divides by the group's standard deviation (n - 1 in its
    denominator) plus `eps`, "batch" by that of all rewards plus `eps`, and "none" by nothing; "leave_one_out" takes
    the mean of the others away instead (Kool et al. 2019). A group of equal rewards gets exactly 0.

    Reads the rewards back to check them, so call it once a step. Raises ValueError for rewards that are no groups of
    this size, or not finite, for a group of 1, which has nothing to compare with, and for an unknown scale.
    """
    _check_name("scale", scale, SCALES)
    if group_size < 2:
        raise ValueError(f"a group must have at least 2 outputs, not {group_size}")
    if rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} are not groups of {group_size}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating-point numbers, not {rewards.dtype}")
    if not rewards.isfinite().all():
        wrong = rewards[~rewards.isfinite()]
        raise ValueError(f"rewards must be finite: {len(wrong)} of {len(rewards)} are not, the first is {wrong[0]}")
    groups = rewards.view(-1, group_size)  # (P, G)
    centered = groups - groups.mean(dim=1, keepdim=True)
    # Told by equality, not by the deviation: rounding of the mean can leave 1e-8, which 1 / std would blow up.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return (centered / SCALES[scale](groups, eps)).masked_fill(equal, 0.0).flatten()


# ------------------------------------------------------------------------------------------------ log-probabilities


def token_logps(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(o_t | o_<t), (B, T), of `tokens` (B, T) under `logits` (B, T, V), in float32 (float64 for float64).

    `temperature` is the one that the tokens were sampled at: the policy that is trained is the one that was sampled.
    Raises ValueError for shapes that do not match and for a temperature that is not above 0.
    """
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be (B, T, V) for tokens {tuple(tokens.shape)}")
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return _shift(chosen - scaled.logsumexp(dim=-1))


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats, (B, T), of the distribution that each token was drawn from, given `logits` (B, T, V)."""
    logps = _scaled(logits, temperature).log_softmax(dim=-1)
    return _shift(-(logps.exp() * logps).sum(dim=-1))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """The logits that speak of a token, at the precision that log-probabilities need."""
    if logits.dim() != 3 or not 0 < temperature < math.inf:
        raise ValueError(f"logits {tuple(logits.shape)} must be (B, T, V), temperature {temperature} above 0")
    return logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _shift(x: Tensor) -> Tensor:
    """Move (B, T-1) to the column of the token that each entry speaks of; no logits speak of token 0."""
    return torch.nn.functional.pad(x, (1, 0))


# --------------------------------------------------------------------------------------------------------------- KL

MAX_LOG_RATIO = 10.0


def k3(ref_log_ratio: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1 (eq. 4). Where the reference finds a token more than e^10 times likelier, the
    value stays and the gradient is 0. The clamp stands before exp: after it, the gradient would be 0 * inf = nan."""
    ref_log_ratio = ref_log_ratio.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(ref_log_ratio) - ref_log_ratio


def k3_ratio(ref_log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """k3 times `ratio`, the differentiable pi / pi_old. The product pi_ref / pi_old does not depend on pi, so the
    gradient is -ratio * log(pi_ref / pi), exact and far from overflow where k3 is constant."""
    ref_over_old = (ref_log_ratio + ratio.log()).detach().clamp(max=MAX_LOG_RATIO).exp()
    return ref_over_old - ratio * (ref_log_ratio + 1)


# Each takes log(q / p) of tokens sampled from p, and estimates KL(p || q): p is the policy and q the reference, or p
# the old policy and q the new one.
KL_ESTIMATORS = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": k3,
}
KL_TERMS = (*KL_ESTIMATORS, "k3_ratio")  # what beta can weigh


def kl_penalty(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    """An estimate of KL(pi || pi_ref) at each token, (B, T), for tokens sampled from pi (Schulman 2020).

    As a value, "k1" and "k3" are unbiased and k3 is never negative. As a term of a loss they do something else. The
    expected gradient, over tokens that the policy sampled, is

        "k1"         0: nothing but noise
        "k2"         that of KL(pi || pi_ref), the reverse KL
        "k3"         that of KL(pi_ref || pi), the forward KL: what the paper publishes
        "k3_ratio"   that of KL(pi || pi_ref), also for tokens that an older policy sampled (DeepSeek-V3.2)

    at each position, with the prefixes as they were sampled, and as long as what divides the loss does not depend on
    the sample: 1/|o_i| does. k3 says too little, as a value and as a gradient, of tokens that the policy has all but
    lost: beyond a ratio of e^10 it is constant. "k3_ratio" is a kind for `policy_loss` alone, which has the ratio.
    """
    _check_name("kind", kind, KL_ESTIMATORS)
    _check_shapes(logps, ref_logps=ref_logps)
    return KL_ESTIMATORS[kind](ref_logps - logps)


# -------------------------------------------------------------------------------- the independent choices of a loss


def token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old of each token, (B, T), up to e^20."""
    return log_ratio.clamp(max=20).exp()  # before exp: inf * 0 is nan, in the loss or in its gradient


def sequence_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of an output's token ratios (GSPO eq. 7), at each of its tokens, (B, T).

    As in GSPO-token (eq. 14) the value is the mean's and the gradient goes through the token's own log-probability.
    For one advantage per output, their mean over the output has GSPO's gradient; advantages by token work as well.
    """
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return token_ratio(mean.detach() + (log_ratio - log_ratio.detach()), mask)


def clipped_surrogate(ratio: Tensor, logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """What eq. 3 maximises at each token, before the KL: the lesser of the two products, for either sign of A."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped_weight(ratio: Tensor, logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """CISPO: the clipped ratio is a constant weight on the log-probability, so no token loses its gradient."""
    return ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logps


def log_likelihood(ratio: None, logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """REINFORCE: no ratio, so only for tokens of the very policy that is updated."""
    return advantages * logps


def output_mean(objective: Tensor, mask: Tensor) -> Tensor:
    """1/|o_i| sum_t, (B,): each output counts the same, so a token counts less the longer its output is."""
    return (objective * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def output_sum(objective: Tensor, mask: Tensor) -> Tensor:
    """sum_t, (B,): each token counts the same."""
    return (objective * mask).sum(dim=1)


def count_outputs(mask: Tensor, max_tokens: int | None) -> int:
    return len(mask)


def count_tokens(mask: Tensor, max_tokens: int | None) -> int:
    return int(mask.sum())


def count_budget(mask: Tensor, max_tokens: int | None) -> int:
    """The tokens that the outputs could have had: unlike a count of tokens, no output changes it."""
    if max_tokens is None or not max_tokens >= 1:
        raise ValueError(f"max_tokens, the limit on the length of an output, must be at least 1: it is {max_tokens}")
    return len(mask) * max_tokens


@dataclass(frozen=True)
class Variant:
    """One objective, as independent choices; the defaults are GRPO's.

    To be maximised: the sum over outputs of per_output(surrogate - beta * KL, mask), divided by normalizer(mask,
    max_tokens); surrogate(ratio, logps, advantages, clip_low, clip_high) gets and gives (B, T), with zeros outside the
    mask, and per_output gives (B,). Where the advantage is 0 a surrogate has no gradient: without a KL, train.py leaves
    such rows out. A ratio of None makes the variant on-policy: its surrogate gets None.
    The ratio is clipped to [1 - clip_low, 1 + clip_high]; both are None for a surrogate that has no clip. To count
    clipped tokens, `policy_loss` calls the surrogate again with infinite bounds, so pass other parameters to it through
    functools.partial. `scale` is for `group_advantages`: whoever calls that must pass it on.
    """

    source: str
    scale: str = "std"
    ratio: Callable | None = token_ratio
    surrogate: Callable = clipped_surrogate
    per_output: Callable = output_mean
    normalizer: Callable = count_outputs
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2


ON_POLICY = {"ratio": None, "surrogate": log_likelihood, "clip_low": None, "clip_high": None, "per_output": output_sum}

VARIANTS = {  # each row says where it departs from GRPO
    "grpo": Variant("Shao et al. 2024, eq. 3"),  # it names no bounds: 0.2 is PPO's; R1's is 10
    "dr_grpo": Variant("Liu et al. 2025, sec. 3.2", scale="none", per_output=output_sum, normalizer=count_budget),
    # The loss alone, without dynamic sampling; over the tokens of the step, where eq. 8 has those of each question.
    "dapo": Variant("Yu et al. 2025, eq. 8", per_output=output_sum, normalizer=count_tokens, clip_high=0.28),
    "gspo": Variant("Zheng et al. 2025, eq. 5", ratio=sequence_ratio, clip_low=3e-4, clip_high=4e-4),
    "cispo": Variant(  # the paper sets no lower bound and does not tell the upper one; 5 is ScaleRL's
        "MiniMax 2025 (M1), eq. 4",
        surrogate=clipped_weight,
        per_output=output_sum,
        normalizer=count_tokens,
        clip_low=math.inf,
        clip_high=4.0,
    ),
    "reinforce": Variant("Williams 1992", scale="none", **ON_POLICY),
    "rloo": Variant("Ahmadian et al. 2024", scale="leave_one_out", **ON_POLICY),
}


# --------------------------------------------------------------------------------------------------------- the loss


def loss_normalizer(mask: Tensor, variant: str = "grpo", max_tokens: int | None = None) -> int:
    """What the loss of a whole optimizer step is divided by, given the mask (B, T) of all its rows.

    Counted once, before any row is dropped and before the step is cut into micro-batches, it makes their gradients
    add up to the gradient of the step. `max_tokens`, the limit on the length of an output, is needed by "dr_grpo".
    Reads the mask back. Raises ValueError for an unknown variant and for a mask that is not bool or holds no token.
    """
    _check_name("variant", variant, VARIANTS)
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be (B, T) and bool, not {tuple(mask.shape)} {mask.dtype}")
    if not mask.any():
        raise ValueError(f"mask {tuple(mask.shape)} holds no token: there is nothing to learn from")
    return VARIANTS[variant].normalizer(mask, max_tokens)


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
    kl: str = "k3",
    max_tokens: int | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus J of eq. 3, or of the `variant`'s own objective: a scalar to call backward() on, and its metrics.

    logps (B, T) carry the gradient; old_logps (B, T) are those of the policy that sampled, None where that is this
    very policy; ref_logps (B, T) are needed where beta > 0; advantages are (B,), or (B, T) for one per token; mask
    (B, T) bool is True on the tokens of the outputs. clip_low and clip_high replace the variant's own; inf switches a
    side off. `kl` is the kind of `kl_penalty` that beta weighs, or "k3_ratio"; which gradient each gives is said
    there. `normalizer` is `loss_normalizer` of the optimizer step that these rows are part of, used as it is; None
    takes these rows for the whole step, and reads them back.

    The metrics are sums over the tokens of the mask, so that micro-batches add up; divide by "tokens". Where there
    are old_logps: "ratio", "clip_low" and "clip_high" (tokens at which the clip changes the objective, below 1 and
    above), "k1_old" and "k3_old" (estimates of KL(old || pi)). Where there are ref_logps: "k1_ref" and "k3_ref" (of
    KL(pi || ref), as far as the tokens are pi's own). Raises ValueError for unknown names, shapes that would broadcast,
    a mask that is not bool, logps below float32, bounds or a beta below 0, beta > 0 without ref_logps, a normalizer
    that is not above 0, old_logps for a variant without a ratio, and bounds for one without a clip.
    """
    _check_name("variant", variant, VARIANTS)
    _check_name("kl", kl, KL_TERMS)
    if logps.dim() != 2 or logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logps must be (B, T), float32 or float64, not {tuple(logps.shape)} {logps.dtype}")
    _check_shapes(logps, mask=mask, old_logps=old_logps, ref_logps=ref_logps)
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise ValueError(f"advantages {tuple(advantages.shape)} must be (B,) or (B, T), logps {tuple(logps.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a number of at least 0, not {beta}")
    if beta > 0 and ref_logps is None:
        raise ValueError(f"beta {beta} needs ref_logps")
    row = VARIANTS[variant]
    if row.ratio is None and old_logps is not None:
        raise ValueError(f'variant "{variant}" is on-policy, without a ratio: it takes no old_logps')
    if (row.clip_low is None) != (row.clip_high is None):
        raise ValueError(f'variant "{variant}" must have both bounds or neither, not {row.clip_low}, {row.clip_high}')
    if row.clip_low is None and not (clip_low is None and clip_high is None):
        raise ValueError(f'variant "{variant}" has no clip: it takes no clip_low and no clip_high')
    clip_low = row.clip_low if clip_low is None else clip_low
    clip_high = row.clip_high if clip_high is None else clip_high
    if row.clip_low is not None and not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low {clip_low} and clip_high {clip_high} must be at least 0")
    if normalizer is None:
        normalizer = loss_normalizer(mask, variant, max_tokens)
    if not normalizer > 0:
        raise ValueError(f"normalizer must be above 0, not {normalizer}")

    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(logps)  # the same for every token of an output
    # Padding holds anything, so nothing below may see it: exp of junk is inf, and the gradient of 0 * inf is nan.
    logps, advantages = logps.masked_fill(~mask, 0.0), advantages.masked_fill(~mask, 0.0)
    # On-policy the ratio is 1, but its gradient is not 0.
    log_ratio = logps - (logps if old_logps is None else old_logps.masked_fill(~mask, 0.0)).detach()

    ratio = row.ratio(log_ratio, mask) if row.ratio else None
    objective = surrogate = row.surrogate(ratio, logps, advantages, clip_low, clip_high)
    if ref_logps is not None:
        ref_log_ratio = ref_logps.detach().masked_fill(~mask, 0.0) - logps
    if beta > 0:
        by_ratio = kl == "k3_ratio"
        kl_term = (
            k3_ratio(ref_log_ratio, token_ratio(log_ratio, mask)) if by_ratio else KL_ESTIMATORS[kl](ref_log_ratio)
        )
        objective = surrogate - beta * kl_term
    per_output = row.per_output(objective, mask)
    if surrogate.shape != logps.shape or per_output.shape != logps.shape[:1]:
        shapes = f"{tuple(surrogate.shape)} and {tuple(per_output.shape)}"
        raise ValueError(f'variant "{variant}": surrogate and per_output must give (B, T) and (B,), not {shapes}')
    loss = -per_output.sum() / normalizer

    with torch.no_grad():
        metrics = {"tokens": mask}
        if old_logps is not None:
            clipped = surrogate != row.surrogate(ratio, logps, advantages, math.inf, math.inf)
            metrics |= {"ratio": ratio, "clip_low": clipped & (ratio < 1), "clip_high": clipped & (ratio > 1)}
            metrics |= {f"{kind}_old": KL_ESTIMATORS[kind](log_ratio) for kind in ("k1", "k3")}
        if ref_logps is not None:
            metrics |= {f"{kind}_ref": KL_ESTIMATORS[kind](ref_log_ratio) for kind in ("k1", "k3")}
        return loss, {name: value.masked_fill(~mask, 0).sum() for name, value in metrics.items()}


def _check_name(what: str, name: str, known: object) -> None:
    if name not in known:
        raise ValueError(f'{what} "{name}" is not among {", ".join(known)}')


def _check_shapes(logps: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.shape != logps.shape:
            raise ValueError(f"{name} {tuple(x.shape)} must have the shape of logps {tuple(logps.shape)}")
