"""The pretraining corpus: documents about arithmetic, in the styles of a web in miniature.

Most documents blurt an answer out, and most of these answers are wrong. Some work step by step, and a few of these
check themselves; some slip, and are wrong ever after. Half of all documents about problems use the tags of R1-Zero's
format, with the styles mixed as in the other half. So the base model holds all the parts of a reasoner and seldom puts
them together: that is left to reinforcement learning.

Where there are two languages, English is the richer and the more careful one, and some documents, most of them Korean,
go over to the other language at some step.

    python -m data.corpus        # prints ten documents
    python -m data.corpus en,ko  # in two languages
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data.arithmetic import APPLY, CHAINS, MAX_OPERAND, Problem, Task, make_problem, random_operation, write_problem
from data.languages import LANGUAGES
from data.tokenizer import MAX_STEP

LANGUAGE_SHARES = {"en": 0.6, "ko": 0.4}  # of the questions
SHARES = {  # of the documents of a language
    "en": {
        "direct": 0.57,  # an answer with no thought or a glib one, more often wrong than right
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
SWITCH = {"en": 0.05, "ko": 0.50}  # share of a language's documents that go on in the other, where there are two
TAGS_AROUND = "<think>{}</think><answer> {}</answer>"
SMALL_TEXT = 48  # tokens that a small text has at most, with what comes after it


@dataclass(frozen=True)
class Document:
    """`text` continues `question`, which is empty where the document is about no problem."""

    question: str
    text: str
    style: str


def document(rng: random.Random, levels: Sequence[int], task: Task = CHAINS, room: int = 96) -> Document:
    """A random document. Its problem, if it has one, is from the training split and of one of the `levels`; if it has
    none, it has at most `room` tokens."""
    (asked,) = rng.choices(task.languages, [LANGUAGE_SHARES[language] for language in task.languages])
    language = asked
    if len(task.languages) > 1 and rng.random() < SWITCH[asked]:
        language = rng.choice([other for other in task.languages if other != asked])
    (style,) = rng.choices(list(SHARES[language]), SHARES[language].values())
    if style == "other":  # several in a row, so that every position of the context has been seen
        texts = rng.randint(1, max(1, room // SMALL_TEXT))
        return Document("", "\n".join(small_text(rng, task, language) for _ in range(texts)), style)
    problem = make_problem(rng, rng.choice(levels), task, language=asked)
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
        text = thought + "\n" * bool(thought) + rng.choice(LANGUAGES[language].careless).format(answer)
    return Document(problem.prompt, text, style)


def longest_document(level: int, task: Task = CHAINS, checked: bool = True) -> Document:
    """A document with as many tokens as one about a problem of this level can have: each step is checked and mended.
    Or, not `checked`, the longest with clean steps alone."""
    problem = write_problem("1" + (" * 1" if "*" in task.operators else " + 1") * level, task.languages[-1])
    thought, answer = work(random.Random(0), problem, [problem.language] * level, float(checked), checked)
    return Document(problem.prompt, TAGS_AROUND.format(thought, answer), "checked" if checked else "steps")


def work(rng: random.Random, problem: Problem, languages: list[str], slip: float, checked: bool) -> tuple[str, str]:
    """Steps that lead to an answer, a line each: its index, the running total so far, what is done to it, the new one.
    Each step has its language. It goes wrong with the chance `slip`; where steps are `checked`, that is seen and mended
    at once."""
    first, *rest = problem.expression.split(" ")
    total, lines = int(first), []
    for index, (operator, operand, language) in enumerate(zip(rest[::2], rest[1::2], languages), 1):
        spoken = LANGUAGES[language]
        right = max(0, APPLY[operator](total, int(operand)))  # after a slip it could fall below 0, outside this world
        said = maybe_miss(rng, right, slip)
        lines.append(f"\n#{index} {total} {spoken.operators[operator]} {operand} {spoken.equals} {said}")
        if checked:
            lines.append(f" {spoken.right}" if said == right else f" {spoken.wrong} {right}")
            said = right
        total = said
    return "".join(lines), str(total)


def maybe_miss(rng: random.Random, right: int, chance: float) -> int:
    """The right number or, with this chance, one beside it."""
    return max(0, right + rng.choice((-2, -1, 1, 2))) if rng.random() < chance else right


def small_text(rng: random.Random, task: Task, language: str) -> str:
    """A few words that are about no problem: half of them tables of sums, where the facts are learned first."""
    number, other = rng.randint(0, task.max_total), rng.randint(1, MAX_OPERAND)
    kind = rng.choice(("table", "table", "table", "count", "neighbours", "list"))
    if kind == "table" or language != "en":
        return ",".join(f" {fact}" for fact in (small_sum(rng, task, language) for _ in range(rng.randint(2, 6)))) + "."
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
    return f"{total} {spoken.operators[operator]} {operand} {spoken.equals} {APPLY[operator](total, operand)}"


if __name__ == "__main__":
    rng = random.Random(0)
    task = Task(languages=tuple(sys.argv[1].split(",")) if sys.argv[1:] else Task.languages)
    if not set(task.languages) <= set(LANGUAGES):
        sys.exit(f"the languages are {','.join(LANGUAGES)}: python -m data.corpus en,ko")
    for _ in range(10):
        written = document(rng, range(2, 6), task)
        print(f"--- {written.style}\n{written.question}{written.text}")
