"""Collect finished runs: their results as one JSON file, and the table that the README shows.

    python -m experiments.study.collect cpu out/chains-cpu-*    # on the machine that made them
    python -m experiments.study.collect language out/language-*

Each generated table stands between two comments, and this command alone writes it; a test compares
the two.
"""

import functools
import json
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from kit.flags import command_line
from rewards import rule_weights
from train import Config

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "README.md"
Metrics = dict  # of one model, as kit.evaluate.evaluate gives them


@dataclass(frozen=True)
class Table:
    """`columns` picks the metrics of a column from a run, or None where the run is of another
    column; `rows` picks a number from metrics. A run belongs here if its settings are `settings`,
    but for the settings named in `free`."""

    command: str
    settings: Config
    free: tuple[str, ...]
    columns: dict[str, Callable[[dict], Metrics | None]]
    rows: dict[str, Callable[[Metrics], float]]


def at(*keys: str) -> Callable[[dict], float | Metrics]:
    """What stands under these keys, one within the other."""
    return lambda metrics: functools.reduce(dict.__getitem__, keys, metrics)


def after(rewards: str) -> Callable[[dict], Metrics | None]:
    """What GRPO ended with, in the runs that these rules paid."""
    return lambda run: run["r1_zero"] if paid(run["settings"]["rewards"]) == paid(rewards) else None


def paid(rewards: str) -> dict[str, float]:
    """The rules that pay: a rule of weight 0 is only logged."""
    return {name: weight for name, weight in rule_weights(rewards).items() if weight}


TABLES = {
    "cpu": Table(
        "python train.py --preset cpu --seed SEED",
        Config(),
        (),
        {"base model": at("base"), "R1-Zero": at("r1_zero")},
        {
            "right answers, temperature 1 (pass@1)": at("pass@1"),
            "right answers, greedy": at("greedy"),
            "right by majority of 8": at("maj@8"),
            "right at least once in 8 (pass@8)": at("pass@8"),
            "in the format of the tags": at("format"),
            "tokens of a completion": at("completion_tokens"),
        },
    ),
    "language": Table(
        "python train.py --preset cpu --task chains-en-ko --min_level 2 --max_level 4 "
        "--pretrain_steps 8000 --eval_problems 200 --seed SEED --init BASE",
        Config(
            task="chains-en-ko", min_level=2, max_level=4, pretrain_steps=8000, eval_problems=200
        ),
        ("rewards", "init"),
        {
            "base model": at("base"),
            "accuracy and format": after("accuracy=1,format=1"),
            "accuracy, format and language": after("accuracy=1,format=1,language=1"),
        },
        {
            "right answers to English questions": at("by_language", "en"),
            "right answers to Korean questions": at("by_language", "ko"),
            "English questions thought through in English": at("thinking", "en_thinks_in_en"),
            "Korean questions thought through in Korean": at("thinking", "ko_thinks_in_ko"),
            "Korean questions thought through in English": at("thinking", "ko_thinks_in_en"),
            "Korean questions, thoughts in both": at("thinking", "ko_thinks_in_both"),
        },
    ),
}


def processor_names() -> list[str]:
    """A name for each core; none where the system does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    return re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []


def processor() -> str:
    names = processor_names()
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def cell(values: list[float]) -> str:
    """Their mean and, where there are several, their range: shares as per cent, counts as they
    are."""
    scale, unit = (100, " %") if max(values) <= 1 else (1, "")
    ends = (min(values), max(values), sum(values) / len(values))
    low, high, mean = (scale * value for value in ends)
    return f"{mean:.1f}{unit}" + (f" ({low:.1f}-{high:.1f})" if len(values) > 1 else "")


def markdown(name: str, results: dict) -> str:
    table, runs = TABLES[name], results["runs"]
    columns = [  # by seed, as runs from one base model show its numbers twice
        {run["seed"]: pick(run) for run in runs if pick(run)}.values()
        for pick in table.columns.values()
    ]
    rows = [
        [text, *(cell([number(metrics) for metrics in column]) for column in columns)]
        for text, number in table.rows.items()
    ]
    seeds = sorted({run["seed"] for run in runs})
    several = f"seeds {', '.join(map(str, seeds))}: mean (lowest-highest)"
    said = several if len(seeds) > 1 else f"seed {seeds[0]}"
    minutes = max(run["seconds"]["total"] / 60 for run in runs)
    how = f"`{table.command}`, {said}. {minutes:.1f} minutes at most on {made_on(results)}"
    return grid(["held-out problems", *table.columns], rows, how)


def grid(head: list[str], rows: list[list[str]], below: str) -> str:
    """A table in Markdown, and a line under it."""
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join([*lines, "", below])


def made_on(results: dict) -> str:
    """The end of the line under a table: hardware, torch and, for older results, the commit."""
    at_commit = f" Made at {results['made_at']}." if "made_at" in results else ""
    return f"{results['hardware']}, torch {results['torch']}.{at_commit}"


def write_into_readme(comment: str, text: str, page: Path = PAGE) -> None:
    """Put a text between this comment of a page and the next end."""
    before, start, rest = page.read_text().partition(f"<!-- {comment} -->\n")
    _, end, following = rest.partition("<!-- end -->")
    if not (start and end):
        sys.exit(f"{page} has lost the comments between which the table stands: {comment}")
    page.write_text(before + start + text + "\n" + end + following)


def read_run(folder: Path, table: Table) -> dict:
    if not (folder / "result.json").is_file():
        sys.exit(f"{folder} is not the folder of a finished run: it holds no result.json")
    settings = json.loads((folder / "config.json").read_text())
    free = {name: settings.get(name) for name in ("seed", "out", *table.free)}
    if settings != {"program": "train.py", **asdict(table.settings.filled()), **free}:
        sys.exit(f"{folder} was not made by `{table.command}`: its config.json differs")
    told = {name: settings[name] for name in table.free if name != "init"}
    return json.loads((folder / "result.json").read_text()) | {"settings": told}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("table", choices=TABLES, help="which of the README's tables")
    parser.add_argument("run", nargs="+", type=Path, help="folder of a finished run")
    args = parser.parse_args(arguments)
    runs = [read_run(folder, TABLES[args.table]) for folder in args.run]
    results = {
        "command": TABLES[args.table].command,
        "hardware": processor(),
        "torch": version("torch"),
        "runs": sorted(runs, key=lambda run: (run["seed"], str(run["settings"]))),
    }
    text = markdown(args.table, results)
    (RESULTS / f"{args.table}.json").write_text(json.dumps(results, indent=1) + "\n")
    write_into_readme(f"{args.table}: made by experiments/study/collect.py", text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
