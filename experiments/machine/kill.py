"""Harm runs, resume them, and compare the results bit by bit with a run that was left alone.

    python -m experiments.machine.kill               # 100 kills: about twelve minutes
    python -m experiments.machine.kill --kills 5

The harm is a kill at a random moment, a full disk, a folder that is moved away, and a file put in
its place. The model is very small. Harmed runs save after each step, so many kills interrupt the
writing of a file. The run that is left alone never saves in the middle of a stage.
"""

import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from kit.flags import command_line
from kit.run import ROOT
from model import load_model, load_tensors

FLAGS = [  # just enough pretraining that GRPO has something to reward
    *("--preset=tiny", "--pretrain_steps=300", "--pretrain_lr=1e-2", "--steps=60", "--prompts=8"),
    *("--group_size=4", "--max_new_tokens=24", "--minibatches=2", "--beta=0.05"),
    *("--reference_every=4", "--eval_every=4", "--eval_problems=64"),
    *("--n_layer=1", "--n_head=2", "--n_kv_head=1", "--d_model=16", "--d_ff=24"),
]
STAGES = ("base", "r1_zero")


def log_without_times(folder: Path) -> list[dict]:
    """The lines of a run's log, without the fields of seconds. Raises ValueError for a torn
    line."""
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: x for name, x in record.items() if "seconds" not in name} for record in records]


def outcome(folder: Path) -> dict[str, str]:
    """A hash of each file that a finished run leaves, without times."""
    found = {}
    for stage in STAGES:
        weights = load_model(folder / f"{stage}.pt").state_dict().values()
        found[f"{stage}.pt"] = b"".join(weight.numpy().tobytes() for weight in weights)
    last = load_tensors(folder / "last.pt")  # json below raises if a stage's tensors are left in it
    result = json.loads((folder / "result.json").read_text())
    for name, data in (
        ("last.pt", {key: last[key] for key in ("ended", "results", "stopped")}),
        ("log.jsonl", log_without_times(folder)),
        ("result.json", {stage: result[stage] for stage in STAGES}),
    ):
        found[name] = json.dumps(data).encode()
    for name in ("looks.jsonl", "samples.txt"):
        found[name] = (folder / name).read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def start(
    folder: Path, *, save_every: int = 0, largest_file: int = resource.RLIM_INFINITY
) -> subprocess.Popen:
    """Start the run of a folder, or resume it if it has begun."""
    begun = (folder / "last.pt").exists()
    arguments = [f"--resume={folder}"] if begun else [*FLAGS, f"--out={folder}"]
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"SAVE_EVERY": str(save_every)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)),
    )


def finish(folder: Path, **settings: int) -> dict[str, str]:
    """Let the run of a folder come to its end; returns its outcome."""
    run = start(folder, **settings)
    _, said = run.communicate()
    assert run.returncode == 0, f"the run in {folder} ended with status {run.returncode}: {said}"
    return outcome(folder)


def wait_for(condition: Callable[[], bool], run: subprocess.Popen, seconds: float) -> None:
    """Wait until the condition holds, the run has ended or the time is up."""
    until = time.monotonic() + seconds
    while not condition() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.0002)


def progress(saved: dict) -> tuple[int, int, int]:
    """How far a run had come when it saved: tuples of later saves are greater."""
    return len(saved["ended"]), saved["stopped"].get("step", 0), len(saved["results"])


def kill_at_random(rng: random.Random, folder: Path) -> str | None:
    """Kill the run of a folder with SIGKILL at a random moment, and check the files it left.
    Returns where the kill fell, or None if the run had ended before."""
    last, partial = folder / "last.pt", folder / "last.pt.partial"
    before = load_tensors(last) if last.exists() else None
    written = last.stat().st_mtime_ns if before else 0
    run = start(folder)
    if rng.random() < 0.1:  # perhaps before its first save
        wait_for(lambda: False, run, rng.uniform(0, 3))
    else:
        wait_for(lambda: last.exists() and last.stat().st_mtime_ns != written, run, 60)
        wait_for(lambda: False, run, rng.uniform(0, 1))
        if rng.random() < 0.5:  # while last.pt is being written
            wait_for(partial.exists, run, 1)
    run.kill()
    _, said = run.communicate()
    if run.returncode != -signal.SIGKILL:
        assert run.returncode == 0, f"status {run.returncode} without a kill: {said}"
        return None
    if not last.exists():
        assert not folder.exists(), f"{folder} exists, without a last.pt"
        return "before its folder was there"
    saved = load_tensors(last)  # raises ValueError if a bit is wrong
    for name, kept in saved["kept"].items():
        lost = kept - (folder / name).stat().st_size
        assert lost <= 0, f"{name} has lost {lost} bytes"
    assert not before or progress(saved) >= progress(before), "last.pt has gone back in time"
    ended, _, results = progress(saved)
    evaluating = ended > results or ended == len(STAGES)
    where = "in an evaluation" if evaluating else f"in {STAGES[ended]}"
    return f"{where}, while last.pt was being written" if partial.exists() else where


def kill_many(kills: int, rng: random.Random, folders: Path, expected: dict) -> Counter:
    """Kill and resume runs until there were so many kills, and compare each outcome. Returns how
    many kills fell where."""
    fell = Counter()
    bar = tqdm(total=kills, desc="kill", unit="kill", disable=None)
    for number in itertools.count():
        folder = folders / f"killed {number}"
        ended = folder / "result.json"
        while not ended.exists() and fell.total() < kills:
            if where := kill_at_random(rng, folder):
                fell[where] += 1
                bar.update()
        compare(outcome(folder) if ended.exists() else finish(folder), expected)
        if fell.total() == kills:
            return fell


def compare(found: dict, expected: dict) -> None:
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, f"these differ from the run left alone: {', '.join(differing)}"


def full_disk(folder: Path, expected: dict) -> str:
    """Simulate a full disk by a limit on the size of files, which binds root too. The first save
    that holds the optimizer meets the limit."""
    limit = 2 * (folder.parent / "whole" / "base.pt").stat().st_size
    said = last_words(start(folder, largest_file=limit))
    assert not (folder / "last.pt.partial").exists(), "the partial file still takes room"
    compare(finish(folder), expected)
    return said


def folder_moved_away(folder: Path, expected: dict) -> str:
    return moved_away(folder, expected, put_in_its_place="")


def file_in_its_place(folder: Path, expected: dict) -> str:
    said = moved_away(folder, expected, put_in_its_place="precious")
    assert folder.read_text() == "precious"
    return said


def moved_away(folder: Path, expected: dict, put_in_its_place: str) -> str:
    run, away = start(folder), folder.with_name(f"{folder.name} away")
    log = folder / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 0, run, 60)
    folder.rename(away)
    if put_in_its_place:
        folder.write_text(put_in_its_place)
    said = last_words(run)
    compare(finish(away), expected)
    return said


def last_words(run: subprocess.Popen) -> str:
    """The last line of a run that cannot go on. It must be its only line, with status 1."""
    _, said = run.communicate()
    assert run.returncode == 1 and said.count("\n") == 1, f"status {run.returncode}: {said}"
    return said.strip()


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills, at least 1 [100]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills [0]")
    args = parser.parse_args(arguments)
    if args.kills < 1:
        parser.error(f"--kills must be at least 1, not {args.kills}")
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name)
        expected = finish(folders / "whole", save_every=3600)
        assert expected["base.pt"] != expected["r1_zero.pt"], (
            "GRPO changed no weight, so the comparison would show nothing"
        )
        for harm in (full_disk, folder_moved_away, file_in_its_place):
            said = harm(folders / harm.__name__, expected)
            print(f"{harm.__name__.replace('_', ' ')}: {said}".replace(f"{name}/", ""))
        fell = kill_many(args.kills, random.Random(args.seed), folders, expected)
    print(f"{fell.total()} kills survived, 0 bytes lost:")
    for where, count in fell.most_common():
        print(f"{count:6} {where}")
    print("each run came to the outcome of the run left alone:")
    for file, digest in expected.items():
        print(f"  {file:12} {digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
