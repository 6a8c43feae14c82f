"""What people give to RLHF: curated answers, and choices between two answers of a model."""

import pytest
import torch

from data import TASKS, get_tokenizer
from data.requests import HELD_OUT, parts_of
from rlhf import preferences
from rlhf.preferences import Pair, curated_batches, judge_by_length, sample_pairs
from tests.small import small_model

REQUESTS, words = TASKS["requests"], get_tokenizer("world")
HOW = {"noise": 1e-9, "limit": 6, "seed": 0, "purpose": "test"}


@pytest.fixture(scope="module")
def model():
    return small_model(task="world")


def spoken(row):
    """The request of a row of ids, and its answer's text."""
    start, ids = row
    end = len(ids) - (ids[-1] == words.eos_id)
    prompt = words.decode(ids[:start])
    typed = prompt.removeprefix("User: ").removesuffix("\nAssistant:")
    return REQUESTS.parse(typed), words.decode(ids[start:end])


def test_curated_answers_are_few_good_and_about_training_numbers(model):
    """A batch is a function of the step; over many steps all answers are seen, and no other."""
    batch, seen = curated_batches(model, 40, 0), set()
    for step in range(20):
        tokens, mask, positions = batch(step)
        assert positions is None and torch.equal(tokens, batch(step)[0])
        for ids, predicted in zip(tokens, mask):
            ids, start = ids[ids != words.pad_id].tolist(), int(predicted.int().argmax())
            assert int(predicted.sum()) == len(ids) - start
            problem, text = spoken((start, ids))
            assert parts_of(problem)[1] not in HELD_OUT and ids[-1] == words.eos_id
            seen.add((problem.prompt, text, REQUESTS.gold(problem, text)))
    assert 30 < len(seen) <= 40 and min(gold for _, _, gold in seen) > -2
    assert sum(gold for _, _, gold in seen) / len(seen) > 2


@pytest.mark.parametrize("held_out", [False, True])
def test_a_pair_is_two_answers_to_one_request_the_better_first(model, held_out):
    """Without noise, that is. Its rows hold the tokens that the model sampled."""
    pairs = sample_pairs(model, 150, held_out=held_out, **HOW)
    assert pairs == sample_pairs(model, 150, held_out=held_out, **HOW)
    assert 100 < len(pairs) <= 150
    for pair in pairs:
        (one, chosen), (other, rejected) = spoken(pair.chosen), spoken(pair.rejected)
        assert one == other == pair.problem and chosen != rejected
        assert (parts_of(one)[1] in HELD_OUT) == held_out
        assert pair.lead == REQUESTS.gold(one, chosen) - REQUESTS.gold(one, rejected) >= 0
        for start, ids in (pair.chosen, pair.rejected):
            assert len(ids) - start == 6 or ids[-1] == words.eos_id
    assert len({pair.problem for pair in pairs}) >= 20


def test_pairs_do_not_depend_on_how_they_are_sampled_in_parts(model, monkeypatch):
    whole = sample_pairs(model, 50, **HOW)
    monkeypatch.setattr(preferences, "PART", 16)
    assert sample_pairs(model, 50, **HOW) == whole


def test_two_answers_that_are_the_same_are_no_pair():
    """Of a model that is sure of what it says, few are left."""
    model = small_model(task="world")
    with torch.no_grad():
        model.embedding.weight *= 60
    pairs = sample_pairs(model, 100, **HOW)
    assert 0 < len(pairs) < 90
    assert all(spoken(pair.chosen)[1] != spoken(pair.rejected)[1] for pair in pairs)


def test_noise_turns_choices_around(model):
    """And chooses the same pairs: with as much noise as can be, half of them the other way."""
    calm, noisy = (sample_pairs(model, 300, **HOW | {"noise": noise}) for noise in (1e-9, 1e9))
    assert [x.problem for x in calm] == [x.problem for x in noisy]
    turned = [a.lead < 0 for a, b in zip(noisy, calm) if b.lead > 0]
    assert len(turned) > 50 and 0.35 < sum(turned) / len(turned) < 0.65
    for a, b in zip(calm, noisy):
        assert {str(a.chosen), str(a.rejected)} == {str(b.chosen), str(b.rejected)}
        assert abs(a.lead) == abs(b.lead)


def test_the_judge_by_length_knows_lengths_and_nothing_else():
    """The share of choices that a length won; half for a length that was never met."""
    problem = REQUESTS.ask("about", 7, "en")

    def row(start, length):
        return start, [1] * (start + length)

    pairs = [
        Pair(problem, row(5, 3), row(5, 2), 1.0),
        Pair(problem, row(9, 3), row(9, 2), 1.0),
        Pair(problem, row(5, 2), row(5, 3), 1.0),
        Pair(problem, row(5, 4), row(5, 2), 1.0),
    ]
    score = judge_by_length(pairs)
    found = score([row(1, 2), row(7, 3), row(5, 4), row(5, 9)])
    torch.testing.assert_close(found, torch.tensor([1 / 4, 2 / 3, 1.0, 0.5]))
