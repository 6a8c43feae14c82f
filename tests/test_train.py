"""The gradient of a step, the GRPO loop, and the job from end to end."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from data import TASKS, get_tokenizer
from data.chains import is_for_training, is_held_out
from data.corpus import document_batches
from grpo import (
    KL_ESTIMATORS,
    VARIANTS,
    Variant,
    clipped_surrogate,
    group_advantages,
    loss_normalizer,
    policy_loss,
    token_logps,
)
from kit import flags
from kit.captured import CapturedDecoder
from kit.run import open_run
from model import load_model, save_model
from sample import generate
from tests.small import (
    CHAINS,
    SHAPE_FLAGS,
    SMALL,
    Unsaved,
    by_length,
    rollout_of,
    run_grpo,
    small_model,
    tokenizer,
)
from train import Config, add_gradient, learning_rate, loss_inputs, rules

ROOT = Path(__file__).parent.parent
ROWS = np.arange(16)


def small_rollout(model, config=SMALL, step=1, ragged=False):
    """What a model says to the problems of a step; ragged: as if some rows had ended early, which a
    random model's seldom do."""
    _, rollout = train.sample(config, model, step)
    if ragged:
        rollout.mask &= rollout.mask.cumsum(dim=1) <= torch.arange(16)[:, None] % 11 + 1
    return rollout


def gradient_of(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()]).clone()


def random_advantages(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(2.0, step, 100, warmup=10, decay_from=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[49] == 2.0
    assert rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True)
    assert 0.04 <= rates[-1] < 0.05


def test_a_completion_is_scored_against_its_own_problem():
    """Rows of one prompt are adjacent: the second prompt's answer earns nothing among the
    first's."""
    problems = [CHAINS.ask("1 + 2 + 3"), CHAINS.ask("9 - 2 - 5")]
    one, two = (f"<think> x</think><answer>{problem.answer}</answer>" for problem in problems)
    rollout = rollout_of(problems, [one, two, "", two, two, one])
    rewards = rules({"accuracy": 2.0, "format": 0.5}, tokenizer)(problems, rollout, 0)
    assert rewards["accuracy"].tolist() == [1, 0, 0, 1, 1, 0]
    assert rewards["format"].tolist() == [1, 1, 0, 1, 1, 1]
    assert rewards["reward"].tolist() == [2.5, 0.5, 0, 2.5, 2.5, 0.5]


def test_a_rule_may_count(monkeypatch):
    """Whole numbers, or True and False, are rewards like any other."""
    monkeypatch.setitem(train.RULES, "waits", lambda text, problem: text.count("wait"))
    monkeypatch.setitem(train.RULES, "short", lambda text, problem: len(text) < 9)
    problems = [CHAINS.ask("1 + 2 + 3")]
    rollout = rollout_of(problems, [" wait wait", " 3"])
    rewards = rules({"waits": 1.0, "short": 2.0}, tokenizer)(problems, rollout, 0)
    assert rewards["reward"].tolist() == [2.0, 2.0] and rewards["short"].tolist() == [0.0, 1.0]


def test_the_language_rule_is_about_the_questions_language():
    """A rule of weight 0 is logged and pays nothing; a rule that is not named is not there."""
    chains = TASKS["chains-en-ko"]
    problems = [chains.ask("1 + 2"), chains.ask("1 + 2", "ko")]
    text = "<think>\n#1 1 plus 1 is 2\n#2 2 plus 1 is 3</think><answer> 3</answer>"
    rollout = rollout_of(problems, [text, text])
    for weight in (0.0, 0.5):
        rewards = rules({"accuracy": 1.0, "language": weight}, get_tokenizer("chains-en-ko"))(
            problems, rollout, 0
        )
        assert list(rewards) == ["reward", "accuracy", "language"]
        assert rewards["language"].tolist() == [1, 0]
        assert rewards["reward"].tolist() == [1 + weight, 1]


# --------------------------------------------------------------------------- the gradient of a step


@pytest.mark.parametrize("micro_batch", [1, 5, 16])
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), *((0.1, kl) for kl in KL_ESTIMATORS)])
def test_the_gradient_does_not_depend_on_micro_batches(micro_batch, beta, kl):
    """Rows are sorted, cut and trimmed; prompts have four lengths; ratios are not 1."""
    config = replace(SMALL, max_level=5, micro_batch=micro_batch, beta=beta, kl=kl)
    model, other = small_model().double(), small_model(9).double()
    rollout, advantages = small_rollout(other, config, ragged=True), random_advantages(16)
    inputs, _ = loss_inputs(config, model, None, rollout, advantages)
    if beta:
        inputs["ref_logps"] = token_logps(other(rollout.tokens), rollout.tokens).detach()
    rows = np.array([3, 14, 1, 8, 0, 11, 6, 9, 10, 2])

    logps = token_logps(model(rollout.tokens), rollout.tokens)[rows]
    loss, metrics = policy_loss(
        logps,
        advantages[rows],
        rollout.mask[rows],
        old_logps=rollout.logps[rows],
        ref_logps=inputs["ref_logps"][rows] if beta else None,
        beta=beta,
        kl=kl,
        normalizer=loss_normalizer(rollout.mask[rows]),
    )
    loss.backward()
    expected = gradient_of(model)
    model.zero_grad()
    sums = add_gradient(config, model, rollout, inputs, rows, np.full(16, True))
    torch.testing.assert_close(gradient_of(model), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-4
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, value in metrics.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_an_advantage_cost_nothing(variant):
    """They do not go through the model, and the gradient is the same. With a KL all rows count."""
    config = replace(SMALL, max_level=5, variant=variant, micro_batch=4, minibatches=1)
    model, other = small_model().double(), small_model(9).double()
    rollout, advantages = small_rollout(other, config, ragged=True), random_advantages(16)
    advantages[[0, 1, 2, 3, 8, 9, 10, 11, 15]] = 0
    logps = token_logps(model(rollout.tokens), rollout.tokens)
    old_logps = None if VARIANTS[variant].ratio is None else rollout.logps
    how = {"old_logps": old_logps, "variant": variant, "max_tokens": config.max_new_tokens}
    policy_loss(logps, advantages, rollout.mask, **how)[0].backward()
    expected = gradient_of(model)
    model.zero_grad()

    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    inputs, teaches = loss_inputs(config, model, None, rollout, advantages)
    sums = add_gradient(config, model, rollout, inputs, ROWS, teaches)
    assert sum(seen) == 7 and max(seen) <= 4
    assert sums["tokens"] == rollout.mask[teaches].sum()
    torch.testing.assert_close(gradient_of(model), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-4

    seen.clear()
    config = replace(config, beta=0.1)
    model, rollout = small_model(), small_rollout(small_model(9), config)
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    inputs, teaches = loss_inputs(config, model, small_model(9), rollout, advantages)
    add_gradient(config, model, rollout, inputs, ROWS, teaches)
    assert sum(seen) == 16, "the KL is one of all rows"


def test_advantages_by_token_train_as_the_loss_says():
    """Also where an output's first token, or all but its last, has the advantage 0."""
    config, model, other = replace(SMALL, micro_batch=3), small_model().double(), small_model(9)
    rollout = small_rollout(other, config, ragged=True)
    advantages = random_advantages(*rollout.mask.shape).double()
    advantages[torch.arange(16), rollout.starts] = 0
    advantages[5, : rollout.ends[5] - 1] = 0
    advantages[6] = 0
    advantages[7] = torch.where(rollout.mask[7], 0, 9.0)  # nothing on its tokens: it is silent too
    logps = token_logps(model(rollout.tokens), rollout.tokens)
    loss, _ = policy_loss(logps, advantages, rollout.mask, old_logps=rollout.logps)
    loss.backward()
    expected = gradient_of(model)
    model.zero_grad()
    inputs, teaches = loss_inputs(config, model, None, rollout, advantages)
    silent = {6, 7} | {row for row in range(16) if rollout.ends[row] - rollout.starts[row] == 1}
    assert set(np.flatnonzero(~teaches)) == silent
    sums = add_gradient(config, model, rollout, inputs, ROWS, teaches)
    torch.testing.assert_close(gradient_of(model), expected, rtol=0, atol=1e-10)
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_advantages_by_token_go_through_the_loop():
    """The same number for each token of an output trains as one number for the output."""

    def by_token(config, rewards, rollout):
        return train.outcome_advantages(config, rewards, rollout)[:, None] * rollout.mask

    config = replace(SMALL, minibatches=3)
    by_row, _ = run_grpo(config, by_length)
    same, records = run_grpo(config, by_length, advantage=by_token)
    assert all(map(torch.equal, by_row.parameters(), same.parameters()))
    assert records[0]["grad_norm"] > 0

    def late(config, rewards, rollout):
        return by_token(config, rewards, rollout) * (rollout.mask.cumsum(dim=1) > 3)

    other, records = run_grpo(config, by_length, advantage=late)
    assert records[0]["grad_norm"] > 0
    assert not torch.equal(other.embedding.weight, by_row.embedding.weight)


def test_the_head_reads_no_prompt_but_its_last_token():
    config = replace(SMALL, max_level=5, micro_batch=4)
    model, seen = small_model(), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    rollout = small_rollout(model, config)  # the 4 rows of a prompt, of one length: a micro-batch
    prompts = rollout.starts[::4]
    assert len(set(prompts)) == 4 and seen[0] == prompts.max() - prompts.min() + 1, "the prefill"
    inputs, teaches = loss_inputs(config, model, None, rollout, torch.ones(16))
    for size, expected in ((4, [0] * 4), (16, [prompts.max() - prompts.min()])):
        seen.clear()
        config = replace(config, micro_batch=size)
        add_gradient(config, model, rollout, inputs, ROWS, teaches)
        assert seen == [config.max_new_tokens + 1 + more for more in expected]


def test_the_reference_speaks_of_every_row_of_a_rollout():
    base, policy = small_model(), small_model(9)
    for temperature in (1.0, 0.7):
        config = replace(SMALL, micro_batch=5, beta=0.1, temperature=temperature)
        rollout = small_rollout(policy, config)
        inputs, _ = loss_inputs(config, policy, base, rollout, torch.zeros(16))
        logps = token_logps(base(rollout.tokens), rollout.tokens, temperature) * rollout.mask
        torch.testing.assert_close(inputs["ref_logps"], logps, rtol=0, atol=1e-5)
        assert (inputs["ref_logps"] - rollout.logps).abs().max() > 0.01


def test_a_step_without_any_advantage_is_one_of_zero_gradient():
    """AdamW's momentum goes on in it, as it does where all rows go through the model."""
    model = small_model()
    rollout, optimizer = small_rollout(model), train.make_optimizer(model)

    def step(advantages):
        inputs, teaches = loss_inputs(SMALL, model, None, rollout, advantages)
        sums = add_gradient(SMALL, model, rollout, inputs, ROWS, teaches)
        gradient = gradient_of(model)
        train.optimizer_step(model, optimizer, 0.01, 1.0)
        return sums, gradient

    step(torch.randn(16))
    before = [weight.detach().clone() for weight in model.parameters()]
    sums, gradient = step(torch.zeros(16))
    assert sums["tokens"] == 0 == sums["loss"]
    assert not gradient.any()
    moved = [(weight - old).abs().max() for weight, old in zip(model.parameters(), before)]
    assert max(moved) > 1e-3


def test_in_bfloat16_the_old_log_probabilities_are_the_trainers():
    """Sampler and trainer round differently there, which as a ratio would be noise."""
    model = small_model()
    model.in_bfloat16 = True
    rollout = small_rollout(model)
    inputs, _ = loss_inputs(SMALL, model, None, rollout, torch.ones(16))
    with torch.no_grad():
        trained = token_logps(model(rollout.tokens), rollout.tokens) * rollout.mask
    assert inputs["old_logps"].dtype == torch.float32
    assert (inputs["old_logps"] - trained).abs().max() < (rollout.logps - trained).abs().max()
    model = small_model()
    model.in_bfloat16 = True
    _, records = run_grpo(replace(SMALL, steps=1, minibatches=1), by_length, policy=model)
    assert records[0]["ratio"] == pytest.approx(1, abs=1e-2)
    assert 0 < records[0]["logp_gap"] < 0.1


# ------------------------------------------------------------------------------------ the GRPO loop


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_though_the_policy_moves(temperature):
    """At a temperature that is not 1, so that forgetting it anywhere shows."""
    how = {"steps": 3, "lr": 1e-2, "temperature": temperature, "beta": 0.01, "minibatches": 2}
    config = replace(SMALL, **how)
    model, records = run_grpo(config, by_length)
    assert len(records) == 3
    assert all(record["logp_gap"] < 1e-4 for record in records)
    assert (model.embedding.weight - small_model().embedding.weight).abs().max() > 1e-3
    _, first = run_grpo(replace(config, steps=1, minibatches=1), by_length)
    assert first[0]["k3_ref"] == pytest.approx(0, abs=1e-7)
    assert first[0]["ratio"] == pytest.approx(1, abs=1e-5)


def test_logp_gap_shows_a_sampler_that_disagrees():
    """The bug that this number is for: sampling at one temperature and training at another."""

    def hot(*args, **kwargs):
        return generate(*args, **kwargs | {"temperature": 1.3})

    _, records = run_grpo(
        replace(SMALL, steps=1), by_length, sample=partial(train.sample, generate=hot)
    )
    assert records[0]["logp_gap"] > 1e-3


def test_each_step_has_new_training_problems_and_new_noise():
    steps, seeds = [], []

    def generate_and_note(*args, **kwargs):
        seeds.append(kwargs["seed"])
        return generate(*args, **kwargs)

    def noted(*args):
        steps.append(train.sample(*args, generate=generate_and_note)[0])
        return steps[-1], small_rollout(args[1])

    run_grpo(replace(SMALL, steps=3, eval_every=100), sample=noted)
    assert len({tuple(problem.expression for problem in problems) for problems in steps}) == 3
    assert all(is_for_training(problem.expression) for problems in steps for problem in problems)
    assert len(set(seeds)) == 3


def test_advantages_are_of_the_reward_and_no_other_tensor():
    """A rule that pays nothing must teach nothing, however it varies."""

    def reward(problems, rollout, step):
        others = by_length(problems, rollout, step)["accuracy"]
        return {"reward": torch.ones(len(others)), "accuracy": others, "format": others}

    model, records = run_grpo(replace(SMALL, steps=1), reward)
    assert records[0]["no_signal"] == 1 and records[0]["grad_norm"] == 0
    assert all(map(torch.equal, model.parameters(), small_model().parameters()))


def test_every_row_is_trained_once_in_each_epoch(monkeypatch):
    """By fresh, clipped steps of the logged rate. A row is known by its advantage."""
    seen, clean, clipped, policy = [], [], [], small_model()

    def normalizer(mask, max_tokens):
        clean.append(not any(weight.grad.any() for weight in policy.parameters()))
        seen.append([])
        return len(mask)

    def surrogate(ratio, logps, advantages, low, high):
        if low != float("inf"):  # called once more, with infinite bounds, to count clipped tokens
            seen[-1].extend(int(number) for number in advantages.amax(dim=1))
        return clipped_surrogate(ratio, logps, advantages, low, high)

    honest = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm().item()
        clipped.append((norm, {group["lr"] for group in optimizer.param_groups}))
        return honest(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    noting = Variant("a test", normalizer=normalizer, surrogate=surrogate)
    monkeypatch.setitem(VARIANTS, "noting", noting)
    how = {"variant": "noting", "minibatches": 3, "inner_epochs": 2, "max_grad_norm": 0.5}
    config = replace(SMALL, **how, lr=0.02, micro_batch=3, eval_every=100)
    numbered = {
        "advantage": lambda config, rewards, rollout: torch.arange(1.0, len(rollout.mask) + 1)
    }
    _, records = run_grpo(config, by_length, policy, **numbered)
    assert len(seen) == len(clipped) == 2 * 2 * 3
    for first in range(0, 12, 3):
        assert sorted(itertools.chain(*seen[first : first + 3])) == list(range(1, 17))
    assert len({str(seen[first : first + 3]) for first in range(0, 12, 3)}) == 4, "orders differ"
    assert all(clean), "the gradients of one update do not reach the next"
    assert max(norm for norm, _ in clipped) <= 0.5 + 1e-5
    assert max(record["grad_norm"] for record in records) > 0.5, "something should be clipped"
    assert [rates for _, rates in clipped] == [{r["lr"]} for r in records for _ in range(6)]


def test_the_variant_decides_the_scale_of_the_advantages(monkeypatch):
    seen = []

    def surrogate(ratio, logps, advantages, low, high):
        seen.append((advantages.amax(dim=1) + advantages.amin(dim=1), low, high))
        return clipped_surrogate(ratio, logps, advantages, low, high)

    row = Variant("a test", scale="none", surrogate=surrogate, clip_low=0.1, clip_high=0.3)
    monkeypatch.setitem(VARIANTS, "plain", row)
    given = []

    def reward(*args):
        given.append(by_length(*args))
        return given[-1]

    config = replace(SMALL, steps=1, minibatches=1, micro_batch=16, variant="plain")
    run_grpo(config, reward)
    groups = given[0]["reward"].view(4, 4)  # of the rollout: it comes before the first look
    expected = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    found, low, high = seen[0]
    torch.testing.assert_close(found.sort().values, expected[expected != 0].sort().values)
    assert (low, high) == (0.1, 0.3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_trains_from_its_row_alone(variant):
    on_policy = VARIANTS[variant].ratio is None
    how = {"variant": variant, "minibatches": 1 if on_policy else 2, "kl": "k3_ratio"}
    model, records = run_grpo(replace(SMALL, **how, beta=0.01, lr=1e-2), by_length)
    assert (model.embedding.weight - small_model().embedding.weight).abs().max() > 1e-3
    for name in ("ratio", "clip_low", "clip_high", "k1_old", "k3_old"):
        assert (name in records[0]) == (not on_policy)
    names = {"k1_ref", "k3_ref", "weight_norm", "grad_norm", "logp_gap", "entropy", "no_signal"}
    assert names | {"reward_std", "accuracy_std", "format_std"} <= set(records[0])


def test_dr_grpo_is_divided_by_the_limit_of_tokens():
    config = replace(SMALL, variant="dr_grpo")
    model = small_model()
    rollout = small_rollout(model, config, ragged=True)
    inputs, teaches = loss_inputs(config, model, None, rollout, torch.ones(16))
    sums = add_gradient(config, model, rollout, inputs, ROWS[:6], teaches)
    tokens = rollout.mask[:6].sum().item()
    assert sums["loss"] == pytest.approx(-tokens / (6 * config.max_new_tokens), rel=1e-4)


@pytest.mark.parametrize("minibatches", [1, 4])
def test_an_update_that_breaks_the_weights_stops_grpo(minibatches):
    """At once, though the loss before it was fine."""
    with pytest.raises(
        FloatingPointError, match=r"r1_zero stopped at step 1: weight_norm is (nan|inf)"
    ):
        run_grpo(replace(SMALL, lr=1e300, minibatches=minibatches, steps=1), by_length)


def test_the_reference_is_the_base_model_until_it_is_refreshed():
    changes = {"steps": 3, "minibatches": 1, "beta": 0.01, "lr": 1e-2}
    _, kept = run_grpo(replace(SMALL, **changes), by_length)
    assert kept[0]["k3_ref"] == pytest.approx(0, abs=1e-7)
    assert 0 < kept[1]["k3_ref"] < kept[2]["k3_ref"]
    _, refreshed = run_grpo(replace(SMALL, **changes, reference_every=2), by_length)
    assert refreshed[1]["k3_ref"] == kept[1]["k3_ref"]
    assert refreshed[2]["k3_ref"] == pytest.approx(0, abs=1e-7)


def test_refreshing_the_reference_changes_no_base_model():
    """The reference is a copy of it: looks measure the distance from the base model itself."""
    base, policy = small_model(), small_model()
    config = replace(SMALL, steps=3, beta=0.01, lr=1e-2, reference_every=1)
    train.grpo(config, Unsaved(), "r1_zero", policy, base, by_length)
    assert all(map(torch.equal, base.parameters(), small_model().parameters()))
    assert not torch.equal(base.embedding.weight, policy.embedding.weight)


def test_more_minibatches_than_rows_are_as_many_as_rows():
    _, records = run_grpo(
        replace(SMALL, prompts=1, group_size=2, minibatches=5, steps=1), by_length
    )
    assert records[0]["grad_norm"] >= 0


def test_rewards_and_rollouts_of_another_shape_are_refused():
    """At the first step, not at the first look."""

    def by_token(problems, rollout, step):
        return {"reward": rollout.mask.float(), "accuracy": rollout.mask.float()}

    with pytest.raises(ValueError, match=r'rewards\["reward"\] must be \(16,\), a number a row'):
        run_grpo(SMALL, by_token)

    def fewer(config, policy, step):
        return train.sample(replace(config, group_size=2), policy, step)

    with pytest.raises(
        ValueError, match=r"advantages must be \(B,\) or \(B, T\), \(16, \d+\), not"
    ):
        run_grpo(SMALL, by_length, advantage=lambda config, rewards, rollout: torch.ones(16, 1))

    with pytest.raises(ValueError, match=r"the rollout must have 16 rows, P \* G, not 8"):
        run_grpo(SMALL, by_length, sample=fewer)


def test_imitation_reads_the_positions_of_a_batch():
    """The same tokens at other positions give other gradients, and so other weights."""
    tokens = torch.randint(300, 340, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def learned(positions):
        model = small_model()
        train.imitate(SMALL, Unsaved(), "base", model, lambda _: (tokens, mask, positions), 1, 1e-2)
        return model.embedding.weight

    usual, jumps = torch.arange(8).expand(3, 8), torch.arange(8).expand(3, 8) * 5
    torch.testing.assert_close(learned(usual), learned(None))
    assert (learned(jumps) - learned(None)).abs().max() > 1e-3


def test_the_log_of_imitation_tells_how_well_verdicts_are_known():
    """Their mean probability over the steps of a line, not of a question's words; no number for a
    task without them."""
    model, run = small_model(task="signs"), Unsaved()
    encode = get_tokenizer("signs").encode
    rows = [encode(f" no : 3{word} 3") for word in (" yes", " no", " :", " yes")]
    batches = [torch.tensor(rows[:3]), torch.tensor(rows[2:3]), torch.tensor(rows[3:])]  # 2, 0, 1
    with torch.no_grad():
        probs = [token_logps(model(x), x)[:, 3].exp() for x in batches]
    expected = torch.cat([probs[0][:2], probs[2]]).mean()
    given = [(x, (torch.arange(5) > 0).expand(x.shape), None) for x in batches]
    config = replace(SMALL, task="signs")
    train.imitate(config, run, "base", model, given.__getitem__, 3, 0.0)
    (record,) = run.records
    assert record["verdict_prob"] == pytest.approx(expected.item(), rel=1e-6)

    web, run = document_batches("chains", range(1, 3), 0, 512, 96), Unsaved()
    train.imitate(SMALL, run, "base", small_model(), web, 3, 0.0)
    assert "verdict_prob" not in run.records[-1]


def test_the_rates_rise_stay_and_fall_as_they_should():
    """Of GRPO over 5 steps and in the last 40 %; of imitation over a tenth of the steps."""
    _, records = run_grpo(replace(SMALL, steps=20, lr=1e-3, prompts=2, group_size=2, eval_every=99))
    rates = [1e3 * record["lr"] for record in records]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1] * 9 + [x / 8 for x in range(7, 0, -1)])
    run, seen, honest = Unsaved(), [], torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        groups = optimizer.param_groups
        seen.append(groups[0]["lr"])
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert {weight.dim() for weight in groups[1]["params"]} == {1}
        return honest(optimizer, *args, **kwargs)

    web = document_batches("chains", range(1, 3), 0, 512, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train.imitate(SMALL, run, "base", small_model(), web, 40, 1.0)
    assert seen[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert seen[12] == 1 and seen[13] < 1 and seen[-1] == pytest.approx(1 / 28)


def test_inner_epochs_move_the_ratio_away_from_1():
    _, once = run_grpo(replace(SMALL, steps=1, minibatches=1, lr=3e-2), by_length)
    assert once[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert "k3_ref" not in once[0]
    config = replace(SMALL, steps=1, minibatches=1, inner_epochs=3, lr=3e-2)
    _, thrice = run_grpo(config, by_length)
    assert abs(thrice[0]["ratio"] - 1) > 1e-4


def test_the_seed_alone_decides_the_run():
    def weights(config):
        return run_grpo(config, by_length)[0].embedding.weight

    torch.manual_seed(0)
    one = weights(SMALL)
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(one, weights(SMALL))
    assert not torch.equal(one, weights(replace(SMALL, seed=1)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_look_tells_accuracy_and_kl_at_temperature_1(temperature):
    """On held-out problems. Its first few are written down: tokens, rewards, advantages."""
    config, base, policy = (
        replace(SMALL, max_level=3, temperature=temperature),
        *map(small_model, (0, 5)),
    )
    run, asked = Unsaved(), []
    next(run.steps("r1_zero", 1, policy))

    def reward(problems, rollout, step):
        asked.append((problems, rollout))
        return by_length(problems, rollout, step)

    how = (reward, train.outcome_advantages)
    found = train.look_at_held_out(config, run, 0, base, base, *how)
    assert found["base_kl"] == pytest.approx(0, abs=1e-6), "it is the base"
    found = train.look_at_held_out(config, run, 1, policy, base, *how)
    assert asked[0][0] == asked[1][0], "the same problems at each look"
    problems, rollout = asked[1]
    assert all(is_held_out(problem.expression) for problem in problems)
    terms = []
    with torch.no_grad():
        for tokens, mask in zip(rollout.tokens, rollout.mask):
            one, two = (model(tokens[None])[0].log_softmax(-1) for model in (policy, base))
            terms += [
                one[t - 1, tokens[t]] - two[t - 1, tokens[t]] for t in mask.nonzero().flatten()
            ]
    assert found["base_kl"] == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    assert found["base_kl"] > 1e-3
    right = rules({"accuracy": 1.0}, tokenizer)(problems, rollout, 0)["accuracy"]
    assert found["held_out_accuracy"] == right.mean().item()

    look = run.looks[-1]
    rewards = by_length(problems, rollout, 0)["reward"]
    advantages = group_advantages(rewards, config.group_size)
    assert [said["prompt"] for said in look["problems"]] == [p.prompt for p in problems[:3]]
    told = [each for said in look["problems"] for each in said["completions"]]
    for row, each in enumerate(told):
        mask = rollout.mask[row]
        ids = rollout.tokens[row][mask].tolist()
        assert each["tokens"] == [tokenizer.decode([token]) for token in ids]
        for name in ("logps", "entropy"):
            expected = getattr(rollout, name)[row][mask].tolist()
            assert each[name] == pytest.approx(expected, abs=1e-4)
        assert each["rewards"]["reward"] == rewards[row]
        expected = [advantages[row].item()] * len(ids)
        assert each["advantage"] == pytest.approx(expected, abs=1e-4)
    assert len(told) == 3 * config.group_size
    assert all(set(each["measures"]) == {"in_steps"} for each in told)


def test_the_first_look_is_at_the_model_that_has_not_learned():
    """It is what the base model says; later looks follow after so many steps."""
    run, policy = Unsaved(), small_model()
    config = replace(SMALL, steps=3, eval_every=2)
    train.grpo(config, run, "r1_zero", policy, small_model(), by_length)
    assert [each["step"] for each in run.looks] == [0, 2, 3]
    untouched = Unsaved()
    next(untouched.steps("r1_zero", 1, policy))
    how = (by_length, train.outcome_advantages)
    train.look_at_held_out(config, untouched, 0, small_model(), small_model(), *how)
    assert run.looks[0] == untouched.looks[0] != run.looks[1] | {"step": 0}


def test_captured_sampling_enters_as_an_argument_and_changes_no_step():
    """On a CPU the decoder runs the steps as they are: what train.py does with it is tested
    here."""
    config = replace(SMALL, steps=2)
    model, plain = run_grpo(config, by_length)
    policy = small_model()
    decoder = CapturedDecoder(policy, 16, 96)
    captured = partial(train.sample, generate=decoder.generate)
    same, records = run_grpo(config, by_length, policy, sample=captured)
    for name in ("reward", "completion_tokens", "entropy", "loss", "held_out_accuracy"):
        assert records[-1][name] == pytest.approx(plain[-1][name], abs=1e-4), name
    for weight, other in zip(model.parameters(), same.parameters()):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------- from end to end


def job(**changes):
    """The job on a tiny size in no folder: what it finished with, the run, and its policy."""
    run = Unsaved()
    train.r1_zero(replace(SMALL, pretrain_steps=2, steps=1, eval_samples=8, **changes), run)
    return run


def test_settings_reach_every_part_of_the_job():
    """Another seed gives other weights, documents, problems, noise, looks, evaluations, samples."""
    one, same, other = job(), job(), job(seed=1)
    assert one.records[0]["loss"] == same.records[0]["loss"] != other.records[0]["loss"]
    assert one.finished["base"] == same.finished["base"] != other.finished["base"]
    assert one.written == same.written
    for first, second in ((one, same), (one, other)):
        equal = first is one and second is same
        looks = [[said["prompt"] for said in run.looks[0]["problems"]] for run in (first, second)]
        assert (looks[0] == looks[1]) == equal
        asked = [re.findall("User: .*", run.written["samples.txt"]) for run in (first, second)]
        assert (asked[0] == asked[1]) == equal
    by_format = job(rewards="format=1")
    assert "accuracy" not in by_format.records[-1] and "format" in by_format.records[-1]
    assert set(job(max_level=3).finished["base"]["beyond"]) == {"4", "5", "6", "7"}


def test_cuda_graphs_take_the_sampling_of_the_job(monkeypatch):
    """On a CPU the same steps run as they are; one decoder serves all rollouts."""
    plain, decoders = job(), []
    honest = CapturedDecoder.decode
    monkeypatch.setattr(
        CapturedDecoder,
        "decode",
        lambda self, *args, **how: decoders.append(self) or honest(self, *args, **how),
    )
    captured = job(cuda_graphs=True)
    assert len(decoders) == 1
    for name in ("reward", "completion_tokens", "entropy"):
        found, expected = captured.records[-1][name], plain.records[-1][name]
        assert found == pytest.approx(expected, abs=1e-4), name


SMALL_RUN = ["--preset=tiny", "--prompts=4", "--group_size=4", "--steps=9", "--max_new_tokens=12"]
SMALL_RUN += ["--eval_problems=4", *SHAPE_FLAGS]


def stopped(arguments, capsys):
    """Run the job, which must end with status 1 and one line; return the line."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_a_loss_that_is_not_finite_leaves_the_base_model(tmp_path, capsys):
    save_model(tmp_path / "base.pt", small_model())
    folder = tmp_path / "run"
    flags = ["--init", str(tmp_path / "base.pt"), "--out", str(folder), "--lr", "1e30"]
    message = (
        r"train.py: r1_zero stopped at step \d: \w+ is (nan|inf); .* a lower learning rate may help"
    )
    config_flags = [*SMALL_RUN, *flags]
    with pytest.raises(SystemExit, match=message):
        config = parsed(config_flags)
        with open_run(config, "train.py") as run:
            train.r1_zero(config, run, by_length)
    assert not {"r1_zero.pt", "result.json"} & {path.name for path in folder.iterdir()}
    for one, two in zip(load_model(folder / "base.pt").parameters(), small_model().parameters()):
        assert torch.equal(one, two)


def parsed(arguments):
    return flags.parse(Config, train.PRESETS, arguments, "", "train.py")


def test_a_loss_that_is_not_finite_stops_pretraining(tmp_path, capsys):
    """In one line, before a model is written."""
    flags = [*SMALL_RUN, "--pretrain_steps=60", "--pretrain_lr=1e30", f"--out={tmp_path / 'run'}"]
    assert re.match("train.py: base stopped at step 50: loss is nan; ", stopped(flags, capsys))
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == ["last.pt"]


def test_a_model_whose_logits_are_nan_stops_the_run(tmp_path, capsys):
    """In one line, though each of its weights is finite: in train.py and in sample.py."""
    flags = [*SMALL_RUN, "--pretrain_steps=1", "--pretrain_lr=1e13", f"--out={tmp_path / 'run'}"]
    assert re.match(
        "train.py: the model's logits are NaN: a lower learning", stopped(flags, capsys)
    )
    with pytest.raises(SystemExit):
        sample.main(["7 + 8", "--checkpoint", str(tmp_path / "run" / "base.pt")])
    assert "sample.py: error: the model's logits are NaN" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_preset_runs_on_a_cpu(tmp_path, capsys):
    """A few steps of it."""
    flags = ["--pretrain_steps=2", "--steps=2", "--prompts=4", "--group_size=4", "--eval_samples=8"]
    flags += ["--eval_problems=16", "--max_new_tokens=24", "--device=cpu"]
    train.main(["--preset=gpu", *flags, f"--out={tmp_path / 'run'}"])
    assert "838,016 weights on cpu; signs, levels 1 to 4" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())["base"]
    assert set(result["by_level"]) == {"2", "3", "4"} and set(result["apart"]) == {"1"}


TINY = [
    "--preset=tiny",
    "--max_level=2",
    "--pretrain_steps=2000",
    "--pretrain_tokens=512",
    "--steps=50",
]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "train.py", *TINY, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return folder, done.stdout


def grpo_records(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == "r1_zero"]


def mean_reward(records):
    return np.mean([record["reward"] for record in records])


def test_reward_rises_from_random_weights(tiny_run):
    records = grpo_records(tiny_run[0])
    assert mean_reward(records[-5:]) > mean_reward(records[:5]) + 0.5
    result = json.loads((tiny_run[0] / "result.json").read_text())
    assert result["r1_zero"]["pass@1"] > result["base"]["pass@1"] + 0.2
    assert max(record["logp_gap"] for record in records) < 1e-3


def test_reward_does_not_rise_with_shuffled_advantages(tiny_run, tmp_path):
    """The control: the same run from the same base model, but each completion gets some other one's
    advantage."""

    def shuffled(config, rewards, rollout):
        generator = torch.Generator().manual_seed(int(rewards["reward"].sum()))
        order = torch.randperm(len(rewards["reward"]), generator=generator)
        return train.outcome_advantages(config, rewards, rollout)[order]

    folder = tmp_path / "control"
    config = parsed([*TINY, f"--init={tiny_run[0] / 'base.pt'}", f"--out={folder}"])
    with open_run(config, "train.py") as run:
        train.r1_zero(config, run, advantage=shuffled)
    records = grpo_records(folder)
    assert len(records) == len(grpo_records(tiny_run[0]))
    assert mean_reward(records[-5:]) < mean_reward(records[:5]) + 0.2
    assert records[0]["reward"] == grpo_records(tiny_run[0])[0]["reward"], "the same first rollout"


def test_the_run_folder_holds_what_it_should(tiny_run):
    folder, _ = tiny_run
    files = {"config.json", "log.jsonl", "looks.jsonl", "last.pt", "base.pt", "r1_zero.pt"}
    code = {"grpo.py", "model.py", "rewards.py", "sample.py", "train.py", "data", "kit"}
    assert {path.name for path in folder.iterdir()} == files | code | {"samples.txt", "result.json"}
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    rooms = {
        str(p.relative_to(ROOT)) for r in ("*.py", "data/*.py", "kit/*.py") for p in ROOT.glob(r)
    }
    assert kept == rooms
    for source in kept:
        assert (folder / source).read_text() == (ROOT / source).read_text()
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("program") == "train.py"
    config = Config(**settings)
    assert config == parsed([*TINY, "--out", str(folder)])
    assert asdict(load_model(folder / "r1_zero.pt").config)["d_model"] == config.d_model
    looks = [json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 10, 20, 30, 40, 50]
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == {"device", "seed", "seconds", "base", "r1_zero"}
    assert set(result["seconds"]) == {"base", "r1_zero", "evaluation", "total"}
    names = {"pass@1", "pass@8", "maj@8", "greedy", "format", "completion_tokens", "think_tokens"}
    names |= {"by_level", "by_language", "beyond", "apart", "thinking"}
    for metrics in (result["base"], result["r1_zero"]):
        assert set(metrics) == names
        assert metrics["pass@1"] == pytest.approx(np.mean(list(metrics["by_level"].values())))
        assert metrics["pass@1"] <= metrics["pass@8"] <= 1


def test_the_run_ends_with_a_table_and_one_problem(tiny_run):
    """Both models answer it, and each is called by its own name."""
    folder, shown = tiny_run
    result = json.loads((folder / "result.json").read_text())
    line = next(line for line in shown.splitlines() if line.startswith("pass@1 "))
    assert f"{100 * result['base']['pass@1']:.1f} %" in line
    assert f"{100 * result['r1_zero']['pass@1']:.1f} %" in line
    said = (folder / "samples.txt").read_text()
    block = shown.partition("gets wrong and the trained model right:\n\n")[2].partition("\n\n")[0]
    assert block in said and "[base: accuracy 0" in block and "[R1-Zero: accuracy 1" in block
    assert f"  python sample.py --checkpoint {folder}/r1_zero.pt\n" in shown
    lines = [line.replace(str(folder), "out/chains-cpu-grpo-seed0") for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    right = [said.count(f"[{name}: accuracy 1") for name in ("base", "R1-Zero")]
    assert right[0] < right[1]


def test_a_trained_model_answers_a_typed_problem(tiny_run, capsys):
    checkpoint = ["--checkpoint", str(tiny_run[0] / "r1_zero.pt")]
    sample.main(["2 + 3 - 1", *checkpoint])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{checkpoint[1]}: it learned chains, levels 1 to 2, such as ")
    assert "\nUser: what is 2 plus 3 minus 1?\nAssistant:" in shown
    verdicts = ("is right", "is wrong: 4 is right", "no answer that the rules can read")
    assert any(verdict in shown for verdict in verdicts)
    sample.main(["2", "+", "3", "-", "1", "-n", "8", *checkpoint])
    shown = capsys.readouterr().out
    assert shown.count("--- accuracy") == 8
    assert "rewarded for accuracy=1,format=1; a right answer is 4" in shown


def test_levels_take_turns_and_some_take_more():
    """Over several steps each comes as often as it is named; a level that is not asked never."""
    config = replace(SMALL, task="signs", min_level=1, max_level=3, prompts=4, max_new_tokens=1)
    policy, asked = small_model(task="signs"), Counter()
    for step in range(3):
        asked.update(problem.level for problem in train.sample(config, policy, step)[0])
    assert TASKS["signs"].more_turns == (2, 3, 4, 3) and asked == {1: 2, 2: 4, 3: 6}
