"""The house is as drawn, and its pages say what is so: commands parse, names exist, numbers are
the runs'."""

import ast
import json
import math
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

import train
from data import TASKS
from data.corpus import document_batches
from data.signs import Signs, is_held_out
from experiments.study.collect import TABLES, markdown
from grpo import VARIANTS, clipped_weight, sequence_ratio
from kit import flags
from model import save_tensors
from r1 import controls
from tests.small import PAGES, PROSE, SMALL, Unsaved, run_grpo, small_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOWER = {"data", "grpo", "model", "rewards"}
MAY_IMPORT = {
    **{room: set() for room in ("grpo", "model", "rewards")},
    "data": {"data"},
    "sample": LOWER,
    "kit": LOWER | {"sample", "kit"},
    "train": LOWER | {"sample", "kit"},
    "rlhf": LOWER | {"sample", "kit", "train", "rlhf"},
    "r1": LOWER | {"sample", "kit", "train", "rlhf", "r1"},
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


def test_nobody_assigns_to_a_name_of_train():
    """Rewards, rollouts and advantages are arguments: nothing needs to be patched from outside."""
    assigned = re.compile(r"^\s*train\.\w+ = |setattr\(train,|patch\w*\(\W*train\.", re.MULTILINE)
    assert assigned.search("    monkeypatch.setattr(train, 'score', score)")
    paths = [*(ROOT / "tests").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    assert len(paths) > 20
    for path in paths:
        if path != Path(__file__):
            assert not assigned.search(path.read_text()), path


def test_the_four_packages_are_pinned():
    pins = (ROOT / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} == PACKAGES
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in pins)


@pytest.mark.docs
def test_commands_of_the_pages_parse(tmp_path, monkeypatch):
    (tmp_path / "out" / "signs-cpu-grpo-seed0").mkdir(parents=True)  # that --resume goes on with
    saved = {"settings": asdict(train.Config().filled())}
    save_tensors(tmp_path / "out" / "signs-cpu-grpo-seed0" / "last.pt", saved)
    monkeypatch.chdir(tmp_path)
    prose = "".join(page.read_text() for page in PAGES if page.name.startswith("README"))
    commands = re.findall(r"python (-m [\w.]+|\w+\.py)([^`#\n]*)", prose)
    assert len(commands) >= 40
    for script, arguments in commands:
        path = script.removeprefix("-m ").replace(".", "/") + ".py"
        assert (ROOT / (path if script.startswith("-m") else script)).exists(), script
        theirs = re.search("--help|SEED|BASE|[$]|harder|--task mine", arguments)  # the reader's
        if script == "train.py" and not theirs:
            words = arguments.split()
            flags.parse(train.Config, train.PRESETS, words, "", script)


@pytest.mark.docs
def test_files_tests_and_flags_that_the_pages_name_exist():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert len(re.findall(r"`(test_\w+)`", PROSE)) >= 40
    scripts = (ROOT / "sample.py", *(ROOT / "experiments").rglob("*.py"))
    knobs = {flag for path in scripts for flag in re.findall(r'"--([a-z_]+)"', path.read_text())}
    configs = train.Config, controls.Config  # of R1's controls, which has every knob of its stages
    knobs |= {field.name for config in configs for field in fields(config)}
    knobs |= {"help", "noconftest"}
    knobs |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}  # torchrun's
    for page in PAGES:
        text = page.read_text()
        if page.name == "NOTES.md":
            continue  # what was tried with the code and the flags of its time
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in code, f"{page}: {name}"
        for path in re.findall(r"`([a-z_/]+(?:\.py|/))`", text):
            there = (ROOT / path).exists() or (page.parent / path).exists()
            assert there or path == "mine.py", f"{page}: {path}"  # the reader's own
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / path).exists(), f"{page}: {path}"
        assert set(re.findall(r"--([a-z_]+)", text)) <= knobs, page


@pytest.mark.docs
def test_the_table_of_the_log_has_each_field_and_no_other():
    page = (ROOT / "experiments" / "watch" / "README.md").read_text()
    section = page.partition("## The log, field by field")[2].partition("\n##")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    config = replace(SMALL, steps=1, beta=0.01, task="chains-en-ko")
    config = replace(config, rewards="accuracy=1,format=1,language=1")
    _, records = run_grpo(config)
    run, other = Unsaved(), replace(config, task="signs")
    for each in (config, other):
        web = document_batches(each.task, range(1, 3), 0, 512, 96)
        train.imitate(each, run, "base", small_model(task=each.task), web, 1, 1e-3)
    ours = {"right_tokens", *records[0]}.union(
        *run.records
    )  # nothing that this model says is right
    # Of each rule by language the table names two as an example.
    others = {f"{rule}_{x}" for rule in ("reward", "format") for x in ("en", "ko")}
    others |= {name for name in ours if "_thinks_in_" in name}  # nor the measures of two languages
    signs = TASKS["signs"]
    tried = "<think>\n 7 : 4 - 3 = 1 * 6 = 6 no</think>"
    ours |= signs.measures(signs.parse(signs.example), tried).keys()
    assert names == ours - others


@pytest.mark.docs
def test_the_readmes_table_of_variants_is_that_of_the_code():
    rows = {
        row[0]: row[1:]
        for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)
    }
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
            assert clip == ", ".join(
                "none" if bound == math.inf else f"{bound:g}" for bound in clip_of(row)
            )
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


@pytest.mark.docs
@pytest.mark.parametrize("name", TABLES)
def test_the_readmes_table_is_that_of_the_results(name):
    assert markdown(name, results_of(name)) in PROSE


def test_the_main_job_reaches_what_it_should_for_every_seed():
    runs = results_of("cpu")["runs"]
    assert len(runs) >= 3
    for run in runs:
        base, trained = run["base"], run["r1_zero"]
        assert 0.1 <= base["pass@1"] <= 0.3
        assert trained["by_level"]["2"] >= 0.92 and trained["by_level"]["3"] >= 0.75
        assert trained["by_level"]["4"] >= 0.45
        assert trained["format"] >= 0.95
        assert trained["completion_tokens"] >= 2.5 * base["completion_tokens"]
        assert base["thinking"]["tries"] < Signs.most_tries < trained["thinking"]["tries"]


def test_the_chains_reach_what_they_should_for_every_seed():
    for run in results_of("chains")["runs"]:
        assert 0.05 <= run["base"]["pass@1"] <= 0.40
        assert run["r1_zero"]["pass@1"] >= 0.90
        assert run["r1_zero"]["format"] >= 0.95
        assert run["r1_zero"]["completion_tokens"] >= 2 * run["base"]["completion_tokens"]


@pytest.mark.docs
def test_the_korean_page_shows_what_the_english_page_shows():
    """The same transcript, picture, story and commands, and no table that could grow old."""
    korean = (ROOT / "README.ko.md").read_text()
    blocks = re.compile("```(?:text|bash)\n(.*?)```", re.S)
    transcript, install, *_ = blocks.findall(README)
    assert blocks.findall(korean)[0] == transcript and "\n| " not in korean
    assert install.partition("#")[0] == blocks.findall(korean)[1].partition("#")[0]
    assert re.findall(r"!\[.*?\]\((.*?)\)", korean) == re.findall(r"!\[.*?\]\((.*?)\)", README)
    told = [re.findall(r"^- \*\*([A-Z][\w-]+)\*\* \(", page, re.M) for page in (README, korean)]
    assert told[0] == told[1] and len(told[0]) >= 4
    (run,) = [block for block in blocks.findall(README) if "sample.py  " in block]
    for line in run.splitlines():
        assert line.partition("#")[0].strip() in korean, line


@pytest.mark.docs
def test_the_readmes_transcripts_are_of_held_out_problems():
    asked = re.findall(r"^User: make \d+ from ([\d ]*)$", README, re.MULTILINE)
    assert len(asked) >= 2
    for numbers in asked:
        assert is_held_out(tuple(map(int, numbers.split()))), numbers
