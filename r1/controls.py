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
from pathlib import Path

from kit import flags
from kit.run import Run, open_run
from model import ScalarModel, Transformer, load_model
from r1 import four_stages
from r1.four_stages import RULES, SPOKEN, reason, rl_for_all
from r1.lessons import curated, fine_tune, kept, lessons, written
from r1.measure import head, line, measure
from rlhf import reward_model
from sample import load_policy, tokenizer_of

STAGES = ("base", "r1_zero", "dev1", "dev2", "dev3", "r1")


@dataclass(frozen=True)
class Config(four_stages.Config):
    """Every knob of r1.four_stages, as the run had them."""

    of: str = ""  # folder of a finished run of r1.four_stages, whose settings these are
    only: str = ""  # rows of CONTROLS, with commas between; default all

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.rows) - set(CONTROLS):
            raise ValueError(f"--only {unknown.pop()} must be of {', '.join(CONTROLS)}")

    @property
    def rows(self) -> list[str]:
        return self.only.split(",") if self.only else list(CONTROLS)


@dataclass
class Given:
    """What a control has: the settings, its own run, its own name, and the run's models."""

    config: Config
    run: Run
    row: str
    models: dict[str, Transformer]
    judge: ScalarModel

    def cold(self, times: int, model: str = "base") -> Transformer:
        """Stage 1 with this many times the documents, and as many epochs."""
        tokenizer, config = tokenizer_of(self.models[model]), self.config
        rows = written(config, tokenizer, times * config.cold_documents)
        steps = times * config.cold_steps
        return fine_tune(config, self.run, self.row, self.models[model], rows, steps)

    def reasoned(self, start: str, weights: dict[str, float], times: int = 1) -> Transformer:
        steps = times * self.config.reasoning_steps
        return reason(self.config, self.run, self.row, self.models[start], weights, steps)

    def taught(self, start: str, rows: list) -> Transformer:
        """Stage 3 for as many epochs as the run's, on rows of another number."""
        count = 4 * self.config.curated
        steps = max(1, round(self.config.sft_steps * len(rows) / count))
        return fine_tune(self.config, self.run, self.row, self.models[start], rows, steps)

    def lessons(self) -> list:
        return lessons(self.config, self.models["dev2"])

    def curated(self, count: int) -> list:
        return curated(self.config, tokenizer_of(self.models["base"]), count)

    def for_all(self, start: str = "dev3", **changes) -> Transformer:
        config = replace(self.config, **changes)
        return rl_for_all(config, self.run, self.row, self.models[start], self.judge)


def few(given: Given) -> list:
    """The reasoning of stage 3 with an eighth of its curated answers."""
    reasoning = kept(given.config, given.models["dev2"], 3 * given.config.curated)
    return reasoning + given.curated(len(reasoning) // 24)


# A row may start from a row above it.
CONTROLS: dict[str, Callable[[Given], Transformer]] = {
    "cold_2x": lambda x: x.cold(2),
    "cold_5x": lambda x: x.cold(5),
    "no_cold_start": lambda x: x.reasoned("base", SPOKEN),
    "no_language": lambda x: x.reasoned("dev1", RULES),
    "dev3_on_dev2": lambda x: x.taught("dev2", x.lessons()),
    "reasoning_alone": lambda x: x.taught("base", x.lessons()[: 3 * x.config.curated]),
    "curated_alone": lambda x: x.taught("base", x.curated(x.config.curated)),
    "by_a_program": lambda x: x.taught(
        "base",
        written(x.config, tokenizer_of(x.models["base"]), 3 * x.config.curated)
        + x.curated(x.config.curated),
    ),
    "no_arithmetic": lambda x: x.for_all(request_share=1.0, judged_from=0.0),
    "no_kl": lambda x: x.for_all(all_beta=0.0),
    "judged_from_0": lambda x: x.for_all(judged_from=0.0),
    # Three settings in which going back to the base might pay.
    "long_dev2": lambda x: x.reasoned("dev2", SPOKEN, times=3),
    "long_dev3_on_base": lambda x: x.taught("base", lessons(x.config, x.models["long_dev2"])),
    "long_dev3_on_dev2": lambda x: x.taught("long_dev2", lessons(x.config, x.models["long_dev2"])),
    "forgotten_on_base": lambda x: x.taught("base", few(x)),
    "forgotten_on_dev2": lambda x: x.taught("dev2", few(x)),
    "entropy_on_dev2": lambda x: x.for_all("dev3_on_dev2"),
}


def controls(config: Config, run: Run) -> dict:
    """Makes the rows again that are asked for. A row whose start is not among them is refused."""
    folder = Path(config.of)
    models = {name: load_policy(folder / f"{name}.pt", config.device) for name in STAGES}
    judge = load_model(folder / "reward.pt", config.device, ScalarModel)
    found = {}
    print(head())
    for row in config.rows:
        made = CONTROLS[row](Given(config, run, row, models, judge))
        models[row] = made
        found[row] = run.once(row, lambda made=made: measure(config, made))
        found[row] |= {"tokens": 0, "seconds": run.seconds[row]}
        print(line(row, found[row]), flush=True)
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
    own = {"of": config.of, "only": config.only, "device": config.device, "init": ""}
    return Config(**asdict(config) | settings | own | {"out": f"{folder}-controls"})


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
