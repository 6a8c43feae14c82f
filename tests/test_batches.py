"""Batches for imitation: what is predicted, how rows are put together, and that they are a function
of the step."""

import numpy as np
import pytest
import torch

from data import get_tokenizer
from data.batches import BATCHES_PER_POOL, JUMPING, jumping
from data.corpus import document_batches

TOKENIZER = get_tokenizer("chains")


def web(seed=0):
    return document_batches("chains", range(1, 6), seed, 512, 96)


def test_the_answer_and_the_end_are_predicted_the_question_is_not():
    """Nor is padding, nor a first token."""
    batches, questions = web(), 0
    assistant = TOKENIZER.encode("\nAssistant:")[0]
    for step in range(40):
        tokens, mask, _ = batches(step)
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


def jumping_web(seed=0):
    return document_batches("signs", range(1, 5), seed, 512, CONTEXT)


CONTEXT = 320
SIGNS = get_tokenizer("signs")


def test_positions_jump_where_a_line_begins_and_nowhere_else():
    """Each of some rows' lines, by any length; the others stay as they are."""
    batches, jumps, lasts, rows = jumping_web(), [], [], 0
    for step in range(64):
        tokens, _, positions = batches(step)
        begins = torch.isin(tokens, torch.tensor(SIGNS.line_breaks))
        assert positions.dtype == torch.int64 and (positions[:, 0] == 0).all()
        steps = positions.diff(dim=1) - 1
        assert (steps >= 0).all() and (positions < CONTEXT).all()
        assert (steps[~begins[:, 1:]] == 0).all()
        several = begins.sum(dim=1) > 2  # the prompt's, and those of two tries or more
        rows += several.sum().item()
        lasts += positions[several, -1].tolist()
        jumps += steps[several][begins[several][:, 1:]].tolist()
    stay = sum(last < 103 for last in lasts) / rows  # no document is longer
    assert 0.3 < stay < 0.5 and max(lasts) > 290
    assert np.mean(jumps) > 20 and np.mean(np.array(jumps) > 0) > 0.6 and max(jumps) > 200


def test_a_whole_jump_is_cut_at_random():
    """Of a row with three lines, the share that each takes has the mean 1/4: one is left over."""
    noise, (line,) = torch.Generator().manual_seed(0), SIGNS.encode("\n")
    tokens = torch.full((20_000, 10), 300)
    tokens[:, [2, 5, 9]] = line
    positions = jumping(tokens, [line], 1010, noise)
    moved = positions - torch.arange(10)
    assert (moved[:, :2] == 0).all() and (moved[:, 2] == moved[:, 4]).all()
    jumps = (moved[:, 9] > 0).float().mean().item()
    assert jumps == pytest.approx(JUMPING, abs=0.02)
    shares = torch.stack([moved[:, i] for i in (2, 5, 9)]).float().mean(dim=1) / JUMPING / 500
    np.testing.assert_allclose(shares, [1 / 4, 1 / 2, 3 / 4], atol=0.02)


def test_jumps_are_a_function_of_seed_and_step():
    whole, later = jumping_web(), jumping_web()
    for step in (37, 3):
        assert torch.equal(later(step)[2], whole(step)[2])
    assert not torch.equal(whole(3)[2][:, -1], whole(3)[2][0, -1].expand(len(whole(3)[2])))


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
