"""The evaluation: every metric against completions that were written for it."""

import itertools

import pytest

from data.arithmetic import Task, is_held_out, write_problem
from kit import evaluate as kit_evaluate
from kit.evaluate import (
    answer_problems,
    evaluate,
    held_out_problems,
    majority_is_right,
    pass_at_k,
    thought_language,
    write_samples,
)
from tests.small import rollout_of, small_model, tokenizer


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one():
    for right in range(7):
        graded = [True] * right + [False] * (6 - right)
        for k in range(1, 7):
            choices = list(itertools.combinations(graded, k))
            assert pass_at_k(6, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_majority_counts_answers_alone():
    assert majority_is_right(["3", None, None, None, "3", "4"], "3")
    assert not majority_is_right(["4", "3", "4", "3"], "3"), "of equals the first given wins"
    assert not majority_is_right([None, None], "3")


def test_the_language_of_a_thought_is_that_of_all_its_words():
    for thought, expected in (
        ("\n#1 1 plus 2 is 3\n#2 3 plus 1 is 4", "en"),
        ("\n#1 1 더하기 2 은 3\n#2 3 더하기 1 은 4", "ko"),
        ("\n#1 1 plus 2 is 3\n#2 3 더하기 1 은 4", "mixed"),
        (" i know this", "none"),
        (" 이건 알아", "none"),
        (" なのか これ なのか これ", "none"),
    ):
        completion = f"<think>{thought}</think><answer> 3</answer>"
        assert thought_language(completion) == expected


def test_held_out_problems_are_the_same_for_a_purpose_and_leave_level_1_out():
    problems = held_out_problems(Task(languages=("en", "ko")), range(1, 4), 40, 0, "any")
    assert problems == held_out_problems(Task(languages=("en", "ko")), range(1, 4), 40, 0, "any")
    assert {(p.level, p.language) for p in problems} == set(itertools.product((2, 3), ("en", "ko")))
    assert all(is_held_out(problem.expression) for problem in problems)
    assert problems != held_out_problems(Task(languages=("en", "ko")), range(1, 4), 40, 1, "any")


def test_evaluation_counts_what_it_says(monkeypatch):
    """Hand-made completions of two problems, 16 each, and every metric worked out beside them."""
    problems = [write_problem("1 + 2 + 3"), write_problem("9 - 2 - 1 + 1", "ko")]
    right = [f"<think> a b c d</think><answer> {problem.answer}</answer>" for problem in problems]
    wrong, bare = "<think> a</think><answer> 5</answer>", "5."
    one = [right[0]] * 4 + [wrong] * 4 + [wrong] * 5 + [bare] * 3  # majority: a tie won, then lost
    two = [right[1]] * 12 + [bare] * 4
    asked_apart = []

    def complete(model, asked, *, group_size, max_new_tokens, temperature, seed, first_row):
        assert (max_new_tokens, model) == (12, "a model")
        if [p.expression for p in asked] == [p.expression for p in problems]:
            assert temperature == (1.0 if group_size == 16 else 0.0)
            texts = [*one, *two] if group_size == 16 else [right[0], bare]
            return rollout_of(asked, texts)
        assert (temperature, group_size) == (1.0, 4)
        asked_apart.extend(asked)
        texts = [x for p in asked for x in (f"<answer>{p.answer}</answer>", bare, bare, bare)]
        return rollout_of(asked, texts)

    monkeypatch.setattr(kit_evaluate, "complete", complete)
    monkeypatch.setattr(kit_evaluate, "held_out_problems", lambda *args: problems)
    counts = {"problems": 2, "samples": 16, "limit": 12, "seed": 0}
    task = Task(languages=("en", "ko"))
    metrics = evaluate("a model", task, range(1, 3), **counts)
    assert all(is_held_out(problem.expression) for problem in asked_apart if problem.level > 1)
    assert {problem.level for problem in asked_apart} == {1, 3, 4, 5, 6}
    assert {problem.language for problem in asked_apart} == {"en", "ko"}

    words = [len(tokenizer.encode(text)) for text in (" a b c d", " a")]
    sizes = [len(tokenizer.encode(text, tags=True)) + 1 for text in (right[0], wrong, bare)]
    numbers = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    assert numbers == pytest.approx(
        {
            "pass@1": (4 / 16 + 12 / 16) / 2,
            "pass@8": (pass_at_k(16, 4, 8) + 1) / 2,
            "maj@8": (1 + 0 + 1 + 1) / 4,
            "greedy": 0.5,
            "format": (13 + 12) / 32,
            "completion_tokens": (16 * sizes[0] + 9 * sizes[1] + 7 * sizes[2]) / 32,
            "think_tokens": (16 * words[0] + 9 * words[1]) / 25,
        }
    )
    assert metrics["by_level"] == {"2": 0.25, "3": 0.75}
    assert metrics["by_language"] == {"en": 0.25, "ko": 0.75}
    assert metrics["apart"] == {"1": 0.25}
    assert metrics["beyond"] == dict.fromkeys("3456", 0.25)
    assert metrics["thinks_in"] == {
        "en": {"en": 4 / 16, "ko": 0, "mixed": 0, "none": 12 / 16},
        "ko": {"en": 12 / 16, "ko": 0, "mixed": 0, "none": 4 / 16},
    }


def test_answering_in_parts_is_answering_the_whole(monkeypatch):
    """130 problems take two calls; the noise of the second goes on where the first ended."""
    problems = held_out_problems(Task(), range(2, 3), 130, 0, "any")
    how = {"limit": 6, "seed": 5}
    answers = answer_problems(small_model(), problems, 2, **how)
    assert [len(group) for group in answers] == [2] * 130
    assert max(tokens for group in answers for _, tokens in group) <= 6
    monkeypatch.setattr(kit_evaluate, "PART", 200)
    assert answers == answer_problems(small_model(), problems, 2, **how)
    assert answers != answer_problems(small_model(), problems, 2, limit=6, seed=6)


def test_each_model_stands_under_its_own_name(tmp_path, monkeypatch):
    problems = [write_problem("1 + 2 + 3")]
    said = {"good": "<think> a</think><answer> 6</answer>", "bad": "7"}
    monkeypatch.setattr(
        kit_evaluate, "complete", lambda model, asked, **how: rollout_of(asked, [said[model]])
    )
    last = write_samples(tmp_path / "s.txt", {"base": "bad", "R1-Zero": "good"}, problems, 9, 0)
    assert last.splitlines()[1:] == [
        "[base: accuracy 0, format 0] 7",
        "[R1-Zero: accuracy 1, format 1] <think> a</think><answer> 6</answer>",
    ]
    assert (tmp_path / "s.txt").read_text() == last + "\n"
