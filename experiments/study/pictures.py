"""The README's pictures, from the JSON that study.py writes.

    python -m experiments.study.pictures     # draws them again from experiments/results

Needs matplotlib: pip install -r experiments/requirements.txt.
"""

import hashlib
import json
import math
import sys
import textwrap
from pathlib import Path

from data.signs import Signs
from experiments.study import report
from experiments.study.collect import RESULTS, at
from experiments.watch.plot import check_picture
from kit.flags import command_line

BASE, GRPO, DR_GRPO, OTHER, HACK = "tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red"
CHANCE = "tab:cyan"
Logs = list[list[dict]]  # for each seed, the lines of its log
BY_CHANCE = "base by chance: against the answers of other problems"


def draw_results(folder: Path) -> None:
    """Draw the pictures of all results in a folder, and save them there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {"axes.grid": True, "grid.alpha": 0.3}
    plt.rcParams |= look | {"axes.spines.top": False, "axes.spines.right": False}
    for name, (results, part, draw, columns) in PICTURES.items():
        if (folder / f"{results}.json").exists():
            figure, axes = plt.subplots(1, columns, figsize=(10, 3.6), layout="constrained")
            draw(axes, json.loads((folder / f"{results}.json").read_text())[part])
            shown = {"Description": shown_in(figure)}  # the picture tells what it shows
            figure.savefig(folder / f"{name}.png", dpi=150, metadata=shown)
            plt.close(figure)
            print(f"-> {folder / name}.png")


def shown_in(figure) -> str:
    """A digest of the names and points of all lines of a picture, whatever drew it."""
    lines = [line for axis in figure.axes for line in axis.lines]
    points = [[line.get_label(), *line.get_xydata().round(6).tolist()] for line in lines]
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def draw_spread(axis, logs: Logs, field: str, start: list[float] | None = None, **look) -> None:
    """Draw a field of the logs: its mean over the seeds, and its range as a band. `start` has the
    values at step 0, if they are known. Leaves out steps where a seed lacks the field."""
    by_step = {0: start} if start else {}
    for log in logs:
        for record in log:
            if field in record:
                by_step.setdefault(record["step"], []).append(record[field])
    whole = {step: values for step, values in sorted(by_step.items()) if len(values) == len(logs)}
    low, high = ([pick(values) for values in whole.values()] for pick in (min, max))
    means = [sum(values) / len(values) for values in whole.values()]
    (line,) = axis.plot(list(whole), means, **look)
    axis.fill_between(list(whole), low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def both_losses(seeds: list[dict]) -> list[tuple[str, Logs, str]]:
    """The names, logs and colours of GRPO and of Dr. GRPO."""
    return [
        ("GRPO", [seed["log"] for seed in seeds], GRPO),
        ("Dr. GRPO", [seed["dr_grpo"]["log"] for seed in seeds], DR_GRPO),
    ]


def draw_learning(axes, seeds: list[dict]) -> None:
    """Reward, held-out accuracy and length by step, of GRPO and Dr. GRPO, with the controls as
    dashed lines."""
    base = [seed["base"]["pass@1"] for seed in seeds]
    reward, accuracy, length = axes
    for name, logs, color in both_losses(seeds):
        look = {"color": color, "label": name}
        draw_spread(reward, logs, "reward", **look)
        draw_spread(accuracy, logs, "held_out_accuracy", base, marker=".", **look)
        draw_spread(length, logs, "completion_tokens", **look)
    grpo = [seed["log"] for seed in seeds]
    for name, style in (("right", "--"), ("wrong", ":")):
        look = {"color": GRPO, "linestyle": style, "label": f"GRPO, {name} answers"}
        draw_spread(length, grpo, f"{name}_tokens", **look)
    controls = {
        "online rejection sampling": at("online rejection sampling", "pass@1"),
        "rejection sampling": at("rejection sampling", "pass@1"),
        "more pretraining": at("longer", "pass@1"),
        "base, opened": at("measured", "base", "opened", "<think>\n#1"),
    }
    means = {name: sum(map(number, seeds)) / len(seeds) for name, number in controls.items()}
    end, above = max(record["step"] for record in grpo[0]), math.inf
    for name, mean in sorted(means.items(), key=lambda line: -line[1]):
        accuracy.axhline(mean, color=BASE, linestyle="--", linewidth=1)
        side = "top" if above - mean < 0.06 else "bottom"  # keeps names of close lines apart
        look = {"ha": "right", "va": side, "fontsize": 8, "color": "dimgray"}
        accuracy.annotate(name, (end, mean), **look)
        above = mean
    reward.set(title="reward: accuracy + format", xlabel="step of GRPO", ylim=(0, 2.05))
    accuracy.set(title="right answers, held out (pass@1)", xlabel="step of GRPO", ylim=(0, 1.05))
    length.set(title="tokens of a completion", xlabel="step of GRPO", ylim=(0, None))
    reward.legend(fontsize=8, loc="lower right")
    length.legend(fontsize=8, loc="lower right")


def draw_signals(axes, seeds: list[dict]) -> None:
    """Entropy, silent groups and the KL to the base model by step, of GRPO and Dr. GRPO."""
    fields = {
        "entropy": "entropy, nats a token",
        "no_signal": "share of groups without signal",
        "base_kl": "KL(policy, base), nats a token",
    }
    for axis, (field, title) in zip(axes, fields.items()):
        start = [0.0] * len(seeds) if field == "base_kl" else None
        look = {"marker": "."} if field == "base_kl" else {}
        for name, logs, color in both_losses(seeds):
            draw_spread(axis, logs, field, start, color=color, label=name, **look)
        axis.set(title=title, xlabel="step of GRPO", ylim=(0, None))
    axes[0].legend(fontsize=8)


def draw_pass_at_k(axes, seeds: list[dict]) -> None:
    """pass@k of base model and R1-Zero, at the hardest trained level and at three harder levels."""
    highest = report.highest(seeds[0])
    for axis, level in zip(axes, (highest, highest + 1, highest + 2, highest + 4)):
        for name, what, label, color in (
            ("base", "pass@k", "base", BASE),
            ("r1_zero", "pass@k", "R1-Zero", GRPO),
            ("base", "pass@k by chance", BY_CHANCE, OTHER),
            ("r1_zero", "pass@k by chance", "R1-Zero by chance", CHANCE),
        ):
            curves = [seed["measured"][name][what][str(level)].items() for seed in seeds]
            logs = [  # a chance that is unknown has no point
                [{"step": int(k), "value": value} for k, value in curve if value is not None]
                for curve in curves
            ]
            draw_spread(axis, logs, "value", color=color, marker=".", label=label)
        beyond = f"{level - highest} more" if level > highest else "the most trained on"
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(title=f"level {level}: {beyond}", xlabel="k", ylim=(0, 1.05))
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("pass@k")
    named = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*named, fontsize=9, ncols=4, loc="outside lower center")


def draw_language(axes, seeds: list[dict]) -> None:
    """Language and accuracy on Korean questions by step, without and with the language reward: a
    line for each seed."""
    fields = {
        "language_ko": "share of the thought's words that are Korean",
        "accuracy_ko": "right answers",
    }
    for axis, (field, title) in zip(axes, fields.items()):
        for name, label, color in (
            ("language", "accuracy + format", GRPO),
            ("language_reward", "accuracy + format + language", OTHER),
        ):
            labels = [f"{label}, a line a seed"] + [None] * (len(seeds) - 1)
            for seed, each in zip(seeds, labels):
                points = [(record["step"], record[field]) for record in seed[name]["log"]]
                axis.plot(*zip(*points), color=color, linewidth=1.2, label=each)
        axis.set(title=f"Korean questions: {title}", xlabel="step of GRPO", ylim=(0, 1.05))
        axis.title.set_fontsize(10)
    axes[1].legend(fontsize=8, loc="lower right")


def draw_hacked(axes, rewards: list[dict]) -> None:
    """Reward and held-out accuracy by step, for each reward of the experiment."""
    reward, accuracy = axes
    for rule, color in zip(rewards, (GRPO, HACK, OTHER)):
        logs = [seed["log"] for seed in rule["seeds"]]
        draw_spread(reward, logs, "reward", color=color, label=rule["label"])
        draw_spread(
            accuracy, logs, "held_out_accuracy", color=color, marker=".", label=rule["label"]
        )
    reward.set(title="reward", xlabel="step of GRPO", ylim=(0, 8))  # room for the legend
    accuracy.set(title="right answers, held out", xlabel="step of GRPO", ylim=(0, 1.05))
    reward.legend(fontsize=8, loc="upper left")


def draw_search(axes, seeds: list[dict]) -> None:
    """Accuracy, tries and length by step, a line for each seed; the corpus's limit of tries."""
    panels = {
        "held_out_accuracy": "right answers, held out",
        "tries": "tries of a completion",
        "completion_tokens": "tokens of a completion",
    }
    for axis, (field, title) in zip(axes, panels.items()):
        for seed, color in zip(seeds, (GRPO, DR_GRPO, OTHER)):
            points = [(each["step"], each[field]) for each in seed["log"] if field in each]
            axis.plot(*zip(*points), color=color, linewidth=1.2, label=f"seed {seed['seed']}")
        axis.set(title=title, xlabel="step of GRPO", ylim=(0, None))
    axes[1].axhline(Signs.most_tries, color=BASE, linestyle="--", label="most in any document")
    axes[1].legend(fontsize=8, loc="lower right")


def draw_value(axes, thoughts: list[dict]) -> None:
    """What the value model expects before each token of a thought, and what rollouts from there
    earn and how often they are right. The verdicts of the thought are marked."""
    for axis, thought in zip(axes, thoughts):
        for field, label, color in (
            ("value", "the value model", GRPO),
            ("reward", "rollouts from here: their reward", DR_GRPO),
            ("right", "rollouts from here: share that is right", OTHER),
        ):
            axis.plot(thought[field], color=color, label=label, linewidth=1.2)
        for place, token in enumerate(thought["tokens"]):
            if token in (" no", " yes"):  # column t is before token t: the verdict shows at t + 1
                axis.axvline(place + 1, color=BASE, linestyle=":", linewidth=1)
                axis.annotate(token, (place + 1, 2.06), ha="center", fontsize=8)
        axis.set(xlabel="tokens", ylim=(0, 2.2))
        axis.set_title(f"a thought about: {thought['problem']}", fontsize=10, pad=12)
    named = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*named, fontsize=8, ncols=3, loc="outside lower center")


def draw_pushed(axes, compared: dict) -> None:
    """Gold and the judge's score on held-out numbers over the square root of the KL, a line for
    each seed, with a hacked sample at the end of a path (the axes of Gao et al. 2022)."""
    seeds = compared["seeds"]
    for axis, (of, title) in zip(axes, {"gold": "gold", "proxy": "judge's score"}.items()):
        for (stage, name), color in zip(PUSHED.items(), (BASE, CHANCE, DR_GRPO, GRPO, HACK)):
            for number, seed in enumerate(seeds):
                points = seed[stage]
                far = [math.sqrt(max(0.0, at["kl"])) for at in points]  # estimates can be below 0
                look = {"color": color, "linewidth": 1.2, "marker": ".", "markersize": 4}
                label = None if number else name
                axis.plot(far, [at[of] for at in points], label=label, **look)
        axis.set(title=f"{title}, held-out numbers", xlabel="square root of the KL in nats")
    said = seeds[0]["said"][0]["said"].strip()
    end = seeds[0]["grpo_free"][-1]
    place = math.sqrt(max(0.0, end["kl"])), end["gold"]
    look = {"fontsize": 7, "color": HACK, "arrowprops": {"arrowstyle": "->", "color": HACK}}
    text = f'"{textwrap.fill(said, 34)}"'
    axes[0].annotate(text, place, (0.03, 0.05), textcoords="axes fraction", **look)
    axes[1].legend(fontsize=8, loc="lower right")


PUSHED = {  # stages of rlhf.compare, as the picture calls them
    "best_of_n": "best of n",
    "ppo": "PPO",
    "grpo_rule": "GRPO, no KL, a rule mixed in",
    "grpo": "GRPO",
    "grpo_free": "GRPO, no KL",
}
PICTURES = {  # for each picture: the file of results, its part, the function, number of panels
    "search": ("search", "seeds", draw_search, 3),
    "value": ("ppo", "thoughts", draw_value, 2),
    "learning": ("phenomena", "seeds", draw_learning, 3),
    "signals": ("phenomena", "seeds", draw_signals, 3),
    "pass_at_k": ("phenomena", "seeds", draw_pass_at_k, 4),
    "language": ("phenomena", "seeds", draw_language, 2),
    "hacked": ("hacked", "rewards", draw_hacked, 2),
    "pushed": ("rlhf", "compared", draw_pushed, 2),
}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    text = "folder of results and pictures [experiments/results]"
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help=text)
    folder = parser.parse_args(arguments).folder
    check_picture(parser, "pictures", folder / "learning.png")
    draw_results(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
