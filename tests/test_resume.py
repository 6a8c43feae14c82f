"""Runs that are stopped, damaged, copied and shared: they go on to the same bits, or say in one line why not."""

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from experiments import kill
from experiments.kill import FLAGS, outcome
from model import load_model, load_tensors, save_model
from tests.small import small_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*FLAGS, f"--out={folder}"])
    assert outcome(folder)["base.pt"] != outcome(folder)["r1_zero.pt"], "GRPO has changed nothing, so it shows nothing"
    return folder


@contextlib.contextmanager
def signal_after(updates, number, monkeypatch, times=1):
    """Send the signal to this very process in the middle of a step: after so many updates of the weights."""
    honest, done = train.optimizer_step, []

    def optimizer_step(*args):
        norm = honest(*args)
        done.append(norm)
        if len(done) == updates:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", optimizer_step)
        yield


def stopped(arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 130


@pytest.fixture(scope="module")
def stopped_in_grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch, signal_after(305, signal.SIGTERM, monkeypatch):
        stopped([*FLAGS, f"--out={folder}"])
    return folder


@pytest.fixture
def broken_off(stopped_in_grpo, tmp_path):
    """A copy of a run that was stopped in its third step of GRPO."""
    return shutil.copytree(stopped_in_grpo, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ to the bit


@pytest.mark.parametrize("updates", [[1], [50], [7, 13, 5, 270], [300, 1, 1, 1], [302, 3, 4]])
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_never_was(updates, whole, tmp_path, monkeypatch, capsys):
    """In pretraining, between two lines of the log and on one; in GRPO, once and again; with a reference that moves."""
    folder = tmp_path / "run"
    arguments = [*FLAGS, f"--out={folder}"]
    for count, number in zip(updates, [signal.SIGINT, signal.SIGTERM] * 2):
        with signal_after(count, number, monkeypatch):
            stopped(arguments)
        shown = capsys.readouterr().err
        assert f"To go on: python train.py --resume {folder}\n" in shown
        assert load_model(folder / "last.pt").config == load_model(whole / "last.pt").config
        arguments = ["--resume", str(folder)]
    train.main(arguments)
    assert outcome(folder) == outcome(whole)


def test_saving_more_often_changes_nothing_nor_does_deterministic_on_a_cpu(whole, tmp_path):
    train.main([*FLAGS, "--save_every=0", "--deterministic", f"--out={tmp_path / 'run'}"])
    assert outcome(tmp_path / "run") == outcome(whole)


STOP_AFTER = """
import sys, train
honest, left = train.Run.end_step, int(sys.argv[1])
def end_step(run):
    global left
    left -= 1
    run.stop_asked = left == 0
    honest(run)
train.Run.end_step = end_step
train.main(sys.argv[2:])
"""


def test_a_compiled_run_that_was_stopped_ends_as_one_that_never_was(tmp_path):
    """In processes of their own, as the kernels compiled for the first step after resuming must round as before; with
    two threads, which in the compiled gradient of the embedding add in any order but for deterministic algorithms."""

    def run(steps, *arguments):
        command = [sys.executable, "-c", STOP_AFTER, str(steps), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode

    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(0, *FLAGS, "--compile", "--threads=2", f"--out={once}") == 0
    assert run(33, *FLAGS, "--compile", "--threads=2", f"--out={twice}") == 130
    assert run(270, f"--resume={twice}") == 130, "after three steps of GRPO"
    assert run(0, f"--resume={twice}") == 0
    assert outcome(once) == outcome(twice)


# ---------------------------------------------------------------------------------------------------- nothing lost


def test_a_second_signal_leaves_at_once_and_the_last_save_is_whole(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with signal_after(304, signal.SIGINT, monkeypatch, times=2):
        stopped([*FLAGS, f"--out={folder}"])
    assert "step 0 of grpo is saved" in capsys.readouterr().err, "in the middle of step 2, with no save since it began"
    train.main(["--resume", str(folder)])
    assert outcome(folder) == outcome(whole)


def test_a_signal_during_evaluation_leaves_at_once_and_loses_nothing(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for evaluations in (1, 1):  # the base model's, then, after resuming, the other's
        with monkeypatch.context() as patch:
            calls, honest = [], train.evaluate

            def evaluate(*args, calls=calls, honest=honest, evaluations=evaluations):
                calls.append(args)
                if len(calls) == evaluations:
                    os.kill(os.getpid(), signal.SIGTERM)
                return honest(*args)

            patch.setattr(train, "evaluate", evaluate)
            stopped(["--resume", str(folder)] if folder.exists() else [*FLAGS, f"--out={folder}"])
    train.main(["--resume", str(folder)])
    assert outcome(folder) == outcome(whole)


def test_lines_after_the_last_save_are_cut_off_and_come_again_once(broken_off, whole):
    with (broken_off / "log.jsonl").open("a") as log:
        log.write('{"phase": "grpo", "step": 4, "reward": 9}\n{"phase": "grp')
    train.main(["--resume", str(broken_off)])
    assert outcome(broken_off) == outcome(whole)


def test_a_file_that_was_being_written_does_no_harm(broken_off, whole):
    (broken_off / "last.pt.partial").write_bytes((broken_off / "last.pt").read_bytes()[:1000])
    train.main(["--resume", str(broken_off)])
    assert outcome(broken_off) == outcome(whole)


def test_a_run_that_was_moved_goes_on_where_it_is(broken_off, whole, tmp_path):
    broken_off.rename(tmp_path / "moved")
    train.main(["--resume", str(tmp_path / "moved")])
    assert outcome(tmp_path / "moved") == outcome(whole)
    assert not broken_off.exists()


def test_kills_a_full_disk_a_folder_gone_and_a_file_in_its_place_lose_nothing(capsys):
    """The short form of experiments/kill.py, which compares every run with one that was left alone."""
    kill.main(["--kills=4"])
    shown = capsys.readouterr().out
    assert "4 kills survived, 0 bytes lost" in shown
    for trouble, reason, step in (
        ("full disk", "File too large", "0"),
        ("folder moved away", "No such file or directory", r"\d+"),
        ("file in its place", "Not a directory", r"\d+"),
    ):
        line = rf"{trouble}: train.py: \w+ cannot be written \({reason}\). step {step} of pretrain is saved. To go on, "
        assert re.search(line + r"once it can: python train.py --resume \w+\n", shown), trouble


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(tmp_path):
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); import sys, train; "
    command = [sys.executable, "-c", script + "train.main(sys.argv[1:])", *FLAGS, f"--out={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: --out {tmp_path / 'run'} cannot be written (File too large)\n"
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- refused, in one line


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_folders_that_are_no_runs_to_resume_are_refused(whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("precious")
    before = contents(whole)
    for folder, complaint in (
        (tmp_path / "nowhere", "it holds no config.json"),
        (tmp_path / "empty", "it holds no config.json"),
        (tmp_path / "file", "it holds no config.json"),
        (whole, "has ended: what came of it is in result.json"),
    ):
        assert complaint in refusal(["--resume", str(folder)], capsys)
    assert "leave --lr out" in refusal(["--resume", str(whole), "--lr", "1"], capsys)
    assert "--device abacus cannot be used" in refusal(["--resume", str(whole), "--device", "abacus"], capsys)
    assert contents(whole) == before


def test_a_run_in_use_is_not_resumed(broken_off, capsys):
    other = train.Run(train.parse_config(["--resume", str(broken_off)])[0], small_model(), "grpo")
    other.open()
    assert "is being written by another process" in refusal(["--resume", str(broken_off)], capsys)
    other.close()


class Trap:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return print, ("this must never be printed",)


def in_last(change):
    """Damage that changes what last.pt holds, and not its form."""

    def damage(folder):
        saved = load_tensors(folder / "last.pt")
        change(saved)
        torch.save(saved, folder / "last.pt")

    return damage


NAN_MOMENT = in_last(lambda saved: saved["optimizer"][0]["exp_avg"].fill_(math.nan))
DAMAGE = {
    "no last.pt": (lambda run: (run / "last.pt").unlink(), "last.pt: there is no such file"),
    "last.pt empty": (lambda run: (run / "last.pt").write_bytes(b""), "last.pt: damaged"),
    "last.pt truncated": (lambda run: os.truncate(run / "last.pt", 9000), "last.pt: damaged"),
    "a model for last.pt": (lambda run: save_model(run / "last.pt", small_model()), "not what a run with this"),
    "code": (in_last(lambda saved: saved.update(phase=Trap())), "and so might run code"),
    "NaN weights": (in_last(lambda saved: saved["weights"]["norm.weight"].fill_(math.nan)), "NaN or infinite"),
    "weights of another shape": (
        in_last(lambda saved: saved["weights"].update({"norm.weight": torch.ones(3)})),
        "holds no model that fits together",
    ),
    "another vocabulary": (in_last(lambda saved: saved["config"].update(vocabulary="x")), "learned other words"),
    "NaN in the optimizer": (NAN_MOMENT, "is NaN or infinite"),
    "another shape in the optimizer": (
        in_last(lambda saved: saved["optimizer"][0].update(exp_avg=torch.ones(2, 2))),
        "has another shape",
    ),
    "half an optimizer": (in_last(lambda saved: saved["optimizer"].popitem()), "not that of all weights"),
    "no reference": (in_last(lambda saved: saved.update(reference=None)), "not what a run with this"),
    "no base.pt": (lambda run: (run / "base.pt").unlink(), "base.pt: there is no such file"),
    "no phase": (in_last(lambda saved: saved.pop("phase")), "not what a run with this"),
    "a log cut short": (lambda run: os.truncate(run / "log.jsonl", 10), "has lost lines: 10 bytes"),
    "no config.json": (lambda run: (run / "config.json").unlink(), "holds no config.json"),
    "config.json torn": (lambda run: os.truncate(run / "config.json", 40), "config.json cannot be read"),
    "config.json a list": (lambda run: (run / "config.json").write_text("[1]"), "config.json cannot be read"),
    "config.json with junk": (lambda run: (run / "config.json").write_text('{"steps": "x"}'), "invalid int value: 'x'"),
    "another grpo.py": (lambda run: (run / "grpo.py").write_text("x = 1"), "cp grpo.py"),
    "no tokenizer.py": (lambda run: (run / "data/tokenizer.py").unlink(), "cp data/tokenizer.py"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_with_damaged_or_foreign_files_is_refused_in_one_line_and_left_as_it_is(name, broken_off, capsys):
    damage, complaint = DAMAGE[name]
    capsys.readouterr()
    damage(broken_off)
    before = contents(broken_off)
    assert complaint in refusal(["--resume", str(broken_off)], capsys)
    assert contents(broken_off) == before


def test_another_version_of_torch_is_said(broken_off, capsys):
    in_last(lambda saved: saved.update(made_by="torch 1.0 on cpu (ABACUS)"))(broken_off)
    train.main(["--resume", str(broken_off)])
    assert "saved by torch 1.0 on cpu (ABACUS), and this is torch" in capsys.readouterr().out
