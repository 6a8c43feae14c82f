"""Proximal policy optimization (Schulman et al. 2017) as RLHF uses it: the baseline is a value
model, learned beside the policy.

    python -m rlhf.ppo                          # base model, PPO by rules, evaluation of both
    python -m rlhf.ppo --init out/RUN/base.pt   # PPO from a base model that is there already
    python -m rlhf.ppo --help                   # every knob: train.py's, and a few more

Where GRPO compares an output with its group, PPO asks at each token how much better things went
than the value model had expected. The clipped loss is GRPO's own, `grpo.policy_loss`, with one
advantage for each token.

Column t of `mask`, `logps` and `values` speaks of `tokens[:, t]` given `tokens[:, :t]`. So a value
is what the value model expected before it saw the token. B rows; T token positions. The mask is
True on sampled tokens; places outside of it may hold anything.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from grpo import VARIANTS
from kit import flags, metrics
from kit.evaluate import table
from kit.metrics import Rewards, check_finite
from kit.run import Run, open_run
from model import ScalarModel, Transformer
from rewards import rule_weights
from rlhf import check_alike, scalar_model
from sample import Rollout, tokenizer_of
from train import micro_batches, optimizer_step

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
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float | Tensor = 0.95
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
    lam      from 0 to 1, or (B,), like rewards, a row's own. At 0, the advantage is the TD error
             (eq. 17). At 1, it is the sum of the rewards to come, less the value (eq. 18)

    After a row's last token nothing is expected, even where the row was cut: the rules score a cut
    row as it stands. No gradient flows. Reads `lam` back, so call it once a step. Raises ValueError
    for other shapes, types and values.
    """
    check_alike("(B, T)", rewards=rewards, values=values, mask=mask)
    lams = torch.as_tensor(lam, dtype=values.dtype, device=values.device)
    if lams.shape not in ((), values.shape[:1]):
        raise ValueError(f"lam {tuple(lams.shape)} must be one number, or one for each row")
    if not (0 <= gamma <= 1 and ((0 <= lams) & (lams <= 1)).all()):
        raise ValueError(f"gamma {gamma} and lam {lam} must be from 0 to 1")
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lams * advantage, advantage)
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


# ------------------------------------------------------------------------------------------- stage


@dataclass(frozen=True)
class Config(train.Config):
    """Every knob of train.py, and those of the value model."""

    variant: str = "dapo"  # row of grpo.VARIANTS, the objective; PPO's is a mean over tokens
    clip_high: float | None = 0.2  # the ratio may rise to 1 + this
    beta: float = 0.0  # price of a nat from the reference, in the reward; 0: no reference at all
    lam: float = 1.0  # lambda of the advantages
    lam_alpha: float = 0.0  # lambda of a row of n tokens is 1 - 1 / (this * n), from 0; 0: --lam
    value_lam: float = 1.0  # lambda of what the value model learns; 1: the rewards that came
    whiten: bool = True  # advantages of a rollout get mean 0 and deviation 1
    value_lr: float = 2e-3  # peak learning rate of the value model
    value_clip: float = 0.2  # how far a value moves at once, in units of the reward; inf: no clip
    value_warmup: int = 5  # rollouts at first from which the value model alone learns

    method: ClassVar = "ppo"
    CHOICES: ClassVar = train.Config.CHOICES | {
        "variant": [name for name, row in VARIANTS.items() if row.clip_low is not None]
    }
    RANGES: ClassVar = train.Config.RANGES | {
        **{"lam": (0, 1), "value_lam": (0, 1), "value_lr": (1e-12, 1e30)},
        **{"value_clip": (0, math.inf), "value_warmup": (0, 2**31 - 1)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl != "k3" or self.reference_every:
            reason = "--kl and --reference_every are GRPO's"
            raise ValueError(f"{reason}: PPO pays --beta log(pi / base) in its reward")


def lambdas(config: Config, mask: Tensor) -> float | Tensor:
    """The lambda of the advantages: one number, or (B,), nearer to 1 in longer rows, so that the
    reward reaches their first tokens (VAPO, Yue et al. 2025, section 4.2)."""
    if not config.lam_alpha:
        return config.lam
    return (1 - 1 / (config.lam_alpha * mask.sum(dim=1))).clamp(min=0.0)


@torch.no_grad()
def rollout_values(value: ScalarModel, rollout: Rollout, size: int) -> Tensor:
    """What the value model expects before each token of a rollout, (B, T)."""
    values, rows = torch.zeros_like(rollout.logps), np.arange(len(rollout.tokens))
    for part, columns in micro_batches(rollout, rows, size):
        tokens = rollout.tokens[part, : columns.stop]
        values[part, columns] = values_of(value, tokens, columns.start)
    return values


def begin_at_the_mean(value: ScalarModel, rewards: Rewards, rollout: Rollout, size: int) -> None:
    """Move the value model's bias, so that over the tokens of a rollout it expects the mean."""
    outcome = rewards["reward"].to(rollout.mask.device)[:, None]
    gap = (outcome - rollout_values(value, rollout, size))[rollout.mask].mean()
    value.head.bias.data += gap


def estimate(
    config: Config,
    value: ScalarModel,
    reference: Transformer | None,
    rewards: Rewards,
    rollout: Rollout,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token of a rollout earns, the value before it, and its advantage, (B, T) each. A
    row that was cut earns what the rules give it, and nothing is expected after it."""
    mask, ref_logps = rollout.mask, None
    if reference:
        rows, how = np.arange(len(mask)), (config.micro_batch, config.temperature)
        ref_logps = train.rollout_logps(reference, rollout, rows, *how)
    outcome = rewards["reward"].to(mask.device)
    earned = token_rewards(outcome, rollout.logps, ref_logps, mask, config.beta)
    values = rollout_values(value, rollout, config.micro_batch)
    advantages, _ = gae(earned, values, mask, lam=lambdas(config, mask))
    return earned, values, whiten(advantages, mask) if config.whiten else advantages


def add_value_gradient(
    config: Config,
    value: ScalarModel,
    rollout: Rollout,
    old_values: Tensor,
    returns: Tensor,
    rows: np.ndarray,
) -> float:
    """Add the gradient of these rows' loss to the value model's. Returns the loss. Neither depends
    on how the rows are cut into micro-batches."""
    total, how = 0.0, {"clip": config.value_clip, "normalizer": int(rollout.mask[rows].sum())}
    for part, columns in micro_batches(rollout, rows, config.micro_batch):
        values = values_of(value, rollout.tokens[part, : columns.stop], columns.start)
        given = (x[part, columns] for x in (old_values, returns, rollout.mask))
        loss = value_loss(values, *given, **how)
        loss.backward()
        total += loss.detach()
    return float(total)


def ppo(
    config: Config,
    run: Run,
    stage: str,
    policy: Transformer,
    base: Transformer,
    value: ScalarModel,
    reward: train.Reward,
    sample: Callable = train.sample,
) -> None:
    """PPO (Schulman et al. 2017, algorithm 1). Policy and value model share nothing: each has its
    weights, its optimizer, and its gradient clipped apart.

    The value model begins with the mean of the first rollout. Changes both models in place, and
    leaves the value model in <stage>_value.pt. `sample` and `reward` are as for `train.grpo`. The
    reference, where there is a `beta`, is the base. Raises ValueError for rewards of another shape.
    """
    optimizer, value_optimizer = train.make_optimizer(policy), train.make_optimizer(value)
    reference = base if config.beta else None
    objective = replace(config, beta=0.0)  # the KL is a price in the reward, not in the loss
    state = {"optimizer": optimizer, "value": value, "value_optimizer": value_optimizer}

    def advantage(config: Config, rewards: Rewards, rollout: Rollout) -> Tensor:
        """Of a look, which samples at temperature 1."""
        return estimate(replace(config, temperature=1.0), value, reference, rewards, rollout)[2]

    for step in run.steps(stage, config.steps, policy, **state):
        started = time.perf_counter()
        problems, rollout = sample(config, policy, step)
        rewards = reward(problems, rollout, step)
        metrics.check_rewards(rewards, rollout, len(problems) * config.group_size)
        if step == 0:  # else the trunk would learn the mean first, and lose what it knows for it
            begin_at_the_mean(value, rewards, rollout, config.micro_batch)
        earned, values, advantages = estimate(config, value, reference, rewards, rollout)
        _, returns = gae(earned, values, rollout.mask, lam=config.value_lam)
        inputs, teaches = train.loss_inputs(objective, policy, None, rollout, advantages)
        sample_seconds = time.perf_counter() - started
        if step == 0:
            train.look_at_held_out(config, run, 0, policy, base, reward, advantage)

        started = time.perf_counter()
        lr = train.learning_rate(config.value_lr, step, config.steps, **RATES)
        value_updates = []
        for rows in train.minibatches(config, step, len(values)):
            loss = add_value_gradient(config, value, rollout, values, returns, rows)
            norm = optimizer_step(value, value_optimizer, lr, config.max_grad_norm)
            value_updates.append({"value_loss": loss, "value_grad_norm": norm.item()})
            check_finite(stage, step, value_updates[-1])
        record = metrics.rollout_metrics(problems, rollout, rewards) | means(value_updates)
        _, came = gae(earned, values, rollout.mask, lam=1.0)  # on a rollout not yet learned from
        record["explained_variance"] = explained_variance(values, came, rollout.mask).item()

        # The policy waits for values that do not mislead: its schedule is over the rest.
        if (done := step - config.value_warmup) >= 0:
            lr = train.learning_rate(config.lr, done, config.steps - config.value_warmup, **RATES)
            how = (lr, rollout, inputs, teaches)
            record |= train.update(objective, run, policy, optimizer, *how)

        record["sample_seconds"] = sample_seconds
        record["update_seconds"] = time.perf_counter() - started
        look = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        if look:
            record |= train.look_at_held_out(config, run, step + 1, policy, base, reward, advantage)
        run.show({short: record[name] for name, short in SHORT.items() if name in record}, look)
        run.log(record)
        if step + 1 == config.steps:  # of a stage that has ended, the policy alone comes back
            run.write_model(f"{stage}_value.pt", value)


RATES = {"warmup": 5, "decay_from": train.DECAY_FROM}
SHORT = train.SHORT | {"explained_variance": "ev"}


def means(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def main(arguments: list[str]) -> None:
    """Base model, evaluation, PPO by rules, evaluation."""
    config = flags.parse(Config, train.PRESETS, arguments, __doc__, "rlhf.ppo")
    with open_run(config, "-m rlhf.ppo") as run:
        policy = train.base_model(config, run)
        base, value = copy.deepcopy(policy), scalar_model(policy)
        reward = train.rules(rule_weights(config.rewards), tokenizer_of(policy))
        before = run.once("base", lambda: train.examine(config, base))
        ppo(config, run, "ppo", policy, base, value, reward)
        after = run.once("ppo", lambda: train.examine(config, policy))
        run.finish({"device": config.device, "seed": config.seed, "base": before, "ppo": after})
        print(f"\n{table(before, after, 'PPO')}\n\n{run.times()}")


if __name__ == "__main__":
    main(sys.argv[1:])
