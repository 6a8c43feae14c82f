"""Batches for imitation: what is predicted, how rows are put together, and that they are a function
of the step."""

import numpy as np
import pytest
import torch

from data import get_tokenizer
from data.batches import BATCHES_PER_POOL
from data.corpus import document_batches

TOKENIZER = get_tokenizer("chains")


def web(seed=0):
    return document_batches("chains", range(1, 6), seed, 512, 96)


def test_the_answer_and_the_end_are_predicted_the_question_is_not():
    """Nor is padding, nor a first token."""
    batches, questions = web(), 0
    assistant = TOKENIZER.encode("\nAssistant:")[0]
    for step in range(40):
        tokens, mask, positions = batches(step)
        assert positions is None
        for row, chosen in zip(tokens.tolist(), mask.tolist()):
            end = row.index(TOKENIZER.eos_id) + 1
            assert all(token == TOKENIZER.pad_id for token in row[end:])
            questions += assistant in row
            start = row.index(assistant) + 1 if assistant in row else 1
            assert chosen == [start <= t < end for t in range(len(row))]
    assert questions > 100


def test_batches_hold_about_as_many_tokens_as_asked_and_little_padding():
    """Rows of a batch are of like length; batches of a pool come in no order of length."""
    batches, real, width = web(), [], []
    for step in range(64):
        tokens, _, _ = batches(step)
        real.append((tokens != TOKENIZER.pad_id).sum().item())
        width.append(tokens.shape[1])
    assert np.mean(real) == pytest.approx(512, rel=0.05)
    sizes = [batches(step)[0].numel() for step in range(64)]
    assert sum(real) / sum(sizes) > 0.9
    pools = [width[i : i + BATCHES_PER_POOL] for i in range(0, 64, BATCHES_PER_POOL)]
    assert all(pool != sorted(pool) for pool in pools)


def test_a_batch_is_a_function_of_seed_and_step():
    """Asked for from any step on, in any order; each step has another."""
    whole, later, other = web(), web(), web(seed=1)
    seen = set()
    for step in (47, 5, 16, 63, 0):
        tokens, mask, _ = later(step)
        assert torch.equal(tokens, whole(step)[0]) and torch.equal(mask, whole(step)[1])
        assert tokens.shape != other(step)[0].shape or not torch.equal(tokens, other(step)[0])
        seen.add(str(tokens.tolist()))
    assert len(seen) == 5
