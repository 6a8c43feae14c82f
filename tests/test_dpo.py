"""DPO: its losses against loops in float64, and the stage that learns from pairs."""

import copy
import json
import math
import os
import random
import signal
from dataclasses import replace

import pytest
import torch

from data import TASKS, get_tokenizer
from data.corpus import encode_document
from data.problem import Document
from kit.run import Run, open_run
from model import load_model
from rlhf import dpo as room
from rlhf.dpo import DPO_LOSSES, Config, all_answer_logps, answer_logps, dpo, dpo_loss
from rlhf.preferences import Pair, rows_of
from tests.small import SHAPE, SHAPE_FLAGS, Unsaved, small_model

REQUESTS, words = TASKS["requests"], get_tokenizer("world")

FORMULAS = {  # of the gap h and beta, as the papers write them
    "sigmoid": lambda h, beta: math.log(1 + math.exp(-beta * h)),
    "ipo": lambda h, beta: (h - 1 / (2 * beta)) ** 2,
}


def random_pairs(N=7, seed=0):
    """Sums of log-probabilities: chosen and rejected, of the policy and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(N, generator=generator, dtype=torch.float64) for _ in range(4)]


def gaps(logps):
    chosen, rejected, ref_chosen, ref_rejected = (x.tolist() for x in logps)
    return [
        (chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i]) for i in range(len(chosen))
    ]


@pytest.mark.parametrize("kind", DPO_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_equals_the_papers_equations(kind, smoothing, beta):
    logps = random_pairs()
    loss, metrics = dpo_loss(*logps, beta=beta, label_smoothing=smoothing, kind=kind)
    formula, h = FORMULAS[kind], gaps(logps)
    right = [(1 - smoothing) * formula(x, beta) + smoothing * formula(-x, beta) for x in h]
    assert loss.item() == pytest.approx(sum(right) / 7, rel=1e-12)
    assert metrics["margin"].item() == pytest.approx(sum(beta * x for x in h) / 7, rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(sum(x > 0 for x in h) / 7)


@pytest.mark.parametrize("kind", DPO_LOSSES)
def test_gradients_equal_finite_differences(kind):
    """And none flows into the reference."""
    logps, step = [x.requires_grad_() for x in random_pairs()], 1e-6
    dpo_loss(*logps, label_smoothing=0.1, kind=kind)[0].backward()
    assert logps[2].grad is None and logps[3].grad is None
    for which in (0, 1):
        for i in range(7):
            ends = []
            for sign in (1, -1):
                moved = [x.detach().clone() for x in logps]
                moved[which][i] += sign * step
                ends.append(dpo_loss(*moved, label_smoothing=0.1, kind=kind)[0].item())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert logps[which].grad[i].item() == pytest.approx(slope, abs=1e-7)
            assert abs(slope) > 1e-4


def test_at_the_start_nothing_is_preferred():
    """The policy is the reference: log 2, a margin of 0, and no pair is right by a tie."""
    chosen, rejected, *_ = random_pairs()
    loss, metrics = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone())
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0


def test_ipo_and_smoothing_stop_where_dpo_goes_on():
    """With sure labels DPO wants ever more; IPO wants 1 / (2 beta) nats, cDPO the margin whose
    sigmoid is the share of right labels."""

    def slope(gap, **how):
        chosen = torch.tensor([float(gap)], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        dpo_loss(chosen, zero, zero, zero, beta=0.1, **how)[0].backward()
        return chosen.grad.item()

    assert slope(100) < 0
    assert slope(5, kind="ipo") == pytest.approx(0, abs=1e-12) and slope(9, kind="ipo") > 0
    assert slope(10 * math.log(0.9 / 0.1), label_smoothing=0.1) == pytest.approx(0, abs=1e-12)


def test_bad_pairs_and_settings_are_refused():
    logps, one = random_pairs(), torch.zeros(1, dtype=torch.float64)
    for i, name in enumerate(
        ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    ):
        with pytest.raises(ValueError, match=f"{name}.* must" if i else "must have the shape of"):
            dpo_loss(*(one if j == i else x for j, x in enumerate(logps)))
        with pytest.raises(ValueError, match=f"{name} must be .*, not torch.float16"):
            dpo_loss(*(x.half() if j == i else x for j, x in enumerate(logps)))
    with pytest.raises(ValueError, match=r"chosen_logps must be \(N,\), not \(7, 1\)"):
        dpo_loss(*(x[:, None] for x in logps))
    with pytest.raises(ValueError, match="no pair"):
        dpo_loss(*(x[:0] for x in logps))
    for how, complaint in (
        ({"kind": "hinge"}, '"hinge" is not among sigmoid, ipo'),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": math.nan}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": -0.1}, "from 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            dpo_loss(*logps, **how)


# ------------------------------------------------------------------------------------------- stage


def pairs_of(count, seed, right=1.0):
    """Polite answers are chosen, and rude answers are rejected; the other way round in the share
    1 - right of the pairs."""
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        problem = REQUESTS.problem(rng)
        said = REQUESTS.good_answer(rng, problem)
        texts = [f" sure!{said}", f" no.{said}"]
        if rng.random() > right:
            texts.reverse()
        rows = [encode_document(Document(problem.prompt, text, ""), words) for text in texts]
        pairs.append(Pair(problem, *rows, lead=1.0))
    return pairs


def config_of(**changes):
    how = {"preset": "tiny", "task": "world", "reward_batch": 4, "eval_every": 2}
    how |= {"dpo_lr": 3e-3, "dpo_beta": 0.2}
    return Config(**how | SHAPE | changes).filled()


class Copied(Unsaved):
    """Keeps the models as they were when they were written."""

    def write_model(self, name, model):
        self.written[name] = copy.deepcopy(model)


def run_dpo(pairs, held_out, **changes):
    run, policy = Copied(), small_model(task="world")
    dpo(config_of(**changes), run, "dpo", policy, small_model(task="world"), pairs, held_out)
    return policy, run


def equal(one, two):
    return all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))


def summed_logp(model, row):
    """Word by word."""
    start, ids = row
    logps = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(start, len(ids)))


def test_an_answers_log_probability_is_the_sum_over_its_tokens():
    """The end token counts, the prompt does not, nor does padding; in parts or at once."""
    model, rows = small_model(task="world"), rows_of(pairs_of(3, 0))
    assert len({len(ids) for _, ids in rows}) > 1 and all(r[1][-1] == words.eos_id for r in rows)
    expected = torch.tensor([summed_logp(model, row) for row in rows])
    torch.testing.assert_close(answer_logps(model, rows), expected, rtol=0, atol=1e-3)
    many = all_answer_logps(model, rows * 50)
    torch.testing.assert_close(many.view(50, -1)[-1], expected, rtol=0, atol=1e-3)


def test_both_log_probabilities_are_logged():
    """Of the policy before each update, and of held-out pairs at each look."""
    pairs, held_out = pairs_of(12, 0), pairs_of(5, 1)
    _, run = run_dpo(pairs, held_out)
    model = small_model(task="world")
    for name, side in (("chosen", "chosen"), ("rejected", "rejected")):
        expected = sum(summed_logp(model, getattr(pair, side)) for pair in pairs[:4]) / 4
        assert run.records[0][f"{name}_logps"] == pytest.approx(expected, abs=1e-3)
        learned = run.written["dpo_2.pt"]
        expected = sum(summed_logp(learned, getattr(pair, side)) for pair in held_out) / 5
        assert run.records[1][f"held_out_{name}_logps"] == pytest.approx(expected, abs=1e-3)
    assert [list(run.written), [r["step"] for r in run.records]] == [
        ["dpo_2.pt", "dpo_3.pt"],
        [1, 2, 3],
    ]


def test_dpo_learns_from_pairs_what_held_out_pairs_say():
    """At first the policy is the reference: log 2. The reference stays."""
    policy, run = run_dpo(pairs_of(80, 0), pairs_of(20, 1))
    first, last = run.records[0], run.records[-1]
    assert first["loss"] == pytest.approx(math.log(2)) and first["margin"] == 0
    assert last["held_out_accuracy"] == 1 and last["held_out_loss"] < 0.3 and last["margin"] > 1
    assert not equal(policy, small_model(task="world"))


def test_the_best_step_by_held_out_pairs_is_kept():
    """Some held-out pairs are the other way round, so that what goes on too far gets worse."""
    policy, run = run_dpo(pairs_of(80, 0), pairs_of(20, 1, right=0.8), dpo_lr=1e-2)
    looks = {r["step"]: r["held_out_loss"] for r in run.records if "held_out_loss" in r}
    best = min(looks, key=looks.get)
    assert 2 < best < 20 and looks[20] > looks[best] + 0.1
    assert equal(policy, run.written[f"dpo_{best}.pt"])
    assert not equal(policy, run.written["dpo_20.pt"])


def test_a_policy_that_only_gets_worse_stays():
    policy, run = run_dpo(pairs_of(20, 0), pairs_of(20, 1, right=0.0))
    assert equal(policy, small_model(task="world"))
    assert not equal(policy, run.written["dpo_5.pt"])


def test_the_kind_of_loss_its_beta_and_smoothing_are_the_configs():
    pairs, held_out = pairs_of(4, 0), pairs_of(5, 1)
    for changes, first in (
        ({"dpo_loss": "ipo", "dpo_beta": 0.25}, 4.0),
        ({"label_smoothing": 0.2}, math.log(2)),
    ):
        _, run = run_dpo(pairs, held_out, **changes)
        assert run.records[0]["loss"] == pytest.approx(first)
        rows, models = rows_of(held_out), (run.written["dpo_1.pt"], small_model(task="world"))
        logps, ref_logps = (all_answer_logps(model, rows).chunk(2) for model in models)
        how = {"beta": config_of().dpo_beta, "kind": "sigmoid", "label_smoothing": 0.0}
        how |= {name.removeprefix("dpo_"): x for name, x in changes.items()}
        how["kind"] = how.pop("loss", how["kind"])
        expected = dpo_loss(*logps, *ref_logps, **how)[0].item()
        assert run.records[0]["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="3 pairs fill no step of 4: more --pairs would"):
        run_dpo(pairs_of(3, 0), pairs_of(5, 1))


def job(config):
    with open_run(config, "-m rlhf.dpo") as run:
        policy, reference = small_model(task="world"), small_model(task="world")
        dpo(config, run, "dpo", policy, reference, pairs_of(40, 0), pairs_of(20, 1, right=0.8))
    return policy


@pytest.mark.parametrize("stops", [[0], [3, 4], [8]], ids=str)
def test_a_stopped_dpo_ends_as_one_that_never_was(stops, tmp_path, monkeypatch, capsys):
    """Before a look, at it, after the best step; with what learns, the best, and its loss."""
    config = config_of(out=str(tmp_path / "whole"), dpo_lr=1e-2)
    whole, log = job(config), Run.log
    looks = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    looks = {each["step"]: each.get("held_out_loss", math.inf) for each in looks}
    assert 2 < min(looks, key=looks.get) < 9
    config = replace(config, out=str(tmp_path / "run"))
    for stop in stops:

        def stopped(self, record, stop=stop):
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGINT)
            log(self, record)

        monkeypatch.setattr(Run, "log", stopped)
        with pytest.raises(SystemExit):
            job(config)
        config = replace(config, resume=config.out)
    monkeypatch.setattr(Run, "log", log)
    resumed = job(config)
    capsys.readouterr()
    assert equal(resumed, whole)
    for name in ("dpo.pt", "dpo_2.pt", "dpo_10.pt", "log.jsonl"):
        one, other = ((tmp_path / x / name).read_bytes() for x in ("run", "whole"))
        assert one == other, name
    assert equal(job(config), whole)  # and a stage that has ended comes back as its best


def test_the_command_leaves_the_best_model_and_gold_of_both(tmp_path, capsys):
    few = ["--pretrain_steps=2", "--sft_steps=2", "--pairs=60", "--min_lead=0.3"]
    few += ["--max_new_tokens=8", "--reward_batch=8", "--curated=20", f"--out={tmp_path / 'run'}"]
    room.main(["--preset=tiny", *few, *SHAPE_FLAGS])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"sft", "dpo"} < set(result)
    printed = capsys.readouterr().out
    for split, name in (("seen", "seen"), ("held_out", "held-out")):
        golds = "".join(f"{result[model][split]['gold']:9.2f}" for model in ("sft", "dpo"))
        assert f"gold, {name} numbers".ljust(24) + golds in printed
    load_model(tmp_path / "run" / "dpo.pt")
