"""The evaluation: every metric against completions that were written for it."""

import itertools
import re

import pytest

from data import TASKS, get_tokenizer
from data.chains import is_held_out
from data.problem import thought_of
from kit import evaluate as kit_evaluate
from kit.evaluate import (
    answer_problems,
    compare_samples,
    evaluate,
    held_out_problems,
    majority_is_right,
    pass_at_k,
    table,
)
from tests.small import CHAINS, rollout_of, small_model

KINDS = ("en", "ko", "both", "none")


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one():
    for right in range(7):
        graded = [True] * right + [False] * (6 - right)
        for k in range(1, 7):
            choices = list(itertools.combinations(graded, k))
            assert pass_at_k(6, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_majority_counts_answers_alone():
    problem = CHAINS.ask("1 + 2")
    assert majority_is_right(["3", None, None, None, "3", "4"], problem)
    assert not majority_is_right(["4", "3", "4", "3"], problem), "of equals the first given wins"
    assert not majority_is_right([None, None], problem)


def test_a_thought_is_what_the_first_closed_tags_hold():
    assert thought_of("<think> a\nb</think><answer> 3</answer><think> c</think>") == " a\nb"
    assert thought_of("<think></think>") == ""
    assert thought_of("<think> a") is None


def test_held_out_problems_are_the_same_and_leave_level_1_out():
    """For one seed and purpose; another seed has others."""
    problems = held_out_problems("chains-en-ko", range(1, 4), 40, 0, "any")
    assert problems == held_out_problems("chains-en-ko", range(1, 4), 40, 0, "any")
    assert {(p.level, p.language) for p in problems} == set(itertools.product((2, 3), ("en", "ko")))
    assert all(is_held_out(problem.expression) for problem in problems)
    assert problems != held_out_problems("chains-en-ko", range(1, 4), 40, 1, "any")
    assert problems != held_out_problems("chains-en-ko", range(1, 4), 40, 0, "other")


def test_evaluation_counts_what_it_says(monkeypatch):
    """Hand-made completions of two problems, 16 each, and every metric worked out beside them."""
    chains, model = TASKS["chains-en-ko"], small_model(task="chains-en-ko")
    tokenizer = get_tokenizer("chains-en-ko")
    problems = [chains.ask("1 + 2 + 3"), chains.ask("9 - 2 - 1 + 1", "ko")]
    thought = "\n#1 1 plus 1 is 2\n#2 2 plus 1 is 3"
    right = [f"<think>{thought}</think><answer> {p.answer}</answer>" for p in problems]
    wrong, bare = "<think> a</think><answer> 5</answer>", "5."
    one = [right[0]] * 4 + [wrong] * 4 + [wrong] * 5 + [bare] * 3  # majority: a tie won, then lost
    two = [right[1]] * 12 + [bare] * 4
    asked_apart = []

    def complete(asking, asked, _, *, group_size, max_new_tokens, temperature, seed, first_row):
        assert (max_new_tokens, asking) == (12, model)
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
    metrics = evaluate(model, "chains-en-ko", range(1, 3), **counts)
    assert all(is_held_out(problem.expression) for problem in asked_apart if problem.level > 1)
    assert {problem.level for problem in asked_apart} == {1, 3, 4, 5, 6}
    assert {problem.language for problem in asked_apart} == {"en", "ko"}

    words = [len(tokenizer.encode(text)) for text in (thought, " a")]
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
    expected = dict.fromkeys([f"{a}_thinks_in_{b}" for a in ("en", "ko") for b in KINDS], 0.0)
    expected |= {"en_thinks_in_en": 4 / 16, "en_thinks_in_none": 12 / 16}
    expected |= {"ko_thinks_in_en": 12 / 16, "ko_thinks_in_none": 4 / 16, "in_steps": 16 / 32}
    assert metrics["thinking"] == expected
    shown = table(metrics, metrics | {"pass@1": 1.0})
    assert re.search(r"^pass@1 +50.0 % +100.0 %$", shown, re.MULTILINE)
    assert re.search(r"^in_steps +0.50 +0.50$", shown, re.MULTILINE)
    assert re.search(r"^pass@1, level 1 \(apart\) +25.0 %", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) < 80


def test_answering_in_parts_is_answering_the_whole(monkeypatch):
    """130 problems take two calls; the noise of the second goes on where the first ended."""
    problems = held_out_problems("chains", range(2, 3), 130, 0, "any")
    how = {"limit": 6, "seed": 5}
    answers = answer_problems(small_model(), problems, 2, **how)
    assert [len(group) for group in answers] == [2] * 130
    assert max(tokens for group in answers for _, tokens in group) <= 6
    monkeypatch.setattr(kit_evaluate, "PART", 200)
    assert answers == answer_problems(small_model(), problems, 2, **how)
    assert answers != answer_problems(small_model(), problems, 2, limit=6, seed=6)


def test_each_model_stands_under_its_own_name(monkeypatch):
    """Shown is the first problem that the base model gets wrong and the trained model right."""
    problems = [CHAINS.ask("1 + 2 + 3"), CHAINS.ask("1 + 1 + 1")]
    texts = ["<think> a</think><answer> 6</answer>", "<think> a</think><answer> 3</answer>"]
    said = {"good": texts, "bad": [texts[0], "7"]}
    answers = {name: [[(text, 1)] for text in each] for name, each in said.items()}
    monkeypatch.setattr(kit_evaluate, "answer_problems", lambda model, *args, **how: answers[model])
    models = {"base": "bad", "R1-Zero": "good"}
    said, shown = compare_samples(models, problems, 9, 0)
    assert shown.splitlines()[2:] == [
        "User: what is 1 plus 1 plus 1?",
        "[base: accuracy 0, format 0] 7",
        "[R1-Zero: accuracy 1, format 1] <think> a</think><answer> 3</answer>",
    ]
    assert "gets wrong and the trained model right" in shown
    assert said.count("[base: ") == said.count("[R1-Zero: ") == 2
    _, shown = compare_samples({"base": "good", "R1-Zero": "good"}, problems, 9, 0)
    assert shown.startswith("first held-out problem:\n\nUser: what is 1 plus 2 plus 3?")


def test_another_seed_evaluates_on_other_problems_and_noise(monkeypatch):
    """The same seed asks every model the same, with the same noise."""
    calls, honest = [], kit_evaluate.answer_problems

    def answer_problems(model, problems, *args, **how):
        calls[-1].append((problems, how["seed"]))
        return honest(model, problems, *args, **how)

    monkeypatch.setattr(kit_evaluate, "answer_problems", answer_problems)
    counts = {"problems": 4, "samples": 8, "limit": 6}
    for seed, model in ((0, small_model()), (0, small_model(1)), (1, small_model())):
        calls.append([])
        evaluate(model, "chains", range(1, 3), **counts, seed=seed)
        compare_samples({"base": model}, [CHAINS.ask("1 + 1 + 1")], 6, seed)
    assert calls[0] == calls[1]
    assert len(calls[0]) == 2 + 1 + 4 + 1
    for one, other in zip(calls[0], calls[2]):
        assert one[1] != other[1]
    for one, other in zip(calls[0][:-1], calls[2][:-1]):
        assert one[0] != other[0]
