"""What the log of a run says about its health, in words: each number, the range it should be in, and the knob to turn.

    python experiments/diagnose.py out/cpu-grpo-seed0

A first or last number is a mean over a tenth of the steps (one at least). The ranges are rules of thumb, from this
project's small runs and the failures that papers report: a verdict says where to look, not what must be so.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds experiments/

from experiments.plot import read_log

Records = list[dict]  # the lines of GRPO


def ends(records: Records, name: str) -> tuple[float, float]:
    """The mean over the first tenth of the lines that have the field, and over the last."""
    values = [record[name] for record in records if name in record]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


@dataclass(frozen=True)
class Check:
    """One question to a log. `look` gives the numbers, in words, and whether they are healthy; `needs` are the fields
    without which there is nothing to ask."""

    name: str
    needs: tuple[str, ...]
    look: Callable[[Records], tuple[str, bool]]
    healthy: str
    advice: str


def agreement(records: Records) -> tuple[str, bool]:
    worst = max(record["logp_gap"] for record in records)
    limit = 0.3 if records[0].get("dtype") == "bfloat16" else 1e-3
    return f"sampler and trainer differ by {worst:.1e} at most", worst <= limit


def truncation(records: Records) -> tuple[str, bool]:
    _, cut = ends(records, "cut")
    return f"{cut:.1%} of the last completions met --max_new_tokens", cut <= 0.05


def signal(records: Records) -> tuple[str, bool]:
    _, silent = ends(records, "no_signal")
    _, accuracy = ends(records, "accuracy")
    learned = accuracy >= 0.9
    said = f"{silent:.1%} of the last groups had equal rewards, at accuracy {accuracy:.2f}"
    return said, silent <= 0.5 or learned


def entropy(records: Records) -> tuple[str, bool]:
    first, last = ends(records, "entropy")
    _, accuracy = ends(records, "accuracy")
    return f"entropy {first:.3f} -> {last:.3f} nats a token, at accuracy {accuracy:.2f}", (
        last >= 0.1 * first or accuracy >= 0.9
    )


def length(records: Records) -> tuple[str, bool]:
    """Over the second half, as a run that learns to think grows longer in the first."""
    half = records[len(records) // 2 :]
    (before, after), (worse, better) = ends(half, "completion_tokens"), ends(half, "accuracy")
    said = f"completions {before:.1f} -> {after:.1f} tokens in the second half, accuracy {worse:.2f} -> {better:.2f}"
    return said, after <= 1.25 * before or better - worse >= 0.02


def held_out(records: Records) -> tuple[str, bool]:
    looks = [record for record in records if "held_out_accuracy" in record]
    since = records[records.index(looks[0]) :]  # both from the first look on
    reward, accuracy = ends(since, "reward"), (looks[0]["held_out_accuracy"], looks[-1]["held_out_accuracy"])
    said = f"reward {reward[0]:.2f} -> {reward[1]:.2f}, held-out accuracy {accuracy[0]:.2f} -> {accuracy[1]:.2f}"
    return said, reward[1] - reward[0] <= 0.1 or accuracy[1] - accuracy[0] >= 0.02 or accuracy[1] >= 0.9


def rule(records: Records) -> tuple[str, bool]:
    (low, high), (wrong, right) = ends(records, "reward"), ends(records, "accuracy")
    said = f"reward {low:.2f} -> {high:.2f}, accuracy among it {wrong:.2f} -> {right:.2f}"
    return said, high - low <= 0.1 or right - wrong >= 0.02 or right >= 0.9


def policy_step(records: Records) -> tuple[str, bool]:
    worst = max(record["k3_old"] for record in records if "k3_old" in record)  # not where no row had an advantage
    return f"KL of a step's updates, {worst:.4f} nats a token at most", worst <= 0.1


def distance(records: Records) -> tuple[str, bool]:
    first, last = ends(records, "base_kl")
    return f"KL to the base model {first:.3f} -> {last:.3f} nats a token", last <= 1.0


CHECKS = (
    Check(
        "agreement",
        ("logp_gap",),
        agreement,
        "at most 0.001 in float32, 0.3 in bfloat16",
        "the update is not one of the policy that sampled: a bug in sampling, in the temperature or in the mask",
    ),
    Check(
        "truncation",
        ("cut",),
        truncation,
        "at most 5 %",
        "raise --max_new_tokens (and --max_seq_len): what is cut earns nothing, right or wrong",
    ),
    Check(
        "signal",
        ("no_signal", "accuracy"),
        signal,
        "at most half, until accuracy is 0.9",
        "the problems are too hard or too easy: other --min_level and --max_level, or a larger --group_size",
    ),
    Check(
        "entropy",
        ("entropy", "accuracy"),
        entropy,
        "above a tenth of its start, until accuracy is 0.9",
        "it settled on a habit that fails: a lower --lr, --clip_high 0.28, or another seed",
    ),
    Check(
        "length",
        ("completion_tokens", "accuracy"),
        length,
        "longer by a quarter at most, unless accuracy rises with it",
        "1/|o| spares long wrong answers: try --variant dr_grpo, and read samples.txt for what fills them",
    ),
    Check(
        "held-out accuracy",
        ("reward", "held_out_accuracy"),
        held_out,
        "rises where the reward does",
        "it learns these problems, or the rule, and not the task: read samples.txt",
    ),
    Check(
        "reward",
        ("reward", "accuracy"),
        rule,
        "accuracy rises where the reward does",
        "another rule pays better than being right: lower its weight (--format_weight, ...), or close the hole in it",
    ),
    Check(
        "policy step",
        ("k3_old",),
        policy_step,
        "at most 0.1",
        "each rollout is trained on too hard: a lower --lr, fewer --minibatches or --inner_epochs",
    ),
    Check(
        "distance",
        ("base_kl",),
        distance,
        "at most 1",
        "it is leaving all that the base model knows: a lower --lr, or a --beta above 0 to hold it",
    ),
)


def diagnose(records: Records) -> list[tuple[Check, str, bool]]:
    """Each check that this log can answer: the check, what it saw, and whether that is healthy."""
    fields = set().union(*records)
    return [(check, *check.look(records)) for check in CHECKS if set(check.needs) <= fields]


def read_run(folder: Path) -> Records:
    """The lines of GRPO; the first says too what matrix products were in. Raises ValueError, in one line, for what is
    not a run, and for a run that has no step of GRPO yet."""
    records = read_log(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no config.json")
    config = json.loads((folder / "config.json").read_text())
    records[0]["dtype"] = config["dtype"] if config["device"].startswith("cuda") else "float32"
    return records


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, finished or not")
    flags = parser.parse_args(arguments)
    try:
        records = read_run(flags.run)
    except ValueError as error:
        parser.error(str(error))
    print(f"{flags.run}: {len(records)} steps of GRPO")
    for check, said, healthy in diagnose(records):
        print(f"{'ok  ' if healthy else 'LOOK'}  {check.name:18} {said}")
        if not healthy:
            print(f"{'':6}{'healthy:':18} {check.healthy}\n{'':6}{'what to do:':18} {check.advice}")


if __name__ == "__main__":
    main(sys.argv[1:])
