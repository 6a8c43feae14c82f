"""All that this repository wants to know of a GPU, by one command on a machine that has one.

    python -m experiments.machine.on_gpu --minutes 9   # again, until it says that all has run
    python -m experiments.machine.on_gpu --table       # the results as a table of machine/README.md

The pieces run in the order of PIECES. When the time is up, the command stops by itself, and the
same command goes on: runs of train.py were saved, tests and benchmarks start again. A piece that
has ended leaves its result in experiments/results/gpu, and is not run again. A piece that failed
says why, and the others go on. After a change of the code, use another --out and --results.

To try the command itself without a GPU, name a device and small sizes. What needs a GPU then fails:

    python -m experiments.machine.on_gpu --device cpu --out out/try --results out/try/results \\
        --train "--preset tiny --pretrain_steps 100 --steps 4" --bench "--shape cpu --rows 32"
"""

import argparse
import itertools
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.machine import bench, kill
from experiments.study import collect
from experiments.study.collect import ROOT, cell
from experiments.watch.plot import read_log
from kit.evaluate import share
from kit.flags import command_line
from model import load_tensors
from train import PRESETS, Config

RESULTS = collect.RESULTS / "gpu"
SEEDS = (0, 1, 2)
GRACE = 30  # seconds that a stopped process has to save


# ---------------------------------------------------------------------------- commands and pieces


@dataclass(frozen=True)
class Command:
    """The arguments of python, and the file that is there when the command has ended."""

    arguments: list[str]
    makes: Path

    def start(self) -> subprocess.Popen:
        """Start the command, or resume the run that it began. Its output goes to a text file."""
        folder, arguments = self.makes.parent, self.arguments
        if (folder / "last.pt").exists():
            arguments = ["train.py", f"--resume={folder}"]
        with self.text.open("a") as text:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdout=text,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this program alone, which stops them all
            )

    @property
    def text(self) -> Path:
        place = self.makes.parent if self.makes.name == "result.json" else self.makes
        return place.with_suffix(".txt")

    def last_words(self) -> str:
        """The last line that the command printed."""
        return self.text.read_text().strip().rpartition("\n")[2]


@dataclass(frozen=True)
class Piece:
    """Commands that run side by side, what they found, and how the table says it."""

    name: str
    what: str
    commands: Callable[[argparse.Namespace], list[Command]]
    read: Callable[[Path], dict]  # given the folder --out; ValueError where there is no result
    say: Callable[[dict], str]


def run_of(flags: argparse.Namespace, name: str, *more: str) -> Command:
    """A run of the gpu preset in a folder of this name."""
    folder = flags.out / name
    settings = ["--preset=gpu", *flags.train.split(), f"--device={flags.device}"]
    return Command(["train.py", *settings, *more, f"--out={folder}"], folder / "result.json")


def runs_from_seed_0(names: list[str], *more: str) -> Callable[[argparse.Namespace], list[Command]]:
    """Runs of GRPO with the seed, and from the base model, of the run "seed0"."""

    def commands(flags: argparse.Namespace) -> list[Command]:
        init = f"--init={flags.out / 'seed0' / 'base.pt'}"
        return [run_of(flags, name, "--seed=0", init, *more) for name in names]

    return commands


def bench_of(name: str, *settings: str) -> Callable[[argparse.Namespace], list[Command]]:
    """A command of bench.py, which alone decides what is timed."""

    def commands(flags: argparse.Namespace) -> list[Command]:
        makes = flags.out / f"{name}.json"
        where = [f"--device={flags.device}", f"--results={makes}"]
        program = ["-m", "experiments.machine.bench", *settings]
        return [Command([*program, *flags.bench.split(), *where], makes)]

    return commands


def cuda_tests(flags: argparse.Namespace) -> list[Command]:
    makes = flags.out / "tests.xml"
    tests = ["tests/test_captured.py", "-k", "on_a_gpu", f"--junitxml={makes}"]
    return [Command(["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", *tests], makes)]


# ------------------------------------------------------------------------- what a command found

BRIEF = ("pass@1", "pass@8", "greedy", "format", "completion_tokens", "by_level")
CURVE = ("step", "reward", "held_out_accuracy", "completion_tokens", "entropy", "logp_gap")
OF_TOKENS = ("reward", "accuracy", "format", "completion_tokens", "cut", "no_signal")


def read_tests(folder: Path) -> dict:
    suite = xml.parse(folder / "tests.xml").getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    if counts["tests"] == counts["skipped"]:
        raise ValueError("no test ran: each was skipped")
    return counts


def read_run(folder: Path) -> dict:
    """The two evaluations of a run, its seconds and its curve."""
    result = json.loads((folder / "result.json").read_text())
    stages = {stage: {name: result[stage][name] for name in BRIEF} for stage in ("base", "r1_zero")}
    curve = [{name: line[name] for name in CURVE if name in line} for line in read_log(folder)]
    made_by = load_tensors(folder / "last.pt")["made_by"]
    return {"made_by": made_by, "seconds": result["seconds"], **stages, "curve": curve}


def read_seeds(folder: Path) -> dict:
    return {"runs": [read_run(folder / f"seed{seed}") for seed in SEEDS]}


def read_beside_alone(name: str, folder: Path) -> dict:
    """A run beside the run "alone", which has its seed and its base model."""
    names = ("alone", name)
    one, other = (read_run(folder / each) for each in names)
    return {name: other, "alone": one, "equal_steps": equal_steps(*(folder / x for x in names))}


def read_bfloat16(folder: Path) -> dict:
    found = read_beside_alone("bfloat16", folder)
    if not (made_by := found["bfloat16"]["made_by"]).endswith("in bfloat16"):
        raise ValueError(f"the run was not in bfloat16: {made_by}")
    return found


def equal_steps(one: Path, other: Path) -> int:
    """The number of steps, from the first, whose rollouts agree in all that follows from tokens."""
    pairs = zip(read_log(one), read_log(other))
    same = (all(a[name] == b[name] for name in OF_TOKENS) for a, b in pairs)
    return len(list(itertools.takewhile(bool, same)))


def read_twice(folder: Path) -> dict:
    """The files in which the two deterministic runs differ."""
    one, other = (kill.outcome(folder / f"deterministic{i}") for i in (1, 2))
    run = read_run(folder / "deterministic1")
    return {"differ": [name for name in one if one[name] != other[name]], "run": run}


def read_bench(name: str, folder: Path) -> dict:
    (row,) = json.loads((folder / f"{name}.json").read_text())
    return row


# -------------------------------------------------------------------------- what the table says


def say_tests(counts: dict) -> str:
    bad = counts["failures"] + counts["errors"]
    return f"{counts['tests'] - counts['skipped'] - bad} passed, {bad} failed"


def say_seeds(found: dict) -> str:
    before, after = (
        cell([run[stage]["pass@1"] for run in found["runs"]]) for stage in ("base", "r1_zero")
    )
    each = ", ".join(f"{run['seconds']['total']:.0f}" for run in found["runs"])
    return f"pass@1 {before} -> {after}; {each} s"


def say_run(run: dict) -> str:
    return f"pass@1 {share(run['r1_zero']['pass@1'])}; GRPO {run['seconds']['r1_zero']:.0f} s"


def say_beside_alone(name: str, found: dict) -> str:
    steps = f"the same tokens in the first {found['equal_steps']} of {len(found[name]['curve'])}"
    return f"{say_run(found[name])}; {steps} steps"


def say_twice(found: dict) -> str:
    differ = ", ".join(found["differ"])
    return f"{say_run(found['run'])}; {f'differ in {differ}' if differ else 'equal to the bit'}"


def say_bench(row: dict) -> str:
    _, _, ours, share, peers = bench.cells(row)
    alone = f"{ours}; products and copies alone: {share}"
    return alone if peers == "-" else f"{alone}; times as fast as {peers}"


PRESET = Config(**PRESETS["gpu"])
OF_PRESET = f"--shape gpu --rows {PRESET.prompts * PRESET.group_size} --tokens 240"
OF_PRESET += f" --dtype {PRESET.dtype}"
PIECES = [
    Piece("tests", "`pytest --noconftest -k on_a_gpu`", cuda_tests, read_tests, say_tests),
    Piece(
        "seeds",
        "`--preset gpu`, three seeds side by side",
        lambda flags: [run_of(flags, f"seed{seed}", f"--seed={seed}") for seed in SEEDS],
        read_seeds,
        say_seeds,
    ),
    Piece(
        "alone",
        "GRPO of seed 0 again, alone",
        runs_from_seed_0(["alone"]),
        lambda folder: read_run(folder / "alone"),
        say_run,
    ),
    Piece(
        "graphs",
        "the same with `--cuda_graphs`",
        runs_from_seed_0(["graphs"], "--cuda_graphs"),
        partial(read_beside_alone, "graphs"),
        partial(say_beside_alone, "graphs"),
    ),
    *(
        Piece(name, what, bench_of(name, *settings.split()), partial(read_bench, name), say_bench)
        for name, what, settings in (
            ("sampler", "the sampler, the preset's shape and rows", f"sample {OF_PRESET}"),
            (
                "step",
                "a GRPO step, the preset's shape and rows",
                f"step {OF_PRESET} --micro_batch {PRESET.micro_batch}",
            ),
            (
                "large_sampler",
                "the sampler, 10M weights, 4,096 rows, bfloat16",
                "sample --shape 10M --rows 4096 --tokens 240 --repeat 2",
            ),
        )
    ),
    Piece(
        "bfloat16",
        "GRPO of seed 0 with `--dtype bfloat16`",
        runs_from_seed_0(["bfloat16"], "--dtype=bfloat16"),
        read_bfloat16,
        partial(say_beside_alone, "bfloat16"),
    ),
    Piece(
        "deterministic",
        "GRPO of seed 0 with `--deterministic`, twice side by side",
        runs_from_seed_0(["deterministic1", "deterministic2"], "--deterministic"),
        read_twice,
        say_twice,
    ),
]


def table(results: Path) -> str:
    """A row for each piece, in Markdown."""
    rows = []
    for piece in PIECES:
        path = results / f"{piece.name}.json"
        found = json.loads(path.read_text()) if path.exists() else None
        made = found["made_with"] if found else {}
        on = f"{made['hardware']}, torch {made['torch']}" if found else "-"
        rows.append([piece.what, piece.say(found["result"]) if found else "not run", on])
    lines = [["what", "result", "on"], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ------------------------------------------------------------------------------------- the command


def work(commands: list[Command], until: float) -> bool:
    """Run the commands that have not ended, side by side. Returns False if the time was up before
    their end: then they are stopped."""
    processes = [command.start() for command in commands if not command.makes.exists()]
    try:
        for process in processes:
            process.wait(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    finally:
        for process in processes:
            process.terminate()  # a run of train.py ends its step and saves
        for process in processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return True


def result_of(piece: Piece, commands: list[Command], folder: Path) -> dict:
    """What the ended commands of a piece found. Raises ValueError, in one line, if one failed."""
    for command in commands:
        if not command.makes.exists():
            raise ValueError(f"{command.last_words()} ({command.text})")
    return piece.read(folder)


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="time after which it stops by itself [9]")
    add("--device", default="cuda", help="a torch device [cuda]")
    add("--out", type=Path, default=Path("out/on_gpu"), help="folder of the runs [out/on_gpu]")
    add("--results", type=Path, default=RESULTS, help="folder of the results [results/gpu]")
    add("--train", default="", help="more flags for each run of train.py, as one argument")
    add("--bench", default="", help="more flags for each run of bench.py, as one argument")
    add("--table", action="store_true", help="run nothing, write the table into its page")
    flags = parser.parse_args(arguments)
    flags.out, flags.results = flags.out.absolute(), flags.results.absolute()
    if flags.table:
        text = table(flags.results)
        collect.write_into_page("gpu: made by experiments/machine/on_gpu.py --table", text)
        return print(text)
    if flags.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the command itself")

    torch.set_num_threads(1)  # as each command does; the name of the hardware counts them
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, stops the commands
    until, failed = time.monotonic() + 60 * flags.minutes, []
    for folder in (flags.out, flags.results):
        folder.mkdir(parents=True, exist_ok=True)
    for piece in PIECES:
        path, commands = flags.results / f"{piece.name}.json", piece.commands(flags)
        if path.exists():
            print(f"{piece.name}: has a result")
            continue
        started = time.monotonic()
        if not work(commands, until):
            print(f"{piece.name}: the time is up; the same command goes on")
            break
        try:
            result = result_of(piece, commands, flags.out)
        except ValueError as error:
            failed.append(piece.name)
            print(f"{piece.name}: failed: {error}", flush=True)
            continue
        made_with = bench.made_with(bench.Machine(flags.device, torch.float32))
        lines = [" ".join(["python", *command.arguments]) for command in commands]
        written = {"commands": lines, "made_with": made_with, "result": result}
        path.write_text(json.dumps(written, indent=1) + "\n")
        took = time.monotonic() - started
        print(f"{piece.name}: {piece.say(result)} (ended after {took:.0f} s)", flush=True)
    else:
        print("all has run" + (f", but these failed: {', '.join(failed)}" if failed else ""))
    print(table(flags.results))


if __name__ == "__main__":
    main(sys.argv[1:])
