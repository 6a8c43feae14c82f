"""Direct preference optimization (Rafailov et al. 2023): pairs of answers train the policy itself,
without a reward model, a value model or sampling.

    python -m rlhf.dpo                          # base model, fine-tuning, DPO
    python -m rlhf.dpo --init out/RUN/base.pt   # from a base model of the world
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data.batches import Row, padded
from grpo import token_logps
from kit import flags
from kit.metrics import check_finite
from kit.run import Run, open_run
from model import Transformer
from rlhf import check_alike, reward_model
from rlhf.measure import gold_table, measure
from rlhf.preferences import Pair, rows_of
from rlhf.reward_model import clear, draw_pairs, fine_tuned

# row(gap, beta) gives the loss of each pair, (N,), where the chosen answer has gained `gap` nats on
# the rejected answer since the reference.
DPO_LOSSES = {
    "sigmoid": lambda gap, beta: -F.logsigmoid(beta * gap),  # Rafailov et al. 2023, eq. 7
    "ipo": lambda gap, beta: (gap - 1 / (2 * beta)) ** 2,  # Azar et al. 2023, eq. 17
}


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a scalar, mean over N pairs, and its metrics, means over the pairs.

    logps            (N,) float32 or float64, in nats: sums over a completion's tokens, its end of
                     sequence included, of the policy and of the reference; no gradient flows into
                     the reference's
    beta             how dear it is to leave the reference; above 0
    label_smoothing  the share of pairs that are labelled the wrong way round, from 0 to below 0.5:
                     the loss is the mean over both ways (for "sigmoid" cDPO, Mitchell 2023, eq. 3)
    kind             a row of DPO_LOSSES. "ipo" aims at a gap of 1 / (2 beta) nats and stops there;
                     the paper's sums are used, not the means over tokens that some libraries take

    "margin" is beta times the gap: the difference of the two implicit rewards. "accuracy" is the
    share of margins above 0. Both log-probabilities may fall while the margin rises: log both.
    Raises ValueError for other shapes, types and values, and for no pair.
    """
    check_alike(
        "(N,)",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    if len(chosen_logps) == 0:
        raise ValueError("no pair: there is nothing to learn from")
    if kind not in DPO_LOSSES:
        raise ValueError(f'kind "{kind}" is not among {", ".join(DPO_LOSSES)}')
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be from 0 to below 0.5, not {label_smoothing}")

    chosen_gain = chosen_logps - ref_chosen_logps.detach()
    rejected_gain = rejected_logps - ref_rejected_logps.detach()
    gap, row = chosen_gain - rejected_gain, DPO_LOSSES[kind]
    loss = (1 - label_smoothing) * row(gap, beta)
    if label_smoothing:
        loss = loss + label_smoothing * row(-gap, beta)
    margin = beta * gap.detach()
    return loss.mean(), {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}


# ------------------------------------------------------------------------------------------- stage

CHOOSING = 500  # pairs by which the best step is chosen


@dataclass(frozen=True)
class Config(reward_model.Config):
    """Every knob of fine-tuning and of pairs, and those of DPO."""

    dpo_beta: float = 0.2  # how dear it is to leave the fine-tuned model
    dpo_lr: float = 2e-4  # peak learning rate of DPO
    dpo_loss: str = "sigmoid"  # row of rlhf.dpo.DPO_LOSSES
    label_smoothing: float = 0.0  # share of pairs that are labelled the wrong way round

    method: ClassVar = "dpo"
    CHOICES: ClassVar = reward_model.Config.CHOICES | {"dpo_loss": list(DPO_LOSSES)}
    RANGES: ClassVar = reward_model.Config.RANGES | {
        **dict.fromkeys(("dpo_beta", "dpo_lr"), (1e-12, 1e30)),
        "label_smoothing": (0, 0.499),
    }
    UNUSED: ClassVar = tuple(x for x in reward_model.Config.UNUSED if x != "eval_every")


def answer_logps(model: Transformer, rows: list[Row]) -> Tensor:
    """The log-probability of each answer, (N,), in nats: the sum over its tokens, its end token
    included."""
    tokens, mask, _ = padded(rows, pad_id=0)  # the padding is behind what is read
    tokens, mask = (x.to(model.embedding.weight.device) for x in (tokens, mask))
    return (token_logps(model(tokens), tokens) * mask).sum(dim=1)


@torch.no_grad()
def all_answer_logps(model: Transformer, rows: list[Row]) -> Tensor:
    """`answer_logps` of any number of rows."""
    return torch.cat([answer_logps(model, rows[i : i + 256]) for i in range(0, len(rows), 256)])


def loss_and_record(
    config: Config, logps: Tensor, ref_logps: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The loss of N pairs and its line in the log, given (2N,) each: the chosen answers of all
    pairs, then the rejected."""
    (chosen, rejected), how = logps.chunk(2), {"beta": config.dpo_beta, "kind": config.dpo_loss}
    how["label_smoothing"] = config.label_smoothing
    loss, metrics = dpo_loss(chosen, rejected, *ref_logps.chunk(2), **how)
    metrics |= {"loss": loss, "chosen_logps": chosen.mean(), "rejected_logps": rejected.mean()}
    return loss, {name: x.item() for name, x in metrics.items()}


def dpo(
    config: Config,
    run: Run,
    stage: str,
    policy: Transformer,
    reference: Transformer,
    pairs: list[Pair],
    held_out_pairs: list[Pair],
) -> None:
    """One pass over the pairs, but for the last few, which fill no step. Every `eval_every` steps,
    the loss on held-out pairs is taken, and the model is left in <stage>_<steps>.pt.

    The policy becomes the best model of these looks and of the start, also in <stage>.pt. What
    learns is a copy, which goes on. Raises ValueError for pairs that fill no step.
    """
    size = config.reward_batch
    steps = len(pairs) // size
    if not steps:
        raise ValueError(f"{len(pairs)} pairs fill no step of {size}: more --pairs would")
    learner = copy.deepcopy(policy)
    optimizer, held_out = train.make_optimizer(learner), rows_of(held_out_pairs)
    ref_held_out = all_answer_logps(reference, held_out)

    def look() -> dict[str, float]:
        return loss_and_record(config, all_answer_logps(learner, held_out), ref_held_out)[1]

    lowest = torch.tensor(look()["loss"])
    state = {"learner": learner, "optimizer": optimizer, "lowest": lowest}
    for step in run.steps(stage, steps, policy, **state):
        rows = rows_of(pairs[step * size : (step + 1) * size])
        ref_logps = all_answer_logps(reference, rows)
        loss, record = loss_and_record(config, answer_logps(learner, rows), ref_logps)
        loss.backward()
        lr = train.learning_rate(config.dpo_lr, step, steps, warmup=10, decay_from=0.3)
        norm = train.optimizer_step(learner, optimizer, lr, config.max_grad_norm)
        record |= {"grad_norm": norm.item(), "lr": lr}
        check_finite(stage, step, record)
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            found = look()
            record |= {f"held_out_{name}": x for name, x in found.items()}
            run.write_model(f"{stage}_{step + 1}.pt", learner)
            if found["loss"] < lowest:
                lowest.fill_(found["loss"])
                policy.load_state_dict(learner.state_dict())
        run.show({name: record[name] for name in ("loss", "accuracy", "margin")})
        run.log(record)


def main(arguments: list[str]) -> None:
    """Base model, fine-tuning, pairs, DPO, and gold before and after."""
    config = flags.parse(Config, reward_model.PRESETS, arguments, __doc__, "rlhf.dpo")
    with open_run(config, "-m rlhf.dpo") as run:
        _, policy = fine_tuned(config, run)
        sft = copy.deepcopy(policy)
        drawn = (config.pairs, "pairs"), (CHOOSING, "pairs for choosing")
        pairs = (clear(config, draw_pairs(config, sft, *which)) for which in drawn)
        dpo(config, run, "dpo", policy, sft, *pairs)
        models = {"sft": sft, "dpo": policy}
        found = {x: run.once(x, partial(measure, config, model)) for x, model in models.items()}
        run.finish({"device": config.device, "seed": config.seed, **found})
        print(f"\n{gold_table(found)}\n\n{run.times()}")


if __name__ == "__main__":
    main(sys.argv[1:])
