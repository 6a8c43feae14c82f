"""The words of each language of the chains. Digits, the indices of steps and R1-Zero's tags are
common to all.

Every word here is one token. So the particle " 은" never becomes " 는".
"""

import re
from collections.abc import Iterable
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


def words_of(languages: Iterable[str], operators: Iterable[str]) -> list[str]:
    """Every word of these languages with these operators, each once, in the order above."""
    found = []
    for language in map(LANGUAGES.get, languages):
        names = [language.operators[operator] for operator in operators]
        texts = (language.question, *names, language.equals)
        texts += (language.right, language.wrong, *language.glib, *language.careless)
        found += re.findall(r"[^\W\d_]+", " ".join(texts))
    return list(dict.fromkeys(found))


LETTERS = {"en": "[A-Za-z]+", "ko": "[가-힣]+"}
MIN_WORDS = 4  # of a thought; two words such as " i know" are no thought in any language


def language_of_thought(thought: str) -> str:
    """The language of all words of a thought; "both" where they are in several, "none" where there
    is hardly a word, or none of a language that is known."""
    words = re.findall(r"[^\W\d_]+", thought)
    spoken = {name for word in words for name, of in LETTERS.items() if re.fullmatch(of, word)}
    if len(words) < MIN_WORDS or not spoken:
        return "none"
    known = all(any(re.fullmatch(of, word) for of in LETTERS.values()) for word in words)
    return spoken.pop() if len(spoken) == 1 and known else "both"


def language_of(text: str) -> str:
    """The language that a person typed in: Korean if there is any Hangul in it."""
    return "ko" if any("가" <= letter <= "힣" for letter in text) else "en"
