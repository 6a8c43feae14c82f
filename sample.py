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


@dataclass
class Rollout:
    """B rows, prompt and completion side by side from position 0, right-padded to T tokens."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool: True exactly on sampled tokens, the end-of-sequence token included
    logps: Tensor  # (B, T) float32: log-probability of each sampled token as it was sampled, 0 elsewhere
    entropy: Tensor  # (B, T) float32: of the distribution that each sampled token was drawn from, in nats, 0 elsewhere
    finished: Tensor  # (B,) bool: True where the row ended by itself, False where it was cut


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
    entropy = -(probabilities * logps).sum(dim=-1)
    if temperature == 0:
        tokens = logps.argmax(dim=-1)
    else:
        # In whole numbers, whose sums do not depend on their order: float sums on a GPU do, from one run to the next.
        cumulative = (probabilities * 2.0**38).long().cumsum(dim=-1)
        # Of the last sum, which rounding keeps from being 2^38, noise below 1 always falls on a possible token.
        target = (noise[:, None] * 2.0**24).long() * cumulative[:, -1:] >> 24
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens, logps.gather(1, tokens[:, None]).squeeze(1), entropy


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
) -> Rollout:
    """Sample `group_size` completions of each of P prompts: B = P * group_size rows, those of one prompt adjacent.

    `first_row` is the number of this call's first row, where a large batch is sampled in parts: the parts then hold
    what the whole would have held. Raises ValueError for an empty prompt, and for a prompt that does not fit the
    model's context together with `max_new_tokens`.
    """
    longest = max(map(len, prompts))
    limit = model.config.max_seq_len
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    if longest + max_new_tokens > limit:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {limit}")

    # Prefill: each prompt goes through the model once, and its G completions start from copies of its cache.
    weight = model.embedding.weight
    device = weight.device
    P, B, T = len(prompts), len(prompts) * group_size, longest + max_new_tokens
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [eos_id] * (longest - len(prompt)) for prompt in prompts], device=device)
    cache = KVCache(model.config, B, T, like=weight.bfloat16() if model.in_bfloat16 else weight)
    cache.lengths = torch.zeros_like(lengths)  # of P rows, until each is copied G times
    logits = model(padded, cache)[torch.arange(P, device=device), lengths - 1]  # (P, V)
    cache.lengths = lengths
    group = torch.arange(P, device=device).repeat_interleave(group_size)
    cache.select(group)
    logits = logits[group]

    tokens = torch.full((B, T), eos_id, device=device)
    tokens[:, :longest] = padded[group]
    mask = torch.zeros((B, T), dtype=torch.bool, device=device)
    logps, entropy = torch.zeros((B, T), device=device), torch.zeros((B, T), device=device)
    noise = uniform(seed, first_row + torch.arange(B, device=device)[:, None], torch.arange(T, device=device))
    finished = torch.zeros(B, dtype=torch.bool, device=device)

    rows = torch.arange(B, device=device)  # the rows still in the batch
    for step in range(max_new_tokens):
        positions = cache.lengths
        sampled, sampled_logps, sampled_from = sample_tokens(logits, noise[rows, positions], temperature)
        running = ~finished[rows]
        tokens[rows, positions] = torch.where(running, sampled, eos_id)
        mask[rows, positions] = running
        logps[rows, positions] = torch.where(running, sampled_logps.float(), 0.0)
        entropy[rows, positions] = torch.where(running, sampled_from.float(), 0.0)
        finished[rows] |= sampled == eos_id
        if step + 1 == max_new_tokens:
            break
        # Finished rows ride along until they are dropped; to look at each token would stall a GPU at each token.
        if (step + 1) % LOOK_EVERY == 0:
            kept = (~finished[rows]).nonzero().squeeze(1)
            if len(kept) == 0:
                break
            if len(kept) < WORTH_COMPACTING * len(rows):
                rows, sampled = rows[kept], sampled[kept]
                cache.select(kept)
        logits = model(sampled[:, None], cache)[:, 0]

    width = int(mask.any(dim=0).nonzero().max()) + 1
    return Rollout(*(x[:, :width] for x in (tokens, mask, logps, entropy)), finished)


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
