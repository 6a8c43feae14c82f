"""Sampling: what was sampled is what the model says, row by row, whatever else is in the batch."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from data.tokenizer import get_tokenizer
from grpo import token_entropy, token_logps
from model import ModelConfig, Transformer
from sample import CapturedDecoder, decode_completions, generate, sample_tokens, uniform

CONFIG = ModelConfig(vocab_size=7, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, max_seq_len=40)
EOS = 6
PROMPTS = [[1, 2, 3], [4], [5, 0, 1, 2, 3, 4, 5], [2, 2]]


def make_model(seed=0, eos_bias=1.0, **changes):
    """A random model in float64 whose distributions are far from uniform; the higher the bias, the sooner it ends."""
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
    rollout = generate(model, PROMPTS, group_size=5, max_new_tokens=6, temperature=temperature, eos_id=EOS, seed=1)
    assert 0 < rollout.finished.sum() < 20, "some rows should end by themselves and some be cut"
    logps = token_logps(model(rollout.tokens), rollout.tokens, temperature)
    gap = (logps - rollout.logps)[rollout.mask].abs().max()
    assert gap < 1e-6  # the rollout keeps float32
    assert (rollout.logps[~rollout.mask] == 0).all()
    gap = (token_entropy(model(rollout.tokens), temperature) - rollout.entropy)[rollout.mask].abs().max()
    assert gap < 1e-6
    assert (rollout.entropy[~rollout.mask] == 0).all()


def test_sampled_tokens_follow_the_models_distribution():
    """All 7 + 7 * 7 outcomes of two tokens, 20,000 samples, chi-squared against the exact probabilities."""
    model, samples = make_model(), 20_000
    rollout = generate(model, [[1, 2]], group_size=samples, max_new_tokens=2, eos_id=EOS, seed=7)
    counts = {}
    for row in rows_of(rollout):
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
        second = torch.stack([model(torch.tensor([[1, 2, token]]))[0, -1].softmax(-1) for token in range(7)])
    expected = {(EOS,): first[EOS].item() * samples}
    expected |= {(a, b): (first[a] * second[a, b]).item() * samples for a in range(7) if a != EOS for b in range(7)}
    assert sum(expected.values()) == pytest.approx(samples)
    chi_squared = sum((counts.get(key, 0) - value) ** 2 / value for key, value in expected.items())
    freedom = len(expected) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom), "four standard deviations"
    biased = sum((counts.get(key, 0) - value) ** 2 / value for key, value in zip(expected, reversed(expected.values())))
    assert biased > 10 * freedom, "the test must be able to fail"


def test_completions_of_one_prompt_are_drawn_apart():
    """The first tokens of a group are separate draws, not one draw copied."""
    rollout = generate(make_model(), [[1, 2]], group_size=64, max_new_tokens=1, eos_id=EOS)
    assert len(set(map(tuple, rows_of(rollout)))) > 2


def test_mask_is_true_on_sampled_tokens_and_the_end_token_and_nowhere_else():
    rollout = generate(make_model(), PROMPTS, group_size=8, max_new_tokens=12, eos_id=EOS, seed=3)
    assert rollout.finished.any()
    for row, (tokens, mask, finished) in enumerate(zip(rollout.tokens, rollout.mask, rollout.finished)):
        prompt = PROMPTS[row // 8]
        assert tokens[: len(prompt)].tolist() == prompt
        end = int(mask.nonzero().max()) + 1
        assert mask.tolist() == [len(prompt) <= t < end for t in range(len(mask))], "one unbroken stretch"
        sampled = tokens[mask].tolist()
        assert (sampled[-1] == EOS) == bool(finished)
        assert EOS not in sampled[:-1]
        assert finished or len(sampled) == 12


def test_a_rollout_does_not_depend_on_how_it_is_batched():
    """Each prompt on its own gives the rows that it has in the batch of all: ragged prompts do not touch each other."""
    model = make_model()
    together = generate(model, PROMPTS, group_size=4, max_new_tokens=15, eos_id=EOS, seed=5)
    alone = []
    for i, prompt in enumerate(PROMPTS):
        alone += rows_of(
            generate(model, [prompt], group_size=4, max_new_tokens=15, eos_id=EOS, seed=5, first_row=4 * i)
        )
    assert rows_of(together) == alone
    other_seed = generate(model, PROMPTS, group_size=4, max_new_tokens=15, eos_id=EOS, seed=6)
    assert rows_of(other_seed) != alone


def test_dropping_finished_rows_changes_no_token(monkeypatch):
    model = make_model()
    rollouts = []
    for every in (1, 3, 10**6):
        monkeypatch.setattr(sample, "LOOK_EVERY", every)
        rollouts.append(generate(model, PROMPTS, group_size=6, max_new_tokens=20, eos_id=EOS, seed=2))
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


def test_completions_are_decoded_without_prompt_and_end_token():
    tokenizer = get_tokenizer()
    model = make_model(vocab_size=tokenizer.vocab_size)
    prompt = tokenizer.encode("User: what is 7 plus 8?\nAssistant:")
    rollout = generate(model, [prompt], group_size=3, max_new_tokens=5, eos_id=tokenizer.eos_id)
    for row, text in enumerate(decode_completions(rollout, tokenizer)):
        ids = rollout.tokens[row, len(prompt) :][rollout.mask[row, len(prompt) :]].tolist()
        assert text == tokenizer.decode([i for i in ids if i != tokenizer.eos_id])


# ------------------------------------------------------------------------------------------- the captured decoder


@pytest.fixture
def small_graphs(monkeypatch):
    """Batches and caches of this size then go through many graphs."""
    monkeypatch.setattr(sample, "FEWEST_ROWS", 2)
    monkeypatch.setattr(sample, "FILLED_EVERY", 4)
    monkeypatch.setattr(sample, "CAPTURED_LOOK_EVERY", 3)


def assert_same(rollout, reference, tolerance=1e-5):
    for name in ("tokens", "mask", "finished"):
        assert torch.equal(getattr(rollout, name), getattr(reference, name)), name
    for name in ("logps", "entropy"):
        torch.testing.assert_close(getattr(rollout, name), getattr(reference, name), rtol=0, atol=tolerance)


def keys_of(decoder, monkeypatch):
    """The keys that the decoder's steps will have had."""
    keys, replay = [], decoder.replay
    monkeypatch.setattr(decoder, "replay", lambda *key: (keys.append(key), replay(*key)))
    return keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("group_size", "max_new_tokens", "temperature", "eos_bias"),
    [(1, 20, 1.0, 1.0), (5, 20, 1.0, 1.0), (8, 33, 0.7, -1.0), (3, 12, 0.0, 1.0), (11, 30, 1.0, 2.0), (4, 1, 1.0, 1.0)],
)
def test_a_captured_decoder_samples_what_the_plain_path_does(
    small_graphs, monkeypatch, dtype, group_size, max_new_tokens, temperature, eos_bias
):
    model = make_model(eos_bias=eos_bias).to(dtype)
    decoder = CapturedDecoder(model, 45, 40)
    keys = keys_of(decoder, monkeypatch)
    asked = {"group_size": group_size, "max_new_tokens": max_new_tokens, "temperature": temperature, "eos_id": EOS}
    for seed in (3, 4):
        captured = generate(model, PROMPTS, **asked, seed=seed, decoder=decoder)
        assert_same(captured, generate(model, PROMPTS, **asked, seed=seed), 1e-5 if dtype == torch.float32 else 1e-6)
    assert decoder.sizes == [45, 23, 12, 6, 3]
    if group_size >= 5:
        assert len({size for size, *_ in keys}) >= 2 or eos_bias < 0, "batches shrink"
        assert len({filled for _, filled, *_ in keys}) >= 3, "caches grow"


def test_a_captured_decoder_stops_when_all_rows_have_finished(small_graphs, monkeypatch):
    model = make_model(eos_bias=4.0)
    decoder = CapturedDecoder(model, 8, 40)
    keys = keys_of(decoder, monkeypatch)
    rollout = generate(model, PROMPTS, group_size=2, max_new_tokens=33, eos_id=EOS, decoder=decoder)
    assert rollout.finished.all()
    assert len(keys) < rollout.mask.sum(dim=1).max() + 3 < 33


def test_a_captured_decoder_follows_the_weights_and_keeps_nothing_of_the_rollout_before(small_graphs):
    model = make_model()
    decoder = CapturedDecoder(model, 30, 40)
    asked = {"max_new_tokens": 20, "eos_id": EOS, "seed": 2}
    first = generate(model, PROMPTS, group_size=7, **asked, decoder=decoder)
    before = [x.clone() for x in vars(first).values()]
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.roll(1, dims=0)
    second = generate(model, PROMPTS[::-1][:3], group_size=7, **asked, decoder=decoder)  # fewer rows
    assert_same(second, generate(model, PROMPTS[::-1][:3], group_size=7, **asked), 1e-6)
    assert all(map(torch.equal, before, vars(first).values())), "a rollout is not changed by the next"
    model.load_state_dict(make_model(seed=1).state_dict())
    third = generate(model, PROMPTS, group_size=7, **asked, decoder=decoder)
    assert_same(third, generate(make_model(seed=1), PROMPTS, group_size=7, **asked), 1e-6)
    assert rows_of(third) != rows_of(first)


def test_a_captured_decoder_takes_a_batch_in_parts(small_graphs):
    model = make_model()
    decoder, asked = CapturedDecoder(model, 8, 30), {"group_size": 4, "max_new_tokens": 15, "eos_id": EOS, "seed": 5}
    parts = [generate(model, PROMPTS[i : i + 2], **asked, first_row=4 * i, decoder=decoder) for i in (0, 2)]
    assert rows_of(parts[0]) + rows_of(parts[1]) == rows_of(generate(model, PROMPTS, **asked))


def test_a_captured_decoder_in_bfloat16_agrees_with_the_plain_path(small_graphs):
    """Other widths of batch and cache round otherwise, and a token drawn otherwise leads elsewhere: what is compared is
    each row as far as both have drawn the same."""
    model = make_model().float()
    model.in_bfloat16 = True
    decoder = CapturedDecoder(model, 40, 40)
    assert decoder.cache.keys.dtype == torch.bfloat16
    asked = {"group_size": 10, "max_new_tokens": 20, "eos_id": EOS, "seed": 1}
    plain, captured = generate(model, PROMPTS, **asked), generate(model, PROMPTS, **asked, decoder=decoder)
    width = min(plain.tokens.shape[1], captured.tokens.shape[1])
    same = (plain.tokens[:, :width] == captured.tokens[:, :width]).long().cumprod(dim=1).bool()
    same &= plain.mask[:, :width] & captured.mask[:, :width]
    assert same.sum() > 0.8 * plain.mask.sum()
    assert (plain.logps[:, :width] - captured.logps[:, :width])[same].abs().mean() <= 1e-2


def test_a_captured_step_reads_rows_and_positions_from_the_device(small_graphs):
    """The same key at other lengths and rows, which is all that changes between two replays, gives what the model says
    of those."""
    model = make_model()
    decoder, prompt = CapturedDecoder(model, 2, 12), torch.tensor([[1, 2, 3, 4, 5, 0, 1, 2], [4, 3, 2, 1, 0, 5, 4, 3]])
    decoder.noise.copy_(uniform(9, torch.arange(2)[:, None], torch.arange(12)))
    with torch.no_grad():
        cache = decoder.cache.first(2, 0)
        model(prompt, cache)
        for lengths, rows in (([3, 5], [0, 1]), ([7, 2], [1, 0])):
            decoder.cache.lengths.copy_(torch.tensor(lengths))
            decoder.rows.copy_(torch.tensor(rows))
            decoder.current.copy_(prompt[[0, 1], lengths])
            decoder.step(2, 8, 1.0, EOS)
            assert decoder.cache.lengths.tolist() == [length + 1 for length in lengths]
            for i in range(2):
                logits = model(prompt[i : i + 1, : lengths[i] + 1])[:, -1]
                noise = decoder.noise[rows[i], lengths[i] + 1][None]
                token, logp, _ = sample_tokens(logits, noise, 1.0)
                assert decoder.rollout.tokens[rows[i], lengths[i] + 1] == token == decoder.current[i]
                assert decoder.rollout.logps[rows[i], lengths[i] + 1].item() == pytest.approx(logp.item(), abs=1e-6)
            decoder.rollout.finished.zero_()


def test_a_captured_step_does_not_read_what_autocast_keeps():
    model = make_model().float()
    model.in_bfloat16 = True
    decoder = CapturedDecoder(model, 1, 12)

    def logp_of_a_step():
        for x in (decoder.rollout.finished, decoder.cache.lengths, decoder.current):
            x.zero_()
        decoder.step(1, 4, 0.0, EOS)
        return decoder.rollout.logps[0, 1].item()

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with torch.enable_grad():
            model(torch.tensor([[1, 2]]))  # its casts stay in the cache of the autocast around it
        model.load_state_dict(make_model(seed=1).state_dict())
        inside = logp_of_a_step()
    with torch.no_grad():
        assert logp_of_a_step() == inside


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_a_captured_step_does_nothing_that_a_capture_forbids(temperature, in_bfloat16):
    """No read by the host, no shape that depends on values, no tensor from the host; nothing of its own moves."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.add(name := operator.overloadpacket.__name__)
            if name in ("index", "index_put_"):  # by booleans they would have to count first
                assert all(index is None or index.dtype == torch.int64 for index in args[1])
            return operator(*args, **kwargs or {})

    names, model = set(), make_model().float()
    model.in_bfloat16 = in_bfloat16
    decoder = CapturedDecoder(model, 3, 12)

    def addresses():
        parts = vars(decoder) | vars(decoder.cache) | vars(decoder.rollout)
        return {name: x.data_ptr() for name, x in parts.items() if torch.is_tensor(x)}

    before = addresses()
    with torch.no_grad(), Names():
        decoder.step(3, 8, temperature, EOS)
    assert {"embedding", "index_put_", "mm"} <= names, "the test must see what is called"
    assert not names & {"nonzero", "_local_scalar_dense", "item", "lift_fresh", "masked_select", "equal", "is_nonzero"}
    assert addresses() == before


def test_a_captured_decoder_that_does_not_fit_is_refused():
    model = make_model()
    decoder = CapturedDecoder(model, 4, 12)
    with pytest.raises(ValueError, match=r"^5 rows of 5 positions do not fit a decoder for 4 rows of 12 positions$"):
        generate(model, [[1, 2]], group_size=5, max_new_tokens=3, eos_id=EOS, decoder=decoder)
    with pytest.raises(ValueError, match="4 rows of 13 positions"):
        generate(model, [[1, 2]], group_size=4, max_new_tokens=11, eos_id=EOS, decoder=decoder)
    with pytest.raises(ValueError, match="another model's"):
        generate(make_model(), [[1, 2]], max_new_tokens=3, eos_id=EOS, decoder=decoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="conftest.py hides GPUs: run this one with --noconftest")
def test_replayed_graphs_sample_what_the_plain_path_does_on_a_gpu(small_graphs):
    model = make_model().float().cuda()
    decoder = CapturedDecoder(model, 45, 40)
    asked = {"group_size": 10, "max_new_tokens": 25, "eos_id": EOS}
    rollouts = []
    for seed in (1, 1, 2, 3):  # the first captures, the second replays
        captured = generate(model, PROMPTS, **asked, seed=seed, decoder=decoder)
        assert_same(captured, generate(model, PROMPTS, **asked, seed=seed))
        rollouts.append(rows_of(captured))
        graphs = len(decoder.graphs)
    assert graphs > 3
    assert rollouts[0] == rollouts[1] != rollouts[2] != rollouts[3]
    model.load_state_dict(make_model(seed=1).state_dict())
    captured = generate(model, PROMPTS, **asked, seed=3, decoder=decoder)
    assert_same(captured, generate(model, PROMPTS, **asked, seed=3))
    assert rows_of(captured) != rollouts[3], "graphs follow the weights"
