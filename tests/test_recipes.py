"""The README's changes of a few lines: each is applied to a copy of the tree, and its command runs there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo import VARIANTS
from model import save_model
from tests.small import SHAPE_FLAGS, small_model

ROOT = Path(__file__).parent.parent
RECIPE = re.compile(
    r"^### ([^\n]+)\n(?:(?!^#).)*?```diff\n(.*?)```\n+```bash\n(python train\.py[^\n]*)\n.*?```", re.M | re.S
)
RECIPES = {name: (diff, command) for name, diff, command in RECIPE.findall((ROOT / "README.md").read_text())}
SMALL = [
    "--pretrain_steps=2", "--steps=1", "--prompts=2", "--group_size=4", "--max_new_tokens=12", "--eval_problems=4",
    *SHAPE_FLAGS,
]  # fmt: skip


def run_recipe(name, folder):
    """Apply a diff to a copy of the tree and run its command there, made small; the last line of the log."""
    diff, command = RECIPES[name]
    wanted = ("*.py", "data", "requirements.txt")
    for path in (path for pattern in wanted for path in ROOT.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    python, script, *flags = command.split()
    if "--init" in flags:  # a model that nobody trained will do
        flags[flags.index("--init") + 1] = "base.pt"
        save_model(folder / "base.pt", small_model())
    done = subprocess.run([sys.executable, script, *flags, *SMALL], cwd=folder, capture_output=True, text=True)
    assert (python, done.returncode) == ("python", 0), done.stderr
    (log,) = folder.glob("out/*/log.jsonl")
    return folder, json.loads(log.read_text().splitlines()[-1]), done.stdout


def test_the_readme_has_the_five_recipes_each_of_ten_lines_or_fewer():
    assert len(RECIPES) == 5
    for diff, _ in RECIPES.values():
        assert 1 <= len(re.findall(r"^[+-](?![+-])", diff, re.M)) <= 10


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_readme_applies_and_runs(name, tmp_path):
    folder, record, shown = run_recipe(name, tmp_path)
    if "clipping" in name or "advantage" in name:
        assert "(of my own)" in shown
    if "KL" in name:
        assert "k3_ref" in record
    if "reward" in name:
        assert {"careful", "careful_std"} <= set(record)
        problems = "train.sample_problems(train.Config(), 'any', 0, 1, held_out=False)"
        rewards = f"train.score(train.Config(careful_weight=2.0), {problems}, ['#1 a ok #2 b'])"
        code = f"import train; print({rewards}['reward'])"
        said = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout
        assert said == "tensor([1.])\n", "twice one half"
    if "task" in name:
        code = "from data.arithmetic import *; print(parse_problem('2 ^ 3 + 1'))"
        said = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout
        assert "what is 2 max 3 plus 1?" in said and "answer='4'" in said
        assert " max " in (folder / "out" / "max" / "samples.txt").read_text()


def test_what_the_readme_says_of_the_recipes_is_what_the_runs_gave():
    """experiments/results/changes.json holds the runs; here are the sentences, made from it."""
    runs = json.loads((ROOT / "experiments" / "results" / "changes.json").read_text())["runs"]
    first, last, every, ended = (
        {run["name"]: run[part] for run in runs} for part in ("first 10", "last 10", "all steps", "pass@1")
    )
    right = {name: f"{100 * value:.1f} %" for name, value in ended.items()}
    grpo, clip, advantage = every["grpo"], every["clip"], every["advantage"]
    tokens, base = ({run["name"]: run[part] for run in runs} for part in ("completion_tokens", "base pass@1"))
    text = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"over the run falls from {grpo['grad_norm']:.2f} to {advantage['grad_norm']:.2f}",
        f"`accuracy` over the run goes from {grpo['accuracy']:.2f} to {advantage['accuracy']:.2f}, and the end from "
        f"{right['grpo']} to {right['advantage']}",
        f"rise from {grpo['clip_low']:.5f} and {grpo['clip_high']:.5f} to "
        f"{clip['clip_low']:.4f} and {clip['clip_high']:.4f}",
        f"({right['clip']}, against {right['grpo']})",
        f"it is {last['kl']['entropy']:.3f}, between the {last['k3']['entropy']:.3f} of `--kl k3` and the "
        f"{last['k2']['entropy']:.4f} of `--kl k2`",
        f"({right['kl']}, between {right['k3']} and {right['k2']})",
        f"{first['careful']['careful']:.2f} over the first ten steps, {last['careful']['careful']:.2f} over the last",
        f"from {tokens['grpo']:.1f} to {tokens['careful']:.1f} tokens, and are right as often ({right['careful']})",
        f"{100 * base['task']:.1f} % before, {right['task']} after",
    ):
        assert sentence in text, sentence
    ends = [ended[name] for name in VARIANTS if name in ended]
    assert f"({100 * min(ends):.1f} to {100 * max(ends):.1f} % of held-out problems" in text
