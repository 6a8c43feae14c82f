"""What each choice of the four stages is worth: stages of a finished run made again, one choice at
a time.

    python -m r1.controls --of out/RUN                  # every row of CONTROLS
    python -m r1.controls --of out/RUN --only no_cold_start,dev3_on_dev2
    python -m r1.controls --resume out/RUN-controls

The models that a row starts from are the run's own. Each row is a stage <row>.pt of its own.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from data.batches import Row
from kit import flags
from kit.run import Run, open_run
from model import ScalarModel, Transformer, load_model
from r1 import four_stages
from r1.four_stages import RULES, SPOKEN, reason, rl_for_all
from r1.lessons import curated, fine_tune, kept, lessons, written
from r1.measure import measure
from r1.table import STAGES, head, line
from rlhf import reward_model
from sample import load_policy, tokenizer_of


@dataclass(frozen=True)
class Config(four_stages.Config):
    """Every knob of r1.four_stages, as the run had them."""

    of: str = ""  # folder of a finished run of r1.four_stages, whose settings these are
    only: str = ""  # rows of CONTROLS, with commas between; default all

    def __post_init__(self) -> None:
        super().__post_init__()
        for row in self.rows:
            if row not in CONTROLS:
                raise ValueError(f"--only {row}: the rows are {', '.join(CONTROLS)}")
            if NEEDS.get(row, row) not in self.rows:
                raise ValueError(f"--only {row} needs {NEEDS[row]} beside it")

    def filled(self) -> "Config":
        named = replace(self, out=self.out or f"{self.of}-controls")
        return super(Config, named).filled()

    @property
    def rows(self) -> list[str]:
        """In the order of CONTROLS where they are known."""
        asked = self.only.split(",") if self.only else list(CONTROLS)
        return sorted(asked, key=lambda row: [*CONTROLS, row].index(row))


@dataclass
class Bench:
    """The models of a finished run by their stages, its judge, and the row that is being made."""

    config: Config
    run: Run
    models: dict[str, Transformer]
    judge: ScalarModel
    row: str = ""

    @cached_property
    def lessons(self) -> list[Row]:
        """The data of stage 3, as the run had it."""
        return lessons(self.config, self.models["dev2"])

    def written(self, count: int) -> list[Row]:
        return written(self.config, tokenizer_of(self.models["base"]), count)

    def curated(self, count: int) -> list[Row]:
        return curated(self.config, tokenizer_of(self.models["base"]), count)

    def cold(self, rows: list[Row]) -> Transformer:
        """Stage 1 on these documents, for as many epochs as the run's."""
        steps = round(self.config.cold_steps * len(rows) / self.config.cold_documents)
        return fine_tune(self.config, self.run, self.row, self.models["base"], rows, max(1, steps))

    def reasoned(self, start: str, weights: dict[str, float], times: int = 1) -> Transformer:
        """Stage 2 from another start, with other rules, or longer."""
        steps = times * self.config.reasoning_steps
        return reason(self.config, self.run, self.row, self.models[start], weights, steps)

    def taught(self, start: str, rows: list[Row]) -> Transformer:
        """Stage 3 on these rows, for as many epochs as the run's."""
        steps = round(self.config.sft_steps * len(rows) / len(self.lessons))
        return fine_tune(self.config, self.run, self.row, self.models[start], rows, max(1, steps))

    def for_all(self, start: str = "dev3", **changes) -> Transformer:
        """Stage 4 from another start, or with other settings."""
        config = replace(self.config, **changes)
        return rl_for_all(config, self.run, self.row, self.models[start], self.judge)


class TooFew(ValueError):
    """R1-Zero says too little that is right and readable: the row cannot be made."""


def own(bench: Bench) -> list[Row]:
    """As many documents for stage 1 as the run's, right and readable samples of R1-Zero. Raises
    TooFew where R1-Zero says too few."""
    wanted = bench.config.cold_documents
    rows = kept(bench.config, bench.models["r1_zero"], 8 * wanted)[:wanted]
    if len(rows) < wanted:
        raise TooFew(f"R1-Zero says {len(rows)} of {wanted} documents")
    return rows


def reasoning(bench: Bench) -> list[Row]:
    """The three quarters of stage 3's data that Dev2 said."""
    return bench.lessons[: -(len(bench.lessons) // 4)]


def forgotten(bench: Bench) -> list[Row]:
    """The data of stage 3 with an eighth of its curated answers."""
    return reasoning(bench) + bench.curated(len(bench.lessons) // 32)


def by_a_program(bench: Bench) -> list[Row]:
    """The data of stage 3 with thoughts that a program wrote."""
    count = len(bench.lessons) // 4
    return bench.written(len(bench.lessons) - count) + bench.curated(count)


# Each row is made from the models of the run, or from a row above it.
CONTROLS: dict[str, Callable[[Bench], Transformer]] = {
    # R1-Zero, for three times as many rollouts as stage 2.
    "zero_longer": lambda x: x.reasoned("base", RULES, times=3),
    # Stage 1: R1-Zero's own right and readable samples, as in the paper; more documents.
    "cold_own": lambda x: x.cold(own(x)),
    "cold_2x": lambda x: x.cold(x.written(2 * x.config.cold_documents)),
    "cold_5x": lambda x: x.cold(x.written(5 * x.config.cold_documents)),
    # Stage 2.
    "no_cold_start": lambda x: x.reasoned("base", SPOKEN),
    "no_language": lambda x: x.reasoned("dev1", RULES),
    # Stage 3.
    "dev3_on_dev2": lambda x: x.taught("dev2", x.lessons),
    "reasoning_alone": lambda x: x.taught("base", reasoning(x)),
    "curated_alone": lambda x: x.taught("base", x.curated(len(x.lessons) // 4)),
    "by_a_program": lambda x: x.taught("base", by_a_program(x)),
    # Stage 4.
    "no_arithmetic": lambda x: x.for_all(request_share=1.0, judged_from=0.0),
    "no_kl": lambda x: x.for_all(all_beta=0.0),
    "judged_from_0": lambda x: x.for_all(judged_from=0.0),
    "judged_half": lambda x: x.for_all(judged_from=0.5),
    # Three settings in which going back to the base might pay.
    "long_dev2": lambda x: x.reasoned("dev2", SPOKEN, times=3),
    "long_on_base": lambda x: x.taught("base", lessons(x.config, x.models["long_dev2"])),
    "long_on_dev2": lambda x: x.taught("long_dev2", lessons(x.config, x.models["long_dev2"])),
    "forgotten_on_base": lambda x: x.taught("base", forgotten(x)),
    "forgotten_on_dev2": lambda x: x.taught("dev2", forgotten(x)),
    "r1_on_dev2": lambda x: x.for_all("dev3_on_dev2"),
}
NEEDS = {"long_on_base": "long_dev2", "long_on_dev2": "long_dev2", "r1_on_dev2": "dev3_on_dev2"}


def controls(config: Config, run: Run) -> dict:
    """Makes the rows that are asked for, each once. One that cannot be made is told and left
    out."""
    folder, found = Path(config.of), {}
    models = {name: load_policy(folder / f"{name}.pt", config.device) for name in STAGES}
    judge = load_model(folder / "reward.pt", config.device, ScalarModel)
    bench = Bench(config, run, models, judge)
    print(head())
    for bench.row in config.rows:
        try:
            models[bench.row] = made = CONTROLS[bench.row](bench)
        except TooFew as reason:
            print(f"{bench.row:16} left out: {reason}", flush=True)
            continue
        measured = run.once(bench.row, lambda made=made: measure(config, made))
        seconds = run.seconds[bench.row]
        found[bench.row] = measured | {"tokens": None, "seconds": seconds}
        print(line(bench.row, found[bench.row]), flush=True)
    run.finish({"seed": config.seed, "of": config.of, "controls": found})
    return found


def settings_of(config: Config) -> Config:
    """The settings of the run that is named by --of, with this job's own --only and --out. Raises
    ValueError, in one line, for a folder that holds no finished run of r1.four_stages."""
    folder = Path(config.of)
    if not config.of or not (folder / "result.json").is_file():
        raise ValueError(f"--of {folder} must be the folder of a finished run of r1.four_stages")
    settings = json.loads((folder / "config.json").read_text())
    if settings.pop("program") != "-m r1.four_stages":
        raise ValueError(f"--of {folder} was not made by r1.four_stages")
    own = {name: getattr(config, name) for name in ("of", "only", "out", "device", "init")}
    return Config(**asdict(config) | settings | own)


def main(arguments: list[str]) -> None:
    program = "r1.controls"
    config = flags.parse(Config, reward_model.PRESETS, arguments, __doc__, program)
    try:
        config = config if config.resume else settings_of(config)
    except ValueError as error:
        flags.refuse(program, str(error))
    with open_run(config, "-m r1.controls") as run:
        controls(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
