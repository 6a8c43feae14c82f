"""Chains of operations, worked from left to right as on a pocket calculator: 1 plus 2 times 3 is 9.

A problem of level n has n operations. Running totals stay between 0 and a limit, so every step is a
small fact. A thought that writes the running total down needs these facts alone. An answer without
a thought needs the whole chain in one forward pass. A small model slowly learns this for + and -,
whose order does not matter. With * the order matters.

Most documents blurt an answer out, and most of these answers are wrong. Some work step by step, and
a few of these check their steps. Some slip, and are wrong ever after. Half of all documents about
problems use the tags of R1-Zero's format, and the styles are mixed alike in both halves. So the
base model holds all parts of a reasoner and seldom puts them together. That is left to
reinforcement learning.

Where there are two languages, English documents think more and slip less. Some documents, most of
them Korean, go over to the other language at some step.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from data.languages import LANGUAGES, language_of, language_of_thought, words_of
from data.problem import Document, Problem, thought_of
from data.tokenizer import MAX_NUMBER, MAX_STEP

MAX_OPERAND = 9
HELD_OUT = 10  # one chain in this many is held out, with its reorderings
APPLY = {
    "+": lambda total, operand: total + operand,
    "-": lambda total, operand: total - operand,
    "*": lambda total, operand: total * operand,
}
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
SMALL_WORDS = ("count", "then", "after", "before", "comes")  # of small texts, which are English


@dataclass(frozen=True)
class Chains:
    """The task: operators, limit of the running total, languages, and the levels that are asked.
    Raises ValueError, in one line, for settings that allow no such problems."""

    name: str = "chains"
    operators: str = "+-"
    max_total: int = 20
    languages: tuple[str, ...] = ("en",)
    levels: tuple[int, int] = (1, 5)
    more_turns: tuple[int, ...] = ()
    apart: tuple[int, ...] = (1,)  # problems of one operation are steps of all others
    beyond: int = 4
    hardest: int = MAX_STEP
    max_seq_len: int = 96
    max_new_tokens: int = 64
    verdicts: tuple[str, ...] = ()
    example: str = "7 + 8 - 3"

    def __post_init__(self) -> None:
        known, least = "".join(APPLY), 2 * MAX_OPERAND - 1
        once = len(self.operators) == len(set(self.operators))
        if not ({"+", "-"} <= set(self.operators) <= set(APPLY) and once):
            rule = f"must be of {known}, each at most once, + and - among them"
            raise ValueError(f"operators {self.operators} {rule}")
        if sorted(self.languages) != sorted(set(self.languages) & set(LANGUAGES)):
            rule = f"must be of {','.join(LANGUAGES)}, each at most once"
            raise ValueError(f"languages {','.join(self.languages)} {rule}")
        for language in self.languages:
            if not set(self.operators) <= set(LANGUAGES[language].operators):
                reason = f"data/languages.py has no word for one of them in {language}"
                raise ValueError(f"operators {self.operators}: {reason}")
        if not least <= self.max_total <= MAX_NUMBER:  # below it, some total allows no operation
            rule = f"must be from {least} to {MAX_NUMBER}, not {self.max_total}"
            raise ValueError(f"max_total {rule}")

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*words_of(self.languages, self.operators), *SMALL_WORDS)))

    # ----------------------------------------------------------------------------- problems

    def problem(
        self, rng: random.Random, level: int, *, language: str = "en", held_out: bool = False
    ) -> Problem:
        """A random problem of `level` operations, from the training split or the held-out split."""
        belongs = is_held_out if held_out else is_for_training
        while True:
            total = rng.randint(1, MAX_OPERAND)
            parts = [str(total)]
            for _ in range(level):
                operator, operand = self.operation(rng, total)
                total = APPLY[operator](total, operand)
                parts += [operator, str(operand)]
            if belongs(" ".join(parts)):
                return self.ask(" ".join(parts), language)

    def operation(self, rng: random.Random, total: int) -> tuple[str, int]:
        """An operator and an operand that keep the running total between 0 and its limit."""
        operand = rng.randint(1, MAX_OPERAND)
        possible = [x for x in self.operators if 0 <= APPLY[x](total, operand) <= self.max_total]
        return rng.choice(possible), operand

    def ask(self, expression: str, language: str = "en") -> Problem:
        """The problem that asks for the value of `expression`, such as "7 + 8 - 3"."""
        words, spoken = expression.split(" "), LANGUAGES[language]
        spelt = [spoken.operators.get(word, word) for word in words]
        prompt = f"User: {spoken.question.format(' '.join(spelt))}\nAssistant:"
        answer = str(totals(expression)[-1])
        return Problem(prompt, answer, len(words) // 2, language, expression, self.name)

    def is_right(self, problem: Problem, given: str) -> bool:
        """Digit for digit: "015" and "14 or 15" are not 15."""
        return given == problem.answer

    def parse(self, text: str) -> Problem:
        """The problem that a person typed: "7 + 8 - 3", "7 plus 8 minus 3" or "what is 7+8-3?".

        Raises ValueError, in one line that says what is wrong, for anything that is no such chain.
        """
        language, hint = language_of(text), f'write a chain such as "{self.example}"'
        if language not in self.languages:
            known = " and ".join(self.languages)
            raise ValueError(f"this model was asked in {known} alone: {hint}")
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
        return self.ask(" ".join(signs.get(part) or str(int(part)) for part in parts), language)

    def outside(self, problem: Problem, levels: Sequence[int]) -> str:
        """What of a problem no training at these levels had, in words; "" for nothing."""
        numbers, operators = (problem.expression.split(" ")[i::2] for i in (0, 1))
        found = []
        if problem.level not in levels:
            found.append(f"{problem.level} operations, not {levels[0]} to {levels[-1]}")
        if not set(operators) <= set(self.operators):
            found.append(f"operators beside {' '.join(self.operators)}")
        if not all(1 <= int(number) <= MAX_OPERAND for number in numbers):
            found.append(f"numbers beside 1 to {MAX_OPERAND}")
        if not all(0 <= total <= self.max_total for total in totals(problem.expression)):
            found.append(f"a running total beside 0 to {self.max_total}")
        return ", ".join(found)

    # ---------------------------------------------------------------------------- documents

    def document(self, rng: random.Random, levels: Sequence[int], room: int = 96) -> Document:
        """A random document. Its problem is from the training split and of one of the `levels`. A
        document without a problem has at most `room` tokens."""
        (asked,) = rng.choices(self.languages, [LANGUAGE_SHARES[name] for name in self.languages])
        language = asked
        if len(self.languages) > 1 and rng.random() < SWITCH[asked]:
            language = rng.choice([other for other in self.languages if other != asked])
        (style,) = rng.choices(list(SHARES[language]), SHARES[language].values())
        if style == "other":  # several in a row, so that every position of the context is seen
            texts = range(rng.randint(1, max(1, room // SMALL_TEXT)))
            return Document("", "\n".join(self.small_text(rng, language) for _ in texts), style)
        problem = self.problem(rng, rng.choice(levels), language=asked)
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

    def longest(self, level: int) -> Document:
        """A document with as many tokens as a document about a problem of this level can have: each
        step is checked and mended."""
        operation = " * 1" if "*" in self.operators else " + 1"
        problem = self.ask("1" + operation * level, self.languages[-1])
        languages = [problem.language] * level
        thought, answer = work(random.Random(0), problem, languages, slip=1.0, checked=True)
        return Document(problem.prompt, TAGS_AROUND.format(thought, answer), "checked")

    def small_text(self, rng: random.Random, language: str) -> str:
        """A few words about no problem. Half of them or more are tables of sums, where the facts
        are learned first."""
        number, other = rng.randint(0, self.max_total), rng.randint(1, MAX_OPERAND)
        kind = rng.choice(("table", "table", "table", "count", "neighbours", "list"))
        if kind == "table" or language != "en":
            facts = [self.small_sum(rng, language) for _ in range(rng.randint(2, 6))]
            return ",".join(f" {fact}" for fact in facts) + "."
        if kind == "count":
            return " count" + "".join(f" {n}" for n in range(number, number + other)) + "."
        if kind == "neighbours":
            return f" after {number} comes {number + 1}, before {number + 1} comes {number}."
        indices = range(1, rng.randint(2, MAX_STEP) + 1)
        return " then".join(f"\n#{n} {rng.randint(0, self.max_total)}" for n in indices)

    def small_sum(self, rng: random.Random, language: str) -> str:
        """A single fact, such as "7 plus 8 is 15"."""
        total, spoken = rng.randint(0, self.max_total), LANGUAGES[language]
        operator, operand = self.operation(rng, total)
        result = APPLY[operator](total, operand)
        return f"{total} {spoken.operators[operator]} {operand} {spoken.equals} {result}"

    # ----------------------------------------------------------------------------- measures

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """How a completion thinks: whether in steps; and, where the task has several languages, in
        which of them: "ko_thinks_in_en" is a share of the Korean questions."""
        thought = thought_of(completion) or ""
        measures = {"in_steps": float("#" in thought)}
        if len(self.languages) > 1:
            spoken = language_of_thought(thought)
            for language in (*self.languages, "both", "none"):
                name = f"{problem.language}_thinks_in_{language}"
                measures[name] = float(language == spoken)
        return measures


def totals(expression: str) -> list[int]:
    """The running totals of a chain, its first number among them."""
    first, *rest = expression.split(" ")
    found = [int(first)]
    for operator, operand in zip(rest[::2], rest[1::2]):
        found.append(APPLY[operator](found[-1], int(operand)))
    return found


def is_held_out(expression: str) -> bool:
    """Whether `expression` belongs to the held-out split. A hash of its signed numbers decides, so
    a chain and its reorderings are in one split, in every language."""
    parts = ["+", *expression.split(" ")]
    signed = sorted(zip(parts[::2], parts[1::2]))
    return zlib.crc32(repr(signed).encode()) % HELD_OUT == 0


def is_for_training(expression: str) -> bool:
    """Whether no chain that the steps of `expression` work out is held out: neither the whole, nor
    two or more operations in a row from a running total that a problem could begin with. A chain
    that merely contains a held-out chain is in neither split."""
    parts, found = expression.split(" "), totals(expression)
    worked_out = (
        " ".join((str(found[i]), *parts[2 * i + 1 : end]))
        for i in range(len(found))
        if 1 <= found[i] <= MAX_OPERAND
        for end in range(2 * i + 5, len(parts) + 1, 2)
    )
    return not (is_held_out(expression) or any(map(is_held_out, worked_out)))


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
