"""Evaluation on held-out problems: pass@k, majority votes, greedy answers, and the table of two
models."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.arithmetic import Task
from data.languages import LANGUAGES
from data.problem import Problem, sample_problems, stream
from data.tokenizer import get_tokenizer
from model import Transformer, write_whole
from rewards import accuracy_reward, extract_answer, format_reward, language_consistency_reward
from sample import complete, decode_completions

BEYOND = 4  # levels above the trained ones that are evaluated too
PART = 128  # problems answered at a time: it bounds what the cache takes

Answers = list[list[tuple[str, int]]]  # of each problem: each completion's text, and its tokens


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right, from `right` among
    `samples` of them (Chen et al. 2021)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_is_right(answers: list[str | None], answer: str) -> bool:
    """Whether the answer given most often is right. No answer is no vote; of equals the first given
    wins."""
    votes = Counter(given for given in answers if given is not None)
    return bool(votes) and votes.most_common(1)[0][0] == answer


def answer_problems(
    model: Transformer,
    problems: list[Problem],
    samples: int,
    temperature: float = 1.0,
    *,
    limit: int,
    seed: int,
) -> Answers:
    """`samples` completions of each problem, of at most `limit` tokens. The same seed gives every
    model the same noise."""
    answers = []
    look = {"desc": "answer", "leave": False, "dynamic_ncols": True, "disable": None}
    for start in tqdm(range(0, len(problems), PART), **look):
        how = {"group_size": samples, "max_new_tokens": limit, "temperature": temperature}
        how |= {"seed": seed, "first_row": start * samples}
        rollout = complete(model, problems[start : start + PART], **how)
        tokens = (rollout.ends - rollout.starts).tolist()
        answers += zip(decode_completions(rollout, get_tokenizer()), tokens)
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def grade(problems: list[Problem], answers: Answers) -> np.ndarray:
    """Accuracy of each completion, (problems, samples); its mean is pass@1."""
    groups = zip(problems, answers)
    return np.array([[accuracy_reward(text, p.answer) for text, _ in group] for p, group in groups])


def thought_language(completion: str) -> str:
    """The language that all words of a thought are in; "mixed" if they are in several, "none" if
    there is hardly a word."""
    shares = {name: language_consistency_reward(completion, name) for name in LANGUAGES}
    most = max(shares, key=shares.get)
    return most if shares[most] == 1 else "mixed" if shares[most] else "none"


def held_out_problems(
    task: Task, levels: Sequence[int], count: int, seed: int, purpose: str
) -> list[Problem]:
    """The same problems whenever they are asked for. Level 1 is left out: its problems are steps of
    others, so none of them is held out."""
    levels = [level for level in levels if level > 1]
    return sample_problems(stream(seed, purpose), task, levels, count, held_out=True)


def evaluate(
    model: Transformer,
    task: Task,
    levels: range,
    *,
    problems: int,
    samples: int,
    limit: int,
    seed: int,
) -> dict:
    """The metrics of a model on held-out problems, at temperature 1 but for "greedy": means over
    `problems` problems of these levels, `samples` completions of each, of at most `limit` tokens.
    Two are told apart, as pass@1 alone: level 1, and the levels "beyond" these."""
    beyond = range(levels[-1] + 1, levels[-1] + 1 + BEYOND)
    others = {
        name: {
            str(level): sample_problems(
                stream(seed, f"evaluation at level {level}"), task, [level], 100, held_out=True
            )
            for level in apart
        }
        for name, apart in (("apart", [1] if 1 in levels else []), ("beyond", beyond))
    }
    problems = held_out_problems(task, levels, problems, seed, "evaluation")
    seed = stream(seed, "evaluation noise", samples).getrandbits(63)  # the same for every model
    how = {"limit": limit, "seed": seed}
    answers = answer_problems(model, problems, samples, **how)
    correct = grade(problems, answers)  # (problems, samples)
    texts = [text for group in answers for text, _ in group]
    found = (re.search("<think>(.*?)</think>", text, re.DOTALL) for text in texts)
    thoughts = [len(get_tokenizer().encode(match[1])) for match in found if match]
    thinks_in = np.array([[thought_language(text) for text, _ in group] for group in answers])
    asked_in = np.array([problem.language for problem in problems])

    def pass_1_by(attribute: str) -> dict[str, float]:
        values = np.array([str(getattr(problem, attribute)) for problem in problems])
        return {str(value): correct[values == value].mean() for value in np.unique(values)}

    votes = [
        majority_is_right([extract_answer(text) for text, _ in group[i : i + 8]], problem.answer)
        for problem, group in zip(problems, answers)
        for i in range(0, samples - 7, 8)
    ]
    return {
        "pass@1": correct.mean(),
        "pass@8": np.mean([pass_at_k(samples, int(count), 8) for count in correct.sum(axis=1)]),
        "maj@8": np.mean(votes),
        "greedy": grade(problems, answer_problems(model, problems, 1, 0.0, **how)).mean(),
        "format": np.mean([format_reward(text) for text in texts]),
        "completion_tokens": np.mean([length for group in answers for _, length in group]),
        "think_tokens": np.mean(thoughts) if thoughts else 0.0,
        "by_level": pass_1_by("level"),
        "by_language": pass_1_by("language"),
        "thinks_in": {  # language of the question: language of the thought: share of completions
            asked: {
                name: (thinks_in[asked_in == asked] == name).mean()
                for name in (*LANGUAGES, "mixed", "none")
            }
            for asked in np.unique(asked_in).tolist()
        },
        **{
            name: {
                level: grade(asked, answer_problems(model, asked, 4, **how)).mean()
                for level, asked in levels.items()
            }
            for name, levels in others.items()
        },
    }


def write_samples(
    path: Path, models: dict[str, Transformer], problems: list[Problem], limit: int, seed: int
) -> str:
    """Write down what each model says to the same problems. Returns the last of it, to be shown."""
    seed = stream(seed, "noise of the samples").getrandbits(63)
    said = {
        name: answer_problems(model, problems, 1, limit=limit, seed=seed)
        for name, model in models.items()
    }
    blocks = []
    for i, problem in enumerate(problems):
        lines = [problem.prompt.removesuffix("\nAssistant:")]
        for name, answers in said.items():
            ((text, _),) = answers[i]
            accuracy, form = accuracy_reward(text, problem.answer), format_reward(text)
            lines.append(f"[{name}: accuracy {accuracy:.0f}, format {form:.0f}] {text}")
        blocks.append("\n".join(lines))
    write_whole(path, ("\n\n".join(blocks) + "\n").encode())
    return blocks[-1]


def table(base: dict, trained: dict) -> str:
    """The evaluations of two models side by side."""
    names = ("pass@1", "pass@8", "maj@8", "greedy", "format")
    shares = [(name, base[name], trained[name]) for name in names]

    def by(name: str, text: str) -> None:
        for kind in base[name]:
            shares.append((text.format(kind), base[name][kind], trained[name][kind]))

    if len(base["by_language"]) > 1:
        by("by_language", "pass@1, {}")
        for asked in base["thinks_in"]:
            pair = (metrics["thinks_in"][asked][asked] for metrics in (base, trained))
            shares.append((f"asked in {asked}, thinks in it", *pair))
    by("apart", "pass@1, level {}")
    by("by_level", "pass@1, level {}")
    by("beyond", "pass@1, level {} (beyond)")
    lines = [f"{'held-out problems':28} {'base':>8}   {'R1-Zero':>8}"]
    lines += [f"{text:28} {100 * one:8.1f} % {100 * two:8.1f} %" for text, one, two in shares]
    for name in ("completion_tokens", "think_tokens"):
        lines.append(f"{name:28} {base[name]:8.1f}   {trained[name]:8.1f}")
    return "\n".join(lines)
