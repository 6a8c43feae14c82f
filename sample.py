"""Sampling: G completions for each prompt, with a key/value cache; and the command that talks to a checkpoint.

    python sample.py "7 + 8 - 3"          # the newest run thinks and answers
    python sample.py "7 + 8 - 3" -n 8     # a group of 8, with R1-Zero's rewards and GRPO's advantages
    python sample.py "7 더하기 8 빼기 3"     # in Korean, for a model that was trained with --languages en,ko
    python sample.py                      # asks for problems

B rows, G of them for each of P prompts; T token positions; V vocabulary.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow small products down

import torch
from torch import Tensor

from data.arithmetic import Problem, parse_problem
from data.languages import language_of
from data.tokenizer import Tokenizer, get_tokenizer
from grpo import group_advantages
from model import KVCache, Transformer, load_model
from rewards import accuracy_reward, extract_answer, format_reward

LOOK_EVERY = 4  # tokens between two looks at which rows have finished
WORTH_COMPACTING = 0.9  # share of rows still running below which the others are dropped: it copies the cache
CAPTURED_LOOK_EVERY = 16  # the first for a CapturedDecoder, whose steps are so short that a look costs several
FEWEST_ROWS = 64  # a CapturedDecoder has no graphs for fewer: they would take as long
FILLED_EVERY = 32  # positions by which its graphs differ


@dataclass
class Rollout:
    """B rows, prompt and completion side by side from position 0, right-padded to T tokens."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool: True exactly on sampled tokens, the end-of-sequence token included
    logps: Tensor  # (B, T) float32: log-probability of each sampled token as it was sampled, 0 elsewhere
    entropy: Tensor  # (B, T) float32: of the distribution that each sampled token was drawn from, in nats, 0 elsewhere
    finished: Tensor  # (B,) bool: True where the row ended by itself, False where it was cut


def empty_rollout(B: int, T: int, eos_id: int, device: torch.device) -> Rollout:
    """B rows of T end-of-sequence tokens, of which none was sampled."""
    logps, entropy = torch.zeros((2, B, T), device=device)
    mask = torch.zeros((B, T), dtype=torch.bool, device=device)
    return Rollout(torch.full((B, T), eos_id, device=device), mask, logps, entropy, finished=mask.any(dim=1))


def new_cache(model: Transformer, rows: int, positions: int) -> KVCache:
    """An empty cache, in the type in which the model multiplies."""
    weight = model.embedding.weight
    return KVCache(model.config, rows, positions, like=weight[:0].bfloat16() if model.in_bfloat16 else weight)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), on int64 that wraps: each bit of x stirs every bit."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Noise in [0, 1), float32, that depends on (seed, row, position) alone, for rows and positions that broadcast: it
    is computed, not drawn, so no row's noise changes when other rows finish, or when the batch is cut otherwise."""
    bits = mix(mix(mix(torch.full_like(rows, seed)) + rows) + positions)
    return (bits >> 40 & (1 << 24) - 1) * 2.0**-24


def sample_tokens(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (B, V) and noise (B,) into tokens, their log-probabilities and the entropy of what they were drawn
    from, (B,) each, by inverting the cumulative distribution. Temperature 0 takes the likeliest token; the other two
    are then those of temperature 1."""
    logps = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    probabilities = logps.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)  # 0 for what is impossible
    if temperature == 0:
        tokens = logps.argmax(dim=-1)
    else:
        # In whole numbers, whose sums do not depend on their order: float sums on a GPU do, from one run to the next.
        cumulative = (probabilities * 2.0**38).long().cumsum(dim=-1)
        # Of the last sum, which rounding keeps from being 2^38, noise below 1 always falls on a possible token.
        target = (noise[:, None] * 2.0**24).long() * cumulative[:, -1:] >> 24
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1), entropy


def draw(
    rollout: Rollout, noise: Tensor, rows: Tensor, positions: Tensor, logits: Tensor, temperature: float, eos_id: int
) -> Tensor:
    """Sample what follows in `rows` (N,) of the rollout from logits (N, V), with the noise (B, T) at `positions` (N,),
    write it down there in those that have not finished, and return the tokens (N,)."""
    sampled, logps, entropy = sample_tokens(logits, noise[rows, positions], temperature)
    running = ~rollout.finished[rows]
    rollout.tokens[rows, positions] = torch.where(running, sampled, eos_id)
    rollout.mask[rows, positions] = running
    rollout.logps[rows, positions] = torch.where(running, logps.float(), 0.0)
    rollout.entropy[rows, positions] = torch.where(running, entropy.float(), 0.0)
    rollout.finished[rows] |= sampled == eos_id
    return sampled


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
    decoder: "CapturedDecoder | None" = None,
) -> Rollout:
    """Sample `group_size` completions of each of P prompts: B = P * group_size rows, those of one prompt adjacent.

    `first_row` is the number of this call's first row, where a large batch is sampled in parts: the parts then hold
    what the whole would have held. A `decoder` made for this model takes the steps after the first token; what comes
    out is the same. Raises ValueError for an empty prompt, for a prompt that does not fit the model's context together
    with `max_new_tokens`, and for a decoder that is too small or another model's.
    """
    longest = max(map(len, prompts))
    limit = model.config.max_seq_len
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    if longest + max_new_tokens > limit:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {limit}")

    P, B, T = len(prompts), len(prompts) * group_size, longest + max_new_tokens
    if decoder is None:
        cache = new_cache(model, B, T)
    else:
        decoder.check(model, B, T)
        cache = decoder.cache.first(B, 0)

    # Prefill: each prompt goes through the model once, and its G completions start from copies of its cache.
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [eos_id] * (longest - len(prompt)) for prompt in prompts], device=device)
    cache.lengths = torch.zeros_like(lengths)  # of P rows, until each is copied G times
    shortest = min(map(len, prompts))
    logits = model(padded, cache, first=shortest - 1)[torch.arange(P, device=device), lengths - shortest]  # (P, V)
    cache.lengths = lengths
    group = torch.arange(P, device=device).repeat_interleave(group_size)
    cache.select(group)
    logits = logits[group]

    rollout = empty_rollout(B, T, eos_id, device)
    rollout.tokens[:, :longest] = padded[group]
    noise = uniform(seed, first_row + torch.arange(B, device=device)[:, None], torch.arange(T, device=device))

    rows = torch.arange(B, device=device)  # the rows still in the batch
    sampled = draw(rollout, noise, rows, cache.lengths, logits, temperature, eos_id)
    if decoder is not None:
        decoder.decode(rollout, noise, cache, sampled, max_new_tokens - 1, temperature, eos_id)
        max_new_tokens = 1
    for step in range(1, max_new_tokens):
        # Finished rows ride along until they are dropped; to look at each token would stall a GPU at each token.
        if step % LOOK_EVERY == 0:
            kept = (~rollout.finished[rows]).nonzero().squeeze(1)
            if len(kept) == 0:
                break
            if len(kept) < WORTH_COMPACTING * len(rows):
                rows, sampled = rows[kept], sampled[kept]
                cache.select(kept)
        logits = model(sampled[:, None], cache)[:, 0]
        sampled = draw(rollout, noise, rows, cache.lengths, logits, temperature, eos_id)

    width = int(rollout.mask.any(dim=0).nonzero().max()) + 1
    *wide, finished = vars(rollout).values()
    return Rollout(*(x[:, :width] for x in wide), finished)


def corner(x: Tensor, like: Tensor) -> Tensor:
    """The first entries of x along each dimension, as many as `like` has; in the memory of x."""
    return x[tuple(map(slice, like.shape))]


class CapturedDecoder:
    """The steps of `generate` after the first token, each replayed on a GPU as one CUDA graph: a hundred small kernels
    for one launch. Elsewhere the same step runs as it is.

    A graph reads and writes fixed addresses and takes no arguments. So all that a step needs lies in tensors that live
    as long as the decoder, and what the host knows of a step (how many rows, how many positions) is in the key of the
    graph, rounded up so that there are few. The weights too are found where they were: a decoder follows those that
    are changed in place, by an optimizer or by `load_state_dict`, and no others.
    """

    def __init__(self, model: Transformer, rows: int, positions: int):
        self.model, self.device, self.positions = model, model.embedding.weight.device, positions
        self.cache = new_cache(model, rows, positions)
        self.rollout = empty_rollout(rows, positions, 0, self.device)
        self.noise = torch.zeros((rows, positions), device=self.device)
        self.rows = torch.arange(rows, device=self.device)  # the row of the rollout that each row of the cache is
        self.current = torch.zeros_like(self.rows)  # the last token of each
        self.sizes = [rows]  # of the batches that have graphs; a batch between two is filled up with finished rows
        while self.sizes[-1] >= 2 * FEWEST_ROWS:
            self.sizes.append((self.sizes[-1] + 1) // 2)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # capture is not allowed on the default one
            self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: nothing in it outlives a step

    def check(self, model: Transformer, rows: int, positions: int) -> None:
        if model is not self.model:
            raise ValueError("the decoder is another model's")
        if rows > self.sizes[0] or positions > self.positions:
            limits = f"{self.sizes[0]} rows of {self.positions} positions"
            raise ValueError(f"{rows} rows of {positions} positions do not fit a decoder for {limits}")

    def decode(
        self, rollout: Rollout, noise: Tensor, cache: KVCache, sampled: Tensor, steps: int, *constants: float
    ) -> None:
        """Continue a rollout (B, T), whose last tokens are `sampled` (B,), by up to `steps` tokens, in place. The
        constants are temperature and eos_id, of which a graph holds the values."""
        self.rollout.finished.fill_(True)  # rows that this rollout does not have; what they write is never read
        self.cache.lengths.zero_()
        self.rows.copy_(torch.arange(len(self.rows), device=self.device))
        results = list(zip(vars(self.rollout).values(), vars(rollout).values()))
        given_too = (self.cache.lengths, cache.lengths), (self.noise, noise), (self.current, sampled)
        for mine, given in (*results, *given_too):
            corner(mine, given).copy_(given)
        size = self.sizes[0]
        for step in range(steps):
            filled = cache.filled + step
            if step % CAPTURED_LOOK_EVERY == 0:
                size = self.compact(size, filled)
                if size == 0:
                    break
            filled = math.ceil((filled + 1) / FILLED_EVERY) * FILLED_EVERY
            self.replay(size, min(filled, self.positions), *constants)
        for mine, given in results:
            given.copy_(corner(mine, given))

    def compact(self, size: int, filled: int) -> int:
        """The size of the smallest batch that holds the rows that still run, 0 if none does; where it is below `size`,
        they move to the front, and finished rows after them."""
        finished = self.rollout.finished[self.rows[:size]]
        running = size - int(finished.sum())  # the one wait for the GPU
        fitting = min(each for each in self.sizes if each >= running) if running else 0
        if 0 < fitting < size:
            order = finished.int().argsort(stable=True)[:fitting]
            kept = self.cache.first(size, filled)
            kept.select(order)  # in the memory of the cache, but for the lengths
            self.cache.lengths[:fitting] = kept.lengths
            for x in (self.rows, self.current):
                x[:fitting] = x[order]  # indexing copies first: no row is overwritten before it is read
        return fitting

    def step(self, size: int, filled: int, temperature: float, eos_id: int) -> None:
        """One token more for the first rows, none of which then holds more than `filled` positions. What is captured:
        nothing here may wait for the GPU, or come from the host and differ from step to step."""
        cache = self.cache.first(size, filled - 1)  # the model adds the position that it fills
        # Autocast keeps the weights it has cast. From a cache filled before the capture, a graph would go on reading
        # weights of then; without one, the casts are part of the graph and are made anew at each replay.
        with torch.autocast(self.device.type, enabled=False, cache_enabled=False):
            logits = self.model(self.current[:size, None], cache)[:, 0]
        rows = self.rows[:size]
        self.current[:size] = draw(self.rollout, self.noise, rows, cache.lengths, logits, temperature, eos_id)

    def replay(self, *key) -> None:
        """A step, from its graph where there is one. The first with a key runs as it is, on a stream of its own: that
        is the warm-up which a capture needs. To capture it then records kernels and runs none."""
        if self.device.type != "cuda":
            self.step(*key)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            main = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(main)
            with torch.cuda.stream(self.stream):
                self.step(*key)
            main.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(*key)
            self.graphs[key] = graph  # only now: an interrupted capture leaves none


def decode_completions(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The text of each row after its prompt, without the end-of-sequence token."""
    rows = zip(rollout.tokens.tolist(), rollout.mask.tolist(), rollout.finished.tolist())
    completions = []
    for tokens, mask, finished in rows:
        sampled = [token for token, mine in zip(tokens, mask) if mine]
        completions.append(tokenizer.decode(sampled[:-1] if finished else sampled))
    return completions


# ---------------------------------------------------------------------------------------------------- the command


def load_policy(path: str | Path, tokenizer: Tokenizer, device: str = "cpu") -> Transformer:
    """A model that speaks the tokenizer's words. Raises ValueError, in one line, for what is no such file."""
    model = load_model(path, device)
    if (model.config.vocab_size, model.config.vocabulary) != (tokenizer.vocab_size, tokenizer.fingerprint):
        raise ValueError(f"{path} learned other words: its vocabulary is not that of data/tokenizer.py")
    return model


def newest_checkpoint(runs: Path) -> Path:
    """The model of the run that was trained last. Raises ValueError where there is none."""
    found = sorted(runs.glob("*/r1_zero.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no trained model in {runs}/: run `python train.py`, or name one with --checkpoint")
    return found[-1]


def answer(model: Transformer, tokenizer: Tokenizer, problem: Problem, flags: argparse.Namespace) -> None:
    """Print what the model says to a problem, and what the rules say to that."""
    prompt = tokenizer.encode(problem.prompt)
    rollout = generate(
        model,
        [prompt],
        group_size=flags.n,
        max_new_tokens=max(1, model.config.max_seq_len - len(prompt)),
        temperature=flags.temperature,
        eos_id=tokenizer.eos_id,
        seed=flags.seed,
    )
    completions = decode_completions(rollout, tokenizer)
    accuracy = [accuracy_reward(completion, problem.answer) for completion in completions]
    form = [format_reward(completion) for completion in completions]
    print(problem.prompt, end="")
    if flags.n == 1:
        given = extract_answer(completions[0])
        if given is None:
            verdict = "no answer that the rule can read"
        else:
            verdict = f"{given} is right" if accuracy[0] else f"{given} is wrong: it is {problem.answer}"
        print(f"{completions[0]}\n\n{verdict}  [{flags.checkpoint}]")
        return
    advantages = group_advantages(torch.tensor(accuracy) + torch.tensor(form), flags.n).tolist()
    for i, completion in enumerate(completions):
        print(f"\n--- accuracy {accuracy[i]:.0f}  format {form[i]:.0f}  advantage {advantages[i]:+.2f}\n{completion}")
    print(f"\n{sum(accuracy):.0f} of {flags.n} are right: the answer is {problem.answer}  [{flags.checkpoint}]")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        usage=argparse.SUPPRESS,  # an error is then one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("problem", nargs="*", help="such as '7 + 8 - 3'; without one, problems are asked for")
    parser.add_argument("--checkpoint", help="a model file [the newest out/*/r1_zero.pt]")
    parser.add_argument("-n", type=int, default=1, help="completions to sample [1]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token [1.0]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other completions [0]")
    flags = parser.parse_args(arguments)
    tokenizer = get_tokenizer()
    try:
        if flags.n < 1:
            raise ValueError("-n must be at least 1")
        if flags.temperature != 0 and not 0.001 <= flags.temperature < math.inf:
            raise ValueError("--temperature must be 0 or at least 0.001")
        if not 0 <= flags.seed < 2**63:
            raise ValueError("--seed must be at least 0 and below 2**63")
        typed = " ".join(flags.problem)
        problem = parse_problem(typed, language_of(typed)) if typed else None
        flags.checkpoint = flags.checkpoint or newest_checkpoint(Path("out"))
        model = load_policy(flags.checkpoint, tokenizer)
        if problem:
            answer(model, tokenizer, problem, flags)
    except ValueError as error:
        parser.error(str(error))
    while problem is None:
        try:
            line = input("\nproblem (empty to leave): ")
        except (EOFError, KeyboardInterrupt):
            break
        if not line.strip():
            break
        try:
            answer(model, tokenizer, parse_problem(line, language_of(line)), flags)
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main(sys.argv[1:])
