"""experiments/machine/on_gpu.py, on a CPU with small sizes: the pieces, stopped and gone on."""

import json
import sys
import time

import pytest

from experiments.machine import on_gpu
from experiments.machine.on_gpu import Command, Piece, equal_steps, work
from tests.small import PROSE, SHAPE_FLAGS

TRAIN = "--preset=tiny --pretrain_steps=60 --steps=3 --prompts=4 --group_size=4 --eval_every=1"
TRAIN += f" --eval_problems=8 --max_new_tokens=24 {' '.join(SHAPE_FLAGS)}"
BENCH = "--dtype=float32 --shape=cpu --rows=32 --tokens=8 --repeat=1 --micro_batch=32"


def python(makes, code):
    return Command(["-c", f"makes = {str(makes)!r}\n{code}"], makes)


WRITES = "open(makes, 'a').write('x')"


def test_commands_of_a_piece_run_side_by_side(tmp_path):
    """Two that wait for each other's file both end, and one that has ended is not run again."""
    waits = "import os, time\nopen(makes + '.begun', 'w')\n"
    waits += f"while len([x for x in os.listdir({str(tmp_path)!r}) if 'begun' in x]) < 2: "
    commands = [python(tmp_path / name, f"{waits}time.sleep(.02)\n{WRITES}") for name in "ab"]
    assert work(commands, time.monotonic() + 60)
    assert work(commands, time.monotonic() + 60)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "x"]


def test_a_command_is_stopped_when_the_time_is_up(tmp_path):
    """SIGTERM comes first, so that a run can save; the command that had ended keeps its file."""
    saves = "import signal, sys, time\nopen(makes + '.begun', 'w')\n"
    saves += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(makes + '.saved', 'w') and 0))"
    commands = [python(tmp_path / "a", f"{saves}\ntime.sleep(600)"), python(tmp_path / "b", WRITES)]
    started = time.monotonic()
    assert not work(commands, started + 5)
    assert time.monotonic() - started < 30
    assert (tmp_path / "a.saved").exists() and (tmp_path / "b").exists()
    assert not (tmp_path / "a").exists()


def test_a_failed_piece_leaves_no_result(tmp_path, monkeypatch, capsys):
    """Its last line is printed, the next piece runs, and only the failed one runs again."""

    def piece(name, code):
        read = lambda folder: {"found": (folder / name).read_text()}  # noqa: E731
        commands = lambda flags: [python(flags.out / name, code)]  # noqa: E731
        return Piece(name, f"the {name}", commands, read, lambda found: f"it is {found['found']}")

    monkeypatch.setattr(
        on_gpu,
        "PIECES",
        [piece("bad", "print(1)\nraise SystemExit('no luck')"), piece("x", WRITES)],
    )
    arguments = ["--device=cpu", f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"]
    for _ in range(2):
        on_gpu.main(arguments)
        shown = capsys.readouterr().out
        assert "bad: failed: no luck" in shown and "| the x | it is x |" in shown
        assert "| the bad | not run | - |" in shown
        assert [path.name for path in (tmp_path / "results").iterdir()] == ["x.json"]
    assert "x: has a result" in shown
    assert (tmp_path / "out" / "bad.txt").read_text().count("no luck") == 2


def test_equal_steps_end_at_the_first_other_token(tmp_path):
    """Numbers that follow from tokens count, and numbers that round do not."""
    line = dict.fromkeys(on_gpu.OF_TOKENS, 0.5) | {"stage": "r1_zero", "entropy": 1.0}
    for name, third in (("one", 0.5), ("other", 0.25)):
        (tmp_path / name).mkdir()
        lines = [line | {"entropy": third}, line, line | {"accuracy": third}, line]
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (tmp_path / name / "log.jsonl").write_text(text)
    assert equal_steps(tmp_path / "one", tmp_path / "other") == 2
    assert equal_steps(tmp_path / "one", tmp_path / "one") == 4


def test_a_skipped_test_is_no_result(tmp_path):
    """`read_tests` counts, and raises where every test was skipped."""
    counts = 'errors="1" failures="2" skipped="{}" tests="9"'
    for skipped in (3, 9):
        suite = f"<testsuites><testsuite {counts.format(skipped)}/></testsuites>"
        (tmp_path / "tests.xml").write_text(suite)
        if skipped == 3:
            assert on_gpu.say_tests(on_gpu.read_tests(tmp_path)) == "3 passed, 3 failed"
    with pytest.raises(ValueError, match="no test ran"):
        on_gpu.read_tests(tmp_path)


@pytest.mark.slow
def test_all_pieces_run_from_end_to_end_on_a_cpu(tmp_path, capsys):
    """In two calls, the first of which stops within the runs. What needs a GPU fails by name."""
    arguments = ["--device=cpu", f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"]
    arguments += [f"--train={TRAIN}", f"--bench={BENCH}"]
    on_gpu.main([*arguments, "--minutes=0.2"])
    shown = capsys.readouterr().out
    assert "the time is up; the same command goes on" in shown
    on_gpu.main([*arguments, "--minutes=20"])
    shown = capsys.readouterr().out
    assert "all has run, but these failed: tests, graphs, bfloat16" in shown
    assert "graphs: failed: train.py: error: --cuda_graphs needs a CUDA device" in shown
    assert "bfloat16: failed: the run was not in bfloat16" in shown
    found = {path.stem for path in (tmp_path / "results").iterdir()}
    assert found == {each.name for each in on_gpu.PIECES} - {"tests", "graphs", "bfloat16"}
    rows = [line.split(" | ")[1] for line in on_gpu.table(tmp_path / "results").splitlines()[2:]]
    assert [row == "not run" for row in rows] == [each.name not in found for each in on_gpu.PIECES]
    assert rows[-1].endswith("equal to the bit")
    # The readers of the pieces that need a GPU, given runs of this device.
    alone = on_gpu.read_beside_alone("deterministic1", tmp_path / "out")
    assert alone["equal_steps"] == 3 == len(alone["alone"]["curve"])
    assert "in the first 3 of 3 steps" in on_gpu.say_beside_alone("deterministic1", alone)
    on_gpu.main([*arguments, "--minutes=20"])
    assert capsys.readouterr().out.count("has a result") == len(found)


def test_the_command_needs_a_gpu_or_another_device(monkeypatch, capsys, tmp_path):
    """In one line, before any work."""
    monkeypatch.setattr(sys, "argv", ["on_gpu"])
    with pytest.raises(SystemExit) as stop:
        on_gpu.main([f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "no CUDA device here" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.docs
def test_the_pages_table_of_a_gpu_is_of_the_results():
    """A page's table is made from experiments/results/gpu, with "not run" for what did not."""
    assert on_gpu.table(on_gpu.RESULTS) in PROSE
