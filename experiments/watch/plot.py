"""Draw the curves of one run or several from their logs, as a PNG.

    python -m experiments.watch.plot out/chains-cpu-grpo-seed0    # -> curves.png, in this folder
    python -m experiments.watch.plot out/chains-cpu-grpo-seed* --out seeds.png
    python -m experiments.watch.plot out/chains-cpu-grpo-seed0 --stage base --curves loss,grad_norm

Needs matplotlib: pip install -r experiments/requirements.txt. A run that is still going, or that
stopped, is drawn as far as its log goes.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

from kit.flags import command_line

STAGE = "r1_zero"
CURVES = {  # by stage; of another stage, those of all these that its log has
    "r1_zero": "accuracy,held_out_accuracy,completion_tokens,entropy,no_signal,grad_norm",
    "base": "loss,grad_norm,weight_norm",
}


def read_log(folder: Path, stage: str = STAGE) -> list[dict]:
    """The lines of one stage of a run. Raises ValueError, in one line, where the folder is not the
    folder of a run, or the log has no line of the stage."""
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no log.jsonl")
    lines = (folder / "log.jsonl").read_bytes().split(b"\n")
    try:
        records = list(map(json.loads, lines[:-1]))  # the last may be half written
        found = [record for record in records if record["stage"] == stage]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/log.jsonl has a line that no run wrote") from None
    if not found:
        others = ", ".join(dict.fromkeys(record["stage"] for record in records))
        known = f" (it has {others})" if others else ""
        raise ValueError(f"{folder} has no line of the stage {stage} in its log yet{known}")
    return found


def add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", default=STAGE, help=f"whose lines of the log [{STAGE}]")


def check_picture(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """End the program with a line on what is wrong, before any work, where a picture could not be
    drawn."""
    if path and path.is_dir():
        parser.error(f"{flag} {path}: a folder, where the name of a picture should be")
    if path and not path.absolute().parent.is_dir():
        parser.error(f"{flag} {path}: there is no folder {path.parent}")
    if path and not importlib.util.find_spec("matplotlib"):
        parser.error(f"{flag} needs matplotlib: pip install -r experiments/requirements.txt")


def choose_curves(
    parser: argparse.ArgumentParser, asked: str | None, stage: str, logs: list[list[dict]]
) -> list[str]:
    """The curves that were asked for, which must be in a log; or the stage's own that are."""
    there = {field for records in logs for record in records for field in record}
    there -= {"stage", "step"}
    if not asked:
        own = CURVES.get(stage, ",".join(CURVES.values())).split(",")
        return [field for field in dict.fromkeys(own) if field in there] or sorted(there)
    for field in asked.split(","):
        if field not in there:
            parser.error(f"--curves: no log has a field {field}, but {', '.join(sorted(there))}")
    return asked.split(",")


def draw_curves(path: Path, logs: dict[str, list[dict]], curves: list[str]) -> None:
    """A panel for each field of the log in `curves`, and in it a line for each log, by its name;
    points where a field stands in few lines only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    look = {"figsize": (4 * columns, 3 * rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **look)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, field in zip(axes.flat, curves):
        for name, records in logs.items():
            points = [(record["step"], record[field]) for record in records if field in record]
            steps, values = zip(*points) if points else ([], [])
            axis.plot(steps, values, marker="o" if len(points) < len(records) else "", label=name)
        axis.set(title=field, xlabel="step")
        axis.grid(alpha=0.3)
    if len(logs) > 1:
        axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)
    print(f"-> {path}")


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("run", nargs="+", type=Path, help="folder of a run")
    add("--out", metavar="FILE", type=Path, help="the picture [curves.png in the first folder]")
    add_stage(parser)
    add("--curves", metavar="A,B,...", help="fields of the log to draw [a choice by stage]")
    args = parser.parse_args(arguments)
    try:
        logs = {str(folder): read_log(folder, args.stage) for folder in args.run}
    except ValueError as error:
        parser.error(str(error))
    path = args.out or args.run[0] / "curves.png"
    check_picture(parser, "--out", path)
    draw_curves(path, logs, choose_curves(parser, args.curves, args.stage, list(logs.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
