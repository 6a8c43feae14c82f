"""experiments/watch/versus.py: what it calls a difference, and the runs that it makes and keeps."""

import contextlib
import io
import json
import math
import random
import shlex
import statistics
import subprocess
from dataclasses import asdict

import pytest

from experiments.watch import versus
from experiments.watch.versus import ROOT, T95, Difference, differences, verdict
from tests.small import SHAPE_FLAGS
from tests.test_experiments import results, write_run
from train import Config

SIZES = "--task chains --max_level 3 --pretrain_steps 2 --steps 2 --prompts 2 --group_size 4 "
SIZES += "--eval_problems 8 --max_new_tokens 12 " + " ".join(SHAPE_FLAGS)
PATCH = """--- a/grpo.py
+++ b/grpo.py
@@ -286,2 +286,3 @@
     "grpo": Variant("Shao et al. 2024, eq. 3"),  # eq. 3 names no bounds: 0.2 is PPO's; R1's is 10
+    "mine": Variant("of my own", scale="none"),
     "dr_grpo": Variant(
"""


def said(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        versus.main(list(arguments))
    return printed.getvalue()


# --------------------------------------------------------------------------- what is a difference


@pytest.mark.parametrize("seeds", T95)
def test_the_bounds_are_students(seeds):
    """Of Student's t with one degree of freedom less than there are seeds, 95 % lies within: its
    density, integrated by trapezoids."""
    free = seeds - 1
    scale = math.gamma(seeds / 2) / (math.sqrt(free * math.pi) * math.gamma(free / 2))

    def density(x):
        return scale * (1 + x * x / free) ** (-seeds / 2)

    grid = [T95[seeds] * i / 4000 for i in range(4001)]
    ordinates = [density(x) for x in grid]
    within = 2 * (sum(ordinates) - (ordinates[0] + ordinates[-1]) / 2) * T95[seeds] / 4000
    assert within == pytest.approx(0.95, abs=1e-4)


def test_a_difference_is_taken_seed_by_seed():
    """Seeds that lie far apart hide no change that each of them shows."""
    each = Difference("pass@1", [0.5, 0.7, 0.9], [0.52, 0.73, 0.92])
    assert each.by_seed == pytest.approx([0.02, 0.03, 0.02])
    assert each.mean == pytest.approx(0.07 / 3)
    assert each.margin == pytest.approx(4.303 * statistics.stdev([2, 3, 2]) / 100 / math.sqrt(3))
    assert each.clear and abs(each.mean) < statistics.stdev(each.without)
    assert not Difference("pass@1", [0.5, 0.7, 0.9], [0.52, 0.82, 0.9]).clear


@pytest.mark.parametrize("seeds", [3, 5])
def test_noise_alone_is_called_clear_once_in_twenty(seeds):
    """Runs that differ by nothing but noise; three seeds need the wide bound of Student's t."""
    rng, clear = random.Random(0), 0
    for _ in range(4000):
        sides = [[rng.gauss(0.8, 0.02) for _ in range(seeds)] for _ in range(2)]
        clear += Difference("pass@1", *sides).clear
    assert 0.04 < clear / 4000 < 0.06


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([0.55, 0.76, 0.95], "Better: pass@1 +5.3 points (by seed +5.0, +6.0, +5.0), more than"),
        ([0.45, 0.64, 0.85], "Worse: pass@1 -5.3 points (by seed -5.0, -6.0, -5.0), more than the"),
        ([0.55, 0.69, 0.9], "No difference that three seeds can show: pass@1 +1.3 points (by seed"),
        ([0.5, 0.7, 0.9], "The change changes nothing: every number of every seed is the same."),
    ],
)
def test_the_verdict_is_in_words(changed, words):
    """Better, worse, no difference that can be shown, and none at all."""
    assert verdict([Difference("pass@1", [0.5, 0.7, 0.9], changed)]).startswith(words)


def test_what_is_clear_beside_pass_1_is_named():
    """With a word on how many of so many measures chance alone would name."""
    first = Difference("pass@1", [0.5, 0.7, 0.9], [0.55, 0.69, 0.9])
    longer = Difference("completion_tokens", [20.0, 22.0, 21.0], [30.0, 31.0, 31.0])
    noise = Difference("entropy", [0.1, 0.2, 0.3], [0.3, 0.1, 0.3])
    *_, line = verdict([first, noise, longer]).splitlines()
    assert line.startswith("Clear beside it: completion_tokens higher (about 0 of 3 measures")
    row = next(x for x in versus.table([first, longer]).splitlines() if "tokens" in x)
    assert row.split() == ["completion_tokens", "21", "1", "30.67", "+9.67", "1.43", "higher"]


def test_the_measures_are_of_the_runs_last_model_and_of_its_log(tmp_path):
    """Nested ones and the means of the log; a measure that one run lacks is left out."""
    one = [tmp_path / name for name in "ab"]
    two = [tmp_path / name for name in "cd"]
    for i, folder in enumerate((*one, *two)):
        write_run(folder, results(0.5 + i / 8), lr=1.0, **({"k": 1} if i else {}))
    found = {each.name: each for each in differences(one, two)}
    assert found["pass@1"].by_seed == [0.25, 0.25] and next(iter(found)) == "pass@1"
    assert found["thinking a_measure"].without == [0.5, 0.625]
    assert found["log accuracy"].by_seed == [0.0, 0.0]
    assert not {"log stage", "log step", "total", "log lr"} & set(found)


# ------------------------------------------------------------------------------ the code, the runs


def test_a_patch_changes_the_copy_alone(tmp_path):
    """Also where the copy lies within a git repository, which `git apply` would take for the
    place; and what the patch says of tests and pages is left out."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "my.diff").write_text(
        f"{PATCH}--- a/tests/mine.py\n+++ b/tests/mine.py\n@@ -1 +1 @@\n-a\n+b\n"
    )
    before = (ROOT / "grpo.py").read_text()
    plain = versus.copy_code(tmp_path / "plain", None)
    patched = versus.copy_code(tmp_path / "patched", tmp_path / "my.diff")
    assert '"mine": Variant(' in (tmp_path / "patched" / "grpo.py").read_text()
    assert (tmp_path / "plain" / "grpo.py").read_text() == before == (ROOT / "grpo.py").read_text()
    assert plain == versus.copy_code(tmp_path / "again", None) != patched


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        versus.main(list(arguments))
    assert stop.value.code == 2
    return stop


def test_a_patch_that_does_not_apply_is_refused(tmp_path, capfd):
    """In one line, and no folder of runs is left; a file that is not there, too."""
    (tmp_path / "bad.diff").write_text(PATCH.replace("eq. 3 names", "eq. 4 names"))
    for patch, complaint in (
        ("no.diff", "there is no such file"),
        ("bad.diff", "bad.diff does not apply to this tree (error: "),
    ):
        refusal(capfd, "--out", str(tmp_path / "out"), "--patch", str(tmp_path / patch))
        printed = capfd.readouterr()
        assert complaint in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not list((tmp_path / "out").glob("*/*"))


def test_base_model_and_evaluation_are_held_equal():
    """A change of the loss, of the rewards or of the rollouts is no such setting."""
    settings = asdict(Config().filled())
    loss = {"variant": "dapo", "rewards": "accuracy=1", "prompts": 8, "temperature": 0.7}
    versus.check_held(settings, settings | loss | {"steps": 9, "out": "x", "new": 1})
    for name, value in (("task", "chains"), ("d_model", 8), ("eval_problems", 9), ("seed", 1)):
        complaint = f"--{name} must be the same .* not {value!r}: put it into --both"
        with pytest.raises(ValueError, match=complaint):
            versus.check_held(settings, settings | {name: value})


@pytest.mark.slow
def test_mistakes_in_the_flags_are_told_before_any_run(tmp_path, capfd):
    """By the line of train.py, which runs from the copy of the code."""
    for arguments, complaint in (
        (["--variant", "mine"], "--variant: invalid choice: 'mine'"),
        (["--task", "signs"], "--task must be the same with the change and without"),
        (["mine"], "unrecognized arguments: mine"),
    ):
        refusal(capfd, "--out", str(tmp_path / "out"), "--both", SIZES, *arguments)
        printed = capfd.readouterr()
        assert complaint in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of the runs, and what the first call printed."""
    out = tmp_path_factory.mktemp("versus")
    return out, said("--out", str(out), "--both", SIZES, "--variant", "dr_grpo")


@pytest.mark.slow
def test_three_seeds_with_a_change_and_without(compared):
    """Each pair of runs has one seed, one base model and one evaluation of it."""
    out, shown = compared
    assert "changed settings: variant grpo -> dr_grpo\nchanged code: none\n" in shown
    (folder,) = out.iterdir()
    without, changed = folder / "without", next(folder.glob("variant-dr_grpo-*"))
    bases = set()
    for seed in range(3):
        pair = [side / f"seed{seed}" for side in (without, changed)]
        settings = [json.loads((run / "config.json").read_text()) for run in pair]
        assert [each["seed"] for each in settings] == [seed, seed]
        assert [each["variant"] for each in settings] == ["grpo", "dr_grpo"]
        ended = [json.loads((run / "result.json").read_text()) for run in pair]
        assert ended[0]["base"] == ended[1]["base"]
        assert (pair[0] / "base.pt").read_bytes() == (pair[1] / "base.pt").read_bytes()
        bases.add((pair[0] / "base.pt").read_bytes())
    assert len(bases) == 3
    assert (changed / "versus.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_runs_without_a_change_are_kept(compared, tmp_path, capfd):
    """A second change, as a patch, makes its own runs alone; the same again makes none; and
    without any change there is nothing to run."""
    out, _ = compared
    made = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    (tmp_path / "my.diff").write_text(PATCH)
    call = ["--out", str(out), "--both", SIZES, "--patch", str(tmp_path / "my.diff")]
    shown = said(*call, "--variant", "mine")
    assert "changed code: grpo.py (diff -r " in shown and "variant grpo -> mine" in shown
    found = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(made) == 6 and len(found) == 9 and made.items() <= found.items()
    assert said(*call, "--variant", "mine") == shown
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == found
    refusal(capfd, *call[:4])
    complaint = "neither a flag nor the code differs from the runs that are kept"
    assert complaint in capfd.readouterr().err


@pytest.mark.docs
def test_the_default_sizes_of_versus_parse():
    """What both sides get unless somebody says otherwise."""
    settings = versus.settings_of(ROOT, shlex.split(versus.BOTH))
    assert settings["task"] == "chains" and settings["steps"] < 60
