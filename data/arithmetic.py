"""Arithmetic problems: chains of operations, and which of them are held out.

A problem of level n has n operations, worked from left to right as on a pocket calculator: 1 plus 2 times 3 is 9.
Running totals stay between 0 and a limit, so every step is a small fact. A thought that writes the running total down
needs only these facts; an answer without one takes the whole chain in one forward pass. For + and - a small model
learns that, if slowly: their order does not matter. With * it does.
"""

import random
import re
import zlib
from dataclasses import dataclass

from data.languages import LANGUAGES

MAX_OPERAND = 9
HELD_OUT = 10  # one expression in this many is held out
APPLY = {
    "+": lambda total, operand: total + operand,
    "-": lambda total, operand: total - operand,
    "*": lambda total, operand: total * operand,
}


@dataclass(frozen=True)
class Task:
    """What is asked: the operators, the limit of the running total, and the languages of the questions."""

    operators: str = "+-"
    max_total: int = 20
    languages: tuple[str, ...] = ("en",)


CHAINS = Task()


@dataclass(frozen=True)
class Problem:
    """`prompt` is the text that a completion continues, `answer` the number that it must give, `level` the number of
    operations, `expression` the problem in digits and operators, such as "7 + 8 - 3"."""

    prompt: str
    answer: str
    language: str
    level: int
    expression: str


def write_problem(expression: str, language: str = "en") -> Problem:
    """The problem that asks for the value of `expression`: numbers and operators with single spaces between them."""
    first, *rest = expression.split(" ")
    total, words, spoken = int(first), [first], LANGUAGES[language]
    for operator, operand in zip(rest[::2], rest[1::2]):
        total = APPLY[operator](total, int(operand))
        words += [spoken.operators[operator], operand]
    question = spoken.question.format(" ".join(words))
    return Problem(f"User: {question}\nAssistant:", str(total), language, len(rest) // 2, expression)


def is_held_out(expression: str) -> bool:
    """Whether `expression` belongs to the held-out split: a hash of the whole expression decides, so the two splits
    are disjoint by construction, in every language and for ever."""
    return zlib.crc32(expression.encode()) % HELD_OUT == 0


def is_for_training(expression: str) -> bool:
    """Whether neither `expression` nor an opening of it of two or more operations is held out: who works through a
    long chain works through its openings too. A chain that merely opens with a held-out one is in neither split."""
    parts = expression.split(" ")
    return not any(is_held_out(" ".join(parts[:end])) for end in range(min(5, len(parts)), len(parts) + 1, 2))


def random_operation(rng: random.Random, total: int, task: Task) -> tuple[str, int]:
    """An operator and an operand that keep the running total between 0 and its limit."""
    operand = rng.randint(1, MAX_OPERAND)
    possible = [operator for operator in task.operators if 0 <= APPLY[operator](total, operand) <= task.max_total]
    return rng.choice(possible), operand


def make_problem(
    rng: random.Random, level: int, task: Task = CHAINS, *, held_out: bool = False, language: str = "en"
) -> Problem:
    """A random problem of `level` operations, from the training split or the held-out one."""
    while True:
        total = rng.randint(1, MAX_OPERAND)
        parts = [str(total)]
        for _ in range(level):
            operator, operand = random_operation(rng, total, task)
            total = APPLY[operator](total, operand)
            parts += [operator, str(operand)]
        expression = " ".join(parts)
        if is_held_out(expression) if held_out else is_for_training(expression):
            return write_problem(expression, language)


def parse_problem(text: str, language: str = "en") -> Problem:
    """The problem that a person typed: "7 + 8 - 3", "7 plus 8 minus 3" or "what is 7+8-3?", worked from left to right.

    Raises ValueError, in one line that says what is wrong, for anything that is not such a chain.
    """
    hint = 'write a chain such as "7 + 8 - 3"'
    spoken = LANGUAGES[language]
    before, after = (re.escape(part.strip()) for part in spoken.question.split("{}"))
    stripped = re.sub(rf"^\s*{before}|({after}|\?)\s*$", "", text.lower())
    parts = re.findall(r"[0-9]+|[^\W0-9_]+|\S", stripped)
    operators = {name: operator for operator, word in spoken.operators.items() for name in (operator, word)}
    for i, part in enumerate(parts):
        if i % 2 == 0 and not re.fullmatch("[0-9]{1,4}", part):
            raise ValueError(f'"{part[:20]}" stands where a number of at most 4 digits should: {hint}')
        if i % 2 == 1 and part not in operators:
            raise ValueError(f'"{part[:20]}" stands where {" or ".join(APPLY)} should: {hint}')
    if len(parts) < 3 or len(parts) % 2 == 0:
        raise ValueError(f'"{" ".join(text.split())[:40]}" is not a whole problem: {hint}')
    return write_problem(" ".join(operators.get(part) or str(int(part)) for part in parts), language)
