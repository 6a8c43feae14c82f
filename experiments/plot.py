"""Draw the curves of one run or several from their logs, as a PNG; or, of no run, the README's pictures.

    python experiments/plot.py                                          # from experiments/results
    python experiments/plot.py out/cpu-grpo-seed0                       # -> out/cpu-grpo-seed0/curves.png
    python experiments/plot.py out/cpu-grpo-seed* --out seeds.png
    python experiments/plot.py out/cpu-grpo-seed0 --curves loss,grad_norm --phase pretrain

Needs matplotlib: pip install -r experiments/requirements.txt. A run that is still going, or that stopped, is drawn as
far as its log goes.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

CURVES = {
    "grpo": "accuracy,held_out_accuracy,completion_tokens,entropy,no_signal,grad_norm",
    "pretrain": "loss,grad_norm,weight_norm",
}


def read_log(folder: Path, phase: str = "grpo") -> list[dict]:
    """The lines of one phase, "pretrain" or "grpo". Raises ValueError, in one line, where the folder is not that of a
    run, or the phase has not begun."""
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no log.jsonl")
    lines = (folder / "log.jsonl").read_text().split("\n")[:-1]  # after the last line break a line is being written
    try:
        records = [record for record in map(json.loads, lines) if record["phase"] == phase]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/log.jsonl has a line that no run wrote") from None
    if not records:
        raise ValueError(f"{folder} has no line of phase {phase} in its log yet")
    return records


def check_picture(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """End the program with a line on what is wrong, before any work, where a picture could not be drawn."""
    if path and path.is_dir():
        parser.error(f"{flag} {path}: a folder, where the name of a picture should be")
    if path and not path.absolute().parent.is_dir():
        parser.error(f"{flag} {path}: there is no folder {path.parent}")
    if path and not importlib.util.find_spec("matplotlib"):
        parser.error(f"{flag} needs matplotlib: pip install -r experiments/requirements.txt")


def choose_curves(parser: argparse.ArgumentParser, asked: str | None, phase: str, logs: list[list[dict]]) -> list[str]:
    """The curves that were asked for, which must be there, or those of the default ones that are."""
    there = {field for records in logs for record in records for field in record} - {"phase", "step"}
    if not asked:
        return [field for field in CURVES[phase].split(",") if field in there]
    for field in asked.split(","):
        if field not in there:
            parser.error(f"--curves: no log has a field {field}, but {', '.join(sorted(there))}")
    return asked.split(",")


def draw_curves(path: Path, logs: dict[str, list[dict]], curves: list[str]) -> None:
    """A panel for each field of the log in `curves`, a line in it for each log, by its name; points where a field
    stands in few lines only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
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
    print(f"-> {path}")


# ------------------------------------------------------------------------------------------- the README's pictures

RESULTS = Path(__file__).parent / "results"
BASE, GRPO, DR_GRPO, OTHER, HACK = "tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red"
CHANCE = "tab:cyan"


def draw_results(folder: Path) -> None:
    """Each picture from the results that there are in a folder, beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    for name, (results, part, draw, columns) in PICTURES.items():
        if (folder / f"{results}.json").exists():
            figure, axes = plt.subplots(1, columns, figsize=(10, 3.6), layout="constrained")
            draw(axes, json.loads((folder / f"{results}.json").read_text())[part])
            figure.savefig(folder / f"{name}.png", dpi=150)
            plt.close(figure)
            print(f"-> {folder / name}.png")


def draw_spread(axis, logs: list[list[dict]], field: str, start: list[float] | None = None, **look) -> None:
    """The mean over seeds of a field of their logs, and the range between the lowest and the highest; from `start` at
    step 0, where that is known. Steps at which a seed has no such field are left out."""
    by_step = {0: start} if start else {}
    for log in logs:
        for record in log:
            if field in record:
                by_step.setdefault(record["step"], []).append(record[field])
    whole = {step: values for step, values in sorted(by_step.items()) if len(values) == len(logs)}
    low, high = ([pick(values) for values in whole.values()] for pick in (min, max))
    (line,) = axis.plot(list(whole), [sum(values) / len(values) for values in whole.values()], **look)
    axis.fill_between(list(whole), low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_learning(axes, seeds: list[dict]) -> None:
    """Reward, held-out accuracy and length against steps; GRPO, Dr. GRPO and what they are held against."""
    logs = {"GRPO": [seed["log"] for seed in seeds], "Dr. GRPO": [seed["dr_grpo"]["log"] for seed in seeds]}
    colors = {"GRPO": GRPO, "Dr. GRPO": DR_GRPO}
    base = [seed["base"] for seed in seeds]
    reward, accuracy, length = axes
    for name, each in logs.items():
        draw_spread(reward, each, "reward", color=colors[name], label=name)
        look = {"color": colors[name], "marker": ".", "label": name}
        draw_spread(accuracy, each, "held_out_accuracy", [metrics["pass@1"] for metrics in base], **look)
        draw_spread(length, each, "completion_tokens", color=colors[name], label=name)
    for name, style in (("right", "--"), ("wrong", ":")):
        draw_spread(length, logs["GRPO"], f"{name}_tokens", color=GRPO, linestyle=style, label=f"GRPO, {name} answers")
    lines = {
        "base, opened": [seed["measured"]["base"]["opened"]["<think>\n#1"] for seed in seeds],
        "online rejection sampling": [seed["online rejection sampling"]["pass@1"] for seed in seeds],
        "rejection sampling": [seed["rejection sampling"]["pass@1"] for seed in seeds],
        "more pretraining": [seed["longer"]["pass@1"] for seed in seeds],
    }
    end, above = max(record["step"] for record in logs["GRPO"][0]), math.inf
    for name, values in sorted(lines.items(), key=lambda line: -sum(line[1])):
        mean = sum(values) / len(values)
        accuracy.axhline(mean, color=BASE, linestyle="--", linewidth=1)
        side = "top" if above - mean < 0.06 else "bottom"  # of the line: not over the name of the one above
        accuracy.annotate(name, (end, mean), ha="right", va=side, fontsize=8, color="dimgray")
        above = mean
    reward.set(title="reward: accuracy + format", xlabel="step of GRPO", ylim=(0, 2.05))
    accuracy.set(title="right answers, held out (pass@1)", xlabel="step of GRPO", ylim=(0, 1.05))
    length.set(title="tokens of a completion", xlabel="step of GRPO", ylim=(0, None))
    reward.legend(fontsize=8, loc="lower right")
    length.legend(fontsize=8, loc="lower right")


def draw_signals(axes, seeds: list[dict]) -> None:
    """What is left to learn from, and how far the policy has gone; by GRPO and by Dr. GRPO."""
    fields = {
        "entropy": "entropy, nats a token",
        "no_signal": "share of groups without signal",
        "base_kl": "KL(policy, base), nats a token",
    }
    for axis, (field, title) in zip(axes, fields.items()):
        start = [0.0] * len(seeds) if field == "base_kl" else None
        look = {"marker": "."} if field == "base_kl" else {}
        draw_spread(axis, [seed["log"] for seed in seeds], field, start, color=GRPO, label="GRPO", **look)
        draw_spread(
            axis, [seed["dr_grpo"]["log"] for seed in seeds], field, start, color=DR_GRPO, label="Dr. GRPO", **look
        )
        axis.set(title=title, xlabel="step of GRPO", ylim=(0, None))
    axes[0].legend(fontsize=8)


def draw_pass_at_k(axes, seeds: list[dict]) -> None:
    """pass@k of base and R1-Zero: at the hardest trained level, and at three beyond."""
    highest = max(map(int, seeds[0]["base"]["by_level"]))
    for axis, level in zip(axes, (highest, highest + 1, highest + 2, highest + 4)):
        for name, what, label, color in (
            ("base", "pass@k", "base", BASE),
            ("r1_zero", "pass@k", "R1-Zero", GRPO),
            ("base", "pass@k by chance", "base by chance: against the answers of other problems", OTHER),
            ("r1_zero", "pass@k by chance", "R1-Zero by chance", CHANCE),
        ):
            curves = [seed["measured"][name][what][str(level)] for seed in seeds]
            logs = [[{"step": int(k), "value": value} for k, value in curve.items()] for curve in curves]
            draw_spread(axis, logs, "value", color=color, marker=".", label=label)
        beyond = f"{level - highest} more" if level > highest else "the most trained on"
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(title=f"level {level}: {beyond}", xlabel="k", ylim=(0, 1.05))
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("pass@k")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncols=4, loc="outside lower center")


def draw_language(axes, seeds: list[dict]) -> None:
    """What becomes of Korean questions, seed by seed, without and with the language reward."""
    fields = {
        "language_ko": "share of the thought's words that are Korean",
        "accuracy_ko": "right answers",
    }
    for axis, (field, title) in zip(axes, fields.items()):
        for name, label, color in (
            ("language", "accuracy + format", GRPO),
            ("language_reward", "accuracy + format + language", OTHER),
        ):
            for i, seed in enumerate(seeds):
                points = [(record["step"], record[field]) for record in seed[name]["log"]]
                axis.plot(
                    *zip(*points), color=color, linewidth=1.2, label=f"{label}, a line a seed" if i == 0 else None
                )
        axis.set(title=f"Korean questions: {title}", xlabel="step of GRPO", ylim=(0, 1.05))
        axis.title.set_fontsize(10)
    axes[1].legend(fontsize=8, loc="lower right")


def draw_hacked(axes, rewards: list[dict]) -> None:
    """What each reward gives, and how often the answer is right, held out."""
    reward, accuracy = axes
    for rule, color in zip(rewards, (GRPO, HACK, OTHER)):
        logs = [seed["log"] for seed in rule["seeds"]]
        draw_spread(reward, logs, "reward", color=color, label=rule["label"])
        draw_spread(accuracy, logs, "held_out_accuracy", color=color, marker=".", label=rule["label"])
    reward.set(title="reward", xlabel="step of GRPO", ylim=(0, 8))  # with room for the names
    accuracy.set(title="right answers, held out", xlabel="step of GRPO", ylim=(0, 1.05))
    reward.legend(fontsize=8, loc="upper left")


PICTURES = {  # by name: results, and the part of them, that it is drawn from; how; panels
    "learning": ("phenomena", "seeds", draw_learning, 3),
    "signals": ("phenomena", "seeds", draw_signals, 3),
    "pass_at_k": ("phenomena", "seeds", draw_pass_at_k, 4),
    "language": ("phenomena", "seeds", draw_language, 2),
    "hacked": ("hacked", "rewards", draw_hacked, 2),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="plot.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="*", type=Path, help="folder of a run [none: the README's pictures]")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the picture [curves.png in the first folder]")
    parser.add_argument("--phase", choices=list(CURVES), default="grpo", help="pretrain or grpo [grpo]")
    parser.add_argument("--curves", metavar="A,B,...", help=f"fields of the log to draw [{CURVES['grpo']}]")
    args = parser.parse_args(arguments)
    if not args.run:
        check_picture(parser, "plot.py", RESULTS / "learning.png")
        draw_results(RESULTS)
        return
    try:
        logs = {str(folder): read_log(folder, args.phase) for folder in args.run}
    except ValueError as error:
        parser.error(str(error))
    path = args.out or args.run[0] / "curves.png"
    check_picture(parser, "--out", path)
    draw_curves(path, logs, choose_curves(parser, args.curves, args.phase, list(logs.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
