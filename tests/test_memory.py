"""kit/memory.py: what a run needs at least, and the one line that says which flag to lower."""

from dataclasses import replace

import pytest
import torch

import train
from grpo import token_logps
from kit import parallel
from kit.evaluate import PART
from kit.memory import bytes_kept, check_memory, memory_needed
from model import ModelConfig, Transformer
from sample import new_cache
from train import Config

MODEL = ModelConfig(80, 3, 4, 2, 64, 192, 128)
CONFIG = replace(Config(), max_seq_len=128)


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 2, 64, 192), (2, 4, 4, 128, 256)])
def test_a_position_keeps_at_least_what_is_counted(shape, in_bfloat16):
    """Counted on the tensors that autograd saves: no less than `bytes_kept`, and not twice it."""
    config = ModelConfig(80, *shape, 128)
    model, saved = Transformer(config), {}
    model.in_bfloat16 = in_bfloat16
    weights = {weight.data_ptr() for weight in model.parameters()}

    def keep(x):
        if x.data_ptr() not in weights and len(x) == 8:
            saved[x.data_ptr()] = x  # held, so that no other tensor gets its address
        return x

    tokens = torch.randint(0, 80, (8, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logps = token_logps(model(tokens), tokens)
    found = sum(x.untyped_storage().nbytes() for x in saved.values()) / tokens.numel()
    assert logps.requires_grad
    assert bytes_kept(config, in_bfloat16) <= found < 2 * bytes_kept(config, in_bfloat16)


def test_the_parts_of_a_run_are_counted(monkeypatch):
    """Copies of the weights, caches of the larger of rollout and evaluation, rows of an update; a
    process of two takes half of all but the weights."""
    model = Transformer(MODEL)
    weights = sum(weight.nbytes for weight in model.parameters())
    row = sum(x.nbytes for x in (new_cache(model, 1, 128).keys, new_cache(model, 1, 128).values))
    position = bytes_kept(MODEL, False)
    parts = [size - 5 * weights for _, size, _ in memory_needed(CONFIG, MODEL)]
    assert parts == [0, PART * 8 * row, 64 * 128 * position, 512 * position]
    more = replace(CONFIG, prompts=1024, beta=0.1, micro_batch=10**6, minibatches=3)
    parts = [size - 6 * weights for _, size, _ in memory_needed(more, MODEL)]
    assert parts == [0, 8192 * row, 2731 * 128 * position, 512 * position]
    monkeypatch.setattr(parallel, "size", lambda: 2)
    parts = [size - 6 * weights for _, size, _ in memory_needed(more, MODEL)]
    assert parts == [0, 4096 * row, 1366 * 128 * position, 256 * position]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": 10**6, "group_size": 10**6}, "completions take .* GB.*: lower --prompts"),
        ({"prompts": 1000, "micro_batch": 10**9, "minibatches": 1}, "lower --micro_batch"),
        ({"pretrain_tokens": 2**31 - 1, "micro_batch": 1}, "lower --pretrain_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_flag(changes, said):
    """In one line, by asking for the memory: terabytes, of which this wide model makes many."""
    with pytest.raises(ValueError, match=said) as refused:
        check_memory(replace(CONFIG, **changes), replace(MODEL, d_ff=65536))
    assert "\n" not in str(refused.value) and "which cpu has not" in str(refused.value)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_the_presets_fit_a_card_of_12_gb(preset):
    """As far as `memory_needed` counts, which is a lower bound."""
    config = Config(**train.PRESETS[preset]).filled()
    shape = (config.n_layer, config.n_head, config.n_kv_head, config.d_model, config.d_ff)
    parts = memory_needed(config, ModelConfig(100, *shape, config.max_seq_len))
    assert max(size for _, size, _ in parts) < 12e9
