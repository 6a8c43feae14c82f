"""The loop, the evaluation, the run folder, and what happens to bad input."""

import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import sample
import train
from data.arithmetic import is_for_training, is_held_out, make_problem, write_problem
from grpo import KL_TERMS, VARIANTS, Variant, loss_normalizer, policy_loss, token_logps
from model import ModelConfig, Transformer, load_model, save_model
from sample import Rollout, generate
from tests.small import SHAPE, SHAPE_FLAGS, SMALL, run_grpo, small_model, tokenizer, unsaved
from train import Config, document_batches, learning_rate, majority_is_right, pass_at_k, sample_problems, stream

ROOT = Path(__file__).parent.parent


def small_rollout(model, config=SMALL, seed=1):
    problems = sample_problems(config, "problems", 0, config.prompts, held_out=False)
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    return generate(
        model,
        prompts,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        seed=seed,
    )


# ------------------------------------------------------------------------------------------------------ the pieces


def test_random_numbers_depend_on_seed_purpose_and_step_alone():
    draws = {stream(*key).random() for key in itertools.product((0, 1), ("problems", "rollout"), (0, 1))}
    assert len(draws) == 8
    random.seed(5)
    assert stream(0, "rollout", 1).random() == stream(0, "rollout", 1).random()


def test_problems_of_a_step_share_the_levels_and_keep_to_their_split():
    levels = {
        problem.level for step in range(3) for problem in sample_problems(Config(), "any", step, 2, held_out=True)
    }
    assert len(levels) == 4, "a rollout with fewer prompts than levels goes on where the last one ended"
    leaky = sample_problems(Config(min_level=1, max_level=3), "any", 0, 8, held_out=True)
    assert {problem.level for problem in leaky} == {2, 3}, "level 1 is held out of nothing"
    for held_out in (False, True):
        problems = sample_problems(Config(min_level=2, max_level=5), "any", 3, 64, held_out=held_out)
        assert [sum(problem.level == level for problem in problems) for level in range(2, 6)] == [16] * 4
        assert all((is_held_out if held_out else is_for_training)(problem.expression) for problem in problems)


def test_pretraining_predicts_the_answer_and_the_end_but_neither_question_nor_padding():
    batches = document_batches(Config(), tokenizer)
    assistant = tokenizer.encode("\nAssistant:")[0]
    for tokens, mask in itertools.islice(batches, 40):
        for row, chosen in zip(tokens.tolist(), mask.tolist()):
            end = row.index(tokenizer.eos_id) + 1
            assert all(token == tokenizer.pad_id for token in row[end:])
            start = row.index(assistant) + 1 if assistant in row else 1
            assert chosen == [start <= t < end for t in range(len(row))]


def test_batches_hold_about_as_many_tokens_as_asked_and_little_padding():
    sizes = [(mask.sum(), tokens.numel(), (tokens != tokenizer.pad_id).sum()) for tokens, mask in
             itertools.islice(document_batches(Config(pretrain_tokens=512), tokenizer), 64)]  # fmt: skip
    real = np.array([float(size[2]) for size in sizes])
    assert real.mean() == pytest.approx(512, rel=0.05)
    assert real.sum() / sum(size[1] for size in sizes) > 0.9


def test_batches_made_ahead_are_those_of_their_pools_from_any_step_on():
    config = Config()
    expected = [batch for pool in range(4) for batch in train.document_pool(config, tokenizer, pool)]
    for first in (0, 5, 16, 47):
        made_ahead = itertools.islice(document_batches(config, tokenizer, first), 64 - first)
        for batch, made in zip(expected[first:], made_ahead, strict=True):
            assert torch.equal(batch[0], made[0]) and torch.equal(batch[1], made[1])


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(2.0, step, 100, warmup=10, decay_from=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[49] == 2.0
    assert rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True)
    assert 0.04 <= rates[-1] < 0.05


def test_each_completion_is_scored_against_the_problem_that_it_answers():
    """Rows of one prompt are adjacent: the second prompt's answer earns nothing among the first prompt's rows."""
    problems = [make_problem(random.Random(seed), 2) for seed in (0, 1)]
    one, two = (f"<think> x</think><answer>{problem.answer}</answer>" for problem in problems)
    assert problems[0].answer != problems[1].answer
    rewards = train.score(Config(accuracy_weight=2.0, format_weight=0.5), problems, [one, two, "", two, two, one])
    assert rewards["accuracy"].tolist() == [1, 0, 0, 1, 1, 0]
    assert rewards["format"].tolist() == [1, 1, 0, 1, 1, 1]
    assert rewards["reward"].tolist() == [2.5, 0.5, 0, 2.5, 2.5, 0.5]


def test_the_language_reward_counts_where_it_has_a_weight_and_is_that_of_the_questions_language():
    english, korean = write_problem("1 + 2"), write_problem("1 + 2", "ko")
    text = "<think>\n#1 1 plus 1 is 2\n#2 2 plus 1 is 3</think><answer> 3</answer>"
    for weight in (0.0, 0.5):
        rewards = train.score(Config(language_weight=weight), [english, korean], [text, text])
        assert rewards["language"].tolist() == [1, 0]
        assert rewards["reward"].tolist() == [2 + weight, 2]


@pytest.mark.parametrize("micro_batch", [1, 5, 16])
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), *((0.1, kl) for kl in KL_TERMS)])
def test_the_gradient_does_not_depend_on_how_a_minibatch_is_cut_sorted_or_trimmed(micro_batch, beta, kl):
    config = replace(SMALL, max_level=5, micro_batch=micro_batch, beta=beta, kl=kl)  # prompts of four lengths
    model, other = small_model().double(), small_model().double()
    other.init_weights(9)
    rollout = small_rollout(other, config)  # off-policy: ratios are not 1
    lengths = torch.arange(16)[:, None] % 11 + 1
    rollout.mask &= rollout.mask.cumsum(dim=1) <= lengths  # a random model seldom ends by itself
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    ref_logps = token_logps(other(rollout.tokens), rollout.tokens).detach()
    minibatch = torch.tensor([3, 14, 1, 8, 0, 11, 6, 9, 10, 2])

    logps = token_logps(model(rollout.tokens), rollout.tokens)[minibatch]
    loss, metrics = policy_loss(
        logps,
        advantages[minibatch],
        rollout.mask[minibatch],
        old_logps=rollout.logps[minibatch],
        ref_logps=ref_logps[minibatch] if beta else None,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        beta=beta,
        kl=kl,
        normalizer=loss_normalizer(rollout.mask[minibatch]),
    )
    loss.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    sums = train.accumulate_gradient(config, model, rollout, advantages, ref_logps if beta else None, minibatch)
    for weight, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-10)
    assert max(gradient.abs().max() for gradient in expected) > 1e-4
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-10)
    for name, value in metrics.items():
        assert sums[name] == pytest.approx(value.item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_an_advantage_cost_nothing_and_leave_the_gradient_as_it_is(variant, monkeypatch):
    config = replace(SMALL, max_level=5, variant=variant, micro_batch=4)
    model, other = small_model().double(), small_model().double()
    other.init_weights(9)
    rollout = small_rollout(other, config)
    rollout.mask &= rollout.mask.cumsum(dim=1) <= torch.arange(16)[:, None] % 11 + 1
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    advantages[[0, 1, 2, 3, 8, 9, 10, 11, 15]] = 0
    logps = token_logps(model(rollout.tokens), rollout.tokens)
    old_logps = None if VARIANTS[variant].ratio is None else rollout.logps
    loss, _ = policy_loss(
        logps, advantages, rollout.mask, old_logps=old_logps, variant=variant, max_tokens=config.max_new_tokens
    )
    loss.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **first: seen.append(len(tokens)) or forward(tokens, **first))
    train.accumulate_gradient(config, model, rollout, advantages, None, torch.arange(16))
    assert sum(seen) == 7 and max(seen) <= 4
    for weight, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-10)
    assert max(gradient.abs().max() for gradient in expected) > 1e-4

    ref_logps = token_logps(other(rollout.tokens), rollout.tokens).detach()
    seen.clear()
    with_kl = replace(config, beta=0.1)
    train.accumulate_gradient(with_kl, model, rollout, advantages, ref_logps, torch.arange(16))
    assert sum(seen) == 16, "the KL is one of all rows"

    for with_signal in (0, 1):  # never a single row, for which a compiled forward would be made anew
        seen.clear()
        advantages = torch.arange(16) < with_signal
        sums = train.accumulate_gradient(config, model, rollout, advantages.float(), None, torch.arange(15, -1, -1))
        assert seen == [2]
        assert sums["tokens"] == rollout.mask[:with_signal].sum(), "what fills up is not counted"


def test_the_head_reads_no_prompt_but_its_last_token():
    config = replace(SMALL, max_level=5, micro_batch=4)
    model, seen = small_model(), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    rollout = small_rollout(model, config)  # the 4 completions of a prompt are of one length, and so a micro-batch
    prompts = rollout.mask.int().argmax(dim=1)[::4].tolist()
    assert len(set(prompts)) == 4 and seen[0] == max(prompts) - min(prompts) + 1, "the prefill"
    seen.clear()
    train.accumulate_gradient(config, model, rollout, torch.ones(16), None, torch.arange(16))
    assert seen == [config.max_new_tokens + 1] * 4
    seen.clear()
    train.accumulate_gradient(replace(config, micro_batch=16), model, rollout, torch.ones(16), None, torch.arange(16))
    assert seen == [config.max_new_tokens + 1 + max(prompts) - min(prompts)]


def test_the_reference_speaks_of_every_row_of_a_rollout(monkeypatch, always_signal):
    calls = spy(monkeypatch, "accumulate_gradient")
    run_grpo(replace(SMALL, steps=3, beta=0.1, lr=0.05, micro_batch=5))
    base, differing = small_model(), 0.0
    for args, _, _ in calls:
        rollout, ref_logps = args[2], args[4]
        expected = token_logps(base(rollout.tokens), rollout.tokens) * rollout.mask
        torch.testing.assert_close(ref_logps, expected, rtol=0, atol=1e-5)
        differing = max(differing, (ref_logps - rollout.logps).abs().max().item())
    assert differing > 0.01, "the policy should have left its reference"


def test_a_step_in_which_no_row_has_an_advantage_is_a_step_of_zero_gradient():
    """AdamW's momentum goes on in it, as it does where all rows go through the model."""
    model = small_model()
    rollout, optimizer = small_rollout(model), train.make_optimizer(model, weight_decay=0.0)
    train.accumulate_gradient(SMALL, model, rollout, torch.randn(16), None, torch.arange(16))
    train.optimizer_step(model, optimizer, 0.01, 1.0)
    before = [weight.detach().clone() for weight in model.parameters()]
    sums = train.accumulate_gradient(SMALL, model, rollout, torch.zeros(16), None, torch.arange(16))
    assert sums["tokens"] == 0 == sums["loss"]
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
    train.optimizer_step(model, optimizer, 0.01, 1.0)
    assert max((weight - old).abs().max() for weight, old in zip(model.parameters(), before)) > 1e-3


def test_pass_at_k_is_the_share_of_choices_of_k_that_hold_a_right_one():
    for right in range(7):
        graded = [True] * right + [False] * (6 - right)
        for k in range(1, 7):
            choices = list(itertools.combinations(graded, k))
            assert pass_at_k(6, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_majority_counts_answers_alone():
    assert majority_is_right(["3", None, None, None, "3", "4"], "3")
    assert not majority_is_right(["4", "3", "4", "3"], "3"), "of equals the first given wins"
    assert not majority_is_right([None, None], "3")


# ---------------------------------------------------------------------------------------------------- the GRPO loop


@pytest.fixture
def always_signal(monkeypatch):
    """Rewards that differ within nearly every group, so that even a random model is updated."""

    def score(config, problems, completions):
        return dict.fromkeys(
            ("reward", "accuracy", "format"), torch.tensor([float(len(text) % 5) for text in completions])
        )

    monkeypatch.setattr(train, "score", score)


def spy(monkeypatch, name):
    """Let `train.name` work as before and record its arguments and results."""
    calls, honest = [], getattr(train, name)

    def recorded(*args, **kwargs):
        result = honest(*args, **kwargs)
        calls.append((args, kwargs, result))
        return result

    monkeypatch.setattr(train, name, recorded)
    return calls


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_at_every_step_though_the_policy_moves(always_signal, temperature):
    """At a temperature that is not 1, so that forgetting it anywhere shows: in the sampler, the trainer, the KL."""
    config = replace(SMALL, steps=3, lr=1e-2, temperature=temperature, beta=0.01, minibatches=2)
    model, records = run_grpo(config)
    assert len(records) == 3
    assert all(record["logp_gap"] < 1e-4 for record in records)
    assert (model.embedding.weight - small_model().embedding.weight).abs().max() > 1e-3
    _, first = run_grpo(replace(config, steps=1, minibatches=1))
    assert first[0]["k3_ref"] == pytest.approx(0, abs=1e-7)
    assert first[0]["ratio"] == pytest.approx(1, abs=1e-5)


def test_logp_gap_shows_a_sampler_that_disagrees(monkeypatch):
    """The bug that this number is for: sampling at one temperature and training at another."""

    def hot(*args, **kwargs):
        return generate(*args, **kwargs | {"temperature": 1.3})

    monkeypatch.setattr(train, "generate", hot)
    _, records = run_grpo(replace(SMALL, steps=1))
    assert records[0]["logp_gap"] > 1e-3


def test_grpo_sees_training_problems_and_new_ones_and_new_noise_at_each_step(monkeypatch):
    problems, rollouts = spy(monkeypatch, "sample_problems"), spy(monkeypatch, "generate")
    run_grpo(replace(SMALL, steps=3, eval_every=100))
    trained = [result for args, _, result in problems if args[1] == "problems"]
    assert len(trained) == 3
    assert all(is_for_training(problem.expression) for batch in trained for problem in batch)
    assert len({tuple(problem.expression for problem in batch) for batch in trained}) == 3
    assert len({kwargs["seed"] for _, kwargs, _ in rollouts[:3]}) == 3
    looked = [result for args, _, result in problems if args[1] == "quick look"]
    assert looked
    assert all(is_held_out(problem.expression) for problem in looked[0])


def test_every_row_is_trained_once_in_each_epoch_by_fresh_clipped_steps_of_the_logged_rate(monkeypatch, always_signal):
    config = replace(SMALL, steps=2, minibatches=3, inner_epochs=2, lr=0.02, max_grad_norm=0.5)
    clean, honest = [], train.accumulate_gradient

    def accumulate(config, model, *args):
        clean.append(all(weight.grad is None or not weight.grad.any() for weight in model.parameters()))
        return honest(config, model, *args)

    clipped, honest_step = [], torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm().item()
        clipped.append((norm, {group["lr"] for group in optimizer.param_groups}))
        return honest_step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train, "accumulate_gradient", accumulate)
    calls = spy(monkeypatch, "accumulate_gradient")
    _, records = run_grpo(config)
    minibatches = [args[5].tolist() for args, _, _ in calls]
    assert len(minibatches) == len(clipped) == 2 * 2 * 3
    for first in range(0, 12, 3):
        assert sorted(itertools.chain(*minibatches[first : first + 3])) == list(range(16))
    assert minibatches[:3] != minibatches[3:6], "each epoch has an order of its own"
    assert all(clean), "the gradients of one update do not reach the next"
    assert max(norm for norm, _ in clipped) <= 0.5 + 1e-5
    assert max(record["grad_norm"] for record in records) > 0.5, "something should have been clipped"
    assert [rates for _, rates in clipped] == [{record["lr"]} for record in records for _ in range(6)]


def test_the_variant_decides_the_scale_of_the_advantages_and_the_objective(monkeypatch, always_signal):
    monkeypatch.setitem(VARIANTS, "plain", Variant("a test", scale="none", clip_low=0.1, clip_high=0.3))
    scored, losses = spy(monkeypatch, "score"), spy(monkeypatch, "policy_loss")
    run_grpo(replace(SMALL, steps=1, minibatches=1, micro_batch=16, variant="plain"))
    ((args, kwargs, _),) = losses
    assert kwargs["variant"] == "plain"
    groups = scored[0][2]["reward"].view(4, 4)
    expected = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(args[1].sort().values, expected.sort().values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_trains_from_its_row_alone(variant, monkeypatch, always_signal):
    on_policy = VARIANTS[variant].ratio is None
    losses = spy(monkeypatch, "policy_loss")
    config = replace(SMALL, variant=variant, minibatches=1 if on_policy else 2, beta=0.01, kl="k3_ratio", lr=1e-2)
    model, records = run_grpo(config)
    assert (model.embedding.weight - small_model().embedding.weight).abs().max() > 1e-3
    for (_, _, mask), kwargs, _ in losses:
        assert (kwargs["variant"], kwargs["kl"], kwargs["beta"]) == (variant, "k3_ratio", 0.01)
        assert (kwargs["old_logps"] is None) == on_policy
        if variant == "dr_grpo":
            assert kwargs["normalizer"] == len(mask) * (2 if len(losses) == 2 else 1) * config.max_new_tokens
    for name in ("ratio", "clip_low", "clip_high", "k1_old", "k3_old"):
        assert (name in records[0]) == (not on_policy)
    assert {
        "k1_ref",
        "weight_norm",
        "grad_norm",
        "logp_gap",
        "entropy",
        "no_signal",
        "reward_std",
        "accuracy_std",
        "format_std",
        "k3_ref",
    } <= set(records[0])
    assert records[0]["no_signal"] == 0


SMALL_RUN = [
    "--preset=tiny", "--prompts=4", "--group_size=4", "--steps=9", "--max_new_tokens=12", "--eval_problems=4",
    *SHAPE_FLAGS,
]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_metric_that_is_not_finite_stops_the_run(value):
    train.stop_if_not_finite("GRPO", 6, {"loss": 1.0, "grad_norm": 2.0}, "advice")
    for metrics in ({"loss": value, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": value}):
        with pytest.raises(FloatingPointError, match=rf"GRPO stopped at step 7: \w+ is {value}; advice"):
            train.stop_if_not_finite("GRPO", 6, metrics, "advice")


@pytest.mark.parametrize("minibatches", [1, 4])
def test_an_update_that_breaks_the_weights_stops_grpo_at_once_though_the_loss_before_it_was_fine(
    minibatches, always_signal
):
    with pytest.raises(FloatingPointError, match=r"GRPO stopped at step 1: weight_norm is (nan|inf); "):
        run_grpo(replace(SMALL, lr=1e300, minibatches=minibatches, steps=1))


def test_a_loss_that_is_not_finite_stops_grpo_and_leaves_the_base_model(tmp_path, always_signal):
    save_model(tmp_path / "base.pt", small_model())
    folder = tmp_path / "run"
    message = rf"GRPO stopped at step \d: \w+ is (nan|inf); {folder}/base.pt is untouched; a lower --lr may help"
    with pytest.raises(FloatingPointError, match=message):
        train.main([*SMALL_RUN, "--init", str(tmp_path / "base.pt"), "--out", str(folder), "--lr", "1e30"])
    assert not {"r1_zero.pt", "result.json"} & {path.name for path in folder.iterdir()}
    for one, two in zip(load_model(folder / "base.pt").parameters(), small_model().parameters()):
        assert torch.equal(one, two)


def test_a_loss_that_is_not_finite_stops_pretraining_in_one_line_before_a_model_is_written(tmp_path):
    flags = [*SMALL_RUN, "--pretrain_steps=60", "--pretrain_lr=1e30", f"--out={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"train.py: pretraining stopped at step 50: loss is nan; no model was .*\n", done.stderr)
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == ["last.pt"]


def test_the_reference_is_the_base_model_until_it_is_refreshed(always_signal):
    changes = {"steps": 3, "minibatches": 1, "beta": 0.01, "lr": 1e-2}
    _, kept = run_grpo(replace(SMALL, **changes))
    assert kept[0]["k3_ref"] == pytest.approx(0, abs=1e-7)
    assert 0 < kept[1]["k3_ref"] < kept[2]["k3_ref"]
    _, refreshed = run_grpo(replace(SMALL, **changes, reference_every=2))
    assert refreshed[1]["k3_ref"] == kept[1]["k3_ref"]
    assert refreshed[2]["k3_ref"] == pytest.approx(0, abs=1e-7)


class Seen(train.tqdm):
    """A progress bar that shows nothing, and remembers what it would have shown."""

    bars: ClassVar = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})
        self.bars.append((self, kwargs, []))

    def set_postfix(self, *args, **kwargs):
        super().set_postfix(*args, **kwargs)
        self.bars[-1][2].append(self.postfix)


def test_the_bar_and_the_log_agree(monkeypatch, always_signal):
    monkeypatch.setattr(train, "tqdm", Seen)
    run, records = unsaved(replace(SMALL, steps=3, pretrain_steps=70), "pretrain")
    run.step = 20  # as after resuming
    train.pretrain(run.config, run, tokenizer)
    bar, settings, shown = Seen.bars[-1]
    assert (settings["initial"], settings["desc"], bar.n, bar.total) == (20, "pretrain", 70, 70)
    assert shown == [f"loss={record['loss']:.3f}" for record in records]
    assert [record["step"] for record in records] == [50, 70]
    run.begin("grpo")
    monkeypatch.setattr(train, "quick_look", lambda *args: {"held_out_accuracy": 0.5})
    train.grpo(run.config, run, tokenizer)
    bar, settings, shown = Seen.bars[-1]
    assert (settings["initial"], settings["desc"], bar.n, bar.total) == (0, "grpo", 3, 3)
    assert shown == [
        f"accuracy={record['accuracy']:.2f}, format={record['format']:.2f}, "
        f"completion_tokens={record['completion_tokens']:.2f}, entropy={record['entropy']:.2f}"
        for record in records[2:]
    ]


def test_inner_epochs_move_the_ratio_away_from_1(always_signal):
    _, once = run_grpo(replace(SMALL, steps=1, minibatches=1, lr=3e-2))
    assert once[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert "k3_ref" not in once[0]
    _, thrice = run_grpo(replace(SMALL, steps=1, minibatches=1, inner_epochs=3, lr=3e-2))
    assert abs(thrice[0]["ratio"] - 1) > 1e-4


def test_the_same_seed_gives_the_same_run_and_another_seed_another(always_signal):
    def weights(config):
        return run_grpo(config)[0].embedding.weight

    torch.manual_seed(0)
    one = weights(SMALL)
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(one, weights(SMALL))
    assert not torch.equal(one, weights(replace(SMALL, seed=1)))


def test_metrics_of_a_rollout_are_over_all_rows_and_count_what_they_say():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()  # row 2 is the wrong one
    finished = torch.tensor([True, True, False, True])
    rollout = Rollout(torch.zeros(4, 4), mask, torch.zeros(4, 4), mask * 0.5, finished)
    accuracy, form = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    rewards = {"reward": accuracy + form, "accuracy": accuracy, "format": form}
    problems = [write_problem("1 + 2 + 3"), write_problem("1 + 2")]
    assert train.rollout_metrics(Config(group_size=2), rollout, rewards, problems) == {
        "reward": 1.5, "accuracy": 0.75, "format": 0.75,
        "reward_std": pytest.approx((1 / 3) ** 0.5), "accuracy_std": 0.5, "format_std": 0.5,
        "completion_tokens": 2.0, "entropy": 0.5, "cut": 0.25, "no_signal": 1.0, "top_level": 2,
        "right_tokens": pytest.approx(5 / 3), "wrong_tokens": 3.0,
    }  # fmt: skip
    assert "wrong_tokens" not in train.rollout_metrics(
        Config(group_size=2), rollout, rewards | {"accuracy": torch.ones(4)}, problems
    )
    assert train.rollout_metrics(Config(group_size=4), rollout, rewards, problems[:1])["no_signal"] == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_quick_look_tells_accuracy_and_kl_to_the_base_of_what_is_sampled_at_temperature_1(temperature, monkeypatch):
    monkeypatch.setattr(train, "accuracy_reward", lambda text, answer: float(len(text) % 2))
    run, _ = unsaved(replace(SMALL, max_level=3, temperature=temperature), "grpo")
    assert train.quick_look(run.config, run, tokenizer)["base_kl"] == pytest.approx(0, abs=1e-6), "it is the base"
    run.model.init_weights(5)
    looked = spy(monkeypatch, "complete")
    found = train.quick_look(run.config, run, tokenizer)
    ((args, _, rollout),) = looked
    problems, terms = args[3], []
    assert len(problems) == 128 and all(is_held_out(problem.expression) for problem in problems)
    with torch.no_grad():
        for tokens, mask in zip(rollout.tokens, rollout.mask):
            policy, base = (model(tokens[None])[0].log_softmax(-1) for model in (run.model, run.base_model))
            terms += [policy[t - 1, tokens[t]] - base[t - 1, tokens[t]] for t in mask.nonzero().flatten()]
    assert found["base_kl"] == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    assert found["base_kl"] > 1e-3
    texts = train.decode_completions(rollout, tokenizer)
    assert found["held_out_accuracy"] == sum(len(text) % 2 for text in texts) / 512


def test_metrics_by_language_are_over_the_completions_of_that_languages_questions():
    rollout = Rollout(*torch.zeros(4, 4, 2).bool(), torch.ones(4).bool())
    rollout.mask[:] = True
    rewards = {"reward": torch.arange(4.0), "accuracy": torch.tensor([1, 1, 0, 1.0]), "language": torch.arange(4.0)}
    problems = [write_problem("1 + 2", "ko"), write_problem("1 + 2")]
    metrics = train.rollout_metrics(Config(group_size=2, languages="en,ko"), rollout, rewards, problems)
    assert (metrics["accuracy_ko"], metrics["accuracy_en"]) == (1.0, 0.5)
    assert (metrics["language_ko"], metrics["language_en"]) == (0.5, 2.5)


def test_metrics_of_the_updates_are_means_over_tokens_whatever_the_minibatches():
    model = small_model()
    rollout = small_rollout(model)
    rollout.mask &= rollout.mask.cumsum(dim=1) <= torch.arange(16)[:, None] % 11 + 1
    advantages = torch.arange(1.0, 17)
    logps = token_logps(model(rollout.tokens), rollout.tokens)
    old_logps = torch.where(rollout.mask, logps.detach() - 0.01 * advantages[:, None], 0)
    expected = (logps - old_logps).exp()[rollout.mask].mean().item()
    for parts in (1, 3):
        minibatches = torch.arange(16).chunk(parts)
        updates = [
            train.accumulate_gradient(SMALL, model, rollout, advantages, None, rows, old_logps) for rows in minibatches
        ]
        for sums in updates:
            sums["grad_norm"] = sums["weight_norm"] = 2.0
        metrics = train.update_metrics(updates)
        assert metrics["ratio"] == pytest.approx(expected, rel=1e-5)
        assert metrics["grad_norm"] == 2.0


def test_metrics_of_minibatches_of_unequal_length_are_weighed_by_their_tokens():
    short = Counter(tokens=10, ratio=10.0, k3_old=1.0, loss=1.0, grad_norm=3.0, weight_norm=8.0, logp_gap=0.5)
    long = Counter(tokens=30, ratio=42.0, k3_old=0.0, loss=2.0, grad_norm=1.0, weight_norm=9.0, logp_gap=0.7)
    assert train.update_metrics([short, long]) == pytest.approx(
        {
            "ratio": 1.3,
            "k3_old": 0.025,
            "loss": 1.5,
            "grad_norm": 2.0,
            "weight_norm": 8.5,
            "logp_gap": 0.5,
        }
    )


def test_logp_gap_is_the_largest_over_all_micro_batches():
    model, other = small_model(), small_model()
    other.init_weights(9)
    rollout = small_rollout(other)
    logps = token_logps(model(rollout.tokens), rollout.tokens)
    expected = (logps - rollout.logps)[rollout.mask].abs().max().item()
    sums = train.accumulate_gradient(
        replace(SMALL, micro_batch=3), model, rollout, torch.ones(16), None, torch.arange(16)
    )
    assert sums["logp_gap"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_counts_what_it_says(monkeypatch):
    """Hand-made completions of two problems, 16 each, and every metric worked out beside them."""
    problems = [write_problem("1 + 2 + 3"), write_problem("9 - 2 - 1 + 1", "ko")]
    right = [f"<think> a b c d</think><answer> {problem.answer}</answer>" for problem in problems]
    wrong, bare = "<think> a</think><answer> 5</answer>", "5."
    sampled = [
        [(right[0], 8)] * 4 + [(wrong, 7)] * 4 + [(wrong, 7)] * 5 + [(bare, 2)] * 3,  # majority: tie won, then lost
        [(right[1], 8)] * 12 + [(bare, 2)] * 4,
    ]

    def answers(config, model, tokenizer, asked, samples, temperature):
        if temperature == 0:
            return [[(right[0], 8)], [(bare, 2)]]
        if samples == 16:
            return sampled
        assert all(is_held_out(problem.expression) for problem in asked)
        assert {problem.level for problem in asked} <= {1, 3, 4, 5, 6}
        assert {problem.language for problem in asked} == {"en", "ko"}
        return [[(f"<answer>{problem.answer}</answer>", 3)] + [(bare, 2)] * (samples - 1) for problem in asked]

    honest = train.sample_problems

    def chosen(config, purpose, step, count, *, held_out, levels=None):
        assert held_out
        if purpose == "evaluation":
            assert levels is None, "so level 1 is apart: its problems are steps of others"
            return problems
        return honest(config, purpose, step, count, held_out=held_out, levels=levels)

    monkeypatch.setattr(train, "answer_problems", answers)
    monkeypatch.setattr(train, "sample_problems", chosen)
    metrics = train.evaluate(Config(min_level=1, max_level=2, languages="en,ko"), None, tokenizer)
    words = len(tokenizer.encode(" a b c d")), len(tokenizer.encode(" a"))
    assert {name: value for name, value in metrics.items() if not isinstance(value, dict)} == pytest.approx(
        {
            "pass@1": (4 / 16 + 12 / 16) / 2,
            "pass@8": (pass_at_k(16, 4, 8) + 1) / 2,
            "maj@8": (1 + 0 + 1 + 1) / 4,
            "greedy": 0.5,
            "format": (13 + 12) / 32,
            "completion_tokens": (16 * 8 + 9 * 7 + 7 * 2) / 32,
            "think_tokens": (16 * words[0] + 9 * words[1]) / 25,
        }
    )
    assert metrics["by_level"] == {"2": 0.25, "3": 0.75}
    assert metrics["by_language"] == {"en": 0.25, "ko": 0.75}
    assert metrics["apart"] == {"1": 0.25}
    assert metrics["beyond"] == dict.fromkeys("3456", 0.25)
    assert metrics["thinks_in"] == {
        "en": {"en": 4 / 16, "ko": 0, "mixed": 0, "none": 12 / 16},
        "ko": {"en": 12 / 16, "ko": 0, "mixed": 0, "none": 4 / 16},
    }


def test_the_language_of_a_thought_is_that_of_all_its_words():
    for thought, expected in (
        ("\n#1 1 plus 2 is 3\n#2 3 plus 1 is 4", "en"),
        ("\n#1 1 더하기 2 은 3\n#2 3 더하기 1 은 4", "ko"),
        ("\n#1 1 plus 2 is 3\n#2 3 더하기 1 은 4", "mixed"),
        (" i know this", "none"),
        (" 이건 알아", "none"),
        (" なのか これ なのか これ", "none"),
    ):
        assert train.thought_language(f"<think>{thought}</think><answer> 3</answer>") == expected


def test_the_curriculum_adds_a_level_where_the_hardest_one_passes_and_stops_where_the_context_does(monkeypatch):
    config = replace(SMALL, max_level=2, steps=4, curriculum=0.5, max_new_tokens=36)  # a thought of 5 steps takes 36

    def score(config, problems, completions):
        right = torch.tensor([float(problem.level != 4) for problem in problems]).repeat_interleave(config.group_size)
        return dict.fromkeys(("reward", "accuracy", "format"), right)

    monkeypatch.setattr(train, "score", score)
    _, records = run_grpo(config)
    assert [record["top_level"] for record in records] == [2, 3, 4, 4]
    monkeypatch.setattr(train, "score", lambda *args: dict.fromkeys(("reward", "accuracy", "format"), torch.ones(16)))
    _, records = run_grpo(replace(config, steps=6))
    assert [record["top_level"] for record in records] == [2, 3, 4, 5, 5, 5]
    _, records = run_grpo(replace(config, curriculum=0.0))
    assert [record["top_level"] for record in records] == [2] * 4


def test_a_task_at_its_bounds_always_has_a_next_operation():
    for operators, max_total in (("+-", 17), ("+-*", 17), ("+-*", 99)):
        config = Config(operators=operators, max_total=max_total, max_level=12)
        assert train.find_fault(replace(config, eval_problems=500)) is None
        assert len(sample_problems(config, "any", 0, 600, held_out=False)) == 600


def test_in_bfloat16_the_old_log_probabilities_are_the_trainers_and_the_gap_is_told(monkeypatch, always_signal):
    """Sampler and trainer round differently there, which as a ratio would be noise."""
    monkeypatch.setattr(train, "multiplies_in_bfloat16", lambda device: True)
    losses, passes = spy(monkeypatch, "policy_loss"), spy(monkeypatch, "rollout_logps")
    run_grpo(replace(SMALL, steps=1))
    assert len(passes) == 1, "that of the quick look: in float32 they are the sampler's"
    losses.clear()
    passes.clear()
    _, records = run_grpo(replace(SMALL, steps=1, minibatches=1, dtype="bfloat16"))
    assert records[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert 0 < records[0]["logp_gap"] < 0.1
    assert len(passes) == 2
    for (trained, *_), kwargs, _ in losses:
        assert trained.dtype == kwargs["old_logps"].dtype == torch.float32


def test_the_gpu_preset_runs_on_a_cpu(tmp_path, capsys):
    """In float32, which it says; a few steps of it, and the curriculum."""
    flags = [
        "--pretrain_steps=2",
        "--steps=2",
        "--prompts=4",
        "--group_size=4",
        "--eval_problems=14",
        "--eval_samples=8",
    ]
    flags += ["--pretrain_tokens=256", "--max_new_tokens=24", "--device=cpu", f"--out={tmp_path / 'run'}"]
    train.main(["--preset=gpu", *flags])
    shown = capsys.readouterr().out
    assert shown.startswith("cpu has no fast bfloat16: matrix products will be in float32\n")
    config = Config(**json.loads((tmp_path / "run" / "config.json").read_text()))
    assert (config.dtype, config.max_level, config.languages) == ("bfloat16", 8, "en,ko")
    result = json.loads((tmp_path / "run" / "result.json").read_text())["base"]
    assert set(result["by_language"]) == set(result["thinks_in"]) == {"en", "ko"}
    assert set(result["apart"]) == {"1"} and set(result["beyond"]) == {"9", "10", "11", "12"}
    assert "pass@1, ko" in shown and "pass@1, level 1 " in shown
    assert 3e6 < sum(weight.numel() for weight in load_model(tmp_path / "run" / "base.pt").parameters()) < 6e6


@pytest.mark.parametrize(("cuda", "preset", "device"), [(True, "gpu", "cuda"), (False, "cpu", "cpu")])
def test_the_preset_is_gpu_where_there_is_one(monkeypatch, cuda, preset, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config, _ = train.parse_config([])
    assert (config.preset, config.device) == (preset, device)
    assert train.parse_config(["--preset=cpu"])[0].device == "cpu"


def test_evaluation_in_parts_is_evaluation_of_the_whole(monkeypatch):
    """130 problems take two calls of `generate`; the noise of the second goes on where the first ended."""
    calls = spy(monkeypatch, "generate")
    problems = sample_problems(SMALL, "evaluation", 0, 130, held_out=True)
    answers = train.answer_problems(SMALL, small_model(), tokenizer, problems, 2, 1.0)
    assert [len(group) for group in answers] == [2] * 130
    assert [(len(args[1]), kwargs["first_row"], kwargs["group_size"]) for args, kwargs, _ in calls] == [
        (128, 0, 2),
        (2, 256, 2),
    ]
    assert len({kwargs["seed"] for _, kwargs, _ in calls}) == 1
    assert answers[0][0][1] == calls[0][2].mask[0].sum()


# ------------------------------------------------------------------------------------------------- the command line


def test_every_knob_is_a_flag_with_a_comment_for_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in fields(Config):
        line = next(line for line in shown.splitlines() if line.startswith(f"  --{field.name} "))
        words = shown[shown.index(line) + len(field.name) + 4 :].split("[")[0]
        assert words.strip(), f"{field.name} needs a comment in Config, two spaces before its #"
        assert f"[{field.default!r}]" in shown


def test_flags_go_over_the_preset_and_the_preset_over_the_defaults():
    config, _ = train.parse_config(["--preset", "tiny", "--seed", "3", "--lr", "0.5"])
    expected = Config(**train.PRESETS["tiny"] | {"preset": "tiny", "seed": 3, "lr": 0.5, "out": "out/tiny-grpo-seed3"})
    assert config == expected
    assert train.parse_config([])[0] == replace(Config(), out="out/cpu-grpo-seed0")


def refused(command, arguments, capsys):
    """Run a command that must end with status 2 and one line; return the line."""
    with pytest.raises(SystemExit) as stop:
        command(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gropu_size", "4"], "unrecognized arguments: --gropu_size"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--variant", "ppo"], "invalid choice: 'ppo'"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--group_size", "1"], "--group_size must be at least 2"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--n_head", "0"], "--n_head must be at least 1"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--lr", "nan"], "--lr must be a number of at least 0"),
        (["--beta", "-1"], "--beta must be a number of at least 0"),
        (["--beta", "inf"], "--beta must be a number of at least 0"),
        (["--format_weight", "inf"], "--format_weight must be a number of at least 0"),
        (["--reference_every", "5"], "--reference_every needs --beta"),
        (["--kl", "k3_ratio"], "--kl k3_ratio needs --beta"),
        (["--kl", "k1"], "--kl k1 needs --beta"),
        (["--accuracy_weight", "0", "--format_weight", "0"], "must not all be 0"),
        (["--variant", "rloo", "--minibatches", "1", "--inner_epochs", "2"], "rloo makes one update a rollout"),
        (["--variant", "rloo", "--minibatches", "1", "--clip_low", "0.3"], "rloo has no clip"),
        (["--kl", "k4", "--beta", "1"], "invalid choice: 'k4'"),
        (["--clip_low", "-0.1"], "--clip_low must be a number of at least 0"),
        (["--variant", "rloo"], "--variant rloo makes one update a rollout: add --minibatches 1 --inner_epochs 1"),
        (["--variant", "reinforce", "--minibatches", "1", "--clip_high", "0.3"], "reinforce has no clip"),
        (["--reference_every", "-1"], "--reference_every must be at least 0"),
        (["--threads", "99999999999"], "--threads must be at most 1024"),
        (["--seed", "99999999999999999999"], "--seed must be at least 0 and below 2**63"),
        (["--pretrain_tokens", "1"], "--pretrain_tokens must be at least --max_seq_len 96"),
        (["--max_level", "9", "--max_new_tokens", "20"], "documents of --max_level 9: 102 tokens exceed the context"),
        (["--operators", "+*"], "--operators +* must be of +-*, + and - among them"),
        (["--max_level", "1", "--min_level", "1"], "--max_level must be at least 2 and at most 12"),
        (["--max_level", "13"], "--max_level must be at least 2 and at most 12"),
        (["--eval_problems", "3"], "--eval_problems must be at least one for each level and language"),
        (["--operators", "+/"], "--operators +/ must be of +-*"),
        (["--languages", "en,fr"], "--languages en,fr must be of en,ko, each at most once"),
        (["--languages", "en,en"], "--languages en,en must be of en,ko, each at most once"),
        (["--max_total", "16"], "--max_total must be at least 17 and at most 99"),
        (["--curriculum", "2"], "--curriculum must be at most 1"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--preset", "gpu"], "--device cuda cannot be used here"),
        (["--min_level", "6"], "--min_level 6 is above --max_level 5"),
        (["--temperature", "0"], "--temperature must be at least 0.001"),
        (["--max_seq_len", "70"], "context of 70"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--init", "tests"], "tests: a folder, not a model file such as tests/base.pt"),
        (["--init", "nowhere/base.pt"], "nowhere/base.pt: there is no such file"),
        (["--n_head", "5"], "n_head"),
    ],
)
def test_bad_flags_are_refused_in_one_line_before_anything_is_written(arguments, complaint, capsys, tmp_path):
    assert complaint in refused(train.main, [*arguments, "--out", str(tmp_path / "run")], capsys)
    assert list(tmp_path.iterdir()) == []


def test_cuda_graphs_are_refused_without_cuda_and_change_no_step(capsys, monkeypatch):
    """On a CPU the decoder runs the steps as they are, so that what train.py does with it is tested here."""
    assert "--cuda_graphs needs a CUDA device" in refused(train.main, ["--device=cpu", "--cuda_graphs"], capsys)
    model, plain = run_grpo(replace(SMALL, steps=2))
    decoded, decode = [], sample.CapturedDecoder.decode
    monkeypatch.setattr(sample.CapturedDecoder, "decode", lambda *args: decoded.append(args[0]) or decode(*args))
    captured_model, captured = run_grpo(replace(SMALL, steps=2, cuda_graphs=True))
    assert len(decoded) == 2, "each rollout"
    assert decoded[0] is decoded[1], "graphs are kept"
    for name in ("reward", "completion_tokens", "entropy", "loss", "held_out_accuracy"):
        assert captured[-1][name] == pytest.approx(plain[-1][name], abs=1e-4), name
    for weight, other in zip(model.parameters(), captured_model.parameters()):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-3)


def test_without_a_compiler_compile_is_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["--compile", "--out", str(tmp_path / "run")]
    assert "--compile needs a C++ compiler, and there is no no-such" in refused(train.main, arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_run_never_overwrites_another(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "r1_zero.pt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("run", "file"):
        assert f"{name} exists: name" in refused(train.main, ["--out", str(tmp_path / name)], capsys)
    assert "cannot be made (Not a directory)" in refused(train.main, ["--out", str(tmp_path / "file" / "run")], capsys)
    assert "cannot be made (File name too long)" in refused(train.main, ["--out", str(tmp_path / ("x" * 300))], capsys)
    assert (tmp_path / "run" / "r1_zero.pt").read_text() == (tmp_path / "file").read_text() == "precious"


def test_models_of_another_shape_or_vocabulary_are_refused(capsys, tmp_path):
    save_model(tmp_path / "other.pt", Transformer(ModelConfig(vocab_size=50, **SHAPE)))
    short = replace(small_model().config, max_seq_len=30)
    save_model(tmp_path / "short.pt", Transformer(short))
    save_model(tmp_path / "same_size.pt", Transformer(replace(small_model().config, vocabulary="of a task of my own")))
    broken = small_model()
    broken.embedding.weight.data[3, 4] = math.nan
    save_model(tmp_path / "broken.pt", broken)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:3000])
    for name, complaint in (
        ("other", "learned other words"),
        ("same_size", "learned other words"),
        ("cut", "cut.pt"),
        ("broken", "NaN or infinite"),
        ("missing", "missing.pt"),
    ):
        path = str(tmp_path / f"{name}.pt")
        assert complaint in refused(train.main, ["--init", path, "--out", str(tmp_path / "run")], capsys)
        assert complaint in refused(sample.main, ["7 + 8 - 3", "--checkpoint", path], capsys)
    path = str(tmp_path / "short.pt")
    assert "add --n_layer 1 --n_head 2 --n_kv_head 1 --d_model 16 --d_ff 24 --max_seq_len 30" in refused(
        train.main, ["--init", path, "--out", str(tmp_path / "run")], capsys
    )
    assert not (tmp_path / "run").exists()


def test_problems_that_sample_cannot_ask_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no trained model in out/" in refused(sample.main, ["7 + 8 - 3"], capsys)
    save_model(tmp_path / "model.pt", small_model())
    arguments = ["--checkpoint", "model.pt"]
    assert '"banana" stands where a number' in refused(sample.main, ["7 + banana", *arguments], capsys)
    assert "context of 96" in refused(sample.main, [" + ".join("7" * 60), *arguments], capsys)
    assert "-n must be at least 1" in refused(sample.main, ["7 + 8", "-n", "0", *arguments], capsys)
    assert "--temperature must" in refused(sample.main, ["7 + 8", "--temperature", "nan", *arguments], capsys)
    assert "--seed must" in refused(sample.main, ["7 + 8", "--seed", "9" * 20, *arguments], capsys)


# ------------------------------------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "train.py", "--preset", "tiny", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return folder, done.stdout


def grpo_records(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "grpo"]


def mean_reward(records):
    return np.mean([record["reward"] for record in records])


def test_reward_rises_from_random_weights(tiny_run):
    records = grpo_records(tiny_run[0])
    assert mean_reward(records[-5:]) > mean_reward(records[:5]) + 0.5
    result = json.loads((tiny_run[0] / "result.json").read_text())
    assert result["r1_zero"]["pass@1"] > result["base"]["pass@1"] + 0.2
    assert max(record["logp_gap"] for record in records) < 1e-3


def test_reward_does_not_rise_with_shuffled_advantages(tiny_run, tmp_path, monkeypatch):
    """The control: the same run from the same base model, but each completion gets some other one's advantage."""
    honest = train.group_advantages

    def shuffled(rewards, *args):
        order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(int(rewards.sum())))
        return honest(rewards, *args)[order]

    monkeypatch.setattr(train, "group_advantages", shuffled)
    train.main(["--preset", "tiny", "--init", str(tiny_run[0] / "base.pt"), "--out", str(tmp_path / "control")])
    records = grpo_records(tmp_path / "control")
    assert len(records) == len(grpo_records(tiny_run[0]))
    assert mean_reward(records[-5:]) < mean_reward(records[:5]) + 0.2
    assert records[0]["reward"] == grpo_records(tiny_run[0])[0]["reward"], "both start from the same rollout"


def test_the_run_folder_holds_what_it_should(tiny_run):
    folder, _ = tiny_run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "log.jsonl", "last.pt", "base.pt", "r1_zero.pt", "samples.txt", "result.json",
        "grpo.py", "model.py", "rewards.py", "sample.py", "train.py", "data",
    }  # fmt: skip
    assert {str(path.relative_to(ROOT)) for room in ("*.py", "data/[!_]*.py") for path in ROOT.glob(room)} == set(
        train.SOURCES
    )
    for source in train.SOURCES:
        assert (folder / source).read_text() == (ROOT / source).read_text()
    config = Config(**json.loads((folder / "config.json").read_text()))
    assert config == replace(Config(**train.PRESETS["tiny"]), preset="tiny", out=str(folder))
    assert asdict(load_model(folder / "r1_zero.pt").config)["d_model"] == config.d_model
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == {"device", "seed", "seconds", "base", "r1_zero"}
    for metrics in (result["base"], result["r1_zero"]):
        assert set(metrics) == {
            "pass@1", "pass@8", "maj@8", "greedy", "format", "completion_tokens", "think_tokens", "by_level",
            "by_language", "beyond", "apart", "thinks_in",
        }  # fmt: skip
        assert metrics["pass@1"] == pytest.approx(np.mean(list(metrics["by_level"].values())))
        assert metrics["pass@1"] <= metrics["pass@8"] <= 1


def test_the_run_ends_with_a_table_and_one_problem_answered_by_both(tiny_run):
    folder, shown = tiny_run
    result = json.loads((folder / "result.json").read_text())
    line = next(line for line in shown.splitlines() if line.startswith("pass@1 "))
    assert f"{100 * result['base']['pass@1']:.1f} %" in line
    assert f"{100 * result['r1_zero']['pass@1']:.1f} %" in line
    last = (folder / "samples.txt").read_text().split("\n\n")[-1].strip()
    assert last in shown
    assert "[base: " in last
    assert "[R1-Zero: " in last


def test_a_trained_model_answers_a_typed_problem(tiny_run, capsys):
    checkpoint = ["--checkpoint", str(tiny_run[0] / "r1_zero.pt")]
    sample.main(["2 + 3 - 1", *checkpoint])
    shown = capsys.readouterr().out
    assert shown.startswith("User: what is 2 plus 3 minus 1?\nAssistant:")
    assert shown.endswith(f"  [{checkpoint[1]}]\n")
    assert any(verdict in shown for verdict in ("is right", "is wrong: it is 4", "no answer that the rule can read"))
    sample.main(["2", "+", "3", "-", "1", "-n", "8", *checkpoint])
    shown = capsys.readouterr().out
    assert shown.count("--- accuracy") == 8
    assert "of 8 are right: the answer is 4" in shown
