"""Runs of train.py with a change that no flag can make: to the advantage, the reward or the choice
of prompts.

    BASE=out/chains-cpu-grpo-seed0/base.pt
    python -m experiments.study.variations mean_only --init $BASE --out out/mean_only
    python -m experiments.study.variations dynamic_sampling --init $BASE --out out/dynamic
    python -m experiments.study.variations paid_by_step --init $BASE --out out/paid_by_step

The flags after the name are the flags of train.py. To go on with a run (`--resume`), give the same
name, and leave this file as it was. To add a variation, write a function that returns arguments of
`train.r1_zero`, and name it in VARIATIONS. The log has everything that a reward returns.
"""

import sys
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data import get_tokenizer
from data.problem import Problem
from grpo import group_advantages
from kit import flags
from kit.metrics import Rewards
from kit.run import open_run
from model import Transformer
from rewards import rule_weights
from sample import Rollout, decode_completions

PAID_PER_STEP = 0.5
MOST_ROUNDS = 8  # the most rollouts that are sampled to fill one


def own_reward(config: train.Config) -> train.Reward:
    """The reward of the run without a variation."""
    return train.rules(rule_weights(config.rewards), get_tokenizer(config.task))


# ----------------------------------------------------------------------------------- the advantage


def mean_only(config: train.Config) -> dict:
    """GRPO without the standard deviation: one half of Dr. GRPO (Liu et al. 2025)."""

    def advantage(config: train.Config, rewards: Rewards, rollout: Rollout) -> Tensor:
        return group_advantages(rewards["reward"], config.group_size, "none")

    return {"advantage": advantage}


# ------------------------------------------------------------------------------------- the prompts


def dynamic_sampling(config: train.Config) -> dict:
    """DAPO's dynamic sampling (Yu et al. 2025, section 3.2): groups without signal are replaced by
    groups with a signal. The log has the number of rollouts that this took, as "rounds"."""
    if config.cuda_graphs:
        raise ValueError("dynamic_sampling samples without --cuda_graphs: leave it out")
    scored, rounds = own_reward(config), {}  # step -> number of rollouts

    def sample(config: train.Config, policy: Transformer, step: int) -> tuple:
        problems, rollout, rounds[step] = refilled(config, policy, step, scored)
        return problems, rollout

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        rewards = scored(problems, rollout, step)
        return rewards | {"rounds": torch.full_like(rewards["reward"], rounds[step])}

    return {"sample": sample, "reward": reward}


def refilled(
    config: train.Config, policy: Transformer, step: int, reward: train.Reward
) -> tuple[list[Problem], Rollout, int]:
    """A rollout of the usual size, with as many groups with a signal as possible. Samples until it
    can be filled with them, at most MOST_ROUNDS times. Returns the problems, the rollout, and how
    often it sampled."""
    problems, rollouts, signals = [], [], torch.zeros(0, dtype=torch.bool)
    while len(rollouts) < MOST_ROUNDS and signals.sum() < config.prompts:
        asked, rollout = train.sample(config, policy, step * MOST_ROUNDS + len(rollouts))
        groups = reward(asked, rollout, step)["reward"].view(-1, config.group_size)
        signals = torch.cat([signals, (groups != groups[:, :1]).any(dim=1)])
        problems += asked
        rollouts.append(rollout)
    kept = (~signals).int().argsort(stable=True)[: config.prompts]  # groups with a signal first
    rows = (kept[:, None] * config.group_size + torch.arange(config.group_size)).flatten()
    chosen = joined(rollouts, rows, get_tokenizer(config.task).eos_id)
    return [problems[i] for i in kept.tolist()], chosen, len(rollouts)


def joined(rollouts: list[Rollout], rows: Tensor, eos_id: int) -> Rollout:
    """One rollout made of these rows of several rollouts. Row numbers count on from one rollout to
    the next."""
    width = max(rollout.tokens.shape[1] for rollout in rollouts)
    padding, joint = {"tokens": eos_id}, {}
    for name in (field.name for field in fields(Rollout)):
        parts = [getattr(rollout, name) for rollout in rollouts]
        if parts[0].dim() == 2:
            value = padding.get(name, 0)
            parts = [F.pad(x, (0, width - x.shape[1]), value=value) for x in parts]
        joint[name] = torch.cat(parts)[rows.to(parts[0].device)]
    return Rollout(**joint)


# -------------------------------------------------------------------------------------- the reward


def paid_by_step(config: train.Config) -> dict:
    """A reward that can be hacked: in a completion of the right format, each step of the thought
    earns something, right or wrong."""
    return {"reward": paid_for_steps(config, "format")}


def paid_by_right_step(config: train.Config) -> dict:
    """The same reward, mended: steps earn only in a completion with the right answer."""
    return {"reward": paid_for_steps(config, "accuracy")}


def paid_for_steps(config: train.Config, name: str) -> train.Reward:
    """The run's own reward and, if the completion satisfies the rule `name`, PAID_PER_STEP for
    each step."""
    tokenizer = get_tokenizer(config.task)
    own, rule = own_reward(config), train.rules({name: 1.0}, tokenizer)

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        texts = decode_completions(rollout, tokenizer)
        steps = torch.tensor([PAID_PER_STEP * text.count("#") for text in texts])
        steps *= rule(problems, rollout, step)["reward"]
        rewards = own(problems, rollout, step)
        return rewards | {"reward": rewards["reward"] + steps, "steps": steps}

    return reward


VARIATIONS: dict[str, Callable[[train.Config], dict]] = {
    each.__name__: each for each in (mean_only, dynamic_sampling, paid_by_step, paid_by_right_step)
}


def main(arguments: list[str]) -> None:
    name, *rest = arguments or [""]
    if name not in VARIATIONS:
        flags.refuse("variations", f"name one of {', '.join(VARIATIONS)}, then flags of train.py")
    config = flags.parse(train.Config, train.PRESETS, rest, __doc__, "variations")
    with open_run(config, f"-m experiments.study.variations {name}") as run:
        train.r1_zero(config, run, **VARIATIONS[name](config))


if __name__ == "__main__":
    main(sys.argv[1:])
