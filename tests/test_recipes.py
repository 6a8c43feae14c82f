"""The recipes of experiments/lessons/recipes.md: each is applied to a copy of the tree, where its
command runs; and the page's sentences say what the recorded runs gave."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo import VARIANTS
from model import load_model, save_model
from tests.small import PROSE, SHAPE_FLAGS, small_model

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "experiments" / "lessons" / "recipes.md").read_text()
RECIPE = re.compile(
    r"^## ([^\n]+)\n(?:(?!^#).)*?```diff\n(.*?)```\n+```bash\n(python train\.py.*?[^\\])\n",
    re.M | re.S,
)
RECIPES = {name: (diff, command) for name, diff, command in RECIPE.findall(PAGE)}
SMALL = [
    *("--pretrain_steps=2", "--steps=1", "--prompts=2", "--group_size=4", "--max_new_tokens=12"),
    *("--eval_problems=8", *SHAPE_FLAGS),
]


def python(folder, *arguments):
    """What a command of Python prints in a folder, where it must succeed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def tree(tmp_path):
    """A copy of what a run needs, in no git repository."""
    for path in (*ROOT.glob("*.py"), ROOT / "data", ROOT / "kit", ROOT / "pyproject.toml"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    return tmp_path


def test_the_page_has_five_recipes_of_ten_lines_or_fewer():
    """Their lines that are added or taken away are counted."""
    assert len(RECIPES) == 5 == PAGE.count("```diff")
    for diff, _ in RECIPES.values():
        assert 1 <= len(re.findall(r"^[+-](?![+-])", diff, re.M)) <= 10


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_applies_and_runs(name, tree):
    """The diff applies and ruff has no complaint; the command shows what was changed."""
    diff, command = RECIPES[name]
    subprocess.run(["git", "apply", "-"], cwd=tree, input=diff, text=True, check=True)
    changed = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
    for check in (("check",), ("format", "--check")):
        python(tree, "-m", "ruff", *check, "--quiet", *changed)
    program, *flags = command.removeprefix("python ").replace("\\\n", "").split()
    if "--init" in flags:  # a model that nobody trained will do
        flags[flags.index("--init") + 1] = "base.pt"
        save_model(tree / "base.pt", small_model())
    shown = python(tree, program, *flags, *SMALL)
    (log,) = tree.glob("out/*/log.jsonl")
    record = json.loads(log.read_text().splitlines()[-1])
    if "clipping" in name or "advantage" in name:
        assert "(of my own)" in shown
    elif "KL" in name:
        assert "k3_ref" in record
    elif "reward" in name:
        assert {"careful", "careful_std"} <= set(record)
        code = "from rewards import RULES; print(RULES['careful']('#1 a ok #2 b', None))"
        assert python(tree, "-c", code) == "0.5\n"
    else:
        code = "from data import TASKS; print(TASKS['chains-max'].parse('2 ^ 3 + 1'))"
        parsed = python(tree, "-c", code)
        assert "what is 2 max 3 plus 1?" in parsed and "answer='4'" in parsed
        assert " max " in (tree / "out" / "max" / "samples.txt").read_text()


def test_the_stage_of_ones_own_goes_on_where_it_was_stopped(tree):
    """The page's script as it stands: run whole, and stopped by SIGINT in its own stage."""
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tree / "mine.py").write_text(script)
    python(tree, "-m", "ruff", "check", "--quiet", "mine.py")
    python(tree, "-m", "ruff", "format", "--check", "--quiet", "mine.py")
    small = [*SHAPE_FLAGS, "--max_level=2", "--pretrain_lr=1e-2", "--group_size=4", "--seed=1"]
    small += ["--pretrain_steps=1000", "--max_new_tokens=12", "--preset=tiny"]
    python(tree, "mine.py", *small, "--out=whole")
    command = [sys.executable, "mine.py", *small, "--out=stopped"]
    run = subprocess.Popen(command, cwd=tree, stderr=subprocess.PIPE, text=True)
    log = tree / "stopped" / "log.jsonl"
    while not (log.exists() and '"mine"' in log.read_text()):
        assert run.poll() is None, "it ended before it could be stopped"
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == 130 and "of mine is saved. To go on: python mine.py --resume=" in said
    python(tree, "mine.py", "--resume=stopped")
    whole, stopped = (load_model(tree / name / "mine.pt") for name in ("whole", "stopped"))
    assert all(map(torch.equal, whole.parameters(), stopped.parameters()))
    assert json.loads((tree / "stopped" / "result.json").read_text())["right completions"] > 0


@pytest.mark.slow
def test_new_rows_of_grpo_leave_its_tests_green(tree):
    """The three recipes for grpo.py, one upon the other: the tests of the equations pass, and the
    tables of `bias` have the new rows."""
    for folder in ("tests", "experiments"):
        shutil.copytree(ROOT / folder, tree / folder)
    diffs = [diff for diff, _ in RECIPES.values() if "+++ b/grpo.py" in diff]
    assert len(diffs) == 3
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], cwd=tree, input=diff, text=True, check=True)
    paths = ("tests/test_grpo.py", "tests/test_enumeration.py")
    assert "passed" in python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths)
    tables = python(tree, "-m", "experiments.lessons.bias")
    for name in ("mean", "harder", "both_sides", "both"):
        assert re.search(rf"^ *{name} .*\d$", tables, re.M), name


def recorded(part):
    """A number of each run of experiments/results/changes.json, by the name of the run."""
    path = ROOT / "experiments" / "results" / "changes.json"
    return {run["name"]: run[part] for run in json.loads(path.read_text())["runs"]}


def test_the_page_says_what_the_recorded_runs_gave():
    """The sentences here are made from experiments/results/changes.json."""
    grpo, clip, advantage = (recorded("all steps")[name] for name in ("grpo", "clip", "advantage"))
    right = {name: f"{100 * value:.1f} %" for name, value in recorded("pass@1").items()}
    first, last = recorded("first 10"), recorded("last 10")
    tokens, base = recorded("completion_tokens"), recorded("base pass@1")
    text = " ".join(PAGE.split())
    for sentence in (
        f"over the run falls from {grpo['grad_norm']:.2f} to {advantage['grad_norm']:.2f}",
        f"`accuracy` over the run goes from {grpo['accuracy']:.2f} to {advantage['accuracy']:.2f}, "
        f"and the end from {right['grpo']} to {right['advantage']}",
        f"rise from {grpo['clip_low']:.5f} and {grpo['clip_high']:.5f} to "
        f"{clip['clip_low']:.4f} and {clip['clip_high']:.4f}",
        f"({right['clip']}, against {right['grpo']})",
        f"it is {last['kl']['entropy']:.3f}, between the {last['k3']['entropy']:.3f} of `--kl k3` "
        f"and the {last['k2']['entropy']:.4f} of `--kl k2`",
        f"({right['kl']}, between {right['k3']} and {right['k2']})",
        f"{first['careful']['careful']:.2f} over the first ten steps, "
        f"{last['careful']['careful']:.2f} over the last",
        f"from {tokens['grpo']:.1f} to {tokens['careful']:.1f} tokens, "
        f"and are right as often ({right['careful']})",
        f"{100 * base['task']:.1f} % before, {right['task']} after",
    ):
        assert sentence in text, sentence


def test_the_readme_says_how_far_the_variants_came():
    """The page's range over the variants is of the recorded runs."""
    ends = [100 * right for name, right in recorded("pass@1").items() if name in VARIANTS]
    said = f"({min(ends):.1f} to {max(ends):.1f} % of held-out problems"
    assert said in " ".join(PROSE.split())
