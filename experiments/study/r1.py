"""Collect finished runs of R1's four stages, and of their controls, and write the tables of
r1/README.md.

    python -m experiments.study.r1 out/world-cpu-r1-seed*   # with RUN-controls beside a RUN

A row of the controls is compared with a stage of the same run: differences are paired by seed.
"""

import json
import sys
from pathlib import Path

from experiments.study.collect import (
    RESULTS,
    ROOT,
    cell,
    check_one_configuration,
    grid,
    made_here,
    made_on,
    spread,
    write_into_page,
)
from kit.evaluate import share
from kit.flags import command_line
from r1.distill import teacher_costs
from r1.table import COLUMNS, SIGNS

PAGE = ROOT / "r1" / "README.md"
NAMES = {
    **{"base": "base", "r1_zero": "R1-Zero", "dev1": "Dev1", "dev2": "Dev2", "dev3": "Dev3"},
    **{"r1": "R1", "student_base": "base of the student", "student": "student, by imitation"},
    "student_grpo": "student, by GRPO",
}
ROWS = {  # of the controls: the stage that a row is compared with, and what differs
    "zero_longer": ("r1_zero", "three times as many rollouts"),
    "cold_own": ("dev1", "R1-Zero's own right and readable samples, as many"),
    "cold_2x": ("dev1", "twice the documents"),
    "cold_5x": ("dev1", "five times the documents"),
    "no_cold_start": ("dev2", "from the base: no cold start"),
    "no_language": ("dev2", "no reward for the language"),
    "dev3_on_dev2": ("dev3", "on Dev2 in place of the base"),
    "reasoning_alone": ("dev3", "on reasoning alone"),
    "curated_alone": ("dev3", "on curated answers alone"),
    "by_a_program": ("dev3", "on thoughts that a program wrote"),
    "no_arithmetic": ("r1", "no arithmetic: requests alone, from the start"),
    "no_kl": ("r1", "no KL"),
    "judged_from_0": ("r1", "requests and their judge from the start"),
    "judged_half": ("r1", "requests and their judge in the last half of the steps"),
    "long_dev2": ("dev2", "three times more rollouts after it"),
    "long_on_base": ("dev3", "of the longer Dev2, on the base"),
    "long_on_dev2": ("dev3", "of the longer Dev2, on the longer Dev2"),
    "forgotten_on_base": ("dev3", "an eighth of the curated answers, on the base"),
    "forgotten_on_dev2": ("dev3", "an eighth of the curated answers, on Dev2"),
    "r1_on_dev2": ("r1", "from a stage 3 that went on from Dev2"),
}
POINTS = ("gold", "gold_held_out", "web_loss")  # measures that are no shares
SHOWN = ("right", "readable", "korean", "gold", "gold_held_out", "web_loss")  # of a control
OWN = ("seed", "out", "init")  # settings that runs of one publication may differ in


def finished(folder: Path, program: str) -> tuple[dict, dict]:
    """Settings and result of a finished run. Raises ValueError, in one line, for another folder."""
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} holds no result.json: it is no finished run")
    settings = json.loads((folder / "config.json").read_text())
    if settings["program"] != program:
        raise ValueError(f"{folder} was made by {settings['program']}, not by {program}")
    return settings, json.loads((folder / "result.json").read_text())


def published(folders: list[Path]) -> dict:
    """The results of runs by their seeds, and the controls that lie beside each. Raises ValueError,
    in one line, for runs of other settings and for a seed that comes twice."""
    seeds, kept = [], ("seed", "stages", "judge", "own", "signs", "seconds")
    runs = [finished(folder, "-m r1.four_stages") for folder in folders]
    check_one_configuration(folders, [settings for settings, _ in runs], OWN)
    for folder, (_, result) in zip(folders, runs):
        found = {name: result[name] for name in kept} | {"controls": {}}
        for beside in sorted(folder.parent.glob(f"{folder.name}-controls*")):
            found["controls"] |= finished(beside, "-m r1.controls")[1]["controls"]
        seeds.append(found | {"samples": (folder / "samples.txt").read_text()})
    if len({found["seed"] for found in seeds}) < len(seeds):
        raise ValueError("a seed comes twice: give each run once")
    return {
        "command": "python -m r1.four_stages --seed SEED --init BASE",
        **made_here(),
        "seeds": sorted(seeds, key=lambda found: found["seed"]),
    }


def number(name: str, values: list[float]) -> str:
    """The mean of a measure and its range, as a cell."""
    if name in ("tokens", "seconds"):
        return f"{sum(values) / len(values):,.0f}"
    if name in POINTS:
        return spread(values)
    return cell(values)


def stages(results: dict) -> str:
    """A row for each model, a column for each measure."""
    seeds = results["seeds"]
    rows = [
        [text, *(number(name, [seed["stages"][stage][name] for seed in seeds]) for name in COLUMNS)]
        for stage, text in NAMES.items()
    ]
    told = ", ".join(str(seed["seed"]) for seed in seeds)
    below = f"`{results['command']}`, seeds {told}: mean (lowest-highest). {made_on(results)}"
    return grid(["", *COLUMNS.values()], rows, below)


def seen(results: dict) -> str:
    """In how many seeds each sign of the paper's table was seen."""
    seeds = results["seeds"]
    rows = [
        [sign, f"{sum(seed['signs'][sign] for seed in seeds)} of {len(seeds)}"] for sign in SIGNS
    ]
    return grid(["sign", "seen in"], rows, "A difference counts from a point, or 0.1 of gold, on.")


def controls(results: dict) -> str:
    """A row for each control, and how far it is from the stage that it is compared with."""
    rows = []
    for row, (stage, text) in ROWS.items():
        pairs = [
            (seed["controls"][row], seed["stages"][stage])
            for seed in results["seeds"]
            if row in seed["controls"]
        ]
        if pairs:
            cells = (against(name, pairs) for name in SHOWN)
            rows.append([f"`{row}`", f"{NAMES[stage]}, {text}", str(len(pairs)), *cells])
    below = "Means over the seeds; in brackets the difference to the stage that is named first, "
    below += "with a star where it has the same sign in each of several seeds."
    return grid(["row", "what it is", "seeds", *(COLUMNS[name] for name in SHOWN)], rows, below)


def against(name: str, pairs: list[tuple[dict, dict]]) -> str:
    """The mean of a measure over the seeds, and the mean difference to the stage."""
    mean = sum(one[name] for one, _ in pairs) / len(pairs)
    differences = [one[name] - stage[name] for one, stage in pairs]
    difference = sum(differences) / len(pairs)
    agree = len(pairs) > 1 and (min(differences) > 0 or max(differences) < 0)
    star = "*" if agree else ""
    if name in POINTS:
        return f"{mean:.2f} ({difference:+.2f}{star})"
    return f"{100 * mean:.1f} % ({100 * difference:+.1f}{star})"


def costs(results: dict) -> str:
    """What each seed's teacher and judge cost, what the judge is worth, and of how many problems
    two models give a right and readable answer by themselves."""
    rows = []
    for seed in results["seeds"]:
        cost, own = teacher_costs(seed["stages"]), seed["own"]
        agrees = (seed["judge"][f"{pairs}, clear"]["reward"] for pairs in ("new", "held-out"))
        kept = (f"{own[model]['kept']} of {own[model]['asked']}" for model in ("base", "r1_zero"))
        seconds = (f"{x:.0f}" for x in (cost["seconds"], seed["seconds"]["reward"]))
        cells = (f"{cost['tokens']:,.0f}", *seconds, *map(share, agrees), *kept)
        rows.append([str(seed["seed"]), *cells])
    head = ["seed", "teacher's tokens", "its seconds", "judge's seconds", "agrees with people"]
    head += ["about held-out numbers", "by itself right and readable: base", "R1-Zero"]
    return grid(head, rows, "Of pairs between which people do not waver.")


def samples(results: dict) -> str:
    """A problem and a request through all stages, of the first seed."""
    return f"```text\n{results['seeds'][0]['samples'].strip()}\n```"


TABLES = {"stages": stages, "signs": seen, "controls": controls, "costs": costs}
TABLES |= {"samples": samples}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run that has ended")
    flags = parser.parse_args(arguments)
    try:
        results = published(flags.run)
    except ValueError as error:
        parser.error(str(error))
    (RESULTS / "r1.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, made in TABLES.items():
        write_into_page(f"{name}: made by experiments/study/r1.py", made(results), [PAGE])
        print(made(results), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
