"""Runs of train.py's job in which one thing is other than any flag can say: the advantage, the
reward, the prompts kept.

    BASE=out/chains-cpu-grpo-seed0/base.pt
    python -m experiments.study.variations mean_only --init $BASE --out out/mean_only
    python -m experiments.study.variations dynamic_sampling --init $BASE --out out/dynamic
    python -m experiments.study.variations paid_by_step --init $BASE --out out/paid_by_step

The flags after the name are train.py's. A run goes on (`--resume`) by the same name only, and with
the same code: it keeps this file too. To write a variation: a function that gives what
`train.r1_zero` takes beside a configuration and a run, and its name in VARIATIONS. All that a
reward returns is logged.
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
MOST_ROUNDS = 8  # rollouts that may be sampled to fill one


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
    """DAPO's (Yu et al. 2025, section 3.2): groups without signal are replaced by groups that have
    one. The log says how many rollouts that took, "rounds"."""
    if config.cuda_graphs:
        raise ValueError("dynamic_sampling samples without --cuda_graphs: leave it out")
    scored, rounds = own_reward(config), {}  # of each step

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
    """As many groups as ever, those with a signal first. Prompts are sampled until these are
    enough, or until MOST_ROUNDS rollouts have been. Returns how many rollouts it took, too."""
    problems, rollouts, signals = [], [], torch.zeros(0, dtype=torch.bool)
    while len(rollouts) < MOST_ROUNDS and signals.sum() < config.prompts:
        asked, rollout = train.sample(config, policy, step * MOST_ROUNDS + len(rollouts))
        groups = reward(asked, rollout, step)["reward"].view(-1, config.group_size)
        signals = torch.cat([signals, (groups != groups[:, :1]).any(dim=1)])
        problems += asked
        rollouts.append(rollout)
    kept = (~signals).int().argsort(stable=True)[: config.prompts]
    rows = (kept[:, None] * config.group_size + torch.arange(config.group_size)).flatten()
    whole = joined(rollouts, rows, get_tokenizer(config.task).eos_id)
    return [problems[i] for i in kept.tolist()], whole, len(rollouts)


def joined(rollouts: list[Rollout], rows: Tensor, eos_id: int) -> Rollout:
    """These rows of several rollouts, counted through all of them, as one rollout."""
    width = max(rollout.tokens.shape[1] for rollout in rollouts)
    fill, parts = {"tokens": eos_id}, {}
    for name in (field.name for field in fields(Rollout)):
        whole = [getattr(rollout, name) for rollout in rollouts]
        if whole[0].dim() == 2:
            value = fill.get(name, 0)
            whole = [F.pad(x, (0, width - x.shape[1]), value=value) for x in whole]
        parts[name] = torch.cat(whole)[rows.to(whole[0].device)]
    return Rollout(**parts)


# -------------------------------------------------------------------------------------- the reward


def paid_by_step(config: train.Config) -> dict:
    """A reward with a hole: each step of a thought in the right format earns something, so that the
    model may think longer."""
    return {"reward": paid_for_steps(config, "format")}


def paid_by_right_step(config: train.Config) -> dict:
    """The hole closed: steps earn only where they lead to the right answer."""
    return {"reward": paid_for_steps(config, "accuracy")}


def paid_for_steps(config: train.Config, where: str) -> train.Reward:
    """The run's own reward and, where this rule is content, so much for each step."""
    tokenizer = get_tokenizer(config.task)
    own, rule = own_reward(config), train.rules({where: 1.0}, tokenizer)

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
