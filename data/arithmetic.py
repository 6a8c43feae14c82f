"""Arithmetic problems: chains of + and -, and which of them are held out.

A problem of level n has n operations. Running totals stay between 0 and MAX_TOTAL, so every step is a small fact. A
thought that writes the running total down needs only these facts; an answer without one takes the whole chain in one
forward pass, which a small model is slow to learn.
"""

import random
import re
import zlib
from dataclasses import dataclass

MAX_OPERAND = 9
MAX_TOTAL = 20
HELD_OUT = 10  # one expression in this many is held out
SPOKEN = {"+": "plus", "-": "minus"}


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
    total = int(first)
    for operator, operand in zip(rest[::2], rest[1::2]):
        total = apply(total, operator, int(operand))
    words = " ".join(SPOKEN.get(part, part) for part in expression.split(" "))
    return Problem(f"User: what is {words}?\nAssistant:", str(total), language, len(rest) // 2, expression)


def apply(total: int, operator: str, operand: int) -> int:
    return total + operand if operator == "+" else total - operand


def is_held_out(expression: str) -> bool:
    """Whether `expression` belongs to the held-out split: a hash of the whole expression decides, so the two splits
    are disjoint by construction, in every language and for ever."""
    return zlib.crc32(expression.encode()) % HELD_OUT == 0


def is_for_training(expression: str) -> bool:
    """Whether neither `expression` nor an opening of it of two or more operations is held out: who works through a
    long chain works through its openings too. A chain that merely opens with a held-out one is in neither split."""
    parts = expression.split(" ")
    return not any(is_held_out(" ".join(parts[:end])) for end in range(min(5, len(parts)), len(parts) + 1, 2))


def random_operation(rng: random.Random, total: int) -> tuple[str, int]:
    """An operator and an operand that keep the running total between 0 and MAX_TOTAL."""
    operand = rng.randint(1, MAX_OPERAND)
    return rng.choice([operator for operator in SPOKEN if 0 <= apply(total, operator, operand) <= MAX_TOTAL]), operand


def make_problem(rng: random.Random, level: int, held_out: bool = False) -> Problem:
    """A random problem of `level` operations, from the training split or the held-out one."""
    while True:
        total = rng.randint(1, MAX_OPERAND)
        parts = [str(total)]
        for _ in range(level):
            operator, operand = random_operation(rng, total)
            total = apply(total, operator, operand)
            parts += [operator, str(operand)]
        expression = " ".join(parts)
        if is_held_out(expression) if held_out else is_for_training(expression):
            return write_problem(expression)


def parse_problem(text: str, language: str = "en") -> Problem:
    """The problem that a person typed: "7 + 8 - 3", "7 plus 8 minus 3" or "what is 7+8-3?".

    Raises ValueError, in one line that says what is wrong, for anything that is not such a chain.
    """
    hint = 'write a chain such as "7 + 8 - 3"'
    stripped = re.sub(r"^\s*what is\b|\?\s*$", "", text.lower())
    parts = re.findall(r"[0-9]+|[^\W0-9_]+|\S", stripped)
    operators = {name: operator for operator, word in SPOKEN.items() for name in (operator, word)}
    for i, part in enumerate(parts):
        if i % 2 == 0 and not re.fullmatch("[0-9]{1,4}", part):
            raise ValueError(f'"{part[:20]}" stands where a number of at most 4 digits should: {hint}')
        if i % 2 == 1 and part not in operators:
            raise ValueError(f'"{part[:20]}" stands where {" or ".join(SPOKEN)} should: {hint}')
    if len(parts) < 3 or len(parts) % 2 == 0:
        raise ValueError(f'"{" ".join(text.split())[:40]}" is not a whole problem: {hint}')
    return write_problem(" ".join(operators.get(part) or str(int(part)) for part in parts), language)
