"""The numbers in the log: metrics of a rollout and of its updates."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from data.problem import Problem
from kit.parallel import gather
from sample import Rollout

Rewards = dict[str, Tensor]  # (B,) each: "reward", which is maximised, and its parts by name


def weight_norm(model: nn.Module) -> float:
    """The norm of all weights together. After an update, it shows at once if a weight is NaN or
    infinite."""
    return torch.stack([weight.detach().norm() for weight in model.parameters()]).norm().item()


def check_finite(stage: str, step: int, numbers: dict[str, float]) -> None:
    """Raise FloatingPointError, in one line, for the first number that is NaN or infinite."""
    for name, x in numbers.items():
        if not math.isfinite(x):
            advice = "what was saved before is untouched; a lower learning rate may help"
            raise FloatingPointError(f"{stage} stopped at step {step + 1}: {name} is {x}; {advice}")


def check_rewards(rewards: Rewards, rollout: Rollout, rows: int) -> None:
    """Raise ValueError, in one line, if the rollout has not P * G rows, or if a reward is not one
    number for each row."""
    if len(rollout.finished) != rows:
        raise ValueError(f"the rollout must have {rows} rows, P * G, not {len(rollout.finished)}")
    for name, x in rewards.items():
        if x.shape != (rows,):
            found = tuple(x.shape)
            raise ValueError(f'rewards["{name}"] must be ({rows},), a number a row, not {found}')


def rollout_metrics(problems: list[Problem], rollout: Rollout, rewards: Rewards) -> dict:
    """The metrics of a rollout: means over its rows, and over its tokens for "entropy"."""
    G = len(rollout.tokens) // len(problems)
    groups = rewards["reward"].view(-1, G)
    tokens = torch.from_numpy(rollout.ends - rollout.starts).float()
    metrics = {
        **{name: values.mean().item() for name, values in rewards.items()},
        **{f"{name}_std": values.std().item() for name, values in rewards.items()},  # over all rows
        "completion_tokens": tokens.mean().item(),
        "entropy": rollout.entropy.sum().item() / tokens.sum().item(),
        "cut": 1 - rollout.finished.float().mean().item(),  # rows stopped by --max_new_tokens
        "no_signal": (groups == groups[:, :1]).all(dim=1).float().mean().item(),  # equal rewards
    }
    if "accuracy" in rewards:
        parts = {"right": rewards["accuracy"] == 1, "wrong": rewards["accuracy"] != 1}
        metrics |= {
            f"{name}_tokens": tokens[rows].mean().item()
            for name, rows in parts.items()
            if rows.any()
        }
    asked = sorted({problem.language for problem in problems})
    for language in asked if len(asked) > 1 else ():
        rows = torch.tensor([problem.language == language for problem in problems])
        rows = rows.repeat_interleave(G)
        metrics |= {
            f"{name}_{language}": values[rows].mean().item() for name, values in rewards.items()
        }
    return metrics


def totals(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of an update: sums over the micro-batches of all processes, and the maximum for
    "logp_gap". Reads from the device once."""
    names, read = list(parts[0]) if parts else [], []
    if parts:
        rows = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts])
        read = [dict(zip(names, row)) for row in rows.tolist()]
    read = [part for of_process in gather(read) for part in of_process]
    if not read:
        return {"tokens": 0.0, "loss": 0.0, "logp_gap": 0.0}
    columns = {name: [part[name] for part in read] for name in read[0]}
    return {name: (max if name == "logp_gap" else sum)(column) for name, column in columns.items()}


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step: means over the tokens of its updates, or over its updates. A step
    without any signal trains on no token, and has no means over tokens."""
    by_update, tokens = (
        ("loss", "grad_norm", "weight_norm"),
        sum(sums["tokens"] for sums in updates),
    )
    by_token = dict.fromkeys(name for sums in updates for name in sums)
    by_token = [name for name in by_token if name not in (*by_update, "tokens", "logp_gap")]
    return {
        **{
            name: sum(sums.get(name, 0) for sums in updates) / tokens for name in by_token if tokens
        },
        **{name: float(np.mean([sums[name] for sums in updates])) for name in by_update},
        "logp_gap": updates[0]["logp_gap"],  # sampler and trainer are one policy before any update
    }
