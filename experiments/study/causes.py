"""What makes thoughts grow: GRPO on signs with one thing changed, over three seeds.

    python -m experiments.study.causes             # all runs, results/causes.json, its tables
    python -m experiments.study.causes --lanes 1   # one run at a time
    python -m experiments.study.causes --read RUN  # RUN/described.json, of a run that has ended

Each run starts from its seed's base model, and takes thirty steps on lists of two to four numbers.
What has RATES of its own gets a small search of the learning rate before, on another seed and so on
other problems; all others take the rate that GRPO as it is was given. Stop it at any time; the same
command goes on.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import TASKS, get_tokenizer
from data.problem import Problem
from data.signs import Signs, candidates, line, parts_of, written
from experiments.study import search
from experiments.study.collect import (
    RESULTS,
    cell,
    grid,
    made_here,
    made_on,
    spread,
    write_into_page,
)
from experiments.study.measure import finished_run
from experiments.study.search import PROBLEMS, SAMPLES, below
from experiments.study.study import Job, Lever, complaints_of, do, ended_run, run_job
from experiments.study.variations import told_of
from experiments.watch.plot import read_log
from kit.flags import command_line
from kit.run import set_up
from model import write_whole
from sample import load_policy
from train import Config, problems_of

OUT = Path("out/causes")
SEEDS, CHOOSING = (0, 1, 2), 10  # the seed of the search, and the seeds that are reported
SHORT = "--max_level 3 --steps 30 --eval_problems 100"
RATES = ("3e-4", "6e-4", "1.2e-3")
PLAIN = "6e-4"  # the rate of train.py
ROUNDS = 30  # of online rejection sampling: one for each step
LEVELS = (1, 2, 3, 4)  # that are measured: level 4, five numbers, is in no run's GRPO
WINDOWS = ((1, 2), (6, 10), (16, 20), (26, 30))  # steps that a row of the model's table takes in


@dataclass(frozen=True)
class Cause(Lever):
    """A change of one setting, or of the documents that the base model has read."""

    variation: str = "told"
    task: str = "signs"  # whose documents its base model has read
    rates: tuple[str, ...] = ()  # of the search; none: the rate of GRPO as it is


CAUSES = {
    "as_it_is": Cause("as it is", rates=RATES),
    "positives": Cause("positive advantages alone", "", "positives_alone", rates=RATES),
    "lighter": Cause("negative advantages times 0.4", "", "negatives_lighter", rates=RATES),
    "dr_grpo": Cause("Dr. GRPO", "--variant dr_grpo", rates=RATES),
    "rejection": Cause("online rejection sampling", rates=("1e-4", "3e-4", "1e-3")),
    "end": Cause("the target behind the last total", task="signs-end", rates=RATES),
    "bare": Cause("the target not restated", task="signs-bare"),
    "shuffled": Cause("verdicts by chance", task="signs-shuffled"),
    "no_twos": Cause("GRPO without two numbers", "--min_level 2"),
    "group_4": Cause("G = 4", "--group_size 4 --prompts 64"),
    "group_16": Cause("G = 16", "--group_size 16 --prompts 16"),
    "mu_2": Cause("mu = 2", "--inner_epochs 2"),
    "colder": Cause("temperature 0.7", "--temperature 0.7"),
    "kl": Cause("a KL to the base model", "--beta 0.05"),
    "clip_higher": Cause("clip higher", "--clip_high 0.28"),
    "paid_by_no": Cause("half a point for each try more", "", "paid_by_no"),
    "paid_by_right_no": Cause("the same, if the answer is right", "", "paid_by_right_no"),
}
HACKED = ("as_it_is", "paid_by_no", "paid_by_right_no")


# -------------------------------------------------------------------------------------------- runs


def base_of(folder: Path, task: str, seed: int) -> Job:
    """The base model of a task, of lists of two to five numbers."""
    flags = f"--task {task} --seed {seed} --steps 1 --eval_problems 12"
    return run_job(folder, f"base_{task}", flags, "told", minutes=5)


def read_job(run: Job) -> Job:
    """Measures the model of a run."""
    folder = run.makes.parent
    command = ["-m", "experiments.study.causes", "--read", str(folder)]
    return Job(run.folder, f"{run.name}_read", lambda: command, read_of(folder), (run,), 0.5)


def read_of(folder: Path) -> Path:
    return folder / "described.json"


def jobs(folder: Path, seed: int, name: str, rate: str) -> list[Job]:
    """The jobs of a cause at a learning rate, those that it needs before it."""
    cause, called = CAUSES[name], f"{name}_{rate}"
    base = base_of(folder, cause.task, seed)
    if name == "rejection":
        *before, plain, _ = jobs(folder, seed, "as_it_is", PLAIN)
        run, makes = plain.makes.parent, folder / called / "r1_zero.json"
        program = ["-m", "experiments.study.rejection_sampling", str(run), "--out", str(makes)]
        command = [*program, "--rounds", str(ROUNDS), "--lr", rate]
        sampled = Job(folder, called, lambda: command, makes, (plain,), 1.0)
        return [*before, plain, sampled, read_job(sampled)]
    flags = f"--task {cause.task} --seed {seed} {SHORT} --init {base.makes.parent}/base.pt"
    flags += f" --lr {rate} {cause.flags}"
    run = run_job(folder, called, flags, cause.variation, needs=(base,))
    return [base, read_job(base), run, read_job(run)]


def once(listed: list[Job]) -> list[Job]:
    """Each job once, by what it makes."""
    return list({job.makes: job for job in listed}.values())


# ---------------------------------------------------------------------------------------- measures


def read(folder: Path) -> dict:
    """What the model of a run says on held-out problems, by level. Of a run that pretrained it is
    the base model, of signs with what it says to planted tries."""
    own = (folder / "config.json").exists()  # online rejection sampling has GRPO's settings
    config = finished_run(folder if own else folder.parent / f"as_it_is_{PLAIN}")
    set_up(config)
    how = {"limit": config.max_new_tokens, "seed": config.seed}
    name = "r1_zero" if config.init else "base"
    model = load_policy(folder / f"{name}.pt")
    found = {"levels": search.examine(model, LEVELS, PROBLEMS, SAMPLES, **how)}
    if name == "base" and type(TASKS[config.task]) is Signs:
        found["planted"] = search.verdicts(model, search.PLANTED, 0, config.seed)
    return found


def chosen(folder: Path, name: str) -> tuple[str, dict[str, float]]:
    """The rate of the search at which a cause is right most often, and what each had."""
    found = {}
    for rate in CAUSES[name].rates:
        told = json.loads(read_of(folder / f"{name}_{rate}").read_text())["levels"]
        found[rate] = statistics.mean(told[str(level)]["pass@1"] for level in (2, 3))
    return max(found, key=found.get), found


def run_of(folder: Path, name: str, rate: str) -> dict:
    """What the tables need of a cause's run: the measures of its model by level, and its log."""
    run = folder / f"{name}_{rate}"
    found = {"levels": json.loads(read_of(run).read_text())["levels"]}
    if name == "rejection":
        return found | {"log": []}
    found["log"] = ended_run(run)["log"]
    if name in HACKED:
        found["diagnose"] = complaints_of(run)
    if name == "as_it_is":
        config = finished_run(run)
        base = base_of(folder, config.task, config.seed).makes.parent
        planted = json.loads(read_of(base).read_text())["planted"]
        found["model"] = model_of(config, read_log(run), planted)
    return found


# ------------------------------------------------------------------------- a model with one knob


def expected(
    problems: list[Problem], gives_up: float, no_try: float, wrong: dict[str, float], most: int
) -> dict[str, float]:
    """The share of right answers and the tries of a searcher that tries candidates blindly.

    Each try is a candidate drawn at random. "yes" ends a thought, and so does, behind a "no", the
    chance `gives_up`; the last try is the answer. `wrong` has the chances that a "hit" is called
    "no" and a "miss" "yes". What is not done after `most` tries is cut, and wrong. The share
    `no_try` of the thoughts answers with a candidate at random.
    """
    right, tries = [], []
    for problem in problems:
        numbers, target = parts_of(problem)
        values = list(candidates(numbers).values())
        hit = values.count(target) / len(values)
        no = hit * wrong["hit"] + (1 - hit) * (1 - wrong["miss"])
        done, tried, going = 0.0, 0.0, 1.0
        for _ in range(most):
            tried += going
            done += going * hit * (1 - wrong["hit"] + wrong["hit"] * gives_up)
            going *= no * (1 - gives_up)
        right.append(no_try * hit + (1 - no_try) * done)
        tries.append((1 - no_try) * tried)
    return {"right": statistics.mean(right), "tries": statistics.mean(tries)}


def most_tries(config: Config, level: int) -> int:
    """How many tries of a level fit into a completion."""
    task, tokenizer = TASKS[config.task], get_tokenizer(config.task)
    tried = " + ".join(["1"] * (level + 1))
    problem = task.ask((1,) * (level + 1), level + 1)
    rest = len(tokenizer.encode(written(problem, "", tried, "").text, tags=True)) + 1
    return (config.max_new_tokens - rest) // len(tokenizer.encode(line(level + 1, tried)))


def model_of(config: Config, log: list[dict], planted: dict[str, float]) -> list[dict]:
    """The blind searcher beside the run, by level and window of steps. Of the run it takes only the
    chance to give up and the share without a try; the errors of the verdicts are the base's."""
    wrong, found = {"hit": 1 - planted["hit"], "miss": planted["miss"]}, []
    for level in (2, 3):
        most = most_tries(config, level)
        for first, last in WINDOWS:
            parts = []
            for record in log[first - 1 : last]:
                told = told_of(record, level)
                asked = [x for x in problems_of(config, record["step"] - 1) if x.level == level]
                blind = expected(asked, told["gives_up"], told["no_try"], wrong, most)
                parts.append(told | {f"blind {name}": x for name, x in blind.items()})
            means = {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
            found.append({"level": level, "steps": [first, last], **means})
    return found


# ------------------------------------------------------------------------------ claims and tables

Seed = dict  # all results of one seed


def of(row: str, name: str, level: int = 3) -> Callable[[Seed], float]:
    """A measure of a cause's model; of "base" and its kind, of that base model."""
    return lambda seed: seed[row]["levels"][str(level)][name]


@dataclass(frozen=True)
class Claim:
    """What is claimed, its number, what is held against it, and by how much the number must be
    above (or, if the margin is negative, below)."""

    text: str
    number: Callable[[Seed], float]
    control: str
    against: Callable[[Seed], float]
    margin: float

    def seen(self, seed: Seed) -> bool:
        number, against = self.number(seed), self.against(seed)
        if None in (number, against):  # no try, no lift
            return False
        gap = number - against
        return gap > self.margin if self.margin >= 0 else gap < self.margin


CLAIMS = (
    Claim(
        "thoughts grow: tries over four numbers",
        of("as_it_is", "tries"),
        "its base model",
        of("base", "tries"),
        1.0,
    ),
    Claim(
        "they grow less if a verdict must be told from the question: tries",
        of("bare", "tries"),
        "as it is",
        of("as_it_is", "tries"),
        -1.0,
    ),
    Claim(
        "they grow less if verdicts are by chance: tries",
        of("shuffled", "tries"),
        "as it is",
        of("as_it_is", "tries"),
        -1.0,
    ),
    Claim(
        "what failed drives going on: tries, with positive advantages alone",
        of("positives", "tries"),
        "as it is",
        of("as_it_is", "tries"),
        -1.0,
    ),
    Claim(
        "what went well drives aim: lift, with positive advantages alone",
        of("positives", "lift"),
        "as it is",
        of("as_it_is", "lift"),
        0.1,
    ),
    Claim(
        "with the target behind the total it goes on: tries",
        of("end", "tries"),
        "its base model",
        of("base_end", "tries"),
        1.0,
    ),
    Claim("but it aims less: lift", of("end", "lift"), "as it is", of("as_it_is", "lift"), -0.1),
    Claim(
        "GRPO is worth more than its samples, kept if right: right, four numbers",
        of("as_it_is", "pass@1"),
        "online rejection sampling",
        of("rejection", "pass@1"),
        0.03,
    ),
    Claim(
        "what GRPO does not ask is lost: right, two numbers, without them in GRPO",
        of("no_twos", "pass@1", 1),
        "the base model",
        of("base", "pass@1", 1),
        -0.03,
    ),
    Claim(
        "it goes on beyond what GRPO asks: right, five numbers",
        of("as_it_is", "pass@1", 4),
        "the base model",
        of("base", "pass@1", 4),
        0.03,
    ),
    Claim(
        "a reward for each try more is hacked: right, four numbers",
        of("paid_by_no", "pass@1"),
        "as it is",
        of("as_it_is", "pass@1"),
        -0.03,
    ),
)
MEASURES = {  # of the table of causes: measure, level
    "right, 2 numbers": ("pass@1", 1, cell),
    "right, 3 numbers": ("pass@1", 2, cell),
    "right, 4": ("pass@1", 3, cell),
    "right, 5": ("pass@1", 4, cell),
    "tries, 4": ("tries", 3, spread),
    "lift, 4": ("lift", 3, spread),
    "verdicts true, 4": ("verdicts true", 3, cell),
    "in the format, 4": ("format", 3, cell),
    "tokens, 4": ("tokens", 3, spread),
}


def shown(values: list[float | None], say: Callable[[list[float]], str]) -> str:
    return "-" if None in values else say(values)


def named(cause: dict) -> str:
    return cause["label"] + (f" `{cause['flags'].strip()}`" if cause["flags"] else "")


def causes_table(results: dict) -> str:
    """A row for each cause, and for each base model before its own."""
    seeds, rows = results["seeds"], []

    def row(label: str, key: str, rate: str) -> None:
        cells = [
            shown([of(key, name, level)(seed) for seed in seeds], say)
            for name, level, say in MEASURES.values()
        ]
        rows.append([label, rate, *cells])

    row("base model", "base", "-")
    for name, cause in results["causes"].items():
        if f"base_{name}" in seeds[0]:
            row(f"{cause['label']}: its base model", f"base_{name}", "-")
        row(named(cause), name, cause["rate"])
    return grid(["GRPO", "rate", *MEASURES], rows, below(results))


def signals_table(results: dict) -> str:
    """Entropy, silent groups and the KL to the base model, at the ends of the runs."""
    rows = []
    for name, cause in results["causes"].items():
        logs = [seed[name]["log"] for seed in results["seeds"]]
        if all(logs):
            first, last = ([log[at] for log in logs] for at in (0, -1))
            fields = [(first, "entropy"), (last, "entropy"), (first, "no_signal")]
            fields += [(last, "no_signal"), (last, "base_kl")]
            cells = [spread([each[x] for each in records]) for records, x in fields]
            rows.append([named(cause), *cells])
    head = ["GRPO", "entropy, step 1", "entropy, end", "silent, step 1", "silent, end", "KL, end"]
    return grid(head, rows, "Nats a token; shares of groups. " + below(results))


def rates_table(results: dict) -> str:
    """The search of the learning rate."""
    rows = [
        [cause["label"], *(f"{rate}: {100 * x:.1f} %" for rate, x in cause["searched"].items())]
        for cause in results["causes"].values()
        if cause["searched"]
    ]
    text = f"Seed {CHOOSING}; right over 3 and 4 numbers. {made_on(results)}"
    return grid(["GRPO", "rates", "", ""], rows, text)


def model_table(results: dict) -> str:
    """The blind searcher beside the runs."""
    rows = []
    for lines in zip(*(seed["as_it_is"]["model"] for seed in results["seeds"])):
        level, (first, last) = lines[0]["level"], lines[0]["steps"]
        names = ("gives_up", "no_try", "right", "blind right")
        cells = [cell([each[name] for each in lines]) for name in names]
        cells += [spread([each[name] for each in lines]) for name in ("tries", "blind tries")]
        rows.append([f"{level + 1} numbers, steps {first} to {last}", *cells])
    head = ["", 'gives up behind a "no"', "no try", "right", "blind: right", "tries"]
    text = "Completions of training; the problems are the same for both. " + below(results)
    return grid([*head, "blind: tries"], rows, text)


def hacked_table(results: dict) -> str:
    """What a wrong reward comes to, and what diagnose says of it."""
    rows, seeds = [], results["seeds"]
    for name in HACKED:
        runs = [seed[name] for seed in seeds]
        ends = [
            [run["log"][at][x] for run in runs] for x in ("reward", "accuracy") for at in (0, -1)
        ]
        complaints = [each for run in runs for each in run["diagnose"]]
        counts = [f"{x} ({complaints.count(x)})" for x in dict.fromkeys(complaints)]
        reward, accuracy = (
            f"{say(a)} -> {say(b)}" for say, a, b in ((spread, *ends[:2]), (cell, *ends[2:]))
        )
        tries = spread([of(name, "tries")(seed) for seed in seeds])
        right = cell([of(name, "pass@1")(seed) for seed in seeds])
        rows.append(
            [
                named(results["causes"][name]),
                reward,
                accuracy,
                right,
                tries,
                ", ".join(counts) or "nothing",
            ]
        )
    head = ["rewarded for", "reward in training", "right in training", "right, 4 numbers"]
    return grid([*head, "tries, 4", "diagnose finds"], rows, below(results))


def claims_table(results: dict) -> str:
    """A row for each claim, with the number of seeds that show it."""
    seeds, rows = results["seeds"], []
    for claim in CLAIMS:
        numbers, controls = (
            shown([each(seed) for seed in seeds], spread) for each in (claim.number, claim.against)
        )
        count = sum(map(claim.seen, seeds))
        held = f"{claim.control}: {controls}"
        rows.append([claim.text, numbers, held, f"{claim.margin:+g}", f"{count} of {len(seeds)}"])
    head = ["claim", "number", "held against it", "margin", "seen in"]
    return grid(head, rows, below(results))


TABLES = {
    "claims": claims_table,
    "causes": causes_table,
    "rates": rates_table,
    "signals": signals_table,
    "model": model_table,
    "hacked no": hacked_table,
}


# --------------------------------------------------------------------------------------- command


def results_of(folder: Path, rates: dict[str, tuple[str, dict]]) -> dict:
    """All that the tables say."""
    seeds = []
    for number in SEEDS:
        place, seed = folder / f"seed{number}", {"seed": number}
        for name, cause in CAUSES.items():
            seed[name] = run_of(place, name, rates[name][0])
            base = base_of(place, cause.task, number).makes.parent
            key = "base" if cause.task == "signs" else f"base_{name}"
            seed[key] = {"levels": json.loads(read_of(base).read_text())["levels"]}
        seeds.append(seed)
    causes = {
        name: {"label": x.label, "flags": x.flags, "rate": rates[name][0]}
        | {"searched": rates[name][1]}
        for name, x in CAUSES.items()
    }
    command = "python -m experiments.study.causes"
    return {"command": command, **made_here(), "causes": causes, "seeds": seeds}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--lanes", type=int, default=2, help="jobs at a time [2]")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the runs [{OUT}]")
    parser.add_argument("--read", metavar="RUN", type=Path, help="measure the models of a run")
    flags = parser.parse_args(arguments)
    if flags.read:
        write_whole(read_of(flags.read), (json.dumps(read(flags.read)) + "\n").encode())
        return
    if flags.lanes < 1:
        parser.error("--lanes must be at least 1")
    folder, rates = flags.out.absolute(), {}
    searched = folder / f"seed{CHOOSING}"
    tried = [(name, rate) for name, cause in CAUSES.items() for rate in cause.rates]
    do(once([job for each in tried for job in jobs(searched, CHOOSING, *each)]), flags.lanes)
    for name, cause in CAUSES.items():
        rates[name] = chosen(searched, name) if cause.rates else (rates["as_it_is"][0], {})
    names = [(seed, name) for seed in SEEDS for name in CAUSES]
    listed = [jobs(folder / f"seed{seed}", seed, name, rates[name][0]) for seed, name in names]
    do(once([job for each in listed for job in each]), flags.lanes)
    results = results_of(folder, rates)
    (RESULTS / "causes.json").write_text(json.dumps(results) + "\n")
    for name, table in TABLES.items():
        write_into_page(f"{name}: made by experiments/study/causes.py", table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
