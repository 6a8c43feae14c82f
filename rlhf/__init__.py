"""RLHF, the chapter before GRPO: a reward model, a value model, PPO, and DPO, which needs neither.

N pairs of answers; B rows; T token positions.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin are slow here

import torch
from torch import Tensor

from model import ScalarModel, Transformer


def check_alike(dims: str, **tensors: Tensor) -> None:
    """Raise ValueError, in one line, for tensors that are not all of one shape, which would
    broadcast, for numbers other than float32 or float64, and for a mask other than bool. `dims`
    says what the shape is: "(B, T)"."""
    first, shape = next((name, x.shape) for name, x in tensors.items())
    if len(shape) != sum(map(str.isalpha, dims)):
        raise ValueError(f"{first} must be {dims}, not {tuple(shape)}")
    for name, x in tensors.items():
        if x.shape != shape:
            shapes = f"{tuple(x.shape)} must have the shape of {first} {tuple(shape)}"
            raise ValueError(f"{name} {shapes}")
        types = (torch.bool,) if name == "mask" else (torch.float32, torch.float64)
        if x.dtype not in types:
            raise ValueError(f"{name} must be {' or '.join(map(str, types))}, not {x.dtype}")


def scalar_model(policy: Transformer) -> ScalarModel:
    """A reward or value model of the policy's size that starts from its trunk, and says 0
    everywhere."""
    model = ScalarModel(policy.config).to(policy.embedding.weight.device)
    model.trunk.load_state_dict(policy.state_dict())
    model.trunk.in_bfloat16 = policy.in_bfloat16
    return model
