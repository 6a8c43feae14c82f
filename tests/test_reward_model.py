"""A reward model: its loss against a loop in float64, and the stage that trains it."""

import contextlib
import io
import json
import math
import os
import re
import signal
from dataclasses import replace

import pytest
import torch

import train
from data import TASKS, get_tokenizer
from data.batches import padded
from data.corpus import encode_document
from data.problem import Document
from kit import flags
from kit.run import Run, open_run
from rlhf import reward_model
from rlhf.preferences import Pair
from rlhf.reward_model import (
    all_scores,
    compare,
    fit,
    judge,
    preference_loss,
    scalar_model,
    scores,
    standardise,
)
from sample import Rollout
from tests.small import SHAPE, SMALL, Unsaved, small_model

words = get_tokenizer("world")

CLOSE = {"rtol": 0, "atol": 1e-10}


def test_the_loss_is_bradley_and_terrys_likelihood():
    """Its gradient is the share that it gives to the wrong order, also where exp would overflow."""
    chosen = torch.tensor([0.3, -1.0, 2.0, -900.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 1.5, -3.0, 900.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(chosen, rejected)
    total, wrong = 0.0, []
    for a, b in zip(chosen.tolist(), rejected.tolist()):
        p = 1 / (1 + math.exp(min(b - a, 700.0)))
        total += -math.log(p) if b - a < 700 else b - a
        wrong.append((1 - p) / 5)
    assert loss.item() == pytest.approx(total / 5, abs=1e-10)
    loss.backward()
    torch.testing.assert_close(chosen.grad, -torch.tensor(wrong).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(rejected.grad, -chosen.grad, **CLOSE)


def test_a_lead_of_1_is_preferred_in_73_percent_and_levels_do_not_matter():
    chosen, rejected = torch.tensor([3.0]), torch.tensor([2.0])
    assert torch.exp(-preference_loss(chosen, rejected)).item() == pytest.approx(0.731, abs=1e-3)
    same = preference_loss(chosen + 5, rejected + 5)
    torch.testing.assert_close(same, preference_loss(chosen, rejected))


@pytest.mark.parametrize(
    ("chosen", "rejected", "complaint"),
    [
        (torch.zeros(3), torch.zeros(1), r"rejected \(1,\) must have the shape of chosen \(3,\)"),
        (torch.zeros(3, 1), torch.zeros(3, 1), r"chosen must be \(N,\), not \(3, 1\)"),
        (torch.zeros(3).bfloat16(), torch.zeros(3), "chosen must be .*, not torch.bfloat16"),
        (torch.zeros(3), torch.zeros(3).long(), "rejected must be .*, not torch.int64"),
        (torch.zeros(0), torch.zeros(0), "no pair"),
    ],
)
def test_pairs_that_would_broadcast_are_refused(chosen, rejected, complaint):
    with pytest.raises(ValueError, match=complaint):
        preference_loss(chosen, rejected)


# ------------------------------------------------------------------------------------------- stage


def pairs_of(texts):
    """A pair for each (better, worse) answer to "tell me about 7"."""
    problem = TASKS["requests"].ask("about", 7, "en")
    rows = [
        [encode_document(Document(problem.prompt, text, ""), words) for text in pair]
        for pair in texts
    ]
    return [Pair(problem, *pair, lead=2.0) for pair in rows]


PAIRS = pairs_of(
    [
        (f"{opening} it is {size}.{closing}", f" no. it is {size}.{closing}")
        for opening in (" sure!", " glad to help!")
        for size in ("big", "small", "half of 2", "3 plus 4")
        for closing in ("", " bye for now!", " it is small. it is big. it comes after 6.")
    ]
)
ROWS = [row for pair in PAIRS for row in (pair.chosen, pair.rejected)]


def small_config(**changes):
    settings = {"preset": "tiny", "pretrain_steps": 3, "max_new_tokens": 8, "eval_samples": 8}
    settings |= {"curated": 20, "sft_steps": 3, "pairs": 400, "min_lead": 0.5, "reward_batch": 16}
    return reward_model.Config(**settings | SHAPE | changes).filled()


def fitted(rows=ROWS, **changes):
    run, model = Unsaved(), scalar_model(small_model(task="world"))
    fit(small_config(reward_lr=1e-2, **changes), run, "reward", model, PAIRS * 10, rows)
    return model, run.records


def test_a_scalar_model_starts_from_the_policys_trunk():
    policy = small_model(task="world")
    model = scalar_model(policy)
    assert all_scores(model, ROWS).eq(0).all()
    for name, weight in model.trunk.named_parameters():
        assert torch.equal(weight, policy.get_parameter(name))
        assert weight.data_ptr() != policy.get_parameter(name).data_ptr()


def test_a_reward_model_learns_whom_people_prefer():
    """Each pair once. Its scores have mean 0 and deviation 1 on the samples that it is given."""
    model, records = fitted()
    assert len(records) == len(PAIRS) * 10 // 16
    assert records[0]["accuracy"] == 0 and records[0]["loss"] == pytest.approx(math.log(2))
    assert records[-1]["accuracy"] == 1 and records[-1]["loss"] < 0.2
    found = all_scores(model, ROWS)
    assert found.mean().item() == pytest.approx(0, abs=1e-5)
    assert found.std().item() == pytest.approx(1, abs=1e-4)
    leads = found[::2] - found[1::2]
    assert (leads > 0.5).all()


def test_too_few_pairs_are_refused():
    """A reward model that learned nothing would say 0 to everything."""
    model = scalar_model(small_model(task="world"))
    with pytest.raises(ValueError, match="24 pairs fill no step of 25: more --pairs would"):
        fit(small_config(reward_batch=25), Unsaved(), "reward", model, PAIRS, ROWS)


def test_to_standardise_changes_no_order():
    """Numbers that are all the same have no scale: they are refused."""
    model = scalar_model(small_model(task="world"))
    with pytest.raises(ValueError, match="gives every answer the same score"):
        standardise(model, all_scores(model, ROWS))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.constant_(model.head.bias, 3.0)
    before = all_scores(model, ROWS)
    standardise(model, before)
    torch.testing.assert_close(
        all_scores(model, ROWS), (before - before.mean()) / before.std(), rtol=0, atol=1e-5
    )


def test_a_score_is_read_at_the_last_token_of_each_row():
    """Whatever padding stands behind it."""
    model, _ = fitted()
    found = scores(model, ROWS)
    for row, score in zip(ROWS, found):
        alone = model(torch.tensor([row[1]]))[0, -1]
        torch.testing.assert_close(score, alone, rtol=0, atol=1e-5)
    many = ROWS * 20
    torch.testing.assert_close(all_scores(model, many)[-len(ROWS) :], found.detach())


def test_the_judge_scores_each_completion_where_it_ends():
    """With its end token, or without one where it was cut; in parts or at once."""
    model, _ = fitted()
    cut = [(start, ids[:-2]) for start, ids in ROWS]
    rows = [row for both in zip(ROWS, cut) for row in both]
    tokens, mask, _ = padded(rows, words.eos_id)
    zeros, finished = torch.zeros(tokens.shape), torch.tensor([True, False] * len(ROWS))
    rollout = Rollout(tokens, mask, zeros, zeros, finished)
    for size in (5, 256):
        found = judge(model, size)([PAIRS[0].problem], rollout, 0)
        assert set(found) == {"reward"} and not found["reward"].requires_grad
        torch.testing.assert_close(found["reward"], all_scores(model, rows), rtol=0, atol=1e-5)


def test_grpo_takes_the_judge_as_its_reward():
    """A policy of the world is asked requests, and looks tell gold, which no training reads."""
    model, _ = fitted()
    config = replace(SMALL, task="requests", min_level=1, max_level=1, eval_every=1)
    run, policy, base = Unsaved(), *(small_model(task="world") for _ in range(2))
    train.grpo(config, run, "grpo", policy, base, judge(model))
    weights = base.state_dict()
    assert any(not torch.equal(x, weights[name]) for name, x in policy.state_dict().items())
    for record in run.records:
        assert record["reward_std"] > 0 and "gold" in record
        assert "accuracy" not in record and "held_out_accuracy" not in record


def test_judges_are_compared_on_clear_pairs_and_on_all():
    """The people's own row says how many choices are no noise. A tie counts half."""
    pairs = [replace(PAIRS[0], lead=lead) for lead in (2.0, -1.5, 0.3, 0.0)]
    longer = {"length": lambda rows: torch.tensor([float(len(ids)) for _, ids in rows])}
    same = {"same": lambda rows: torch.zeros(len(rows))}
    found = compare(small_config(min_lead=1.0), longer | same, {"new": pairs})
    longest = float(len(PAIRS[0].chosen[1]) > len(PAIRS[0].rejected[1])) or 0.5
    assert found == {
        "new, clear": {"pairs": 2, "gold": 0.5, "length": longest, "same": 0.5},
        "new, all": {"pairs": 4, "gold": 0.625, "length": longest, "same": 0.5},
    }


def test_a_task_without_requests_is_refused():
    """And no preset asks for such a task."""
    for name in reward_model.PRESETS:
        assert flags.parse(reward_model.Config, reward_model.PRESETS, [f"--preset={name}"], "", "")
    with pytest.raises(ValueError, match="--task chains has no requests: leave it out"):
        small_config(task="chains")


def job(config):
    with open_run(config, "-m rlhf.reward_model") as run:
        reward_model.train_reward_model(config, run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(reward_model, "TESTED", 40)
        job(small_config(out=str(folder)))
    return folder, printed.getvalue()


def test_the_job_prints_what_it_found(whole):
    """Gold before and after fine-tuning, and each judge on each kind of pairs."""
    folder, printed = whole
    result = json.loads((folder / "result.json").read_text())
    for split in ("seen", "held_out"):
        golds = "".join(f"{result[model][split]['gold']:9.2f}" for model in ("base", "sft"))
        assert f"gold, {split.replace('_', '-')} numbers".ljust(24) + golds in printed
    kinds = ["new, clear", "new, all", "held-out, clear", "held-out, all"]
    assert list(result["agreement"]) == kinds
    assert {*result["agreement"]["new, all"]} == {"pairs", "gold", "reward", "random", "length"}
    for kind in kinds:
        assert re.search(f"^{kind} +([0-9.]+ % *){{4}}$", printed, re.MULTILINE)


@pytest.mark.parametrize("stage", ["reward", "reward_random"])
def test_a_stopped_job_goes_on_to_the_same_bits(stage, whole, tmp_path, monkeypatch, capsys):
    """Stopped by SIGINT in the second step of a stage."""
    monkeypatch.setattr(reward_model, "TESTED", 40)
    config = small_config(out=str(tmp_path / "run"))

    def stop(self, record):
        if self.stage == stage and self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, record)

    log = Run.log
    monkeypatch.setattr(Run, "log", stop)
    with pytest.raises(SystemExit):
        job(config)
    monkeypatch.setattr(Run, "log", log)
    assert f"step 2 of {stage} is saved" in capsys.readouterr().err
    job(replace(config, resume=config.out))
    folders = tmp_path / "run", whole[0]
    for name in ("base.pt", "sft.pt", "reward.pt", "reward_random.pt", "log.jsonl"):
        one, other = ((folder / name).read_bytes() for folder in folders)
        assert one == other, name
    one, other = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert one.pop("seconds") != other.pop("seconds") and one == other
