"""Runs small enough for a test, shared by the tests that make them."""

import math
from dataclasses import replace

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


def run_grpo(config):
    """GRPO on a small model, in no folder and never saved: the model, and the lines of the log."""
    run, records = Run(replace(config, save_every=math.inf), small_model(), "grpo"), []
    run.log = records.append
    grpo(config, run, tokenizer)
    return run.model, records
