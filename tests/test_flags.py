"""The command lines of train.py and sample.py: what they take, and what they refuse in one line."""

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch

import sample
import train
from kit import flags
from model import ModelConfig, Transformer, save_model
from tests.small import SHAPE, small_model
from train import Config


def parsed(arguments):
    return flags.parse(Config, train.PRESETS, arguments, "", "train.py")


def test_every_knob_is_a_flag_with_its_comment_for_help(capsys):
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
    config = parsed(["--preset", "tiny", "--seed", "3", "--lr", "0.5"])
    settings = {"preset": "tiny", "seed": 3, "lr": 0.5, "out": "out/tiny-grpo-seed3"}
    assert config == Config(**train.PRESETS["tiny"] | settings)
    assert parsed([]) == replace(Config(), out="out/cpu-grpo-seed0")


@pytest.mark.parametrize("cuda", [True, False])
def test_the_preset_is_gpu_where_there_is_one(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = parsed([])
    assert (config.preset, config.device) == (("gpu", "cuda") if cuda else ("cpu", "cpu"))
    assert parsed(["--preset=cpu"]).device == "cpu"


def test_a_stage_adds_its_own_knobs(capsys):
    """Flags of a subclass are in its help, with choices and ranges; train.py's help knows none."""

    @dataclass(frozen=True)
    class Mine(Config):
        lam: float = 0.95  # how far a value looks ahead
        RANGES: ClassVar = Config.RANGES | {"lam": (0, 1)}

    config = flags.parse(Mine, train.PRESETS, ["--lam", "0.5", "--seed", "2"], "", "mine")
    assert (config.lam, config.seed, config.out) == (0.5, 2, "out/cpu-grpo-seed2")
    with pytest.raises(SystemExit):
        flags.parse(Mine, train.PRESETS, ["--lam", "1.5"], "", "mine")
    assert "mine: error: --lam must be from 0 to 1, not 1.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flags.parse(Mine, train.PRESETS, ["--help"], "", "mine")
    assert "how far a value looks ahead" in capsys.readouterr().out
    assert "lam" not in {field.name for field in fields(Config)}


def refused(command, arguments, capsys):
    """Run a command that must end with status 2 and one line; return the line."""
    with pytest.raises(SystemExit) as stop:
        command(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


ONE_UPDATE = "makes one update a rollout: add --minibatches 1 --inner_epochs 1"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--gropu_size 4", "unrecognized arguments: --gropu_size"),
        ("--preset huge", "invalid choice: 'huge'"),
        ("--variant ppo", "invalid choice: 'ppo'"),
        ("--dtype float16", "invalid choice: 'float16'"),
        ("--kl k4 --beta 1", "invalid choice: 'k4'"),
        ("--steps many", "invalid int value: 'many'"),
        ("--group_size 1", "--group_size must be from 2 to"),
        ("--eval_samples 7", "--eval_samples must be from 8 to"),
        ("--steps 0", "--steps must be from 1 to"),
        ("--n_head 0", "--n_head must be from 1 to"),
        ("--lr 0", "--lr must be from 1e-12 to"),
        ("--lr nan", "--lr must be from 1e-12 to 1e+30, not nan"),
        ("--lr 1e300", "--lr must be from 1e-12 to 1e+30, not 1e+300"),
        ("--beta -1", "--beta must be from 0 to"),
        ("--beta inf", "--beta must be from 0 to 1e+30, not inf"),
        ("--clip_low -0.1", "--clip_low must be from 0 to inf"),
        ("--temperature 0", "--temperature must be from 0.001 to"),
        ("--threads 99999999999", "--threads must be from 1 to 1024"),
        ("--seed 99999999999999999999", "--seed must be from 0 to 9.22337e+18"),
        (f"--minibatches {10**30}", "--minibatches must be from 1 to"),
        ("--beta 1 --reference_every -1", "--reference_every must be from 0 to"),
        ("--reference_every 5", "--reference_every needs --beta"),
        ("--kl k3_ratio", "--kl k3_ratio needs --beta"),
        ("--kl k1", "--kl k1 needs --beta"),
        ("--variant rloo", f"--variant rloo {ONE_UPDATE}"),
        ("--variant rloo --minibatches 1 --inner_epochs 2", f"--variant rloo {ONE_UPDATE}"),
        ("--variant rloo --minibatches 1 --clip_low 0.3", "--variant rloo has no clip"),
        ("--variant reinforce --minibatches 1 --clip_high 0.3", "--variant reinforce has no clip"),
        (
            "--rewards accuracy=0,format=0",
            "--rewards accuracy=0,format=0 must be rules with weights",
        ),
        ("--rewards beauty=1", "each of accuracy, format, language"),
        ("--rewards accuracy=inf", "must be rules with weights"),
        ("--rewards accuracy", "must be rules with weights"),
        ("--rewards accuracy=1e39", "must be rules with weights"),
        ("--pretrain_tokens 1", "--pretrain_tokens must be at least --max_seq_len 96"),
        ("--max_level 9 --max_new_tokens 20", "documents of --max_level 9: 102 tokens exceed the"),
        ("--max_level 1 --min_level 1", "--max_level must be from 2 to 12"),
        ("--max_level 13", "--max_level must be from 2 to 12"),
        ("--min_level 6", "--min_level 6 is above --max_level 5"),
        ("--max_seq_len 70", "context of 70"),
        ("--max_seq_len 40 --pretrain_tokens 100", "--max_seq_len must be from 48 to"),
        ("--eval_problems 3", "--eval_problems must be at least one for each level and language"),
        ("--operators +*", "--operators +* must be of +-"),
        ("--operators +/", "--operators +/ must be of +-"),
        ("--languages en,fr", "--languages en,fr must be of en,ko, each at most once"),
        ("--languages en,en", "--languages en,en must be of en,ko, each at most once"),
        ("--max_total 16", "--max_total must be from 17 to 99, not 16"),
        ("--cuda_graphs", "--cuda_graphs needs a CUDA device"),
        ("--preset gpu", "--device cuda cannot be used here"),
        ("--device cuda:77", "--device cuda:77 cannot be used here"),
        ("--device meta", "--device meta cannot be used here"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--init tests", "tests: a folder, not a model file such as tests/base.pt"),
        ("--init nowhere/base.pt", "nowhere/base.pt: there is no such file"),
        ("--n_head 5", "n_head"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(arguments, complaint, capsys, tmp_path):
    arguments = [*arguments.split(), "--out", str(tmp_path / "run")]
    assert complaint in refused(train.main, arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_task_at_its_bounds_is_accepted():
    for flags_ in (["--operators=+-", "--max_total=17"], ["--operators=+-*", "--max_total=99"]):
        assert parsed([*flags_, "--max_level=12"]).task.max_total in (17, 99)


def test_models_of_another_shape_or_vocabulary_are_refused(capsys, tmp_path):
    save_model(tmp_path / "other.pt", Transformer(ModelConfig(vocab_size=50, **SHAPE)))
    save_model(tmp_path / "short.pt", Transformer(replace(small_model().config, max_seq_len=30)))
    mine = replace(small_model().config, vocabulary="of a task of my own")
    save_model(tmp_path / "same_size.pt", Transformer(mine))
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
        arguments = ["--init", path, "--out", str(tmp_path / "run")]
        assert complaint in refused(train.main, arguments, capsys)
        assert complaint in refused(sample.main, ["7 + 8 - 3", "--checkpoint", path], capsys)
    arguments = ["--init", str(tmp_path / "short.pt"), "--out", str(tmp_path / "run")]
    advice = "add --n_layer 1 --n_head 2 --n_kv_head 1 --d_model 16 --d_ff 24 --max_seq_len 30"
    assert advice in refused(train.main, arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_problems_that_sample_cannot_ask_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no trained model in out/" in refused(sample.main, ["7 + 8 - 3"], capsys)
    save_model(tmp_path / "model.pt", small_model())
    arguments = ["--checkpoint", "model.pt"]
    for typed, complaint in (
        (["7 + banana"], '"banana" stands where a number'),
        ([" + ".join("7" * 60)], "context of 96"),
        (["7 + 8", "-n", "0"], "-n must be at least 1"),
        (["7 + 8", "--temperature", "nan"], "--temperature must"),
        (["7 + 8", "--seed", "9" * 20], "--seed must"),
    ):
        assert complaint in refused(sample.main, [*typed, *arguments], capsys)
