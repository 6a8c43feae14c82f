"""The lessons: what they print is true, and their pages show it."""

import contextlib
import inspect
import io
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from data import TASKS, get_tokenizer
from experiments.lessons import exercises, td_lambda
from experiments.lessons.td_lambda import CRITICS, OUTPUTS, STEPS, chance, reward, value
from grpo import ADVANTAGES, KL_ESTIMATORS, VARIANTS, Variant
from kit.run import ROOT
from rewards import RULES, accuracy
from tests import test_task
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


# ---------------------------------------------------------------------------------------- exercises

SOLUTIONS = {
    "grpo.py": (
        (
            "VARIANTS = {  # each row says where it departs from GRPO\n",
            '    "one_sided": Variant("of my own", clip_high=math.inf),\n'
            '    "median": Variant("of my own", scale="median"),\n',
        ),
        (
            "ADVANTAGES = {\n",
            '    "median": lambda rs, eps: rs - rs.quantile(0.5, dim=1, keepdim=True),\n',
        ),
        (
            "KL_ESTIMATORS = {\n",
            '    "k2_old": lambda ref_log_ratio, ratio: ratio.detach() * ref_log_ratio**2 / 2,\n',
        ),
    ),
    "rewards.py": (
        (
            '    "format": lambda text, problem: format_reward(text),\n',
            '    "brief": lambda text, x: accuracy(text, x) / (1 + len(text.split())),\n',
        ),
    ),
    "data/__init__.py": (
        ("from data.chains import Chains\n", "from data.mine import Sort\n"),
        ('        Signs("signs"),\n', '        Sort("mine"),\n'),
    ),
}


def solve(tree):
    """The solutions, in a copy of what a run needs and of the lessons."""
    for path in (*ROOT.glob("*.py"), ROOT / "data", ROOT / "kit", ROOT / "pyproject.toml"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tree / path.name)
    for path in ("experiments/__init__.py", *(f"experiments/{x}" for x in ("lessons", "watch"))):
        (tree / path).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        copy(ROOT / path, tree / path)
    for name, rows in SOLUTIONS.items():
        text = (tree / name).read_text()
        for after, row in rows:
            assert text.count(after) == 1, after
            text = text.replace(after, after + row)
        (tree / name).write_text(text)
    head = (
        "import re\nimport zlib\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n\n"
    )
    head += "from data.problem import Document, Problem\n\n\n"
    (tree / "data" / "mine.py").write_text(head + inspect.getsource(test_task.Sort))


def exercise(tree, *number):
    command = [sys.executable, "-m", "experiments.lessons.exercises", *number]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_solutions_solve_the_exercises(tmp_path):
    """A few lines each, and a task of 60, applied to a copy of the code."""
    solve(tmp_path)
    done = exercise(tmp_path)
    assert done.stdout == "".join(f"{n}  solved\n" for n in range(1, 6)), done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_no_exercise_is_solved_beforehand(number, capsys):
    with pytest.raises(SystemExit) as stop:
        exercises.main([str(number)])
    assert stop.value.code == 1
    assert re.fullmatch(
        rf'{number}  not yet: [\w.]+ has no row "\w+" yet\n', capsys.readouterr().out
    )


def counted(text, problem):
    return 1 / (1 + len(text.split()))


class Sorts(test_task.Sort):
    """A task whose splits are one."""

    def problem(self, rng, level, *, language="en", held_out=False):
        return self.ask(rng.sample(range(1, 5 * level + 1), 3))


@pytest.mark.parametrize(
    ("number", "table", "name", "row", "complaint"),
    [
        (1, VARIANTS, "one_sided", Variant("x"), "at ratio 1.3 and advantage 1 the gradient must"),
        (1, VARIANTS, "one_sided", Variant("x", clip_low=1.0, clip_high=math.inf), "0.5 and adv"),
        (
            1,
            VARIANTS,
            "one_sided",
            Variant("x", surrogate=lambda r, lp, a, low, high: r.clamp(min=1 - low) * a),
            "at ratio 0.5 and advantage 1 the gradient must be grpo's, 0.5, not 0",
        ),
        (2, ADVANTAGES, "median", ADVANTAGES["none"], "the rewards [0, 0, 0, 0, 2] must have"),
        (
            2,
            ADVANTAGES,
            "median",
            lambda groups, eps: groups - groups.median(dim=1, keepdim=True).values,
            "the rewards [0, 0, 1, 2] must have the advantages [-0.5, -0.5, 0.5, 1.5]",
        ),
        (3, RULES, "brief", accuracy, "1 word must earn more than 16"),
        (3, RULES, "brief", counted, "is no right answer and must earn 0"),
        (3, RULES, "brief", lambda text, problem: 1 - len(text) / 100, "all from 0 to 1"),
        (4, KL_ESTIMATORS, "k2_old", KL_ESTIMATORS["k2"], "away from the reverse KL's"),
        (4, KL_ESTIMATORS, "k2_old", KL_ESTIMATORS["k3_ratio"], "its value must be k2's"),
        (5, TASKS, "mine", TASKS["chains"], 'must have this as its name, not "chains"'),
        (5, TASKS, "mine", Sorts("mine"), "is both a training and a held-out problem"),
        (5, TASKS, "mine", test_task.Sort("mine", ruled=False), "its answer must be right"),
        (5, TASKS, "mine", type(TASKS["signs"])("mine"), "it asks what signs asks already"),
    ],
)
def test_half_a_solution_is_told_what_is_missing(number, table, name, row, complaint):
    """The mistakes that lie nearest."""
    get_tokenizer.cache_clear()  # one row after another is named "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table, name, row)
        shown = io.StringIO()
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(shown):
            exercises.main([str(number)])
    get_tokenizer.cache_clear()
    assert stop.value.code == 1 and complaint in shown.getvalue()
    assert shown.getvalue().count("\n") == 1
