"""Two runs side by side: what was set differently, how they ended, and what their logs say.

    python experiments/compare.py out/cpu-grpo-seed0 out/harder
    python experiments/compare.py out/cpu-grpo-seed0 out/harder --plot compare.png   # needs matplotlib

A run that is still going, or that stopped, is compared as far as its log goes.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

CURVES = "accuracy,held_out_accuracy,completion_tokens,entropy,no_signal,grad_norm"
LAST = 10  # steps
CODE = ("grpo.py", "rewards.py", "train.py")  # what a run keeps of it

Run = tuple[dict, list[dict], dict]  # configuration, GRPO lines of the log, result (empty where it has not ended)


def read_run(folder: Path) -> Run:
    """Raises ValueError, in one line, where the folder is not that of a run, or GRPO has not begun."""
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not the folder of a run: it holds no {name}")
    lines = (folder / "log.jsonl").read_text().split("\n")[:-1]  # after the last line break a line is being written
    records = [record for record in map(json.loads, lines) if record["phase"] == "grpo"]
    if not records:
        raise ValueError(f"{folder} has not taken a step of GRPO yet")
    result = folder / "result.json"
    ended = json.loads(result.read_text()) if result.is_file() else {}
    return json.loads((folder / "config.json").read_text()), records, ended


def code_that_differs(folders: list[Path]) -> list[str]:
    def texts(name: str) -> set[str]:
        return {(folder / name).read_text() if (folder / name).is_file() else "" for folder in folders}

    return [name for name in CODE if len(texts(name)) > 1]


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


def print_comparison(folders: list[Path], runs: list[Run]) -> None:
    (config, records, ended), (other_config, other_records, other_ended) = runs
    for letter, folder, run in zip("AB", folders, runs):
        print(f"{letter}  {folder}, {len(run[1])} of {run[0]['steps']} steps of GRPO")
    if changed := code_that_differs(folders):
        print(f"the code differs too: {', '.join(changed)} (diff {folders[0] / changed[0]} {folders[1] / changed[0]})")
    names = [name for name in config | other_config if name != "out" and config.get(name) != other_config.get(name)]
    print_table("what was set differently", [(name, config.get(name), other_config.get(name)) for name in names])
    if ended and other_ended:
        for model, title in (("base", "base model, held out"), ("r1_zero", "R1-Zero, held out")):
            one, two = ended[model], other_ended[model]
            print_table(title, [(name, one[name], two.get(name)) for name in one if isinstance(one[name], float)])
    fields = [name for name in records[-1] | records[0] | other_records[0] if name not in ("phase", "step")]
    steps = min(len(records), len(other_records))  # those that both have taken
    for first in (max(1, steps - LAST + 1), 1):
        part = slice(first - 1, steps)
        rows = [(name, mean(records[part], name), mean(other_records[part], name)) for name in fields]
        print_table(f"log, mean over steps {first} to {steps}", rows)


def check_picture(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """End the program with a line on what is wrong, before any work, where a picture could not be drawn."""
    if path and not path.absolute().parent.is_dir():
        parser.error(f"--plot {path}: there is no folder {path.parent}")
    if path and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install -r experiments/requirements.txt")


def plot(path: Path, folders: list[Path], runs: list[Run], curves: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = math.ceil(len(curves) / 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 3 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, curves):
        for letter, folder, (_, records, _) in zip("AB", folders, runs):
            points = [(record["step"], record[name]) for record in records if name in record]
            sparse = "o" if len(points) < len(records) else ""
            steps, values = zip(*points) if points else ([], [])
            axis.plot(steps, values, marker=sparse, label=f"{letter}  {folder.name}")
        axis.set(title=name, xlabel="step")
    axes.flat[0].legend()
    figure.savefig(path, dpi=100, format="png")
    print(f"\n-> {path}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs=2, type=Path, help="folder of a run")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw their curves, as a PNG")
    parser.add_argument("--curves", default=CURVES, metavar="A,B,...", help=f"fields of the log to draw [{CURVES}]")
    args = parser.parse_args(arguments)
    check_picture(parser, args.plot)
    try:
        runs = [read_run(folder) for folder in args.run]
    except ValueError as error:
        parser.error(str(error))
    curves = args.curves.split(",")
    for name in curves:
        if args.plot and not any(name in record for _, records, _ in runs for record in records):
            parser.error(f"--curves: neither log has a field {name}")
    print_comparison(args.run, runs)
    if args.plot:
        plot(args.plot, args.run, runs, curves)


if __name__ == "__main__":
    main(sys.argv[1:])
