"""The README's changes of a few lines: each is applied to a copy of the tree, and its command runs there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.tokenizer import get_tokenizer
from model import ModelConfig, Transformer, save_model

ROOT = Path(__file__).parent.parent
RECIPE = re.compile(
    r"^### ([^\n]+)\n(?:(?!^#).)*?```diff\n(.*?)```\n+```bash\n(python train\.py[^\n]*)\n```", re.M | re.S
)
RECIPES = {name: (diff, command) for name, diff, command in RECIPE.findall((ROOT / "README.md").read_text())}
SHAPE = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 24, "max_seq_len": 96}
SMALL = [
    "--pretrain_steps=2", "--steps=1", "--prompts=2", "--group_size=4", "--max_new_tokens=12", "--eval_problems=4",
    *(f"--{name}={value}" for name, value in SHAPE.items()),
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
        save_model(folder / "base.pt", Transformer(ModelConfig(get_tokenizer().vocab_size, **SHAPE)))
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
        assert "objective: mine (mine)" in shown
        assert (folder / "out" / "cpu-mine-seed0").is_dir()
    if "KL" in name:
        assert "k3_ref" in record
    if "reward" in name:
        assert 0 < record["short"] < 1
        assert record["reward"] == pytest.approx(record["short"] + record["accuracy"] + record["format"], abs=1e-5)
    if "task" in name:
        code = "from data.arithmetic import *; print(parse_problem('2 * 3 + 1'))"
        said = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout
        assert "what is 2 times 3 plus 1?" in said and "answer='7'" in said
        assert " times " in (folder / "out" / "times" / "samples.txt").read_text()
