"""experiments/watch/diagnose.py: each trouble gets its verdict, and a healthy log gets none."""

import json
import math

import pytest

from experiments.watch import diagnose

STEPS = 40
LOOKS = ("held_out_accuracy", "base_kl", "think_tokens", "in_steps")  # in few lines


def log(**curves):
    """The log of a healthy run, with other curves for the fields given. A curve is a function of
    the share of steps that are done, or None to leave the field out."""
    healthy = {
        "reward": lambda done: 1 + 0.9 * done,
        "accuracy": lambda done: 0.2 + 0.75 * done,
        "held_out_accuracy": lambda done: 0.2 + 0.7 * done,
        "completion_tokens": lambda done: 11 + 16 * done,
        "cut": lambda done: 0.02,
        "no_signal": lambda done: 0.1 + 0.7 * done,
        "entropy": lambda done: 0.4 - 0.38 * done,
        "k3_old": lambda done: 0.003,
        "base_kl": lambda done: 0.1 * done,
        "think_tokens": lambda done: 6 + 15 * done,
        "in_steps": lambda done: 0.2 + 0.79 * done,
        "logp_gap": lambda done: 1e-5,
    }
    records = []
    for step in range(STEPS):
        done = step / (STEPS - 1)
        record = {"stage": "r1_zero", "step": step + 1}
        record |= {name: curve(done) for name, curve in (healthy | curves).items() if curve}
        if (step + 1) % 10:
            for name in LOOKS:
                record.pop(name, None)
        records.append(record)
    return records


def sick(records):
    return [check.name for check, _, healthy in diagnose.diagnose(records) if not healthy]


def stuck(done):
    return 0.3


def test_a_healthy_log_has_no_complaint():
    """Every check is asked, and each is fine."""
    found = diagnose.diagnose(log())
    assert [check.name for check, _, _ in found] == [check.name for check in diagnose.CHECKS]
    assert sick(log()) == []


@pytest.mark.parametrize(
    ("name", "curves"),
    [
        ("truncation", {"cut": lambda done: 0.3 * done}),
        ("signal", {"no_signal": lambda done: 0.8, "accuracy": lambda done: 0.01 + 0.1 * done}),
        (
            "entropy",
            {
                "entropy": lambda done: 0.4 * (1 - done) ** 4,
                "accuracy": lambda done: 0.3 + 0.2 * done,
            },
        ),
        (
            "length",
            {"completion_tokens": lambda done: 11 + 60 * done**2, "accuracy": lambda done: 0.6},
        ),
        ("thinking", {"think_tokens": lambda done: 20 - 14 * done}),
        ("thinking", {"think_tokens": lambda done: 1.0, "in_steps": None}),
        ("thinking", {"in_steps": lambda done: 0.2 * (1 - done)}),
        ("held-out accuracy", {"held_out_accuracy": stuck}),
        ("reward", {"accuracy": lambda done: 0.6 - 0.3 * done}),
        ("policy step", {"k3_old": lambda done: 0.3 * (done > 0.5)}),
        ("distance", {"base_kl": lambda done: 3 * done}),
        ("agreement", {"logp_gap": lambda done: 0.05 * (0.4 < done < 0.6)}),
        ("numbers", {"grad_norm": lambda done: math.nan if done == 0.0 else math.inf}),
    ],
)
def test_each_verdict_on_a_log_that_has_it(name, curves):
    """A log with one trouble gets this verdict and no other."""
    found = sick(log(**curves))
    assert name in found
    assert found == [name] or "accuracy" in curves, "low accuracy shows in other checks too"


def test_what_success_explains_is_no_complaint():
    """A trouble at the start alone is fine, and so is a number that falls as accuracy rises."""
    assert sick(log(cut=lambda done: 0.5 * (1 - done) ** 4)) == []
    entropy = {"entropy": lambda done: 0.4 * (1 - done) ** 4}
    assert sick(log(**entropy, no_signal=lambda done: done)) == []
    assert sick(log(held_out_accuracy=lambda done: 0.97)) == []
    assert sick(log(think_tokens=lambda done: 20 - 11 * done, in_steps=None)) == []
    records = log()
    for name in ("k3_old", "logp_gap"):
        del records[5][name]  # a step in which no row had an advantage
    assert sick(records) == []
    records = log(logp_gap=lambda done: 0.05)
    records[0]["dtype"] = "bfloat16"
    assert sick(records) == []


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("line", [0, STEPS // 2, STEPS - 1])
def test_a_line_that_is_not_finite_is_told_and_hides_nothing(broken, line):
    """A line of NaN or infinity is one complaint; the other checks look at the other lines."""
    records = log(logp_gap=lambda done: 0.05 * (0.7 < done < 0.8))
    for name in list(records[line])[2:]:
        records[line][name] = broken
    assert sick(records) == ["numbers", "agreement"]


def test_a_log_of_nan_alone_is_one_complaint():
    """Where no line has a number, there is nothing else to ask."""
    curves = dict.fromkeys(list(log()[-1])[2:], lambda done: math.nan)
    assert sick(log(**curves)) == ["numbers"]
    assert len(diagnose.diagnose(log(**curves))) == 1


def test_thoughts_that_shrink_are_told_where_answers_are_right():
    """An accuracy of 98 % with thoughts of one token is told; a failing run has other troubles."""

    def complaints(thoughts, right):
        curves = {"think_tokens": thoughts, "held_out_accuracy": right}
        curves = {name: lambda done, x=x: x[done > 0.5] for name, x in curves.items()}
        found = diagnose.diagnose(log(in_steps=None, **curves))
        return {check.name: said for check, said, healthy in found if not healthy}

    said = "thoughts 9.0 -> 1.0 tokens, held-out accuracy 0.31 -> 0.98"
    assert complaints((9.0, 1.0), (0.31, 0.98)) == {"thinking": said}
    assert "thinking" in complaints((1.0, 1.0), (0.95, 0.95)), "high from the start"
    assert "thinking" not in complaints((9.0, 5.0), (0.31, 0.98)), "more than half is left"
    assert "thinking" not in complaints((9.0, 1.0), (0.5, 0.3)), "the fall is what to look at"


def test_what_a_log_does_not_hold_is_not_asked(tmp_path, capsys):
    """A check without its fields is not asked; a complaint comes with a range and advice."""
    found = diagnose.diagnose(log(base_kl=None, k3_old=None, held_out_accuracy=None))
    asked = {check.name for check, _, _ in found}
    assert {"distance", "policy step", "held-out accuracy", "thinking"}.isdisjoint(asked)
    text = "".join(json.dumps(record) + "\n" for record in log(cut=stuck))
    (tmp_path / "log.jsonl").write_text(text)
    (tmp_path / "config.json").write_text('{"dtype": "float32", "device": "cpu"}')
    diagnose.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: {STEPS} lines of r1_zero"
    assert lines[1] == "ok    numbers            NaN or infinite: nothing"
    assert lines[2].startswith("ok    agreement")
    assert lines[3] == "LOOK  truncation         30.0% of the last completions met --max_new_tokens"
    assert "at most 5 %" in lines[4] and "--max_new_tokens" in lines[5]
    assert lines[6].startswith("ok    signal")


def test_a_short_run_is_too_short_to_tell(tmp_path, capsys):
    """Three steps and no look: what has a limit is asked, what compares a beginning with an end is
    not, and each of these is said. From ten lines and two looks on, all are asked."""
    (tmp_path / "config.json").write_text('{"dtype": "float32", "device": "cpu"}')
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log(cut=stuck)[:3]))
    diagnose.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    short = [line.split()[1] for line in lines if "too short to tell: 3 of the 10 lines" in line]
    assert short == ["truncation", "signal", "entropy", "length", "reward"]
    assert [line.split()[1] for line in lines[:3]] == ["numbers", "agreement", "policy"]
    assert all(line.startswith("ok ") for line in lines[:3]) and len(lines) == 3 + len(short)
    assert sick(log()[:1]) == [] and sick(log(cut=stuck)[:9]) == []
    assert sick(log(cut=stuck)[:10]) == ["truncation"]
    asked = [[check.name for check, *_ in diagnose.diagnose(log()[:n])] for n in (19, 20)]
    assert set(asked[1]) - set(asked[0]) == {"thinking", "held-out accuracy"}


def test_a_stage_of_another_name_is_asked_by_its_name(tmp_path, capsys):
    """--stage chooses whose log lines are read."""
    records = [record | {"stage": "reasoning"} for record in log()]
    text = "".join(json.dumps(record) + "\n" for record in (*log(cut=stuck), *records))
    (tmp_path / "log.jsonl").write_text(text)
    (tmp_path / "config.json").write_text('{"dtype": "float32", "device": "cpu"}')
    diagnose.main([str(tmp_path), "--stage", "reasoning"])
    assert "LOOK" not in capsys.readouterr().out
