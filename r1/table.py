"""The table of all stages, and what of the paper's table it shows."""

import json
from collections.abc import Callable
from functools import partial

from data.problem import Problem
from data.requests import HELD_OUT
from kit.evaluate import compare_samples, held_out_problems, share
from kit.run import Run
from model import ScalarModel, Transformer
from r1.distill import teacher_costs
from r1.lessons import own_samples
from r1.measure import SHARES, agreement, measure
from rlhf.preferences import REQUESTS

Found = dict[str, dict[str, float]]  # the measures of each stage, by their names
STAGES = ("base", "r1_zero", "dev1", "dev2", "dev3", "r1")  # all but the students

# What the paper's Table 2 shows, as differences between stages (AIME 2024, IF-Eval, AlpacaEval 2),
# and what R1 must be. A difference counts from a point on.
SIGNS: dict[str, Callable[[Found], bool]] = {
    "the cold start costs reasoning: Dev1 is less often right than R1-Zero": lambda x: (
        x["dev1"]["right"] < x["r1_zero"]["right"] - 0.01
    ),
    "the cold start follows instructions: Dev1 is more readable than R1-Zero": lambda x: (
        x["dev1"]["readable"] > x["r1_zero"]["readable"] + 0.01
    ),
    "reasoning RL wins it back: Dev2 is more often right than Dev1": lambda x: (
        x["dev2"]["right"] > x["dev1"]["right"] + 0.01
    ),
    "stage 3 keeps it: Dev3 is right as often as Dev2, to a point": lambda x: (
        x["dev3"]["right"] > x["dev2"]["right"] - 0.01
    ),
    "stage 3 is liked better: the gold of Dev3 is above Dev2's": lambda x: (
        x["dev3"]["gold_held_out"] > x["dev2"]["gold_held_out"] + 0.1
    ),
    "RL for all is liked better: the gold of R1 is above Dev3's": lambda x: (
        x["r1"]["gold_held_out"] > x["dev3"]["gold_held_out"] + 0.1
    ),
    "R1 is right as often as the best stage, to a point": lambda x: (
        x["r1"]["right"] > max(x[stage]["right"] for stage in STAGES) - 0.01
    ),
    "R1 is readable and in the question's language, above 95 %": lambda x: (
        min(x["r1"]["readable"], x["r1"]["korean"]) > 0.95
    ),
    "a student that imitates is right more often than by GRPO": lambda x: (
        x["student"]["right"] > x["student_grpo"]["right"] + 0.01
    ),
}


def signs(found: Found) -> dict[str, bool]:
    return {text: seen(found) for text, seen in SIGNS.items()}


COLUMNS = {  # of the table: the head of each measure
    **{"right": "right", "format": "format", "korean": "Korean", "readable": "readable"},
    **{"gold": "gold", "gold_held_out": "held-out", "web_loss": "web"},
    **{"tokens": "tokens", "seconds": "seconds"},
}


def head() -> str:
    return f"{'':16}" + "".join(f"{name:>10}" for name in COLUMNS.values())


def line(name: str, found: dict[str, float]) -> str:
    """A row of the table."""
    return f"{name:16}" + "".join(f"{cell(x, found[x]):>10}" for x in COLUMNS)


def cell(name: str, x: float | None) -> str:
    """A measure as its column of the table shows it; "-" for None."""
    if x is None or name in SHARES:
        return share(x)
    return f"{x:,.0f}" if name in ("tokens", "seconds") else f"{x:.2f}"


class Table:
    """The models of a job, and a row for each: measured once, and printed."""

    def __init__(self, config, run: Run):
        self.config, self.run = config, run
        self.models: dict[str, Transformer] = {}
        self.found: Found = {}

    def add(self, stage: str, model: Transformer, tokens: int | None = None) -> Transformer:
        """`tokens` are what the stage learned from; None for a stage of GRPO, of which the log says
        what it sampled."""
        if not self.found:
            print(head())
        found = self.run.once(stage, lambda: measure(self.config, model))
        tokens = self.sampled(stage) if tokens is None else tokens
        self.models[stage] = model
        self.found[stage] = found | {"tokens": tokens, "seconds": self.run.seconds[stage]}
        print(line(stage, self.found[stage]), flush=True)
        return model

    def sampled(self, stage: str) -> int:
        """The tokens that a stage of GRPO sampled, from the run's log."""
        rows = self.config.prompts * self.config.group_size
        lines = map(json.loads, (self.run.folder / "log.jsonl").read_text().splitlines())
        return round(sum(x["completion_tokens"] * rows for x in lines if x["stage"] == stage))


def finish(table: Table, judge: ScalarModel) -> None:
    """What is told at the end: a problem and a request through all stages, the paper's signs, what
    the judge is worth, what the student's teacher cost."""
    config, run, models = table.config, table.run, table.models
    found = {"stages": table.found, "signs": signs(table.found)}
    found["judge"] = run.once("judge", partial(agreement, config, judge, models["dev3"]))
    own = {name: models[name] for name in ("base", "r1_zero")}
    found["own"] = run.once("own", partial(own_samples, config, own))
    said, _ = compare_samples(models, shown(config), config.max_new_tokens, config.seed)
    run.write("samples.txt", said)
    run.finish({"device": config.device, "seed": config.seed, **found})
    print(f"\n{said}\n{report(found)}\n\n{run.times()}\n{run.folder}/ has it all.")


def shown(config) -> list[Problem]:
    """The Korean problem and the request that samples.txt shows, both held out."""
    chains = held_out_problems(config.task, config.levels, 8, config.seed, "samples")
    return [
        next(x for x in chains if x.language == "ko" and x.level > 1),
        REQUESTS.ask("about", HELD_OUT[-1], "en"),
    ]


def report(found: dict) -> str:
    lines = [f"{'seen' if seen else 'not seen':10}{text}" for text, seen in found["signs"].items()]
    for pairs, row in found["judge"].items():
        lines.append(f"the judge agrees with {share(row['reward'])} of people's choices ({pairs})")
    for model, own in found["own"].items():
        lines.append(f"{model}: {own['kept']} of {own['asked']} problems right and readable")
    cost = teacher_costs(found["stages"])
    lines.append(f"the student's teacher: {cost['tokens']:,.0f} tokens, {cost['seconds']:.0f} s")
    return "\n".join(lines)
