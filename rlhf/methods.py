"""DPO, PPO and GRPO from one fine-tuned model, by the same pairs and the judge that learned from
them. Each leaves models along its path: `rlhf.compare` measures them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

import train
from data import get_tokenizer
from data.batches import Row
from data.problem import Problem
from data.requests import SENTENCE
from kit.metrics import Rewards
from kit.run import Run
from model import ScalarModel, Transformer
from rlhf import dpo, ppo, scalar_model
from rlhf.preferences import Pair, rows_of
from rlhf.reward_model import STANDARD, clear, draw_pairs, fine_tuned, fit, judge
from sample import Rollout, decode_completions

POINTS = 12  # of a path, about; twice as many of DPO


@dataclass(frozen=True)
class Config(dpo.Config):
    """Every knob of DPO's job, and those of RL with a judge."""

    steps: int = 36  # rollouts of PPO and of GRPO
    lr: float = 3e-4  # peak learning rate of GRPO
    beta: float = 0.2  # GRPO's weight of the KL to the fine-tuned model
    ppo_lr: float = 3e-4  # peak learning rate of PPO
    ppo_beta: float = 0.1  # PPO's price of a nat, in its reward
    nats: float = 1.84  # KL in nats a completion at which methods are compared; best of 16 has it
    fewer: float = 0.25  # share of the pairs that a worse judge learns from
    rule: float = 1.0  # price of a sentence said twice, where a rule is mixed in

    method: ClassVar = "compare"
    RANGES: ClassVar = dpo.Config.RANGES | {"ppo_lr": (1e-12, 1e30), "fewer": (1e-3, 1)}
    # fmt: off
    UNUSED: ClassVar = (
        "rewards", "eval_every", "eval_problems", "eval_samples", "kl", "reference_every",
    )
    # fmt: on


@dataclass
class Start:
    """What every method starts from."""

    base: Transformer
    sft: Transformer
    reward: ScalarModel
    pairs: list[Pair]  # between which people did not waver
    choosing: list[Pair]  # more of them, by which DPO chooses its best step
    answers: list[Row]  # of the fine-tuned model


def start(config: Config, run: Run) -> Start:
    """The stages "base", "sft" and "reward"."""
    base, sft = fine_tuned(config, run)
    pairs = draw_pairs(config, sft, config.pairs, "pairs")
    choosing = draw_pairs(config, sft, dpo.CHOOSING, "pairs for choosing")
    model, answers = scalar_model(base), rows_of(pairs[:STANDARD])
    fit(config, run, "reward", model, clear(config, pairs), answers)
    return Start(base, sft, model, clear(config, pairs), clear(config, choosing), answers)


def by_dpo(config: Config, run: Run, stage: str, at: Start) -> Transformer:
    """The policy of the step that held-out pairs chose."""
    policy, steps = copy.deepcopy(at.sft), len(at.pairs) // config.reward_batch
    how = replace(config, eval_every=max(1, steps // (2 * POINTS)))  # KL grows fast at first
    dpo.dpo(how, run, stage, policy, at.sft, at.pairs, at.choosing)
    return policy


def by_ppo(config: Config, run: Run, stage: str, at: Start) -> Transformer:
    """The value model starts from the reward model."""
    policy, value = copy.deepcopy(at.sft), copy.deepcopy(at.reward)
    how = settings(config, ppo.Config, lr=config.ppo_lr, beta=config.ppo_beta)
    ppo.ppo(how, run, stage, policy, at.sft, value, judge(at.reward), leaving_points(run))
    run.write_model(f"{stage}_{config.steps}.pt", policy)
    return policy


def by_grpo(
    config: Config, run: Run, stage: str, at: Start, score: train.Reward | None = None
) -> Transformer:
    """By another judge's score, or by the reward model's."""
    policy, score = copy.deepcopy(at.sft), score or judge(at.reward)
    how = settings(config, train.Config)
    train.grpo(how, run, stage, policy, at.sft, score, leaving_points(run))
    run.write_model(f"{stage}_{config.steps}.pt", policy)
    return policy


METHODS = {"dpo": by_dpo, "ppo": by_ppo, "grpo": by_grpo}


def settings(config: Config, kind: type, **changes) -> train.Config:
    """What a stage of RL on requests takes. PPO's own defaults stand."""
    own = ppo.Config.__annotations__ if kind is ppo.Config else ()
    shared = {x.name: getattr(config, x.name) for x in fields(train.Config) if x.name not in own}
    asked = {"task": "requests", "min_level": 1, "max_level": 1, "eval_every": config.steps}
    return kind(**shared | asked | changes)


def leaving_points(run: Run) -> Callable:
    """`train.sample` that leaves the policy in <stage>_<steps>.pt, POINTS times or so."""

    def sample(config: Config, policy: Transformer, step: int) -> tuple[list[Problem], Rollout]:
        if step and step % max(1, config.steps // POINTS) == 0:
            run.write_model(f"{run.stage}_{step}.pt", policy)
        return train.sample(config, policy, step)

    return sample


def with_rule(score: train.Reward, price: float) -> train.Reward:
    """A judge's score, less a price for each sentence that was said before. That a program can
    tell: no judge has to learn it."""

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        texts = decode_completions(rollout, get_tokenizer("world"))
        said = [[x.strip() for x in SENTENCE.findall(text)] for text in texts]
        repeats = torch.tensor([float(len(each) - len(set(each))) for each in said])
        return {"reward": score(problems, rollout, step)["reward"] - price * repeats}

    return reward
