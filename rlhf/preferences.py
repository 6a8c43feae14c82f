"""What people give to RLHF: answers that they wrote, choices between two answers, and a judgement
of the whole.

The people are `data.requests.Requests.gold`. An answer is a Row: (tokens of its prompt, the ids of
prompt and answer), the end token last where the answer ended by itself.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data import TASKS
from data.batches import Batch, Row, padded
from data.corpus import encode_document
from data.problem import Document, Problem, sample_problems, stream
from kit.evaluate import PART
from model import Transformer
from sample import complete, decode_completions, tokenizer_of

REQUESTS = TASKS["requests"]
ROWS = 32  # curated answers in a step of fine-tuning


def requests(count: int, seed: int, purpose: str, held_out: bool = False) -> list[Problem]:
    """The same requests whenever they are asked for, in all languages."""
    how = {"levels": REQUESTS.levels[:1], "count": count, "held_out": held_out}
    return sample_problems(stream(seed, purpose), REQUESTS, **how)


def curated_batches(model: Transformer, count: int, seed: int) -> Callable[[int], Batch]:
    """The batch of each step of fine-tuning, drawn from `count` answers that careful people
    wrote."""
    rng, tokenizer = stream(seed, "curated answers"), tokenizer_of(model)
    written = [
        Document(problem.prompt, REQUESTS.good_answer(rng, problem), "curated")
        for problem in requests(count, seed, "curated requests")
    ]
    rows = [encode_document(each, tokenizer) for each in written]

    def batch(step: int) -> Batch:
        chosen = stream(seed, "curated batch", step).sample(rows, min(ROWS, len(rows)))
        return padded(chosen, tokenizer.pad_id)

    return batch


@dataclass(frozen=True)
class Pair:
    """Two answers to one request. `lead` is how much better people find the chosen answer, in
    points of gold. Below 0, noise made the choice. No training reads it."""

    problem: Problem
    chosen: Row
    rejected: Row
    lead: float


def sample_pairs(
    model: Transformer,
    count: int,
    *,
    noise: float,
    limit: int,
    seed: int,
    purpose: str,
    held_out: bool = False,
) -> list[Pair]:
    """Two answers of a model to each of `count` requests, at temperature 1 and of at most `limit`
    tokens, and people's choice between them, of Bradley-Terry noise of this temperature. Two
    answers that are the same make no pair."""
    problems, pairs = requests(count, seed, purpose, held_out), []
    rng, tokenizer = stream(seed, f"{purpose}, choices"), tokenizer_of(model)
    noise_seed = stream(seed, f"{purpose}, noise").getrandbits(63)
    for start in range(0, count, PART):
        part, how = problems[start : start + PART], {"seed": noise_seed, "first_row": 2 * start}
        rollout = complete(model, part, group_size=2, max_new_tokens=limit, **how)
        texts, tokens = decode_completions(rollout, tokenizer), rollout.tokens.tolist()
        bounds = zip(tokens, rollout.starts.tolist(), rollout.ends.tolist())
        rows = [(first, ids[:end]) for ids, first, end in bounds]
        for i, problem in enumerate(part):
            answers = list(zip(texts, rows))[2 * i : 2 * i + 2]
            (one, _), (other, _) = answers
            if one != other:
                if not REQUESTS.preferred(rng, problem, one, other, noise):
                    answers.reverse()
                (chosen, chosen_row), (rejected, rejected_row) = answers
                lead = REQUESTS.gold(problem, chosen) - REQUESTS.gold(problem, rejected)
                pairs.append(Pair(problem, chosen_row, rejected_row, lead))
    return pairs


def rows_of(pairs: list[Pair]) -> list[Row]:
    """The chosen answers of all pairs, then the rejected."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def judge_by_length(pairs: list[Pair]) -> Callable[[list[Row]], Tensor]:
    """What the length of an answer tells by itself: the share of choices that answers of as many
    tokens won. A control: a reward model must know more."""
    won, met = Counter(), Counter()
    for pair in pairs:
        for (first, ids), wins in ((pair.chosen, 1), (pair.rejected, 0)):
            won[len(ids) - first] += wins
            met[len(ids) - first] += 1

    def score(rows: list[Row]) -> Tensor:
        lengths = [len(ids) - first for first, ids in rows]
        return torch.tensor([won[n] / met[n] if met[n] else 0.5 for n in lengths])

    return score
