"""One web for the chapters that need more than sums: chains in two languages, requests, and
scribbles.

A scribble works a chain out by its running totals and nothing else. It is right, and nobody can
read it:

    User: what is 6 plus 8 minus 7 plus 3?
    Assistant:<think> 14 7 10</think><answer> 10</answer>

The problems of this row are chains, which have a rule. Requests are asked by the row "requests";
a model of the world has the words for both. Each problem names its own task, which grades it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.chains import TAGGED, TAGS_AROUND, Chains, totals
from data.languages import LANGUAGES
from data.problem import Document, Problem
from data.requests import Requests, count_tokens

REQUESTS = 0.2  # share of the documents
SCRIBBLES = 0.2  # share of the documents


@dataclass(frozen=True)
class World:
    """The row: two tasks, and a web that holds both."""

    name: str
    chains: Chains
    requests: Requests
    levels: tuple[int, int] = (1, 4)
    more_turns: tuple[int, ...] = ()
    apart: tuple[int, ...] = (1,)
    max_seq_len: int = 96
    max_new_tokens: int = 64
    verdicts: tuple[str, ...] = ()

    @property
    def beyond(self) -> int:
        return self.chains.beyond

    @property
    def hardest(self) -> int:
        return self.chains.hardest

    @property
    def languages(self) -> tuple[str, ...]:
        return self.chains.languages

    @property
    def example(self) -> str:
        return f"{self.chains.example}, or {self.requests.example}"

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.chains.words, *self.requests.words)))

    def problem(self, rng: random.Random, level: int, **how) -> Problem:
        """A chain."""
        return self.chains.problem(rng, level, **how)

    def document(self, rng: random.Random, levels: Sequence[int], room: int = 96) -> Document:
        """A random document of the web, none about a held-out chain or number."""
        (kind,) = rng.choices(
            ("request", "scribble", "chain"), (REQUESTS, SCRIBBLES, 1 - REQUESTS - SCRIBBLES)
        )
        if kind == "request":
            return self.requests.document(rng)
        if kind == "scribble":
            language = rng.choice(self.languages)
            return scribble(rng, self.chains.problem(rng, rng.choice(levels), language=language))
        return self.chains.document(rng, levels, room)

    def longest(self, level: int) -> Document:
        both = (self.chains.longest(level), self.requests.longest())
        return max(both, key=lambda written: count_tokens(written.question + written.text))

    def parse(self, text: str) -> Problem:
        """A request, or else a chain. Raises ValueError, in one line, for any other text."""
        try:
            return self.requests.parse(text)
        except ValueError:
            return self.chains.parse(text)

    # The rest is for the task that a problem names.

    def task_of(self, problem: Problem) -> Chains | Requests:
        return self.requests if problem.task == self.requests.name else self.chains

    def is_right(self, problem: Problem, given: str) -> bool | None:
        return self.task_of(problem).is_right(problem, given)

    def outside(self, problem: Problem, levels: Sequence[int]) -> str:
        return self.task_of(problem).outside(problem, levels)

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        return self.task_of(problem).measures(problem, completion)


def scribble(rng: random.Random, problem: Problem) -> Document:
    thought = "".join(f" {total}" for total in totals(problem.expression)[1:])
    if rng.random() < TAGGED:
        return Document(problem.prompt, TAGS_AROUND.format(thought, problem.answer), "scribble")
    said = rng.choice(LANGUAGES[problem.language].careless).format(problem.answer)
    return Document(problem.prompt, f"{thought}\n{said}", "scribble")
