"""Runs small enough for a test, shared by the tests that make them."""

from data.tokenizer import get_tokenizer
from model import ModelConfig, Transformer
from train import Config, Run, grpo

tokenizer = get_tokenizer()
SHAPE = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 24, "max_seq_len": 96}
SMALL = Config(preset="tiny", **SHAPE, prompts=4, group_size=4, max_new_tokens=12, steps=2, eval_problems=8)
SHAPE_FLAGS = [f"--{name}={value}" for name, value in SHAPE.items()]


def small_model(seed=0):
    model = Transformer(ModelConfig(tokenizer.vocab_size, **SHAPE, vocabulary=tokenizer.fingerprint))
    model.init_weights(seed)
    return model


def unsaved(config, phase):
    """A run of a small model in no folder, and the lines of its log."""
    run, records = Run(config, small_model(), phase), []
    run.log, run.save = records.append, lambda: None
    return run, records


def run_grpo(config):
    run, records = unsaved(config, "grpo")
    grpo(config, run, tokenizer)
    return run.model, records
