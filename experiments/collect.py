"""Collect finished runs: their results as one JSON file, and the table that the README shows.

    python experiments/collect.py out/cpu-grpo-seed*      # after the runs, on the machine that made them

The README's table stands between two comments and is written by this command alone; a test compares the two.
"""

import json
import platform
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

from train import Config

COMMAND = "python train.py --seed SEED"
ROWS = {
    "pass@1": "right answers, temperature 1 (pass@1)",
    "greedy": "right answers, greedy",
    "maj@8": "right by majority of 8",
    "pass@8": "right at least once in 8 (pass@8)",
    "format": "in the asked format",
    "completion_tokens": "tokens of a completion",
}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def cells(runs: list[dict], name: str) -> str:
    """The Markdown cells before | after, each the mean over the runs and its range."""
    texts = []
    for model in ("base", "r1_zero"):
        values = [run[model][name] for run in runs]
        scale, unit = (1, "") if name.endswith("tokens") else (100, " %")
        low, high, mean = (scale * value for value in (min(values), max(values), sum(values) / len(values)))
        texts.append(f"{mean:.1f}{unit} ({low:.1f}-{high:.1f})")
    return " | ".join(texts)


def table(results: dict) -> str:
    runs = results["runs"]
    minutes = [run["seconds"]["total"] / 60 for run in runs]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines = ["| held-out problems, levels 2 to 5 | base model | R1-Zero |", "| --- | --- | --- |"]
    lines += [f"| {text} | {cells(runs, name)} |" for name, text in ROWS.items()]
    return "\n".join(
        [
            *lines,
            "",
            f"`{results['command']}`, seeds {seeds}: mean (lowest-highest). {max(minutes):.1f} minutes at most on "
            f"{results['hardware']}, torch {results['torch']}.",
        ]
    )


def main(folders: list[str]) -> None:
    if not folders:
        sys.exit("name the folders of finished runs: python experiments/collect.py out/cpu-grpo-seed*")
    runs = []
    for folder in map(Path, folders):
        if not (folder / "result.json").is_file():
            sys.exit(f"{folder} is not the folder of a finished run: it holds no result.json")
        config = Config(**json.loads((folder / "config.json").read_text()))
        if replace(config, seed=0, out="") != Config():
            sys.exit(f"{folder} was not made by `{COMMAND}` alone: its config.json differs from the defaults")
        runs.append(json.loads((folder / "result.json").read_text()))
    results = {
        "command": COMMAND,
        "hardware": processor(),
        "torch": version("torch"),
        "runs": sorted(runs, key=lambda run: run["seed"]),
    }
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text().partition("<!-- results: made by experiments/collect.py -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    if not (start and end):
        sys.exit("README.md has lost the comments between which the table stands")
    (ROOT / "experiments" / "results" / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    readme.write_text(before + start + table(results) + "\n" + end + after)
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
