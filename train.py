"""From random weights to R1-Zero: pretrain a small transformer on documents, then GRPO with
rule-based rewards alone.

    python train.py                          # the whole job: base model, GRPO, evaluation of both
    python train.py --task chains            # another task: 7 + 8 - 3
    python train.py --preset tiny            # a small job on short chains, in about two minutes
    python train.py --init out/RUN/base.pt   # GRPO from a base model that is there already
    python train.py --resume out/RUN         # go on with a run that was stopped
    python train.py --help                   # every knob

Read from top to bottom: the knobs; what every stage shares; imitation, of which pretraining is one
kind; GRPO; the job. A stage is a loop over `run.steps` (kit/run.py). Everything in a stage is a
function of the seed and the step, except what is named in the call of `run.steps`.

P prompts, G completions of each, B = P * G rows, the G of one prompt adjacent; T token positions.
"""

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin are slow here

import numpy as np
import torch
from torch import Tensor, nn

from data import TASKS, check_task, get_tokenizer
from data.batches import Batch
from data.corpus import check_room, check_words, document_batches
from data.problem import Problem, sample_problems, stream
from data.tokenizer import Tokenizer
from grpo import (
    KL_ESTIMATORS,
    VARIANTS,
    group_advantages,
    loss_normalizer,
    policy_loss,
    token_logps,
)
from kit import flags, metrics, parallel
from kit.captured import CapturedDecoder
from kit.evaluate import compare_samples, evaluate, held_out_problems, share, table
from kit.look import look
from kit.memory import check_memory
from kit.metrics import Rewards, check_finite, weight_norm
from kit.parallel import generate
from kit.run import Run, multiplies_in_bfloat16, open_run
from model import LONGEST, ModelConfig, Transformer
from rewards import RULES, rule_weights
from sample import Rollout, complete, decode_completions, load_policy, tokenizer_of

# ---------------------------------------------------------------------------------------- the knobs


@dataclass(frozen=True)
class Config:
    """Every knob of a run. The comments are what `--help` prints."""

    preset: str = "cpu"  # sizes, values for the rest
    task: str = "signs"  # row of data.TASKS, what is asked
    variant: str = "grpo"  # row of grpo.VARIANTS, the objective
    seed: int = 0  # of the weights, the documents, the problems and the sampling
    out: str = ""  # its folder, a new one; default out/<task>-<preset>-<variant>-seed<seed>
    init: str = ""  # a base model to start GRPO from, instead of pretraining one
    resume: str = ""  # folder of a stopped run to go on with, by its settings; but for --device
    device: str = "cpu"  # a torch device; default cuda where there is one, else cpu
    dtype: str = "float32"  # of matrix products; weights stay float32
    threads: int = 1  # CPU threads; a second one makes products this small slower
    deterministic: bool = False  # on a GPU: kernels that give the same bits each time; a CPU's do
    cuda_graphs: bool = False  # on a GPU: replay each decode step of a rollout as one CUDA graph
    min_level: int = 0  # of the easiest problem; 0: the task's own
    max_level: int = 0  # of the hardest problem; 0: the task's own
    # model
    n_layer: int = 3  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key/value heads
    d_model: int = 64  # width
    d_ff: int = 192  # width of the feed-forward layers
    max_seq_len: int = 0  # tokens of prompt and completion together; 0: the task's own
    # pretraining
    pretrain_steps: int = 8000  # optimizer steps
    pretrain_tokens: int = 512  # tokens of documents in a step, about
    pretrain_lr: float = 4e-3  # peak learning rate
    # GRPO
    steps: int = 100  # rollouts
    prompts: int = 32  # P: prompts in a rollout
    group_size: int = 8  # G: completions of each prompt
    max_new_tokens: int = 0  # where a completion is cut, mostly to earn 0; 0: the task's own
    temperature: float = 1.0  # of sampling, and so of the policy that is trained
    lr: float = 6e-4  # peak learning rate
    inner_epochs: int = 1  # mu: passes over a rollout
    minibatches: int = 4  # optimizer steps in a pass
    micro_batch: int = 64  # rows that go through the model at once: memory and speed, not gradient
    clip_low: float | None = None  # the ratio may fall to 1 - this; None: the variant's own
    clip_high: float | None = None  # the ratio may rise to 1 + this; None: the variant's own
    beta: float = 0.0  # weight of the KL to the reference; 0: no reference at all
    kl: str = "k3"  # what beta weighs, row of grpo.KL_ESTIMATORS; k3 is as published
    reference_every: int = 0  # steps until the policy becomes the reference (R1: 400); 0: never
    rewards: str = "accuracy=1,format=1"  # rules and their weights
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    # evaluation
    eval_every: int = 10  # steps between two looks at held-out problems
    eval_problems: int = 150  # held-out problems of the evaluation before and after
    eval_samples: int = 8  # completions of each

    method: ClassVar = ""  # in the name of the default folder, where it is not the variant
    # fmt: off
    CHOICES: ClassVar = {
        "preset": ["gpu", "cpu", "tiny"], "task": TASKS, "dtype": ["float32", "bfloat16"],
        "variant": list(VARIANTS), "kl": list(KL_ESTIMATORS),
    }
    NAMES: ClassVar = {"rewards": RULES}  # what the text of a field may name
    UNUSED: ClassVar = ()  # fields that a program built on this one has no use for
    RANGES: ClassVar = {  # a field that is not here: from 1 to 2^31 - 1, a float from 0 to 1e30
        "seed": (0, 2**63 - 1), "threads": (1, 1024), "reference_every": (0, 2**31 - 1),
        "min_level": (0, 1000), "max_level": (0, 1000),  # and as far as the task goes
        "n_layer": (1, 1024), "n_head": (1, 65536), "n_kv_head": (1, 65536),
        "d_model": (1, 65536), "d_ff": (1, 65536), "max_seq_len": (48, LONGEST),
        "prompts": (1, 10**6), "group_size": (1, 10**6),
        "eval_problems": (1, 10**6), "eval_samples": (8, 10**6),
        "lr": (1e-12, 1e30), "pretrain_lr": (1e-12, 1e30), "max_grad_norm": (1e-12, 1e30),
        "clip_low": (0, math.inf), "clip_high": (0, math.inf),  # inf: no clip on that side
        "temperature": (0.001, 1e6),  # completions that are all the same teach nothing
    }
    # fmt: on

    def __post_init__(self) -> None:
        """Raise ValueError, in one line, for settings that do not go together."""
        check_task(self.task)
        row, clip = VARIANTS.get(self.variant), (self.clip_low, self.clip_high)
        if self.reference_every and not self.beta:
            raise ValueError("--reference_every needs --beta: without a KL there is no reference")
        if self.kl != "k3" and not self.beta:
            raise ValueError(f"--kl {self.kl} needs --beta: without it there is no KL")
        if row and not row.ratio and self.minibatches * self.inner_epochs > 1:
            advice = "makes one update a rollout: add --minibatches 1 --inner_epochs 1"
            raise ValueError(f"--variant {self.variant} {advice}")
        if row and row.clip_low is None and clip != (None, None):
            advice = "has no clip: leave --clip_low and --clip_high out"
            raise ValueError(f"--variant {self.variant} {advice}")
        for name in ("clip_low", "clip_high"):  # a ratio is a float32
            if 1e30 < (getattr(self, name) or 0) < math.inf:
                reason = f"must be inf, or from 0 to 1e+30, not {getattr(self, name)}"
                raise ValueError(f"--{name} {reason}")
        if not self.levels:
            raise ValueError(f"--min_level {self.levels.start} is above --max_level")
        task = TASKS[self.task]
        if self.levels[-1] > task.hardest - task.beyond:
            most = task.hardest - task.beyond
            raise ValueError(f"--max_level must be at most {most} for {self.task}")
        evaluated = [level for level in self.levels if level not in task.apart]
        if not evaluated:
            reason = f"{self.task} tells level {self.levels[-1]} apart"
            raise ValueError(f"--max_level must be higher: {reason}")
        if self.pretrain_tokens < self.max_seq_len:
            advice = f"at least --max_seq_len {self.max_seq_len}, or a document may not fit"
            raise ValueError(f"--pretrain_tokens must be {advice}")
        kinds = len(evaluated) * len(task.languages)
        if self.eval_problems < kinds:
            raise ValueError(f"--eval_problems must be at least {kinds}, one for each kind")
        rule_weights(self.rewards)

    @property
    def levels(self) -> range:
        """Of the problems, from the easiest to the hardest."""
        least, most = TASKS[self.task].levels
        return range(self.min_level or least, (self.max_level or most) + 1)

    @property
    def in_bfloat16(self) -> bool:
        """Whether matrix products are in bfloat16: asked for, and in the device's hardware."""
        return self.dtype == "bfloat16" and multiplies_in_bfloat16(self.device)

    def filled(self) -> "Config":
        """The same with the defaults that depend on other settings."""
        task, by = TASKS[self.task], self.method or self.variant
        return replace(
            self,
            out=self.out or f"out/{self.task}-{self.preset}-{by}-seed{self.seed}",
            min_level=self.levels[0],
            max_level=self.levels[-1],
            max_seq_len=self.max_seq_len or task.max_seq_len,
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
        )


# fmt: off
PRESETS = {
    "cpu": {},
    "gpu": {
        "n_layer": 4, "d_model": 128, "d_ff": 384, "pretrain_tokens": 1024, "pretrain_lr": 2e-3,
        "prompts": 64, "group_size": 16, "lr": 4e-4, "micro_batch": 256,
    },
    "tiny": {
        "task": "chains", "max_level": 3, "n_layer": 2, "d_ff": 128, "eval_problems": 100,
        "pretrain_steps": 6000, "pretrain_tokens": 320, "steps": 60,
    },
}
# fmt: on

# -------------------------------------------------------------------------- what every stage shares


def learning_rate(peak: float, step: int, steps: int, *, warmup: int, decay_from: float) -> float:
    """Rises over `warmup` steps, stays, and from the share `decay_from` of the steps falls, to a
    fiftieth at the least."""
    done = step / steps
    fall = 1.0 if done < decay_from else max(0.02, (1 - done) / (1 - decay_from))
    return peak * min(1.0, (step + 1) / warmup) * fall


def make_optimizer(model: nn.Module, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW, without weight decay on the gains of the norms."""
    decay = {2: weight_decay, 1: 0.0}  # of matrices, of gains
    groups = [
        {"params": [w for w in model.parameters() if w.dim() == dim], "weight_decay": each}
        for dim, each in decay.items()
    ]
    for weight in model.parameters():  # where no row teaches, AdamW's momentum still goes on
        weight.grad = torch.zeros_like(weight)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float
) -> Tensor:
    """One step down the gradients that lie in the model. Returns their norm before it was cut."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return norm


# ---------------------------------------------------------------------------------------- imitation

LOG_EVERY = 50  # steps of imitation that share a line of the log


def imitate(
    config: Config,
    run: Run,
    stage: str,
    model: Transformer,
    batch: Callable[[int], Batch],
    steps: int,
    lr: float,
) -> None:
    """Next-token prediction on batch(0), batch(1), ... On the web in miniature this is pretraining,
    on chosen documents it is fine-tuning. Changes the model in place."""
    optimizer = make_optimizer(model, weight_decay=0.1)
    words = "".join(f" {word}" for word in TASKS[config.task].verdicts)
    verdicts = torch.tensor(tokenizer_of(model).encode(words), dtype=torch.long).to(config.device)
    recent = torch.zeros(4, LOG_EVERY, device=config.device)  # numbers of steps not yet logged
    for step in run.steps(stage, steps, model, optimizer=optimizer, recent=recent):
        tokens, mask, positions = whole = batch(step)
        mine, predicted = parallel.mine(len(tokens)), mask.sum().item()
        tokens, mask, positions = (x if x is None else x[mine].to(config.device) for x in whole)
        logps = token_logps(model(tokens, positions=positions), tokens)
        loss = -logps[mask].sum() / predicted  # by all rows
        loss.backward()
        rate = learning_rate(lr, step, steps, warmup=min(100, steps // 10 + 1), decay_from=0.3)
        judged = mask & torch.isin(tokens, verdicts)
        numbers = loss.detach(), (logps.detach().exp() * judged).sum(), judged.sum()
        numbers = torch.stack([x.float() for x in numbers])
        parallel.add_up(model, numbers)
        norm = optimizer_step(model, optimizer, rate, config.max_grad_norm)
        recent[:, step % LOG_EVERY] = torch.stack([*numbers, norm])
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            of_line = recent[:, : step % LOG_EVERY + 1]
            loss, probs, count, grad_norm = of_line.mean(dim=1).tolist()
            record = {"loss": loss, "grad_norm": grad_norm, "weight_norm": weight_norm(model)}
            record |= {"verdict_prob": probs / count} if count else {}
            check_finite(stage, step, record)
            run.show({"loss": loss})
            run.log(record | {"lr": rate})


# --------------------------------------------------------------------------------------------- GRPO

OBJECTIVE = ("variant", "clip_low", "clip_high", "beta", "kl")  # settings that policy_loss takes
DECAY_FROM = 0.6  # share of the rollouts after which the learning rate falls
Reward = Callable[[list[Problem], Rollout, int], Rewards]  # of the problems, rollout, step


def rules(weights: dict[str, float], tokenizer: Tokenizer) -> Reward:
    """The weighted sum of rules, and each rule by its name."""

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        texts = decode_completions(rollout, tokenizer)
        G = len(texts) // len(problems)
        pairs = [(text, problems[row // G]) for row, text in enumerate(texts)]
        parts = {
            name: torch.tensor([RULES[name](*pair) for pair in pairs], dtype=torch.float32)
            for name in weights
        }
        return {"reward": sum(weight * parts[name] for name, weight in weights.items()), **parts}

    return reward


def problems_of(config: Config, step: int) -> list[Problem]:
    """The P problems of a step. Levels take turns, some more often than others."""
    rng, P, task = stream(config.seed, "problems", step), config.prompts, TASKS[config.task]
    more = [level for level in task.more_turns if level in config.levels]
    return sample_problems(rng, task, [*config.levels, *more], P, first=step * P)


def sample(
    config: Config, policy: Transformer, step: int, generate: Callable = generate
) -> tuple[list[Problem], Rollout]:
    """The problems of a step, and G completions of each by the policy as it is now."""
    problems = problems_of(config, step)
    rollout = complete(
        policy,
        problems,
        generate,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=stream(config.seed, "rollout", step).getrandbits(63),
    )
    return problems, rollout


def outcome_advantages(config: Config, rewards: Rewards, rollout: Rollout) -> Tensor:
    """Each reward against its group, (B,): the same advantage for every token of an output."""
    scale = VARIANTS[config.variant].scale
    return group_advantages(rewards["reward"], config.group_size, scale)


def minibatches(config: Config, step: int, rows: int) -> Iterator[np.ndarray]:
    """The rows of each update of a step: each row once in an epoch, in an order of its own."""
    for epoch in range(config.inner_epochs):
        order = list(range(rows))
        stream(config.seed, "minibatches", step * config.inner_epochs + epoch).shuffle(order)
        yield from np.array_split(order, min(config.minibatches, rows))


def micro_batches(
    rollout: Rollout, rows: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, slice]]:
    """Cut rows into micro-batches of like length, so that little is padding. Each comes with its
    columns: from the last token of its shortest prompt to the end of its longest completion."""
    rows = rows[np.argsort(rollout.ends[rows], kind="stable")]
    for part in np.array_split(rows, math.ceil(len(rows) / size)) if len(rows) else ():
        yield part, slice(rollout.starts[part].min() - 1, rollout.ends[part].max())


def logps_of(
    model: Transformer, rollout: Rollout, rows: np.ndarray, columns: slice, temperature: float
) -> Tensor:
    """Log-probabilities under a model of the tokens in these rows and columns; 0 in the first
    column. The output layer reads no prompt."""
    tokens = rollout.tokens[rows, : columns.stop]
    logits = model(tokens, first=columns.start)
    return token_logps(logits, tokens[:, columns], temperature)


@torch.no_grad()
def rollout_logps(
    model: Transformer, rollout: Rollout, rows: np.ndarray, size: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities (B, T) under a model of the sampled tokens of these rows. All other places
    keep the sampler's log-probabilities."""
    logps = rollout.logps.clone()
    for part, columns in micro_batches(rollout, rows, size):
        found = logps_of(model, rollout, part, columns, temperature)
        logps[part, columns] = found * rollout.mask[part, columns]
    return logps


def loss_inputs(
    config: Config,
    policy: Transformer,
    reference: Transformer | None,
    rollout: Rollout,
    advantages: Tensor,
) -> tuple[dict[str, Tensor], np.ndarray]:
    """What `policy_loss` takes beside logps, (B, T) each, given advantages (B,) or (B, T); and the
    rows of this process that teach, (B,) bool on the host.

    A row without an advantage adds exactly nothing to the gradient, unless there is a KL. Such a
    row does not go through the model.
    """
    if advantages.shape not in (rollout.mask.shape[:1], rollout.mask.shape):
        found, wanted = tuple(advantages.shape), tuple(rollout.mask.shape)
        raise ValueError(f"advantages must be (B,) or (B, T), {wanted}, not {found}")
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(rollout.mask.shape)  # the same for every token
    inputs = {"advantages": advantages.to(config.device) * rollout.mask, "mask": rollout.mask}
    teaches = (inputs["advantages"] != 0).any(dim=1).cpu().numpy() | (config.beta > 0)
    teaches &= parallel.mine(len(teaches))
    rows, how = teaches.nonzero()[0], (config.micro_batch, config.temperature)
    if VARIANTS[config.variant].ratio and policy.in_bfloat16:
        # Sampler and trainer round differently, which as a ratio would be noise: ask the trainer.
        inputs["old_logps"] = rollout_logps(policy, rollout, rows, *how)
    elif VARIANTS[config.variant].ratio:
        inputs["old_logps"] = rollout.logps
    if reference:
        inputs["ref_logps"] = rollout_logps(reference, rollout, rows, *how)
    return inputs, teaches


def add_gradient(
    config: Config,
    policy: Transformer,
    rollout: Rollout,
    inputs: dict[str, Tensor],
    rows: np.ndarray,
    teaches: np.ndarray,
) -> dict[str, float]:
    """Add the gradient of the loss of these rows to the policy's. Returns sums of its metrics.

    The loss is divided by what all rows count. So the gradient does not depend on how the rows are
    cut into micro-batches, nor on leaving out rows that teach nothing.
    """
    parts, objective = [], {name: getattr(config, name) for name in OBJECTIVE}
    normalizer = loss_normalizer(rollout.mask[rows], config.variant, config.max_new_tokens)
    for part, columns in micro_batches(rollout, rows[teaches[rows]], config.micro_batch):
        logps = logps_of(policy, rollout, part, columns, config.temperature)
        given = {name: x[part, columns] for name, x in inputs.items()}
        loss, sums = policy_loss(logps, **given, normalizer=normalizer, **objective)
        loss.backward()
        gap = (logps.detach() - rollout.logps[part, columns]) * given["mask"]
        parts.append(sums | {"loss": loss.detach(), "logp_gap": gap.abs().max()})
    parallel.add_up(policy)
    return metrics.totals(parts)


def update(
    config: Config,
    run: Run,
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    lr: float,
    rollout: Rollout,
    inputs: dict[str, Tensor],
    teaches: np.ndarray,
) -> dict[str, float]:
    """The optimizer steps of one rollout (lines 10 and 11). Returns their metrics for the log."""
    updates = []
    for rows in minibatches(config, run.step, len(teaches)):
        sums = add_gradient(config, policy, rollout, inputs, rows, teaches)
        norm = optimizer_step(policy, optimizer, lr, config.max_grad_norm)
        sums |= {"grad_norm": norm.item(), "weight_norm": weight_norm(policy)}
        check_finite(run.stage, run.step, sums)
        updates.append(sums)
    return metrics.update_metrics(updates) | {"lr": lr}


def grpo(
    config: Config,
    run: Run,
    stage: str,
    policy: Transformer,
    base: Transformer,
    reward: Reward,
    sample: Callable = sample,
    advantage: Callable = outcome_advantages,
) -> None:
    """Algorithm 1 of DeepSeekMath (Shao et al. 2024); its line numbers at the right. The paper's
    outer loop is here the refresh of the reference, every `reference_every` steps.

    Changes the policy in place. `sample(config, policy, step)` gives the problems and the rollout
    of a step. `reward(problems, rollout, step)` gives its rewards by name, (B,) each and on the
    host; "reward" is maximised. `advantage(config, rewards, rollout)` gives (B,) or (B, T). Looks
    at held-out problems ask for both too. Raises ValueError for rewards of another shape.
    """
    optimizer = make_optimizer(policy)
    reference = copy.deepcopy(base) if config.beta else None  # line 3
    for step in run.steps(stage, config.steps, policy, optimizer=optimizer, reference=reference):
        started = time.perf_counter()
        problems, rollout = sample(config, policy, step)  # lines 5-7
        rewards = reward(problems, rollout, step)  # line 8
        metrics.check_rewards(rewards, rollout, len(problems) * config.group_size)
        advantages = advantage(config, rewards, rollout)  # line 9
        inputs, teaches = loss_inputs(config, policy, reference, rollout, advantages)
        sample_seconds = time.perf_counter() - started
        if step == 0:  # looks.jsonl begins with what the policy says before it learns
            look_at_held_out(config, run, 0, policy, base, reward, advantage)

        started = time.perf_counter()
        lr = learning_rate(config.lr, step, config.steps, warmup=5, decay_from=DECAY_FROM)
        # Lines 10 and 11.
        updates = update(config, run, policy, optimizer, lr, rollout, inputs, teaches)
        if reference and config.reference_every and (step + 1) % config.reference_every == 0:
            reference.load_state_dict(policy.state_dict())

        record = metrics.rollout_metrics(problems, rollout, rewards)
        record |= updates | {"sample_seconds": sample_seconds}
        record["update_seconds"] = time.perf_counter() - started
        due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        if due:
            record |= look_at_held_out(config, run, step + 1, policy, base, reward, advantage)
        run.show({short: record[name] for name, short in SHORT.items() if name in record}, keep=due)
        run.log(record)


LOOKS = 64  # problems of a look
SHORT = {"accuracy": "acc", "format": "fmt", "completion_tokens": "len", "entropy": "ent"}
SHORT |= {"held_out_accuracy": "held"}  # what stands beside the bar, within 80 columns


def look_at_held_out(
    config: Config,
    run: Run,
    done: int,
    policy: Transformer,
    base: Transformer,
    reward: Reward,
    advantage: Callable,
) -> dict[str, float]:
    """How the policy answers held-out problems after so many steps, the same problems at each look,
    and KL(policy, base) in nats a token."""
    problems = held_out_problems(config.task, config.levels, LOOKS, config.seed, "look")
    how = {"group_size": config.group_size, "limit": config.max_new_tokens, "seed": config.seed}
    given = run, policy, problems, reward, partial(advantage, config)
    rollout, numbers = look(*given, done=done, **how)
    rows = np.arange(len(rollout.tokens))
    log_ratio = rollout.logps - rollout_logps(base, rollout, rows, config.micro_batch)
    return numbers | {"base_kl": (log_ratio.sum() / rollout.mask.sum()).item()}


# ------------------------------------------------------------------------------------------ the job


def r1_zero(config: Config, run: Run, reward: Reward | None = None, **hooks) -> None:
    """Base model, evaluation, GRPO by rules, evaluation. A resumed run comes through here from the
    top: what has ended is loaded, what was stopped goes on. `hooks` are for `grpo`."""
    if config.group_size < 2:
        raise ValueError("--group_size must be at least 2: an advantage compares with a group")
    if reward is None and "accuracy" in rule_weights(config.rewards):
        asked = held_out_problems(config.task, config.levels, LOOKS, config.seed, "look")
        if any(problem.is_right("") is None for problem in asked):
            reason = f"{config.task} has problems without a rule"
            raise ValueError(f"{reason}: leave accuracy out of --rewards")

    policy = base_model(config, run)
    base = copy.deepcopy(policy)
    before = run.once("base", lambda: examine(config, base))
    said = f"pass@1 {share(before['pass@1'])}, format {share(before['format'])}"
    print(f"base model: {said}; now GRPO, by rules alone")
    print(f"objective: {config.variant} ({VARIANTS[config.variant].source})")

    if config.cuda_graphs:
        decoder = CapturedDecoder(policy, config.prompts * config.group_size, config.max_seq_len)
        hooks = {"sample": partial(sample, generate=decoder.generate)} | hooks
    reward = reward or rules(rule_weights(config.rewards), tokenizer_of(policy))
    grpo(config, run, "r1_zero", policy, base, reward, **hooks)
    after = run.once("r1_zero", lambda: examine(config, policy))

    problems = held_out_problems(config.task, config.levels, 16, config.seed, "samples")
    models, limits = {"base": base, "R1-Zero": policy}, (config.max_new_tokens, config.seed)
    said, shown = compare_samples(models, problems, *limits)
    run.write("samples.txt", said)
    run.finish({"device": config.device, "seed": config.seed, "base": before, "r1_zero": after})
    print(f"\n{shown}\n\n{table(before, after)}\n\n{run.times()}\n{run.folder}/ has it all. Next:")
    print(f"  python sample.py --checkpoint {run.folder}/r1_zero.pt")
    print(f"  python -m experiments.watch.diagnose {run.folder}")


def examine(config: Config, model: Transformer) -> dict:
    """The evaluation of a model, as a configuration asks for it."""
    counts = {"problems": config.eval_problems, "samples": config.eval_samples}
    counts |= {"limit": config.max_new_tokens, "seed": config.seed}
    return evaluate(model, config.task, config.levels, **counts)


def base_model(config: Config, run: Run) -> Transformer:
    """The stage "base": a model pretrained on the web in miniature, or --init's as it is. A job
    begins with it; a resumed run has it from its own folder. Raises ValueError, in one line, for a
    shape that does not fit together, or that the task or --init's model does not fit."""
    tokenizer, hardest = get_tokenizer(config.task), config.levels[-1]
    sizes = (config.max_seq_len, config.max_new_tokens)
    check_room(config.task, hardest, hardest + TASKS[config.task].beyond, *sizes)
    check_words(config.task, config.levels, config.max_seq_len)
    names = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "max_seq_len")
    shape = {name: getattr(config, name) for name in names}
    words = {"vocab_size": tokenizer.vocab_size, "vocabulary": tokenizer.fingerprint}
    model_config = ModelConfig(task=config.task, **words, **shape)
    check_memory(config, model_config)
    model = Transformer(model_config)
    model.init_weights(config.seed, tokenizer.pieces)
    if config.init and "base" not in run.ended:  # else it lies in the run's own folder
        model = load_policy(config.init)
        if model.config.task != config.task:
            raise ValueError(f"{config.init} learned another task: add --task {model.config.task}")
        found = {name: getattr(model.config, name) for name in names}
        if differing := [f"--{name} {found[name]}" for name in names if found[name] != shape[name]]:
            advice = f"add {' '.join(differing)}, or its --preset"
            raise ValueError(f"{config.init} has another shape: {advice}")
    model.in_bfloat16 = config.in_bfloat16
    model.to(config.device)

    weights = sum(weight.numel() for weight in model.parameters())
    levels = f"levels {config.levels[0]} to {config.levels[-1]}"
    print(f"{config.out}: {weights:,} weights on {config.device}; {config.task}, {levels}")
    if config.device.startswith("cuda"):
        print("(--device cpu: the same without a GPU; --preset gpu: larger, not run on one yet)")
    sizes = (config.pretrain_tokens, config.max_seq_len)
    web = document_batches(config.task, config.levels, config.seed, *sizes)
    steps = 0 if config.init else config.pretrain_steps  # of no steps, a stage keeps its model
    imitate(config, run, "base", model, web, steps, config.pretrain_lr)
    return model


def main(arguments: list[str]) -> None:
    config = flags.parse(Config, PRESETS, arguments, __doc__, "train.py")
    with open_run(config, "train.py") as run:
        r1_zero(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
