"""Arithmetic problems: chains of operations, and which of them are held out.

A problem of level n has n operations, worked from left to right as on a pocket calculator: 1 plus
2 times 3 is 9. Running totals stay between 0 and a limit, so every step is a small fact.

A thought that writes the running total down needs these facts alone. An answer without a thought
needs the whole chain in one forward pass. A small model slowly learns this for + and -, whose order
does not matter. With * the order matters.
"""

import random
import re
import zlib
from dataclasses import dataclass

from data.languages import LANGUAGES
from data.problem import Problem
from data.tokenizer import MAX_NUMBER

MAX_OPERAND = 9
HELD_OUT = 10  # one expression in this many is held out
APPLY = {
    "+": lambda total, operand: total + operand,
    "-": lambda total, operand: total - operand,
    "*": lambda total, operand: total * operand,
}


@dataclass(frozen=True)
class Task:
    """What is asked: the operators, the limit of the running total, and the languages of the
    questions. Raises ValueError, in one line, for settings that allow no such problems."""

    operators: str = "+-"
    max_total: int = 20
    languages: tuple[str, ...] = ("en",)

    def __post_init__(self) -> None:
        known, least = "".join(APPLY), 2 * MAX_OPERAND - 1
        if not {"+", "-"} <= set(self.operators) <= set(APPLY):
            raise ValueError(f"--operators {self.operators} must be of {known}, + and - among them")
        if sorted(self.languages) != sorted(set(self.languages) & set(LANGUAGES)):
            rule = f"must be of {','.join(LANGUAGES)}, each at most once"
            raise ValueError(f"--languages {','.join(self.languages)} {rule}")
        for language in self.languages:
            if not set(self.operators) <= set(LANGUAGES[language].operators):
                reason = f"data/languages.py has no word for one of them in {language}"
                raise ValueError(f"--operators {self.operators}: {reason}")
        if not least <= self.max_total <= MAX_NUMBER:  # below it, some total allows no operation
            rule = f"must be from {least} to {MAX_NUMBER}, not {self.max_total}"
            raise ValueError(f"--max_total {rule}")

    def problem(
        self, rng: random.Random, level: int, *, language: str = "en", held_out: bool = False
    ) -> Problem:
        """A random problem of `level` operations, from the training split or the held-out split."""
        belongs = is_held_out if held_out else is_for_training
        while True:
            total = rng.randint(1, MAX_OPERAND)
            parts = [str(total)]
            for _ in range(level):
                operator, operand = random_operation(rng, total, self)
                total = APPLY[operator](total, operand)
                parts += [operator, str(operand)]
            if belongs(" ".join(parts)):
                return write_problem(" ".join(parts), language)


CHAINS = Task()


def write_problem(expression: str, language: str = "en") -> Problem:
    """The problem that asks for the value of `expression`, such as "7 + 8 - 3"."""
    first, *rest = expression.split(" ")
    total, words, spoken = int(first), [first], LANGUAGES[language]
    for operator, operand in zip(rest[::2], rest[1::2]):
        total = APPLY[operator](total, int(operand))
        words += [spoken.operators[operator], operand]
    prompt = f"User: {spoken.question.format(' '.join(words))}\nAssistant:"
    return Problem(prompt, str(total), language, len(rest) // 2, expression)


def is_held_out(expression: str) -> bool:
    """Whether `expression` belongs to the held-out split. A hash of the expression decides, so the
    two splits are disjoint by construction, in every language."""
    return zlib.crc32(expression.encode()) % HELD_OUT == 0


def is_for_training(expression: str) -> bool:
    """Whether neither `expression` nor an opening of it of two or more operations is held out. To
    work through a long chain is to work through its openings too. So a chain that merely opens
    with a held-out chain is in neither split."""
    parts = expression.split(" ")
    ends = range(min(5, len(parts)), len(parts) + 1, 2)
    return not any(is_held_out(" ".join(parts[:end])) for end in ends)


def random_operation(rng: random.Random, total: int, task: Task) -> tuple[str, int]:
    """An operator and an operand that keep the running total between 0 and its limit."""
    operand = rng.randint(1, MAX_OPERAND)
    possible = [x for x in task.operators if 0 <= APPLY[x](total, operand) <= task.max_total]
    return rng.choice(possible), operand


def parse_problem(text: str, language: str = "en") -> Problem:
    """The problem that a person typed, such as "7 + 8 - 3", "7 plus 8 minus 3" or "what is 7+8-3?".

    Raises ValueError, in one line that says what is wrong, for anything that is not such a chain.
    """
    hint = 'write a chain such as "7 + 8 - 3"'
    spoken = LANGUAGES[language]
    before, after = (re.escape(part.strip()) for part in spoken.question.split("{}"))
    stripped = re.sub(rf"^\s*{before}|({after}|\?)\s*$", "", text.lower())
    parts = re.findall(r"[0-9]+|[^\W0-9_]+|\S", stripped)
    signs = {name: sign for sign, word in spoken.operators.items() for name in (sign, word)}
    for i, part in enumerate(parts):
        if i % 2 == 0 and not re.fullmatch("[0-9]{1,4}", part):
            wanted = "a number of at most 4 digits"
            raise ValueError(f'"{part[:20]}" stands where {wanted} should: {hint}')
        if i % 2 == 1 and part not in signs:
            wanted = " or ".join(APPLY)
            raise ValueError(f'"{part[:20]}" stands where {wanted} should: {hint}')
    if len(parts) < 3 or len(parts) % 2 == 0:
        raise ValueError(f'"{" ".join(text.split())[:40]}" is not a whole problem: {hint}')
    return write_problem(" ".join(signs.get(part) or str(int(part)) for part in parts), language)
