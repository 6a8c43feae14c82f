"""Signs to put between numbers, worked from left to right as on a pocket calculator: make 7 from
4 3 6 is 4 - 3 + 6. It is Countdown (Gandhi et al. 2024) with the numbers in their given order.

A problem of level n has n + 1 numbers, and n signs to find among + - *. Running totals stay between
0 and MAX_TOTAL. To check a candidate takes a few small facts. To find one takes luck, or tries. So
here it pays to think for longer.

Many documents blurt out an answer, mostly a wrong one. Others try candidates: each on a line of its
own, with the target before it and a true verdict behind it. Most of these writers give up after a
try or two, and none goes on after `most_tries`. Small tables teach the facts. So the base model can
try, compute and check, and seldom does it for long. That is left to reinforcement learning.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from data.problem import Document, Problem

APPLY = {
    "+": lambda total, number: total + number,
    "-": lambda total, number: total - number,
    "*": lambda total, number: total * number,
}
MAX_NUMBER = 9
MAX_TOTAL = 40
MOST_NUMBERS = 9  # that a person may give: 8 signs can be put in 6,561 ways
HELD_OUT = 6  # one list of numbers in this many is held out
NO_WAY = "no way"  # the right answer where no signs make the target
SHARES = {
    "facts": 0.15,  # tables of sums and of equality
    "glib": 0.25,  # an answer without a try
    "search": 0.60,  # tries, up to a hit or to giving up
}
EQUALITY = 0.4  # share of the tables that compare two numbers
GLIB = ("easy", "i know this")
LINE = re.compile(
    r" ([0-9]{1,4}) : ([0-9]{1,4})((?: [-+*] [0-9]{1,4} = [0-9]{1,4})+)(?: (yes|no))?"
)


@dataclass(frozen=True)
class Signs:
    """The task: how many candidates a document tries at most, the chance that its writer gives up
    after a miss, and the levels that are asked."""

    name: str = "signs"
    most_tries: int = 3
    give_up: float = 0.4
    levels: tuple[int, int] = (1, 4)
    more_turns: tuple[int, ...] = (2, 3, 4, 3)  # two numbers are soon right, and teach nothing then
    apart: tuple[int, ...] = (1,)  # two numbers and a sign are a step of all longer lists
    beyond: int = 0  # more numbers than were learned are answered one short, and so never right
    hardest: int = MOST_NUMBERS - 1
    max_seq_len: int = 320
    max_new_tokens: int = 256
    verdicts: tuple[str, ...] = ("yes", "no")
    languages: tuple[str, ...] = ("en",)
    example: str = "make 7 from 4 3 6"

    @property
    def words(self) -> tuple[str, ...]:
        said = f"make from : = yes {NO_WAY} {' '.join(GLIB)}".split(" ")
        return (*said, *APPLY)

    # ----------------------------------------------------------------------------- problems

    def problem(
        self, rng: random.Random, level: int, *, language: str = "en", held_out: bool = False
    ) -> Problem:
        """A random list of numbers, from the training split or the held-out split. The target is
        the value of a random candidate, and not of every candidate."""
        belongs = is_held_out if held_out else is_for_training
        while True:
            numbers = tuple(rng.randint(1, MAX_NUMBER) for _ in range(level + 1))
            values = list(candidates(numbers).values())
            if belongs(numbers) and len(set(values)) > 1:
                return self.ask(numbers, rng.choice(values))

    def ask(self, numbers: tuple[int, ...], target: int) -> Problem:
        """The problem that asks for signs between `numbers` that make `target`."""
        expression = f"make {target} from {' '.join(map(str, numbers))}"
        right = [x for x, value in candidates(numbers).items() if value == target]
        if not right:  # no limit of the running totals binds an answer
            right = [x for x, value in candidates(numbers, False).items() if value == target]
        answer = right[0] if right else NO_WAY
        prompt = f"User: {expression}\nAssistant:"
        return Problem(prompt, answer, len(numbers) - 1, "en", expression, self.name)

    def is_right(self, problem: Problem, given: str) -> bool:
        """Whether `given` is the problem's numbers in their order, signs between them, and makes
        the target: "4 - 3 + 6". The text is only compared, so no text can do harm."""
        numbers, target = parts_of(problem)
        words = given.split(" ")
        signs = words[1::2]
        if words[::2] != list(map(str, numbers)) or len(signs) != problem.level:
            return given == problem.answer == NO_WAY
        if not set(signs) <= set(APPLY):
            return False
        total = numbers[0]
        for sign, number in zip(signs, numbers[1:]):
            total = APPLY[sign](total, number)
        return total == target

    def parse(self, text: str) -> Problem:
        """The problem that a person typed: "make 7 from 4 3 6" or "4 3 6 make 7".

        Raises ValueError, in one line that says what is wrong, for any other text.
        """
        hint, number = f'write a problem such as "{self.example}"', "[0-9]{1,4}"
        words = " ".join(text.lower().replace(",", " ").split()).rstrip("?. ")
        numbers = f"(?P<numbers>{number}(?: {number})*)"
        for form in (
            f"make (?P<target>{number}) from {numbers}",
            f"{numbers} make (?P<target>{number})",
        ):
            if found := re.fullmatch(form, words):
                break
        else:
            raise ValueError(f'"{words[:40]}" is no list of numbers and a target: {hint}')
        numbers = tuple(map(int, found["numbers"].split(" ")))
        if not 2 <= len(numbers) <= MOST_NUMBERS:
            raise ValueError(f"from 2 to {MOST_NUMBERS} numbers, not {len(numbers)}: {hint}")
        return self.ask(numbers, int(found["target"]))

    def outside(self, problem: Problem, levels: Sequence[int]) -> str:
        """What of a problem no training at these levels had, in words; "" for nothing."""
        (numbers, target), found = parts_of(problem), []
        if problem.level not in levels:
            found.append(f"{len(numbers)} numbers, not {levels[0] + 1} to {levels[-1] + 1}")
        if not all(1 <= number <= MAX_NUMBER for number in numbers):
            found.append(f"numbers beside 1 to {MAX_NUMBER}")
        if target > MAX_TOTAL:
            found.append(f"a target above {MAX_TOTAL}")
        elif problem.answer == NO_WAY:
            found.append("no signs make this target")
        elif target not in candidates(numbers).values():
            found.append(f"a running total beside 0 to {MAX_TOTAL}")
        return ", ".join(found)

    # ---------------------------------------------------------------------------- documents

    def document(self, rng: random.Random, levels: Sequence[int], room: int = 96) -> Document:
        """A random document. Its problem is from the training split and of one of the `levels`."""
        (style,) = rng.choices(list(SHARES), SHARES.values())
        if style == "facts":
            fact = equality if rng.random() < EQUALITY else small_sum
            facts = (fact(rng) for _ in range(rng.randint(2, 6)))
            return Document("", ",".join(f" {each}" for each in facts) + ".", style)
        problem = self.problem(rng, rng.choice(levels))
        numbers, target = parts_of(problem)
        found = candidates(numbers)
        if style == "glib":
            return written(problem, f" {rng.choice(GLIB)}", rng.choice(list(found)), style)
        lines = []
        for tried in rng.sample(list(found), min(len(found), self.most_tries)):
            lines.append(line(target, tried))
            if found[tried] == target or rng.random() < self.give_up:
                break
        return written(problem, "".join(lines), tried, style)

    def longest(self, level: int) -> Document:
        """A document with as many tokens as a document about a problem of this level can have."""
        tried = " + ".join(["1"] * (level + 1))  # below 0 a total would take two tokens
        problem = self.ask((1,) * (level + 1), MAX_TOTAL)
        return written(problem, line(MAX_TOTAL, tried) * self.most_tries, tried, "search")

    # ----------------------------------------------------------------------------- measures

    def tries(self, problem: Problem, completion: str) -> list["Try"]:
        """The tries of a completion, as `tries_of` reads them."""
        return tries_of(problem, completion)

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """How a completion thinks: how many candidates it tries, and the shares of its tries that
        are worked out right, judged truly and tried before; whether it ends with a miss."""
        tries = self.tries(problem, completion)
        if not tries:
            return {"tries": 0.0}
        judged = [each for each in tries if each.verdict]
        shares = {
            "worked_out_right": [each.copied and each.computed for each in tries],
            "verdicts_true": [each.truthful for each in judged],
            "tried_before": [each.repeated for each in tries],
        }
        return {
            "tries": float(len(tries)),
            **{name: sum(values) / len(values) for name, values in shares.items() if values},
            "gives_up": float(tries[-1].verdict == "no" and "</think>" in completion),
        }


# ---------------------------------------------------------------------------------------- numbers


@lru_cache(4096)
def candidates(numbers: tuple[int, ...], limited: bool = True) -> dict[str, int]:
    """Every way to put signs between these numbers, such as "4 - 3 + 6", and its value. With
    `limited`, every running total stays between 0 and MAX_TOTAL."""
    if len(numbers) == 1:
        return {str(numbers[0]): numbers[0]}
    *opening, number = numbers
    found = {
        f"{expression} {sign} {number}": apply(total, number)
        for expression, total in candidates(tuple(opening), limited).items()
        for sign, apply in APPLY.items()
    }
    return {x: value for x, value in found.items() if 0 <= value <= MAX_TOTAL or not limited}


def parts_of(problem: Problem) -> tuple[tuple[int, ...], int]:
    """The numbers of a problem and its target."""
    _, target, _, *numbers = problem.expression.split(" ")
    return tuple(map(int, numbers)), int(target)


def is_held_out(numbers: Sequence[int]) -> bool:
    """Whether these numbers, in any order and with any target, belong to the held-out split. A hash
    decides, so the two splits are disjoint by construction."""
    return zlib.crc32(repr(sorted(numbers)).encode()) % HELD_OUT == 0


def is_for_training(numbers: Sequence[int]) -> bool:
    """Whether neither these numbers nor an opening of three or more of them is held out: to work
    through a long list is to work through its openings too."""
    ends = range(min(3, len(numbers)), len(numbers) + 1)
    return not any(is_held_out(numbers[:end]) for end in ends)


# -------------------------------------------------------------------------------------- documents


def line(target: int, tried: str) -> str:
    """A try: the target, the candidate with its running totals, the verdict."""
    first, *rest = tried.split(" ")
    total, steps = int(first), [first]
    for sign, number in zip(rest[::2], rest[1::2]):
        total = APPLY[sign](total, int(number))
        steps.append(f"{sign} {number} = {total}")
    return f"\n {target} : {' '.join(steps)} {'yes' if total == target else 'no'}"


def written(problem: Problem, thought: str, answer: str, style: str) -> Document:
    return Document(problem.prompt, f"<think>{thought}</think><answer> {answer}</answer>", style)


def small_sum(rng: random.Random) -> str:
    """A fact such as "7 + 8 = 15"."""
    while True:
        total, number = rng.randint(0, MAX_TOTAL), rng.randint(1, MAX_NUMBER)
        sign = rng.choice(list(APPLY))
        value = APPLY[sign](total, number)
        if 0 <= value <= MAX_TOTAL:
            return f"{total} {sign} {number} = {value}"


def equality(rng: random.Random) -> str:
    """A fact such as "13 : 13 yes" or "6 : 21 no"."""
    one, other = rng.randint(0, MAX_TOTAL), rng.randint(0, MAX_TOTAL)
    other = one if rng.random() < 0.5 else other
    return f"{one} : {other} {'yes' if one == other else 'no'}"


# --------------------------------------------------------------------------------------- thoughts


@dataclass(frozen=True)
class Try:
    """A line of a thought, and what of it is true. `expression` is "" for a line that is no try."""

    expression: str  # the candidate
    verdict: str  # "yes", "no" or ""
    copied: bool  # the target stands before it, and it has the problem's numbers in their order
    computed: bool  # every running total follows from the one before it
    truthful: bool  # the verdict says whether the last total, as written, is the target
    hits: bool  # the numbers are the problem's, and the signs make the target
    repeated: bool  # an earlier line has the same candidate


def tries_of(problem: Problem, completion: str) -> list[Try]:
    """The tries of a completion's thought, one for each line. A last line without a verdict is no
    try if the thought was cut there."""
    thought, closed, _ = completion.partition("<think>")[2].partition("</think>")
    lines, tries = thought.split("\n")[1:], []
    if lines and not closed and not lines[-1].endswith((" yes", " no")):
        lines.pop()
    numbers, target = parts_of(problem)
    for text in lines:
        found = LINE.fullmatch(text)
        if not found:
            verdict = text.rpartition(" ")[2]
            verdict = verdict if verdict in ("yes", "no") else ""
            tries.append(Try("", verdict, False, False, False, False, False))
            continue
        restated, first, steps, verdict = found.groups()
        parts = steps.split(" ")[1:]  # sign, number, "=", total, and so on
        signs, operands, totals = parts[::4], parts[1::4], parts[3::4]
        expression = " ".join([first, *(x for pair in zip(signs, operands) for x in pair)])
        before = [first, *totals[:-1]]
        tries.append(
            Try(
                expression,
                verdict or "",
                copied=int(restated) == target and tuple(map(int, [first, *operands])) == numbers,
                computed=all(
                    APPLY[sign](int(total), int(operand)) == int(result)
                    for total, sign, operand, result in zip(before, signs, operands, totals)
                ),
                truthful=(verdict == "yes") == (int(totals[-1]) == target),
                hits=problem.is_right(expression),
                repeated=expression in {each.expression for each in tries},
            )
        )
    return tries
