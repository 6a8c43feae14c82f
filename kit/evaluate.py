"""Evaluation on held-out problems: pass@k, majority votes, greedy answers, and the table of two
models."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from data import TASKS
from data.problem import Problem, sample_problems, stream, thought_of
from data.tokenizer import Tokenizer
from kit.parallel import generate
from model import Transformer
from rewards import extract_answer, format_reward, is_right
from sample import complete, decode_completions, tokenizer_of

PART = 128  # problems answered at a time, which bounds the memory of the cache

Answers = list[list[tuple[str, int]]]  # for each problem, the completions: text, count of tokens


def pass_at_k(samples: int, right: float, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k completions is right, given that
    `right` of `samples` completions are (Chen et al. 2021). For a `right` of NaN it is NaN."""
    if math.isnan(right):
        return right
    return 1.0 - math.comb(samples - int(right), k) / math.comb(samples, k)


def majority_is_right(answers: list[str | None], problem: Problem) -> bool | None:
    """Whether the most frequent answer is right; None if the problem has no rule. None as an answer
    is no vote. Of equally frequent answers, the first wins."""
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
        rollout = complete(model, problems[start : start + PART], generate, **how)
        tokens = (rollout.ends - rollout.starts).tolist()
        answers += zip(decode_completions(rollout, tokenizer_of(model)), tokens)
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def grade(problems: list[Problem], answers: Answers) -> np.ndarray:
    """The accuracy of each completion, (problems, samples) float64. Its mean is pass@1. NaN for a
    problem without a rule."""
    right = [[is_right(text, p) for text, _ in group] for p, group in zip(problems, answers)]
    return np.array(right, dtype=float)  # None becomes NaN


def mean(values: Sequence[float] | np.ndarray) -> float | None:
    """The mean of the values that are not NaN, or None if there is no such value."""
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def mean_think_tokens(texts: list[str], tokenizer: Tokenizer) -> float:
    """The mean length of the closed thoughts in tokens; 0 if no text has a closed thought."""
    thoughts = [thought for thought in map(thought_of, texts) if thought is not None]
    return mean([len(tokenizer.encode(thought)) for thought in thoughts]) or 0.0


def mean_measures(problems: list[Problem], texts: list[list[str]]) -> dict[str, float]:
    """Each measure of the problems' tasks, as a mean over the completions that have it."""
    found = defaultdict(list)
    for problem, group in zip(problems, texts):
        for text in group:
            for name, value in TASKS[problem.task].measures(problem, text).items():
                found[name].append(value)
    return {name: mean(values) for name, values in sorted(found.items())}


def held_out_problems(
    task: str, levels: Sequence[int], count: int, seed: int, purpose: str
) -> list[Problem]:
    """Held-out problems of these levels, without the levels that the task keeps apart. Equal
    arguments give equal problems."""
    levels = [level for level in levels if level not in TASKS[task].apart]
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
    """The metrics of a model on held-out problems. They are means over `problems` problems of these
    levels and `samples` completions of each, of at most `limit` tokens, at temperature 1 except for
    "greedy". Each level that the task keeps "apart", and each level "beyond" these, has its own
    pass@1. Metrics that need a rule are None if the task has no rule."""
    beyond = range(levels[-1] + 1, levels[-1] + 1 + TASKS[task].beyond)
    alone = {"apart": [level for level in levels if level in TASKS[task].apart], "beyond": beyond}

    def pass_1_at(level: int) -> float | None:
        rng = stream(seed, f"evaluation at level {level}")
        asked = sample_problems(rng, TASKS[task], [level], 100, held_out=True)
        return mean(grade(asked, answer_problems(model, asked, 4, limit=limit, seed=noise)))

    asked = held_out_problems(task, levels, problems, seed, "evaluation")
    noise = stream(seed, "evaluation noise", samples).getrandbits(63)  # the same for every model
    answers = answer_problems(model, asked, samples, limit=limit, seed=noise)
    greedy = answer_problems(model, asked, 1, 0.0, limit=limit, seed=noise)
    correct = grade(asked, answers)  # (problems, samples)
    groups = [[text for text, _ in group] for group in answers]
    texts = [text for group in groups for text in group]

    def pass_1_by(attribute: str) -> dict[str, float | None]:
        values = np.array([str(getattr(problem, attribute)) for problem in asked])
        return {str(value): mean(correct[values == value]) for value in np.unique(values)}

    votes = [
        majority_is_right([extract_answer(text) for text in group[i : i + 8]], problem)
        for problem, group in zip(asked, groups)
        for i in range(0, samples - 7, 8)
    ]
    return {
        "pass@1": mean(correct),
        "pass@8": mean([pass_at_k(samples, count, 8) for count in correct.sum(axis=1)]),
        "maj@8": mean(votes),
        "greedy": mean(grade(asked, greedy)),
        "format": mean([format_reward(text) for text in texts]),
        "completion_tokens": mean([length for group in answers for _, length in group]),
        "think_tokens": mean_think_tokens(texts, tokenizer_of(model)),
        "by_level": pass_1_by("level"),
        "by_language": pass_1_by("language"),
        "thinking": mean_measures(asked, groups),
        **{
            name: {str(level): pass_1_at(level) for level in levels}
            for name, levels in alone.items()
        },
    }


def compare_samples(
    models: dict[str, Transformer], problems: list[Problem], limit: int, seed: int
) -> tuple[str, str]:
    """Two texts: the completions of each model for all problems, and for one problem. This problem
    is the first that the first model gets wrong and the last model right; if there is none, the
    first of all."""
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
            right.append(is_right(text, problem))
            score = "without a rule" if right[-1] is None else f"accuracy {right[-1]:d}"
            lines.append(f"[{name}: {score}, format {format_reward(text):.0f}] {text}")
        blocks.append("\n".join(lines))
        if best is None and right[0] is False and right[-1]:
            best = i
    how = "" if best is None else " that the base gets wrong and the trained model right"
    return "\n\n".join(blocks) + "\n", f"first held-out problem{how}:\n\n{blocks[best or 0]}"


def share(x: float | None) -> str:
    """A share in percent, or "-" for None."""
    return "-" if x is None else f"{100 * x:.1f} %"


def table(base: dict, trained: dict, trained_by: str = "R1-Zero") -> str:
    """The evaluations of two models side by side, as lines of text."""

    def row(text: str, *cells: str) -> str:
        return f"{text:28}{''.join(f'{cell:>11}' for cell in cells)}".rstrip()

    lines = [row("held-out problems", "base", trained_by)]
    for name in ("pass@1", "pass@8", "maj@8", "greedy", "format"):
        lines.append(row(name, share(base[name]), share(trained[name])))
    for name, text in (
        ("by_language", "pass@1, {}"),
        ("apart", "pass@1, level {} (apart)"),
        ("by_level", "pass@1, level {}"),
        ("beyond", "pass@1, level {} (beyond)"),
    ):
        if name != "by_language" or len(base[name]) > 1:
            lines += [
                row(text.format(kind), share(base[name][kind]), share(trained[name][kind]))
                for kind in base[name]
            ]
    for name in ("completion_tokens", "think_tokens"):
        lines.append(row(name, f"{base[name]:.1f}  ", f"{trained[name]:.1f}  "))
    for name in base["thinking"] | trained["thinking"]:
        found = (model["thinking"].get(name) for model in (base, trained))
        lines.append(row(name, *("-  " if x is None else f"{x:.2f}  " for x in found)))
    return "\n".join(lines)
