"""Several processes, one run: `torchrun --nproc_per_node 2 train.py`.

All processes hold the same weights. Each samples some groups of a rollout, and gathers the rest. So
all know the whole rollout, and compute the same rewards, advantages and counts from it. Each adds
its own rows to the gradient, which is summed before the optimizer step. What is not shared, each
process computes for itself. Without torchrun, these functions leave everything as it is.
"""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sample
from model import Transformer
from sample import Rollout, empty_rollout


class Lost(Exception):
    """Another process of the run has stopped, so this process cannot go on."""


def hush() -> None:
    """Leave speaking to the first process, and errors to the first process of each machine. A
    traceback is always shown."""
    if dist.is_torchelastic_launched():
        nowhere, here = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"), sys.stderr
        sys.stdout = sys.stdout if os.environ["RANK"] == "0" else nowhere
        sys.stderr = sys.stderr if os.environ["LOCAL_RANK"] == "0" else nowhere
        sys.excepthook = functools.partial(traceback.print_exception, file=here)


def start(device: str) -> None:
    """Join the other processes that torchrun started. Raises ValueError, in one line, for a device
    that they cannot share."""
    if not dist.is_torchelastic_launched():
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"torchrun takes --device cpu, or cuda for a GPU each, not {device}")
    if device == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes need a GPU each, and {gpus} are here")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_zero_only(method: Callable[..., None]) -> Callable[..., None]:
    """A function that does nothing in all processes but the first."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs) -> None:
        if rank() == 0:
            method(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wraps each exchange: it fails where another process has stopped."""
    try:
        yield
    except RuntimeError as error:  # of gloo and of nccl
        raise Lost(str(error)) from error


def gather(x: object) -> list:
    """What each process gives: plain data or arrays, in the order of the ranks."""
    found = [x] * size()
    if size() > 1:
        with together():
            dist.all_gather_object(found, x)
    return found


def mine(rows: int) -> np.ndarray:
    """Which rows of a batch are this process's, (rows,) bool. They take turns, so each process has
    a part of every group."""
    return np.arange(rows) % size() == rank()


def add_up(model: nn.Module, *numbers: Tensor) -> None:
    """Add up the gradients of a model, and other tensors, over the processes, in place."""
    if size() > 1:
        parts = [*(weight.grad for weight in model.parameters()), *numbers]
        flat = torch.cat([x.flatten() for x in parts])
        with together():
            dist.all_reduce(flat)
        for x, total in zip(parts, flat.split([x.numel() for x in parts])):
            x.copy_(total.view_as(x))


def copy_first(model: nn.Module) -> None:
    """Give every process the weights of the first."""
    for weight in model.state_dict().values() if size() > 1 else ():
        with together():
            dist.broadcast(weight, src=0)


def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    eos_id: int,
    group_size: int = 1,
    first_row: int = 0,
    **how,
) -> Rollout:
    """`sample.generate`, its groups shared among the processes. All get the whole rollout."""
    how |= {"eos_id": eos_id, "group_size": group_size}
    if size() == 1:
        return sample.generate(model, prompts, first_row=first_row, **how)
    first, end = (len(prompts) * each // size() for each in (rank(), rank() + 1))
    part = None
    if first < end:
        own = {"first_row": first_row + first * group_size}
        part = sample.generate(model, prompts[first:end], **own, **how)
    parts = gather(part and [x.cpu().numpy() for x in vars(part).values()])
    parts = [part for part in parts if part]
    rows, width = len(prompts) * group_size, max(tokens.shape[1] for tokens, *_ in parts)
    whole, row = empty_rollout(rows, width, eos_id, model.embedding.weight.device), 0
    for part in parts:
        for filled, given in zip(vars(whole).values(), part):
            filled[row:][tuple(map(slice, given.shape))] = torch.from_numpy(given)
        row += len(part[-1])
    return whole
