"""Runs that are stopped, damaged, copied and shared: they go on to the same bits, or say in one
line why not."""

import contextlib
import hashlib
import io
import json
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
from typing import ClassVar

import pytest
import torch
from torch import nn
from tqdm import tqdm

import kit.run
import train
from experiments.machine import kill
from experiments.machine.kill import log_without_times, outcome
from kit import flags
from kit.run import Lines, fit, open_run
from model import load_model, load_tensors, save_model, save_tensors
from tests.small import small_model

ROOT = Path(__file__).parent.parent
FLAGS = [*kill.FLAGS, "--steps=10"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*FLAGS, f"--out={folder}"])
    found = outcome(folder)
    assert found["base.pt"] != found["r1_zero.pt"], "GRPO has changed nothing: it shows nothing"
    return folder


def weights_hash(path):
    weights = load_model(path).state_dict()
    content = b"".join(name.encode() + weights[name].numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def signal_after(updates, number, monkeypatch, times=1):
    """Send the signal to this very process in the middle of a step: after so many updates."""
    honest, done = torch.optim.AdamW.step, []

    def step(optimizer, *args, **kwargs):
        honest(optimizer, *args, **kwargs)
        done.append(1)
        if len(done) == updates:
            for _ in range(times):
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        yield


def stopped(arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped_in_grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch, signal_after(305, signal.SIGTERM, patch):
        stopped([*FLAGS, f"--out={folder}"])
    return folder


@pytest.fixture
def broken_off(stopped_in_grpo, tmp_path):
    """A copy of a run that was stopped in its third step of GRPO."""
    return shutil.copytree(stopped_in_grpo, tmp_path / "run")


# --------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize(
    "updates", [[1], [50], [7, 13, 5, 270], [300, 1, 1, 1], [300, 2, 3, 4]], ids=str
)
def test_a_stopped_run_ends_as_one_that_never_was(updates, whole, tmp_path, monkeypatch, capsys):
    """In pretraining, between two lines of the log and on one; in GRPO, once and again; with a
    reference that moves."""
    folder = tmp_path / "run"
    arguments, done, step = [*FLAGS, f"--out={folder}"], 0, 0
    for count, number in zip(updates, [signal.SIGINT, signal.SIGTERM] * 2):
        with signal_after(count, number, monkeypatch):
            stopped(arguments)
        shown, at = capsys.readouterr().err, load_tensors(folder / "last.pt")["stopped"]
        saved = f"step {at['step']} of {at['stage']} is saved."
        assert f"{saved} To go on: python train.py --resume={folder}\n" in shown
        done += count
        step += done > 300 and (count + 1) // 2  # two updates each; the step is ended first
        assert (at["stage"], at["step"]) == (("base", done) if done <= 300 else ("r1_zero", step))
        arguments = ["--resume", str(folder)]
    train.main(arguments)
    assert outcome(folder) == outcome(whole)


def test_saving_at_each_step_changes_nothing(whole, tmp_path, monkeypatch):
    """Nor does --deterministic on a CPU."""
    monkeypatch.setattr(kit.run, "SAVE_EVERY", 0)
    train.main([*FLAGS, "--deterministic", f"--out={tmp_path / 'run'}"])
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_run_from_a_base_model_needs_it_only_once(whole, tmp_path, monkeypatch):
    """It lies in the folder as base.pt: a resumed run never looks for --init's again."""
    shutil.copy(whole / "base.pt", tmp_path / "base.pt")
    folder = tmp_path / "run"
    with signal_after(3, signal.SIGINT, monkeypatch):
        stopped([*FLAGS, f"--init={tmp_path / 'base.pt'}", f"--out={folder}"])
    (tmp_path / "base.pt").unlink()
    train.main(["--resume", str(folder)])
    assert weights_hash(folder / "base.pt") == weights_hash(whole / "base.pt")
    assert weights_hash(folder / "r1_zero.pt") == weights_hash(whole / "r1_zero.pt")


# ---------------------------------------------------------------------------------- what a stage is


def test_a_run_stopped_before_base_pt_is_written_has_its_base_all_the_same(
    whole, tmp_path, monkeypatch
):
    """A full disk at the first moment: --init's model is read again, and no random one taken."""

    def full(path, model):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kit.run, "save_model", full)
        with pytest.raises(SystemExit, match="cannot be written"):
            train.main([*FLAGS, f"--init={whole / 'base.pt'}", f"--out={tmp_path / 'run'}"])
    train.main(["--resume", str(tmp_path / "run")])
    assert weights_hash(tmp_path / "run" / "base.pt") == weights_hash(whole / "base.pt")


def config_for(folder, *more):
    arguments = more or [*FLAGS, f"--out={folder}"]
    return flags.parse(train.Config, train.PRESETS, arguments, "", "train.py")


def three_stages(config, stop_at=None):
    """A job of three stages, each with another kind of state; stopped at a step of a stage."""
    with open_run(config, "train.py") as run:
        one, two = small_model(), small_model(1)
        for stage, model, count in (("one", one, 3), ("two", two, 4), ("three", one, 2)):
            optimizer = train.make_optimizer(model)
            sums, other = torch.zeros(2), nn.Linear(2, 2)
            nn.init.ones_(other.weight), nn.init.zeros_(other.bias)
            state = {"optimizer": optimizer, "sums": sums, "other": other, "none": None}
            for step in run.steps(stage, count, model, **state):
                model(torch.tensor([[step, 5, 7]])).logsumexp(-1).sum().backward()
                train.optimizer_step(model, optimizer, 0.01, 1.0)
                sums += step + sums
                with torch.no_grad():
                    other.weight.mul_(2)
                run.log({"sum": sums.sum().item(), "other": other.weight.sum().item()})
                run.look({"step": step + 1, "seen": [stage, step]})
                if (stage, step) == stop_at:
                    os.kill(os.getpid(), signal.SIGINT)
            assert len(run.ended) in (1, 2, 3)
        found = run.once("found", lambda: {"norm": sum(w.sum().item() for w in one.parameters())})
        run.finish({"found": found})


def left(folder):
    logs = [(folder / name).read_text() for name in ("log.jsonl", "looks.jsonl")]
    hashes = [weights_hash(folder / f"{name}.pt") for name in ("one", "two", "three")]
    return logs, hashes, json.loads((folder / "result.json").read_text())["found"]


def test_a_job_of_any_stages_resumes_by_being_called_again(tmp_path):
    """Whatever kind of state a stage names: a model, an optimizer, a tensor, another module."""
    three_stages(config_for(tmp_path / "whole"))
    stops = [("one", 0), ("one", 2), ("two", 1), ("two", 3), ("three", 0)]
    config = config_for(tmp_path / "run")
    for stage, step in stops:
        with pytest.raises(SystemExit) as stop:
            three_stages(config, (stage, step))
        assert stop.value.code == 128 + signal.SIGINT
        config = config_for(tmp_path / "run", f"--resume={tmp_path / 'run'}")
    three_stages(config)
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_frozen_weights_and_other_optimizers_come_back(tmp_path):
    """As of a value head on a trunk that is not trained."""

    def stage(config, stop_at=None):
        with open_run(config, "train.py") as run:
            model, free = small_model(), nn.Parameter(torch.zeros(3))
            model.embedding.weight.requires_grad_(False)
            weights = [*model.parameters(), free]
            adam = torch.optim.AdamW(weights, lr=0.01, amsgrad=True)
            sgd = torch.optim.SGD(model.blocks.parameters(), lr=0.01, momentum=0.9)
            for step in run.steps("one", 4, model, adam=adam, sgd=sgd, free=free):
                loss = (
                    model(torch.tensor([[step, 5]])).logsumexp(-1).sum()
                    + (free - step).square().sum()
                )
                loss.backward()
                for optimizer in (adam, sgd):
                    optimizer.step()
                    optimizer.zero_grad()
                run.log({"free": free.sum().item()})
                if step == stop_at:
                    os.kill(os.getpid(), signal.SIGINT)
            run.finish({"free": free.tolist()})

    stage(config_for(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        stage(config_for(tmp_path / "run"), 1)
    stage(config_for(None, f"--resume={tmp_path / 'run'}"))
    hashes = [weights_hash(tmp_path / name / "one.pt") for name in ("whole", "run")]
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")
    ]
    assert hashes[0] == hashes[1] and results[0]["free"] == results[1]["free"]


def test_a_signal_at_any_moment_of_a_stage_waits_for_a_save(tmp_path, monkeypatch, capsys):
    """Also between two steps, and while the model of the stage is being written."""
    honest = kit.run.save_model

    def save_model_and_interrupt(path, model):
        honest(path, model)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(kit.run, "save_model", save_model_and_interrupt)
    with pytest.raises(SystemExit):
        three_stages(config_for(tmp_path / "run"))
    assert "the end of one is saved" in capsys.readouterr().err
    assert load_tensors(tmp_path / "run" / "last.pt")["ended"] == ["one"]

    class Interrupted(tqdm):
        def __iter__(self):
            for step in super().__iter__():
                if step == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                yield step

    monkeypatch.setattr(kit.run, "save_model", honest)
    monkeypatch.setattr(kit.run, "tqdm", Interrupted)
    with pytest.raises(SystemExit):
        three_stages(config_for(tmp_path / "other"))
    assert "step 3 of one is saved" in capsys.readouterr().err


def test_a_model_that_is_not_finite_ends_no_stage(tmp_path):
    config, model = config_for(tmp_path / "run"), small_model()
    with (
        pytest.raises(SystemExit, match="its model is NaN or infinite"),
        open_run(config, "train.py") as run,
    ):
        for _ in run.steps("one", 1, model):
            model.norm.weight.data.fill_(math.nan)
    assert not (tmp_path / "run" / "one.pt").exists()


def test_a_stages_name_is_used_once_and_results_are_made_between_stages(tmp_path):
    with open_run(config_for(tmp_path / "run"), "train.py") as run:
        list(run.steps("one", 1, small_model()))
        for name in ("one", "last"):
            with pytest.raises(ValueError, match="names two stages, or is the name of last"):
                list(run.steps(name, 1, small_model()))
        for _ in run.steps("two", 1, small_model()):
            with pytest.raises(ValueError, match="'x' is asked for in the middle of a stage"):
                run.once("x", lambda: {"a": 1})
        assert run.once("x", lambda: {"a": 1}) == run.once("x", dict) == {"a": 1}


def test_logs_are_on_disk_before_last_pt_counts_on_them(tmp_path, monkeypatch):
    """After a loss of power it must speak of no line that is not there."""
    honest, synced = os.fsync, []

    def fsync(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(kit.run, "SAVE_EVERY", 0)
    with open_run(config_for(tmp_path / "run"), "train.py") as run:
        for _ in run.steps("one", 2, small_model()):
            run.log({"loss": 1.0})
    saves = [i for i, name in enumerate(synced) if name == "last.pt.partial"]
    assert len(saves) == 4  # its start, two steps, its end
    for i in saves:
        assert sorted(synced[i - 2 : i]) == ["log.jsonl", "looks.jsonl"]


def test_errors_of_the_job_keep_their_traceback_and_ends_say_the_way_on(tmp_path):
    for error, end in (
        (torch.OutOfMemoryError, r"cpu has too little memory: .*--micro_batch.*; step 0 of one is"),
        (
            BrokenPipeError,
            "nobody reads its output any more; step 0 of one is saved. To go on: python train.py",
        ),
        (FileNotFoundError, None),
        (KeyError, None),
    ):
        config = config_for(tmp_path / error.__name__)
        raises = pytest.raises(SystemExit if end else error, match=end)
        with raises, open_run(config, "train.py") as run:
            for _ in run.steps("one", 1, small_model()):
                raise error("no such file")
    config, raises = config_for(tmp_path / "none"), pytest.raises(SystemExit, match=r"any more$")
    with raises, open_run(config, "train.py"):
        raise BrokenPipeError
    assert not (tmp_path / "none").exists()


def test_too_little_memory_of_a_cpu_ends_a_run_in_one_line(tmp_path):
    """Its allocators raise a RuntimeError without a type of its own."""
    asked = (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60))
    for number, ask in enumerate(asked):
        config = config_for(tmp_path / str(number))
        end = pytest.raises(
            SystemExit, match=r"cpu has too little memory: .* step 0 of one is saved"
        )
        with end, open_run(config, "train.py") as run:
            for _ in run.steps("one", 1, small_model()):
                ask()
    with pytest.raises(RuntimeError, match="match"), open_run(config_for(tmp_path / "x"), "x"):
        torch.ones(2) + torch.ones(3)


def test_another_job_does_not_go_on_with_a_run(tmp_path, capsys):
    """A stage of another name, fewer steps, or other state: one line, and nothing is changed."""
    with pytest.raises(SystemExit):
        three_stages(config_for(tmp_path / "run"), ("two", 1))
    before = contents(tmp_path / "run")
    model = small_model()
    capsys.readouterr()
    for stage, count, state, complaint in (
        ("four", 4, {}, "it is in the stage 'two', not 'four'"),
        ("two", 1, {}, "its step is 2"),
        ("once", 0, {}, "'found' is asked for in the middle of a stage"),
        ("two", 4, {}, "its state is model, optimizer, sums, other, not model"),
    ):
        config = config_for(None, f"--resume={tmp_path / 'run'}")
        with pytest.raises(SystemExit) as stop, open_run(config, "train.py") as run:
            list(run.steps("one", 3, model))
            run.once("found", dict) if stage == "once" else None
            list(run.steps(stage, count, model, **state))
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert complaint in said and said.count("\n") == 1
    assert contents(tmp_path / "run") == before


def test_an_error_in_a_stage_is_not_hidden(tmp_path):
    """Who changes the loss needs the traceback."""
    for config in (config_for(tmp_path / "run"), None):
        config = config or config_for(None, f"--resume={tmp_path / 'run'}")
        with (
            pytest.raises(ValueError, match="a mistake of my own"),
            open_run(config, "train.py") as run,
        ):
            for _ in run.steps("one", 3, small_model()):
                raise ValueError("a mistake of my own")


class Seen(tqdm):
    """A progress bar that shows nothing, and remembers what it would have shown."""

    bars: ClassVar = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})
        self.bars.append((self, kwargs, []))

    def set_postfix_str(self, text):
        self.bars[-1][2].append(text)

    def write(self, text):
        self.bars[-1][2].append(text)


def test_the_bar_and_the_log_agree(monkeypatch, tmp_path):
    """Also in a run that goes on."""
    monkeypatch.setattr(kit.run, "tqdm", Seen)
    arguments = [*FLAGS, "--pretrain_steps=70", "--steps=3", "--eval_every=2", "--beta=0"]
    arguments += ["--reference_every=0", f"--out={tmp_path / 'run'}"]
    with signal_after(60, signal.SIGINT, monkeypatch):
        stopped(arguments)
    train.main(["--resume", str(tmp_path / "run")])
    records = log_without_times(tmp_path / "run")
    *_, (bar, settings, shown), (grpo_bar, grpo_settings, grpo_shown) = Seen.bars
    assert (settings["initial"], settings["desc"], bar.n, bar.total) == (60, "base", 70, 70)
    assert shown == [f"loss {records[1]['loss']:.2f}"]
    assert (grpo_settings["initial"], grpo_settings["desc"], grpo_bar.n) == (0, "r1_zero", 3)
    expected = []
    for record in records[2:]:
        numbers = [(short, record[name]) for name, short in train.SHORT.items() if name in record]
        each = [f"{short} {x:.2f}" if x < 10 else f"{short} {x:.1f}" for short, x in numbers]
        expected.append("  ".join(each))
        if "held_out_accuracy" in record:
            expected.append(f"step {record['step']:4}  {'  '.join(each)}")
    asked = [text for text in grpo_shown if " - " in text or " + " in text]
    assert len(asked) == 3 and len({text.split(":")[0] for text in asked}) == 1, "one problem"
    assert [text for text in grpo_shown if text not in asked] == expected
    assert max(len(text) for text in grpo_shown) <= 80, "nothing wraps in a narrow terminal"


# ------------------------------------------------------------------------------------- nothing lost


def test_a_second_signal_leaves_at_once(whole, tmp_path, monkeypatch, capsys):
    """In the middle of step 2, with no save since GRPO began: the last save is whole."""
    folder = tmp_path / "run"
    with signal_after(304, signal.SIGINT, monkeypatch, times=2):
        stopped([*FLAGS, f"--out={folder}"])
    assert "step 0 of r1_zero is saved" in capsys.readouterr().err
    train.main(["--resume", str(folder)])
    assert outcome(folder) == outcome(whole)


def test_a_signal_during_evaluation_leaves_at_once(whole, tmp_path, monkeypatch):
    """And loses nothing: in the base model's evaluation; then, after resuming, in the other's."""
    from kit import evaluate as kit_evaluate

    folder, honest = tmp_path / "run", kit_evaluate.answer_problems
    for results in (0, 1):
        with monkeypatch.context() as patch:

            def answer_problems(*args, results=results, **kwargs):
                due = results == 0 or (folder / "r1_zero.pt").exists()
                if due and len(load_tensors(folder / "last.pt")["results"]) == results:
                    os.kill(os.getpid(), signal.SIGTERM)
                return honest(*args, **kwargs)

            patch.setattr(kit_evaluate, "answer_problems", answer_problems)
            stopped(["--resume", str(folder)] if folder.exists() else [*FLAGS, f"--out={folder}"])
        assert len(load_tensors(folder / "last.pt")["results"]) == results
    assert (folder / "r1_zero.pt").exists()
    train.main(["--resume", str(folder)])
    assert outcome(folder) == outcome(whole)


def test_lines_after_the_last_save_come_again_once(broken_off, whole):
    for name in ("log.jsonl", "looks.jsonl"):
        with (broken_off / name).open("a") as log:
            log.write('{"stage": "r1_zero", "step": 4, "reward": 9}\n' * 9999 + '{"stage": "r1')
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


@pytest.mark.parametrize("name", ["a run", "-dash"])
def test_the_printed_command_goes_on(name, whole, tmp_path, monkeypatch):
    """From another folder; with a space in the name of the repository, and of the run."""
    copy = tmp_path / "a copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "tests"))
    monkeypatch.chdir(tmp_path)
    run = subprocess.Popen(
        [sys.executable, str(copy / "train.py"), *FLAGS, f"--out={name}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (Path(name).exists() and (Path(name) / "log.jsonl").stat().st_size):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == 130
    python, *command = shlex.split(said.strip().partition("To go on: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    assert outcome(tmp_path / name) == outcome(whole)


def test_every_setting_comes_back_also_those_of_0(tmp_path, monkeypatch):
    """0 is not False, nor is it the default."""
    settings = ["--clip_low=0", "--clip_high=0", "--seed=5", "--beta=0", "--reference_every=0"]
    settings += ["--rewards=accuracy=0,format=1"]
    with signal_after(3, signal.SIGINT, monkeypatch):
        stopped([*FLAGS, *settings, f"--out={tmp_path / 'run'}"])
    began = config_for(None, *FLAGS, *settings, f"--out={tmp_path / 'run'}")
    found = config_for(None, "--resume", str(tmp_path / "run"))
    assert replace(found, resume="") == began
    assert (began.clip_low, began.clip_high, began.beta) == (0, 0, 0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(kit.run, "SAVE_EVERY", 0)
    folder = tmp_path / "run"
    message = r"base stopped at step \d+: its model is NaN or infinite; last.pt is from before"
    with pytest.raises(SystemExit, match=message):
        train.main([*FLAGS, "--pretrain_lr=1e30", f"--out={folder}"])
    kept = load_tensors(folder / "last.pt")["stopped"]
    assert not kept or kit.run.finite(kept["state"])


@pytest.mark.slow
def test_kills_and_disks_lose_nothing(capsys):
    """The short form of experiments/machine/kill.py: each run is compared with one left alone."""
    kill.main(["--kills=4"])
    shown = capsys.readouterr().out
    assert "4 kills survived, 0 bytes lost" in shown
    for trouble, reason in (
        ("full disk", "File too large"),
        ("folder moved away", "No such file or directory"),
        ("file in its place", "Not a directory"),
    ):
        line = rf"{trouble}: train.py: \w+ cannot be written \({reason}\); step \d+ of base is "
        line += r"saved. To go on: python train.py --resume=\w+\n"
        assert re.search(line, shown), trouble


def limited(bytes_a_file, *arguments):
    """A run in a process of its own that can write no larger file, as if the disk were full."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_a_file}, {bytes_a_file}))"
    script = f"import resource; {limit}; import sys, train; train.main(sys.argv[1:])"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_disk_that_is_full_for_the_log_alone_stops_the_run(tmp_path):
    """In one line; and the run goes on when there is room."""
    folder, more = tmp_path / "run", ["--prompts=1", "--group_size=2", "--minibatches=1"]
    more += ["--max_new_tokens=2", "--pretrain_steps=60", "--steps=400", "--eval_every=1000"]
    more += ["--beta=0", "--reference_every=0"]
    done = limited(150_000, *FLAGS, *more, f"--out={folder}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{folder} cannot be written (File too large); step " in done.stderr
    before = load_tensors(folder / "last.pt")["seconds"]["base"]
    train.main(["--resume", str(folder)])
    assert len(log_without_times(folder)) == 402
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    assert seconds["base"] == before and seconds["total"] > seconds["r1_zero"] > 0


def test_a_run_whose_output_nobody_reads_is_stopped_and_saved(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *FLAGS, "--pretrain_steps=3000", f"--out={folder}"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (folder.exists() and (folder / "log.jsonl").stat().st_size):
        assert run.poll() is None
    run.stderr.close()
    run.terminate()
    run.stdout.read()
    assert run.wait() != 0
    assert load_tensors(folder / "last.pt")["stopped"]["step"] >= 50


# --------------------------------------------------------------------------- a folder is made whole


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    done = limited(9000, *FLAGS, f"--out={folder}")
    assert done.returncode == 2
    reason = f"--out {folder} cannot be made (File too large): name another folder"
    assert done.stderr == f"train.py: error: {reason}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_never_overwrites_another(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "r1_zero.pt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("run", "file"):
        assert f"{name} exists: name" in refusal(["--out", str(tmp_path / name)], capsys)
    for folder, reason in (
        (tmp_path / "file" / "run", "cannot be made (Not a directory)"),
        (tmp_path / ("x" * 300), "cannot be made (File name too long)"),
        (tmp_path / "nowhere" / "..", "exists: name another folder"),
    ):
        said = refusal([*FLAGS, "--out", str(folder)], capsys, "printed")
        assert reason in said
    assert (tmp_path / "run" / "r1_zero.pt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_nothing_is_removed_that_was_not_made_here(tmp_path, capsys):
    """A folder `run.partial` beside `run` is somebody's thesis, and stays."""
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "thesis").write_text("precious")
    with pytest.raises(SystemExit):
        three_stages(config_for(tmp_path / "run"), ("one", 0))
    assert (tmp_path / "run.partial" / "thesis").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.partial"]


def test_of_two_starts_at_the_same_moment_one_wins(tmp_path, capsys):
    """The other is refused in one line, and its half-made folder is gone."""
    with open_run(config_for(tmp_path / "run"), "train.py") as first:
        with (
            pytest.raises(SystemExit) as stop,
            open_run(config_for(tmp_path / "run"), "train.py") as second,
        ):
            next(first.steps("one", 3, small_model()))
            next(second.steps("one", 3, small_model()))
        assert stop.value.code == 2
        assert f"{tmp_path / 'run'} exists: name another" in capsys.readouterr().err
        first.log({"still": "mine"})
        first.save()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["still"] == "mine"


# ----------------------------------------------------------------------------- refused, in one line


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(arguments, capsys, *printed_before):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == "" or printed_before
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
    arguments = ["--resume", str(whole), "--device", "abacus"]
    assert "--device abacus cannot be used" in refusal(arguments, capsys)
    assert contents(whole) == before


def test_a_run_in_use_is_not_resumed(broken_off, capsys):
    kept = load_tensors(broken_off / "last.pt")["kept"]
    other = Lines(broken_off / "log.jsonl", kept["log.jsonl"])
    said = refusal(["--resume", str(broken_off)], capsys)
    assert "is being written by another process" in said
    other.file.close()


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


def state(change):
    return in_last(lambda saved: change(saved["stopped"]["state"]))


def moments_of(change):
    return state(lambda of: change(of["optimizer"]["moments"]))


def moments(change):
    return moments_of(lambda of: change(of[0]))


def weights(change):
    return state(lambda of: change(of["model"]))


def set_to(**values):
    return in_last(lambda saved: saved.update(values))


def at(**values):
    return in_last(lambda saved: saved["stopped"].update(values))


def with_link(run):
    (run / "log.jsonl").rename(run.parent / "thesis")
    (run / "log.jsonl").symlink_to(run.parent / "thesis")


def with_link_below(run):
    (run / "data/chains.py").unlink()
    (run / "data/chains.py").symlink_to(ROOT / "data/chains.py")


def set_setting(**values):
    return in_last(lambda saved: saved["settings"].update(values))


def change_base(run):
    saved = load_tensors(run / "base.pt")
    saved["config"]["vocabulary"] = "x"
    save_tensors(run / "base.pt", saved)


NOT = "not what a run saves"
DAMAGE = {
    "no last.pt": (lambda run: (run / "last.pt").unlink(), "last.pt: there is no such file"),
    "last.pt empty": (lambda run: (run / "last.pt").write_bytes(b""), "last.pt: damaged"),
    "last.pt truncated": (lambda run: os.truncate(run / "last.pt", 9000), "last.pt: damaged"),
    "a model for last.pt": (lambda run: save_model(run / "last.pt", small_model()), NOT),
    "code": (set_to(stage=Trap()), "and so might run code"),
    "NaN weights": (weights(lambda of: of["norm.weight"].fill_(math.nan)), "NaN or infinite"),
    "weights of another shape": (
        weights(lambda of: of.update({"norm.weight": torch.ones(3)})),
        NOT,
    ),
    "complex weights": (
        weights(lambda of: of.update({"norm.weight": of["norm.weight"] * 1j})),
        "norm.weight is (16, (1,), torch.complex64), not (16, (1,), torch.float32)",
    ),
    "complex moments": (
        moments(lambda of: of.update(exp_avg=of["exp_avg"] * 1j)),
        "not one of these weights",
    ),
    "a weight short": (weights(lambda of: of.pop("norm.weight")), NOT),
    "a model of another shape": (set_setting(d_ff=48), "another shape or vocabulary"),
    "another vocabulary": (change_base, "base.pt: holds a model of another shape or vocabulary"),
    "NaN moments": (moments(lambda of: of["exp_avg"].fill_(math.nan)), "NaN or infinite"),
    "a number": (
        moments(lambda of: of.update(exp_avg=torch.tensor(0.0))),
        "not one of these weights",
    ),
    "a shape": (
        moments(lambda of: of.update(exp_avg=torch.ones(2, 2))),
        "not one of these weights",
    ),
    "a moment short": (moments(lambda of: of.pop("exp_avg_sq")), "optimizer is not whole"),
    "a choice unknown": (set_setting(variant="evil"), "--variant must be one of grpo"),
    "a task unknown": (set_setting(task="evil"), NOT),
    "another's file": (set_to(kept={"../thesis": 0, "log.jsonl": 0}), "it counts on ../thesis"),
    "a link in a folder": (with_link_below, "data/chains.py is a link"),
    "half an optimizer": (moments_of(lambda of: of.popitem()), "optimizer is not whole"),
    "no moments": (moments_of(lambda of: of.clear()), "optimizer is not whole"),
    "no reference": (state(lambda of: of.pop("reference")), "its state is model, optimizer, not"),
    "an empty reference": (state(lambda of: of.update(reference=None)), NOT),
    "a NaN reference": (
        state(lambda of: of["reference"]["norm.weight"].fill_(math.nan)),
        "reference holds numbers that are NaN or infinite",
    ),
    "no stage": (in_last(lambda saved: saved["stopped"].pop("stage")), NOT),
    "another stage": (at(stage="evil"), "it is in the stage 'evil', not 'r1_zero'"),
    "a step that is none": (at(step=1.5), "its step is 1.5"),
    "a step too far": (at(step=999), "its step is 999"),
    "a length that is none": (set_to(kept={"log.jsonl": -5, "looks.jsonl": 0}), "-5 bytes of log"),
    "no times": (set_to(seconds=None), "seconds is None"),
    "no stages": (set_to(ended=7), "ended is 7"),
    "an empty evaluation": (set_to(results={"base": {}}), "the result base is {}"),
    "another program": (set_to(program="-m a.b"), "-m a.b made it, and must go on with it"),
    "no settings": (in_last(lambda saved: saved.pop("settings")), NOT),
    "a setting unknown": (set_setting(help=True), NOT),
    "a setting of another type": (set_setting(steps="x"), "steps is 'x'"),
    "a bad setting": (set_setting(steps=0), "--steps must be from 1"),
    "no base.pt": (lambda run: (run / "base.pt").unlink(), "base.pt: there is no such file"),
    "no log": (lambda run: (run / "log.jsonl").unlink(), "No such file or directory"),
    "a log cut short": (lambda run: os.truncate(run / "log.jsonl", 10), "has lost lines, or was"),
    "a log changed": (lambda run: (run / "log.jsonl").write_text("x" * 99_999), "has lost lines"),
    "no looks": (lambda run: (run / "looks.jsonl").unlink(), "No such file or directory"),
    "a folder for the log": (
        lambda run: (run / "log.jsonl").unlink() or (run / "log.jsonl").mkdir(),
        "Is a directory",
    ),
    "a link": (with_link, "log.jsonl is a link"),
    "another grpo.py": (lambda run: (run / "grpo.py").write_text("x = 1"), "cp grpo.py"),
    "another kit": (lambda run: (run / "kit/run.py").write_text("x = 1"), "cp kit/run.py"),
    "sources that are none": (set_to(sources=[7]), "sources is [7]"),
    "no sources": (in_last(lambda saved: saved.pop("sources")), NOT),
    "no tokenizer.py": (lambda run: (run / "data/tokenizer.py").unlink(), "cp data/tokenizer.py"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_files_are_refused(name, broken_off, capsys):
    """In one line, and the run is left as it is."""
    damage, complaint = DAMAGE[name]
    capsys.readouterr()
    damage(broken_off)
    before = contents(broken_off)
    assert complaint in refusal(["--resume", str(broken_off)], capsys, "where it goes on")
    assert contents(broken_off) == before


def test_a_file_that_was_not_there_at_the_start_is_in_nobodys_way(broken_off, whole):
    """An idea of one's own beside train.py; of what the run began with, each file is compared."""
    in_last(lambda saved: saved["sources"].remove("data/languages.py"))(broken_off)
    (broken_off / "data/languages.py").write_text("not compared, then")
    train.main(["--resume", str(broken_off)])
    assert outcome(broken_off) == outcome(whole)


def test_another_version_of_torch_is_said(broken_off, capsys):
    in_last(lambda saved: saved.update(made_by="torch 1.0 on cpu (ABACUS)"))(broken_off)
    train.main(["--resume", str(broken_off)])
    said = "saved by torch 1.0 on cpu (ABACUS), but this is torch"
    assert said in capsys.readouterr().out


def test_a_told_line_keeps_its_ends_and_fits():
    """A Korean letter takes two columns; what is cut is the middle, not the answer at the end."""
    assert fit("7 + 8: 15", 80) == "7 + 8: 15"
    assert fit("start of a long thought and the answer", 22) == "start of  ... e answer"
    line = "7 더하기 8: " + "더하기 " * 20 + "답은 15"
    shown = fit(line, 40)
    assert sum(2 if "가" <= x <= "힣" else 1 for x in shown) in (39, 40)
    assert shown.startswith("7 더하기 8: ") and " ... " in shown and shown.endswith("답은 15")
    assert fit(line, 1) == " ... "
