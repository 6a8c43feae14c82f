"""Runs that are stopped, damaged, copied and shared: they go on to the same bits, or say in one line why not."""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from experiments import kill
from experiments.kill import log_without_times, outcome
from model import load_model, load_tensors, save_model
from tests.small import small_model

ROOT = Path(__file__).parent.parent
FLAGS = [*kill.FLAGS, "--steps=10"]


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
    assert stop.value.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


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


@pytest.mark.parametrize("updates", [[1], [50], [7, 13, 5, 270], [300, 1, 1, 1], [300, 2, 3, 4]])
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_never_was(updates, whole, tmp_path, monkeypatch, capsys):
    """In pretraining, between two lines of the log and on one; in GRPO, once and again; with a reference that moves."""
    folder = tmp_path / "run"
    arguments, done, step = [*FLAGS, f"--out={folder}"], 0, 0
    for count, number in zip(updates, [signal.SIGINT, signal.SIGTERM] * 2):
        with signal_after(count, number, monkeypatch):
            stopped(arguments)
        shown, at = capsys.readouterr().err, load_tensors(folder / "last.pt")
        assert f"step {at['step']} of {at['phase']} is saved. To go on: python train.py --resume {folder}\n" in shown
        done += count
        step += done > 300 and (count + 1) // 2  # two updates each; a step that a signal comes in is ended first
        assert (at["phase"], at["step"]) == (("pretrain", done) if done <= 300 else ("grpo", step))
        assert load_model(folder / "last.pt").config == load_model(whole / "last.pt").config
        arguments = ["--resume", str(folder)]
    train.main(arguments)
    assert outcome(folder) == outcome(whole)


def test_saving_more_often_changes_nothing_nor_does_deterministic_on_a_cpu(whole, tmp_path):
    train.main([*FLAGS, "--save_every=0", "--deterministic", f"--out={tmp_path / 'run'}"])
    assert outcome(tmp_path / "run") == outcome(whole)


STOP_AFTER = """
import signal, sys, train
honest, left = train.Run.end_step, int(sys.argv[1])
def end_step(run):
    global left
    left -= 1
    run.stop_asked = signal.SIGINT if left == 0 else False
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
    for evaluations in (1, 2):  # the base model's; then, after resuming, the other's
        with monkeypatch.context() as patch:
            calls, honest = [], train.evaluate

            def evaluate(*args, calls=calls, honest=honest, evaluations=evaluations):
                calls.append(args)
                if len(calls) == evaluations:
                    os.kill(os.getpid(), signal.SIGTERM)
                return honest(*args)

            patch.setattr(train, "evaluate", evaluate)
            stopped(["--resume", str(folder)] if folder.exists() else [*FLAGS, f"--out={folder}"])
        assert (load_tensors(folder / "last.pt")["base"] is None) == (evaluations == 1)
    assert (folder / "r1_zero.pt").exists()
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


def test_the_printed_command_goes_on_from_another_folder_and_with_a_space_in_its_name(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = [sys.executable, str(ROOT / "train.py")]
    run = subprocess.Popen([*script, *FLAGS, "--out=a run"], stderr=subprocess.PIPE, text=True)
    while not (Path("a run").exists() and Path("a run/log.jsonl").stat().st_size):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == 130
    python, *command = shlex.split(said.strip().partition("To go on: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    assert outcome(tmp_path / "a run") == outcome(whole)


def test_every_setting_comes_back_also_those_of_0(tmp_path, monkeypatch):
    """0 is not False, nor is it the default."""
    flags = ["--accuracy_weight=0", "--clip_low=0", "--clip_high=0", "--save_every=0", "--seed=5", "--beta=0"]
    with signal_after(3, signal.SIGINT, monkeypatch):
        stopped([*FLAGS, *flags, "--reference_every=0", f"--out={tmp_path / 'run'}"])
    began, _ = train.parse_config([*FLAGS, *flags, "--reference_every=0", f"--out={tmp_path / 'run'}"])
    found, _ = train.parse_config(["--resume", str(tmp_path / "run")])
    assert replace(found, resume="") == began
    assert (began.accuracy_weight, began.clip_low, began.save_every) == (0, 0, 0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"at step \d+: weight_norm is .*last.pt is from before"):
        train.main([*FLAGS, "--pretrain_lr=1e30", "--save_every=0", f"--out={folder}"])
    load_model(folder / "last.pt")


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


def limited(bytes_a_file, *arguments):
    """A run in a process of its own that can write no file larger than this, as if the disk were full."""
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_a_file}, {bytes_a_file})); "
    command = [sys.executable, "-c", script + "import sys, train; train.main(sys.argv[1:])", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_disk_that_is_full_for_the_log_alone_stops_the_run_in_one_line(tmp_path):
    folder, flags = tmp_path / "run", ["--prompts=1", "--group_size=2", "--minibatches=1", "--max_new_tokens=2"]
    flags += ["--pretrain_steps=60", "--steps=400", "--eval_every=1000", "--beta=0", "--reference_every=0"]
    done = limited(150_000, *FLAGS, *flags, f"--out={folder}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{folder} cannot be written (File too large). step 0 of grpo is saved." in done.stderr
    train.main(["--resume", str(folder)])
    assert len(log_without_times(folder)) == 402


def test_a_run_whose_output_nobody_reads_any_more_is_stopped_by_a_signal_and_saved(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *FLAGS, "--pretrain_steps=3000", f"--out={folder}"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (folder.exists() and (folder / "log.jsonl").stat().st_size):
        assert run.poll() is None
    run.stderr.close()
    run.terminate()
    run.stdout.read()
    assert run.wait() != 0
    assert load_tensors(folder / "last.pt")["step"] >= 50


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(tmp_path):
    done = limited(9000, *FLAGS, f"--out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"train.py: error: --out {tmp_path / 'run'} cannot be made (File too large): name another folder\n"
    )
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
        (tmp_path / "nowhere", "last.pt: there is no such file"),
        (tmp_path / "empty", "last.pt: there is no such file"),
        (tmp_path / "file", "last.pt: there is no such file"),
        (whole, "has ended: what came of it is in result.json"),
    ):
        assert complaint in refusal(["--resume", str(folder)], capsys)
    assert "there is no such file" in refusal(["--resume", ""], capsys)
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


def moments(change):
    return in_last(lambda saved: change(saved["optimizer"][0]))


def set_to(**values):
    return in_last(lambda saved: saved.update(values))


def with_link(run):
    (run / "log.jsonl").rename(run.parent / "thesis")
    (run / "log.jsonl").symlink_to(run.parent / "thesis")


DAMAGE = {
    "no last.pt": (lambda run: (run / "last.pt").unlink(), "last.pt: there is no such file"),
    "last.pt empty": (lambda run: (run / "last.pt").write_bytes(b""), "last.pt: damaged"),
    "last.pt truncated": (lambda run: os.truncate(run / "last.pt", 9000), "last.pt: damaged"),
    "a model for last.pt": (lambda run: save_model(run / "last.pt", small_model()), "not what a run saves"),
    "code": (set_to(phase=Trap()), "and so might run code"),
    "NaN weights": (in_last(lambda saved: saved["weights"]["norm.weight"].fill_(math.nan)), "NaN or infinite"),
    "weights of another shape": (
        in_last(lambda saved: saved["weights"].update({"norm.weight": torch.ones(3)})),
        "holds no model that fits together",
    ),
    "a model of another shape": (in_last(lambda saved: saved["settings"].update(d_ff=48)), "a model of another d_ff"),
    "another vocabulary": (in_last(lambda saved: saved["config"].update(vocabulary="x")), "learned other words"),
    "NaN in the optimizer": (moments(lambda of: of["exp_avg"].fill_(math.nan)), "NaN or infinite"),
    "a number for a matrix": (moments(lambda of: of.update(exp_avg=torch.tensor(0.0))), "not that of these weights"),
    "another shape": (moments(lambda of: of.update(exp_avg=torch.ones(2, 2))), "not that of these weights"),
    "a moment short": (moments(lambda of: of.pop("exp_avg_sq")), "not that of these weights"),
    "half an optimizer": (in_last(lambda saved: saved["optimizer"].popitem()), "not that of these weights"),
    "no reference": (set_to(reference=None), "not what a run saves"),
    "a NaN reference": (in_last(lambda saved: saved["reference"]["norm.weight"].fill_(math.nan)), "NaN or infinite"),
    "no phase": (in_last(lambda saved: saved.pop("phase")), "not what a run saves"),
    "another phase": (set_to(phase="evil"), "not what a run saves ('evil')"),
    "a step that is none": (set_to(step=1.5), "step is 1.5"),
    "a step too far": (set_to(step=999), "step is 999"),
    "a length that is none": (set_to(log_bytes=-5), "log_bytes is -5"),
    "no times": (set_to(seconds=None), "not what a run saves"),
    "an empty evaluation": (set_to(base={}), "not what a run saves ('pass@1')"),
    "no settings": (in_last(lambda saved: saved.pop("settings")), "not what a run saves"),
    "a setting unknown": (in_last(lambda saved: saved["settings"].update(help=True)), "not what a run saves"),
    "a setting of another type": (in_last(lambda saved: saved["settings"].update(steps="x")), "steps is 'x'"),
    "a bad setting": (in_last(lambda saved: saved["settings"].update(steps=0)), "--steps must be at least 1"),
    "no base.pt": (lambda run: (run / "base.pt").unlink(), "base.pt: there is no such file"),
    "no log": (lambda run: (run / "log.jsonl").unlink(), "No such file or directory"),
    "a log cut short": (lambda run: os.truncate(run / "log.jsonl", 10), "has lost lines, or was changed"),
    "a log changed": (lambda run: (run / "log.jsonl").write_text("x" * 99_999), "has lost lines, or was changed"),
    "a folder for the log": (lambda run: (run / "log.jsonl").unlink() or (run / "log.jsonl").mkdir(), "Is a directory"),
    "a link": (with_link, "log.jsonl is a link"),
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
