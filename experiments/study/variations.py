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
from data import TASKS, get_tokenizer
from data.problem import Problem
from experiments.study import corpora  # noqa: F401, for its tasks
from grpo import group_advantages
from kit import flags
from kit.metrics import Rewards
from kit.run import open_run
from model import Transformer
from rewards import rule_weights
from sample import Rollout, decode_completions

PAID = 0.5  # for a step of a chain, for a "no" of signs
LIGHTER = 0.4
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


def positives_alone(config: train.Config) -> dict:
    """Negative advantages count for nothing: what failed is not made less likely."""
    return {"advantage": weighed(0.0)}


def negatives_lighter(config: train.Config) -> dict:
    """Negative advantages count for less."""
    return {"advantage": weighed(LIGHTER)}


def weighed(weight: float) -> Callable:
    """The run's own advantages, the negative ones times `weight`."""

    def advantage(config: train.Config, rewards: Rewards, rollout: Rollout) -> Tensor:
        own = train.outcome_advantages(config, rewards, rollout)
        return torch.where(own < 0, weight * own, own)

    return advantage


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
    """A reward that can be hacked, on chains: in a completion of the right format, each step of the
    thought earns something, right or wrong."""
    return {"reward": paid_for(config, "format", "steps", "#")}


def paid_by_right_step(config: train.Config) -> dict:
    """The same reward, mended: steps earn only in a completion with the right answer."""
    return {"reward": paid_for(config, "accuracy", "steps", "#")}


def paid_by_no(config: train.Config) -> dict:
    """A reward that can be hacked, on signs: in the right format, each "no" earns something that a
    try follows."""
    return {"reward": paid_for(config, "format", "noes", " no\n")}


def paid_by_right_no(config: train.Config) -> dict:
    """The same reward, mended: a "no" earns only in a completion with the right answer."""
    return {"reward": paid_for(config, "accuracy", "noes", " no\n")}


def paid_for(config: train.Config, rule: str, name: str, mark: str) -> train.Reward:
    """The run's own reward and, if the completion satisfies the `rule`, PAID for each `mark` in its
    text. The log has what that came to, under this `name`."""
    tokenizer = get_tokenizer(config.task)
    own, kept = own_reward(config), train.rules({rule: 1.0}, tokenizer)

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        texts = decode_completions(rollout, tokenizer)
        paid = torch.tensor([PAID * text.count(mark) for text in texts])
        paid *= kept(problems, rollout, step)["reward"]
        rewards = own(problems, rollout, step)
        return rewards | {"reward": rewards["reward"] + paid, name: paid}

    return reward


# --------------------------------------------------------------------------------------- the log


def told(config: train.Config) -> dict:
    """The run as it is, on signs; its log tells each level apart. "asked_3" is the share of a
    rollout's completions that is about level 3. The others are sums over that level for each
    completion of the rollout: `told_of` divides them."""
    own, tokenizer = own_reward(config), get_tokenizer(config.task)

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        rewards, texts = own(problems, rollout, step), decode_completions(rollout, tokenizer)
        asked = [problem for problem in problems for _ in range(config.group_size)]
        counts = [counted(*each) for each in zip(asked, texts)]
        for level in config.levels:
            of_it = torch.tensor([float(problem.level == level) for problem in asked])
            rewards[f"asked_{level}"] = of_it
            rewards[f"right_{level}"] = of_it * rewards["accuracy"]
            for name in counts[0]:
                rewards[f"{name}_{level}"] = of_it * torch.tensor([x[name] for x in counts])
        return rewards

    return {"reward": reward}


def counted(problem: Problem, text: str) -> dict[str, float]:
    """Of a completion: its tries; whether it has none; the "no" behind which it had a choice, and
    whether it gave up."""
    tries, closed = TASKS[problem.task].tries(problem, text), "</think>" in text
    noes = sum(each.verdict == "no" for each in tries)
    gave_up = closed and bool(tries) and tries[-1].verdict == "no"
    cut = not closed and text.endswith(" no")  # behind this "no" there was no choice
    counts = {"tries": len(tries), "no_try": not tries, "noes": noes - cut, "gave_up": gave_up}
    return {name: float(x) for name, x in counts.items()}


def told_of(record: dict, level: int) -> dict[str, float]:
    """A line of such a log, of one level: shares of its completions and its mean tries. "gives_up"
    is the chance to give up behind a "no", 1 where none was said."""
    asked, noes = record[f"asked_{level}"], record[f"noes_{level}"]
    shares = {x: record[f"{x}_{level}"] / asked for x in ("right", "no_try", "tries")}
    return shares | {"gives_up": record[f"gave_up_{level}"] / noes if noes else 1.0}


VARIATIONS: dict[str, Callable[[train.Config], dict]] = {
    each.__name__: each
    for each in (
        *(mean_only, positives_alone, negatives_lighter, dynamic_sampling),
        *(paid_by_step, paid_by_right_step, paid_by_no, paid_by_right_no, told),
    )
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
