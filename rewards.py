"""Rule-based rewards: functions of the text of a completion, and nothing else.

R1-Zero's reward is accuracy plus format with equal weights (DeepSeek-R1, section 2.2.2). There is
no reward model, so nothing to train and nothing to flatter. A policy still exploits each rule that
is loose. So a rule here gives its point only to what a person would call right, and never looks
inside text that it cannot split.

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
WORD = re.compile(r"[^\W\d_]+")
WORDS_OF = {"en": re.compile("[A-Za-z]+"), "ko": re.compile("[가-힣]+")}
MIN_WORDS = 4  # as in two steps: fewer words are no thought, as in " i know this"


def split_completion(completion: str) -> tuple[list[str], list[str]]:
    """The tags in their order, and the texts before, between and after them: one text more than
    there are tags."""
    pieces = TAG.split(completion)
    return pieces[1::2], pieces[0::2]


def extract_answer(completion: str) -> str | None:
    """The text in the one answer tag, without the space around it; None where there is none.

    The tags must be `<answer></answer>`, alone or after one closed thought. Two answers are a guess
    too many, and an answer within the thought is no answer. Whether the text is right, the task
    says.
    """
    tags, texts = split_completion(completion)
    if tags not in (TAGS, TAGS[2:]):
        return None
    return texts[-2].strip() or None


def accuracy_reward(completion: str, answer: str) -> float:
    """1.0 if the text in the answer tag is `answer`, letter for letter, else 0.0. Never raises."""
    given = extract_answer(completion)
    return float(given is not None and given == answer)


def format_reward(completion: str) -> float:
    """1.0 for `<think>...</think><answer>...</answer>`, else 0.0: each tag once and in this order,
    something in both, only white space before, between and after. Never raises."""
    tags, texts = split_completion(completion)
    if tags != TAGS:
        return 0.0
    before, thought, between, answer, after = (text.strip() for text in texts)
    return float(bool(thought and answer) and not (before or between or after))


def language_consistency_reward(completion: str, language: str) -> float:
    """The share, in [0, 1], of the thought's words that are in `language`, "en" or "ko" (R1's
    supplement, eq. 7). Raises KeyError for another language.

    Digits, operators and tags are no words of any language. A thought that is not there, not first,
    or has fewer than MIN_WORDS words earns 0: to say nothing must not pay.
    """
    in_language = WORDS_OF[language]
    tags, texts = split_completion(completion)
    words = WORD.findall(texts[1]) if tags[:2] == TAGS[:2] else []
    if len(words) < MIN_WORDS:
        return 0.0
    return sum(bool(in_language.fullmatch(word)) for word in words) / len(words)


def is_right(completion: str, problem) -> bool | None:
    """Whether the problem's task finds the answer right; None where it has no rule."""
    given = extract_answer(completion)
    right = problem.is_right(given or "")
    return None if right is None else right and given is not None


def accuracy(completion: str, problem) -> float:
    """1.0 if the answer is right, else 0.0. Raises ValueError for a problem that has no rule:
    nothing could earn this point."""
    right = is_right(completion, problem)
    if right is None:
        reason = f"the task {problem.task} has a problem without a rule"
        raise ValueError(f"{reason}: leave accuracy out of --rewards")
    return float(right)


RULES = {  # what --rewards can weigh: functions of a completion's text and its problem
    "accuracy": accuracy,
    "format": lambda text, problem: format_reward(text),
    "language": lambda text, problem: language_consistency_reward(text, problem.language),
}


def rule_weights(text: str) -> dict[str, float]:
    """Rules by name and their weights, from text such as "accuracy=1,format=0.5". A rule of weight
    0 is logged and pays nothing. Raises ValueError, in one line, for any other text."""
    parts = [part.partition("=") for part in text.split(",")]
    try:
        weights = {name: float(weight) for name, _, weight in parts}
    except ValueError:
        weights = {}
    known = len(weights) == len(parts) and set(weights) <= set(RULES)
    if not known or min(weights.values()) < 0 or not 0 < sum(weights.values()) <= 1e30:
        advice = f"such as accuracy=1,format=0.5, each of {', '.join(RULES)}, not all 0"
        raise ValueError(f"--rewards {text[:80]} must be rules with weights, {advice}")
    return weights
