"""experiments/diagnose.py: each verdict on a log that has it, and on none that has not."""

import json

import pytest

from experiments import diagnose

STEPS = 40


def log(**curves):
    """A healthy run, but for these fields: each a function of the share of the run that is done, or None to leave it
    out."""
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
        "logp_gap": lambda done: 1e-5,
    }
    records = []
    for step in range(STEPS):
        done = step / (STEPS - 1)
        records.append({"phase": "grpo", "step": step + 1})
        records[-1] |= {name: curve(done) for name, curve in (healthy | curves).items() if curve}
        if (step + 1) % 10:
            for name in ("held_out_accuracy", "base_kl"):
                records[-1].pop(name, None)
    return records


def sick(records):
    return [check.name for check, _, healthy in diagnose.diagnose(records) if not healthy]


def stuck(done):
    return 0.3


def test_a_healthy_log_has_no_complaint_and_every_check_is_asked():
    found = diagnose.diagnose(log())
    assert [check.name for check, _, _ in found] == [check.name for check in diagnose.CHECKS]
    assert sick(log()) == []


@pytest.mark.parametrize(
    ("name", "curves"),
    [
        ("truncation", {"cut": lambda done: 0.3 * done}),
        ("signal", {"no_signal": lambda done: 0.8, "accuracy": lambda done: 0.01 + 0.1 * done}),
        ("entropy", {"entropy": lambda done: 0.4 * (1 - done) ** 4, "accuracy": lambda done: 0.3 + 0.2 * done}),
        ("length", {"completion_tokens": lambda done: 11 + 60 * done**2, "accuracy": lambda done: 0.6}),
        ("held-out accuracy", {"held_out_accuracy": stuck}),
        ("reward", {"accuracy": lambda done: 0.6 - 0.3 * done}),
        ("policy step", {"k3_old": lambda done: 0.3 * (done > 0.5)}),
        ("distance", {"base_kl": lambda done: 3 * done}),
        ("agreement", {"logp_gap": lambda done: 0.05 * (0.4 < done < 0.6)}),
    ],
)
def test_each_verdict_on_a_log_that_has_it(name, curves):
    found = sick(log(**curves))
    assert name in found
    assert found == [name] or "accuracy" in curves, "low accuracy shows in other checks too"


def test_what_is_high_at_the_start_and_what_success_explains_is_no_complaint():
    assert sick(log(cut=lambda done: 0.5 * (1 - done) ** 4)) == []
    assert sick(log(entropy=lambda done: 0.4 * (1 - done) ** 4, no_signal=lambda done: done)) == []
    assert sick(log(held_out_accuracy=lambda done: 0.97)) == []
    records = log()
    del records[5]["k3_old"]  # a step in which no row had an advantage
    assert sick(records) == []
    records = log(logp_gap=lambda done: 0.05)
    records[0]["dtype"] = "bfloat16"
    assert sick(records) == []


def test_what_a_log_does_not_hold_is_not_asked(tmp_path, capsys):
    found = diagnose.diagnose(log(base_kl=None, k3_old=None, held_out_accuracy=None))
    assert {"distance", "policy step", "held-out accuracy"}.isdisjoint(check.name for check, _, _ in found)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log(cut=stuck)))
    (tmp_path / "config.json").write_text('{"dtype": "float32", "device": "cpu"}')
    diagnose.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: {STEPS} steps of GRPO"
    assert lines.pop(1).startswith("ok    agreement")
    assert lines[1] == "LOOK  truncation         30.0% of the last completions met --max_new_tokens"
    assert "at most 5 %" in lines[2] and "--max_new_tokens" in lines[3] and lines[4].startswith("ok    signal")


def test_one_step_is_enough_and_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert sick(log()[:1]) == []
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text('{"dtype": "float32"}')
    (tmp_path / "young" / "log.jsonl").write_text('{"phase": "pretrain", "step": 50, "loss": 3.0}\n')
    complaints = {
        tmp_path / "young": "has no line of phase grpo in its log yet",
        tmp_path: "is not the folder of a run",
    }
    for folder, complaint in complaints.items():
        with pytest.raises(SystemExit) as stop:
            diagnose.main([str(folder)])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and complaint in printed and printed.count("\n") == 1
