"""What the log of a run says about its health, in words: each number, the range it should be in,
and the knob to turn.

    python -m experiments.watch.diagnose out/chains-cpu-grpo-seed0

A first or last number is a mean over a tenth of the log's lines, at least one line. The ranges are
rules of thumb, from this project's small runs and the failures that papers report. A verdict says
where to look. It proves nothing.
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
    """The finite numbers of a field, from the lines that have one."""
    return [record[name] for record in records if math.isfinite(record.get(name, math.nan))]


def ends(records: Records, name: str) -> tuple[float, float]:
    """The means over the first and over the last tenth of the lines that have the field."""
    found = values(records, name)
    tenth = max(1, len(found) // 10)
    return sum(found[:tenth]) / tenth, sum(found[-tenth:]) / tenth


@dataclass(frozen=True)
class Check:
    """One question to a log. `look` returns the numbers in words, and whether they are healthy. It
    is asked only if the log has all fields that it `needs`, each on at least `lines` lines: a
    question about a beginning and an end has no answer before."""

    name: str
    needs: tuple[str, ...]
    look: Callable[[Records], tuple[str, bool]]
    healthy: str
    advice: str
    lines: int = 1


def numbers(records: Records) -> tuple[str, bool]:
    pairs = [pair for record in records for pair in record.items()]
    names = {name for name, x in pairs if isinstance(x, float) and not math.isfinite(x)}
    return f"NaN or infinite: {', '.join(sorted(names)) or 'nothing'}", not names


def agreement(records: Records) -> tuple[str, bool]:
    worst = max(values(records, "logp_gap"))
    limit = 0.3 if records[0].get("dtype") == "bfloat16" else 1e-3
    said = f"log-probabilities of sampler and trainer differ by {worst:.1e} at most"
    return said, worst <= limit


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
    """Looks at the second half alone: in the first half, a run that learns to think grows
    longer."""
    half = records[len(records) // 2 :]
    first, last = ends(half, "completion_tokens")
    first_accuracy, last_accuracy = ends(half, "accuracy")
    said = f"completions {first:.1f} -> {last:.1f} tokens in the second half"
    healthy = last <= 1.25 * first or last_accuracy - first_accuracy >= 0.02
    return f"{said}, accuracy {first_accuracy:.2f} -> {last_accuracy:.2f}", healthy


def held_out(records: Records) -> tuple[str, bool]:
    look = next(i for i, record in enumerate(records) if values([record], "held_out_accuracy"))
    first, last = ends(records[look:], "reward")  # from the first look on, as the accuracies
    looks = values(records, "held_out_accuracy")
    said = f"reward {first:.2f} -> {last:.2f}, held-out accuracy {looks[0]:.2f} -> {looks[-1]:.2f}"
    return said, last - first <= 0.1 or accuracy_is_fine(looks[0], looks[-1])


def rule(records: Records) -> tuple[str, bool]:
    first, last = ends(records, "reward")
    first_accuracy, last_accuracy = ends(records, "accuracy")
    said = f"reward {first:.2f} -> {last:.2f}, accuracy {first_accuracy:.2f} -> {last_accuracy:.2f}"
    return said, last - first <= 0.1 or accuracy_is_fine(first_accuracy, last_accuracy)


def accuracy_is_fine(first: float, last: float) -> bool:
    """Whether accuracy rises, or is high already."""
    return last - first >= 0.02 or last >= 0.9


def policy_step(records: Records) -> tuple[str, bool]:
    worst = max(values(records, "k3_old"))
    return f"KL to the policy that sampled: {worst:.4f} nats a token at most", worst <= 0.1


def distance(records: Records) -> tuple[str, bool]:
    first, last = ends(records, "base_kl")
    return f"KL to the base model {first:.3f} -> {last:.3f} nats a token", last <= 1.0


def thinking(records: Records) -> tuple[str, bool]:
    """From the looks at held-out problems. If thoughts shrink and answers are right all the same,
    the answers no longer come from the thoughts."""
    first_accuracy, last_accuracy = ends(records, "held_out_accuracy")
    first, last = ends(records, "think_tokens")
    said = f"thoughts {first:.1f} -> {last:.1f} tokens"
    thinks = last >= max(2, first / 2)
    if values(records, "in_steps"):
        first, last = ends(records, "in_steps")
        said += f", in steps {first:.1%} -> {last:.1%}"
        thinks = thinks and last >= first / 2
    healthy = thinks or not accuracy_is_fine(first_accuracy, last_accuracy)
    return f"{said}, held-out accuracy {first_accuracy:.2f} -> {last_accuracy:.2f}", healthy


CHECKS = (
    Check(
        "numbers",
        (),
        numbers,
        "no field is NaN or infinite",
        "find the first such line of log.jsonl; a lower --lr or --max_grad_norm may help",
    ),
    Check(
        "agreement",
        ("logp_gap",),
        agreement,
        "at most 0.001 in float32, 0.3 in bfloat16",
        "the trained policy is not the policy that sampled: a bug in sampling, temperature or mask",
    ),
    Check(
        "truncation",
        ("cut",),
        truncation,
        "at most 5 %",
        "raise --max_new_tokens (and --max_seq_len): a completion without an end earns nothing",
        lines=10,
    ),
    Check(
        "signal",
        ("no_signal", "accuracy"),
        signal,
        "at most half, until accuracy is 0.9",
        "problems are too hard or too easy: change --min_level, --max_level or raise --group_size",
        lines=10,
    ),
    Check(
        "entropy",
        ("entropy", "accuracy"),
        entropy,
        "at least a tenth of the first entropy, until accuracy is 0.9",
        "the policy settled on a failing habit: try a lower --lr, --clip_high 0.28, another --seed",
        lines=10,
    ),
    Check(
        "length",
        ("completion_tokens", "accuracy"),
        length,
        "a quarter longer at most, unless accuracy rises too",
        "1/|o| makes long wrong answers cheap: try --variant dr_grpo, and read samples.txt",
        lines=10,
    ),
    Check(
        "thinking",
        ("think_tokens", "held_out_accuracy"),
        thinking,
        "if answers are right: at least 2 tokens, half the first length, half the first steps",
        "the answers need no thought: ask harder problems (--min_level, --max_level, --task)",
        lines=2,
    ),
    Check(
        "held-out accuracy",
        ("reward", "held_out_accuracy"),
        held_out,
        "rises when the reward rises",
        "the policy learns the training problems or the rule, not the task: read samples.txt",
        lines=2,
    ),
    Check(
        "reward",
        ("reward", "accuracy"),
        rule,
        "accuracy rises when the reward rises",
        "another rule pays more than a right answer: lower its weight (--rewards) or mend the rule",
        lines=10,
    ),
    Check(
        "policy step",
        ("k3_old",),
        policy_step,
        "at most 0.1",
        "the updates on one rollout go too far: lower --lr, --minibatches or --inner_epochs",
    ),
    Check(
        "distance",
        ("base_kl",),
        distance,
        "at most 1",
        "the policy forgets what the base model knows: lower --lr, or hold it by a --beta above 0",
    ),
)


def lines_for(check: Check, records: Records) -> int:
    """How many lines have the rarest field that a check needs."""
    return min([len(values(records, name)) for name in check.needs] or [len(records)])


def diagnose(records: Records) -> list[tuple[Check, str, bool]]:
    """Each check that this log can answer, what it saw, and whether that is healthy."""
    checks = [check for check in CHECKS if lines_for(check, records) >= check.lines]
    return [(check, *check.look(records)) for check in checks]


def read_run(folder: Path, stage: str = STAGE) -> Records:
    """The log lines of a stage; the first line also gets the dtype of the matrix products. Raises
    ValueError, in one line, if the folder holds no run, or if the log has no line of the stage."""
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
    for check in CHECKS:
        if 0 < (lines := lines_for(check, records)) < check.lines:
            said = f"too short to tell: {lines} of the {check.lines} lines that it takes"
            print(f"-     {check.name:18} {said}")


if __name__ == "__main__":
    main(sys.argv[1:])
