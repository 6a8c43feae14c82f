"""Collect the results and the mean logs of the runs behind recipes.md and the notes' table of
losses.

    python -m experiments.study.changes out/changes/*    # folders with the names in RUNS

RUNS has the flags of each run. A run of a recipe was made in a copy of the code with its diff.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from experiments.study.collect import RESULTS, processor
from experiments.watch.plot import read_log

RUNS = {
    **{name: f"--variant {name}" for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")},
    **{name: f"--variant {name} --minibatches 1 --lr 1e-3" for name in ("reinforce", "rloo")},
    "rloo160": "--variant rloo --minibatches 1 --lr 1e-3 --steps 160",
    "k1": "--beta 0.05 --kl k1",
    "k2": "--beta 0.05 --kl k2",
    "k3": "--beta 0.05",
    "k3_ratio": "--beta 0.05 --kl k3_ratio",
    "advantage": "the README's new advantage: --variant harder",
    "clip": "the README's new clipping rule: --variant both_sides",
    "kl": "the README's new KL estimator: --beta 0.05 --kl both",
    "careful": "the README's new reward: --rewards accuracy=1,format=1,careful=1",
    "task": "the README's new task: --task chains-max, without --init",
}


def means(records: list[dict]) -> dict[str, float]:
    """The mean of each field over the lines that have it."""
    fields = {field for record in records for field in record} - {"stage", "step"}
    return {
        field: sum(values) / len(values)
        for field in sorted(fields)
        if (values := [record[field] for record in records if field in record])
    }


def summary(folder: Path) -> dict:
    """The flags, the results and the mean logs of a run."""
    records, result = read_log(folder), json.loads((folder / "result.json").read_text())
    return {
        "name": folder.name,
        "flags": RUNS[folder.name],
        "base pass@1": result["base"]["pass@1"],
        "pass@1": result["r1_zero"]["pass@1"],
        "completion_tokens": result["r1_zero"]["completion_tokens"],
        "all steps": means(records),
        "first 10": means(records[:10]),
        "last 10": means(records[-10:]),
        "after 20": means(records[18:22])["accuracy"],
    }


def main(names: list[str]) -> None:
    folders = sorted(map(Path, names), key=lambda folder: list(RUNS).index(folder.name))
    runs = [summary(folder) for folder in folders]
    results = {
        "command": "python train.py --init out/chains-cpu-grpo-seed0/base.pt FLAGS",
        "hardware": f"{processor()}, two runs at a time",
        "torch": version("torch"),
        "seed": 0,
        "all steps, first 10, last 10": "means of the log over these steps; "
        "after 20: accuracy over steps 19 to 22",
        "runs": runs,
    }
    (RESULTS / "changes.json").write_text(json.dumps(results, indent=1) + "\n")
    for run in runs:
        ended = f"{run['after 20']:.3f} {run['pass@1']:.3f} {run['completion_tokens']:.1f}"
        clipped = [run["all steps"].get(name, 0) for name in ("clip_low", "clip_high")]
        print(f"{run['name']:10} {ended}", *clipped)


if __name__ == "__main__":
    main(sys.argv[1:])
