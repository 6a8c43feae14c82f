"""What the log of a run says about its health, in words: each number, the range it should be in,
and the knob to turn.

    python -m experiments.watch.diagnose out/chains-cpu-grpo-seed0

A first or last number is a mean over a tenth of the steps (one at least). The ranges are rules of
thumb, from this project's small runs and the failures that papers report. A verdict says where to
look, not what must be so.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.watch.plot import STAGE, add_stage, read_log
from kit.flags import command_line

Records = list[dict]  # the lines of a stage of GRPO


def values(records: Records, name: str) -> list[float]:
    """The numbers of a field, where it has one: neither NaN nor infinite."""
    return [record[name] for record in records if math.isfinite(record.get(name, math.nan))]


def ends(records: Records, name: str) -> tuple[float, float]:
    """The mean over the first tenth of the lines that have the field, and over the last."""
    found = values(records, name)
    tenth = max(1, len(found) // 10)
    return sum(found[:tenth]) / tenth, sum(found[-tenth:]) / tenth


@dataclass(frozen=True)
class Check:
    """One question to a log. `look` gives the numbers, in words, and whether they are healthy;
    `needs` are the fields without which there is nothing to ask."""

    name: str
    needs: tuple[str, ...]
    look: Callable[[Records], tuple[str, bool]]
    healthy: str
    advice: str


def numbers(records: Records) -> tuple[str, bool]:
    pairs = [pair for record in records for pair in record.items()]
    names = {name for name, x in pairs if isinstance(x, float) and not math.isfinite(x)}
    return f"NaN or infinite: {', '.join(sorted(names)) or 'nothing'}", not names


def agreement(records: Records) -> tuple[str, bool]:
    worst = max(values(records, "logp_gap"))
    limit = 0.3 if records[0].get("dtype") == "bfloat16" else 1e-3
    return f"sampler and trainer differ by {worst:.1e} at most", worst <= limit


def truncation(records: Records) -> tuple[str, bool]:
    _, cut = ends(records, "cut")
    return f"{cut:.1%} of the last completions met --max_new_tokens", cut <= 0.05


def signal(records: Records) -> tuple[str, bool]:
    (_, silent), (_, accuracy) = ends(records, "no_signal"), ends(records, "accuracy")
    said = f"{silent:.1%} of the last groups had equal rewards, at accuracy {accuracy:.2f}"
    return said, silent <= 0.5 or accuracy >= 0.9


def entropy(records: Records) -> tuple[str, bool]:
    (first, last), (_, accuracy) = ends(records, "entropy"), ends(records, "accuracy")
    said = f"entropy {first:.3f} -> {last:.3f} nats a token, at accuracy {accuracy:.2f}"
    return said, last >= 0.1 * first or accuracy >= 0.9


def length(records: Records) -> tuple[str, bool]:
    """Over the second half, as a run that learns to think grows longer in the first."""
    half = records[len(records) // 2 :]
    (before, after), (worse, better) = ends(half, "completion_tokens"), ends(half, "accuracy")
    said = f"completions {before:.1f} -> {after:.1f} tokens in the second half"
    healthy = after <= 1.25 * before or better - worse >= 0.02
    return f"{said}, accuracy {worse:.2f} -> {better:.2f}", healthy


def held_out(records: Records) -> tuple[str, bool]:
    first = next(i for i, record in enumerate(records) if values([record], "held_out_accuracy"))
    low, high = ends(records[first:], "reward")  # both from the first look on
    looks = values(records, "held_out_accuracy")
    wrong, right = looks[0], looks[-1]
    said = f"reward {low:.2f} -> {high:.2f}, held-out accuracy {wrong:.2f} -> {right:.2f}"
    return said, high - low <= 0.1 or right - wrong >= 0.02 or right >= 0.9


def rule(records: Records) -> tuple[str, bool]:
    (low, high), (wrong, right) = ends(records, "reward"), ends(records, "accuracy")
    said = f"reward {low:.2f} -> {high:.2f}, accuracy among it {wrong:.2f} -> {right:.2f}"
    return said, high - low <= 0.1 or right - wrong >= 0.02 or right >= 0.9


def policy_step(records: Records) -> tuple[str, bool]:
    worst = max(values(records, "k3_old"))
    return f"KL of a step's updates, {worst:.4f} nats a token at most", worst <= 0.1


def distance(records: Records) -> tuple[str, bool]:
    first, last = ends(records, "base_kl")
    return f"KL to the base model {first:.3f} -> {last:.3f} nats a token", last <= 1.0


def thinking(records: Records) -> tuple[str, bool]:
    """At the looks at held-out problems: a thought that shrinks while answers are right is no
    longer what makes them so."""
    right, now_right = ends(records, "held_out_accuracy")
    before, after = ends(records, "think_tokens")
    said = f"thoughts {before:.1f} -> {after:.1f} tokens"
    thinks = after >= max(2, before / 2)
    if values(records, "in_steps"):
        before, after = ends(records, "in_steps")
        said += f", in steps {before:.1%} -> {after:.1%}"
        thinks = thinks and after >= before / 2
    healthy = thinks or (now_right - right < 0.02 and now_right < 0.9)
    return f"{said}, held-out accuracy {right:.2f} -> {now_right:.2f}", healthy


CHECKS = (
    Check(
        "numbers",
        (),
        numbers,
        "nothing",
        "find the first line of log.jsonl that has one; a lower --lr or --max_grad_norm may help",
    ),
    Check(
        "agreement",
        ("logp_gap",),
        agreement,
        "at most 0.001 in float32, 0.3 in bfloat16",
        "the updated policy is not the one that sampled: a bug in sampling, temperature or mask",
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
        "problems too hard or too easy: other --min_level, --max_level, or a larger --group_size",
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
        "1/|o| spares long wrong answers: try --variant dr_grpo, and read what fills them",
    ),
    Check(
        "thinking",
        ("think_tokens", "held_out_accuracy"),
        thinking,
        "at least 2 tokens and half of what it was, and half as often in steps, if answers improve",
        "it is right without a thought: ask harder problems (--min_level, --max_level, --task)",
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
        "another rule pays better than being right: weigh it less (--rewards), or close its hole",
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
    can = [check for check in CHECKS if all(values(records, name) for name in check.needs)]
    return [(check, *check.look(records)) for check in can]


def read_run(folder: Path, stage: str = STAGE) -> Records:
    """The lines of a stage; the first says too what matrix products were in. Raises ValueError, in
    one line, for what is not a run, and for a run in which the stage has no line yet."""
    records = read_log(folder, stage)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no config.json")
    config = json.loads((folder / "config.json").read_text())
    records[0]["dtype"] = config["dtype"] if config["device"].startswith("cuda") else "float32"
    return records


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, finished or not")
    add_stage(parser)
    args = parser.parse_args(arguments)
    try:
        records = read_run(args.run, args.stage)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.run}: {len(records)} lines of {args.stage}")
    for check, said, healthy in diagnose(records):
        print(f"{'ok  ' if healthy else 'LOOK'}  {check.name:18} {said}")
        if not healthy:
            print(f"{'':6}{'healthy:':18} {check.healthy}")
            print(f"{'':6}{'what to do:':18} {check.advice}")


if __name__ == "__main__":
    main(sys.argv[1:])
