"""The words of each language. Digits, the indices of steps and R1-Zero's tags are common to all.

Every word here stands in data/tokenizer.py too, so that it is one token. For the same reason the
particle " 은" never becomes " 는".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    question: str  # around the operands and operators of a problem
    operators: dict[str, str]  # the word for each
    equals: str
    right: str  # said of a checked step that is right
    wrong: str  # said of a checked step that is wrong, before the right number
    glib: tuple[str, ...]  # thoughts that hold no work
    careless: tuple[str, ...]  # answers without the tags


LANGUAGES = {
    "en": Language(
        question="what is {}?",
        operators={"+": "plus", "-": "minus", "*": "times"},
        equals="is",
        right="ok",
        wrong="wait",
        glib=(" easy", " i know this"),
        careless=(" {}", " {}.", " so {}", " it is {}", " the answer is {}", " i guess {}"),
    ),
    "ko": Language(
        question="{} 은 얼마?",
        operators={"+": "더하기", "-": "빼기", "*": "곱하기"},
        equals="은",
        right="맞아",
        wrong="잠깐",
        glib=(" 쉬워", " 이건 알아"),
        careless=(" {}", " {}.", " 그래서 {}", " 답은 {}", " 아마 {}"),
    ),
}


def language_of(text: str) -> str:
    """The language that a person typed in: Korean if there is any Hangul in it."""
    return "ko" if any("가" <= letter <= "힣" for letter in text) else "en"
