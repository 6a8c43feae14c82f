"""What is asked: a problem, and how problems are drawn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """`prompt` is the text that a completion continues, `answer` the number that it must give,
    `level` the number of operations, `expression` the problem in digits and operators, such as
    "7 + 8 - 3"."""

    prompt: str
    answer: str
    language: str
    level: int
    expression: str


def stream(seed: int, purpose: str, step: int = 0) -> random.Random:
    """The random numbers of one purpose at one step. No generator lives from step to step, so a run
    that is resumed draws what it would have drawn."""
    return random.Random(f"{seed} {purpose} {step}")


def sample_problems(
    rng: random.Random,
    task,
    levels: Sequence[int],
    count: int,
    *,
    held_out: bool = False,
    first: int = 0,
) -> list[Problem]:
    """`count` problems of the training split, or of the held-out one. Levels and languages take
    turns, beginning with turn `first`: over several calls, each comes as often."""
    kinds = [(level, language) for level in levels for language in task.languages]
    chosen = (kinds[turn % len(kinds)] for turn in range(first, first + count))
    return [
        task.problem(rng, level, language=language, held_out=held_out) for level, language in chosen
    ]
