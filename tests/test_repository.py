"""The README says what is so: its commands parse, its names exist, its numbers are those of the runs."""

import ast
import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import train
from data.arithmetic import is_held_out
from experiments.collect import TABLES, markdown
from grpo import VARIANTS, clipped_weight, sequence_ratio
from model import save_tensors
from tests.small import SMALL, run_grpo, tokenizer, unsaved

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAY_IMPORT = {
    "grpo": set(),
    "model": set(),
    "rewards": set(),
    "data": {"data"},
    "sample": {"data", "grpo", "model", "rewards"},
    "train": {"data", "grpo", "model", "rewards", "sample"},
}
PACKAGES = {"torch", "tiktoken", "numpy", "tqdm"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_the_design_allows(room):
    files = list((ROOT / room).glob("*.py")) or [ROOT / f"{room}.py"]
    for path in files:
        others = set(imports(path)) - set(sys.stdlib_module_names)
        assert others <= MAY_IMPORT[room] | PACKAGES, path


def test_the_core_stays_small():
    lines = sum(len((ROOT / f"{room}.py").read_text().splitlines()) for room in MAY_IMPORT if room != "data")
    assert lines < 2220


def test_the_four_packages_are_pinned():
    pins = (ROOT / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} == PACKAGES
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in pins)


def test_commands_of_the_readme_parse(tmp_path, monkeypatch):
    (tmp_path / "out" / "cpu-grpo-seed0").mkdir(parents=True)  # that --resume goes on with
    save_tensors(tmp_path / "out" / "cpu-grpo-seed0" / "last.pt", {"settings": asdict(train.Config())})
    monkeypatch.chdir(tmp_path)
    before, changes, after = re.split("^## (?:Change it|What to look at).*$", README, flags=re.MULTILINE)
    assert "diff" in changes, "the commands there are run by test_recipes.py"
    commands = re.findall(r"^python (\S+)(.*?)(?:#.*)?$", before + after, re.MULTILINE)
    assert len(commands) >= 5
    for script, arguments in commands:
        assert script == "-m" or (ROOT / script).exists()
        if script == "train.py" and "--help" not in arguments:
            train.parse_config(arguments.split())


def test_files_tests_and_flags_that_the_readme_names_exist():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    tests = re.findall(r"`(test_\w+)`", README)
    assert len(tests) >= 10
    for name in tests:
        assert f"def {name}(" in code, name
    for path in re.findall(r"`([a-z_/]+(?:\.py|/))`", README):
        assert (ROOT / path).exists(), path
    scripts = (ROOT / "sample.py", *(ROOT / "experiments").glob("*.py"))
    knobs = {flag for path in scripts for flag in re.findall(r'"--([a-z_]+)"', path.read_text())}
    knobs |= {field.name for field in train.fields(train.Config)} | {"help", "careful_weight"}  # README's example
    assert set(re.findall(r"--([a-z_]+)", README)) <= knobs


def test_the_readmes_table_of_the_log_has_each_field_and_no_other():
    section = README.partition("### The log, field by field")[2].partition("\n##")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    _, records = run_grpo(replace(SMALL, steps=1, beta=0.01, languages="en,ko"))
    run, more = unsaved(replace(SMALL, pretrain_steps=1), "pretrain")
    train.pretrain(run.config, run, tokenizer)
    assert names == {"right_tokens", *records[0], *more[0]}  # nothing that this model says is right


def test_the_readmes_table_of_variants_is_that_of_the_code():
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)}
    assert len(rows) == 7
    for name, (advantage, ratio, clip, divided) in rows.items():
        row = VARIANTS[name]
        assert (
            advantage
            == {
                "std": "over the standard deviation",
                "none": "as it is",
                "leave_one_out": "less the others' mean instead",
            }[row.scale]
        )
        assert ratio.startswith("none") == (row.ratio is None)
        assert ("by output" in ratio) == (row.ratio is sequence_ratio)
        assert ("constant weight" in ratio) == (row.surrogate is clipped_weight)
        if row.ratio:
            assert clip == ", ".join("none" if bound == math.inf else f"{bound:g}" for bound in clip_of(row))
        assert (
            divided
            == {
                "output_mean count_outputs": "each output's tokens, then outputs",
                "output_sum count_outputs": "outputs",
                "output_sum count_tokens": "tokens of the step",
                "output_sum count_budget": "outputs x `--max_new_tokens`",
            }[f"{row.per_output.__name__} {row.normalizer.__name__}"]
        )


def clip_of(row):
    return row.clip_low, row.clip_high


def results_of(name):
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", TABLES)
def test_the_readmes_table_is_that_of_the_results(name):
    assert markdown(name, results_of(name)) in README


def test_the_main_job_reaches_what_it_should_for_every_seed():
    runs = results_of("cpu")["runs"]
    assert len(runs) >= 3
    for run in runs:
        assert 0.05 <= run["base"]["pass@1"] <= 0.40
        assert run["r1_zero"]["pass@1"] >= 0.90
        assert run["r1_zero"]["format"] >= 0.95
        assert run["r1_zero"]["completion_tokens"] >= 2 * run["base"]["completion_tokens"]


def test_the_readmes_transcripts_are_of_held_out_problems():
    asked = re.findall(r"^User: what is (.*)\?$", README, re.MULTILINE)
    assert len(asked) >= 2
    for words in asked:
        assert is_held_out(words.replace("plus", "+").replace("minus", "-")), words
