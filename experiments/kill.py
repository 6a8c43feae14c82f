"""Do to a run what life does to runs: kill it at random moments, fill its disk, move its folder away, put a file in its
place. Each time it must go on to the very bits of a run that was left alone.

    python experiments/kill.py               # 100 kills: about ten minutes
    python experiments/kill.py --kills 5

It trains a very small model, and saves after each step, so that many kills fall into the writing of a file.
"""

import argparse
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

from model import load_model, load_tensors

FLAGS = [  # just enough pretraining that GRPO has something to reward
    "--preset=tiny", "--pretrain_steps=300", "--pretrain_lr=1e-2", "--steps=60", "--prompts=8", "--group_size=4",
    "--max_new_tokens=24", "--minibatches=2", "--beta=0.05", "--reference_every=4", "--eval_every=4",
    "--eval_problems=64", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--d_model=16", "--d_ff=24",
]  # fmt: skip
MODELS = ("base.pt", "r1_zero.pt", "last.pt")


def weights_hash(path: Path) -> str:
    """One number for all bits of the weights in a file."""
    weights = load_model(path).state_dict().values()
    return hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()


def log_without_times(folder: Path) -> list[dict]:
    """The lines of a run's log, but for what a clock put there; none may be torn."""
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in records]


def outcome(folder: Path) -> dict:
    """All that a run comes to, but for times: hashes of its models and of what it wrote down."""
    result = json.loads((folder / "result.json").read_text())
    texts = {
        "log.jsonl": json.dumps(log_without_times(folder)),
        "result.json": json.dumps([result["base"], result["r1_zero"]]),
        "samples.txt": (folder / "samples.txt").read_text(),
    }
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {name: weights_hash(folder / name) for name in MODELS} | hashes


def start(folder: Path, *flags: str, largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """Begin the run in a folder, or go on with it."""
    begun = (folder / "last.pt").exists()
    arguments = [f"--resume={folder}"] if begun else [*FLAGS, *flags, f"--out={folder}"]
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # what it prints tells when it is at work
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)),
    )


def finish(folder: Path, *flags: str) -> dict:
    """Let the run in a folder come to its end."""
    run = start(folder, *flags)
    _, said = run.communicate()
    if run.returncode:
        raise AssertionError(f"the run in {folder} ended with status {run.returncode}: {said}")
    return outcome(folder)


def wait_for(condition: Callable[[], bool], run: subprocess.Popen, seconds: float) -> None:
    """Look again and again until the condition holds, the run has ended or the time is up."""
    until = time.monotonic() + seconds
    while not condition() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.0002)


def kill_at_random(rng: random.Random, folder: Path) -> str | None:
    """Kill the run in a folder with SIGKILL at a random moment, and check what it left. Returns where it was killed, or
    None where it came to its end before."""
    last, partial = folder / "last.pt", folder / "last.pt.partial"
    before = load_tensors(last) if last.exists() else None
    written = last.stat().st_mtime_ns if before else 0
    run = start(folder, "--save_every=0")
    if rng.random() < 0.1:  # before it has come further
        wait_for(lambda: False, run, rng.uniform(0, 3))
    else:
        wait_for(lambda: last.exists() and last.stat().st_mtime_ns != written, run, 60)
        wait_for(lambda: False, run, rng.uniform(0, 1))
        if rng.random() < 0.5:
            wait_for(partial.exists, run, 1)
    run.kill()
    _, said = run.communicate()
    if run.returncode != -signal.SIGKILL:
        assert run.returncode == 0, f"a run that was not killed ended with status {run.returncode}: {said}"
        return None
    if not last.exists():
        assert not folder.exists(), "a folder without last.pt"
        return "before its folder was there"
    saved = load_tensors(last)  # raises ValueError if a bit of it is wrong
    lost = saved["log_bytes"] - (folder / "log.jsonl").stat().st_size
    assert lost <= 0, f"the log has lost {lost} bytes"
    order = ("pretrain", "grpo")
    if before:
        went_back = (order.index(saved["phase"]), saved["step"]) < (order.index(before["phase"]), before["step"])
        assert not went_back, "last.pt is older than before"
    evaluating = saved["phase"] == "grpo" and (not saved["base"] or (folder / "r1_zero.pt").exists())
    where = "in an evaluation" if evaluating else f"in {saved['phase']}"
    return f"{where}, while last.pt was being written" if partial.exists() else where


def kill_many(kills: int, rng: random.Random, folders: Path, expected: dict) -> Counter:
    """As many runs as it takes, each killed over and over until it ends all the same; where the kills fell."""
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
    assert not differing, f"not what a run that was left alone came to: {', '.join(differing)}"


def full_disk(folder: Path, expected: dict) -> str:
    """A limit on the size of files stands for the disk: like a full one, it holds for root too. It is met when the
    optimizer is first saved."""
    limit = 2 * (folder.parent / "whole" / "base.pt").stat().st_size
    said = last_words(start(folder, "--save_every=0", largest_file=limit))
    assert not (folder / "last.pt.partial").exists(), "half a file still takes room"
    compare(finish(folder), expected)
    return said


def folder_moved_away(folder: Path, expected: dict) -> str:
    return moved_away(folder, expected, put_in_its_place="")


def file_in_its_place(folder: Path, expected: dict) -> str:
    said = moved_away(folder, expected, put_in_its_place="precious")
    assert folder.read_text() == "precious"
    return said


def moved_away(folder: Path, expected: dict, put_in_its_place: str) -> str:
    run, away = start(folder, "--save_every=0"), folder.with_name(f"{folder.name} away")
    while not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    folder.rename(away)
    if put_in_its_place:
        folder.write_text(put_in_its_place)
    said = last_words(run)
    compare(finish(away), expected)
    return said


def last_words(run: subprocess.Popen) -> str:
    """The one line that a run must end with when it cannot go on."""
    _, said = run.communicate()
    assert run.returncode == 1 and said.count("\n") == 1, f"status {run.returncode}: {said}"
    return said.strip()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how often [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name)
        expected = finish(folders / "whole")
        assert expected["base.pt"] != expected["r1_zero.pt"], "GRPO has changed nothing, so it shows nothing"
        for harm in (full_disk, folder_moved_away, file_in_its_place):
            said = harm(folders / harm.__name__, expected)
            print(f"{harm.__name__.replace('_', ' ')}: {said}".replace(f"{name}/", ""))
        fell = kill_many(args.kills, random.Random(args.seed), folders, expected)
    print(f"{fell.total()} kills survived, 0 bytes lost:")
    for where, count in fell.most_common():
        print(f"{count:6} {where}")
    print("and each run came to the same as the one that was left alone:")
    for file, digest in expected.items():
        print(f"  {file:12} {digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
