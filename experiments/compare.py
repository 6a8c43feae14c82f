"""Two runs side by side: what was set differently, how they ended, and what their logs say.

    python experiments/compare.py out/cpu-grpo-seed0 out/harder
    python experiments/compare.py out/cpu-grpo-seed0 out/harder --plot compare.png   # needs matplotlib

A run that is still going, or that stopped, is compared as far as its log goes.
"""

import argparse
import json
import sys
from pathlib import Path

CURVES = ("accuracy", "held_out_accuracy", "completion_tokens", "entropy", "no_signal", "k3_old")
LAST = 10  # steps


def read_run(folder: Path) -> tuple[dict, list[dict], dict]:
    """The configuration of a run, the GRPO lines of its log, and its result (empty where it has not ended)."""
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not the folder of a run: it holds no {name}")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["phase"] == "grpo"]
    if not records:
        raise ValueError(f"{folder} has not taken a step of GRPO yet")
    result = folder / "result.json"
    ended = json.loads(result.read_text()) if result.is_file() else {}
    return json.loads((folder / "config.json").read_text()), records, ended


def mean(records: list[dict], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return sum(values) / len(values) if values else None


def cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: list[tuple[str, object, object]]) -> None:
    print(f"\n{title:36} {'A':>14} {'B':>14} {'B - A':>10}")
    for name, one, two in rows:
        numbers = isinstance(one, float) and isinstance(two, float)
        print(f"{name:36} {cell(one):>14} {cell(two):>14} {f'{two - one:+.3g}' if numbers else '':>10}".rstrip())


def print_comparison(folders: list[Path], runs: list[tuple[dict, list[dict], dict]]) -> None:
    (config, records, ended), (other_config, other_records, other_ended) = runs
    for letter, folder, run in zip("AB", folders, runs):
        print(f"{letter}  {folder}, {len(run[1])} of {run[0]['steps']} steps of GRPO")
    names = [name for name in config | other_config if name != "out" and config.get(name) != other_config.get(name)]
    print_table("what was set differently", [(name, config.get(name), other_config.get(name)) for name in names])
    if ended and other_ended:
        for model, title in (("base", "base model, held out"), ("r1_zero", "R1-Zero, held out")):
            one, two = ended[model], other_ended[model]
            print_table(title, [(name, one[name], two[name]) for name in one if isinstance(one[name], float)])
    fields = [name for name in records[-1] | records[0] | other_records[0] if name not in ("phase", "step")]
    for title, part in ((f"log, mean over the last {LAST} steps", slice(-LAST, None)), ("log, all steps", slice(None))):
        print_table(title, [(name, mean(records[part], name), mean(other_records[part], name)) for name in fields])


def plot(path: str, folders: list[Path], runs: list[tuple[dict, list[dict], dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes.flat, CURVES):
        for letter, folder, (_, records, _) in zip("AB", folders, runs):
            points = [(record["step"], record[name]) for record in records if name in record]
            axis.plot(
                *zip(*points), marker="o" if name == "held_out_accuracy" else "", label=f"{letter}  {folder.name}"
            )
        axis.set(title=name, xlabel="step")
    axes.flat[0].legend()
    figure.savefig(path, dpi=100)
    print(f"\n-> {path}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs=2, type=Path, help="folder of a run")
    parser.add_argument("--plot", metavar="FILE", help="draw their curves")
    args = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in args.run]
    except ValueError as error:
        parser.error(str(error))
    print_comparison(args.run, runs)
    if args.plot:
        plot(args.plot, args.run, runs)


if __name__ == "__main__":
    main(sys.argv[1:])
