"""The numbers of the log: each counts what it says."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo import token_logps
from kit.metrics import check_finite, rollout_metrics, totals, update_metrics
from sample import Rollout
from tests.small import CHAINS, SMALL, by_length, run_grpo, small_model
from train import add_gradient, loss_inputs, sample


def rollout_with(mask, entropy=0.0, finished=None):
    mask = torch.tensor(mask).bool()
    zeros = torch.zeros(mask.shape)
    finished = torch.ones(len(mask)).bool() if finished is None else torch.tensor(finished)
    return Rollout(zeros.long(), mask, zeros, mask * entropy, finished)


def test_metrics_of_a_rollout_are_over_all_rows():
    mask = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]  # row 2 is the wrong one
    rollout = rollout_with(mask, 0.5, [True, True, False, True])
    accuracy, form = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    rewards = {"reward": accuracy + form, "accuracy": accuracy, "format": form}
    problems = [CHAINS.ask("1 + 2 + 3"), CHAINS.ask("1 + 2")]
    assert rollout_metrics(problems, rollout, rewards) == {
        **{"reward": 1.5, "accuracy": 0.75, "format": 0.75},
        **{"reward_std": pytest.approx((1 / 3) ** 0.5), "accuracy_std": 0.5, "format_std": 0.5},
        **{"completion_tokens": 2.0, "entropy": 0.5, "cut": 0.25, "no_signal": 1.0},
        **{"right_tokens": pytest.approx(5 / 3), "wrong_tokens": 3.0},
    }
    all_right = rewards | {"accuracy": torch.ones(4)}
    assert "wrong_tokens" not in rollout_metrics(problems, rollout, all_right)
    assert rollout_metrics(problems[:1], rollout, rewards)["no_signal"] == 0.0


def test_metrics_by_language_are_of_that_languages_questions():
    rewards = {"reward": torch.arange(4.0), "accuracy": torch.tensor([1, 1, 0, 1.0])}
    rewards["language"] = torch.arange(4.0)
    problems = [CHAINS.ask("1 + 2", "ko"), CHAINS.ask("1 + 2")]
    metrics = rollout_metrics(problems, rollout_with([[0, 1]] * 4), rewards)
    assert (metrics["accuracy_ko"], metrics["accuracy_en"]) == (1.0, 0.5)
    assert (metrics["language_ko"], metrics["language_en"]) == (0.5, 2.5)
    one_language = rollout_metrics(problems[:1], rollout_with([[0, 1]] * 4), rewards)
    assert "accuracy_ko" not in one_language


def test_sums_are_sums_and_the_gap_is_the_largest():
    parts = [{"tokens": torch.tensor(3), "logp_gap": torch.tensor(0.5)}]
    parts.append({"tokens": torch.tensor(4), "logp_gap": torch.tensor(0.25)})
    assert totals(parts) == {"tokens": 7.0, "logp_gap": 0.5}
    assert totals([]) == {"tokens": 0.0, "loss": 0.0, "logp_gap": 0.0}


def test_metrics_of_updates_are_weighed_by_their_tokens():
    """A minibatch of no token that teaches has none of the means over tokens."""
    short = {"tokens": 10, "ratio": 10.0, "k3_old": 1.0, "loss": 1.0, "logp_gap": 0.5}
    long = {"tokens": 30, "ratio": 42.0, "k3_old": 0.0, "loss": 2.0, "logp_gap": 0.7}
    short |= {"grad_norm": 3.0, "weight_norm": 8.0}
    long |= {"grad_norm": 1.0, "weight_norm": 9.0}
    expected = {"ratio": 1.3, "k3_old": 0.025, "loss": 1.5, "grad_norm": 2.0, "weight_norm": 8.5}
    assert update_metrics([short, long]) == pytest.approx(expected | {"logp_gap": 0.5})
    silent = totals([]) | {"grad_norm": 0.0, "weight_norm": 9.0}
    found = update_metrics([silent, long])
    assert (found["ratio"], found["loss"], found["grad_norm"]) == (1.4, 1.0, 0.5)
    assert "ratio" not in update_metrics([silent, silent])


def test_metrics_of_the_updates_do_not_depend_on_the_minibatches():
    model = small_model()
    _, rollout = sample(SMALL, small_model(9), 1)
    rollout.mask &= rollout.mask.cumsum(dim=1) <= torch.arange(16)[:, None] % 11 + 1
    inputs, teaches = loss_inputs(SMALL, model, None, rollout, torch.arange(1.0, 17))
    logps = token_logps(model(rollout.tokens), rollout.tokens).detach()
    gap = (logps - rollout.logps)[rollout.mask]
    rows = torch.arange(16).numpy()
    for parts in (1, 3):
        cut = [part.numpy() for part in torch.from_numpy(rows).chunk(parts)]
        updates = [add_gradient(SMALL, model, rollout, inputs, part, teaches) for part in cut]
        for sums in updates:
            sums["grad_norm"] = sums["weight_norm"] = 2.0
        metrics = update_metrics(updates)
        assert metrics["ratio"] == pytest.approx(gap.exp().mean().item(), rel=1e-5)
        assert metrics["grad_norm"] == 2.0
        worst = max(sums["logp_gap"] for sums in updates)
        assert worst == pytest.approx(gap.abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_number_that_is_not_finite_stops_the_run(value):
    check_finite("r1_zero", 6, {"loss": 1.0, "grad_norm": 2.0})
    for metrics in ({"loss": value, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": value}):
        with pytest.raises(
            FloatingPointError, match=rf"r1_zero stopped at step 7: \w+ is {value};"
        ):
            check_finite("r1_zero", 6, metrics)


class NoDoubles(TorchDispatchMode):
    """Refuses what a device without float64 refuses, as MPS does."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = operator(*args, **kwargs or {})
        for x in filter(torch.is_tensor, tree_leaves(given)):
            assert x.dtype != torch.float64, operator
        return given


def test_a_step_asks_for_no_float64():
    """Sampling, rewards, updates, metrics and a look: some devices have none."""
    config = replace(SMALL, steps=1, beta=0.1, eval_every=1)
    policy = small_model()
    with NoDoubles():
        run_grpo(config, by_length, policy)
