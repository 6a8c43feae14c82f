"""The memory of a run: checked before the run computes anything."""

import torch

from kit.evaluate import PART
from model import ModelConfig, Transformer
from sample import new_cache


def check_memory(config, model_config: ModelConfig) -> None:
    """Raise ValueError, in one line, if the device lacks the memory that training or the largest
    rollout needs at least. Without this check, a run could fail after hours of work."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(model_config)
        model.in_bfloat16 = config.in_bfloat16
        row = new_cache(model, 1, config.max_seq_len)
    weights = sum(weight.nbytes for weight in model.parameters())
    evaluated = min(PART, config.eval_problems) * config.eval_samples
    rows = max(config.prompts * config.group_size, evaluated)
    lower = "lower --prompts, --group_size or --eval_samples"
    for what, size, advice in (
        (f"{weights // 4:,} weights", 4 * weights, "lower --n_layer, --d_model or --d_ff"),  # AdamW
        (f"{rows:,} completions", rows * (row.keys.nbytes + row.values.nbytes), lower),
    ):
        try:
            torch.empty(min(size, 2**62), dtype=torch.uint8, device=config.device)
        except RuntimeError:
            reason = f"take {size / 1e9:.0f} GB, which {config.device} has not"
            raise ValueError(f"{what} {reason}: {advice}") from None
