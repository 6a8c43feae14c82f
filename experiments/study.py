"""Everything that the README claims of R1-Zero in miniature: runs, controls, measurements, tables, pictures.

    python experiments/study.py                  # phenomena, levers, the hacked reward; needs matplotlib
    python experiments/study.py --quick          # the phenomena alone
    python experiments/study.py --preset gpu     # on a GPU: that preset, five seeds side by side

What is done is skipped and what was stopped goes on, so it can be stopped at any time and called again; after a change
of the code, give it another --out. The results of the cpu preset go to experiments/results and into the README, those
of the gpu preset to experiments/results/gpu.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

from data.tokenizer import get_tokenizer
from experiments import collect, diagnose, plot, report
from experiments.collect import RESULTS
from experiments.measure import finished_run
from train import Config, sample_problems

# What differs between the presets: seeds, the languages' runs, steps of pretraining that take the tokens of GRPO too,
# rounds of online rejection sampling, jobs at a time.
PLANS = {
    "cpu": (3, "--languages en,ko --max_level 4 --pretrain_steps 8000", 8000, 80, min(8, os.cpu_count() or 1)),
    "gpu": (5, "", 13600, 150, 5),
}
FEWER = "--eval_problems 200"  # where runs are many
LEVER_SEEDS = 3
BAR = "{desc} {n_fmt} of {total_fmt} jobs |{bar:20}| {elapsed}{postfix}"


@dataclass(frozen=True)
class Lever:
    label: str
    flags: str = ""
    variation: str = ""  # of experiments/variations.py, where no flag can say it


LEVERS = {
    "default": Lever("as it is"),
    "mean_only": Lever("advantages: less the mean, not over the deviation", "--variant mean_only", "mean_only"),
    "dr_grpo": Lever("the same, and no output's length divides it (Dr. GRPO)", "--variant dr_grpo"),
    "clip_higher": Lever("clip higher", "--clip_high 0.28"),
    "kl_r1": Lever("KL, as heavy as R1's", "--beta 0.001"),
    "kl": Lever("KL, heavy", "--beta 0.05"),
    "kl_refreshed": Lever("the same, a new reference every 20 steps", "--beta 0.05 --reference_every 20"),
    "group_4": Lever("G = 4", "--group_size 4 --prompts 128"),
    "group_16": Lever("G = 16", "--group_size 16 --prompts 32"),
    "group_32": Lever("G = 32", "--group_size 32 --prompts 16"),
    "group_64": Lever("G = 64", "--group_size 64 --prompts 8"),
    "one_update": Lever("one update a rollout in place of 4", "--minibatches 1"),
    "mu_2": Lever("mu = 2", "--inner_epochs 2"),
    "mu_4": Lever("mu = 4", "--inner_epochs 4"),
    "colder": Lever("temperature 0.7", "--temperature 0.7"),
    "hotter": Lever("temperature 1.25", "--temperature 1.25"),
    "accuracy_alone": Lever("accuracy : format = 1 : 0", "--format_weight 0"),
    "dynamic": Lever("dynamic sampling", "", "dynamic_sampling"),
    "dynamic_short": Lever("dynamic sampling, about as many completions", "--steps 35", "dynamic_sampling"),
}
HACKED = {
    "default": Lever("accuracy and format"),
    "paid_by_step": Lever("and half a point for each step", "", "paid_by_step"),
    "paid_by_right_step": Lever(
        "and half a point for each step that leads to a right answer", "", "paid_by_right_step"
    ),
}


# ------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A command, after `python`; the file that is there when it is done; and the jobs that must be done before."""

    folder: Path
    name: str
    command: Callable[[], list[str]]  # asked for when it starts: a run that was stopped has another one
    makes: Path
    needs: tuple["Job", ...]
    minutes: float  # about, on the machine that the README's numbers are from


def run_job(folder: Path, name: str, flags: str, variation: str = "", needs: tuple = (), minutes: float = 1.3) -> Job:
    """A run of train.py, or of a variation of it, in folder/name."""
    script, run = ["experiments/variations.py", variation] if variation else ["train.py"], folder / name

    def command() -> list[str]:
        return script + (["--resume", str(run)] if (run / "last.pt").exists() else [*flags.split(), "--out", str(run)])

    return Job(folder, name, command, run / "result.json", needs, minutes)


def phenomena(folder: Path, preset: str, seed: int) -> list[Job]:
    """The runs and measurements of one seed. All share its base model, but those in two languages, which share one."""
    _, languages, longer, rounds, _ = PLANS[preset]
    plain, two = f"--preset {preset} --seed {seed}", f"--preset {preset} --seed {seed} {languages} {FEWER}"
    main = run_job(folder, "main", plain, minutes=3.3)
    language = run_job(folder, "language", two, minutes=3.7)
    rewarded, base = f"--language_weight 1 --init {folder}/language/base.pt", f"--init {folder}/main/base.pt"

    def measurement(name: str, script: str, minutes: float, *flags: str) -> Job:
        run = folder / "main"
        return Job(folder, name, lambda: [script, str(run), *flags], run / f"{name}.json", (main,), minutes)

    rejection = "experiments/rejection_sampling.py"
    return [
        main,
        language,
        run_job(folder, "longer", f"{plain} {FEWER} --pretrain_steps {longer} --steps 1", minutes=3.0),
        run_job(folder, "language_reward", f"{two} {rewarded}", needs=(language,)),
        run_job(folder, "dr_grpo", f"{plain} {FEWER} {base} --variant dr_grpo", needs=(main,)),
        measurement("measured", "experiments/measure.py", 2.0),
        measurement("rejection_sampling_1", rejection, 1.5),
        measurement(f"rejection_sampling_{rounds}", rejection, 1.5, f"--rounds={rounds}"),
    ]


def levers(folder: Path, preset: str, base: Job) -> list[Job]:
    """All seeds of each lever and each reward, from one base model."""
    common = f"--preset {preset} {FEWER} --init {base.makes.parent}/base.pt"
    return [
        run_job(folder / f"seed{seed}", name, f"{common} --seed {seed} {lever.flags}", lever.variation, (base,))
        for seed in range(LEVER_SEEDS)
        for name, lever in (LEVERS | HACKED).items()
    ]


def do(jobs: list[Job], lanes: int) -> None:
    """Do what is not done yet, `lanes` jobs at a time; what each prints is in a file of its name. A failed job ends it
    all, when those beside it are done, with the name of that file. SIGINT and SIGTERM stop them all, and each run of
    train.py then saves."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    waiting, done, started = [job for job in jobs if not job.makes.exists()], 0.0, time.perf_counter()
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="study", dynamic_ncols=True, bar_format=BAR)
    running, processes, stopping = {}, set(), threading.Event()
    with ThreadPoolExecutor(lanes) as pool, bar:
        try:
            while waiting or running:
                for job in [job for job in waiting if all(need.makes.exists() for need in job.needs)]:
                    if len(running) < lanes:
                        waiting.remove(job)
                        running[pool.submit(start, job, processes, stopping)] = job
                pace = (time.perf_counter() - started) / 60 / done if done else 1 / lanes  # minutes, for each foreseen
                left = pace * sum(job.minutes for job in (*waiting, *running.values()))
                names = ", ".join(f"{job.folder.name}/{job.name}" for job in running.values())
                bar.set_postfix_str(f"about {left:.0f} min left: {names}")
                ended, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = running.pop(future)
                    if future.result() or not job.makes.exists():
                        sys.exit(f"{job.name} failed: {job.folder}/{job.name}.txt says why")
                    done += job.minutes
                    bar.update()
        except KeyboardInterrupt:
            stopping.set()
            for process in list(processes):
                process.terminate()
            sys.exit("\nstopped: the same command goes on")


def start(job: Job, processes: set[subprocess.Popen], stopping: threading.Event) -> int:
    if stopping.is_set():
        return 1
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / f"{job.name}.txt").open("w") as printed:
        how = {"cwd": ROOT, "stdout": printed, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, *job.command()], start_new_session=True, **how)  # no Ctrl-C twice
        processes.add(process)
        code = process.wait()
        processes.discard(process)
        return code


# ---------------------------------------------------------------------------------------------------------- results

KEPT = (
    "step",
    "reward",
    "accuracy",
    "completion_tokens",
    "right_tokens",
    "wrong_tokens",
    "entropy",
    "no_signal",
    "rounds",
)
KEPT += ("held_out_accuracy", "base_kl", "language_ko", "accuracy_ko")
DRAWN = ("step", "reward", "held_out_accuracy")  # of the hacked reward


def ended_run(folder: Path) -> dict:
    """The two evaluations of a run, and its log."""
    result = json.loads((folder / "result.json").read_text())
    records = plot.read_log(folder)
    log = [{name: float(f"{record[name]:.4g}") for name in KEPT if name in record} for record in records]
    return {"base": result["base"], "r1_zero": result["r1_zero"], "log": log}


def tokens_of(config: Config, log: list[dict]) -> int:
    """What a run of GRPO sampled and read: its completions, and a prompt with each."""
    tokenizer, prompts = get_tokenizer(), 0
    for step in range(config.steps):
        levels = range(config.min_level, config.max_level + 1)
        problems = sample_problems(config, "problems", step, config.prompts, held_out=False, levels=levels)
        prompts += sum(len(tokenizer.encode(problem.prompt)) for problem in problems)
    completions = config.prompts * sum(record["completion_tokens"] for record in log)
    return round(config.group_size * (prompts + completions))


def phenomena_of(folder: Path, preset: str, seed: int) -> dict:
    """All that one seed shows."""
    main, rounds = ended_run(folder / "main"), PLANS[preset][3]
    once, online = (json.loads((folder / f"main/rejection_sampling_{n}.json").read_text()) for n in (1, rounds))
    config, longer = finished_run(folder / "main"), finished_run(folder / "longer")
    return {
        "seed": seed,
        **main,
        "tokens": {
            "GRPO": tokens_of(config, main["log"]),
            "longer": (longer.pretrain_steps - config.pretrain_steps) * config.pretrain_tokens,
            "rejection sampling": once["tokens"],
            "online rejection sampling": online["tokens"],
        },
        "longer": ended_run(folder / "longer")["base"],
        "rejection sampling": once["model"],
        "online rejection sampling": online["model"],
        "measured": json.loads((folder / "main/measured.json").read_text()),
        **{name: ended_run(folder / name) for name in ("dr_grpo", "language", "language_reward")},
    }


def lever_of(folder: Path) -> dict:
    """What a lever did in one seed: in the middle, at the end, and what it cost."""
    run, config = ended_run(folder), finished_run(folder)
    log = run["log"]
    looks = {record["step"]: record["held_out_accuracy"] for record in log if "held_out_accuracy" in record}
    refilled = "rounds" in log[0]  # then its groups without signal are not in the log
    return {
        "held out, step 20": looks.get(20),
        "pass@1": run["r1_zero"]["pass@1"],
        "beyond": run["r1_zero"]["beyond"][str(config.max_level + 1)],
        "completion_tokens": run["r1_zero"]["completion_tokens"],
        "base_kl": log[-1]["base_kl"],
        "silent": None if refilled else sum(record["no_signal"] for record in log) / len(log),
        "completions": round(config.prompts * config.group_size * sum(record.get("rounds", 1) for record in log)),
    }


def hacked_of(folder: Path) -> dict:
    """What a reward made of one seed, and what diagnose.py says to its log."""
    run = ended_run(folder)
    found = diagnose.diagnose(diagnose.read_run(folder))
    return {
        "reward": diagnose.ends(run["log"], "reward"),
        "accuracy": diagnose.ends(run["log"], "accuracy"),
        "pass@1": run["r1_zero"]["pass@1"],
        "completion_tokens": run["r1_zero"]["completion_tokens"],
        "diagnose": [check.name for check, _, healthy in found if not healthy],
        "log": [{name: record[name] for name in DRAWN if name in record} for record in run["log"]],
    }


def several(folder: Path, named: dict[str, Lever], read: Callable[[Path], dict]) -> list[dict]:
    """What each lever did, seed by seed."""
    return [
        {"name": name, **vars(lever), "seeds": [read(folder / f"seed{seed}" / name) for seed in range(LEVER_SEEDS)]}
        for name, lever in named.items()
    ]


def write_results(folder: Path, preset: str, results: Path, quick: bool) -> None:
    """The results of all that was done, as JSON."""
    seeds, device = PLANS[preset][0], finished_run(folder / "seed0/main").device
    found = {
        "phenomena": {
            "spread": f"{seeds} seeds, a base model each",
            "seeds": [phenomena_of(folder / f"seed{seed}", preset, seed) for seed in range(seeds)],
        }
    }
    if not quick:
        spread = {"spread": f"{LEVER_SEEDS} seeds of GRPO, from one base model; 200 held-out problems"}
        found["levers"] = spread | {"levers": several(folder / "levers", LEVERS, lever_of)}
        found["hacked"] = spread | {"rewards": several(folder / "levers", HACKED, hacked_of)}
    made_with = {
        "command": f"python experiments/study.py --preset {preset}",
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else collect.processor(),
        "torch": version("torch"),
    }
    results.mkdir(exist_ok=True)
    for name, each in found.items():
        (results / f"{name}.json").write_text(json.dumps(made_with | each) + "\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PLANS, default="cpu", help="of the runs [cpu]")
    parser.add_argument("--quick", action="store_true", help="the phenomena alone")
    parser.add_argument("--lanes", type=int, help="jobs at a time [cpu: one for each core, 8 at most; gpu: 5]")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder of the runs [out/study]")
    flags = parser.parse_args(arguments)
    seeds, *_, lanes = PLANS[flags.preset]
    lanes = lanes if flags.lanes is None else flags.lanes
    if lanes < 1:
        parser.error("--lanes must be at least 1")
    plot.check_picture(parser, "study.py", RESULTS / "learning.png")
    folder = flags.out.absolute() / flags.preset
    jobs = [job for seed in range(seeds) for job in phenomena(folder / f"seed{seed}", flags.preset, seed)]
    do(jobs if flags.quick else jobs + levers(folder / "levers", flags.preset, jobs[0]), lanes)

    results = RESULTS if flags.preset == "cpu" else RESULTS / flags.preset
    write_results(folder, flags.preset, results, flags.quick)
    report.main(results)
    plot.draw_results(results)
    if flags.preset == "cpu":
        collect.main(["cpu", *(str(folder / f"seed{seed}/main") for seed in range(seeds))])
        names = ("language", "language_reward")
        collect.main(["language", *(str(folder / f"seed{seed}" / name) for seed in range(seeds) for name in names)])


if __name__ == "__main__":
    main(sys.argv[1:])
