"""Make everything that the README claims of R1-Zero in miniature: runs, controls, measurements,
tables, pictures.

    python -m experiments.study.study            # phenomena, levers, the hacked reward
    python -m experiments.study.study --quick    # the phenomena alone

Needs matplotlib. Stop it at any time, and start it again by the same command: it skips finished
jobs and resumes stopped runs. After a change of the code, use another --out. The results go to
experiments/results and into its page.
"""

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

from data import get_tokenizer
from experiments.study import collect, pictures, report
from experiments.study.collect import RESULTS, ROOT
from experiments.study.measure import finished_run
from experiments.watch import diagnose
from experiments.watch.plot import check_picture, read_log
from kit.flags import command_line
from train import Config, problems_of

WHOLE = f"--eval_problems {report.WHOLE} --eval_samples {report.SAMPLES}"
FEWER = f"--eval_problems {report.FEWER}"  # for runs of which there are many
PLAIN = f"--task chains --pretrain_steps 5000 --steps 80 --prompts 64 {WHOLE}"  # of all runs
LANGUAGES = "--task chains-en-ko --min_level 2 --max_level 4 --pretrain_steps 8000"
LONGER = 8000  # pretraining steps of the control that gets the tokens of GRPO too
ROUNDS = 80  # of online rejection sampling
SEEDS = 3
LANES = min(8, os.cpu_count() or 1)  # jobs at a time
BAR = "{desc} {n_fmt} of {total_fmt} jobs |{bar:20}| {elapsed}{postfix}"


@dataclass(frozen=True)
class Lever:
    """A change of one setting, and its name in the table."""

    label: str
    flags: str = ""
    variation: str = ""  # a name in variations.py, for what no flag can change


LEVERS = {
    "default": Lever("as it is"),
    "mean_only": Lever("advantages: less the mean, not over the deviation", "", "mean_only"),
    "dr_grpo": Lever("the same, and no output's length divides it (Dr. GRPO)", "--variant dr_grpo"),
    "clip_higher": Lever("clip higher", "--clip_high 0.28"),
    "kl_r1": Lever("KL, as heavy as R1's", "--beta 0.001"),
    "kl": Lever("KL, heavy", "--beta 0.05"),
    "kl_refreshed": Lever(
        "the same, a new reference every 20 steps", "--beta 0.05 --reference_every 20"
    ),
    "group_4": Lever("G = 4", "--group_size 4 --prompts 128"),
    "group_16": Lever("G = 16", "--group_size 16 --prompts 32"),
    "group_32": Lever("G = 32", "--group_size 32 --prompts 16"),
    "group_64": Lever("G = 64", "--group_size 64 --prompts 8"),
    "one_update": Lever("one update a rollout in place of 4", "--minibatches 1"),
    "mu_2": Lever("mu = 2", "--inner_epochs 2"),
    "mu_4": Lever("mu = 4", "--inner_epochs 4"),
    "colder": Lever("temperature 0.7", "--temperature 0.7"),
    "hotter": Lever("temperature 1.25", "--temperature 1.25"),
    "accuracy_alone": Lever("accuracy : format = 1 : 0", "--rewards accuracy=1"),
    "dynamic": Lever("dynamic sampling", "", "dynamic_sampling"),
    "dynamic_short": Lever(
        "dynamic sampling, about as many completions", "--steps 35", "dynamic_sampling"
    ),
}
HACKED = {
    "default": Lever("accuracy and format"),
    "paid_by_step": Lever("and half a point for each step", "", "paid_by_step"),
    "paid_by_right_step": Lever(
        "and half a point for each step that leads to a right answer", "", "paid_by_right_step"
    ),
}


# -------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A command to run."""

    folder: Path
    name: str
    command: Callable[[], list[str]]  # the arguments of python, when the job starts or resumes
    makes: Path  # the file that exists when the job is done
    needs: tuple["Job", ...]  # the jobs that must be done before
    minutes: float  # about, on the machine behind the README's numbers


def run_job(
    folder: Path,
    name: str,
    flags: str,
    variation: str = "",
    needs: tuple = (),
    minutes: float = 1.3,
) -> Job:
    """A job that runs train.py, or a variation of it, in folder/name."""
    run = folder / name
    program = ["-m", "experiments.study.variations", variation] if variation else ["train.py"]

    def command() -> list[str]:
        if (run / "last.pt").exists():
            return [*program, "--resume", str(run)]
        return [*program, *flags.split(), "--out", str(run)]

    return Job(folder, name, command, run / "result.json", needs, minutes)


def phenomena(folder: Path, seed: int) -> list[Job]:
    """The runs and measurements of one seed. They share one base model, except that the runs in two
    languages share another."""
    plain = f"{PLAIN} --seed {seed}"
    main = run_job(folder, "main", plain, minutes=3.3)
    base, bilingual = f"--init {folder}/main/base.pt", f"{plain} {LANGUAGES} {FEWER}"
    flags = f"{bilingual} --rewards accuracy=1,format=1,language=0"  # weight 0: only logged
    language = run_job(folder, "language", flags, minutes=3.7)
    rewarded = f"--rewards accuracy=1,format=1,language=1 --init {folder}/language/base.pt"

    def measurement(name: str, module: str, minutes: float, *flags: str) -> Job:
        run, program = folder / "main", ["-m", f"experiments.study.{module}"]
        command = [*program, str(run), *flags]
        return Job(folder, name, lambda: command, run / f"{name}.json", (main,), minutes)

    longer = f"{plain} {FEWER} --pretrain_steps {LONGER} --steps 1"
    rejection = "rejection_sampling"
    return [
        main,
        language,
        run_job(folder, "longer", longer, minutes=3.0),
        run_job(folder, "language_reward", f"{bilingual} {rewarded}", needs=(language,)),
        run_job(folder, "dr_grpo", f"{plain} {FEWER} {base} --variant dr_grpo", needs=(main,)),
        measurement("measured", "measure", 2.0),
        measurement(f"{rejection}_1", rejection, 1.5),
        measurement(f"{rejection}_{ROUNDS}", rejection, 1.5, f"--rounds={ROUNDS}"),
    ]


def levers(folder: Path, base: Job) -> list[Job]:
    """The runs of each lever and each reward, with several seeds, from one base model."""
    common = f"{PLAIN} {FEWER} --init {base.makes.parent}/base.pt"
    return [
        run_job(
            folder / f"seed{seed}",
            name,
            f"{common} --seed {seed} {lever.flags}",
            lever.variation,
            needs=(base,),
        )
        for seed in range(SEEDS)
        for name, lever in (LEVERS | HACKED).items()
    ]


def do(jobs: list[Job], lanes: int) -> None:
    """Run the jobs that are not done yet, `lanes` at a time. The output of a job goes to a file of
    its name.

    If a job fails, the program waits for the jobs that are running, and ends with the name of the
    file. SIGINT and SIGTERM stop all jobs, and each run of train.py saves first.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    waiting = [job for job in jobs if not job.makes.exists()]
    count = {"total": len(jobs), "initial": len(jobs) - len(waiting)}
    bar = tqdm(**count, desc="study", dynamic_ncols=True, bar_format=BAR)
    done, started = 0.0, time.perf_counter()  # done: the estimated minutes of finished jobs
    running, processes, stopping = {}, set(), threading.Event()
    with ThreadPoolExecutor(lanes) as pool, bar:
        try:
            while waiting or running:
                for job in list(waiting):
                    ready = all(need.makes.exists() for need in job.needs)
                    if ready and len(running) < lanes:
                        waiting.remove(job)
                        running[pool.submit(start, job, processes, stopping)] = job
                took = (time.perf_counter() - started) / 60
                pace = took / done if done else 1 / lanes  # real minutes per estimated minute
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
    """Run a job to its end, in a thread. Returns its exit status, or 1 if the study is stopping."""
    if stopping.is_set():
        return 1
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / f"{job.name}.txt").open("w") as printed:
        options = {"cwd": ROOT, "stdout": printed, "stderr": subprocess.STDOUT}
        options["start_new_session"] = True  # Ctrl-C reaches the study alone, which stops the job
        process = subprocess.Popen([sys.executable, *job.command()], **options)
        processes.add(process)
        code = process.wait()
        processes.discard(process)
        return code


# ----------------------------------------------------------------------------------------- results

KEPT = ("step", "reward", "accuracy", "completion_tokens", "right_tokens", "wrong_tokens")
KEPT += ("entropy", "no_signal", "rounds")
KEPT += ("held_out_accuracy", "base_kl", "language_ko", "accuracy_ko")
DRAWN = ("step", "reward", "held_out_accuracy")  # fields in the picture of the hacked reward


def ended_run(folder: Path) -> dict:
    """The two evaluations of a run, and its log with the fields in KEPT."""
    result = json.loads((folder / "result.json").read_text())
    log = [
        {name: float(f"{record[name]:.4g}") for name in KEPT if name in record}
        for record in read_log(folder)
    ]
    return {"base": result["base"], "r1_zero": result["r1_zero"], "log": log}


def tokens_of(config: Config, log: list[dict]) -> int:
    """The tokens that a run of GRPO sampled and read: all completions, each with its prompt."""
    tokenizer, prompts = get_tokenizer(config.task), 0
    for step in range(config.steps):
        for problem in problems_of(config, step):
            prompts += len(tokenizer.encode(problem.prompt))
    completions = config.prompts * sum(record["completion_tokens"] for record in log)
    return round(config.group_size * (prompts + completions))


def phenomena_of(folder: Path, seed: int) -> dict:
    """All results of one seed."""
    main = ended_run(folder / "main")
    once, online, measured = (
        json.loads((folder / "main" / f"{name}.json").read_text())
        for name in ("rejection_sampling_1", f"rejection_sampling_{ROUNDS}", "measured")
    )
    config, longer = finished_run(folder / "main"), finished_run(folder / "longer")
    added_steps = longer.pretrain_steps - config.pretrain_steps
    return {
        "seed": seed,
        **main,
        "tokens": {
            "GRPO": tokens_of(config, main["log"]),
            "longer": added_steps * config.pretrain_tokens,
            "rejection sampling": once["tokens"],
            "online rejection sampling": online["tokens"],
        },
        "longer": ended_run(folder / "longer")["base"],
        "rejection sampling": once["model"],
        "online rejection sampling": online["model"],
        "measured": measured,
        **{name: ended_run(folder / name) for name in ("dr_grpo", "language", "language_reward")},
    }


def lever_of(folder: Path) -> dict:
    """The numbers of a lever's run: at step 20, at the end, and its cost in completions."""
    run, config = ended_run(folder), finished_run(folder)
    log, ended = run["log"], run["r1_zero"]
    looks = {each["step"]: each["held_out_accuracy"] for each in log if "held_out_accuracy" in each}
    refilled = "rounds" in log[0]  # dynamic sampling: the log counts no replaced silent group
    rollouts = sum(record.get("rounds", 1) for record in log)
    return {
        "held out, step 20": looks.get(20),
        "pass@1": ended["pass@1"],
        "beyond": ended["beyond"][str(config.levels[-1] + 1)],
        "completion_tokens": ended["completion_tokens"],
        "base_kl": log[-1]["base_kl"],
        "silent": None if refilled else sum(record["no_signal"] for record in log) / len(log),
        "completions": round(config.prompts * config.group_size * rollouts),
    }


def complaints_of(folder: Path) -> list[str]:
    """The names of what diagnose.py finds unhealthy in a run."""
    found = diagnose.diagnose(diagnose.read_run(folder))
    return [check.name for check, _, healthy in found if not healthy]


def hacked_of(folder: Path) -> dict:
    """The numbers of a run with one of the rewards, and the complaints of diagnose.py."""
    run = ended_run(folder)
    return {
        "reward": diagnose.ends(run["log"], "reward"),
        "accuracy": diagnose.ends(run["log"], "accuracy"),
        "pass@1": run["r1_zero"]["pass@1"],
        "completion_tokens": run["r1_zero"]["completion_tokens"],
        "diagnose": complaints_of(folder),
        "log": [{name: record[name] for name in DRAWN if name in record} for record in run["log"]],
    }


def several(folder: Path, named: dict[str, Lever], read: Callable[[Path], dict]) -> list[dict]:
    """The numbers of each lever, for each seed."""
    seeds = [folder / f"seed{seed}" for seed in range(SEEDS)]
    return [
        {"name": name, **vars(lever), "seeds": [read(seed / name) for seed in seeds]}
        for name, lever in named.items()
    ]


def write_results(folder: Path, results: Path, quick: bool) -> None:
    """Write the results of the finished jobs as JSON files."""
    device = finished_run(folder / "seed0/main").device
    found = {
        "phenomena": {
            "spread": f"{SEEDS} seeds, a base model each",
            "seeds": [phenomena_of(folder / f"seed{seed}", seed) for seed in range(SEEDS)],
        }
    }
    if not quick:
        spread = f"{SEEDS} seeds of GRPO, from one base model; 200 held-out problems"
        for name, part, named, read in (
            ("levers", "levers", LEVERS, lever_of),
            ("hacked", "rewards", HACKED, hacked_of),
        ):
            found[name] = {"spread": spread, part: several(folder / "levers", named, read)}
    on_gpu = device.startswith("cuda")
    made_with = {
        "command": "python -m experiments.study.study",
        "hardware": torch.cuda.get_device_name(device) if on_gpu else collect.processor(),
        "torch": version("torch"),
    }
    results.mkdir(exist_ok=True)
    for name, each in found.items():
        (results / f"{name}.json").write_text(json.dumps(made_with | each) + "\n")


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="the phenomena alone")
    add("--lanes", type=int, default=LANES, help="jobs at a time [one for each core, 8 at most]")
    add("--out", type=Path, default=Path("out/study"), help="folder of the runs [out/study]")
    flags = parser.parse_args(arguments)
    if flags.lanes < 1:
        parser.error("--lanes must be at least 1")
    check_picture(parser, "study.py", RESULTS / "learning.png")
    folder = flags.out.absolute()
    seeds = [folder / f"seed{seed}" for seed in range(SEEDS)]
    jobs = [job for seed, each in enumerate(seeds) for job in phenomena(each, seed)]
    do(jobs if flags.quick else jobs + levers(folder / "levers", jobs[0]), flags.lanes)

    write_results(folder, RESULTS, flags.quick)
    report.main(RESULTS)
    pictures.draw_results(RESULTS)
    names = ("language", "language_reward")
    collect.main(["language", *(str(seed / name) for seed in seeds for name in names)])


if __name__ == "__main__":
    main(sys.argv[1:])
