"""Draw the curves of one run or several from their logs, as a PNG.

    python -m experiments.watch.plot out/chains-cpu-grpo-seed0    # -> curves.png, in this folder
    python -m experiments.watch.plot out/chains-cpu-grpo-seed* --out seeds.png
    python -m experiments.watch.plot out/chains-cpu-grpo-seed0 --stage base --curves loss,grad_norm

Needs matplotlib: pip install -r experiments/requirements.txt. A run that is still going or was
stopped is drawn as far as its log goes.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

from kit.flags import command_line

STAGE = "r1_zero"
CURVES = {  # the fields drawn for a stage; another stage shows all of them that its log has
    "r1_zero": "accuracy,held_out_accuracy,completion_tokens,entropy,no_signal,grad_norm",
    "base": "loss,grad_norm,weight_norm",
}


def read_log(folder: Path, stage: str = STAGE) -> list[dict]:
    """The log lines of one stage of a run. Raises ValueError, in one line, if the folder holds no
    run, or if the log has no line of the stage."""
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no log.jsonl")
    lines = (folder / "log.jsonl").read_bytes().split(b"\n")
    try:
        records = list(map(json.loads, lines[:-1]))  # the last line may be half written
        found = [record for record in records if record["stage"] == stage]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/log.jsonl has a line that no run wrote") from None
    if not found:
        others = ", ".join(dict.fromkeys(record["stage"] for record in records))
        known = f" (it has {others})" if others else ""
        raise ValueError(f"{folder} has no line of the stage {stage} in its log yet{known}")
    return found


def add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", default=STAGE, help=f"stage whose log lines are read [{STAGE}]")


def check_picture(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """End the program in one line, before any work, if the picture could not be drawn or saved."""
    if path and path.is_dir():
        parser.error(f"{flag} {path}: this is a folder, and the picture needs the name of a file")
    if path and not path.absolute().parent.is_dir():
        parser.error(f"{flag} {path}: there is no folder {path.parent}")
    if path and not importlib.util.find_spec("matplotlib"):
        parser.error(f"{flag} needs matplotlib: pip install -r experiments/requirements.txt")


def choose_curves(
    parser: argparse.ArgumentParser, asked: str | None, stage: str, logs: list[list[dict]]
) -> list[str]:
    """The fields to draw: the fields that were asked for, or else the fields of CURVES that a log
    has. Ends the program in one line for a field that no log has."""
    logged = {field for records in logs for record in records for field in record}
    logged -= {"stage", "step"}
    if not asked:
        usual = CURVES.get(stage, ",".join(CURVES.values())).split(",")
        return [field for field in dict.fromkeys(usual) if field in logged] or sorted(logged)
    for field in asked.split(","):
        if field not in logged:
            known = ", ".join(sorted(logged))
            parser.error(f"--curves: no log has the field {field}; there are {known}")
    return asked.split(",")


def draw_curves(path: Path, logs: dict[str, list[dict]], curves: list[str]) -> None:
    """Draw a panel for each field in `curves`, with a curve for each log. `logs` holds the log
    lines by the name in the legend. A field that not every line has gets a marker at each point."""
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
