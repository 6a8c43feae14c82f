"""The mathematics of GRPO (DeepSeekMath, Shao et al. 2024, section 4.1) and of its family, in the
paper's order.

For each question q, sample a group of G outputs o_1 ... o_G from the old policy. Score them with
the rewards r_1 ... r_G. Then

    A_i      = (r_i - mean(r)) / std(r)                      the advantage of every token of o_i
    ratio_it = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)
    KL_it    = pi_ref / pi - log(pi_ref / pi) - 1            the k3 estimator, eq. 4
    J        = 1/G sum_i 1/|o_i| sum_t [ min(ratio_it A_i, clip(ratio_it, 1 - eps, 1 + eps) A_i)
                                         - beta KL_it ]      eq. 3

and go up the gradient of J, averaged over the questions. There is no value model: the group's mean
is the baseline.

Pure functions of tensors. B rows, the G outputs of one question adjacent; T token positions; V
vocabulary. Column t of `mask`, `logps` and `entropy` speaks of `tokens[:, t]` given
`tokens[:, :t]`, so column 0 is always 0. Only `token_logps` and `token_entropy` know of the shift
between logits and tokens. Log-probabilities are taken at the temperature of the sampling.

Watch the rewards, not the loss. At ratio 1, GRPO's loss is minus the mean of advantages that sum to
0: it is 0, however good the policy. Its gradient is not: each advantage multiplies the gradient of
its own output's log-probability, and these differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# -------------------------------------------------------------------------------------- advantages


def less_mean(groups: Tensor) -> Tensor:
    """Each reward less the mean of its group, (P, G)."""
    return groups - groups.mean(dim=1, keepdim=True)


# row(groups, eps) gives the advantages, (P, G), of the rewards, (P, G): G outputs of P questions.
ADVANTAGES = {
    "std": lambda groups, eps: less_mean(groups) / (groups.std(dim=1, keepdim=True) + eps),
    "none": lambda groups, eps: less_mean(groups),
    "batch": lambda groups, eps: less_mean(groups) / (groups.std() + eps),  # of all questions
    "leave_one_out": lambda groups, eps: less_mean(groups) / (1 - 1 / groups.shape[1]),
}


def group_advantages(
    rewards: Tensor, group_size: int, scale: str = "std", eps: float = 1e-4
) -> Tensor:
    """Advantages (B,) of `rewards` (B,), float, as in section 4.1.2: each reward against its group
    of `group_size` adjacent rows. A group of equal rewards gets exactly 0.

    `scale` names a row of ADVANTAGES. The rows there subtract the group's mean, and divide by

        "std"            the standard deviation of the group, over n - 1, plus `eps`
        "none"           nothing
        "batch"          the standard deviation of all rewards, over n - 1, plus `eps`
        "leave_one_out"  1 - 1 / group_size: subtracts the mean of the others (Kool et al. 2019)

    Reads the rewards back to check them, so call it once a step. Raises ValueError for an unknown
    scale, for groups of fewer than 2, for rewards that are not finite or do not fill groups, and
    for a row that gives another shape.
    """
    _check_name("scale", scale, ADVANTAGES)
    if group_size < 2:
        raise ValueError(f"a group must have at least 2 outputs, not {group_size}")
    if rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} are not groups of {group_size}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating-point numbers, not {rewards.dtype}")
    if not rewards.isfinite().all():
        wrong = rewards[~rewards.isfinite()]
        seen = f"{len(wrong)} of {len(rewards)} are not, the first is {wrong[0]}"
        raise ValueError(f"rewards must be finite: {seen}")
    groups = rewards.view(-1, group_size)  # (P, G)
    advantages = ADVANTAGES[scale](groups, eps)  # (P, G)
    _check_given(f'scale "{scale}"', advantages, groups.shape)
    # Find silent groups by comparing rewards, not by std == 0: a rounded mean leaves 1e-8.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()


# ------------------------------------------------------------------------------- log-probabilities


def token_logps(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(o_t | o_<t), (B, T), of `tokens` (B, T) int64 under `logits` (B, T, V). In float32, or
    in float64 where the logits are.

    `temperature` is the temperature of the sampling: the policy that is trained is the policy that
    was sampled. Raises ValueError for shapes that do not match and for a temperature of 0 or less.
    """
    if logits.shape[:2] != tokens.shape:
        shapes = f"logits {tuple(logits.shape)} must be (B, T, V) for tokens {tuple(tokens.shape)}"
        raise ValueError(shapes)
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return _shift(chosen - scaled.logsumexp(dim=-1))


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats, (B, T), of the distribution that each token was drawn from, given `logits`
    (B, T, V). A logit of -inf, as top-k leaves it, adds 0. Raises ValueError as `token_logps`
    does."""
    logps = _scaled(logits, temperature).log_softmax(dim=-1)
    # Fill before the product: 0 * -inf is nan, and so is its gradient.
    return _shift(-(logps.exp() * logps.masked_fill(logps == -math.inf, 0.0)).sum(dim=-1))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """The logits (B, T-1, V) that predict a token, at the precision that log-probabilities need."""
    if logits.dim() != 3 or not 0 < temperature < math.inf:
        shape = tuple(logits.shape)
        raise ValueError(f"logits {shape} must be (B, T, V), temperature {temperature} above 0")
    return logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _shift(x: Tensor) -> Tensor:
    """Move (B, T-1) to the column of the token that each entry speaks of, (B, T). No logits predict
    token 0: its column is 0."""
    return torch.nn.functional.pad(x, (1, 0))


# ---------------------------------------------------------------------------------------------- KL

MAX_LOG_RATIO = 10.0


def k3(log_ratio: Tensor) -> Tensor:
    """q / p - log(q / p) - 1 (eq. 4, where p is pi and q is pi_ref), given log(q / p). Where q
    finds a token more than e^10 times likelier, the value stays constant and the gradient is 0."""
    # Clamp before exp: after it, the gradient would be 0 * inf = nan.
    log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def k3_ratio(ref_log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """k3 times `ratio`, the differentiable pi / pi_old (DeepSeek-V3.2).

    The product pi_ref / pi_old does not depend on pi. So the gradient is -ratio * log(pi_ref / pi):
    exact, and far from overflow where k3 is constant.
    """
    ref_over_old = (ref_log_ratio + ratio.log()).detach().clamp(max=MAX_LOG_RATIO).exp()
    return ref_over_old - ratio * (ref_log_ratio + 1)


# row(ref_log_ratio, ratio) gives an estimate of KL(pi || pi_ref) at each token, (B, T), for
# log(pi_ref / pi) and the differentiable pi / pi_old, (B, T) each.
KL_ESTIMATORS = {
    "k1": lambda ref_log_ratio, ratio: -ref_log_ratio,
    "k2": lambda ref_log_ratio, ratio: ref_log_ratio**2 / 2,
    "k3": lambda ref_log_ratio, ratio: k3(ref_log_ratio),
    "k3_ratio": k3_ratio,
}


def kl_penalty(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    """An estimate of KL(pi || pi_ref) at each token, of the shape of `logps` and `ref_logps`, for
    tokens sampled from pi (Schulman 2020). `kind` names a row of KL_ESTIMATORS. Raises ValueError
    for an unknown kind and for shapes that differ.

    As a value, "k1" and "k3" are unbiased, and k3 is never negative. As a term of a loss they do
    something else. The expected gradient, over tokens that the policy sampled, is

        "k1"         0: nothing but noise
        "k2"         the gradient of KL(pi || pi_ref), the reverse KL
        "k3"         the gradient of KL(pi_ref || pi), the forward KL: what the paper publishes
        "k3_ratio"   the gradient of the reverse KL

    This holds at each position, given the prefixes that were sampled. It also needs a divisor of
    the loss that does not depend on the sample, as 1/|o_i| does. For tokens that the policy has all
    but lost, k3 says too little: beyond a ratio of e^10 it is constant. In `policy_loss`, which has
    the ratio to an older policy, "k3_ratio" keeps its gradient for the tokens of that policy.
    """
    _check_name("kind", kind, KL_ESTIMATORS)
    _check_shapes(logps, ref_logps=ref_logps)
    ratio = (logps - logps.detach()).exp()  # on-policy: its value is 1, its gradient is not 0
    penalty = KL_ESTIMATORS[kind](ref_logps - logps, ratio)
    _check_given(f'kind "{kind}"', penalty, logps.shape)
    return penalty


# --------------------------------------------------------------- the independent choices of a loss


def token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old of each token, (B, T), up to e^20."""
    # Clamp before exp: inf * 0 is nan, in the loss or in its gradient.
    return log_ratio.clamp(max=20).exp()


def sequence_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of an output's token ratios (GSPO eq. 7), at each of its tokens, (B, T).

    As in GSPO-token (eq. 14), the value is the mean, and the gradient goes through the token's own
    log-probability. With one advantage for an output, the mean over its tokens has GSPO's gradient.
    Advantages by token work as well.
    """
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return token_ratio(mean.detach() + (log_ratio - log_ratio.detach()), mask)


def clipped_surrogate(
    ratio: Tensor, logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """What eq. 3 maximises at each token, before the KL: the lesser of the two products, for either
    sign of A."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped_weight(
    ratio: Tensor, logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """CISPO: the clipped ratio is a constant weight on the log-probability, so no token loses its
    gradient."""
    return ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logps


def log_likelihood(
    ratio: None, logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """REINFORCE: it has no ratio, so it is only for tokens of the very policy that is updated."""
    return advantages * logps


def output_mean(objective: Tensor, mask: Tensor) -> Tensor:
    """1/|o_i| sum_t, (B,): each output counts the same, so a token of a long output counts less."""
    return (objective * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def output_sum(objective: Tensor, mask: Tensor) -> Tensor:
    """sum_t, (B,): each token counts the same."""
    return (objective * mask).sum(dim=1)


def count_outputs(mask: Tensor, max_tokens: int | None) -> int:
    return len(mask)


def count_tokens(mask: Tensor, max_tokens: int | None) -> int:
    return int(mask.sum())


def count_budget(mask: Tensor, max_tokens: int | None) -> int:
    """The tokens that the outputs could have had. Unlike a count of tokens, this number does not
    depend on what was sampled."""
    if max_tokens is None or not max_tokens >= 1:
        limit = "max_tokens, the limit on the length of an output,"
        raise ValueError(f"{limit} must be at least 1: it is {max_tokens}")
    return len(mask) * max_tokens


@dataclass(frozen=True)
class Variant:
    """One objective, as independent choices; the defaults are GRPO's.

    The sum over outputs of per_output(surrogate - beta * KL, mask), divided by normalizer(mask,
    max_tokens), is maximised. A surrogate(ratio, logps, advantages, clip_low, clip_high) gets and
    gives (B, T), with zeros outside the mask; per_output gives (B,). Where the advantage is 0, a
    surrogate must have no gradient: without a KL, train.py leaves such rows out.

    A ratio of None makes the variant on-policy, and its surrogate gets None. A surrogate without a
    clip has None for both bounds. Else the ratio is clipped to [1 - clip_low, 1 + clip_high]. To
    count clipped tokens, `policy_loss` calls the surrogate again with infinite bounds: hand it
    other parameters through functools.partial. `scale` names the row of ADVANTAGES that goes with
    the loss.
    """

    source: str
    scale: str = "std"
    ratio: Callable | None = token_ratio
    surrogate: Callable = clipped_surrogate
    per_output: Callable = output_mean
    normalizer: Callable = count_outputs
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2


NO_CLIP = {"clip_low": None, "clip_high": None}
ON_POLICY = {"ratio": None, "surrogate": log_likelihood, "per_output": output_sum, **NO_CLIP}

VARIANTS = {  # each row says where it departs from GRPO
    "grpo": Variant("Shao et al. 2024, eq. 3"),  # eq. 3 names no bounds: 0.2 is PPO's; R1's is 10
    "dr_grpo": Variant(
        "Liu et al. 2025, sec. 3.2", scale="none", per_output=output_sum, normalizer=count_budget
    ),
    # DAPO's loss alone, without its dynamic sampling. Tokens are counted over the whole step, where
    # eq. 8 counts them for each question.
    "dapo": Variant(
        "Yu et al. 2025, eq. 8", per_output=output_sum, normalizer=count_tokens, clip_high=0.28
    ),
    "gspo": Variant(
        "Zheng et al. 2025, eq. 5", ratio=sequence_ratio, clip_low=3e-4, clip_high=4e-4
    ),
    # The paper sets no lower bound and does not tell the upper bound: 1 + 4 = 5 is ScaleRL's.
    "cispo": Variant(
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


# ---------------------------------------------------------------------------------------- the loss


def loss_normalizer(mask: Tensor, variant: str = "grpo", max_tokens: int | None = None) -> int:
    """What divides the loss of a whole optimizer step, given the mask (B, T) bool of all its rows.

    Count it once, before any row is dropped and before the step is cut into micro-batches. Then
    their gradients add up to the gradient of the step. "dr_grpo" needs `max_tokens`, the limit on
    the length of an output. Reads the mask back. Raises ValueError for an unknown variant, and for
    a mask that is not bool or holds no token.
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
    """Minus J of eq. 3, or minus the `variant`'s own objective: a scalar to call backward() on, and
    its metrics.

    logps       (B, T) float32 or float64; the gradient flows through them
    advantages  (B,), or (B, T) for one advantage per token
    mask        (B, T) bool, True on the tokens of the outputs
    old_logps   (B, T), like logps, of the policy that sampled; None where this very policy did
    ref_logps   (B, T), like logps, of the reference; needed where beta > 0
    clip_low, clip_high  replace the variant's own bounds; inf switches a side off
    kl          what beta weighs, a row of KL_ESTIMATORS: `kl_penalty` says which gradient each has
    normalizer  `loss_normalizer` of the optimizer step that these rows are part of; None takes
                these rows for the whole step, and reads their mask back

    The metrics are sums over the tokens of the mask, so that micro-batches add up: divide by
    "tokens". With old_logps they hold "ratio", "k1_old" and "k3_old", which estimate KL(old || pi).
    "clip_low" and "clip_high" count the tokens at which the clip changes the objective, below ratio
    1 and above it. With ref_logps they hold "k1_ref" and "k3_ref", which estimate KL(pi || ref) if
    pi sampled the tokens.

    Raises ValueError for unknown names, shapes that would broadcast, a mask that is not bool, and
    log-probabilities below float32. Bounds and beta must be at least 0, the normalizer above 0.
    beta > 0 needs ref_logps. A variant without a ratio takes no old_logps, a variant without a clip
    no bounds. A row's function must give the shape that its table says.
    """
    _check_name("variant", variant, VARIANTS)
    row = VARIANTS[variant]
    clip_low = row.clip_low if clip_low is None else clip_low
    clip_high = row.clip_high if clip_high is None else clip_high
    _check_loss(
        logps, advantages, mask, old_logps, ref_logps, variant, clip_low, clip_high, beta, kl
    )
    if normalizer is None:
        normalizer = loss_normalizer(mask, variant, max_tokens)
    if not normalizer > 0:
        raise ValueError(f"normalizer must be above 0, not {normalizer}")

    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(logps)  # the same for every token of an output
    # Padding may hold anything. Fill it first: exp of junk is inf, and the gradient of 0 * inf nan.
    logps, advantages = logps.masked_fill(~mask, 0.0), advantages.masked_fill(~mask, 0.0)
    # On-policy the ratio is 1, but its gradient is not 0.
    log_ratio = logps - (logps if old_logps is None else old_logps.masked_fill(~mask, 0.0)).detach()

    ratio = row.ratio(log_ratio, mask) if row.ratio else None
    objective = surrogate = row.surrogate(ratio, logps, advantages, clip_low, clip_high)
    _check_given(f'variant "{variant}": surrogate', surrogate, mask.shape)
    if ref_logps is not None:
        ref_log_ratio = ref_logps.detach().masked_fill(~mask, 0.0) - logps
    if beta > 0:
        penalty = KL_ESTIMATORS[kl](ref_log_ratio, token_ratio(log_ratio, mask))
        _check_given(f'kl "{kl}"', penalty, mask.shape)
        objective = surrogate - beta * penalty
    per_output = row.per_output(objective, mask)
    _check_given(f'variant "{variant}": per_output', per_output, mask.shape[:1])
    loss = -per_output.sum() / normalizer

    with torch.no_grad():
        metrics = {"tokens": mask}
        if old_logps is not None:
            clipped = surrogate != row.surrogate(ratio, logps, advantages, math.inf, math.inf)
            low, high = clipped & (ratio < 1), clipped & (ratio > 1)
            metrics |= {"ratio": ratio, "clip_low": low, "clip_high": high}
            metrics |= {"k1_old": -log_ratio, "k3_old": k3(log_ratio)}
        if ref_logps is not None:
            metrics |= {"k1_ref": -ref_log_ratio, "k3_ref": k3(ref_log_ratio)}
        return loss, {name: value.masked_fill(~mask, 0).sum() for name, value in metrics.items()}


# --------------------------------------------------------------------------------- what is refused


def _check_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    variant: str,
    clip_low: float | None,
    clip_high: float | None,
    beta: float,
    kl: str,
) -> None:
    """Raise ValueError for what `policy_loss` cannot take, given the bounds that are in force."""
    row, shape = VARIANTS[variant], tuple(logps.shape)
    _check_name("kl", kl, KL_ESTIMATORS)
    for name, x in {"logps": logps, "old_logps": old_logps, "ref_logps": ref_logps}.items():
        if x is not None and (x.dim() != 2 or x.dtype not in (torch.float32, torch.float64)):
            seen = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name} must be (B, T), float32 or float64, not {seen}")
    _check_shapes(logps, mask=mask, old_logps=old_logps, ref_logps=ref_logps)
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        given = tuple(advantages.shape)
        raise ValueError(f"advantages {given} must be (B,) or (B, T), logps {shape}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a number of at least 0, not {beta}")
    if beta > 0 and ref_logps is None:
        raise ValueError(f"beta {beta} needs ref_logps")
    if row.ratio is None and old_logps is not None:
        reason = "is on-policy, without a ratio: it takes no old_logps"
        raise ValueError(f'variant "{variant}" {reason}')
    if (row.clip_low is None) != (row.clip_high is None):
        reason = f"must have both bounds or neither, not {row.clip_low}, {row.clip_high}"
        raise ValueError(f'variant "{variant}" {reason}')
    if row.clip_low is None and not (clip_low is None and clip_high is None):
        raise ValueError(f'variant "{variant}" has no clip: it takes no clip_low and no clip_high')
    if row.clip_low is not None and not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low {clip_low} and clip_high {clip_high} must be at least 0")


def _check_given(what: str, x: Tensor, shape: torch.Size) -> None:
    """Raise ValueError where a row's function gives another shape, which might broadcast."""
    if x.shape != shape:
        raise ValueError(f"{what} must give the shape {tuple(shape)}, not {tuple(x.shape)}")


def _check_name(what: str, name: str, known: object) -> None:
    if name not in known:
        raise ValueError(f'{what} "{name}" is not among {", ".join(known)}')


def _check_shapes(logps: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.shape != logps.shape:
            shapes = f"{tuple(x.shape)} must have the shape of logps {tuple(logps.shape)}"
            raise ValueError(f"{name} {shapes}")
