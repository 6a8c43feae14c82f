"""Batches of documents: rows of like length together, made ahead by a thread.

A row is (tokens of its prompt, ids): the prompt is read, what follows it is to be predicted.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from data.arithmetic import Task
from data.corpus import Document, document, longest_document
from data.problem import stream
from data.tokenizer import Tokenizer, get_tokenizer

BATCHES_PER_POOL = 16

Row = tuple[int, list[int]]
Batch = tuple[Tensor, Tensor]  # tokens (B, T) int64, right-padded; mask (B, T): to be predicted


def encode_document(written: Document, tokenizer: Tokenizer) -> Row:
    """The tokens of a document, the end token last, and how many of them are its question."""
    question = tokenizer.encode(written.question)
    text = tokenizer.encode(written.text, tags=True)
    return len(question), [*question, *text, tokenizer.eos_id]


def cut_pool(rows: list[Row], pad_id: int, rng: random.Random) -> list[Batch]:
    """The batches of a pool, of as many tokens each. Sorting by length leaves little padding; the
    batches come in random order."""
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
    return tokens, (position >= starts[:, None]) & (position < ends[:, None])


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


def document_batches(
    task: Task, levels: Sequence[int], seed: int, tokens_a_batch: int, room: int
) -> Batches:
    """The web in miniature, batch by batch: documents of at most `room` tokens, none about a
    held-out problem."""
    tokenizer = get_tokenizer()

    def make_pool(number: int) -> list[Batch]:
        rng, rows, tokens = stream(seed, "documents", number), [], 0
        while tokens < BATCHES_PER_POOL * tokens_a_batch:
            rows.append(encode_document(document(rng, levels, task, room), tokenizer))
            tokens += len(rows[-1][1])
        return cut_pool(rows, tokenizer.pad_id, rng)

    return Batches(make_pool)


def check_room(task: Task, level: int, hardest: int, room: int, max_new_tokens: int) -> None:
    """Raise ValueError, in one line, where a document of the level, or a prompt of the hardest one
    and its completion, may not fit a context of `room` tokens."""
    _, written = encode_document(longest_document(level, task), get_tokenizer())
    prompt, _ = encode_document(longest_document(hardest, task), get_tokenizer())
    for name, tokens in (
        (f"level {hardest} with --max_new_tokens", prompt + max_new_tokens),
        (f"documents of --max_level {level}", len(written)),
    ):
        if tokens > room:
            reason = f"{tokens} tokens exceed the context of {room} (--max_seq_len)"
            raise ValueError(f"{name}: {reason}")
