"""How a model of signs searches: what it tries, whether its verdicts are true, when it stops; and
its base model, as it is and where it may not give up.

    python -m experiments.study.search RUN                # RUN/search.json
    python -m experiments.study.search RUN RUN RUN --publish   # results/search.json, its table

A base model "may not give up" where a line break is forced after <think> and after each "no", up to
the same limit of tokens. What GRPO adds to mere going on is the margin over it.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import TASKS
from data.problem import Problem, sample_problems, stream
from data.signs import MAX_TOTAL, Signs, candidates, line, parts_of
from experiments.study.collect import (
    RESULTS,
    cell,
    check_one_configuration,
    grid,
    made_here,
    made_on,
    spread,
    write_into_page,
)
from experiments.study.measure import finished_run
from experiments.watch.plot import read_log
from kit.evaluate import Answers, answer_problems, grade, held_out_problems, mean, pass_at_k
from kit.flags import command_line
from kit.run import set_up
from model import KVCache, Transformer, write_whole
from rewards import format_reward
from sample import load_policy, tokenizer_of
from train import Config

PROBLEMS, SAMPLES = 128, 4  # held-out problems of each level, completions of each
FAILURES = (0, 1, 2, 3, 5, 7, 9)  # misses before a planted try
PLANTED = 3  # level of planted tries: four numbers
FORCED = "base that may not give up"
KEPT = ("step", "accuracy", "completion_tokens", "held_out_accuracy", "tries")  # of the log
ROWS = {
    "pass@1": "right",
    "tries": "tries",
    "most tries": "most tries of a completion",
    "tokens": "tokens",
    "format": "in the format",
    "totals right": "tries worked out right",
    "verdicts true": "verdicts true",
    "lift": "lift: hits, over those of uniform tries",
    "repeats": "tries that repeat one",
    "uniform repeats": "the same, of uniform tries",
}
NUMBERS = {"tries", "most tries", "tokens", "lift"}  # of these rows; all others are shares
ENDS = {"yes": '"yes"', "gave up": "giving up", "limit": "the limit of tokens", "no try": "no try"}
NOES = ("1", "2", "3", "6", "9")  # after which of a thought's "no" the table tells what comes next
MODELS = ("base", FORCED, "R1-Zero")
WITHIN = (32, 64, 128, 256)  # tokens within which an answer has to be there
MANY = 16  # answers of the base model to a problem, of which one may be right


class MayNotGiveUp:
    """A model that begins a try after <think> and after each "no". For sampling, with a cache."""

    def __init__(self, model: Transformer):
        self.model, self.config, self.embedding = model, model.config, model.embedding
        self.in_bfloat16 = model.in_bfloat16
        encode = tokenizer_of(model).encode
        self.before = torch.tensor(encode("<think> no", tags=True), device=model.cos.device)
        (self.line_break,) = encode("\n")

    def __call__(self, tokens: Tensor, cache: KVCache, first: int = 0) -> Tensor:
        logits = self.model(tokens, cache, first)
        forced = torch.isin(tokens[:, first:], self.before)
        logits[forced] = -torch.inf
        logits[..., self.line_break][forced] = 0.0
        return logits


def describe(problems: list[Problem], answers: Answers) -> dict:
    """What completions show of the search. Shares are of all tries unless said otherwise.

    "lift" is the hits over the sum, over the same tries, of that problem's share of candidates that
    hit. It is 1 in expectation for uniform random tries under any rule of stopping. "uniform
    repeats" is the share of repeats that uniform random tries would have at the same places.
    """
    rows = [
        (problem, text, TASKS[problem.task].tries(problem, text))
        for problem, group in zip(problems, answers)
        for text, _ in group
    ]
    tries = [each for *_, found in rows for each in found]
    chance, uniform = 0.0, 0.0
    for problem, _, found in rows:
        numbers, target = parts_of(problem)
        values = list(candidates(numbers).values())
        misses = len(values) - values.count(target)
        chance += len(found) * (1 - misses / len(values))
        for index in range(len(found)):
            seen = 1 - (1 - 1 / misses) ** index if misses else 0.0  # of the misses, by then
            uniform += misses / len(values) * seen
    judged = [each for each in tries if each.verdict]
    ends = Counter(how_it_ends(text, found) for _, text, found in rows)
    right, tokens = grade(problems, answers), [[n for _, n in group] for group in answers]
    return {
        "pass@1": right.mean(),
        "within": {str(n): (right * (np.array(tokens) <= n)).mean() for n in WITHIN},
        "format": np.mean([format_reward(text) for _, text, _ in rows]),
        "tokens": np.mean(tokens),
        "tries": np.mean([len(found) for *_, found in rows]),
        "most tries": max(len(found) for *_, found in rows),
        "numbers and target copied": mean([each.copied for each in tries]),
        "totals right": mean([each.computed for each in tries]),
        "verdicts true": mean([each.truthful for each in judged]),
        "lift": sum(each.hits for each in tries) / chance if chance else None,
        "repeats": mean([each.repeated for each in tries]),
        "uniform repeats": uniform / len(tries) if tries else None,
        "ends": {how: count / len(rows) for how, count in sorted(ends.items())},
        "goes on": goes_on([(text, found) for _, text, found in rows]),
    }


def how_it_ends(text: str, tries: list) -> str:
    """By "yes", by giving up after a miss, at the limit of tokens, without a try."""
    if "</think>" not in text:
        return "limit"
    if not tries:
        return "no try"
    return "yes" if tries[-1].verdict == "yes" else "gave up"


def goes_on(rows: list[tuple[str, list]]) -> dict[str, tuple[float, int]]:
    """By the index of a try: the share of its "no" that is followed by a new try, and how often it
    was said. Thoughts that the limit cut after a "no" do not count there."""
    found = defaultdict(list)
    for text, tries in rows:
        for index, each in enumerate(tries, 1):
            if each.verdict == "no" and (index < len(tries) or "</think>" in text):
                found[str(index)].append(index < len(tries))
    return {index: (mean(went), len(went)) for index, went in found.items()}


def plant(rng: random.Random, problem: Problem, failures: int) -> dict[str, tuple[Problem, str]]:
    """Tries that were written for a model, up to their verdict: problems over the same numbers, and
    the opening of a thought about each. After `failures` misses the last try hits, misses, or
    misses by one."""
    task, (numbers, _) = TASKS[problem.task], parts_of(problem)
    values = candidates(numbers)
    tried, value = rng.choice(list(values.items()))
    targets = {
        "hit": value,
        "miss": rng.choice([x for x in values.values() if x != value]),
        "miss by one": rng.choice([x for x in (value - 1, value + 1) if 0 <= x <= MAX_TOTAL]),
    }
    planted = {}
    for kind, target in targets.items():
        misses = [x for x, total in values.items() if total != target]
        lines = [line(target, x) for x in (*rng.choices(misses, k=failures), tried)]
        planted[kind] = task.ask(numbers, target), "".join(lines).rpartition(" ")[0]
    return planted


@torch.no_grad()
def verdicts(model: Transformer, level: int, failures: int, seed: int, count: int = 200) -> dict:
    """P("yes") after planted tries of each kind, for held-out lists of numbers."""
    rng, tokenizer = stream(seed, "planted", failures), tokenizer_of(model)
    (yes,) = tokenizer.encode(" yes")
    found = defaultdict(list)
    for asked in held_out_problems(model.config.task, [level], count, seed, "planted"):
        for kind, (problem, thought) in plant(rng, asked, failures).items():
            ids = tokenizer.encode(problem.prompt)
            ids += tokenizer.encode(f"<think>{thought}", tags=True)
            logits = model(torch.tensor([ids], device=model.cos.device), first=len(ids) - 1)
            found[kind].append(logits[0, 0].softmax(-1)[yes].item())
    return {kind: mean(values) for kind, values in found.items()}


def examine(model: Transformer, levels: list[int], problems: int, samples: int, **how) -> dict:
    """`describe` for each level."""
    found = {}
    for level in levels:
        rng, task = stream(how["seed"], "search"), TASKS[model.config.task]
        asked = sample_problems(rng, task, [level], problems, held_out=True)
        found[str(level)] = describe(asked, answer_problems(model, asked, samples, **how))
    return found


def spend(model: Transformer, levels: list[int], problems: int, **how) -> dict:
    """For each level, the share of problems of which one of k answers is right, and the tokens of k
    answers."""
    found = {}
    for level in levels:
        asked = held_out_problems(model.config.task, [level], problems, how["seed"], "search")
        answers = answer_problems(model, asked, MANY, **how)
        counts, tokens = grade(asked, answers).sum(axis=1), mean([n for x in answers for _, n in x])
        found[str(level)] = {
            str(k): (mean([pass_at_k(MANY, count, k) for count in counts]), k * tokens)
            for k in (1, 2, 4, 8, 16)
        }
    return found


def examine_run(folder: Path, problems: int, samples: int) -> dict:
    """What is known of the models of a run, as its search.json holds it. Raises ValueError, in one
    line, for the folder of another run."""
    config = finished_run(folder)
    if not isinstance(TASKS[config.task], Signs):
        raise ValueError(f"{folder} is of {config.task}: only thoughts of signs are read")
    set_up(config)
    base, r1_zero = (load_policy(folder / f"{x}.pt") for x in ("base", "r1_zero"))
    models = dict(zip(MODELS, (base, MayNotGiveUp(base), r1_zero)))
    how = {"limit": config.max_new_tokens, "seed": config.seed}
    levels = [level for level in config.levels if level > 1]
    result = {
        name: examine(model, levels, problems, samples, **how) for name, model in models.items()
    }
    result["greedy"] = examine(r1_zero, levels, problems, 1, temperature=0.0, **how)
    result["one of k"] = spend(base, levels, problems, **how)
    result["planted"] = {
        name: {failures: verdicts(model, PLANTED, failures, config.seed) for failures in FAILURES}
        for name, model in (("base", base), ("R1-Zero", r1_zero))
    }
    return result


def published(runs: list[Path]) -> dict:
    """The searches of finished runs, by seed, each with the curves of its log. Raises ValueError,
    in one line, for a seed that comes twice and for runs of other settings."""
    seeds, own = [], ("seed", "out", "init", "eval_every")  # of each run, and of no account here
    settings = [json.loads((folder / "config.json").read_text()) for folder in runs]
    if len({each["seed"] for each in settings}) < len(runs):
        raise ValueError("a seed comes twice: give each run once")
    check_one_configuration(runs, settings, own)
    for folder in runs:
        log = [{name: x for name, x in each.items() if name in KEPT} for each in read_log(folder)]
        result = json.loads((folder / "result.json").read_text())
        search = json.loads((folder / "search.json").read_text())
        seeds.append({"seed": result["seed"], "log": log, "search": search})
    plain = asdict(Config().filled())
    changed = [
        f" --{name} {settings[0][name]}"
        for name, x in plain.items()
        if settings[0][name] != x and name not in own
    ]
    return {
        "command": f"python train.py --seed SEED{''.join(changed)}",
        **made_here(),
        "seeds": sorted(seeds, key=lambda each: each["seed"]),
    }


def share_of_noes(seeds: list[tuple[float, int]]) -> str:
    """The share that goes on, over seeds; "-" where one of them met fewer than 20 such "no"."""
    return cell([share for share, _ in seeds]) if all(n >= 20 for _, n in seeds) else "-"


def table(results: dict) -> str:
    """A row for each measure and each count of numbers, a column for each model."""
    seeds = [each["search"] for each in results["seeds"]]
    models, rows = MODELS, []
    for name, shown in ROWS.items():
        for level in seeds[0][models[0]]:
            values = ([seed[model][level][name] for seed in seeds] for model in models)
            cells = map(spread if name in NUMBERS else cell, values)
            rows.append([f"{shown}, {int(level) + 1} numbers", *cells])
    for level in seeds[0][models[0]]:
        for how, shown in ENDS.items():
            ends = (
                [seed[model][level]["ends"].get(how, 0.0) for seed in seeds] for model in models
            )
            rows.append([f"ends by {shown}, {int(level) + 1} numbers", *map(cell, ends)])
    for level in seeds[0][models[0]]:
        for index in NOES:
            went = [
                [seed[m][level]["goes on"].get(index, [0, 0]) for seed in seeds] for m in models
            ]
            cells = [share_of_noes(each) for each in went]
            rows.append([f'goes on after "no" number {index}, {int(level) + 1} numbers', *cells])
    for level in seeds[0][models[0]]:
        gains = [seed["R1-Zero"][level]["pass@1"] - seed[FORCED][level]["pass@1"] for seed in seeds]
        row = f"margin over it, in points, {int(level) + 1} numbers"
        rows.append([row, "", "", spread([100 * gain for gain in gains])])
    for failures in ("0", "9"):
        for kind in ("hit", "miss", "miss by one"):
            planted = (
                [x["planted"].get(m, {}).get(failures, {}).get(kind) for x in seeds] for m in models
            )
            cells = [cell(values) if None not in values else "-" for values in planted]
            rows.append([f'P("yes") after {failures} misses and a planted {kind}', *cells])
    return grid(["", *models], rows, below(results))


def below(results: dict) -> str:
    told = ", ".join(str(each["seed"]) for each in results["seeds"])
    how = (
        f"`{results['command']}`, seeds {told}: mean (lowest-highest); {PROBLEMS} held-out problems"
    )
    return f"{how} of each row, {SAMPLES} completions of each. {made_on(results)}"


def compute_table(results: dict) -> str:
    """What tokens buy: for each count of numbers, right answers within so many tokens, a right one
    among so many answers of the base model, and R1-Zero without chance."""
    seeds, rows = [each["search"] for each in results["seeds"]], []
    for level in seeds[0]["greedy"]:
        numbers = f"{int(level) + 1} numbers"
        for n in map(str, WITHIN):
            cells = [cell([seed[name][level]["within"][n] for seed in seeds]) for name in MODELS]
            rows.append([f"right within {n} tokens, {numbers}", *cells])
        for k in seeds[0]["one of k"][level]:
            shares, tokens = zip(*(seed["one of k"][level][k] for seed in seeds))
            row = f"a right one among {k}, {numbers}"
            rows.append([row, f"{cell(shares)}, {mean(tokens):.0f} tokens", "", ""])
        for name, shown in (("pass@1", "right"), ("repeats", "tries that repeat one")):
            greedy = cell([seed["greedy"][level][name] for seed in seeds])
            rows.append([f"greedy: {shown}, {numbers}", "", "", greedy])
    counts = f" Rows of k answers: {MANY} completions of each; greedy: one."
    return grid(["", *MODELS], rows, below(results) + counts)


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run that has ended")
    for name, count in (("--problems", PROBLEMS), ("--samples", SAMPLES)):
        parser.add_argument(name, type=int, default=count, help=f"[{count}]")
    text = "write experiments/results/search.json and its table; runs that have their own keep it"
    parser.add_argument("--publish", action="store_true", help=text)
    flags = parser.parse_args(arguments)
    for folder in flags.run:
        path = folder / "search.json"
        if flags.publish and path.is_file():
            continue
        try:
            result = examine_run(folder, flags.problems, flags.samples)
        except ValueError as error:
            parser.error(str(error))
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
        print(summary(result), f"-> {path}", sep="\n")
    if flags.publish:
        try:
            results = published(flags.run)
        except ValueError as error:
            parser.error(str(error))
        (RESULTS / "search.json").write_text(json.dumps(results, indent=1) + "\n")
        for name, text in (("search", table(results)), ("compute", compute_table(results))):
            write_into_page(f"{name}: made by experiments/study/search.py", text)
            print(text)


def summary(result: dict) -> str:
    """The first of it as a table."""
    shown = ("pass@1", "format", "tokens", "tries", "most tries", "totals right", "lift")
    lines = [f"{'':34}" + "".join(f"{name:>13}" for name in shown)]
    for name in MODELS:
        for level, found in result[name].items():
            numbers = (found[x] for x in shown)
            cells = "".join(f"{'-' if x is None else f'{x:.3f}':>13}" for x in numbers)
            lines.append(f"{f'{name}, {int(level) + 1} numbers':34}{cells}")
    for name, told in result["planted"].items():
        for failures, kinds in told.items():
            kinds = ", ".join(f"{x:.3f} after a {kind}" for kind, x in kinds.items())
            lines.append(f'{name}, P("yes") after {failures} misses: {kinds}')
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
