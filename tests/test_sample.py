"""Sampling: what was sampled is what the model says, row by row, whatever else is in the batch."""

import math
from dataclasses import replace

import pytest
import torch

import sample
from data import get_tokenizer
from grpo import token_entropy, token_logps
from kit.captured import CapturedDecoder
from model import ModelConfig, Transformer
from sample import decode_completions, generate, sample_tokens, uniform

CONFIG = ModelConfig(
    vocab_size=7, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, max_seq_len=40
)
EOS = 6
PROMPTS = [[1, 2, 3], [4], [5, 0, 1, 2, 3, 4, 5], [2, 2]]


def make_model(seed=0, eos_bias=1.0, **changes):
    """A random model in float64 whose distributions are far from uniform; the higher the bias, the
    sooner it ends."""
    model = Transformer(replace(CONFIG, **changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        model.embedding.weight[EOS] *= eos_bias
    return model


def rows_of(rollout):
    """Each row's sampled tokens, as lists: what must not depend on the batch."""
    return [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_sampled_log_probabilities_and_entropy_equal_the_training_forwards(temperature):
    model = make_model()
    rollout = generate(
        model, PROMPTS, group_size=5, max_new_tokens=6, temperature=temperature, eos_id=EOS, seed=1
    )
    assert 0 < rollout.finished.sum() < 20, "some rows should end by themselves and some be cut"
    logps = token_logps(model(rollout.tokens), rollout.tokens, temperature)
    gap = (logps - rollout.logps)[rollout.mask].abs().max()
    assert gap < 1e-6  # the rollout keeps float32
    assert (rollout.logps[~rollout.mask] == 0).all()
    gap = (
        (token_entropy(model(rollout.tokens), temperature) - rollout.entropy)[rollout.mask]
        .abs()
        .max()
    )
    assert gap < 1e-6
    assert (rollout.entropy[~rollout.mask] == 0).all()


def test_sampled_tokens_follow_the_models_distribution():
    """All 7 + 7 * 7 outcomes of two tokens, 20,000 samples, chi-squared against the exact
    probabilities."""
    model, samples = make_model(), 20_000
    rollout = generate(model, [[1, 2]], group_size=samples, max_new_tokens=2, eos_id=EOS, seed=7)
    counts = {}
    for row in rows_of(rollout):
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
        second = torch.stack(
            [model(torch.tensor([[1, 2, token]]))[0, -1].softmax(-1) for token in range(7)]
        )
    expected = {(EOS,): first[EOS].item() * samples}
    expected |= {
        (a, b): (first[a] * second[a, b]).item() * samples
        for a in range(7)
        if a != EOS
        for b in range(7)
    }
    assert sum(expected.values()) == pytest.approx(samples)
    chi_squared = sum((counts.get(key, 0) - value) ** 2 / value for key, value in expected.items())
    freedom = len(expected) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom), "four standard deviations"
    biased = sum(
        (counts.get(key, 0) - value) ** 2 / value
        for key, value in zip(expected, reversed(expected.values()))
    )
    assert biased > 10 * freedom, "the test must be able to fail"


def test_completions_of_one_prompt_are_drawn_apart():
    """The first tokens of a group are separate draws, not one draw copied."""
    rollout = generate(make_model(), [[1, 2]], group_size=64, max_new_tokens=1, eos_id=EOS)
    assert len(set(map(tuple, rows_of(rollout)))) > 2


def test_mask_is_true_on_sampled_tokens_and_the_end_token_and_nowhere_else():
    rollout = generate(make_model(), PROMPTS, group_size=8, max_new_tokens=12, eos_id=EOS, seed=3)
    assert rollout.finished.any()
    for row, (tokens, mask, finished) in enumerate(
        zip(rollout.tokens, rollout.mask, rollout.finished)
    ):
        prompt = PROMPTS[row // 8]
        assert tokens[: len(prompt)].tolist() == prompt
        end = int(mask.nonzero().max()) + 1
        assert mask.tolist() == [len(prompt) <= t < end for t in range(len(mask))], (
            "one unbroken stretch"
        )
        sampled = tokens[mask].tolist()
        assert (sampled[-1] == EOS) == bool(finished)
        assert EOS not in sampled[:-1]
        assert finished or len(sampled) == 12


def test_a_rollout_does_not_depend_on_how_it_is_batched():
    """Each prompt on its own gives the rows that it has in the batch of all: ragged prompts do not
    touch each other."""
    model = make_model()
    together = generate(model, PROMPTS, group_size=4, max_new_tokens=15, eos_id=EOS, seed=5)
    alone = []
    for i, prompt in enumerate(PROMPTS):
        alone += rows_of(
            generate(
                model,
                [prompt],
                group_size=4,
                max_new_tokens=15,
                eos_id=EOS,
                seed=5,
                first_row=4 * i,
            )
        )
    assert rows_of(together) == alone
    other_seed = generate(model, PROMPTS, group_size=4, max_new_tokens=15, eos_id=EOS, seed=6)
    assert rows_of(other_seed) != alone


def test_dropping_finished_rows_changes_no_token(monkeypatch):
    model = make_model()
    rollouts = []
    for every in (1, 3, 10**6):
        monkeypatch.setattr(sample, "LOOK_EVERY", every)
        rollouts.append(
            generate(model, PROMPTS, group_size=6, max_new_tokens=20, eos_id=EOS, seed=2)
        )
    for other in rollouts[1:]:
        assert torch.equal(rollouts[0].tokens, other.tokens)
        assert torch.equal(rollouts[0].mask, other.mask)
        torch.testing.assert_close(rollouts[0].logps, other.logps, rtol=0, atol=1e-6)


def test_finished_rows_stop_costing_and_prompts_are_prefilled_once():
    model, shapes = make_model(eos_bias=2.0), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    rollout = generate(model, PROMPTS, group_size=50, max_new_tokens=30, eos_id=EOS, seed=2)
    assert shapes[0] == (4, 7), "4 prompts, padded to the longest"
    needed, computed = int(rollout.mask.sum()), sum(rows for rows, _ in shapes[1:]) + 200
    assert computed < needed + sample.LOOK_EVERY * 200
    assert computed < 0.7 * 200 * 30


def test_temperature_zero_is_greedy_with_the_log_probabilities_of_temperature_one():
    model = make_model()
    rollout = generate(model, PROMPTS, max_new_tokens=6, temperature=0.0, eos_id=EOS)
    logits = model(rollout.tokens)
    likeliest = torch.nn.functional.pad(logits.argmax(-1)[:, :-1], (1, 0))
    assert torch.equal(rollout.tokens[rollout.mask], likeliest[rollout.mask])
    logps = token_logps(logits, rollout.tokens)
    torch.testing.assert_close(rollout.logps[rollout.mask], logps[rollout.mask].float())


def test_no_noise_ever_picks_an_impossible_token():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).repeat(5, 1)
    noise = torch.tensor([0.0, 0.49, 0.5, 0.75, 1 - 2.0**-24])
    tokens, _, _ = sample_tokens(logits, noise, temperature=1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 2]
    many = torch.randn(4000, 402, generator=torch.Generator().manual_seed(0)) * 8
    many[:, -3:] = -math.inf
    tokens, logps, _ = sample_tokens(many, torch.full((4000,), 1 - 2.0**-24), temperature=1.0)
    assert tokens.max() < 399
    assert logps.isfinite().all()


def test_noise_is_uniform_and_differs_by_seed_row_and_position():
    rows, positions = torch.arange(400).repeat_interleave(50), torch.arange(50).repeat(400)
    noise = uniform(11, rows, positions)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = torch.histc(noise, bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 4 * math.sqrt(38), "chi-squared over 20 bins"
    grid = noise.view(400, 50)
    for one, two in (
        (grid[:, 1:], grid[:, :-1]),  # neighbours in position
        (grid[1:], grid[:-1]),  # neighbours in row
        (noise, uniform(12, rows, positions)),  # neighbours in seed
        (noise, uniform(11, positions, rows)),  # row and position are not the same thing
    ):
        correlation = torch.corrcoef(torch.stack((one.flatten(), two.flatten())))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(one.numel())
    assert len(noise.unique()) > 0.99 * len(noise)
    assert torch.equal(uniform(2**63 - 1, rows, positions), uniform(2**63 - 1, rows, positions))


def test_prompts_that_cannot_be_continued_are_refused():
    with pytest.raises(ValueError, match="context of 40"):
        generate(make_model(), [[1] * 30], max_new_tokens=11, eos_id=EOS)
    with pytest.raises(ValueError, match="at least one token"):
        generate(make_model(), [[1], []], max_new_tokens=4, eos_id=EOS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("captured", [False, True])
def test_logits_that_are_nan_end_a_rollout(temperature, captured):
    """Weights that are finite can give them. No token out of bounds is drawn on the way: on a GPU
    that would end more than the rollout."""
    model, seen = make_model().float(), []
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.up.weight *= 1e30
    assert all(weight.isfinite().all() for weight in model.parameters())
    model.embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    how = {"max_new_tokens": 5, "temperature": temperature, "eos_id": EOS}
    sampler = CapturedDecoder(model, 4, 12).generate if captured else generate
    with pytest.raises(FloatingPointError, match="the model's logits are NaN") as error:
        sampler(model, PROMPTS, **how)
    assert "\n" not in str(error.value)
    assert len(seen) == 5 and all((0 <= x).all() and (x < 7).all() for x in seen)


def test_completions_are_decoded_without_prompt_and_end_token():
    tokenizer = get_tokenizer("chains")
    model = make_model(vocab_size=tokenizer.vocab_size)
    prompt = tokenizer.encode("User: what is 7 plus 8?\nAssistant:")
    rollout = generate(model, [prompt], group_size=3, max_new_tokens=5, eos_id=tokenizer.eos_id)
    for row, text in enumerate(decode_completions(rollout, tokenizer)):
        ids = rollout.tokens[row, len(prompt) :][rollout.mask[row, len(prompt) :]].tolist()
        assert text == tokenizer.decode([i for i in ids if i != tokenizer.eos_id])
