"""The rules, against what people have tried on such rules, and against a second parser."""

import doctest
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from data import TASKS
from data.problem import Problem
from rewards import (
    RULES,
    accuracy_reward,
    extract_answer,
    format_reward,
    language_consistency_reward,
    rule_weights,
)

GOOD = "<think> 7 plus 8 is 15</think><answer> 15</answer>"

# (completion, accuracy for the answer 15, format)
CASES = [
    (GOOD, 1, 1),
    ("<think>\n#1 7 plus 8 is 15</think>\n<answer>15</answer>\n", 1, 1),
    ("  <think>x</think> <answer>\t15\n</answer>", 1, 1),
    ("<think> let me see</think><answer> 14</answer>", 0, 1),
    ("<answer> 15</answer>", 1, 0),  # no thought
    ("so <answer> 15</answer>", 1, 0),
    ("<think></think><answer> 15</answer>", 1, 0),  # an empty one
    ("<think> \n </think><answer> 15</answer>", 1, 0),
    (GOOD + " or 16", 1, 0),  # words after the answer
    ("hello " + GOOD, 1, 0),
    ("<think> 15</think> hm <answer> 15</answer>", 1, 0),
    ("15", 0, 0),  # no tags
    ("<think> 15</think> 15", 0, 0),
    ("", 0, 0),
    ("<think> 15</think><answer></answer>", 0, 0),  # no answer
    ("<think> 15</think><answer> 15", 0, 0),  # cut
    ("<think> 15<answer> 15</answer>", 0, 0),  # a thought that never ends
    ("<think> hm <answer> 15</answer></think>", 0, 0),  # an answer within the thought
    ("<answer><think> hm</think> 15</answer>", 0, 0),  # a thought within the answer
    ("<answer> 15</answer><think> hm</think>", 0, 0),  # the wrong way round
    ("<answer> 14</answer><answer> 15</answer>", 0, 0),  # two guesses
    ("<think> x</think><answer> 14</answer><answer> 15</answer>", 0, 0),
    ("<think> x</think><think> y</think><answer> 15</answer>", 0, 0),  # thinking again
    ("<think> x</think><answer> 15</answer></answer>", 0, 0),
    ("</think><think><answer> 15</answer>", 0, 0),
    ("<think> x</think><answer> 14 or 15</answer>", 0, 1),  # several numbers
    ("<think> x</think><answer> 14 15</answer>", 0, 1),
    ("<think> x</think><answer> 15.</answer>", 0, 1),
    ("<think> x</think><answer> 15.0</answer>", 0, 1),
    ("<think> x</think><answer> 015</answer>", 0, 1),
    ("<think> x</think><answer> +15</answer>", 0, 1),
    ("<think> x</think><answer> 7 plus 8</answer>", 0, 1),  # the question for an answer
    ("<think> x</think><answer> 1 5</answer>", 0, 1),
    ("<think> x</think><answer> １５</answer>", 0, 1),  # digits of another script
    ("<think> x</think><answer> 115</answer>", 0, 1),  # the right digits within others
    ("<think> x</think><answer> --15</answer>", 0, 1),
    ("<Think> x</Think><Answer> 15</Answer>", 0, 0),
    ("<think > x</think><answer> 15</answer>", 0, 0),
]


@pytest.mark.parametrize(("completion", "accuracy", "form"), CASES)
def test_rules(completion, accuracy, form):
    assert accuracy_reward(completion, "15") == accuracy
    assert format_reward(completion) == form


def test_the_examples_of_the_docstring_are_true():
    assert doctest.testmod(rewards) == (0, 4)


def test_negative_answers_count():
    assert accuracy_reward("<answer>-3</answer>", "-3") == 1
    assert accuracy_reward("<answer>3</answer>", "-3") == 0


def parse_by_hand(completion):
    """A second parser that shares no idea with rewards.py. It walks the text a character at a time
    and keeps a list of (tag, text after it). Returns (text of the answer or None, whether the
    format is right)."""
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    parts, i = [["", ""]], 0
    while i < len(completion):
        tag = next((tag for tag in tags if completion.startswith(tag, i)), None)
        if tag:
            parts.append([tag, ""])
            i += len(tag)
        else:
            parts[-1][1] += completion[i]
            i += 1
    names = [name for name, _ in parts[1:]]
    whole, bare = names == tags, names == tags[2:]
    given = (parts[-2][1].strip() or None) if whole or bare else None
    blank = [not text.strip() for _, text in parts]
    return given, whole and blank == [True, False, True, False, True]


SNIPPETS = [*rewards.TAGS, "15", " 15", "-", " ", "\n", "<", ">", "/", "think"]
PIECES = st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=3))
NEARLY_RIGHT = st.tuples(*(st.lists(PIECES, max_size=2).map("".join) for _ in range(5))).map(
    lambda t: f"{t[0]}<think>{t[1]}</think>{t[2]}<answer>{t[3]}</answer>{t[4]}"
)


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(st.lists(PIECES, max_size=12).map("".join), NEARLY_RIGHT, st.text()),
    st.sampled_from(["15", "-15", ""]),
)
def test_both_rules_agree_with_a_second_parser_and_never_raise(completion, answer):
    given, form = parse_by_hand(completion)
    assert extract_answer(completion) == given
    assert format_reward(completion) == float(form)
    assert accuracy_reward(completion, answer) == float(given is not None and given == answer)
    assert accuracy_reward(completion, None) == 0.0
    if given is not None:
        assert accuracy_reward(completion, given) == 1.0


@pytest.mark.parametrize(
    "answer", ["2 5 9", "yes", "-3", "a cat\nand a dog", "답은 15", "<b>", "15.", "0", "<|eos|>"]
)
def test_an_answer_may_be_any_text(answer):
    """Whole, without the space around it. Accuracy is letter for letter."""
    completion = f"<think> x</think><answer> {answer}\n</answer>"
    assert extract_answer(completion) == answer
    assert accuracy_reward(completion, answer) == 1
    for other in (f" {answer}", f"{answer}.", answer[:-1], answer + answer, None, ""):
        assert accuracy_reward(completion, other) == 0


@pytest.mark.parametrize("completion", ["", "<answer></answer>", "<answer> \n </answer>", "15"])
def test_where_there_is_no_answer_nothing_is_right(completion):
    """Not even an empty answer, or no answer at all."""
    assert extract_answer(completion) is None
    assert accuracy_reward(completion, None) == accuracy_reward(completion, "") == 0


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</answer>", "<", "<answer>1", " ", "9", "<think></think>", "\n", "<think", "a"],
)
def test_time_is_linear_in_the_length(piece):
    """Two million characters that are as bad as can be: a rule that looks twice would take
    hours."""
    text = piece * (2_000_000 // len(piece))
    started = time.perf_counter()
    for completion in (text, f"<think>{text}</think><answer>{text}</answer>"):
        accuracy_reward(completion, "15")
        format_reward(completion)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("thought", "english", "korean"),
    [
        ("\n#1 7 plus 8 is 15\n#2 15 minus 3 is 12", 1, 0),
        ("\n#1 7 더하기 8 은 15\n#2 15 빼기 3 은 12", 0, 1),
        ("\n#1 7 plus 8 은 15\n#2 15 빼기 3 은 12", 0.25, 0.75),
        (" i know this", 0, 0),  # three words are no thought
        (" 이건 알아", 0, 0),
        (" 7 8 15 + - = #1", 0, 0),  # nor are digits and signs, in any number
        ("", 0, 0),
        (" plus plus なのか なのか", 0.5, 0),  # words of neither count as words
        (" plus더하기 is is is", 0.75, 0),
    ],
)
def test_language_consistency_is_the_share_of_the_thoughts_words(thought, english, korean):
    completion = f"<think>{thought}</think><answer> 15</answer>"
    assert language_consistency_reward(completion, "en") == english
    assert language_consistency_reward(completion, "ko") == korean
    around = f"plus plus plus plus plus {completion} 더하기 더하기 더하기 더하기"
    assert language_consistency_reward(around, "en") == english, "the thought's words alone count"
    assert language_consistency_reward(around, "ko") == korean


def test_language_consistency_looks_at_the_thought_alone():
    for completion, share in (
        ("<think> a b c d</think> 가 나 다<answer> 라 마</answer>", 1),
        (" plus is plus is<answer> 15</answer>", 0),  # no thought
        ("</think> a b c d<think>", 0),  # no thought that opens first
    ):
        assert language_consistency_reward(completion, "en") == share
    with pytest.raises(KeyError):
        language_consistency_reward("<think> a b</think>", "fr")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("accuracy=1,format=1", {"accuracy": 1, "format": 1}),
        ("format=0.5", {"format": 0.5}),
        ("language=1e-3,accuracy=2", {"language": 0.001, "accuracy": 2}),
        ("accuracy=1,language=0", {"accuracy": 1, "language": 0}),  # logged, and pays nothing
    ],
)
def test_rules_and_their_weights_are_read_in_their_order(text, weights):
    assert list(rule_weights(text).items()) == list(weights.items())


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy=", "accuracy=1,", "accuracy=1;format=1", "accuracy=1format=1",
     "accuracy=one", "accuracy=1=2", "accuracy=-1,format=2", "accuracy=nan", "accuracy=inf",
     "accuracy=1e31", "accuracy=0", "accuracy=0,format=0", "accuracy=1,accuracy=2", "=1",
     "accuracy=1,beauty=1", "1=accuracy"],
)  # fmt: skip
def test_other_text_than_rules_and_weights_is_refused(text):
    """In one line."""
    with pytest.raises(ValueError, match=", ".join(RULES) + ", not all 0") as error:
        rule_weights(text)
    assert str(error.value).startswith(f"--rewards {text} must be rules with weights")
    assert "\n" not in str(error.value)


def test_a_rule_reads_a_completion_and_its_problem():
    """Each by its name, with the problem's answer and the problem's language."""
    korean = TASKS["chains-en-ko"].ask("7 + 8", "ko")
    thought = "<think>\n#1 7 더하기 8 은 15\n#2 15 plus 0 은 15</think>"
    found = {name: rule(thought + "<answer> 15</answer>", korean) for name, rule in RULES.items()}
    assert found | {"accuracy": 1, "format": 1, "language": 0.75} == found
    found = {name: rule(thought + "<answer> 14", korean) for name, rule in RULES.items()}
    assert found | {"accuracy": 0, "format": 0, "language": 0.75} == found


def problem_of(monkeypatch, is_right):
    """A problem of a task whose rule is this one; its own answer is "no"."""
    monkeypatch.setitem(TASKS, "questions", SimpleNamespace(is_right=is_right))
    return Problem("User: is it?\nAssistant:", "no", 1, "en", "is it", "questions")


def test_accuracy_asks_the_task_of_the_problem(monkeypatch):
    """Not the problem's answer: several texts may be right, and the answer need not be."""
    asked = []

    def is_right(problem, given):
        asked.append((problem.expression, given))
        return given in ("yes", "of course", "")

    problem = problem_of(monkeypatch, is_right)
    for said, right in (("yes", 1), (" of course ", 1), ("no", 0), ("yes yes", 0), ("", 0)):
        assert RULES["accuracy"](f"<answer>{said}</answer>", problem) == right
    assert RULES["accuracy"]("yes", problem) == 0
    assert asked[:3] == [("is it", "yes"), ("is it", "of course"), ("is it", "no")]


@pytest.mark.parametrize("completion", ["<answer> yes</answer>", "<answer> no</answer>", "yes", ""])
def test_accuracy_refuses_a_problem_without_a_rule(completion, monkeypatch):
    """In one line that names the task, whatever is said. No silent 0, and no 1 for the answer that
    happens to stand in the problem. The other rules judge it."""
    problem = problem_of(monkeypatch, lambda problem, given: None)
    reason = "^the task questions has a problem without a rule: leave accuracy out of --rewards$"
    with pytest.raises(ValueError, match=reason):
        RULES["accuracy"](completion, problem)
    assert RULES["format"](completion, problem) == RULES["language"](completion, problem) == 0
