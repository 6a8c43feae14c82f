"""Sampling: G completions for each prompt, with a key/value cache; and the command to talk to a
model.

    python sample.py "make 7 from 4 3 6"       # the newest run thinks and answers
    python sample.py "make 7 from 4 3 6" -n 8  # a group of 8, with its rewards and advantages
    python sample.py "7 더하기 8 빼기 3"          # in Korean, for a model of --task chains-en-ko
    python sample.py                           # asks for problems

B rows, G of them for each of P prompts; T token positions; V vocabulary.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin are slow here

import numpy as np
import torch
from torch import Tensor

from data import TASKS, get_tokenizer
from data.problem import Problem
from data.tokenizer import Tokenizer
from grpo import VARIANTS, group_advantages
from model import KVCache, Transformer, load_model
from rewards import RULES, extract_answer, rule_weights

LOOK_EVERY = 4  # tokens between two looks at which rows have finished
MOST_COMPLETIONS = 4096  # that the command samples at once
WORTH_COMPACTING = 0.9  # drop finished rows once fewer than this share run: it copies the cache


@dataclass
class Rollout:
    """B rows, prompt and completion side by side from position 0, right-padded to T tokens."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool: True on sampled tokens, the end-of-sequence token included
    logps: Tensor  # (B, T) float32: log-probability of each sampled token, 0 elsewhere
    entropy: Tensor  # (B, T) float32: of the distribution it was drawn from, in nats, 0 elsewhere
    finished: Tensor  # (B,) bool: True where the row ended by itself, False where it was cut

    @cached_property
    def starts(self) -> np.ndarray:
        """The position of each row's first sampled token, (B,), on the host."""
        return self.mask.int().argmax(dim=1).cpu().numpy()

    @cached_property
    def ends(self) -> np.ndarray:
        """The position after each row's last sampled token, (B,), on the host."""
        return self.starts + self.mask.sum(dim=1).cpu().numpy()


def empty_rollout(B: int, T: int, eos_id: int, device: torch.device) -> Rollout:
    """B rows of T end-of-sequence tokens, none of them sampled."""
    logps, entropy = torch.zeros((2, B, T), device=device)
    mask = torch.zeros((B, T), dtype=torch.bool, device=device)
    tokens = torch.full((B, T), eos_id, device=device)
    return Rollout(tokens, mask, logps, entropy, finished=mask.any(dim=1))


def new_cache(model: Transformer, rows: int, positions: int) -> KVCache:
    """An empty cache, in the type in which the model multiplies."""
    weight = model.embedding.weight
    like = weight[:0].bfloat16() if model.in_bfloat16 else weight
    return KVCache(model.config, rows, positions, like)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), on int64 that wraps: each bit of x stirs
    every bit."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Noise in [0, 1), float32, that depends on (seed, row, position) alone, for rows and positions
    that broadcast. It is computed, not drawn, so a row's noise stays the same when other rows
    finish, or when the batch is cut in another way."""
    bits = mix(mix(mix(torch.full_like(rows, seed)) + rows) + positions)
    return (bits >> 40 & (1 << 24) - 1) * 2.0**-24


def sample_tokens(
    logits: Tensor, noise: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (B, V) and noise (B,) into tokens, their log-probabilities and the entropy of the
    distribution they were drawn from, (B,) each, by inverting the cumulative distribution.

    Temperature 0 takes the likeliest token; log-probability and entropy are then at temperature 1.
    """
    logps = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    probabilities = logps.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)  # 0 for an impossible token
    if temperature == 0:
        tokens = logps.argmax(dim=-1)
    else:
        # Sum whole numbers: a GPU's float sums differ from one run to the next by their order.
        cumulative = (probabilities * 2.0**38).long().cumsum(dim=-1)
        # Scale the noise by the last sum, which rounding keeps from being 2^38: then noise below 1
        # always falls on a possible token.
        target = (noise[:, None] * 2.0**24).long() * cumulative[:, -1:] >> 24
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # of NaN: in bounds until it is found out
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1), entropy


def draw(
    rollout: Rollout,
    noise: Tensor,
    rows: Tensor,
    positions: Tensor,
    logits: Tensor,
    temperature: float,
    eos_id: int,
) -> Tensor:
    """Sample the next token of `rows` (N,) of the rollout from logits (N, V), with the noise (B, T)
    at `positions` (N,). Write it down in the rows that still run. Returns the tokens (N,)."""
    sampled, logps, entropy = sample_tokens(logits, noise[rows, positions], temperature)
    running = ~rollout.finished[rows]
    rollout.tokens[rows, positions] = torch.where(running, sampled, eos_id)
    rollout.mask[rows, positions] = running
    rollout.logps[rows, positions] = torch.where(running, logps.float(), 0.0)
    rollout.entropy[rows, positions] = torch.where(running, entropy.float(), 0.0)
    rollout.finished[rows] |= sampled == eos_id
    return sampled


@dataclass
class Generation:
    """A rollout under way, and what each of its steps needs."""

    model: Transformer
    cache: KVCache
    rollout: Rollout
    noise: Tensor  # (B, T)
    temperature: float
    eos_id: int

    def draw(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Sample the next token of these rows (N,), which are the rows of the cache."""
        how = (self.temperature, self.eos_id)
        return draw(self.rollout, self.noise, rows, self.cache.lengths, logits, *how)


def prefill(generation: Generation, prompts: list[list[int]]) -> Tensor:
    """Read the prompts into the cache, each once for all G of its rows, and sample the first token
    of every row. Returns these tokens (B,)."""
    cache, rollout, eos_id = generation.cache, generation.rollout, generation.eos_id
    device, P, B = rollout.tokens.device, len(prompts), len(rollout.tokens)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = [prompt + [eos_id] * (longest - len(prompt)) for prompt in prompts]
    padded = torch.tensor(padded, device=device)  # (P, longest)
    cache.lengths = torch.zeros_like(lengths)  # P rows, until each is copied G times
    logits = generation.model(padded, cache, first=shortest - 1)  # (P, longest - shortest + 1, V)
    logits = logits[torch.arange(P, device=device), lengths - shortest]  # (P, V)
    cache.lengths = lengths  # the next token overwrites the padding
    group = torch.arange(P, device=device).repeat_interleave(B // P)
    cache.select(group)
    rollout.tokens[:, :longest] = padded[group]
    return generation.draw(torch.arange(B, device=device), logits[group])


def decode(generation: Generation, sampled: Tensor, steps: int) -> None:
    """Continue a rollout (B, T), whose last tokens are `sampled` (B,), by up to `steps` tokens, in
    place."""
    cache, rollout = generation.cache, generation.rollout
    rows = torch.arange(len(sampled), device=sampled.device)  # the rows still in the batch
    for step in range(1, steps + 1):
        # Finished rows ride along until they are dropped: a look at every token would stall a GPU.
        if step % LOOK_EVERY == 0:
            kept = (~rollout.finished[rows]).nonzero().squeeze(1)
            if len(kept) == 0:
                break
            if len(kept) < WORTH_COMPACTING * len(rows):
                rows, sampled = rows[kept], sampled[kept]
                cache.select(kept)
        logits = generation.model(sampled[:, None], cache)[:, 0]
        sampled = generation.draw(rows, logits)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_id: int,
    seed: int = 0,
    first_row: int = 0,
    new_cache: Callable = new_cache,
    decode: Callable = decode,
) -> Rollout:
    """Sample `group_size` completions of each of P prompts: B = P * group_size rows, the G
    completions of one prompt adjacent.

    `first_row` is the number of this call's first row, where a large batch is sampled in parts: the
    parts then hold what the whole would have held. `new_cache` and `decode` stand for the functions
    of that name above; kit/captured.py has others. Raises ValueError for an empty prompt, and for a
    prompt that does not fit the model's context together with `max_new_tokens`; FloatingPointError
    for a model whose logits are NaN.
    """
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    if longest + max_new_tokens > limit:
        tokens = f"a prompt of {longest} tokens and {max_new_tokens} new ones"
        raise ValueError(f"{tokens} exceed the context of {limit}")
    B, T = len(prompts) * group_size, longest + max_new_tokens
    device = model.embedding.weight.device
    cache, rollout = new_cache(model, B, T), empty_rollout(B, T, eos_id, device)
    rows, positions = torch.arange(B, device=device), torch.arange(T, device=device)
    noise = uniform(seed, first_row + rows[:, None], positions)  # (B, T)
    generation = Generation(model, cache, rollout, noise, temperature, eos_id)
    sampled = prefill(generation, prompts)
    decode(generation, sampled, max_new_tokens - 1)
    if rollout.logps.isnan().any():  # once a rollout: at each token a GPU would be waited for
        raise FloatingPointError("the model's logits are NaN: a lower learning rate may help")
    width = int(rollout.mask.any(dim=0).nonzero().max()) + 1
    wide = (rollout.tokens, rollout.mask, rollout.logps, rollout.entropy)
    return Rollout(*(x[:, :width] for x in wide), rollout.finished)


def complete(
    model: Transformer, problems: list[Problem], generate: Callable = generate, **how
) -> Rollout:
    """Completions of the prompts of these problems; `how` is what `generate` takes beside them."""
    tokenizer = tokenizer_of(model)
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    return generate(model, prompts, eos_id=tokenizer.eos_id, **how)


def tokenizer_of(model: Transformer) -> Tokenizer:
    """The words that a model has learned: those of its task."""
    return get_tokenizer(model.config.task)


def decode_completions(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The text of each row after its prompt, without the end-of-sequence token."""
    ends = rollout.ends - rollout.finished.cpu().numpy()
    rows = zip(rollout.tokens.tolist(), rollout.starts, ends)
    return [tokenizer.decode(tokens[start:end]) for tokens, start, end in rows]


# -------------------------------------------------------------------------------------- the command


def load_policy(path: str | Path, device: str = "cpu") -> Transformer:
    """A model that speaks the words of its task. Raises ValueError, in one line, for any other
    file."""
    model = load_model(path, device)
    if model.config.task not in TASKS:
        raise ValueError(f'{path} is a model of the task "{model.config.task}", which is not here')
    tokenizer = tokenizer_of(model)
    found = (model.config.vocab_size, model.config.vocabulary)
    if found != (tokenizer.vocab_size, tokenizer.fingerprint):
        raise ValueError(f"{path} learned other words than data/ has for {model.config.task}")
    return model


def newest_checkpoint(runs: Path) -> Path:
    """The model of the run that was trained last. Raises ValueError where there is none."""
    found = sorted(runs.glob("*/r1_zero.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        bases = sorted(runs.glob("*/base.pt"), key=lambda path: path.stat().st_mtime)
        advice = f" --checkpoint {bases[-1]}" if bases else " a model with --checkpoint"
        advice = f"run `python train.py` to its end, or name{advice}"
        raise ValueError(f"no trained model in {runs}/: {advice}")
    return found[-1]


class Talk:
    """A model, and what is known of the run that trained it: its levels and rewards."""

    def __init__(self, path: Path):
        self.path, self.model = path, load_policy(path)
        self.task = TASKS[self.model.config.task]
        settings = path.parent / "config.json"
        settings = json.loads(settings.read_text()) if settings.is_file() else {}
        least, most = self.task.levels
        self.levels = settings.get("min_level", least), settings.get("max_level", most)
        self.rewards = settings.get("rewards", "accuracy=1,format=1")
        self.variant = settings.get("variant", "grpo")
        self.program = settings.get("program", "train.py")

    def introduce(self) -> str:
        levels = f"levels {self.levels[0]} to {self.levels[1]}"
        return f"{self.path}: it learned {self.task.name}, {levels}, such as {self.task.example}"

    def ask(self, problem: Problem, n: int, temperature: float, seed: int) -> None:
        """Print what the model says to a problem, and what the rules say to its completions."""
        least, most = self.levels
        if outside := self.task.outside(problem, range(least, most + 1)):
            print(f"(outside of what it learned: {outside})")
        tokenizer = tokenizer_of(self.model)
        room = self.model.config.max_seq_len - len(tokenizer.encode(problem.prompt))
        how = {"max_new_tokens": max(1, room), "temperature": temperature, "seed": seed}
        rollout = complete(self.model, [problem], group_size=n, **how)
        completions = decode_completions(rollout, tokenizer)
        print(problem.prompt, end="")
        if n == 1:
            print(f"{completions[0]}\n\n{self.verdict(problem, completions[0])}")
        else:
            self.print_group(problem, completions)

    def verdict(self, problem: Problem, completion: str) -> str:
        given = extract_answer(completion)
        right = problem.is_right(given or "")
        if right is None:
            measures = self.task.measures(problem, completion).items()
            told = [f"{name} {value:.3g}" for name, value in measures if value]
            return f"no rule says whether this is right; {', '.join(told) or 'measures are all 0'}"
        if given is None:
            return "no answer that the rules can read"
        return f"{given} is right" if right else f"{given} is wrong: {problem.answer} is right"

    def print_group(self, problem: Problem, completions: list[str]) -> None:
        """Each completion with its rewards and its advantage, by the rules of its training. Where
        there is no rule, with its verdict."""
        if problem.is_right("") is None:
            for completion in completions:
                print(f"\n--- {self.verdict(problem, completion)}\n{completion}")
            return
        if self.variant not in VARIANTS:
            raise ValueError(f"its advantages were of a variant {self.variant}, which is not here")
        weights, scale = rule_weights(self.rewards), VARIANTS[self.variant].scale
        scores = {name: [RULES[name](text, problem) for text in completions] for name in weights}
        rewards = sum(weight * torch.tensor(scores[name]) for name, weight in weights.items())
        advantages = group_advantages(rewards, len(completions), scale).tolist()
        for i, completion in enumerate(completions):
            shown = "  ".join(f"{name} {values[i]:g}" for name, values in scores.items())
            print(f"\n--- {shown}  advantage {advantages[i]:+.2f}\n{completion}")
        print(f"\nrewarded for {self.rewards}; a right answer is {problem.answer}")
        if self.program != "train.py":
            print(f"(trained by {self.program}, whose rewards and advantages may be its own)")


def check_flags(flags: argparse.Namespace) -> None:
    """Raise ValueError, in one line, for a number that cannot be."""
    if not 1 <= flags.n <= MOST_COMPLETIONS:
        raise ValueError(f"-n must be from 1 to {MOST_COMPLETIONS}")
    if flags.temperature != 0 and not 0.001 <= flags.temperature < math.inf:
        raise ValueError("--temperature must be 0 or at least 0.001")
    if flags.seed is not None and not 0 <= flags.seed < 2**63:
        raise ValueError("--seed must be at least 0 and below 2**63")


def converse(talk: Talk, flags: argparse.Namespace) -> None:
    """Answer the problems that a person types, until an empty line, "quit", Ctrl-D or Ctrl-C. Each
    answer has its own noise, unless --seed says which."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and a history, where there are any
    print(f"{talk.introduce()}\nAsk for one, or quit.")
    for count in itertools.count():
        try:
            line = input("\n> ").strip()
            if line in ("", "quit", "exit"):
                return
            seed = count if flags.seed is None else flags.seed
            talk.ask(talk.task.parse(line), flags.n, flags.temperature, seed)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except (ValueError, FloatingPointError) as error:
            print(error)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        usage=argparse.SUPPRESS,  # an error is then one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "problem",
        nargs="*",
        help="such as 'make 7 from 4 3 6'; without one, problems are asked for",
    )
    add("--checkpoint", type=Path, help="a model file [the newest out/*/r1_zero.pt]")
    add("-n", type=int, default=1, help="completions to sample [1]")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token [1.0]")
    add(
        "--seed",
        type=int,
        help="another seed, other completions [0; in a talk, a new one each time]",
    )
    flags = parser.parse_args(arguments)
    try:
        check_flags(flags)
        talk = Talk(flags.checkpoint or newest_checkpoint(Path("out")))
        if flags.problem:
            print(talk.introduce())
            problem = talk.task.parse(" ".join(flags.problem))
            talk.ask(problem, flags.n, flags.temperature, flags.seed or 0)
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    if not flags.problem:
        converse(talk, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
