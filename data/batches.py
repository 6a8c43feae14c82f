"""Batches for imitation: rows of like length together, made ahead by a thread.

A row is (tokens of its prompt, ids): the prompt is read, what follows it is to be predicted.
"""

import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

BATCHES_PER_POOL = 16
JUMPING = 0.7  # share of the rows whose positions jump, where any do

Row = tuple[int, list[int]]
# tokens (B, T) int64, right-padded; mask (B, T) bool of the tokens to predict; positions (B, T)
# int64 of the tokens, or None where they are 0, 1, 2, ...
Batch = tuple[Tensor, Tensor, Tensor | None]


def cut_pool(rows: list[Row], pad_id: int, rng: random.Random) -> list[Batch]:
    """Cut a pool into batches of about equal numbers of tokens. Sorting by length leaves little
    padding; the batches come in random order."""
    rows = sorted(rows, key=lambda row: len(row[1]))
    batches, count = [[] for _ in range(BATCHES_PER_POOL)], 0
    tokens = sum(len(ids) for _, ids in rows)
    for row in rows:
        batches[count * BATCHES_PER_POOL // tokens].append(row)
        count += len(row[1])
    rng.shuffle(batches)
    return [padded(batch, pad_id) for batch in batches]


def padded(rows: list[Row], pad_id: int) -> Batch:
    """Rows as one tensor, and the mask of the tokens to predict."""
    width = max(len(ids) for _, ids in rows)
    tokens = torch.tensor([ids + [pad_id] * (width - len(ids)) for _, ids in rows])
    starts = torch.tensor([max(start, 1) for start, _ in rows])  # nothing predicts token 0
    ends = torch.tensor([len(ids) for _, ids in rows])
    position = torch.arange(width)
    return tokens, (position >= starts[:, None]) & (position < ends[:, None]), None


def jumping(tokens: Tensor, line_breaks: list[int], context: int, noise: torch.Generator) -> Tensor:
    """Positions (B, T) int64 for tokens (B, T): they jump ahead where a line begins, at random, and
    stay below `context`.

    So a model meets every distance between two lines though documents are short, and can read on
    where no document went (Ruoss et al. 2023). Exponential numbers over their sum are the parts
    into which random cuts divide a row's whole jump.
    """
    B, T = tokens.shape
    begins = torch.isin(tokens, torch.tensor(line_breaks))
    parts = torch.empty(B, T).exponential_(generator=noise) * begins
    rest = torch.empty(B, 1).exponential_(generator=noise)  # the part that no line takes
    done = parts.cumsum(dim=1) / (parts.sum(dim=1, keepdim=True) + rest)
    whole, jumps = torch.rand(2, B, 1, generator=noise)
    whole = whole * (context - T) * (jumps < JUMPING)
    return torch.arange(T) + (done * whole).long()


class Batches:
    """The batch of each step, from `make_pool(number)`, the BATCHES_PER_POOL batches of a pool.

    Called with a step, it gives that step's batch. A thread makes the next pool while the model
    learns from this one, mostly outside of Python.
    """

    def __init__(self, make_pool: Callable[[int], list[Batch]]):
        self.make_pool = make_pool
        self.ahead = ThreadPoolExecutor(max_workers=1)
        self.pools: dict[int, Future] = {}  # this pool and the next

    def __call__(self, step: int) -> Batch:
        pool, index = divmod(step, BATCHES_PER_POOL)
        for number in (pool, pool + 1):
            if number not in self.pools:
                self.pools[number] = self.ahead.submit(self.make_pool, number)
        self.pools = {number: made for number, made in self.pools.items() if number >= pool}
        return self.pools[pool].result()[index]
