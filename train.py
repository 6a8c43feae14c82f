"""From random weights to R1-Zero: pretrain a small transformer on documents, then GRPO with rule-based rewards alone.

    python train.py                          # the whole job: base model, GRPO, evaluation before and after
    python train.py --preset tiny            # the same in a minute, on an easier task
    python train.py --init out/RUN/base.pt   # GRPO from a base model that is there already
    python train.py --resume out/RUN         # goes on with a run that was stopped
    python train.py --help                   # every knob

Read from top to bottom: configuration, randomness, pretraining, GRPO, evaluation, the run and its folder.
"""

import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from going on with one run there
    fcntl = None

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow small products down

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.arithmetic import APPLY, MAX_OPERAND, Problem, Task, make_problem
from data.corpus import SMALL_TEXT, Document, document, longest_document
from data.languages import LANGUAGES
from data.tokenizer import MAX_NUMBER, MAX_STEP, Tokenizer, get_tokenizer
from grpo import KL_TERMS, VARIANTS, group_advantages, loss_normalizer, policy_loss, token_logps
from model import ModelConfig, Transformer, load_tensors, one_line, save_model, save_tensors, write_whole
from rewards import accuracy_reward, extract_answer, format_reward, language_consistency_reward
from sample import CapturedDecoder, Rollout, decode_completions, generate, load_policy

# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Every knob of a run. The comments are what `--help` prints."""

    preset: str = "cpu"  # gpu | cpu | tiny: a set of values for the rest; default gpu where CUDA is, else cpu
    variant: str = "grpo"  # row of grpo.VARIANTS: which objective
    seed: int = 0  # of the weights, the documents, the problems and the sampling
    out: str = ""  # folder of the run; must not exist yet; default out/<preset>-<variant>-seed<seed>
    init: str = ""  # a base model to start GRPO from, in place of pretraining one
    resume: str = ""  # folder of a run that was stopped, to go on with; all flags but --device are then that run's
    save_every: float = 20.0  # seconds between two saves of all that resuming needs
    device: str = "cpu"  # a torch device
    dtype: str = "float32"  # of matrix products: float32 or bfloat16; weights and log-probabilities stay float32
    threads: int = 1  # CPU threads; a second one slowed these small products down by half
    deterministic: bool = False  # on a GPU: only kernels that give the same bits each time; a CPU always does
    compile: bool = False  # compile the training forward: faster steps after a slow start; needs a C++ compiler
    cuda_graphs: bool = False  # on a GPU: replay each decode step of a rollout as one CUDA graph
    # task
    min_level: int = 2  # operations in the shortest problem
    max_level: int = 5  # operations in the longest one
    operators: str = "+-"  # +- or +-*: with * no order but that of the chain will do
    max_total: int = 20  # limit of the running total
    languages: str = "en"  # en or en,ko: of the questions, and of the documents
    # model
    n_layer: int = 3  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key/value heads
    d_model: int = 64  # width
    d_ff: int = 192  # width of the feed-forward layers
    max_seq_len: int = 96  # tokens of prompt and completion together
    # pretraining
    pretrain_steps: int = 5000  # optimizer steps
    pretrain_tokens: int = 512  # tokens of documents in a step, about
    pretrain_lr: float = 4e-3  # peak learning rate
    # GRPO
    steps: int = 80  # rollouts
    prompts: int = 64  # P: prompts in a rollout
    group_size: int = 8  # G: completions of each prompt
    max_new_tokens: int = 64  # where a completion is cut; it earns what the rules give, mostly 0
    temperature: float = 1.0  # of sampling, and so of the policy that is trained
    lr: float = 6e-4  # peak learning rate
    inner_epochs: int = 1  # mu: passes over a rollout
    minibatches: int = 4  # optimizer steps in a pass
    micro_batch: int = 64  # completions that go through the model at once: memory and speed, not the gradient
    clip_low: float | None = None  # the ratio may fall to 1 - this; None: the variant's own
    clip_high: float | None = None  # the ratio may rise to 1 + this; None: the variant's own
    beta: float = 0.0  # weight of the KL to the reference; 0: no reference at all
    kl: str = "k3"  # what beta weighs: k1, k2, k3 (as published) or k3_ratio, its correction (grpo.kl_penalty)
    reference_every: int = 0  # steps until the policy becomes the reference (R1: 400); 0: the base model stays it
    accuracy_weight: float = 1.0  # of the accuracy reward
    format_weight: float = 1.0  # of the format reward; equal weights are R1-Zero's
    language_weight: float = 0.0  # of the reward for thinking in the question's language; R1's is 1
    curriculum: float = 0.0  # accuracy at the highest level that adds the next one; 0: never
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    # evaluation
    eval_every: int = 10  # steps between two quick looks at held-out problems
    eval_problems: int = 500  # held-out problems of the evaluation before and after
    eval_samples: int = 16  # completions of each

    @property
    def task(self) -> Task:
        return Task(self.operators, self.max_total, tuple(self.languages.split(",")))

    @property
    def in_bfloat16(self) -> bool:
        """Whether matrix products are: where it was asked for, and the device is known to be fast at it."""
        return self.dtype == "bfloat16" and multiplies_in_bfloat16(self.device)

    @property
    def evaluated_levels(self) -> range:
        """Not level 1: its problems are steps of others, so none of them is held out."""
        return range(max(2, self.min_level), self.max_level + 1)


PRESETS = {
    "cpu": {},
    "gpu": {
        "device": "cuda",
        "dtype": "bfloat16",
        "min_level": 1,
        "max_level": 8,
        "operators": "+-*",
        "max_total": 99,
        "languages": "en,ko",
        "n_layer": 6,
        "n_head": 8,
        "n_kv_head": 4,
        "d_model": 256,
        "d_ff": 768,
        "max_seq_len": 192,
        "pretrain_steps": 8000,
        "pretrain_tokens": 4096,
        "pretrain_lr": 2e-3,
        "steps": 150,
        "prompts": 128,
        "group_size": 16,
        "max_new_tokens": 112,
        "lr": 3e-4,
        "micro_batch": 512,
    },
    "tiny": {
        "max_level": 2,
        "n_layer": 2,
        "d_ff": 128,
        "pretrain_steps": 1500,
        "steps": 50,
        "prompts": 32,
        "eval_problems": 100,
    },
}

ROOT = Path(__file__).parent
SOURCES = ("grpo.py", "model.py", "rewards.py", "sample.py", "train.py")  # a run keeps those that it ran with
SOURCES += ("data/arithmetic.py", "data/corpus.py", "data/languages.py", "data/tokenizer.py")


# ------------------------------------------------------------------------------------------------------- randomness


def stream(seed: int, purpose: str, step: int) -> random.Random:
    """The random numbers of one purpose at one step. Nothing else draws from them, so no draw can shift another."""
    return random.Random(f"{seed} {purpose} {step}")


def sample_problems(
    config: Config, purpose: str, step: int, count: int, *, held_out: bool, levels: range | None = None
) -> list[Problem]:
    """`count` problems of these levels, or of the evaluated ones; over the steps, each level and language as often."""
    rng = stream(config.seed, purpose, step)
    levels = config.evaluated_levels if levels is None else levels
    kinds = [(level, language) for level in levels for language in config.task.languages]
    chosen = (kinds[(step * count + i) % len(kinds)] for i in range(count))
    return [make_problem(rng, level, config.task, held_out=held_out, language=language) for level, language in chosen]


# ------------------------------------------------------------------------------------------------------ pretraining

BATCHES_PER_POOL = 16
LOG_EVERY = 50  # steps of pretraining that share a line of the log


def encode_document(written: Document, tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """The tokens of a document, the end token last, and how many of them are its question."""
    question = tokenizer.encode(written.question)
    return len(question), [*question, *tokenizer.encode(written.text, tags=True), tokenizer.eos_id]


def document_batches(config: Config, tokenizer: Tokenizer, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of documents, from the one of step `first` on: tokens (B, T), right-padded, and the mask (B, T) of those
    to predict. A thread makes the next pool of them while the model learns from this one, mostly outside of Python."""
    pool, skipped = divmod(first, BATCHES_PER_POOL)
    with ThreadPoolExecutor(max_workers=1) as ahead:
        made = ahead.submit(document_pool, config, tokenizer, pool)
        while True:
            batches, pool = made.result(), pool + 1
            made = ahead.submit(document_pool, config, tokenizer, pool)
            yield from batches[skipped:]
            skipped = 0


def document_pool(config: Config, tokenizer: Tokenizer, pool: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of a pool. Its documents are sorted by length and cut into batches of as many tokens each, so that
    little is padding; the batches come in random order. The question of a document is read, not predicted."""
    rng = stream(config.seed, "documents", pool)
    levels = range(config.min_level, config.max_level + 1)
    rows, tokens = [], 0
    while tokens < BATCHES_PER_POOL * config.pretrain_tokens:
        rows.append(encode_document(document(rng, levels, config.task, config.max_seq_len), tokenizer))
        tokens += len(rows[-1][1])
    rows.sort(key=lambda row: len(row[1]))
    batches, count = [[] for _ in range(BATCHES_PER_POOL)], 0
    for row in rows:
        batches[count * BATCHES_PER_POOL // tokens].append(row)
        count += len(row[1])
    rng.shuffle(batches)
    return [padded(batch, tokenizer.pad_id) for batch in batches]


def padded(batch: list[tuple[int, list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """The documents that `encode_document` gave, as one tensor, and the mask of what is to be predicted."""
    width = max(len(ids) for _, ids in batch)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for _, ids in batch])
    start = torch.tensor([max(start, 1) for start, _ in batch])  # nothing comes before token 0 to predict it
    length = torch.tensor([len(ids) for _, ids in batch])
    position = torch.arange(width)
    return ids, (position >= start[:, None]) & (position < length[:, None])


def learning_rate(peak: float, step: int, steps: int, *, warmup: int, decay_from: float) -> float:
    """Rises over `warmup` steps, stays, and from the share `decay_from` of the steps falls to a fiftieth."""
    done = step / steps
    fall = 1.0 if done < decay_from else max(0.02, (1 - done) / (1 - decay_from))
    return peak * min(1.0, (step + 1) / warmup) * fall


def make_optimizer(model: Transformer, weight_decay: float) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> Tensor:
    """One step down the gradients that lie in the model; returns their norm before it was cut."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def weight_norm(model: Transformer) -> float:
    """The norm of all weights together. It tells of an update that broke them, which no loss before it can."""
    return torch.stack([weight.detach().norm() for weight in model.parameters()]).norm().item()


def stop_if_not_finite(phase: str, step: int, metrics: dict[str, float], advice: str) -> None:
    """Raise FloatingPointError, in one line, for the first of the metrics that is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{phase} stopped at step {step + 1}: {name} is {value}; {advice}")


def compiled(config: Config, model: Transformer) -> torch.nn.Module:
    """The same function of the same weights, compiled where --compile asks for it: for all shapes from the start, as
    kernels for the shape of the first step, or of the first one after resuming, could round otherwise."""
    return torch.compile(model, dynamic=True) if config.compile else model


def pretrain(config: Config, run: "Run", tokenizer: Tokenizer) -> None:
    """Next-token prediction on the web in miniature: what comes out is the base model."""
    model, recent = run.model, run.recent
    forward = compiled(config, model)
    batches = document_batches(config, tokenizer, run.step)
    bar = run.bar()
    for step in bar:
        tokens, mask = (x.to(config.device) for x in next(batches))
        loss = -token_logps(forward(tokens), tokens)[mask].mean()
        loss.backward()
        lr = learning_rate(config.pretrain_lr, step, config.pretrain_steps, warmup=100, decay_from=0.3)
        recent[0, step % LOG_EVERY] = loss.detach()
        recent[1, step % LOG_EVERY] = optimizer_step(model, run.optimizer, lr, config.max_grad_norm)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.pretrain_steps:
            means = recent[:, : step % LOG_EVERY + 1].mean(dim=1).tolist()
            record = dict(zip(("loss", "grad_norm"), means)) | {"weight_norm": weight_norm(model)}
            stop_if_not_finite("pretraining", step, record, "no model was saved yet; a lower --pretrain_lr may help")
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            run.log({"phase": "pretrain", "step": step + 1, **record, "lr": lr})
        run.end_step()


# ------------------------------------------------------------------------------------------------------------- GRPO


def score(config: Config, problems: list[Problem], completions: list[str]) -> dict[str, Tensor]:
    """The rewards (B,) of each rule by name, and their weighted sum, "reward". Row i answers problem i // G."""
    group_size = len(completions) // len(problems)
    asked = [problem for problem in problems for _ in range(group_size)]
    by_rule = {
        "accuracy": [accuracy_reward(text, problem.answer) for text, problem in zip(completions, asked)],
        "format": [format_reward(text) for text in completions],
        "language": [language_consistency_reward(text, problem.language) for text, problem in zip(completions, asked)],
    }
    rewards = {name: torch.tensor(values) for name, values in by_rule.items()}
    return {"reward": sum(getattr(config, f"{name}_weight") * values for name, values in rewards.items()), **rewards}


def accumulate_gradient(
    config: Config,
    model: Transformer,
    rollout: Rollout,
    advantages: Tensor,
    ref_logps: Tensor | None,
    minibatch: Tensor,
    old_logps: Tensor | None = None,
) -> Counter:
    """Add the gradient of the loss of these rows to the model's; return sums of the metrics over the tokens of those
    that went through it. The old log-probabilities are those of the sampler, if no others are given.

    What the loss is divided by is counted over all rows, so the gradient is the same whichever rows go through the
    model together, and though rows that add nothing to it are left out.
    """
    sums = Counter()
    normalizer = loss_normalizer(rollout.mask[minibatch], config.variant, config.max_new_tokens)
    on_policy = VARIANTS[config.variant].ratio is None
    old_logps = rollout.logps if old_logps is None else old_logps
    for rows, columns in micro_batches(config, rollout, rows_with_gradient(config, advantages, minibatch)):
        logps = completion_logps(config, model, rollout, rows, columns)
        sampled, sampled_logps = (x[rows, columns] for x in (rollout.mask, rollout.logps))
        # The metrics too are of rows that teach something, not of those that only fill up.
        mask = sampled & has_gradient(config, advantages[rows])[:, None]
        loss, metrics = policy_loss(
            logps,
            advantages[rows],
            mask,
            old_logps=None if on_policy else old_logps[rows, columns],
            ref_logps=None if ref_logps is None else ref_logps[rows, columns],
            variant=config.variant,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            kl=config.kl,
            normalizer=normalizer,
        )
        loss.backward()
        gap = ((logps.detach() - sampled_logps) * sampled).abs().max().double()
        sums["logp_gap"] = torch.maximum(gap, torch.as_tensor(sums["logp_gap"]))
        sums.update({name: value.double() for name, value in metrics.items()}, loss=loss.detach().double())
    return Counter(dict(zip(sums, torch.stack(list(sums.values())).tolist())))  # one read, where a GPU has to be met


def has_gradient(config: Config, advantages: Tensor) -> Tensor:
    """Which rows (B,) can have a gradient other than exactly 0: with a KL all of them, else those with an advantage."""
    return (advantages != 0) | (config.beta > 0)


def rows_with_gradient(config: Config, advantages: Tensor, rows: Tensor) -> Tensor:
    """Those of `rows` that have one. Where they are fewer than two, others fill up: a step of zero gradient is still a
    step of the optimizer, whose momentum goes on, and a compiled forward would be made anew for a single row."""
    silent = (~has_gradient(config, advantages[rows])).int()
    return rows[silent.argsort(stable=True)][: max(2, len(rows) - int(silent.sum()))]


def micro_batches(config: Config, rollout: Rollout, rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Cut `rows` into micro-batches of as many rows and of like length, so that little is padding; each with the
    columns from the last one that is a prompt's in all of its rows to the end of its longest."""
    position = torch.arange(1, rollout.mask.shape[1] + 1, device=rows.device)
    lengths, order = (rollout.mask[rows] * position).amax(dim=1).sort()
    prompts = rollout.mask[rows][order].int().argmax(dim=1)  # tokens of each
    parts = math.ceil(len(rows) / config.micro_batch)
    starts = torch.stack([part.min() - 1 for part in prompts.chunk(parts)])
    ends = torch.stack([part[-1] for part in lengths.chunk(parts)])
    columns = torch.stack((starts, ends), dim=1).tolist()  # one wait for a GPU, not one for each
    yield from zip(rows[order].chunk(parts), (slice(*part) for part in columns))


def completion_logps(config: Config, model: Transformer, rollout: Rollout, rows: Tensor, columns: slice) -> Tensor:
    """Log-probabilities under a model of what the rollout has in these rows and columns; the first of them is 0. The
    head, a good part of a small model, reads no prompt."""
    tokens = rollout.tokens[rows, : columns.stop]
    return token_logps(model(tokens, first=columns.start), tokens[:, columns], config.temperature)


def grpo(config: Config, run: "Run", tokenizer: Tokenizer) -> None:
    """Algorithm 1 of DeepSeekMath (Shao et al. 2024) with rules for the reward model; its line numbers at the right.
    Its two outer loops are one here: the reference is refreshed every so many steps of the same count."""
    model, reference = run.model, run.reference  # line 3: the reference is the base model
    forward = compiled(config, model)
    rows = config.prompts * config.group_size
    decoder = CapturedDecoder(model, rows, config.max_seq_len) if config.cuda_graphs else None
    bar = run.bar()
    for step in bar:
        started = time.perf_counter()
        problems, rollout, rewards = sample_rollout(config, run, tokenizer, step, decoder)  # lines 5-8
        advantages = group_advantages(rewards["reward"], config.group_size, VARIANTS[config.variant].scale)  # line 9
        advantages = advantages.to(config.device)
        # In bfloat16 sampler and trainer round differently: the ratio is then one of two passes of the trainer.
        has_ratio = VARIANTS[config.variant].ratio is not None
        trained = rows_with_gradient(config, advantages, torch.arange(len(advantages), device=config.device))
        old_logps = rollout_logps(config, forward, rollout, trained) if model.in_bfloat16 and has_ratio else None
        ref_logps = rollout_logps(config, reference, rollout, trained) if reference else None
        sampled = time.perf_counter()

        lr = learning_rate(config.lr, step, config.steps, warmup=5, decay_from=0.5)
        advice = f"{config.out}/base.pt is untouched; a lower --lr may help"
        updates = []
        for epoch in range(config.inner_epochs):  # line 10
            order = list(range(len(advantages)))
            stream(config.seed, "minibatches", step * config.inner_epochs + epoch).shuffle(order)
            for minibatch in torch.tensor(order, device=config.device).chunk(config.minibatches):
                sums = accumulate_gradient(config, forward, rollout, advantages, ref_logps, minibatch, old_logps)
                sums["grad_norm"] = optimizer_step(model, run.optimizer, lr, config.max_grad_norm).item()  # line 11
                sums["weight_norm"] = weight_norm(model)
                stop_if_not_finite("GRPO", step, sums, advice)
                updates.append(sums)
        if reference and config.reference_every and (step + 1) % config.reference_every == 0:
            reference.load_state_dict(model.state_dict())
        if config.curriculum and hardest_accuracy(rewards, problems) >= config.curriculum:
            run.top_level = min(run.top_level + 1, highest_level(config, tokenizer))

        record = {"phase": "grpo", "step": step + 1, **rollout_metrics(config, rollout, rewards, problems)}
        record |= update_metrics(updates) | {"lr": lr, "sample_seconds": sampled - started}
        record["update_seconds"] = time.perf_counter() - sampled
        shown = {name: f"{record[name]:.2f}" for name in ("accuracy", "format", "completion_tokens", "entropy")}
        bar.set_postfix(shown)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            record |= quick_look(config, run, tokenizer)
            shown["held_out_accuracy"] = f"{record['held_out_accuracy']:.2f}"
            bar.write(f"step {step + 1:4}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))
        run.log(record)
        run.end_step()


def complete(config: Config, model: Transformer, tokenizer: Tokenizer, problems: list[Problem], **how) -> Rollout:
    """Completions of the prompts of these problems; `how` is what `generate` takes beside them."""
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    return generate(model, prompts, max_new_tokens=config.max_new_tokens, eos_id=tokenizer.eos_id, **how)


def sample_rollout(
    config: Config, run: "Run", tokenizer: Tokenizer, step: int, decoder: CapturedDecoder | None
) -> tuple[list[Problem], Rollout, dict[str, Tensor]]:
    """The problems of a step, what the policy says to them, and the rewards of that. The model as it is now is the old
    policy of every update of the step."""
    levels = range(config.min_level, run.top_level + 1)
    problems = sample_problems(config, "problems", step, config.prompts, held_out=False, levels=levels)
    seed = stream(config.seed, "rollout", step).getrandbits(63)
    how = {"group_size": config.group_size, "temperature": config.temperature, "seed": seed, "decoder": decoder}
    rollout = complete(config, run.model, tokenizer, problems, **how)
    return problems, rollout, score(config, problems, decode_completions(rollout, tokenizer))


def rollout_metrics(
    config: Config, rollout: Rollout, rewards: dict[str, Tensor], problems: list[Problem]
) -> dict[str, float]:
    """What a rollout shows, over all of its rows."""
    groups, right = rewards["reward"].view(-1, config.group_size), rewards["accuracy"] == 1
    tokens = rollout.mask.sum(dim=1).float().cpu()
    metrics = {
        **{name: values.mean().item() for name, values in rewards.items()},
        **{f"{name}_std": values.std().item() for name, values in rewards.items()},  # over all rows, not by group
        "completion_tokens": tokens.mean().item(),
        "entropy": rollout.entropy.sum().item() / int(rollout.mask.sum()),
        "cut": 1 - rollout.finished.float().mean().item(),  # share of completions that met the limit
        "no_signal": (groups == groups[:, :1]).all(dim=1).float().mean().item(),  # share of groups of equal rewards
        "top_level": max(problem.level for problem in problems),
    }
    for name, rows in (("right", right), ("wrong", ~right)):
        metrics |= {f"{name}_tokens": tokens[rows].mean().item()} if rows.any() else {}
    asked = {problem.language for problem in problems}
    for language in sorted(asked) if len(config.task.languages) > 1 else ():
        rows = torch.tensor([problem.language == language for problem in problems]).repeat_interleave(config.group_size)
        metrics |= {f"{name}_{language}": rewards[name][rows].mean().item() for name in ("accuracy", "language")}
    return metrics


def hardest_accuracy(rewards: dict[str, Tensor], problems: list[Problem]) -> float:
    """Accuracy on the problems of the highest level in a rollout."""
    levels = torch.tensor([problem.level for problem in problems])
    return rewards["accuracy"].view(len(problems), -1)[levels == levels.max()].mean().item()


def highest_level(config: Config, tokenizer: Tokenizer) -> int:
    """The highest level whose prompt fits the context, whose thought fits a completion, and whose steps have an index
    each."""

    def fits(level: int) -> bool:
        prompt, document = encode_document(longest_document(level, config.task, checked=False), tokenizer)
        return len(document) - prompt <= config.max_new_tokens <= config.max_seq_len - prompt

    return max(filter(fits, range(config.max_level, MAX_STEP + 1)), default=config.max_level)


def update_metrics(updates: list[Counter]) -> dict[str, float]:
    """Means over the tokens, or the updates, of a step, from what `accumulate_gradient` summed. A step without any
    signal has no tokens, and so no means over them."""
    tokens = sum(sums["tokens"] for sums in updates)
    per_update = ("loss", "grad_norm", "weight_norm")
    apart = ("tokens", "logp_gap", *per_update)
    return {
        **{name: sum(sums[name] for sums in updates) / tokens for name in updates[0] if tokens and name not in apart},
        **{name: np.mean([sums[name] for sums in updates]) for name in per_update},
        "logp_gap": updates[0]["logp_gap"],  # before the first update sampler and trainer are one policy
    }


@torch.no_grad()
def rollout_logps(config: Config, model: Transformer, rollout: Rollout, rows: Tensor) -> Tensor:
    """Log-probabilities (B, T) under a model of the tokens of these rows of a rollout; in all other rows, and
    on tokens that were not sampled, they are the sampler's."""
    logps = rollout.logps.clone()
    for part, columns in micro_batches(config, rollout, rows):
        logps[part, columns] = completion_logps(config, model, rollout, part, columns) * rollout.mask[part, columns]
    return logps


# ------------------------------------------------------------------------------------------------------- evaluation

BEYOND = 4  # levels above the trained ones that are evaluated too


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right, from `right` among `samples` of them
    (Chen et al. 2021)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_is_right(answers: list[str | None], answer: str) -> bool:
    """Whether the answer given most often is right; no answer is no vote, and of equals the first given wins."""
    votes = Counter(given for given in answers if given is not None)
    return bool(votes) and votes.most_common(1)[0][0] == answer


def answer_problems(
    config: Config, model: Transformer, tokenizer: Tokenizer, problems: list[Problem], samples: int, temperature: float
) -> list[list[tuple[str, int]]]:
    """`samples` completions of each problem, as (text, sampled tokens)."""
    answers, part = [], 128  # problems at a time: what the cache takes is bounded
    for start in tqdm(range(0, len(problems), part), desc="answer", leave=False, dynamic_ncols=True, disable=None):
        seed = stream(config.seed, "evaluation noise", samples).getrandbits(63)  # the same for every model
        how = {"group_size": samples, "temperature": temperature, "seed": seed, "first_row": start * samples}
        rollout = complete(config, model, tokenizer, problems[start : start + part], **how)
        answers += zip(decode_completions(rollout, tokenizer), rollout.mask.sum(dim=1).tolist())
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def grade(problems: list[Problem], answers: list[list[tuple[str, int]]]) -> np.ndarray:
    """Accuracy of each completion, (problems, samples); its mean is pass@1."""
    return np.array([[accuracy_reward(text, p.answer) for text, _ in group] for p, group in zip(problems, answers)])


def thought_language(completion: str) -> str:
    """The language that the words of a thought are all in; "mixed" if they are not, "none" if there is hardly any."""
    shares = {language: language_consistency_reward(completion, language) for language in LANGUAGES}
    most = max(shares, key=shares.get)
    return most if shares[most] == 1 else "mixed" if shares[most] else "none"


def quick_look(config: Config, run: "Run", tokenizer: Tokenizer) -> dict[str, float]:
    """On a few held-out problems, the same at each look: pass@1, and how far the policy has gone from the base model,
    KL(policy, base) in nats a token."""
    problems = sample_problems(config, "quick look", 0, 128, held_out=True)
    seed = stream(config.seed, "evaluation noise", 4).getrandbits(63)
    rollout = complete(config, run.model, tokenizer, problems, group_size=4, seed=seed)
    texts = decode_completions(rollout, tokenizer)
    right = [accuracy_reward(text, problems[i // 4].answer) for i, text in enumerate(texts)]
    rows = torch.arange(len(texts), device=config.device)
    base_logps = rollout_logps(replace(config, temperature=1.0), run.base_model, rollout, rows)
    kl = (rollout.logps - base_logps).sum() / rollout.mask.sum()
    return {"held_out_accuracy": np.mean(right).item(), "base_kl": kl.item()}


def evaluate(config: Config, model: Transformer, tokenizer: Tokenizer) -> dict:
    """The metrics of a model on held-out problems of the trained levels, at temperature 1 but for "greedy". All are
    means over problems, which levels and languages share evenly. Two are apart: level 1, whose problems are steps of
    others, so that none is held out, and the levels "beyond" the trained ones."""
    problems = sample_problems(config, "evaluation", 0, config.eval_problems, held_out=True)
    n = config.eval_samples
    answers = answer_problems(config, model, tokenizer, problems, n, 1.0)
    correct = grade(problems, answers)  # (problems, n)
    texts = [text for group in answers for text, _ in group]
    thoughts = [match[1] for text in texts if (match := re.search("<think>(.*?)</think>", text, re.DOTALL))]
    thought_in = np.array([[thought_language(text) for text, _ in group] for group in answers])  # (problems, n)
    asked_in = np.array([problem.language for problem in problems])

    def pass_1_by(attribute: str) -> dict[str, float]:
        values = np.array([str(getattr(problem, attribute)) for problem in problems])
        return {str(value): correct[values == value].mean() for value in np.unique(values)}

    def pass_1_at(level: int) -> float:
        levels = range(level, level + 1)
        others = sample_problems(config, f"evaluation at level {level}", 0, 100, held_out=True, levels=levels)
        return grade(others, answer_problems(config, model, tokenizer, others, 4, 1.0)).mean()

    metrics = {
        "pass@1": correct.mean(),
        "pass@8": np.mean([pass_at_k(n, int(count), 8) for count in correct.sum(axis=1)]),
        "maj@8": np.mean(
            [
                majority_is_right([extract_answer(text) for text, _ in group[i : i + 8]], problem.answer)
                for problem, group in zip(problems, answers)
                for i in range(0, n - 7, 8)
            ]
        ),
        "greedy": grade(problems, answer_problems(config, model, tokenizer, problems, 1, 0.0)).mean(),
        "format": np.mean([format_reward(text) for text in texts]),
        "completion_tokens": np.mean([length for group in answers for _, length in group]),
        "think_tokens": np.mean([len(tokenizer.encode(thought)) for thought in thoughts]) if thoughts else 0.0,
        "by_level": pass_1_by("level"),
        "by_language": pass_1_by("language"),
        "thinks_in": {  # language of the question: language of the thought: share of completions
            asked: {name: (thought_in[asked_in == asked] == name).mean() for name in (*LANGUAGES, "mixed", "none")}
            for asked in config.task.languages
        },
        "apart": {str(level): pass_1_at(level) for level in range(config.min_level, 2)},
        "beyond": {str(config.max_level + i): pass_1_at(config.max_level + i) for i in range(1, BEYOND + 1)},
    }
    return json.loads(json.dumps(metrics))  # plain numbers in place of numpy's, which last.pt may not hold


# ---------------------------------------------------------------------------------------------- the run, its folder


class Run:
    """All of a run that changes while it goes on. `last.pt` holds it, so that a run which was stopped anywhere, any
    number of times, ends with the weights and the log of one that never was, to the bit. Randomness has no state (see
    `stream`), so there is none to keep."""

    def __init__(self, config: Config, model: Transformer, phase: str, program: str = "train.py"):
        self.config, self.model, self.folder = config, model, Path(config.out)
        self.program = program  # what made it, and must go on with it; as called from the folder of this file
        model.in_bfloat16 = config.in_bfloat16
        self.base: dict | None = None  # the base model's evaluation
        self.seconds = {"pretrain": 0.0, "grpo": 0.0, "evaluation": 0.0}
        self.log_bytes = 0
        self.saved_at = self.counted_at = time.perf_counter()
        self.stepping = self.stop_asked = False
        self.begin(phase)

    def begin(self, phase: str) -> None:
        """Start a phase, "pretrain" or "grpo", from the model as it is."""
        self.phase, self.step = phase, 0  # steps of it that are done
        self.steps = {"pretrain": self.config.pretrain_steps, "grpo": self.config.steps}[phase]
        self.top_level = self.config.max_level  # the curriculum may raise it
        self.optimizer = make_optimizer(self.model, weight_decay=0.1 if phase == "pretrain" else 0.0)
        self.base_model = copy.deepcopy(self.model) if phase == "grpo" else None
        self.reference = copy.deepcopy(self.model) if phase == "grpo" and self.config.beta > 0 else None
        self.recent = torch.zeros(2, LOG_EVERY, device=self.config.device)  # of pretraining: not yet in the log

    def state(self) -> dict:
        """Tensors and plain data; `load_model` can read a file of it too."""
        numbers = ("phase", "step", "top_level", "base", "seconds", "log_bytes")
        return {
            "config": asdict(self.model.config),
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "reference": self.reference and self.reference.state_dict(),
            "recent": self.recent,
            "settings": asdict(self.config),
            "made_by": made_by(self.config),
            "program": self.program,
            **{name: getattr(self, name) for name in numbers},
        }

    def load_state(self, saved: dict) -> None:
        """Raises whatever it meets where `saved` is not what `state` gives for a run of this configuration."""
        ranges = {"step": (0, self.steps), "top_level": (self.config.max_level, MAX_STEP), "log_bytes": (0, math.inf)}
        for name, (low, high) in ranges.items():
            if type(saved[name]) is not int or not low <= saved[name] <= high:
                raise ValueError(f"{name} is {saved[name]!r}")
            setattr(self, name, saved[name])
        self.seconds = {name: float(saved["seconds"][name]) for name in self.seconds}
        self.base = saved["base"]
        if self.base is not None:
            table(self.base, self.base)  # which the end of the run will need

        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        shapes = [{"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape} for weight in weights]
        moments = {i: {name: x.contiguous() for name, x in kept.items()} for i, kept in saved["optimizer"].items()}
        found = {i: {name: x.shape for name, x in kept.items()} for i, kept in moments.items()}
        if found != (dict(enumerate(shapes)) if self.step else {}):  # load_state_dict looks at no shape
            raise ValueError("the optimizer's state is not that of these weights")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.reference:
            self.reference.load_state_dict(saved["reference"])
        self.recent.copy_(saved["recent"])
        loaded = [self.recent, *(x for kept in moments.values() for x in kept.values())]
        if not all(x.isfinite().all() for x in (*loaded, *(self.reference.parameters() if self.reference else ()))):
            raise ValueError("it holds numbers that are NaN or infinite")

    def open(self) -> None:
        """Open the log for more lines, without those that came after the last save: they will come again. From here to
        `close`, signals wait for the end of a step. Raises ValueError where the log is in use, or not as it was."""
        self.log_file = (self.folder / "log.jsonl").open("r+b")
        try:
            if fcntl:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept until the file is closed
        except BlockingIOError:
            raise ValueError(f"{self.folder} is being written by another process: wait for it, or stop it") from None
        kept = self.log_file.read(self.log_bytes)
        if len(kept) < self.log_bytes or not (b"\n" + kept).endswith(b"\n"):
            raise ValueError(f"{self.folder}/log.jsonl has lost lines, or was changed, since last.pt was saved")
        self.log_file.truncate()
        self.saved = f"step {self.step} of {self.phase}"
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):  # of a line that did not fit the disk, which has been said
            self.log_file.close()

    def on_signal(self, number: int, frame: object) -> None:
        """The first SIGINT or SIGTERM lets a step end, so that it can be saved. A second one, or one between the
        phases, where all is saved, leaves at once."""
        if self.stop_asked or not self.stepping:
            raise KeyboardInterrupt(number)
        self.stop_asked = number
        with contextlib.suppress(OSError):  # whoever reads it may be gone; print may be at work right now
            os.write(2, b"\nstopping when this step is done (once more: at once)\n")

    def log(self, record: dict) -> None:
        """Add a line to log.jsonl."""
        readable = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in record.items()}
        self.log_file.write(json.dumps(readable).encode() + b"\n")
        self.log_file.flush()

    def bar(self) -> tqdm:
        """The steps of this phase that are still to do, as a progress bar."""
        self.stepping = self.step < self.steps
        look = {"desc": self.phase, "unit": "step", "dynamic_ncols": True, "disable": None}
        return tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, **look)

    def end_step(self) -> None:
        """What comes after each step: a save, where one is due, and the end, where a signal asked for it."""
        self.step += 1
        due = time.perf_counter() - self.saved_at > self.config.save_every
        if due or self.stop_asked or self.step == self.steps:
            self.save()
        self.stepping = self.step < self.steps
        if self.stop_asked:
            raise KeyboardInterrupt(self.stop_asked)

    def save(self) -> None:
        """Bring last.pt up to date, unless the weights are not finite: then it keeps the last that were. The log goes
        to disk first: last.pt speaks of no line that is not there."""
        norm = {"weight_norm": weight_norm(self.model)}
        stop_if_not_finite(self.phase, self.step - 1, norm, "last.pt is from before; a lower learning rate may help")
        self.count_seconds(self.phase)
        os.fsync(self.log_file.fileno())
        self.log_bytes = self.log_file.tell()
        save_tensors(self.folder / "last.pt", self.state())
        self.saved_at = time.perf_counter()
        self.saved = f"step {self.step} of {self.phase}"

    def count_seconds(self, part: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.seconds[part] += now - self.counted_at
        self.counted_at = now


def made_by(config: Config) -> str:
    """What decides the bits, beside the code, the configuration and the seed."""
    cuda = torch.device(config.device).type == "cuda"
    processor = torch.cuda.get_device_name(config.device) if cuda else torch.backends.cpu.get_cpu_capability()
    dtype = "bfloat16" if config.in_bfloat16 else "float32"
    return f"torch {torch.__version__} on {config.device} ({processor}) in {dtype}"


def parse_config(arguments: list[str]) -> tuple[Config, argparse.ArgumentParser]:
    """The configuration that the command line asks for: the preset's values, then the flags over them. Also the
    parser, whose error() ends the program with a line on what is wrong and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage=argparse.SUPPRESS,  # an error is then one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    choices = {"preset": list(PRESETS), "variant": list(VARIANTS), "kl": KL_TERMS, "dtype": ["float32", "bfloat16"]}
    for field in fields(Config):
        takes = {"type": (get_args(field.type) or [field.type])[0], "metavar": ""}  # float for "float | None"
        takes |= {"choices": choices[field.name]} if field.name in choices else {}
        help = f"{comments.get(field.name, '')} [{field.default!r}]".replace("%", "%%")
        kind = {"action": "store_true"} if field.type is bool else takes
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help, **kind)
    flags = vars(parser.parse_args(arguments))
    try:
        if "resume" in flags:
            config = saved_config(flags)
        else:
            flags = {"preset": "gpu" if torch.cuda.is_available() else "cpu"} | flags
            config = Config(**PRESETS[flags["preset"]] | flags)
    except ValueError as error:
        parser.error(str(error))
    if not config.out:
        config = replace(config, out=f"out/{config.preset}-{config.variant}-seed{config.seed}")
    if fault := find_fault(config):
        parser.error(fault)
    return config, parser


def saved_config(flags: dict) -> Config:
    """The configuration of the run to resume, in the folder where it is now. Raises ValueError where there is no such
    run, or where flags of another one came with --resume."""
    folder = Path(flags["resume"])
    if others := sorted(set(flags) - {"resume", "device"}):
        raise ValueError(f"--resume goes on with the settings of {folder}: leave --{others[0]} out")
    saved = load_tensors(folder / "last.pt")
    try:
        config = Config(**saved["settings"] | flags | {"out": str(folder)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/last.pt: not what a run saves ({one_line(error)})") from None
    for field in fields(Config):
        value = getattr(config, field.name)
        if type(value) not in (get_args(field.type) or [field.type]):
            raise ValueError(f"{folder}/last.pt: not what a run saves ({field.name} is {value!r})")
    return config


def find_fault(config: Config) -> str | None:
    """What is wrong with a configuration, and what to do about it, in a line; None if it can run."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if field.type is int and name not in ("seed", "reference_every") and value < 1:
            return f"--{name} must be at least 1"
        if isinstance(value, float) and not (value >= 0 and (value < math.inf or name.startswith("clip_"))):
            return f"--{name} must be a number of at least 0"
        if name in ("pretrain_lr", "lr", "max_grad_norm") and value == 0:
            return f"--{name} must be above 0"
    if not 0 <= config.seed < 2**63:
        return "--seed must be at least 0 and below 2**63"
    if config.reference_every < 0:
        return "--reference_every must be at least 0"
    if config.reference_every and not config.beta:
        return "--reference_every needs --beta: without a KL there is no reference"
    if config.kl != Config.kl and not config.beta:
        return f"--kl {config.kl} needs --beta: without it there is no KL"
    if VARIANTS[config.variant].ratio is None and config.minibatches * config.inner_epochs > 1:
        return f"--variant {config.variant} makes one update a rollout: add --minibatches 1 --inner_epochs 1"
    if VARIANTS[config.variant].clip_low is None and not (config.clip_low is None and config.clip_high is None):
        return f"--variant {config.variant} has no clip: leave --clip_low and --clip_high out"
    if not any(getattr(config, field.name) for field in fields(config) if field.name.endswith("_weight")):
        return "the weights of the rewards must not all be 0: nothing would be rewarded"
    if config.cuda_graphs and not config.device.startswith("cuda") and not config.resume:
        return f"--cuda_graphs needs a CUDA device, and --device is {config.device}"
    if not set(config.task.languages) <= set(LANGUAGES) or len(set(config.task.languages)) < len(config.task.languages):
        return f"--languages {config.languages} must be of {','.join(LANGUAGES)}, each at most once"
    if not {"+", "-"} <= set(config.operators) <= set(APPLY):
        return f"--operators {config.operators} must be of {''.join(APPLY)}, + and - among them"
    for language in config.task.languages:
        if not set(config.operators) <= set(LANGUAGES[language].operators):
            return f"--operators {config.operators}: data/languages.py has no word for one of them in {language}"
    if not 2 * MAX_OPERAND - 1 <= config.max_total <= MAX_NUMBER:  # or some total has no operation that stays within
        return f"--max_total must be at least {2 * MAX_OPERAND - 1} and at most {MAX_NUMBER}"
    if not 2 <= config.max_level <= MAX_STEP - BEYOND:
        return f"--max_level must be at least 2 and at most {MAX_STEP - BEYOND}: steps have {MAX_STEP} indices"
    if config.max_seq_len < SMALL_TEXT:
        return f"--max_seq_len must be at least {SMALL_TEXT}: the corpus's small texts are as long"
    if config.eval_problems < len(config.evaluated_levels) * len(config.task.languages):
        return "--eval_problems must be at least one for each level and language"
    if config.curriculum > 1:
        return "--curriculum must be at most 1: it is an accuracy"
    if config.threads > 1024:
        return "--threads must be at most 1024"
    if config.temperature < 0.001:
        return "--temperature must be at least 0.001: completions that are all the same teach nothing"
    if config.pretrain_tokens < config.max_seq_len:
        return f"--pretrain_tokens must be at least --max_seq_len {config.max_seq_len}, or a document may not fit"
    if config.group_size < 2:
        return "--group_size must be at least 2: an advantage is a completion measured against its group"
    if config.min_level > config.max_level:
        return f"--min_level {config.min_level} is above --max_level {config.max_level}"
    if config.eval_samples < 8:
        return "--eval_samples must be at least 8: pass@8 and maj@8 are made of 8"
    return None


def multiplies_in_bfloat16(device: str) -> bool:
    """Whether it does so in hardware; where that cannot be known, float32 is what always works."""
    there = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


def check_machine(config: Config) -> None:
    """Raise ValueError, in one line, for a device that is not there and a compiler that is not."""
    compiler = os.environ.get("CXX", "g++").split(" ")[0]
    if config.compile and not shutil.which(compiler):
        raise ValueError(f"--compile needs a C++ compiler, and there is no {compiler} here: leave --compile out")
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {config.device} cannot be used here ({reason}); --device cpu can") from None


def new_run(config: Config, tokenizer: Tokenizer, program: str) -> Run:
    """A run at its start, in a folder made for it. Raises ValueError, in one line, before anything is written."""
    vocabulary = {"vocab_size": tokenizer.vocab_size, "vocabulary": tokenizer.fingerprint}
    shape = {field.name: getattr(config, field.name) for field in fields(ModelConfig) if field.name not in vocabulary}
    asked = ModelConfig(**vocabulary, **shape)
    if config.init:
        model = load_policy(config.init, tokenizer, config.device)
        found = asdict(model.config)
        differing = [f"--{name} {found[name]}" for name in shape if found[name] != shape[name]]
        if differing:
            raise ValueError(f"{config.init} has another shape: add {' '.join(differing)}, or its --preset")
    else:
        model = Transformer(asked)
        model.init_weights(config.seed)
        model.to(config.device)
    _, document_ids = encode_document(longest_document(config.max_level, config.task), tokenizer)
    hardest = config.max_level + BEYOND
    prompt_tokens, _ = encode_document(longest_document(hardest, config.task), tokenizer)
    longest = {
        f"level {hardest} with --max_new_tokens": prompt_tokens + config.max_new_tokens,
        f"documents of --max_level {config.max_level}": len(document_ids),
    }
    for name, tokens in longest.items():
        if tokens > config.max_seq_len:
            raise ValueError(f"{name}: {tokens} tokens exceed the context of {config.max_seq_len} (--max_seq_len)")
    run, folder = Run(config, model, "grpo" if config.init else "pretrain", program), Path(config.out)
    if os.path.lexists(folder):
        resume = f", or go on with it: {shlex.join(['--resume', str(folder)])}" if (folder / "last.pt").exists() else ""
        raise ValueError(f"{folder} exists: name another folder with --out, or move that one away{resume}")
    run.folder = Path(f"{folder}.partial")  # renamed when all is there, so that no run is without last.pt
    try:
        shutil.rmtree(run.folder, ignore_errors=True)  # of a run that was killed right here
        (run.folder / "data").mkdir(parents=True)
        for source in SOURCES:
            shutil.copy(ROOT / source, run.folder / source)
        write_whole(run.folder / "config.json", (json.dumps(asdict(config), indent=2) + "\n").encode())
        if config.init:
            save_model(run.folder / "base.pt", model)
        (run.folder / "log.jsonl").touch()
        run.open()
        run.save()
        run.folder = run.folder.rename(folder)
    except BaseException as error:
        shutil.rmtree(run.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"--out {folder} cannot be made ({error.strerror}): name another folder") from None
        raise
    return run


def resumed_run(config: Config, tokenizer: Tokenizer, program: str) -> Run:
    """The run in a folder as it was when it was last saved. Raises ValueError, in one line, where it cannot go on to
    what it would have become."""
    folder, path = Path(config.out), Path(config.out) / "last.pt"
    if (folder / "result.json").exists():
        raise ValueError(f"{folder} has ended: what came of it is in result.json")
    if links := [path for path in folder.rglob("*") if path.is_symlink()]:
        raise ValueError(f"{links[0]} is a link, which could lead a run to write elsewhere: put a file in its place")
    for source in SOURCES:
        if not (folder / source).is_file() or (folder / source).read_bytes() != (ROOT / source).read_bytes():
            advice = f"to go on with this code all the same, cp {shlex.join([source, str(folder / source)])}"
            raise ValueError(f"{source} is not the {folder / source} that the run began with: {advice}")
    saved = load_tensors(path, config.device)
    if saved.get("program") != program:
        raise ValueError(
            f"{folder} was made by {saved.get('program')}, which must go on with it, and this is {program}"
        )
    model = load_policy(path, tokenizer, config.device)
    shape = {name: value for name, value in asdict(model.config).items() if hasattr(config, name)}
    try:
        if differing := [name for name, value in shape.items() if value != getattr(config, name)]:
            raise ValueError(f"a model of another {differing[0]}")
        run = Run(config, model, saved["phase"], program)
        run.load_state(saved)
    except Exception as error:  # a file from a stranger may hold anything
        raise ValueError(f"{path}: not what a run saves ({one_line(error)})") from None
    if run.phase == "grpo":
        run.base_model.load_state_dict(load_policy(folder / "base.pt", tokenizer, config.device).state_dict())
    run.open()
    print(f"{folder}: going on after step {run.step} of {run.phase}")
    if saved.get("made_by") != made_by(config):
        print(f"it was saved by {saved.get('made_by')}, and this is {made_by(config)}: not the same to the bit")
    return run


def write_samples(path: Path, config: Config, tokenizer: Tokenizer, models: dict[str, Transformer]) -> str:
    """What each model says to the same few held-out problems; returns the last of it, to be shown."""
    problems = sample_problems(config, "samples", 0, 4 * len(config.evaluated_levels), held_out=True)
    said = {name: answer_problems(config, model, tokenizer, problems, 1, 1.0) for name, model in models.items()}
    blocks = []
    for i, problem in enumerate(problems):
        lines = [problem.prompt.removesuffix("\nAssistant:")]
        for name, answers in said.items():
            ((text, _),) = answers[i]
            accuracy, in_format = accuracy_reward(text, problem.answer), format_reward(text)
            lines.append(f"[{name}: accuracy {accuracy:.0f}, format {in_format:.0f}] {text}")
        blocks.append("\n".join(lines))
    write_whole(path, ("\n\n".join(blocks) + "\n").encode())
    return blocks[-1]


def table(base: dict, r1_zero: dict) -> str:
    """The two evaluations side by side."""
    rows = [(name, base[name], r1_zero[name]) for name in ("pass@1", "pass@8", "maj@8", "greedy", "format")]
    for name in ("by_language", "apart"):
        for kind in base[name] if len(base["by_language"]) > 1 or name == "apart" else ():
            rows.append((f"pass@1, {'level ' * (name == 'apart')}{kind}", base[name][kind], r1_zero[name][kind]))
    for asked in base["thinks_in"] if len(base["thinks_in"]) > 1 else ():
        before, after = (metrics["thinks_in"][asked][asked] for metrics in (base, r1_zero))
        rows.append((f"asked in {asked}, thinks in it", before, after))
    for level in base["by_level"]:
        rows.append((f"pass@1, level {level}", base["by_level"][level], r1_zero["by_level"][level]))
    for level in base["beyond"]:
        rows.append((f"pass@1, level {level} (beyond)", base["beyond"][level], r1_zero["beyond"][level]))
    lines = [f"{name:28} {100 * before:8.1f} % {100 * after:8.1f} %" for name, before, after in rows]
    for name in ("completion_tokens", "think_tokens"):
        lines.append(f"{name:28} {base[name]:8.1f}   {r1_zero[name]:8.1f}")
    return "\n".join([f"{'held-out problems':28} {'base':>8}   {'R1-Zero':>8}", *lines])


def set_up(config: Config) -> None:
    """What a process sets once, before it computes anything."""
    torch.set_num_threads(config.threads)
    # On a CPU this costs nothing. It replaces one kernel, the compiled gradient of the embedding, in which threads add
    # to the same sums in whatever order they come.
    torch.use_deterministic_algorithms(config.deterministic or config.device.startswith("cpu"))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and here nearly every shape is new
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or matrix products on a GPU refuse


def main(arguments: list[str], program: str = "train.py") -> None:
    """The command line; `program` is the script, and what comes before the flags, where that is another one."""
    config, parser = parse_config(arguments)
    set_up(config)
    tokenizer = get_tokenizer()
    try:
        check_machine(config)
        if config.dtype == "bfloat16" and not config.in_bfloat16:
            print(f"{config.device} has no fast bfloat16: matrix products will be in float32")
        run = (resumed_run if config.resume else new_run)(config, tokenizer, program)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    device = ["--device", config.device] if config.resume and "--device" in arguments else []
    resume = f"python {os.path.relpath(ROOT / program)} {shlex.join(['--resume', str(run.folder), *device])}"
    try:
        whole_job(config, run, tokenizer)
    except KeyboardInterrupt as stop:
        for number in run.handlers:
            signal.signal(number, signal.SIG_IGN)  # once more says nothing more
        print(f"\nstopped; {run.saved} is saved. To go on: {resume}", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except torch.OutOfMemoryError:
        advice = "run again with a lower --micro_batch or --prompts"
        sys.exit(f"train.py: {config.device} has too little memory: {advice}. {run.saved} is saved. To go on: {resume}")
    except BrokenPipeError:
        sys.exit(f"train.py: what it prints is not read any more. {run.saved} is saved. To go on: {resume}")
    except OSError as error:
        reason = f"{run.folder} cannot be written ({error.strerror})"
        sys.exit(f"train.py: {reason}. {run.saved} is saved. To go on, once it can: {resume}")
    finally:
        run.close()


def whole_job(config: Config, run: Run, tokenizer: Tokenizer) -> None:
    """Base model, evaluation, GRPO, evaluation: from wherever the run stands."""
    weights = sum(weight.numel() for weight in run.model.parameters())
    print(f"{run.folder}: {weights:,} weights on {config.device}, levels {config.min_level} to {config.max_level}")
    print(f"objective: {config.variant} ({VARIANTS[config.variant].source})")
    if run.phase == "pretrain":
        pretrain(config, run, tokenizer)
        save_model(run.folder / "base.pt", run.model)
        run.count_seconds("pretrain")
        run.begin("grpo")
        run.save()
    if run.base is None:
        run.base = evaluate(config, run.base_model, tokenizer)
        run.count_seconds("evaluation")
        run.save()
    base = run.base
    print(f"base model: pass@1 {base['pass@1']:.3f}, format {base['format']:.3f}; now GRPO, by rules alone")
    grpo(config, run, tokenizer)
    save_model(run.folder / "r1_zero.pt", run.model)
    run.save()
    r1_zero = evaluate(config, run.model, tokenizer)
    run.count_seconds("evaluation")

    shown = write_samples(run.folder / "samples.txt", config, tokenizer, {"base": run.base_model, "R1-Zero": run.model})
    seconds = {"pretrain": run.seconds["pretrain"], "grpo": run.seconds["grpo"], "total": sum(run.seconds.values())}
    result = {"device": config.device, "seed": config.seed, "seconds": seconds, "base": base, "r1_zero": r1_zero}
    write_whole(run.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    print(f"\n{shown}\n\n{table(base, r1_zero)}\n")
    print(
        f"pretraining {seconds['pretrain']:.0f} s, GRPO {seconds['grpo']:.0f} s, "
        f"with both evaluations {seconds['total']:.0f} s -> {run.folder}/"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")
