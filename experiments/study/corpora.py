"""The web of signs, written otherwise: what must documents show for thoughts to grow?

    signs-end        the target stands behind the last total: 4 - 3 + 6 is "= 7 : 7 yes"
    signs-bare       the target is not restated: to check, one has to look back at the question
    signs-shuffled   a verdict is drawn by chance, and so is where a thought ends

An import of this module adds them to data.TASKS: `python -m experiments.study.variations told
--task signs-bare` trains on one. Thoughts are read in the form of signs, whatever form they have.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data import TASKS
from data.problem import Document, Problem
from data.signs import Signs, Try, candidates, line, parts_of, written

AT_HEAD = "{target} : {tried} {verdict}"
PARTS = {
    "target": "(?P<target>[0-9]+)",
    "tried": "(?P<tried>[0-9]+(?: [-+*] [0-9]+ = [0-9]+)+)",
    "verdict": "(?P<verdict>yes|no)",
}


def rewritten(text: str, old: str, new: str, **known: object) -> str:
    """The text with each of its tries in the form `new` in place of `old`. What `old` does not say
    is `known`."""

    def say(found: re.Match) -> str:
        return " " + new.format(**known | found.groupdict())

    pattern = rf"^ {old.format(**PARTS)}(?=$|</think>)"
    return re.sub(pattern, say, text, flags=re.MULTILINE)


@dataclass(frozen=True)
class OtherForm(Signs):
    """Signs whose documents write a try in another form."""

    form: str = AT_HEAD

    def document(self, rng: random.Random, levels: Sequence[int], room: int = 96) -> Document:
        found = super().document(rng, levels, room)
        return replace(found, text=rewritten(found.text, AT_HEAD, self.form))

    def tries(self, problem: Problem, completion: str) -> list[Try]:
        _, target = parts_of(problem)
        return super().tries(problem, rewritten(completion, self.form, AT_HEAD, target=target))


@dataclass(frozen=True)
class Shuffled(Signs):
    """Signs whose documents say "yes" by chance: behind a try as behind two numbers in a table."""

    said_yes: float = 0.2  # about as often as tries of two to five numbers hit

    def document(self, rng: random.Random, levels: Sequence[int], room: int = 96) -> Document:
        found = super().document(rng, levels, room)
        if found.style == "facts":
            by_chance = re.sub("yes|no", lambda _: rng.choice(("yes", "no")), found.text)
            return replace(found, text=by_chance)
        if found.style != "search":
            return found
        problem = self.parse(found.question.removeprefix("User: ").partition("\n")[0])
        (numbers, target), lines = parts_of(problem), []
        ways = list(candidates(numbers))
        for tried in rng.sample(ways, min(len(ways), self.most_tries)):
            verdict = "yes" if rng.random() < self.said_yes else "no"
            lines.append(f"{line(target, tried).rpartition(' ')[0]} {verdict}")
            if verdict == "yes" or rng.random() < self.give_up:
                break
        return written(problem, "".join(lines), tried, "search")


OTHERS = (
    OtherForm("signs-end", form="{tried} : {target} {verdict}"),
    OtherForm("signs-bare", form="{tried} {verdict}"),
    Shuffled("signs-shuffled"),
)
TASKS |= {task.name: task for task in OTHERS}
