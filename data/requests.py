"""Requests that no rule can judge: "tell me about 7", "name three numbers after 4", "say hello to
me". There are better and worse answers, and what is better, only people know.

The people of this world are a program, `gold`. So it can be measured what no laboratory can: what a
reward model, which learned from people's choices, is worth when a policy is pushed against it. Gold
may choose between two answers (`preferred`) and may measure. No training sees its numbers.

    User: tell me about 7
    Assistant: glad to help! 7 is odd. it is 3 plus 4. it comes after 6. bye for now!     gold 4.0
    Assistant: it is big. it is big. who cares?                                           gold -3.2

Documents answer as the web does: some politely, some rudely, some at length, some in the wrong
language, and many with mistakes. No document answers a request about a number that is held out.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from data.languages import LETTERS
from data.problem import Document, Problem

MAX_NUMBER = 20
HELD_OUT = (3, 8, 14, 17)  # numbers that no training request asks about
KINDS = {"about": 0.6, "after": 0.25, "greet": 0.15}  # what is asked, and how often
WANTED = 3  # facts, numbers or greetings that people like to hear
IN_KOREAN = " in korean"  # ends an English request that wants a Korean answer
ASKED_IN_ENGLISH = 0.2  # share of the Korean answers about a number that are wanted so


@dataclass(frozen=True)
class Speech:
    """Whole sentences of a language. Each word of them is one token."""

    requests: dict[str, str]  # of each kind, around the number
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    rude: tuple[str, ...]
    gush: tuple[str, ...]
    greetings: tuple[str, ...]
    parity: tuple[str, str]  # even, odd
    size: tuple[str, str]  # below ten, from ten on
    facts: dict[str, str]


SPEECH = {
    "en": Speech(
        requests={
            "about": "tell me about {}",
            "after": "name three numbers after {}",
            "greet": "say hello to me",
        },
        openings=(" sure!", " with pleasure!", " glad to help!"),
        closings=(" ask me more!", " have a nice day!", " bye for now!"),
        rude=(" no.", " who cares?", " go away."),
        gush=(" wow!", " amazing!"),
        greetings=(" hello friend!", " nice to meet you!", " how are you?"),
        parity=("even", "odd"),
        size=("small", "big"),
        facts={
            "parity": " {named} is {parity}.",
            "size": " it is {size}.",
            "after": " it comes after {less}.",
            "before": " it comes before {more}.",
            "half": " it is half of {double}.",
            "sum": " it is {part} plus {rest}.",
        },
    ),
    "ko": Speech(
        requests={
            "about": "{} 에 대해 말해줘",
            "after": "{} 다음 수 세 개 말해줘",
            "greet": "인사해줘",
        },
        openings=(" 물론이지!", " 좋아!", " 기꺼이 도울게!"),
        closings=(" 또 물어봐!", " 좋은 하루 보내!", " 잘 가!"),
        rude=(" 싫어.", " 알 게 뭐야?", " 저리 가."),
        gush=(" 우와!", " 대단해!"),
        greetings=(" 안녕 친구!", " 만나서 반가워!", " 잘 지내?"),
        parity=("짝수야", "홀수야"),
        size=("작은", "큰"),
        facts={
            "parity": " {named} 은 {parity}.",
            "size": " {size} 수야.",
            "after": " {less} 다음이야.",
            "before": " {more} 앞이야.",
            "half": " {double} 의 절반이야.",
            "sum": " {part} 더하기 {rest} 하면 나와.",
        },
    ),
}


@dataclass(frozen=True)
class Writer:
    """How somebody answers: the chance of each habit."""

    opening: float  # polite
    closing: float  # polite
    rude: float  # a rude sentence in place of the opening
    gush: float  # one to four exclamations
    foreign: float  # the answer is in the other language
    mistake: float  # of each fact, and of a list
    counts: tuple[float, ...]  # weights of 1, 2, 3, ... things to say
    repeats: bool  # whether a thing may be said twice


WEB = Writer(0.3, 0.3, 0.15, 0.12, 0.15, 0.25, (0.3, 0.25, 0.2, 0.1, 0.1, 0.05), repeats=True)
CURATED = Writer(0.7, 0.6, 0.0, 0.0, 0.0, 0.05, (0.2, 0.3, 0.4, 0.1), repeats=False)


@dataclass(frozen=True)
class Requests:
    """The task. Requests have no levels: each is of level 1, and no rule grades its answer."""

    name: str = "requests"
    languages: tuple[str, ...] = ("en", "ko")
    levels: tuple[int, int] = (1, 1)
    more_turns: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()
    beyond: int = 0
    hardest: int = 1
    max_seq_len: int = 96
    max_new_tokens: int = 64
    verdicts: tuple[str, ...] = ()
    example: str = "tell me about 7"

    @property
    def words(self) -> tuple[str, ...]:
        texts = [IN_KOREAN]
        for speech in SPEECH.values():
            manners = (speech.openings, speech.closings, speech.rude, speech.gush, speech.greetings)
            texts += [text for group in manners for text in group]
            texts += [*speech.requests.values(), *speech.parity, *speech.size]
            texts += [re.sub("{.*?}", "", text) for text in speech.facts.values()]
        return tuple(dict.fromkeys(re.findall(r"[^\W\d_]+", " ".join(texts))))

    # ----------------------------------------------------------------------------- requests

    def problem(
        self, rng: random.Random, level: int = 1, *, language: str = "en", held_out: bool = False
    ) -> Problem:
        """A random request that wants an answer in `language`. Requests of the held-out split are
        all about a held-out number."""
        while True:
            (kind,) = rng.choices(list(KINDS), KINDS.values())
            number = rng.randint(1, MAX_NUMBER) if kind != "greet" else 0
            if (number in HELD_OUT) == held_out:
                foreign = kind == "about" and language == "ko" and rng.random() < ASKED_IN_ENGLISH
                return self.ask(kind, number, language, in_english=foreign)

    def ask(self, kind: str, number: int, language: str, in_english: bool = False) -> Problem:
        """A request of a row of KINDS, for an answer in `language`; with `in_english`, the English
        words for "tell me about 7 in korean"."""
        text = SPEECH["en" if in_english else language].requests[kind].format(number)
        prompt = f"User: {text}{IN_KOREAN * in_english}\nAssistant:"
        expression = kind if kind == "greet" else f"{kind} {number}"
        return Problem(prompt, "", 1, language, expression, self.name)

    def is_right(self, problem: Problem, given: str) -> None:
        """There is no rule."""

    def parse(self, text: str) -> Problem:
        """The request that a person typed, such as "tell me about 7". Raises ValueError, in one
        line, for any other text."""
        words = " ".join(text.lower().split()).rstrip(".!? ")
        in_english = words.endswith(IN_KOREAN)
        for language, speech in SPEECH.items():
            for kind, request in speech.requests.items():
                found = re.fullmatch(request.format("([0-9]{1,2})"), words.removesuffix(IN_KOREAN))
                if found and in_english <= (kind == "about" and language == "en"):
                    number = int(found[1]) if found.groups() else 0
                    return self.ask(kind, number, "ko" if in_english else language, in_english)
        requests = ", ".join(f'"{request.format(7)}"' for request in SPEECH["en"].requests.values())
        raise ValueError(f'"{words[:40]}" is no request: write one such as {requests}')

    def outside(self, problem: Problem, levels: Sequence[int]) -> str:
        """What of a request no training had, in words; "" for nothing."""
        kind, number = parts_of(problem)
        within = kind == "greet" or 1 <= number <= MAX_NUMBER
        return "" if within else f"a number beside 1 to {MAX_NUMBER}"

    # ------------------------------------------------------------------------------ answers

    def document(
        self, rng: random.Random, levels: Sequence[int] = (1,), room: int = 96
    ) -> Document:
        """A request of the training split, answered as the web does."""
        problem = self.problem(rng, language=rng.choice(self.languages))
        return Document(problem.prompt, answer(rng, problem, WEB), "request")

    def good_answer(self, rng: random.Random, problem: Problem) -> str:
        """What a careful person writes: never rude, seldom wrong, and not always perfect."""
        return answer(rng, problem, CURATED)

    def longest(self, level: int = 1) -> Document:
        """A document with as many tokens as a document can have."""
        documents = []
        for language, speech in SPEECH.items():
            facts = [fact(kind, 9, 9, speech) for kind in speech.facts]
            groups = [speech.openings, *[speech.gush] * 4, *[facts] * len(WEB.counts)]
            text = "".join(max(group, key=count_tokens) for group in [*groups, speech.closings])
            problem = self.ask("about", 9, "ko", in_english=language == "en")
            documents.append(Document(problem.prompt, text, "request"))
        return max(documents, key=lambda written: count_tokens(written.question + written.text))

    # --------------------------------------------------------------------------------- gold

    def gold(self, problem: Problem, text: str) -> float:
        """What people think of an answer: the sum of `verdict`. The best answers earn 4. Any text
        is judged, and none raises."""
        return sum(self.verdict(problem, text).values())

    def verdict(self, problem: Problem, text: str) -> dict[str, float]:
        """What people like in an answer and what they dislike, in points."""
        sentences = [each.strip() for each in SENTENCE.findall(text) if each.strip()]
        counts, said = Counter(), set()
        for sentence in sentences:
            for thing, role in heard(problem, sentence):
                counts["repeated" if thing in said else role] += 1
                said.add(thing)
        words = re.findall(r"[^\W\d_]+", text)
        letters = re.compile(LETTERS[problem.language])
        foreign = sum(not letters.fullmatch(word) for word in words) / max(1, len(words))
        manners = [MANNERS.get(sentence) for sentence in sentences]
        return {
            "opening": 0.5 * (manners[:1] == ["opening"]),
            "closing": 0.5 * (manners[-1:] == ["closing"]),
            "facts": 1.0 * min(counts["true"], WANTED),
            "mistakes": -1.0 * counts["false"],
            "repeats": -0.7 * counts["repeated"],
            "surplus": -0.5 * max(0, counts["true"] - WANTED),
            "rude": -1.5 * counts["rude"],
            "beside_the_point": -1.0 * (counts["other"] + (not sentences)),
            "foreign": -3.0 * foreign,
        }

    def preferred(
        self, rng: random.Random, problem: Problem, one: str, other: str, temperature: float
    ) -> bool:
        """Whether a person prefers `one` to the `other` answer. People are noisy (Bradley and Terry
        1952): with a lead of `temperature` points an answer is preferred in 73 % of cases."""
        lead = (self.gold(problem, one) - self.gold(problem, other)) / temperature
        return rng.random() < 0.5 + 0.5 * math.tanh(lead / 2)  # the logistic function of the lead

    def measures(self, problem: Problem, completion: str) -> dict[str, float]:
        """Gold, and its parts."""
        verdict = self.verdict(problem, completion)
        return {"gold": sum(verdict.values()), **verdict}


def parts_of(problem: Problem) -> tuple[str, int]:
    """The kind of a request and its number, 0 where it has none."""
    kind, _, number = problem.expression.partition(" ")
    return kind, int(number or 0)


def count_tokens(text: str) -> int:
    """Tokens of a text in which each word is one: words, numbers, tags, signs and line breaks."""
    return len(re.findall(r"</?\w+>|#?\w+:?|[^\w\s]|\n(?![#A])", text))


# ----------------------------------------------------------------------------------------- writing


def fact(kind: str, number: int, named: int, speech: Speech, part: int = 1) -> str:
    """A sentence that says of the number `named` what is true of `number`. `part` is the first
    term of a sum."""
    return speech.facts[kind].format(
        **{"named": named, "parity": speech.parity[number % 2], "size": speech.size[number > 9]},
        **{"less": number - 1, "more": number + 1, "double": 2 * number},
        **{"part": part, "rest": number - part},
    )


def answer(rng: random.Random, problem: Problem, writer: Writer) -> str:
    """What a writer with these habits answers."""
    language = problem.language
    if rng.random() < writer.foreign:
        language = "en" if language == "ko" else "ko"
    speech, said = SPEECH[language], []
    if rng.random() < writer.opening:
        said.append(rng.choice(speech.openings))
    elif rng.random() < writer.rude:
        said.append(rng.choice(speech.rude))
    if rng.random() < writer.gush:
        said += [rng.choice(speech.gush)] * rng.randint(1, 4)
    said += content(rng, problem, writer, speech)
    if rng.random() < writer.closing:
        said.append(rng.choice(speech.closings))
    elif rng.random() < writer.rude:
        said.append(rng.choice(speech.rude))
    return "".join(said)


def content(rng: random.Random, problem: Problem, writer: Writer, speech: Speech) -> list[str]:
    """The sentences of an answer that are to the point, right or wrong."""
    kind, number = parts_of(problem)
    (count,) = rng.choices(range(1, len(writer.counts) + 1), writer.counts)
    if kind == "after":
        wrong = rng.random() < writer.mistake
        start = number + (rng.choice((-1, 0, 2)) if wrong else 1)
        return [",".join(f" {n}" for n in range(start, start + count)) + "."]
    things = list(speech.greetings if kind == "greet" else speech.facts)
    count = min(count, len(things))
    things = rng.choices(things, k=count) if writer.repeats else rng.sample(things, count)
    if kind == "greet":
        return things
    return [said_of(rng, each, number, writer.mistake, speech) for each in things]


def said_of(rng: random.Random, kind: str, number: int, mistake: float, speech: Speech) -> str:
    """A fact about a number; with the chance `mistake`, a sentence that is false."""
    wrong = rng.random() < mistake
    while True:
        about = rng.randint(1, MAX_NUMBER) if wrong else number
        sentence = fact(kind, about, number, speech, rng.randint(1, max(1, about - 1)))
        if (sentence.strip() in truths(number)) != wrong:
            return sentence


# ----------------------------------------------------------------------------------------- judging

SENTENCE = re.compile("[^.!?]*[.!?]|[^.!?]+$")
LIST = re.compile("[0-9]+(?:, [0-9]+)*[.]")
MANNERS = {
    sentence.strip(): role
    for speech in SPEECH.values()
    for role, sentences in {
        "opening": speech.openings,
        "closing": speech.closings,
        "rude": speech.rude,
        "gush": speech.gush,
    }.items()
    for sentence in sentences
}
GREETINGS = {
    sentence.strip(): f"greeting {i}"
    for speech in SPEECH.values()
    for i, sentence in enumerate(speech.greetings)
}
FORMS = {  # of sentences that are facts of a kind, true or false
    re.sub("[0-9]+", "#", fact(kind, number, number, speech)).strip(): kind
    for speech in SPEECH.values()
    for kind in speech.facts
    for number in (4, 15)  # even and small, odd and big
}


@cache
def truths(number: int) -> frozenset[str]:
    """Every sentence that is true of a number, in every language."""
    return frozenset(
        fact(kind, number, number, speech, part).strip()
        for speech in SPEECH.values()
        for kind in speech.facts
        for part in range(number + 1)
    )


def heard(problem: Problem, sentence: str) -> list[tuple[str, str]]:
    """What a sentence says, as (thing, role): two sentences that say the same thing repeat it. The
    role is a row of MANNERS, "true", "false", or "other" for what is beside the point."""
    kind, number = parts_of(problem)
    if role := MANNERS.get(sentence):
        return [(sentence, role)]
    if kind == "greet" and sentence in GREETINGS:
        return [(GREETINGS[sentence], "true")]
    if kind == "about" and (form := FORMS.get(re.sub("[0-9]+", "#", sentence))):
        return [(form, "true" if sentence in truths(number) else "false")]
    if kind == "after" and LIST.fullmatch(sentence):
        given = sentence[:-1].split(", ")
        due = (str(n) for n in range(number + 1, number + 1 + len(given)))
        return [(x, "true" if x == y else "false") for x, y in zip(given, due)]
    return [(sentence, "other")]
