"""experiments/watch/tensorboard.py: TensorBoard gets what the log holds."""

import json

import pytest

from experiments.watch import tensorboard


@pytest.fixture
def folder(tmp_path):
    """A folder with the log of a run of two stages."""
    lines = [
        {"stage": "base", "step": 50, "loss": 2.5},
        {"stage": "r1_zero", "step": 1, "reward": 1.25, "accuracy": 0.25},
        {"stage": "r1_zero", "step": 2, "reward": 1.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"stage": "r1_z')
    return tmp_path


def test_tensorboard_gets_each_number_of_the_log(folder):
    """Scalars by stage and step, the same after a second call."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        tensorboard.main([str(folder)])
    found = {}
    for stage in ("base", "r1_zero"):
        events = reader.EventAccumulator(str(folder / "tensorboard" / stage)).Reload()
        for name in events.Tags()["scalars"]:
            found[stage, name] = [(each.step, each.value) for each in events.Scalars(name)]
    assert found == {
        ("base", "loss"): [(50, 2.5)],
        ("r1_zero", "reward"): [(1, 1.25), (2, 1.5)],
        ("r1_zero", "accuracy"): [(1, 0.25)],
    }


def test_without_tensorboard_there_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        tensorboard.main([str(folder)])
    printed = capsys.readouterr().err
    assert "pip install tensorboard" in printed and printed.count("\n") == 1


def test_tensorboard_of_no_run_gets_one_line(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    with pytest.raises(SystemExit):
        tensorboard.main([str(tmp_path)])
    assert "is not the folder of a run" in capsys.readouterr().err
