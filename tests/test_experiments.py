"""The lessons and the commands that watch a run: what they print is true, and pages show it."""

import contextlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from experiments.lessons import bias, by_hand
from experiments.watch import compare, diagnose, plot
from grpo import ADVANTAGES, KL_ESTIMATORS, VARIANTS, Variant
from tests.small import PROSE

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG"


def said(command, *arguments):
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command(*arguments)
    return printed.getvalue()


# ------------------------------------------------------------------------------------ the lessons


def test_the_sums_by_hand_are_what_the_code_computes():
    """In the worked example, each loss and each advantage is the sum that is printed beside it."""
    shown = said(by_hand.main)
    losses = re.findall(r"by hand -\((.*)\) / (\d+) = (\S+)\n +policy_loss (\S+)", shown)
    assert len(losses) == 3
    for terms, divisor, total, computed in losses:
        assert total == computed
        assert -eval(terms) / int(divisor) == pytest.approx(float(computed), abs=6e-5)
    advantages = re.findall(r"by hand (\(.*\) / \(.*\)) = +(\S+) +group_advantages +(\S+)", shown)
    assert len(advantages) == 8
    for terms, by_reader, computed in advantages:
        assert by_reader == computed
        assert eval(terms) == pytest.approx(float(computed), abs=2e-4)
    assert float(advantages[0][2]) > 1


@pytest.mark.docs
def test_the_readme_shows_the_worked_example():
    """A page holds what `by_hand` prints, to the letter."""
    assert f"```text\n{said(by_hand.main)}```" in PROSE


@pytest.fixture(scope="module")
def bias_tables(tmp_path_factory):
    """What `bias` prints, the picture that it draws, and the names of the rows of all tables, with
    a user's own row in each."""
    path = tmp_path_factory.mktemp("bias") / "bias.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADVANTAGES, "sign", lambda groups, eps: (2 * groups - 1).sign())
        patch.setitem(VARIANTS, "signed", Variant("a test", scale="sign"))
        patch.setitem(KL_ESTIMATORS, "k2_ratio", lambda log_x, ratio: ratio * log_x**2 / 2)
        names = Counter([*ADVANTAGES, *VARIANTS, *KL_ESTIMATORS])
        return said(bias.main, ["--plot", str(path)]), path, names


@pytest.mark.docs
def test_the_readme_shows_the_tables_of_the_bias(bias_tables):
    """Each row of the tables that `bias` prints stands on a page."""
    names = ("leave_one_out", "none", "std", "k1", "k2", "k3", "k3_ratio")
    for name in (*names, "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce", "rloo"):
        (line,) = re.findall(rf"^ *{name} .*\d$", bias_tables[0], re.MULTILINE)
        assert line in PROSE, line


def test_the_bias_has_a_row_for_each_loss_and_a_picture(bias_tables):
    """`bias` prints each row of each table, a user's own too, and draws a picture. Of one question
    the batch is the group, so "batch" has no row beside "std"."""
    shown, path, names = bias_tables
    assert {"sign", "signed", "k2_ratio"} <= set(names)
    printed = Counter(re.findall(r"^ *(\S+) .*\d$", shown, re.MULTILINE))
    assert {name: printed[name] for name in names} == {**names, "batch": names["batch"] - 1}
    assert path.read_bytes().startswith(PNG)


# ------------------------------------------------------------------- the commands that watch a run


def write_run(folder, result=None, **config):
    """A folder as a run leaves it: 50 steps of the base model and 20 of GRPO."""
    folder.mkdir()
    settings = {"variant": "grpo", "lr": 0.5, "dtype": "float32", "device": "cpu", "out": "x"}
    settings |= {"eval_problems": 500, "eval_samples": 16} | config
    (folder / "config.json").write_text(json.dumps(settings))
    records = [{"stage": "base", "step": 50, "loss": 2.0}]
    for step in range(1, 21):
        record = {"stage": "r1_zero", "step": step, "accuracy": step / 20 * settings["lr"]}
        fields = ("completion_tokens", "no_signal", "grad_norm", "entropy")
        record |= dict.fromkeys(fields, 0.5)
        record |= {"held_out_accuracy": 0.25} if step % 10 == 0 else {}
        record |= {"k3_old": 0.125} if config else {}
        records.append(record)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def words(text):
    return [line.split() for line in text.splitlines()]


def results(right):
    seconds, ended = {"total": 60.0 * right}, {"pass@1": right, "thinking": {"a_measure": right}}
    return {"seed": 0, "seconds": seconds, "base": {"pass@1": 0.25}, "r1_zero": ended}


def test_two_runs_are_compared_by_settings_results_and_logs(tmp_path):
    """Settings that are equal are not listed, and each number is a number of the folders."""
    one = write_run(tmp_path / "one", results(0.5))
    two = write_run(tmp_path / "two", results(0.75), lr=1.0, variant="mine")
    picture = tmp_path / "compare.png"
    shown = said(compare.main, [one, two, "--plot", str(picture)])
    lines = words(shown)
    assert ["variant", "grpo", "mine"] in lines
    assert ["lr", "0.5", "1", "+0.5"] in lines
    assert ["pass@1", "0.5", "0.75", "+0.25"] in lines and ["total", "30", "45", "+15"] in lines
    assert ["thinking", "a_measure", "0.5", "0.75", "+0.25"] in lines, "of whatever task"
    assert ["accuracy", "0.3875", "0.775", "+0.388"] in lines, "steps 11 to 20"
    assert ["accuracy", "0.2625", "0.525"] in [line[:3] for line in lines], "all steps"
    assert ["k3_old", "-", "0.125"] in lines
    assert not {"out", "dtype"} & {line[0] for line in lines if line}
    assert "evaluations differ" not in shown and "has not ended" not in shown
    assert picture.read_bytes().startswith(PNG)
    curves = ["--plot", str(tmp_path / "k3.png"), "--curves", "k3_old,held_out_accuracy"]
    said(compare.main, [one, two, *curves])
    assert (tmp_path / "k3.png").read_bytes().startswith(PNG)
    assert ["loss", "2", "2", "+0"] in words(said(compare.main, [one, two, "--stage", "base"]))


def test_compare_tells_what_makes_two_runs_no_equals(tmp_path):
    """Different code, evaluations of different sizes and a run that has not ended are named."""
    one = write_run(tmp_path / "one", results(0.5))
    two = write_run(tmp_path / "two", results(0.75), eval_problems=200)
    (tmp_path / "two" / "kit").mkdir()
    (tmp_path / "two" / "kit" / "run.py").write_text("other code")
    shown = said(compare.main, [one, two])
    command = f"diff {one}/kit/run.py {two}/kit/run.py"
    assert f"the code differs: kit/run.py ({command})" in shown
    assert "evaluations differ in size: 500 problems in A, 200 in B" in shown
    assert "completions a problem" not in shown
    shown = said(compare.main, [one, write_run(tmp_path / "three")])
    assert f"A  {one}, step 20 of r1_zero\n" in shown
    assert "three, step 20 of r1_zero; the run has not ended\n" in shown
    assert "held out" not in shown


def test_the_curves_of_runs_are_drawn_from_their_logs(tmp_path):
    """One run, several runs, another stage, and a run that has just begun."""
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=1.0)
    young = write_run(tmp_path / "young")
    lines = (tmp_path / "young" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "young" / "log.jsonl").write_text("".join(lines[:4]))
    for arguments, picture in (
        ([one], "one/curves.png"),
        ([young], "young/curves.png"),  # before its first look at held-out problems
        ([one, two, "--out", f"{tmp_path}/two.png", "--curves", "accuracy,k3_old"], "two.png"),
        ([one, "--out", f"{tmp_path}/loss.png", "--stage", "base"], "loss.png"),
    ):
        assert said(plot.main, arguments) == f"-> {tmp_path / picture}\n"
        assert (tmp_path / picture).read_bytes().startswith(PNG)


def test_a_stage_of_any_name_has_curves():
    """A stage that CURVES lacks shows the fields of CURVES that its log has, else all fields."""
    log = [{"stage": "judge", "step": 1, "loss": 1.0, "entropy": 1.0, "margin": 1.0}]
    assert plot.choose_curves(None, None, "judge", [log]) == ["entropy", "loss"]
    assert plot.choose_curves(None, None, "base", [log]) == ["loss"]
    log = [{"stage": "judge", "step": 1, "margin": 1.0}]
    assert plot.choose_curves(None, None, "judge", [log]) == ["margin"]


@pytest.mark.parametrize("command", [compare, plot, diagnose])
def test_a_half_written_last_line_is_left_alone(command, tmp_path):
    """A run can be watched while it writes, even if the log ends within a letter."""
    one = write_run(tmp_path / "one")
    with (tmp_path / "one" / "log.jsonl").open("ab") as log:
        log.write('{"stage": "r1_zero", "step": 21, "said": "쉬'.encode()[:-1])
    assert said(command.main, [one, one] if command is compare else [one])
    assert [record["step"] for record in plot.read_log(Path(one))][-1] == 20


def test_what_cannot_be_shown_is_refused_in_one_line(capsys, tmp_path):
    """No run, no such field, no place for a picture: one line, status 2, nothing printed."""
    one = write_run(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    young, torn, bare = (Path(write_run(tmp_path / name)) for name in ("young", "torn", "bare"))
    (young / "log.jsonl").write_text('{"stage": "base", "step": 50, "loss": 2.0}\n')
    (torn / "log.jsonl").write_text('{"stage": "r1_z\n{}\n')
    (bare / "config.json").unlink()
    nowhere = str(tmp_path / "nowhere" / "x.png")
    no_step = "young has no line of the stage r1_zero in its log yet (it has base)"
    for command, arguments, complaint in (
        (plot, [], "run"),
        (plot, [one, "--curves", "banana"], "no log has the field banana; there are accuracy, c"),
        (plot, [one, "--stage", "base", "--curves", "accuracy"], "no log has the field accuracy"),
        (plot, [one, "--stage", "judge"], "no line of the stage judge in its log yet (it has b"),
        (plot, [one, "--out", nowhere], "there is no folder"),
        (
            plot,
            [one, "--out", str(tmp_path)],
            "this is a folder, and the picture needs the name of a file",
        ),
        (plot, [str(tmp_path)], "is not the folder of a run: it holds no log.jsonl"),
        (plot, [str(torn)], "torn/log.jsonl has a line that no run wrote"),
        (plot, [str(young)], no_step),
        (diagnose, [str(young)], no_step),
        (diagnose, [str(tmp_path)], "is not the folder of a run"),
        (diagnose, [str(bare)], "holds no config.json"),
        (compare, [one, nowhere], "holds no config.json"),
        (compare, [one, str(tmp_path / "empty")], "holds no config.json"),
        (compare, [one, str(young)], no_step),
        (compare, [one, one, "--plot", nowhere], "there is no folder"),
        (compare, [one, one, "--curves", "loss"], "no log has the field loss"),
        (bias, ["--plot", nowhere], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert complaint in printed.err and printed.err.count("\n") == 1


@pytest.mark.docs
def test_the_index_has_every_command_and_no_other():
    """experiments/README.md names each module of the wings that can be run."""
    index = (ROOT / "experiments" / "README.md").read_text()
    files = [x for x in (ROOT / "experiments").glob("*/*.py") if "def main(" in x.read_text()]
    commands = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert len(commands) > 25
    assert set(re.findall(r"^\| `python -m ([\w.]+)", index, re.M)) == commands
