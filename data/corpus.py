"""The pretraining corpus: documents about arithmetic, in the styles of a web in miniature.

Most documents blurt an answer out, and most of these answers are wrong. Some work step by step, and
a few of these check their steps. Some slip, and are wrong ever after. Half of all documents about
problems use the tags of R1-Zero's format, and the styles are mixed alike in both halves. So the
base model holds all parts of a reasoner and seldom puts them together. That is left to
reinforcement learning.

Where there are two languages, English documents think more and slip less. Some documents, most of
them Korean, go over to the other language at some step.

    python -m data.corpus        # prints ten documents
    python -m data.corpus en,ko  # in two languages
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data.arithmetic import APPLY, CHAINS, MAX_OPERAND, Task, random_operation, write_problem
from data.languages import LANGUAGES
from data.problem import Problem
from data.tokenizer import MAX_STEP

LANGUAGE_SHARES = {"en": 0.6, "ko": 0.4}  # of the questions
SHARES = {  # of the documents of a language
    "en": {
        "direct": 0.57,  # an answer after a glib thought or none, more often wrong than right
        "steps": 0.20,  # clean steps
        "slips": 0.05,  # steps that now and then go wrong, and on from there
        "checked": 0.06,  # steps that each get a look: right, or wrong and then the right number
        "other": 0.12,  # tables of sums, counting, lists
    },
    "ko": {"direct": 0.82, "steps": 0.01, "slips": 0.04, "checked": 0.01, "other": 0.12},
}
TAGGED = 0.5  # share of the documents about problems that use the tags
GUESS = 0.6  # chance that a direct answer is wrong
SLIP = {"en": 0.15, "ko": 0.30}  # chance that a step goes wrong, in the styles where it can
SWITCH = {"en": 0.05, "ko": 0.50}  # share that goes over to the other language, where there are two
TAGS_AROUND = "<think>{}</think><answer> {}</answer>"
SMALL_TEXT = 48  # tokens that a small text has at most, with what comes after it


@dataclass(frozen=True)
class Document:
    """`text` continues `question`, which is empty where the document is about no problem."""

    question: str
    text: str
    style: str


def document(
    rng: random.Random, levels: Sequence[int], task: Task = CHAINS, room: int = 96
) -> Document:
    """A random document. Its problem is from the training split and of one of the `levels`. A
    document without a problem has at most `room` tokens."""
    (asked,) = rng.choices(task.languages, [LANGUAGE_SHARES[name] for name in task.languages])
    language = asked
    if len(task.languages) > 1 and rng.random() < SWITCH[asked]:
        language = rng.choice([other for other in task.languages if other != asked])
    (style,) = rng.choices(list(SHARES[language]), SHARES[language].values())
    if style == "other":  # several in a row, so that every position of the context has been seen
        texts = rng.randint(1, max(1, room // SMALL_TEXT))
        return Document("", "\n".join(small_text(rng, task, language) for _ in range(texts)), style)
    problem = task.problem(rng, rng.choice(levels), language=asked)
    tagged = rng.random() < TAGGED
    if style == "direct":
        glib = rng.choice(LANGUAGES[language].glib) if tagged else ""
        thought, answer = glib, str(maybe_miss(rng, int(problem.answer), GUESS))
    else:
        switch = rng.randrange(problem.level) if language != asked else 0
        languages = [asked] * switch + [language] * (problem.level - switch)
        slip = 0.0 if style == "steps" else SLIP[language]
        thought, answer = work(rng, problem, languages, slip, checked=style == "checked")
    if tagged:
        text = TAGS_AROUND.format(thought, answer)
    else:
        said = rng.choice(LANGUAGES[language].careless).format(answer)
        text = f"{thought}\n{said}" if thought else said
    return Document(problem.prompt, text, style)


def longest_document(level: int, task: Task = CHAINS, checked: bool = True) -> Document:
    """A document with as many tokens as a document about a problem of this level can have: each
    step is checked and mended. If not `checked`, the longest document with clean steps alone."""
    operation = " * 1" if "*" in task.operators else " + 1"
    problem = write_problem("1" + operation * level, task.languages[-1])
    languages, slip = [problem.language] * level, float(checked)
    thought, answer = work(random.Random(0), problem, languages, slip, checked)
    style = "checked" if checked else "steps"
    return Document(problem.prompt, TAGS_AROUND.format(thought, answer), style)


def work(
    rng: random.Random, problem: Problem, languages: list[str], slip: float, checked: bool
) -> tuple[str, str]:
    """A thought in steps, and the answer it leads to. A step is a line: its index, the running
    total, what is done to it, the new total. `languages` holds the language of each step.

    A step goes wrong with the chance `slip`. Where steps are `checked`, this is mended at once.
    """
    first, *rest = problem.expression.split(" ")
    total, lines = int(first), []
    for index, (operator, operand, language) in enumerate(zip(rest[::2], rest[1::2], languages), 1):
        spoken = LANGUAGES[language]
        # No total is below 0 in this world, but after a slip it could fall there.
        right = max(0, APPLY[operator](total, int(operand)))
        said = maybe_miss(rng, right, slip)
        step = f"{total} {spoken.operators[operator]} {operand} {spoken.equals} {said}"
        lines.append(f"\n#{index} {step}")
        if checked:
            lines.append(f" {spoken.right}" if said == right else f" {spoken.wrong} {right}")
            said = right
        total = said
    return "".join(lines), str(total)


def maybe_miss(rng: random.Random, right: int, chance: float) -> int:
    """The right number or, with this chance, a number beside it."""
    return max(0, right + rng.choice((-2, -1, 1, 2))) if rng.random() < chance else right


def small_text(rng: random.Random, task: Task, language: str) -> str:
    """A few words about no problem. Half of them or more are tables of sums, where the facts are
    learned first."""
    number, other = rng.randint(0, task.max_total), rng.randint(1, MAX_OPERAND)
    kind = rng.choice(("table", "table", "table", "count", "neighbours", "list"))
    if kind == "table" or language != "en":
        facts = [small_sum(rng, task, language) for _ in range(rng.randint(2, 6))]
        return ",".join(f" {fact}" for fact in facts) + "."
    if kind == "count":
        return " count" + "".join(f" {n}" for n in range(number, number + other)) + "."
    if kind == "neighbours":
        return f" after {number} comes {number + 1}, before {number + 1} comes {number}."
    indices = range(1, rng.randint(2, MAX_STEP) + 1)
    return " then".join(f"\n#{n} {rng.randint(0, task.max_total)}" for n in indices)


def small_sum(rng: random.Random, task: Task, language: str) -> str:
    """A single fact, such as "7 plus 8 is 15"."""
    total, spoken = rng.randint(0, task.max_total), LANGUAGES[language]
    operator, operand = random_operation(rng, total, task)
    result = APPLY[operator](total, operand)
    return f"{total} {spoken.operators[operator]} {operand} {spoken.equals} {result}"


if __name__ == "__main__":
    rng, languages = random.Random(0), sys.argv[1] if sys.argv[1:] else "en"
    try:
        task = Task(languages=tuple(languages.split(",")))
    except ValueError as error:
        sys.exit(f"data.corpus: {error}")
    for _ in range(10):
        written = document(rng, range(2, 6), task)
        print(f"--- {written.style}\n{written.question}{written.text}")
