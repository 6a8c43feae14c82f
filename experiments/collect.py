"""Collect finished runs: their results as one JSON file, and the table that the README shows.

    python experiments/collect.py cpu out/cpu-grpo-seed*             # after the runs, on the machine that made them
    python experiments/collect.py language out/language-*
    python experiments/collect.py curriculum out/steps160 out/curriculum160

Each of the README's tables stands between two comments and is written by this command alone; a test compares the two.
"""

import argparse
import functools
import json
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

from train import Config

RESULTS = ROOT / "experiments" / "results"
Metrics = dict  # of one model, as `train.evaluate` gives them


@dataclass(frozen=True)
class Table:
    """`columns` picks the metrics of a column from a run, or None where the run is of another column; `rows` picks a
    number from metrics. A run belongs here if its settings are `settings`, but for those named in `free`."""

    command: str
    settings: Config
    free: tuple[str, ...]
    columns: dict[str, Callable[[dict], Metrics | None]]
    rows: dict[str, Callable[[Metrics], float]]


def at(*keys: str) -> Callable[[dict], float | Metrics]:
    """What stands under these keys, one within the other."""
    return lambda metrics: functools.reduce(dict.__getitem__, keys, metrics)


def after(**settings: float) -> Callable[[dict], Metrics | None]:
    """What GRPO ended with, in the runs of these settings."""
    return lambda run: run["r1_zero"] if settings.items() <= run["settings"].items() else None


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
        "python train.py --preset cpu --languages en,ko --max_level 4 --pretrain_steps 8000 --eval_problems 200 "
        "--seed SEED --init BASE",
        Config(languages="en,ko", max_level=4, pretrain_steps=8000, eval_problems=200),
        ("language_weight", "init"),
        {
            "base model": at("base"),
            "accuracy and format": after(language_weight=0.0),
            "with `--language_weight 1`": after(language_weight=1.0),
        },
        {
            "right answers to English questions": at("by_language", "en"),
            "right answers to Korean questions": at("by_language", "ko"),
            "English questions thought through in English": at("thinks_in", "en", "en"),
            "Korean questions thought through in Korean": at("thinks_in", "ko", "ko"),
            "Korean questions thought through in English": at("thinks_in", "ko", "en"),
            "Korean questions, thoughts in both": at("thinks_in", "ko", "mixed"),
        },
    ),
    "curriculum": Table(
        "python train.py --preset cpu --init out/cpu-grpo-seed0/base.pt --steps 160",
        Config(steps=160),
        ("curriculum", "init"),
        {
            "base model": at("base"),
            "levels 2 to 5": after(curriculum=0.0),
            "with `--curriculum 0.8`": after(curriculum=0.8),
        },
        {
            "levels 2 to 5": at("pass@1"),
            **{f"level {level}": at("beyond", str(level)) for level in (6, 7, 8, 9)},
        },
    ),
}


def processor_names() -> list[str]:
    """One for each core; none where the system does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    return re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []


def processor() -> str:
    names = processor_names()
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def cell(values: list[float]) -> str:
    """Their mean and, where there are several, their range: shares as per cent, counts as they are."""
    scale, unit = (100, " %") if max(values) <= 1 else (1, "")
    low, high, mean = (scale * value for value in (min(values), max(values), sum(values) / len(values)))
    return f"{mean:.1f}{unit}" + (f" ({low:.1f}-{high:.1f})" if len(values) > 1 else "")


def markdown(name: str, results: dict) -> str:
    table, runs = TABLES[name], results["runs"]
    # By seed, as runs from one base model show its numbers twice.
    columns = [{run["seed"]: pick(run) for run in runs if pick(run)}.values() for pick in table.columns.values()]
    lines = [f"| held-out problems | {' | '.join(table.columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for text, number in table.rows.items():
        lines.append(f"| {text} | {' | '.join(cell([number(metrics) for metrics in column]) for column in columns)} |")
    seeds = sorted({run["seed"] for run in runs})
    said = f"seeds {', '.join(map(str, seeds))}: mean (lowest-highest)" if len(seeds) > 1 else f"seed {seeds[0]}"
    minutes = max(run["seconds"]["total"] / 60 for run in runs)
    machine = f"{minutes:.1f} minutes at most on {results['hardware']}, torch {results['torch']}"
    return "\n".join([*lines, "", f"`{table.command}`, {said}. {machine}."])


def write_into_readme(comment: str, text: str) -> None:
    """Put a text between this comment of the README and the next end."""
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text().partition(f"<!-- {comment} -->\n")
    _, end, following = rest.partition("<!-- end -->")
    if not (start and end):
        sys.exit(f"README.md has lost the comments between which the table stands: {comment}")
    readme.write_text(before + start + text + "\n" + end + following)


def read_run(folder: Path, table: Table) -> dict:
    if not (folder / "result.json").is_file():
        sys.exit(f"{folder} is not the folder of a finished run: it holds no result.json")
    settings = json.loads((folder / "config.json").read_text())
    config = Config(**settings)
    same = {name: getattr(table.settings, name) for name in ("seed", "out", *table.free)}
    if replace(config, **same) != replace(table.settings, **same):
        sys.exit(f"{folder} was not made by `{table.command}`: its config.json differs")
    free = {name: settings[name] for name in table.free if name != "init"}
    return json.loads((folder / "result.json").read_text()) | {"settings": free}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    write_into_readme(f"{args.table}: made by experiments/collect.py", text)
    (RESULTS / f"{args.table}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
