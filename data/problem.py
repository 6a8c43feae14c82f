"""What is asked, and what the web says of it: problems, documents, and how problems are drawn."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

DRAWS = 100  # for a held-out problem that was not asked yet


@dataclass(frozen=True)
class Problem:
    """`prompt` is the text that a completion continues, `answer` a right answer to it. `expression`
    is the problem in symbols, the same in every language, such as "7 + 8 - 3". `task` names the
    row of `data.TASKS` that it belongs to."""

    prompt: str
    answer: str
    level: int
    language: str
    expression: str
    task: str

    def is_right(self, given: str) -> bool | None:
        """Whether the text of an answer is right; None where the task has no rule for it."""
        from data import TASKS  # not above: the tasks are made of problems

        return TASKS[self.task].is_right(self, given)


@dataclass(frozen=True)
class Document:
    """`text` continues `question`, which is empty where the document is about no problem."""

    question: str
    text: str
    style: str


def thought_of(completion: str) -> str | None:
    """The text of the first closed thought, None where there is none."""
    found = re.search("<think>(.*?)</think>", completion, re.DOTALL)
    return found and found[1]


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
    """`count` problems of the training split, or of the held-out split. Levels and languages take
    turns, beginning with turn `first`: over several calls, each comes as often. A held-out problem
    comes a second time only where DRAWS draws found no other: its level has hardly any."""
    kinds = [(level, language) for level in levels for language in task.languages]
    problems, asked = [], set()
    for turn in range(first, first + count):
        level, language = kinds[turn % len(kinds)]
        for _ in range(DRAWS if held_out else 1):
            problem = task.problem(rng, level, language=language, held_out=held_out)
            if problem.prompt not in asked:
                break
        asked.add(problem.prompt)
        problems.append(problem)
    return problems
