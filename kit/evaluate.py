"""Evaluation on held-out problems: pass@k, majority votes, greedy answers, and the table of two
models."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from data import TASKS
from data.problem import Problem, sample_problems, stream
from model import Transformer
from rewards import extract_answer, format_reward, is_right
from sample import complete, decode_completions, tokenizer_of

BEYOND = 4  # levels above the trained ones that are evaluated too
PART = 128  # problems answered at a time: it bounds what the cache takes

Answers = list[list[tuple[str, int]]]  # of each problem: each completion's text, and its tokens


def pass_at_k(samples: int, right: float, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right, from `right` among
    `samples` of them (Chen et al. 2021). NaN stays NaN."""
    if math.isnan(right):
        return right
    return 1.0 - math.comb(samples - int(right), k) / math.comb(samples, k)


def majority_is_right(answers: list[str | None], problem: Problem) -> bool | None:
    """Whether the answer given most often is right; None where there is no rule. No answer is no
    vote; of equals the first given wins."""
    votes = Counter(given for given in answers if given is not None)
    right = problem.is_right(votes.most_common(1)[0][0] if votes else "")
    return None if right is None else right and bool(votes)


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
        answers += zip(decode_completions(rollout, tokenizer_of(model)), tokens)
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def grade(problems: list[Problem], answers: Answers) -> np.ndarray:
    """Accuracy of each completion, (problems, samples); its mean is pass@1. NaN where the task has
    no rule."""
    right = [[is_right(text, p) for text, _ in group] for p, group in zip(problems, answers)]
    return np.array(right, dtype=float)  # None becomes NaN


def thought_of(completion: str) -> str | None:
    """The text of the first closed thought, None where there is none."""
    found = re.search("<think>(.*?)</think>", completion, re.DOTALL)
    return found and found[1]


def mean_measures(problems: list[Problem], texts: list[list[str]]) -> dict[str, float]:
    """The measures of the problems' own tasks, each a mean over the completions that have it."""
    found = defaultdict(list)
    for problem, group in zip(problems, texts):
        for text in group:
            for name, value in TASKS[problem.task].measures(problem, text).items():
                found[name].append(value)
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}


def held_out_problems(
    task: str, levels: Sequence[int], count: int, seed: int, purpose: str
) -> list[Problem]:
    """The same problems whenever they are asked for. Level 1 is left out: its problems are steps of
    the others, so training has seen what they need."""
    levels = [level for level in levels if level > 1]
    return sample_problems(stream(seed, purpose), TASKS[task], levels, count, held_out=True)


def evaluate(
    model: Transformer,
    task: str,
    levels: range,
    *,
    problems: int,
    samples: int,
    limit: int,
    seed: int,
) -> dict:
    """The metrics of a model on held-out problems, at temperature 1 but for "greedy": means over
    `problems` problems of these levels, `samples` completions of each, of at most `limit` tokens.
    Level 1 ("apart") and the four levels "beyond" these are told on their own, by pass@1 only."""
    beyond = range(levels[-1] + 1, levels[-1] + 1 + BEYOND)
    apart = {"apart": [1] if 1 in levels else [], "beyond": beyond}

    def pass_1_at(level: int) -> float:
        rng = stream(seed, f"evaluation at level {level}")
        asked = sample_problems(rng, TASKS[task], [level], 100, held_out=True)
        return grade(asked, answer_problems(model, asked, 4, limit=limit, seed=noise)).mean()

    problems = held_out_problems(task, levels, problems, seed, "evaluation")
    noise = stream(seed, "evaluation noise", samples).getrandbits(63)  # the same for every model
    answers = answer_problems(model, problems, samples, limit=limit, seed=noise)
    greedy = answer_problems(model, problems, 1, 0.0, limit=limit, seed=noise)
    correct = grade(problems, answers)  # (problems, samples)
    groups = [[text for text, _ in group] for group in answers]
    texts = [text for group in groups for text in group]
    thoughts = [thought for thought in map(thought_of, texts) if thought is not None]
    think_tokens = [len(tokenizer_of(model).encode(thought)) for thought in thoughts]

    def pass_1_by(attribute: str) -> dict[str, float]:
        values = np.array([str(getattr(problem, attribute)) for problem in problems])
        return {str(value): correct[values == value].mean() for value in np.unique(values)}

    votes = [
        majority_is_right([extract_answer(text) for text in group[i : i + 8]], problem)
        for problem, group in zip(problems, groups)
        for i in range(0, samples - 7, 8)
    ]
    return {
        "pass@1": correct.mean(),
        "pass@8": np.mean([pass_at_k(samples, count, 8) for count in correct.sum(axis=1)]),
        "maj@8": np.array(votes, dtype=float).mean(),
        "greedy": grade(problems, greedy).mean(),
        "format": np.mean([format_reward(text) for text in texts]),
        "completion_tokens": np.mean([length for group in answers for _, length in group]),
        "think_tokens": np.mean(think_tokens) if think_tokens else 0.0,
        "by_level": pass_1_by("level"),
        "by_language": pass_1_by("language"),
        "thinking": mean_measures(problems, groups),
        **{
            name: {str(level): pass_1_at(level) for level in levels}
            for name, levels in apart.items()
        },
    }


def compare_samples(
    models: dict[str, Transformer], problems: list[Problem], limit: int, seed: int
) -> tuple[str, str]:
    """Two texts: what each model says to every problem, and the same for one of them. That is the
    first problem that the first model gets wrong and the last model right, else the first."""
    seed = stream(seed, "noise of the samples").getrandbits(63)
    said = {
        name: answer_problems(model, problems, 1, limit=limit, seed=seed)
        for name, model in models.items()
    }
    blocks, best = [], None
    for i, problem in enumerate(problems):
        lines, right = [problem.prompt.removesuffix("\nAssistant:")], []
        for name, answers in said.items():
            ((text, _),) = answers[i]
            right.append(grade([problem], [answers[i]]).item())
            form = format_reward(text)
            lines.append(f"[{name}: accuracy {right[-1]:.0f}, format {form:.0f}] {text}")
        blocks.append("\n".join(lines))
        if best is None and not right[0] and right[-1]:
            best = i
    which = "first held-out problem"
    which += (
        " that the base gets wrong and the trained model right" if best is not None else ""
    )
    return "\n\n".join(blocks) + "\n", f"{which}:\n\n{blocks[best or 0]}"


def table(base: dict, trained: dict) -> str:
    """The evaluations of two models side by side."""
    names = ("pass@1", "pass@8", "maj@8", "greedy", "format")
    shares = [(name, base[name], trained[name]) for name in names]
    for name, text in (
        ("by_language", "pass@1, {}"),
        ("apart", "pass@1, level {}"),
        ("by_level", "pass@1, level {}"),
        ("beyond", "pass@1, level {} (beyond)"),
    ):
        if name != "by_language" or len(base[name]) > 1:
            shares += [
                (text.format(kind), base[name][kind], trained[name][kind]) for kind in base[name]
            ]
    lines = [f"{'held-out problems':28} {'base':>8}   {'R1-Zero':>8}"]
    lines += [f"{text:28} {100 * one:8.1f} % {100 * two:8.1f} %" for text, one, two in shares]
    for name in ("completion_tokens", "think_tokens"):
        lines.append(f"{name:28} {base[name]:8.1f}   {trained[name]:8.1f}")
    for name in base["thinking"] | trained["thinking"]:
        pair = (metrics["thinking"].get(name, math.nan) for metrics in (base, trained))
        lines.append(f"{name:28} " + "   ".join(f"{x:8.2f}" for x in pair))
    return "\n".join(lines)
