"""Collect the results of finished runs in one JSON file, and write their table into a page.

    python -m experiments.study.collect cpu out/signs-cpu-*    # on the machine that made them
    python -m experiments.study.collect language out/language-*

A generated table stands between two comments of a page, and only a command writes it. A test
compares it with the JSON file.
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
from train import PRESETS, Config

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", *(ROOT / "experiments").rglob("README.md")]
Metrics = dict  # one model's metrics, as kit.evaluate.evaluate returns them


@dataclass(frozen=True)
class Table:
    """A table of a page. `columns` picks a column's metrics from a run, or None if the run is
    not in the column. `rows` picks a row's number from the metrics. All runs have `settings`, but
    may differ in the settings named in `free`."""

    command: str
    settings: Config
    free: tuple[str, ...]
    columns: dict[str, Callable[[dict], Metrics | None]]
    rows: dict[str, Callable[[Metrics], float]]


def at(*keys: str) -> Callable[[dict], float | Metrics]:
    """A function that looks up nested keys: at("a", "b")(x) is x["a"]["b"]."""
    return lambda metrics: functools.reduce(dict.__getitem__, keys, metrics)


def after(rewards: str) -> Callable[[dict], Metrics | None]:
    """A column: the metrics after GRPO, of the runs that were paid by these rules."""
    return lambda run: run["r1_zero"] if paid(run["settings"]["rewards"]) == paid(rewards) else None


def paid(rewards: str) -> dict[str, float]:
    """The rules with a weight. A rule of weight 0 is only logged."""
    return {name: weight for name, weight in rule_weights(rewards).items() if weight}


BEFORE_AND_AFTER = {"base model": at("base"), "R1-Zero": at("r1_zero")}
OF_SIGNS = {
    "right, 3 numbers": at("by_level", "2"),
    "right, 4 numbers": at("by_level", "3"),
    "right, 5 numbers": at("by_level", "4"),
    "right, 2 numbers (longer lists begin so)": at("apart", "1"),
    "in the format of the tags": at("format"),
    "tokens of a completion": at("completion_tokens"),
    "tries of a completion": at("thinking", "tries"),
}
TABLES = {
    "cpu": Table("python train.py --seed SEED", Config(), (), BEFORE_AND_AFTER, OF_SIGNS),
    "gpu_on_cpu": Table(
        "python train.py --preset gpu --device cpu --micro_batch 64 --seed SEED",
        Config(preset="gpu", **PRESETS["gpu"] | {"micro_batch": 64}),
        (),
        BEFORE_AND_AFTER,
        OF_SIGNS,
    ),
    "chains": Table(
        "python train.py --task chains --steps 60 --seed SEED",
        Config(task="chains", steps=60),
        (),
        BEFORE_AND_AFTER,
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
        "python train.py --task chains-en-ko --min_level 2 --max_level 4 --steps 80 --prompts 64 "
        "--eval_problems 200 --eval_samples 16 --seed SEED --init BASE",
        Config(
            task="chains-en-ko",
            min_level=2,
            max_level=4,
            steps=80,
            prompts=64,
            eval_problems=200,
            eval_samples=16,
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
    """A name for each core; an empty list if the system has no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    return re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []


def processor() -> str:
    names = processor_names()
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def made_here() -> dict[str, str]:
    """What results say of the machine that made them: `made_on` reads it."""
    return {"hardware": processor(), "torch": version("torch")}


def cell(values: list[float]) -> str:
    """The mean of the values and, if there are several, their range. Shares are in percent."""
    scale, unit = (100, " %") if max(values) <= 1 else (1, "")
    ends = (min(values), max(values), sum(values) / len(values))
    low, high, mean = (scale * value for value in ends)
    return f"{mean:.1f}{unit}" + (f" ({low:.1f}-{high:.1f})" if len(values) > 1 else "")


def spread(values: list[float]) -> str:
    """The mean of numbers that are no shares and, if there are several, their range."""
    ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{ends}"


def markdown(name: str, results: dict) -> str:
    table, runs = TABLES[name], results["runs"]
    columns = [  # one run for each seed: two runs from the same base model repeat its numbers
        {run["seed"]: pick(run) for run in runs if pick(run)}.values()
        for pick in table.columns.values()
    ]
    rows = [
        [text, *(cell([number(metrics) for metrics in column]) for column in columns)]
        for text, number in table.rows.items()
    ]
    seeds = sorted({run["seed"] for run in runs})
    several = f"seeds {', '.join(map(str, seeds))}: mean (lowest-highest)"
    spread = several if len(seeds) > 1 else f"seed {seeds[0]}"
    minutes = sorted(run["seconds"]["total"] / 60 for run in runs)
    took = " to ".join(dict.fromkeys(f"{x:.0f}" for x in (minutes[0], minutes[-1])))
    took += " minutes, beside other jobs, on"
    below = f"`{table.command}`, {spread}. {took} {made_on(results)}"
    return grid(["held-out problems", *table.columns], rows, below)


def grid(head: list[str], rows: list[list[str]], below: str) -> str:
    """A table in Markdown, with a line below it."""
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join([*lines, "", below])


def made_on(results: dict) -> str:
    """The end of the line below a table: hardware, torch and, for older results, the commit."""
    at_commit = f" Made at {results['made_at']}." if "made_at" in results else ""
    return f"{results['hardware']}, torch {results['torch']}.{at_commit}"


def write_into_page(comment: str, text: str, pages: list[Path] = PAGES) -> None:
    """Replace the text between this comment and the next `<!-- end -->`, on the one page that has
    it. Ends the program if none has."""
    found = [page for page in pages if f"<!-- {comment} -->\n" in page.read_text()]
    page = (found or pages)[0]
    before, start, rest = page.read_text().partition(f"<!-- {comment} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (start and end):
        sys.exit(f"{page} has lost the comments around the table: {comment}")
    page.write_text(before + start + text + "\n" + end + after)


def check_one_configuration(
    folders: list[Path], settings: list[dict], own: tuple[str, ...]
) -> None:
    """Raise ValueError, in one line, for runs that differ in a setting that is not their `own`."""
    first = settings[0]
    for folder, each in zip(folders, settings):
        if names := [x for x in first | each if x not in own and each.get(x) != first.get(x)]:
            raise ValueError(f"{folder} differs from {folders[0]} in {', '.join(names)}")


def read_run(folder: Path, table: Table) -> dict:
    """The result of a run, with its free settings. Ends the program if the run is not finished, or
    not of this table."""
    if not (folder / "result.json").is_file():
        sys.exit(f"{folder} is not the folder of a finished run: it holds no result.json")
    settings = json.loads((folder / "config.json").read_text())
    free = {name: settings.get(name) for name in ("seed", "out", *table.free)}
    if settings != {"program": "train.py", **asdict(table.settings.filled()), **free}:
        sys.exit(f"{folder} was not made by `{table.command}`: its config.json differs")
    kept = {name: settings[name] for name in table.free if name != "init"}
    return json.loads((folder / "result.json").read_text()) | {"settings": kept}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("table", choices=TABLES, help="a table")
    parser.add_argument("run", nargs="+", type=Path, help="folder of a finished run")
    args = parser.parse_args(arguments)
    runs = [read_run(folder, TABLES[args.table]) for folder in args.run]
    results = {
        "command": TABLES[args.table].command,
        **made_here(),
        "runs": sorted(runs, key=lambda run: (run["seed"], str(run["settings"]))),
    }
    text = markdown(args.table, results)
    (RESULTS / f"{args.table}.json").write_text(json.dumps(results, indent=1) + "\n")
    write_into_page(f"{args.table}: made by experiments/study/collect.py", text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
