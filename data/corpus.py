"""The pretraining corpus: documents about arithmetic, in the styles of a web in miniature.

Most documents blurt an answer out, and most of these answers are wrong. Some work step by step, and a few of these
check themselves; some slip, and are wrong ever after. Half of all documents about problems use the tags of R1-Zero's
format, with the styles mixed as in the other half. So the base model holds all the parts of a reasoner and seldom puts
them together: that is left to reinforcement learning.

    python -m data.corpus     # prints ten documents
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.arithmetic import (
    MAX_OPERAND,
    MAX_TOTAL,
    SPOKEN,
    Problem,
    apply,
    make_problem,
    random_operation,
    write_problem,
)
from data.tokenizer import MAX_STEP

SHARES = {  # of the documents
    "direct": 0.57,  # an answer with no thought or a glib one, more often wrong than right
    "steps": 0.20,  # clean steps
    "slips": 0.05,  # steps that now and then go wrong, and on from there
    "checked": 0.06,  # steps that each get a look: " ok", or " wait" and the right number
    "other": 0.12,  # tables of sums, counting, lists
}
TAGGED = 0.5  # share of the documents about problems that use the tags
GUESS = 0.6  # chance that a direct answer is wrong
SLIP = 0.15  # chance that a step goes wrong, in the styles where it can
GLIB = (" easy", " i know this")
TAGS_AROUND = "<think>{}</think><answer> {}</answer>"
CARELESS = (" {}", " {}.", " so {}", " it is {}", " the answer is {}", " i guess {}")


@dataclass(frozen=True)
class Document:
    """`text` continues `question`, which is empty where the document is about no problem."""

    question: str
    text: str
    style: str


def document(rng: random.Random, levels: Sequence[int]) -> Document:
    """A random document; its problem, if it has one, is from the training split and of one of the `levels`."""
    (style,) = rng.choices(list(SHARES), SHARES.values())
    if style == "other":
        return Document("", small_text(rng), style)
    problem = make_problem(rng, rng.choice(levels))
    tagged = rng.random() < TAGGED
    if style == "direct":
        thought, answer = rng.choice(GLIB) if tagged else "", str(maybe_miss(rng, int(problem.answer), GUESS))
    else:
        thought, answer = work(rng, problem, slip=0.0 if style == "steps" else SLIP, checked=style == "checked")
    if tagged:
        text = TAGS_AROUND.format(thought, answer)
    else:
        text = thought + "\n" * bool(thought) + rng.choice(CARELESS).format(answer)
    return Document(problem.prompt, text, style)


def longest_document(level: int) -> Document:
    """A document with as many tokens as one about a problem of this level can have: each step is checked and mended."""
    problem = write_problem("1" + " + 1" * level)
    text = TAGS_AROUND.format(*work(random.Random(0), problem, slip=1.0, checked=True))
    return Document(problem.prompt, text, "checked")


def work(rng: random.Random, problem: Problem, slip: float, checked: bool) -> tuple[str, str]:
    """Steps that lead to an answer, a line each: its index, the running total so far, what is done to it, the new one.
    A step goes wrong with the chance `slip`; where steps are `checked`, that is seen and mended at once."""
    first, *rest = problem.expression.split(" ")
    total, lines = int(first), []
    for index, (operator, operand) in enumerate(zip(rest[::2], rest[1::2]), 1):
        right = max(0, apply(total, operator, int(operand)))  # after a slip it could fall below 0, outside this world
        said = maybe_miss(rng, right, slip)
        lines.append(f"\n#{index} {total} {SPOKEN[operator]} {operand} is {said}")
        if checked:
            lines.append(" ok" if said == right else f" wait {right}")
            said = right
        total = said
    return "".join(lines), str(total)


def maybe_miss(rng: random.Random, right: int, chance: float) -> int:
    """The right number or, with this chance, one beside it."""
    return max(0, right + rng.choice((-2, -1, 1, 2))) if rng.random() < chance else right


def small_text(rng: random.Random) -> str:
    """A few words that are about no problem: half of them tables of sums, where the facts are learned first."""
    number, other = rng.randint(0, MAX_TOTAL), rng.randint(1, MAX_OPERAND)
    kind = rng.choice(("table", "table", "table", "count", "neighbours", "list"))
    if kind == "table":
        return ",".join(f" {fact}" for fact in (small_sum(rng) for _ in range(rng.randint(2, 6)))) + "."
    if kind == "count":
        return " count" + "".join(f" {n}" for n in range(number, number + other)) + "."
    if kind == "neighbours":
        return f" after {number} comes {number + 1}, before {number + 1} comes {number}."
    indices = range(1, rng.randint(2, MAX_STEP) + 1)
    return " then".join(f"\n#{n} {rng.randint(0, MAX_TOTAL)}" for n in indices)


def small_sum(rng: random.Random) -> str:
    """A single fact, such as "7 plus 8 is 15"."""
    total = rng.randint(0, MAX_TOTAL)
    operator, operand = random_operation(rng, total)
    return f"{total} {SPOKEN[operator]} {operand} is {apply(total, operator, operand)}"


if __name__ == "__main__":
    rng = random.Random(0)
    for _ in range(10):
        written = document(rng, levels=range(2, 6))
        print(f"--- {written.style}\n{written.question}{written.text}")
