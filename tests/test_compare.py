"""The comparison of DPO, PPO, GRPO and best-of-n: one small job, and what it is made of."""

import contextlib
import io
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

import train
from kit.run import Run, open_run
from model import ScalarModel, load_model
from rlhf import compare as room
from rlhf import dpo, measure
from rlhf.compare import Config, compare, nearest
from rlhf.methods import settings
from sample import load_policy
from tests.small import SHAPE


def config_of(**changes):
    how = {"preset": "tiny", "pretrain_steps": 3, "max_new_tokens": 6, "max_level": 2, "steps": 4}
    how |= {"curated": 20, "sft_steps": 2, "pairs": 150, "min_lead": 0.3, "reward_batch": 8}
    how |= {"prompts": 2, "group_size": 2, "nats": 0.01, "rule": 0.7}
    return Config(**how | SHAPE | changes).filled()


def test_the_nearest_point_is_one_behind_the_start():
    kls = enumerate((0.0, 0.9, 3.0, 2.6))
    points = [{"step": i, "kl": kl} for i, kl in kls]
    assert nearest(points, 2.5)["step"] == 3 and nearest(points, 0.0)["step"] == 1


# ----------------------------------------------------------------------------------------- the job


def job(config):
    with open_run(config, "-m rlhf.compare") as run:
        compare(config, run)


@pytest.fixture
def few(monkeypatch):
    shrink(monkeypatch)


def less(score, price):
    """In the place of `with_rule`: so small a model says no sentence twice."""
    return lambda *given: {"reward": score(*given)["reward"] - price}


def shrink(patch):
    patch.setattr(room, "with_rule", less)
    patch.setattr(measure, "ASKED", 3)
    patch.setattr(room, "MOST", 4)
    patch.setattr(dpo, "CHOOSING", 30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shrink(patch)
        job(config_of(out=str(folder)))
    return folder, printed.getvalue()


def test_each_path_is_measured_by_the_models_it_left(whole, few):
    """From the fine-tuned model, where the KL is 0, to the end of the stage."""
    folder, _ = whole
    result = json.loads((folder / "result.json").read_text())
    config, sft = config_of(), load_policy(folder / "sft.pt")
    score = room.judge(load_model(folder / "reward.pt", kind=ScalarModel))
    for stage in ("ppo", "grpo", "grpo_free", "grpo_fewer", "grpo_rule", "dpo"):
        points = result[stage]["points"]
        steps = [at["step"] for at in points]
        assert steps == sorted(steps) and steps[0] == 0 and len(steps) >= 5
        assert points[0]["kl"] == pytest.approx(0, abs=1e-4)
        if stage != "dpo":
            last = load_policy(folder / f"{stage}.pt").state_dict()
            left = load_policy(folder / f"{stage}_4.pt").state_dict()
            assert all(torch.equal(x, left[name]) for name, x in last.items())
    policy = load_policy(folder / "grpo_3.pt")
    found = room.point(config, policy, sft, score)
    assert {"step": 3, **found} == result["grpo"]["points"][3]


def test_methods_are_compared_at_one_kl_and_what_they_hold(whole):
    folder, printed = whole
    result = json.loads((folder / "result.json").read_text())
    for stage in ("dpo", "ppo", "grpo"):
        at, points = result[f"{stage}_close"], result[stage]["points"]
        close = nearest(points, 0.01)
        assert at["kl"] == close["kl"] and at["step"] == close["step"] > 0
        model = load_policy(folder / f"{stage}_{at['step']}.pt")
        assert at["held_out"] == measure.measure(config_of(), model)["held_out"]
        golds = f"{at['held_out']['gold']:8.2f}{at['seen']['gold']:8.2f}"
        name = f"{stage}, {at['step']} steps"
        assert f"{name:18}{at['kl']:8.2f}{golds}" in printed
    picked = result["best_of_n_close"]
    assert picked["n"] == 2 and picked["kl"] == pytest.approx(math.log(2) - 1 / 2)
    score = room.judge(load_model(folder / "reward.pt", kind=ScalarModel))
    sft = load_policy(folder / "sft.pt")
    for split, held_out in (("held_out", True), ("seen", False)):
        assert picked[split] == measure.gold_of_best(config_of(), sft, score, 2, held_out)
    picks = result["best_of_n"]["points"]
    assert [row["n"] for row in picks] == [1, 2, 4]
    assert picks[2]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    proxies = [row["proxy"] for row in picks]
    assert proxies == sorted(proxies) and proxies[0] < proxies[-1]
    held = {name: (x["models"], x["trained"]) for name, x in result["costs"].items()}
    expected = {"ppo": (4, 2), "grpo": (3, 1), "dpo": (2, 1), "best_of_n": (2, 0)}
    assert held == expected | {"grpo by rules": (1, 1)}
    assert result["costs"]["grpo by rules"]["bytes"] == 4 * result["costs"]["dpo"]["bytes"] // 5


def test_what_is_pushed_on_differs_from_grpo_in_one_thing(whole):
    """No KL; a judge of fewer pairs, which learned from a quarter of them; a rule mixed in."""
    folder, _ = whole
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stages = {name: [x for x in log if x["stage"] == name] for name in {x["stage"] for x in log}}
    assert 1 <= len(stages["reward_fewer"]) == len(stages["reward"]) // 4
    kl = {name: "k1_ref" in lines[0] for name, lines in stages.items() if name.startswith("grpo")}
    assert kl == {"grpo": True, "grpo_free": False, "grpo_fewer": False, "grpo_rule": False}
    first = {name: stages[name][0]["reward"] for name in kl}  # of the same answers
    assert first["grpo"] == first["grpo_free"] == pytest.approx(first["grpo_rule"] + 0.7, abs=1e-5)
    config, sft = config_of(), load_policy(folder / "sft.pt")
    problems, rollout = train.sample(settings(config, train.Config), sft, 0)
    for stage, name in {"grpo": "reward", "grpo_fewer": "reward_fewer"}.items():
        score = room.judge(load_model(folder / f"{name}.pt", kind=ScalarModel))
        expected = score(problems, rollout, 0)["reward"].mean().item()
        assert first[stage] == pytest.approx(expected, abs=1e-4), stage


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_to_the_same_result(whole, few, tmp_path, monkeypatch):
    """Stopped in a stage behind others."""
    config, log = config_of(out=str(tmp_path / "run")), Run.log

    def stop(self, record):
        if self.stage == "grpo_free" and self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, record)

    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(SystemExit):
        job(config)
    monkeypatch.setattr(Run, "log", log)
    job(replace(config, resume=config.out))
    for name in ("grpo_free.pt", "grpo_rule_3.pt"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes(), name
    one, other = (json.loads((x / "result.json").read_text()) for x in (tmp_path / "run", whole[0]))
    assert one.pop("seconds") != other.pop("seconds")
    for stage in ("dpo", "ppo", "grpo", "grpo_free", "grpo_fewer", "grpo_rule"):
        seconds = [result[stage].pop("seconds") for result in (one, other)]
        assert (seconds[0] is None) == (stage == "grpo_free") and 0 < seconds[1] < 60
    assert one == other
