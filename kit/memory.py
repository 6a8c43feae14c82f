"""The memory of a run: checked before the run computes anything."""

import math

import torch

from kit import parallel
from kit.evaluate import PART
from model import ModelConfig, Transformer
from sample import new_cache


def check_memory(config, model_config: ModelConfig) -> None:
    """Raise ValueError, in one line that names the flag to lower, if the device lacks the memory
    that a part of the run needs at least. Without this check, a run could fail after hours of
    work."""
    for what, size, advice in memory_needed(config, model_config):
        try:
            # Not torch.empty: it would fill the memory where algorithms are deterministic.
            torch.UntypedStorage(min(size, 2**62), device=config.device)
        except RuntimeError:
            reason = f"take {size / 1e9:.0f} GB, which {config.device} has not"
            raise ValueError(f"{what} {reason}: {advice}") from None
    if config.device.startswith("cuda"):
        torch.cuda.empty_cache()  # torch keeps what it was given, and others may share the card


def memory_needed(config, model_config: ModelConfig) -> list[tuple[str, int, str]]:
    """The parts of a run: what fills the memory, how many bytes it takes at least together with the
    weights, and which flag to lower. Several processes share all but the weights."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(model_config)
        model.in_bfloat16 = config.in_bfloat16
        row = new_cache(model, 1, config.max_seq_len)
    weights = sum(weight.numel() for weight in model.parameters())
    # In float32: the weights, their gradients and two moments of AdamW; the base; the reference.
    copies = 5 + (config.beta > 0)
    sampled = config.prompts * config.group_size
    evaluated = min(PART, config.eval_problems) * config.eval_samples
    processes = parallel.size()
    rows = math.ceil(max(sampled, evaluated) / processes)
    updated = min(config.micro_batch, math.ceil(sampled / config.minibatches / processes))
    position = bytes_kept(model_config, config.in_bfloat16)
    lower = "lower --prompts, --group_size or --eval_samples"
    parts = [
        (f"{weights:,} weights", 0, "lower --n_layer, --d_model or --d_ff"),
        (f"{rows:,} completions", rows * (row.keys.nbytes + row.values.nbytes), lower),
        (
            f"{updated:,} rows of an update",
            updated * config.max_seq_len * position,
            "lower --micro_batch",
        ),
        (
            f"{config.pretrain_tokens:,} tokens of a step",
            config.pretrain_tokens // processes * position,
            "lower --pretrain_tokens",
        ),
    ]
    return [(what, 4 * copies * weights + size, advice) for what, size, advice in parts]


def bytes_kept(config: ModelConfig, in_bfloat16: bool) -> int:
    """The bytes that a forward keeps of each position for its gradient, at least."""
    shared = config.n_kv_head * config.head_dim
    # A block keeps the inputs of its two norms, in float32. It keeps the inputs of its products, of
    # its attention and of its gate in the type in which it multiplies.
    norms, products = 2 * config.d_model, 4 * config.d_model + 2 * shared + 4 * config.d_ff
    block = 4 * norms + (2 if in_bfloat16 else 4) * products
    return config.n_layer * block + 4 * config.vocab_size  # and the logits
