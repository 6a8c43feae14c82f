"""Rule-based rewards: functions of the text of a completion, and nothing else.

R1-Zero's reward is accuracy plus format with equal weights (DeepSeek-R1, section 2.2.2): no reward model, so nothing
to train and nothing to flatter. A rule is still hacked wherever it is loose, so each rule here gives its point only
to what a person would call right, and never looks inside text it cannot split.

>>> right = "<think> 7 plus 8 is 15</think><answer> 15</answer>"
>>> accuracy_reward(right, "15"), format_reward(right)
(1.0, 1.0)
>>> accuracy_reward("15", "15"), accuracy_reward("<answer>14</answer><answer>15</answer>", "15")
(0.0, 0.0)
>>> format_reward("<think> </think><answer> 15</answer>"), format_reward(right + " I am sure")
(0.0, 0.0)
"""

import re

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TAG = re.compile("(" + "|".join(TAGS) + ")")
NUMBER = re.compile("-?[0-9]+")
WORD = re.compile(r"[^\W\d_]+")
WORDS_OF = {"en": re.compile("[A-Za-z]+"), "ko": re.compile("[가-힣]+")}
MIN_WORDS = 4  # two steps; fewer are no thought in any language, whatever " i know this" says


def split_completion(completion: str) -> tuple[list[str], list[str]]:
    """The tags in their order, and the texts before, between and after them (one more than there are tags)."""
    pieces = TAG.split(completion)
    return pieces[1::2], pieces[0::2]


def extract_answer(completion: str) -> str | None:
    """The number in the one answer tag, without the space around it, or None.

    The tags must be `<answer></answer>`, alone or after one closed thought. Two answers are a guess too many, an
    answer within the thought is no answer, and "14 or 15" is not a number.
    """
    tags, texts = split_completion(completion)
    if tags not in (TAGS, TAGS[2:]):
        return None
    answer = texts[-2].strip()
    return answer if NUMBER.fullmatch(answer) else None


def accuracy_reward(completion: str, answer: str) -> float:
    """1.0 if the number in the answer tag is `answer`, digit for digit, else 0.0. Never raises."""
    return float(extract_answer(completion) == answer)


def format_reward(completion: str) -> float:
    """1.0 for `<think>...</think><answer>...</answer>`: each tag once, in this order, something in both, nothing but
    white space before, between and after; else 0.0. Never raises."""
    tags, texts = split_completion(completion)
    if tags != TAGS:
        return 0.0
    before, thought, between, answer, after = (text.strip() for text in texts)
    return float(bool(thought and answer) and not (before or between or after))


def language_consistency_reward(completion: str, language: str) -> float:
    """The share, in [0, 1], of the words of the thought that are in `language`, "en" or "ko" (R1's supplement, eq. 7).

    Digits, operators and tags are no words of any language. A thought that is not there, not first, or has hardly a
    word earns 0: to say nothing must not pay. Raises KeyError for another language.
    """
    in_language = WORDS_OF[language]
    tags, texts = split_completion(completion)
    words = WORD.findall(texts[1]) if tags[:2] == TAGS[:2] else []
    if len(words) < MIN_WORDS:
        return 0.0
    return sum(bool(in_language.fullmatch(word)) for word in words) / len(words)
