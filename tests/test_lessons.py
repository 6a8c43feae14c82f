"""The lessons: what they print is true, and their pages show it."""

import contextlib
import io
import math
import re

import pytest
import torch

from experiments.lessons import td_lambda
from experiments.lessons.td_lambda import CRITICS, OUTPUTS, STEPS, chance, reward, value
from tests.small import PROSE


def said(command, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command(*arguments)
    return printed.getvalue()


# ------------------------------------------------------------------- from Monte Carlo to TD(lambda)


@pytest.fixture(scope="module")
def printed():
    return said(td_lambda.main)


@pytest.mark.docs
def test_the_page_shows_what_td_lambda_prints(printed):
    """A page holds both of its parts, to the letter."""
    for part in printed.split("\n\n", 1):
        assert f"```text\n{part.rstrip()}\n```" in PROSE


def test_the_advantages_are_weighted_sums_of_n_step_returns():
    """TD(lambda) by its first definition (Sutton 1988): of the sums of n rewards and the value
    behind them, each weighs lambda times the one before, and the whole reward takes the rest."""
    lam, critic = 0.8, CRITICS["half right"]
    found = td_lambda.estimates("half right", lam)
    for row, output in enumerate(OUTPUTS):
        for t in range(STEPS):
            left = STEPS - t
            total = lam ** (left - 1) * reward(output)
            for n in range(1, left):
                total += (1 - lam) * lam ** (n - 1) * critic(output[: t + n])
            assert found[row, t].item() == pytest.approx(total - critic(output[:t]))


def test_the_values_are_those_of_counted_outputs():
    """By the binomial distribution of the right steps to come."""
    for prefix in ((), ("+",), ("-", "+"), ("+", "-", "-")):
        left, need = STEPS - len(prefix), 3 - prefix.count("+")
        expected = sum(
            math.comb(left, k) * 0.7**k * 0.3 ** (left - k) for k in range(max(0, need), left + 1)
        )
        assert value(prefix) == pytest.approx(expected)
    assert sum(map(chance, OUTPUTS)) == pytest.approx(1)


def cells(line):
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


def test_what_the_page_says_of_lambda_is_so(printed):
    """A right critic: no error at lambda 0. Any critic: no bias at lambda 1. A wrong one: the
    lower lambda, the more bias. A large group's mean: a critic that knows the pass rate alone."""
    rows = {
        float(line.split()[0]): cells(line)[1:] for line in re.findall(r"^[01]\..*", printed, re.M)
    }
    assert list(rows) == list(td_lambda.LAMBDAS)
    assert rows[0.0][:2] == [0.0, 0.0] and rows[1.0][::2] == [0.0] * 4
    for critic in (1, 2, 3):
        biases = [row[2 * critic] for row in rows.values()]
        assert biases == sorted(biases, reverse=True) and biases[0] > 0.05
    errors = [math.hypot(*row[2:4]) for row in rows.values()]
    assert errors == sorted(errors), "half right: the whole error of one output grows with lambda"
    groups = [cells(line) for line in re.findall(r"^G = .*", printed, re.M)]
    assert [bias for bias, _ in groups] == [0.0] * 3
    noise = [each for _, each in groups]
    assert noise[0] > 1.3 * noise[1] > noise[2] > rows[1.0][7] > rows[1.0][5] > rows[1.0][1]


def test_bias_and_noise_are_those_of_a_simulation():
    """Outputs drawn at random, and groups of them: the same numbers, up to chance."""
    noise = torch.Generator().manual_seed(0)
    chances = torch.tensor([chance(output) for output in OUTPUTS])
    drawn = torch.multinomial(chances, 8 * 20000, replacement=True, generator=noise)
    earned = torch.tensor([reward(output) for output in OUTPUTS])[drawn].view(-1, 8)
    others = (earned.sum(dim=1, keepdim=True) - earned) / 7
    error = (earned - others).flatten()[:, None] - td_lambda.true_advantages()[drawn]
    bias, spread = td_lambda.bias_and_noise(*td_lambda.group_estimates(8))
    assert error.pow(2).mean().sqrt().item() == pytest.approx(math.hypot(bias, spread), rel=0.01)
    first = torch.tensor([output[0] == "+" for output in OUTPUTS])[drawn]
    gap = error[first, 0].mean() - error[~first, 0].mean()
    assert bias == pytest.approx(0, abs=1e-9) and abs(gap.item()) < 0.01
