"""A task is one row: a throw-away task goes through the whole job, and no other file knows it."""

import ast
import contextlib
import io
import json
import os
import random
import re
import signal
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import data
import sample
import train
from data import NEEDS, TASKS, check_task, get_tokenizer
from data.corpus import check_words, encode_document
from data.problem import Document, Problem, sample_problems, stream
from experiments.machine.kill import log_without_times, outcome
from kit.run import ROOT, open_run
from model import load_model, save_model
from rewards import RULES, format_reward
from tests.small import CHAINS, SMALL, run_grpo, small_model

# ------------------------------------------------------------------------------------- the new task


@dataclass(frozen=True)
class Sort:
    """Sort three numbers: "5 2 9" is "2 5 9". None is above 5 n at level n."""

    name: str = "sort"
    example: str = "5 2 9"
    levels: tuple[int, int] = (1, 2)
    languages: tuple[str, ...] = ("en",)
    ruled: bool = True
    words: ClassVar = ("sort", "smallest", "then", "maybe")
    apart: ClassVar = ()
    more_turns: ClassVar = ()
    beyond: ClassVar = 4
    hardest: ClassVar = 19
    max_seq_len: ClassVar = 48
    max_new_tokens: ClassVar = 16
    verdicts: ClassVar = ()

    def problem(self, rng, level, *, language="en", held_out=False):
        while True:
            problem = self.ask(rng.sample(range(1, 5 * level + 1), 3))
            of_held_out = zlib.crc32(problem.expression.encode()) % 10 == 0
            if problem.level == level and held_out == of_held_out:
                return problem

    def ask(self, numbers):
        expression = " ".join(map(str, numbers))
        answer = " ".join(map(str, sorted(numbers)))
        prompt = f"User: sort {expression}.\nAssistant:"
        return Problem(prompt, answer, -(-max(numbers) // 5), "en", expression, self.name)

    def document(self, rng, levels, room=96):
        problem = self.problem(rng, rng.choice(levels))
        if rng.random() < 0.2:
            return self.thought(problem)
        numbers = problem.expression.split(" ")
        guess = " ".join(rng.sample(numbers, 3))
        tagged = f"<think> maybe</think><answer> {guess}</answer>"
        return Document(problem.prompt, rng.choice((tagged, f" {guess}.")), "guess")

    def thought(self, problem):
        thought = " smallest " + " then ".join(problem.answer.split(" "))
        text = f"<think>{thought}</think><answer> {problem.answer}</answer>"
        return Document(problem.prompt, text, "thought")

    def longest(self, level):
        return self.thought(self.ask([5 * level - i for i in range(3)]))

    def is_right(self, problem, given):
        return given == problem.answer if self.ruled else None

    def parse(self, text):
        numbers = re.fullmatch(r"(?:sort )?([0-9]{1,2}) ([0-9]{1,2}) ([0-9]{1,2})", text.strip())
        if not numbers:
            raise ValueError(f'write three numbers such as "{self.example}"')
        return self.ask(list(map(int, numbers.groups())))

    def outside(self, problem, levels):
        return "" if problem.level in levels else f"numbers above {5 * levels[-1]}"

    def measures(self, problem, completion):
        smallest = problem.answer.split(" ")[0]
        return {"names_smallest": float(f"<think> smallest {smallest} " in completion)}


# ---------------------------------------------------------------------------------------- its tests

SIZE = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "d_ff": 48}


@pytest.fixture(scope="module", autouse=True)
def rows():
    """The rows "sort" and, without a rule, "poems", for as long as these tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for task in (Sort(), Sort("poems", ruled=False)):
            patch.setitem(TASKS, task.name, task)
        yield
    get_tokenizer.cache_clear()


def config_for(folder, **changes):
    settings = {"task": "sort", "preset": "tiny", "pretrain_tokens": 256}
    settings |= {"pretrain_steps": 900, "pretrain_lr": 1e-2}
    settings |= {"steps": 12, "prompts": 32, "lr": 2e-3, "eval_every": 6}
    settings |= {"eval_problems": 64, "eval_samples": 8, "out": str(folder)}
    return train.Config(**settings | SIZE | changes).filled()


def job(config, **how):
    with open_run(config, "train.py") as run:
        train.r1_zero(config, run, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs") / "sort", io.StringIO()
    with contextlib.redirect_stdout(printed):
        job(config_for(folder))
    return folder, printed.getvalue()


def grpo_records(folder):
    return [record for record in log_without_times(folder) if record["stage"] == "r1_zero"]


def test_a_row_is_all_that_a_task_needs(whole):
    """From its documents alone to a policy that does it, on held-out problems."""
    result = json.loads((whole[0] / "result.json").read_text())
    base, r1_zero = result["base"], result["r1_zero"]
    assert base["thinking"].keys() == r1_zero["thinking"].keys() == {"names_smallest"}
    levels = {"by_level": {"1", "2"}, "apart": set(), "beyond": set("3456"), "by_language": {"en"}}
    assert {name: set(r1_zero[name]) for name in levels} == levels
    for before, after in (
        (base["pass@1"], r1_zero["pass@1"]),
        (base["format"], r1_zero["format"]),
        (base["thinking"]["names_smallest"], r1_zero["thinking"]["names_smallest"]),
    ):
        assert 0.02 < before < after - 0.2


def test_right_answers_that_are_no_numbers_earn_accuracy(whole):
    """In the log of training, not in silence 0; and document by document."""
    records = grpo_records(whole[0])
    assert records[0]["accuracy"] > 0.05
    assert np.mean([record["accuracy"] for record in records[-4:]]) > 2 * records[0]["accuracy"]
    task, rng, earned = TASKS["sort"], random.Random(0), Counter()
    for _ in range(300):
        written = task.document(rng, (1, 2))
        problem = task.parse(written.question[len("User: ") : -len(".\nAssistant:")])
        right = re.findall("[0-9]+", written.text)[-3:] == problem.answer.split(" ")
        tagged = format_reward(written.text) == 1
        assert RULES["accuracy"](written.text, problem) == (right and tagged)
        earned[right, tagged] += 1
    assert len(earned) == 4 and earned[True, True] > 50


def test_its_measures_reach_the_log_and_the_table(whole):
    """At each look, and in result.json under "thinking"."""
    folder, printed = whole
    result = json.loads((folder / "result.json").read_text())
    looks = [record for record in grpo_records(folder) if "held_out_accuracy" in record]
    assert [record["step"] for record in looks] == [6, 12]
    assert all(0 < record["names_smallest"] <= 1 for record in looks)
    shown = "".join(f"{result[x]['thinking']['names_smallest']:11.2f}" for x in ("base", "r1_zero"))
    assert re.search(f"^names_smallest +{shown.strip()}$", printed, re.MULTILINE)
    assert "in_steps" not in printed
    told = [json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()]
    assert all(said["prompt"].startswith("User: sort ") for x in told for said in x["problems"])
    assert all(len(said["answer"].split(" ")) == 3 for x in told for said in x["problems"])


def test_its_words_make_its_vocabulary(whole):
    """Beside them numbers and tags alone: no word of another task."""
    words = get_tokenizer("sort")
    others = set(get_tokenizer("chains").pieces) - {f" {word}".encode() for word in CHAINS.words}
    assert set(words.pieces) - others == {b" sort", b" smallest", b" then", b" maybe"}
    model = load_model(whole[0] / "r1_zero.pt").config
    assert (model.task, model.vocab_size) == ("sort", words.vocab_size)
    assert model.vocabulary == words.fingerprint != get_tokenizer("chains").fingerprint
    rng = random.Random(0)
    for _ in range(100):
        _, ids = encode_document(TASKS["sort"].document(rng, (1, 2)), words)
        assert words.decode(ids[:-1]).isascii() and all(i >= 256 or i in b" ." for i in ids)
        assert len(ids) <= len(encode_document(TASKS["sort"].longest(2), words)[1])


def test_a_task_more_changes_no_number_of_another():
    """Weights go by their names, rows of the embedding by their tokens; documents and problems by
    their own task."""

    def numbers():
        get_tokenizer.cache_clear()
        rng = stream(0, "any")
        written = [CHAINS.document(rng, (1, 2)) for _ in range(20)]
        return written, sample_problems(rng, CHAINS, (1, 2), 20), small_model().state_dict()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sort", "poems"):
            patch.delitem(TASKS, name)
        *texts, weights = numbers()
    *found, found_weights = numbers()
    assert found == texts
    torch.testing.assert_close(found_weights, weights, rtol=0, atol=0)
    other, rows = small_model(task="sort").state_dict(), "embedding.weight"
    for name in set(other) - {rows}:
        assert torch.equal(other[name], weights[name]), name
    pieces = get_tokenizer("chains").pieces
    ids = {piece: i for i, piece in enumerate(get_tokenizer("sort").pieces)}
    both = [(i, ids[piece]) for i, piece in enumerate(pieces) if piece in ids]
    assert len(both) > 256 + 100 and any(i != j for i, j in both)
    assert all(torch.equal(weights[rows][i], other[rows][j]) for i, j in both)


# --------------------------------------------------------------------------- stopped, and talked to


def test_its_run_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    """Stopped by SIGINT in the fifth step of GRPO; from the base model of the whole run."""
    folder, stopped_at = tmp_path / "run", 4
    config = config_for(folder, init=str(whole[0] / "base.pt"))
    honest = train.rules(train.rule_weights(config.rewards), get_tokenizer("sort"))

    def reward(problems, rollout, step):
        if step == stopped_at:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(problems, rollout, step)

    with pytest.raises(SystemExit) as stop:
        job(config, reward=reward)
    assert stop.value.code == 128 + signal.SIGINT
    assert "step 5 of r1_zero is saved. To go on: " in capsys.readouterr().err
    job(replace(config, resume=str(folder)))
    assert grpo_records(folder) == grpo_records(whole[0])
    found, expected = outcome(folder), outcome(whole[0])
    assert found.pop("log.jsonl") != expected.pop("log.jsonl")  # this run pretrained nothing
    assert found == expected


def test_a_person_may_ask_it(whole, capsys, monkeypatch):
    """Once, as a group and in a talk, in its own words."""
    path = str(whole[0] / "r1_zero.pt")
    sample.main(["5 2 9", "--checkpoint", path, "--temperature=0"])
    head, prompt, said, *_, verdict = capsys.readouterr().out.splitlines()
    assert head == f"{path}: it learned sort, levels 1 to 2, such as 5 2 9"
    assert prompt == "User: sort 5 2 9." and said.startswith("Assistant:<think>")
    given = re.search("<answer>(.*)</answer>$", said)[1].strip()
    right = "is right" if given == "2 5 9" else "is wrong: 2 5 9 is right"
    assert verdict == f"{given} {right}"
    sample.main(["sort", "5", "2", "9", "--checkpoint", path, "-n", "8"])
    shown = capsys.readouterr().out
    assert len(re.findall("^--- accuracy [01]  format [01]  advantage [-+]", shown, re.M)) == 8
    monkeypatch.setattr("sys.stdin", io.StringIO("5 2 9\n7 + 8\n30 2 9\nquit\n1 2 3\n"))
    sample.main(["--checkpoint", path])
    shown = capsys.readouterr().out
    assert re.findall("User: sort (.*)[.]", shown) == ["5 2 9", "30 2 9"]
    assert shown.count('write three numbers such as "5 2 9"\n') == 1
    assert shown.count("(outside of what it learned: numbers above 10)\n") == 1


@pytest.mark.parametrize("task", ["chains", "poems"])
def test_its_model_is_refused_for_another_task(task, whole, tmp_path, capsys):
    """In one line, and no folder is made; also for a task of the very same words."""
    settings = {"init": str(whole[0] / "base.pt"), "rewards": "format=1", "max_seq_len": 96}
    config = config_for(tmp_path / "run", task=task, **settings)
    with pytest.raises(SystemExit) as stop:
        job(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.endswith("base.pt learned another task: add --task sort")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------- what is missing, in one line


@pytest.mark.parametrize("name", TASKS)
def test_each_row_has_what_a_task_needs(name):
    """All that the head of data/__init__.py lists, and a token for each word of its documents."""
    listed = re.findall(r"^    (.*?)(?:  |\(| ->|$)", data.__doc__, re.M)
    assert [x for names in listed for x in names.split(", ")] == NEEDS.split()
    check_task(name)
    least, most = TASKS[name].levels
    check_words(name, range(least, most + 1), TASKS[name].max_seq_len)


def test_a_task_that_lacks_something_is_refused():
    """Before its settings are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Sort, "outside")
        patch.delattr(Sort, "measures")
        with pytest.raises(
            ValueError, match=r"^the task sort has no outside, no measures: the hea"
        ):
            replace(SMALL, task="sort")


def test_a_word_that_its_vocabulary_lacks_is_refused(tmp_path, capsys):
    """In one line at the door: else the model would spell it, byte by byte, for a whole run."""
    get_tokenizer.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sort, "words", ("sort", "smallest", "maybe"))
        with pytest.raises(SystemExit) as stop:
            job(config_for(tmp_path / "run"))
    get_tokenizer.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert "the documents of sort say 'then', which its words lack" in line


# --------------------------------------------------------------------------------- no rule, no room


def test_accuracy_refuses_a_task_without_a_rule():
    """In one line, at the first step: nothing could earn this point."""
    config = replace(SMALL, task="poems")
    with pytest.raises(ValueError, match="the task poems has a problem without a rule: leave"):
        run_grpo(config)


def test_accuracy_refuses_a_task_without_a_rule_at_the_door(tmp_path, capsys):
    """Before anything is computed, and no folder is made."""
    sizes = {"pretrain_steps": 5, "steps": 2, "prompts": 4, "eval_problems": 8}
    with pytest.raises(SystemExit) as stop:
        job(config_for(tmp_path / "run", task="poems", **sizes))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.endswith("without a rule: leave accuracy out of --rewards")
    assert not (tmp_path / "run").exists()


def test_a_task_without_a_rule_trains_by_format(tmp_path, capsys):
    """What nobody can grade is not graded: its accuracy is no number, and never a silent 0."""
    folder = tmp_path / "run"
    sizes = {"pretrain_steps": 100, "steps": 2, "prompts": 4, "eval_problems": 8, "eval_every": 1}
    job(config_for(folder, task="poems", rewards="format=1", **sizes))
    for record in grpo_records(folder):
        assert record["reward"] == record["format"] and "accuracy" not in record
        assert "held_out_accuracy" not in record
    text = (folder / "result.json").read_text()
    result = json.loads(text)["r1_zero"]
    assert {result[name] for name in ("pass@1", "pass@8", "maj@8", "greedy")} == {None}
    assert set((result["by_level"] | result["beyond"]).values()) == {None}
    assert 0 < result["format"] < 1 and "NaN" not in text
    assert "base model: pass@1 -, format" in capsys.readouterr().out


def test_sample_says_that_there_is_no_rule(tmp_path):
    save_model(tmp_path / "model.pt", small_model(task="poems"))
    talk = sample.Talk(tmp_path / "model.pt")
    problem, unruled = talk.task.parse("5 2 9"), "no rule says whether this is right; "
    verdict = talk.verdict(problem, "<answer> 2 5 9</answer>")
    assert verdict == f"{unruled}measures are all 0"
    verdict = talk.verdict(problem, "<think> smallest 2 ")
    assert verdict == f"{unruled}names_smallest 1"


ROOMS = {"data", "data.batches", "data.corpus", "data.problem", "data.tokenizer"}


def imports(path):
    """The full names of all that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_rooms_know_no_task_by_name():
    """They import TASKS, and what every task shares."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("kit/*.py"), ROOT / "data/corpus.py"]
    assert {"train.py", "sample.py", "run.py", "evaluate.py", "corpus.py"} <= {
        x.name for x in paths
    }
    modules = {f"data.{path.stem}" for path in ROOT.glob("data/*.py")}
    for path in paths:
        found = {name for name in imports(path) if name == "data" or name in modules}
        assert found <= ROOMS, path
    assert "data" in imports(ROOT / "train.py") and {"data.chains", "data.languages"} <= modules
