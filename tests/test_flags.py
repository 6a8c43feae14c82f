"""The command lines of train.py and sample.py: what they take, and what they refuse in one line."""

import json
import math
import re
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch

import sample
import train
from kit import flags
from model import ModelConfig, Transformer, save_model
from r1 import four_stages
from rewards import RULES
from rlhf import dpo, methods, reward_model
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
        name = re.escape(f"--{field.name}") + (f", --no-{field.name}" * (field.type is bool))
        (words,) = re.findall(rf"^  {name}\s(.*?)\[", shown, re.MULTILINE | re.DOTALL)
        assert words.strip(), f"{field.name} needs a comment in Config, two spaces before its #"
        assert f"[{field.default!r}]" in shown
    (rewards,) = re.findall(r"^  --rewards (.*?)\[", shown, re.MULTILINE | re.DOTALL)
    assert " ".join(rewards.split()).endswith(f": {', '.join(RULES)}")


def test_flags_go_over_the_preset_and_the_preset_over_the_defaults():
    config = parsed(["--preset", "tiny", "--seed", "3", "--lr", "0.5"])
    settings = {"preset": "tiny", "seed": 3, "lr": 0.5, "out": "out/chains-tiny-grpo-seed3"}
    of_task = {"min_level": 1, "max_seq_len": 96, "max_new_tokens": 64}
    assert config == Config(**of_task | train.PRESETS["tiny"] | settings)
    of_task = {"min_level": 1, "max_level": 4, "max_seq_len": 320, "max_new_tokens": 256}
    assert parsed([]) == Config(out="out/signs-cpu-grpo-seed0", **of_task)
    assert parsed(["--task=chains-99"]).levels == range(1, 9)


@pytest.mark.parametrize("cuda", [True, False])
def test_size_and_device_are_two_things(monkeypatch, cuda):
    """The device is a GPU where there is one; the sizes are the same until --preset says other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for preset in ("cpu", "gpu", "tiny"):
        config = parsed([f"--preset={preset}"])
        assert (config.preset, config.device) == (preset, "cuda" if cuda else "cpu")
    assert parsed([]).preset == "cpu"
    assert parsed(["--device=cpu"]).device == "cpu"


def test_a_stage_adds_its_own_knobs(capsys):
    """Flags of a subclass are in its help, with choices and ranges; train.py's help knows none."""

    @dataclass(frozen=True)
    class Mine(Config):
        lam: float = 0.95  # how far a value looks ahead, 95 % at first
        seed: int = 0  # of my own stage
        RANGES: ClassVar = Config.RANGES | {"lam": (0, 1)}

    config = flags.parse(Mine, train.PRESETS, ["--lam", "0.5", "--seed", "2"], "", "mine")
    assert (config.lam, config.seed, config.out) == (0.5, 2, "out/signs-cpu-grpo-seed2")
    with pytest.raises(SystemExit):
        flags.parse(Mine, train.PRESETS, ["--lam", "1.5"], "", "mine")
    assert "mine: error: --lam must be from 0 to 1, not 1.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flags.parse(Mine, train.PRESETS, ["--help"], "", "mine")
    shown = capsys.readouterr().out
    assert "looks ahead, 95 % at first" in shown and "of my own stage" in shown
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
        ("--group_size 1", "--group_size must be at least 2: an advantage compares with a group"),
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
        ("--clip_high 1e300", "--clip_high must be inf, or from 0 to 1e+30, not 1e+300"),
        ("--clip_low 1e300", "--clip_low must be inf, or from 0 to 1e+30, not 1e+300"),
        (f"--n_layer {10**30}", "--n_layer must be from 1 to 1024"),
        ("--n_layer 1000000000", "--n_layer must be from 1 to 1024"),
        ("--n_head 1000000000", "--n_head must be from 1 to 65536"),
        ("--d_model 1000000000", "--d_model must be from 1 to 65536"),
        ("--d_model 65536 --d_ff 65536 --n_layer 999", "weights take"),
        (
            "--max_seq_len 1000000000 --pretrain_tokens 1000000000",
            "--max_seq_len must be from 48 to 65536",
        ),
        (f"--group_size {10**11}", "--group_size must be from 1 to 1e+06"),
        ("--prompts 1000000000", "--prompts must be from 1 to 1e+06"),
        ("--eval_samples 10000000000", "--eval_samples must be from 8 to 1e+06"),
        ("--eval_problems 1000000000", "--eval_problems must be from 1 to 1e+06"),
        (
            "--group_size 1000000",
            "32,000,000 completions take 2359 GB, which cpu has not: lower --prompts",
        ),
        (
            "--eval_samples 1000000",
            "128,000,000 completions take 9437 GB, which cpu has not: lower",
        ),
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
        ("--rewards beauty=1", f"each of {', '.join(RULES)}, not all 0"),
        ("--rewards accuracy=inf", "must be rules with weights"),
        ("--rewards accuracy", "must be rules with weights"),
        ("--rewards accuracy=1e39", "must be rules with weights"),
        ("--pretrain_tokens 1", "--pretrain_tokens must be at least --max_seq_len 96"),
        ("--max_level 9 --max_new_tokens 20", "documents of --max_level 9: 102 tokens exceed the"),
        ("--max_level 1 --min_level 1", "--max_level must be higher: chains tells level 1 apart"),
        ("--max_level 13", "--max_level must be at most 12 for chains"),
        ("--min_level 6", "--min_level 6 is above --max_level"),
        ("--task sums", "invalid choice: 'sums'"),
        ("--max_seq_len 70", "context of 70"),
        ("--max_seq_len 40 --pretrain_tokens 100", "--max_seq_len must be from 48 to"),
        ("--eval_problems 3", "--eval_problems must be at least 4, one for each kind"),
        ("--cuda_graphs", "--cuda_graphs needs a CUDA device"),
        ("--device cuda", "--device cuda cannot be used here"),
        ("--device cuda:77", "--device cuda:77 cannot be used here"),
        ("--device meta", "--device meta cannot be used here"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--variant grpo --kl evil --beta 1", "invalid choice: 'evil'"),
        ("--init tests", "tests: a folder, not a model file such as tests/base.pt"),
        ("--init nowhere/base.pt", "nowhere/base.pt: there is no such file"),
        ("--n_head 5", "n_head"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(arguments, complaint, capsys, tmp_path):
    arguments = ["--task=chains", *arguments.split(), "--out", str(tmp_path / "run")]
    assert complaint in refused(train.main, arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_models_of_another_shape_or_vocabulary_are_refused(capsys, tmp_path):
    save_model(
        tmp_path / "other.pt", Transformer(ModelConfig(vocab_size=50, **SHAPE, task="chains"))
    )
    save_model(tmp_path / "short.pt", Transformer(replace(small_model().config, max_seq_len=30)))
    mine = replace(small_model().config, vocabulary="of a task of my own")
    save_model(tmp_path / "nobody's.pt", Transformer(replace(mine, task="sums")))
    save_model(tmp_path / "same_size.pt", Transformer(mine))
    broken = small_model()
    broken.embedding.weight.data[3, 4] = math.nan
    save_model(tmp_path / "broken.pt", broken)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:3000])
    for name, complaint in (
        ("other", "learned other words"),
        ("same_size", "learned other words"),
        ("nobody's", 'a model of the task "sums", which is not here'),
        ("cut", "cut.pt"),
        ("broken", "NaN or infinite"),
        ("missing", "missing.pt"),
    ):
        path = str(tmp_path / f"{name}.pt")
        arguments = ["--task=chains", "--init", path, "--out", str(tmp_path / "run")]
        assert complaint in refused(train.main, arguments, capsys)
        assert complaint in refused(sample.main, ["7 + 8 - 3", "--checkpoint", path], capsys)
    arguments = ["--task=chains", f"--init={tmp_path / 'short.pt'}", f"--out={tmp_path / 'run'}"]
    advice = "add --n_layer 1 --n_head 2 --n_kv_head 1 --d_model 16 --d_ff 24 --max_seq_len 30"
    assert advice in refused(train.main, arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_problems_that_sample_cannot_ask_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advice = "no trained model in out/: run `python train.py` to its end, or name "
    said = refused(sample.main, ["7 + 8 - 3"], capsys)
    assert f"{advice}a model with --checkpoint\n" in said
    (tmp_path / "out" / "stopped").mkdir(parents=True)
    for name in ("base", "last"):
        save_model(tmp_path / "out" / "stopped" / f"{name}.pt", small_model())
    said = refused(sample.main, ["7 + 8 - 3"], capsys)
    assert f"{advice}--checkpoint out/stopped/base.pt\n" in said
    save_model(tmp_path / "model.pt", small_model())
    arguments = ["--checkpoint", "model.pt"]
    for typed, complaint in (
        (["7 + banana"], '"banana" stands where a number'),
        (["7 더하기 8"], "this model was asked in en alone"),
        ([" + ".join("7" * 60)], "context of 96"),
        (["7 + 8", "-n", "0"], "-n must be from 1 to 4096"),
        (["7 + 8", "-n", "100000000"], "-n must be from 1 to 4096"),
        (["7 + 8", "--temperature", "nan"], "--temperature must"),
        (["7 + 8", "--seed", "9" * 20], "--seed must"),
    ):
        with pytest.raises(SystemExit) as stop:
            sample.main([*typed, *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and complaint in said and said.count("\n") == 1


def test_a_talk_says_who_speaks_and_what_lies_outside(capsys, tmp_path, monkeypatch):
    """Each question has new noise, unless --seed says which; quit, Ctrl-D and Ctrl-C end it."""
    save_model(tmp_path / "model.pt", small_model())
    arguments = ["--checkpoint", str(tmp_path / "model.pt")]

    def talk(lines, *more, end=EOFError):
        typed = iter(lines)

        def answer(prompt):
            line = next(typed, None)
            if line is None:
                raise end
            return line

        monkeypatch.setattr("builtins.input", answer)
        sample.main([*arguments, *more])
        return capsys.readouterr().out

    shown = talk(["2 + 2", "2 + 2", "9 * 9", "banana"])
    assert shown.startswith(f"{tmp_path}/model.pt: it learned chains, levels 1 to 5, such as 7 + 8")
    one, two = re.findall(r"what is 2 plus 2\?\nAssistant:(.*?)\n\n", shown, re.DOTALL)
    assert one != two
    outside = "(outside of what it learned: operators beside + -, a running total beside 0 to 20)"
    assert outside in shown and shown.count("(outside") == 1
    assert '"banana" stands where a number' in shown and shown.endswith("\n\n")
    shown = talk(["2 + 2", "2 + 2", "quit", "1 + 1"], "--seed", "3")
    one, two = re.findall(r"what is 2 plus 2\?\nAssistant:(.*?)\n\n", shown, re.DOTALL)
    assert one == two and "1 plus 1" not in shown
    assert talk([], end=KeyboardInterrupt).endswith("quit.\n\n")


def test_a_group_has_the_rewards_and_advantages_of_its_training(capsys, tmp_path):
    save_model(tmp_path / "model.pt", small_model())
    settings = {"min_level": 1, "max_level": 3, "rewards": "format=2,language=0"}
    settings["variant"] = "dr_grpo"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    sample.main(["2", "+", "2", "-n", "4", "--checkpoint", str(tmp_path / "model.pt")])
    shown = capsys.readouterr().out
    assert "levels 1 to 3" in shown and "rewarded for format=2,language=0" in shown
    rows = re.findall(r"^--- format ([01])  language 0  advantage ([+-].*)$", shown, re.MULTILINE)
    rewards = [2 * float(form) for form, _ in rows]
    assert len(rows) == 4
    for reward, (_, advantage) in zip(rewards, rows):  # dr_grpo: not over the deviation
        assert float(advantage) == pytest.approx(reward - sum(rewards) / 4, abs=0.01)


@pytest.mark.parametrize(
    ("Stage", "flag"),
    [
        (reward_model.Config, "lr"),
        (dpo.Config, "beta"),
        (methods.Config, "eval_every"),
        (methods.Config, "kl"),
        (four_stages.Config, "rewards"),
    ],
)
def test_a_knob_that_a_program_does_not_turn_is_no_flag(Stage, flag, capsys):
    assert set(Stage.UNUSED) < {field.name for field in fields(Stage)}
    assert flags.parse(Stage, reward_model.PRESETS, [], "", "it").seed == 0
    with pytest.raises(SystemExit):
        flags.parse(Stage, reward_model.PRESETS, [f"--{flag}", "1"], "", "it")
    assert f"it: error: unrecognized arguments: --{flag} 1" in capsys.readouterr().err


def test_a_knob_that_one_program_does_not_turn_is_a_flag_of_another():
    for Stage, name in ((dpo.Config, "eval_every"), (methods.Config, "beta")):
        config = flags.parse(Stage, reward_model.PRESETS, [f"--{name}", "3"], "", "it")
        assert getattr(config, name) == 3
