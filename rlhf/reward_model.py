"""A reward model: a `model.ScalarModel` that learns from pairs of answers which one people prefer.

    python -m rlhf.reward_model                          # base model, fine-tuning, reward model
    python -m rlhf.reward_model --init out/RUN/base.pt   # from a base model of the world

Its score of a text is its number at the text's last token. <out>/sft.pt and <out>/reward.pt are
what PPO and GRPO go on with: see `judge`.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data.batches import Row, padded
from data.problem import Problem
from kit import flags
from kit.evaluate import share
from kit.metrics import Rewards, check_finite
from kit.run import Run, open_run
from model import ScalarModel, Transformer
from rlhf import check_alike, scalar_model
from rlhf.measure import gold_table, measure
from rlhf.preferences import Pair, curated_batches, judge_by_length, rows_of, sample_pairs
from sample import Rollout, tokenizer_of

TESTED = 2000  # pairs of each split that a reward model is measured on
STANDARD = 1000  # pairs on whose answers its scores get mean 0 and deviation 1
Score = Callable[[list[Row]], Tensor]  # (N,), a number for each answer


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


# ------------------------------------------------------------------------------------------- stage


@dataclass(frozen=True)
class Config(train.Config):
    """Every knob of train.py, and those of fine-tuning and of the reward model."""

    task: str = "world"  # row of data.TASKS whose web the base model reads
    pretrain_steps: int = 8000  # optimizer steps of pretraining
    curated: int = 256  # answers that people write, for fine-tuning
    sft_steps: int = 30  # optimizer steps of fine-tuning
    sft_lr: float = 1e-3  # its peak learning rate
    pairs: int = 10000  # pairs of answers between which people choose
    noise: float = 0.5  # temperature of their choices, in points of gold
    min_lead: float = 1.0  # pairs nearer to each other in gold are left out of training
    reward_batch: int = 32  # pairs in an optimizer step, also of DPO
    reward_lr: float = 1e-3  # its peak learning rate

    method: ClassVar = "reward_model"
    RANGES: ClassVar = train.Config.RANGES | {
        **dict.fromkeys(("sft_lr", "reward_lr", "noise"), (1e-12, 1e30)),
        "curated": (2, 2**31 - 1),
    }
    # fmt: off
    UNUSED: ClassVar = (  # nothing is learned by GRPO, and the evaluation has its own size
        "variant", "steps", "prompts", "group_size", "temperature", "lr", "inner_epochs",
        "minibatches", "micro_batch", "clip_low", "clip_high", "beta", "kl", "reference_every",
        "rewards", "eval_every", "eval_problems", "eval_samples",
    )
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "world":
            raise ValueError(f"--task {self.task} has no requests: leave it out")


PRESETS = {name: knobs | {"task": "world"} for name, knobs in train.PRESETS.items()}


def scores(model: ScalarModel, rows: list[Row]) -> Tensor:
    """The number at the last token of each row, (N,)."""
    tokens, _, _ = padded(rows, pad_id=0)  # the padding is behind what is read
    ends = torch.tensor([len(ids) for _, ids in rows])
    found = model(tokens.to(model.head.weight.device))
    return found[torch.arange(len(rows)), ends - 1]


@torch.no_grad()
def all_scores(model: ScalarModel, rows: list[Row]) -> Tensor:
    """`scores` of any number of rows."""
    return torch.cat([scores(model, rows[i : i + 256]).cpu() for i in range(0, len(rows), 256)])


def fit(
    config: Config, run: Run, stage: str, model: ScalarModel, pairs: list[Pair], samples: list[Row]
) -> None:
    """Learn from each pair once, but for the last few, which fill no step. Changes the model in
    place. At the end its scores are made to have mean 0 and deviation 1 on `samples`, so that a
    point is worth as much whatever was learned. Raises ValueError for pairs that fill no step."""
    optimizer, size = train.make_optimizer(model), config.reward_batch
    steps = len(pairs) // size
    if not steps:
        raise ValueError(f"{len(pairs)} pairs fill no step of {size}: more --pairs would")
    for step in run.steps(stage, steps, model, optimizer=optimizer):
        part = pairs[step * size : (step + 1) * size]
        chosen, rejected = scores(model, rows_of(part)).chunk(2)
        loss = preference_loss(chosen, rejected)
        loss.backward()
        lr = train.learning_rate(config.reward_lr, step, steps, warmup=10, decay_from=0.3)
        norm = train.optimizer_step(model, optimizer, lr, config.max_grad_norm)
        record = {"loss": loss.item(), "grad_norm": norm.item()}
        check_finite(stage, step, record)
        record |= {"accuracy": (chosen > rejected).float().mean().item(), "lr": lr}
        run.show(record)
        run.log(record)
        if step + 1 == steps:  # in the stage: its file holds the scores as they are used
            standardise(model, all_scores(model, samples))


@torch.no_grad()
def standardise(model: ScalarModel, found: Tensor) -> None:
    """Scale and shift a model's numbers so that what are now `found` will have mean 0 and deviation
    1. Their order stays. Raises ValueError where they are all the same."""
    mean, deviation = found.mean(), found.std()
    if not deviation > 0:
        raise ValueError("the reward model gives every answer the same score")
    model.head.weight /= deviation
    model.head.bias -= mean
    model.head.bias /= deviation


def judge(model: ScalarModel, size: int = 256) -> train.Reward:
    """The reward of a completion is its score: what `train.grpo` and PPO take for a reward."""

    @torch.no_grad()
    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        ends = torch.from_numpy(rollout.ends).to(rollout.tokens.device)
        found = [
            model(tokens)[torch.arange(len(tokens)), last - 1]
            for tokens, last in zip(rollout.tokens.split(size), ends.split(size))
        ]
        return {"reward": torch.cat(found).cpu()}

    return reward


# --------------------------------------------------------------------------------------------- job


def compare(config: Config, judges: dict[str, Score], drawn: dict[str, list[Pair]]) -> dict:
    """The share of choices that each judge agrees with: of the pairs as training has them, and of
    all pairs. "gold" is as good as any judge can be, since the rest is noise."""
    table = {}
    for name, pairs in drawn.items():
        for kind, some in (("clear", clear(config, pairs)), ("all", pairs)):
            found = {"pairs": len(some), "gold": share_of([pair.lead for pair in some])}
            for judged_by, score in judges.items():
                chosen, rejected = score(rows_of(some)).chunk(2)
                found[judged_by] = share_of((chosen - rejected).tolist())
            table[f"{name}, {kind}"] = found
    return table


def share_of(leads: list[float]) -> float:
    """The share of leads above 0. A tie counts half."""
    return sum((lead > 0) + 0.5 * (lead == 0) for lead in leads) / len(leads)


def clear(config: Config, pairs: list[Pair]) -> list[Pair]:
    """The pairs between which people do not waver."""
    return [pair for pair in pairs if abs(pair.lead) > config.min_lead]


def fine_tuned(config: Config, run: Run) -> tuple[Transformer, Transformer]:
    """The stages "base" and "sft": the base model, and the same after fine-tuning on curated
    answers."""
    sft = train.base_model(config, run)
    base = copy.deepcopy(sft)
    written = curated_batches(sft, config.curated, config.seed)
    train.imitate(config, run, "sft", sft, written, config.sft_steps, config.sft_lr)
    return base, sft


def draw_pairs(config: Config, sft: Transformer, count: int, purpose: str, **which) -> list[Pair]:
    """Pairs of answers of the fine-tuned model. A resumed run draws the same again."""
    how = {"noise": config.noise, "limit": config.max_new_tokens, "seed": config.seed}
    return sample_pairs(sft, count, purpose=purpose, **how, **which)


def train_reward_model(config: Config, run: Run) -> None:
    """Base model, fine-tuning, pairs, reward model, and its control: the same from random
    weights."""
    base, sft = fine_tuned(config, run)
    found = {
        name: run.once(name, partial(measure, config, model))
        for name, model in (("base", base), ("sft", sft))
    }
    pairs = draw_pairs(config, sft, config.pairs, "pairs")
    model, control = scalar_model(base), ScalarModel(base.config).to(config.device)
    control.trunk.init_weights(config.seed, tokenizer_of(base).pieces)
    for stage, each in (("reward", model), ("reward_random", control)):
        fit(config, run, stage, each, clear(config, pairs), rows_of(pairs[:STANDARD]))

    def judged() -> dict:
        judges = {"reward": partial(all_scores, model), "random": partial(all_scores, control)}
        judges["length"] = judge_by_length(clear(config, pairs))
        draw = partial(draw_pairs, config, sft, TESTED)
        drawn = {"new": draw("new pairs"), "held-out": draw("held-out pairs", held_out=True)}
        return compare(config, judges, drawn)

    found["agreement"] = run.once("agreement", judged)
    run.finish({"device": config.device, "seed": config.seed, **found})
    print(f"\n{report(found)}\n\n{run.times()}")


def report(found: dict) -> str:
    """The numbers of a run as two tables."""
    lines = [gold_table({name: found[name] for name in ("base", "sft")}), ""]
    names = [name for name in next(iter(found["agreement"].values())) if name != "pairs"]
    lines.append(f"{'agreement with people':24}{''.join(f'{name:>9}' for name in names)}")
    for pairs, row in found["agreement"].items():
        lines.append(f"{pairs:24}{''.join(f'{share(row[name]):>9}' for name in names)}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    config = flags.parse(Config, PRESETS, arguments, __doc__, "rlhf.reward_model")
    with open_run(config, "-m rlhf.reward_model") as run:
        train_reward_model(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
