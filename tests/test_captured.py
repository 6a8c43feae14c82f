"""The captured decoder: it samples what the plain path does, and its step may be captured."""

import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

# Products are deterministic on a GPU only where this is set before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kit.captured
from kit.captured import CapturedDecoder
from sample import generate, sample_tokens, uniform
from tests.test_sample import EOS, PROMPTS, make_model, rows_of


@pytest.fixture
def small_graphs(monkeypatch):
    """Batches and caches of this size then go through many graphs."""
    monkeypatch.setattr(kit.captured, "FEWEST_ROWS", 2)
    monkeypatch.setattr(kit.captured, "FILLED_EVERY", 4)
    monkeypatch.setattr(kit.captured, "LOOK_EVERY", 3)


def assert_same(rollout, reference, tolerance=1e-5):
    for name in ("tokens", "mask", "finished"):
        assert torch.equal(getattr(rollout, name), getattr(reference, name)), name
    for name in ("logps", "entropy"):
        torch.testing.assert_close(
            getattr(rollout, name), getattr(reference, name), rtol=0, atol=tolerance
        )


def keys_of(decoder, monkeypatch):
    """The keys that the decoder's steps will have had."""
    keys, replay = [], decoder.replay
    monkeypatch.setattr(decoder, "replay", lambda *key: (keys.append(key), replay(*key)))
    return keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("group_size", "max_new_tokens", "temperature", "eos_bias"),
    [
        (1, 20, 1.0, 1.0),
        (5, 20, 1.0, 1.0),
        (8, 33, 0.7, -1.0),
        (3, 12, 0.0, 1.0),
        (11, 30, 1.0, 2.0),
        (4, 1, 1.0, 1.0),
    ],
)
def test_a_captured_decoder_samples_what_the_plain_path_does(
    small_graphs, monkeypatch, dtype, group_size, max_new_tokens, temperature, eos_bias
):
    model = make_model(eos_bias=eos_bias).to(dtype)
    decoder = CapturedDecoder(model, 45, 40)
    keys = keys_of(decoder, monkeypatch)
    asked = {
        "group_size": group_size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "eos_id": EOS,
    }
    for seed in (3, 4):
        captured = decoder.generate(model, PROMPTS, **asked, seed=seed)
        assert_same(
            captured,
            generate(model, PROMPTS, **asked, seed=seed),
            1e-5 if dtype == torch.float32 else 1e-6,
        )
    assert decoder.sizes == [45, 23, 12, 6, 3]
    if group_size >= 5:
        assert len({size for size, *_ in keys}) >= 2 or eos_bias < 0, "batches shrink"
        assert len({filled for _, filled, *_ in keys}) >= 3, "caches grow"


def test_a_captured_decoder_stops_when_all_rows_have_finished(small_graphs, monkeypatch):
    model = make_model(eos_bias=4.0)
    decoder = CapturedDecoder(model, 8, 40)
    keys = keys_of(decoder, monkeypatch)
    rollout = decoder.generate(model, PROMPTS, group_size=2, max_new_tokens=33, eos_id=EOS)
    assert rollout.finished.all()
    assert len(keys) < rollout.mask.sum(dim=1).max() + 3 < 33


def test_a_captured_decoder_follows_the_weights_and_keeps_nothing_of_the_rollout_before(
    small_graphs,
):
    model = make_model()
    decoder = CapturedDecoder(model, 30, 40)
    asked = {"max_new_tokens": 20, "eos_id": EOS, "seed": 2}
    first = decoder.generate(model, PROMPTS, group_size=7, **asked)
    before = [x.clone() for x in vars(first).values()]
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.roll(1, dims=0)
    second = decoder.generate(model, PROMPTS[::-1][:3], group_size=7, **asked)  # fewer rows
    assert_same(second, generate(model, PROMPTS[::-1][:3], group_size=7, **asked), 1e-6)
    assert all(map(torch.equal, before, vars(first).values())), (
        "a rollout is not changed by the next"
    )
    model.load_state_dict(make_model(seed=1).state_dict())
    third = decoder.generate(model, PROMPTS, group_size=7, **asked)
    assert_same(third, generate(make_model(seed=1), PROMPTS, group_size=7, **asked), 1e-6)
    assert rows_of(third) != rows_of(first)


def test_rows_that_a_rollout_does_not_have_start_anew():
    """They ride along at the lengths of the rollout before, and would run out of the cache."""
    model = make_model(eos_bias=-1.0)
    decoder = CapturedDecoder(model, 4, 12)
    decoder.generate(model, PROMPTS, max_new_tokens=5, eos_id=EOS)
    fewer = decoder.generate(model, PROMPTS[1:2], max_new_tokens=11, eos_id=EOS)
    assert_same(fewer, generate(model, PROMPTS[1:2], max_new_tokens=11, eos_id=EOS))


def test_a_captured_decoder_takes_a_batch_in_parts(small_graphs):
    model = make_model()
    decoder, asked = (
        CapturedDecoder(model, 8, 30),
        {"group_size": 4, "max_new_tokens": 15, "eos_id": EOS, "seed": 5},
    )
    parts = [decoder.generate(model, PROMPTS[i : i + 2], **asked, first_row=4 * i) for i in (0, 2)]
    assert rows_of(parts[0]) + rows_of(parts[1]) == rows_of(generate(model, PROMPTS, **asked))


def test_a_captured_decoder_in_bfloat16_agrees_with_the_plain_path(small_graphs):
    """Each row is compared as far as both have drawn the same: other widths round otherwise, and a
    token drawn otherwise leads elsewhere."""
    model = make_model().float()
    model.in_bfloat16 = True
    decoder = CapturedDecoder(model, 40, 40)
    assert decoder.cache.keys.dtype == torch.bfloat16
    asked = {"group_size": 10, "max_new_tokens": 20, "eos_id": EOS, "seed": 1}
    plain, captured = generate(model, PROMPTS, **asked), decoder.generate(model, PROMPTS, **asked)
    width = min(plain.tokens.shape[1], captured.tokens.shape[1])
    same = (plain.tokens[:, :width] == captured.tokens[:, :width]).long().cumprod(dim=1).bool()
    same &= plain.mask[:, :width] & captured.mask[:, :width]
    assert same.sum() > 0.8 * plain.mask.sum()
    assert (plain.logps[:, :width] - captured.logps[:, :width])[same].abs().mean() <= 1e-2


def test_a_captured_step_reads_rows_and_positions_from_the_device(small_graphs):
    """The same key at other lengths and rows gives what the model says of these: nothing else
    changes between two replays."""
    model = make_model()
    decoder, prompt = (
        CapturedDecoder(model, 2, 12),
        torch.tensor([[1, 2, 3, 4, 5, 0, 1, 2], [4, 3, 2, 1, 0, 5, 4, 3]]),
    )
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
                assert (
                    decoder.rollout.tokens[rows[i], lengths[i] + 1] == token == decoder.current[i]
                )
                assert decoder.rollout.logps[rows[i], lengths[i] + 1].item() == pytest.approx(
                    logp.item(), abs=1e-6
                )
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
    """No read by the host, no shape that depends on values, no tensor from the host; nothing of its
    own moves."""

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
    assert not names & {
        "nonzero",
        "_local_scalar_dense",
        "item",
        "lift_fresh",
        "masked_select",
        "equal",
        "is_nonzero",
    }
    assert addresses() == before


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_captured_step_stays_on_its_device(temperature, monkeypatch):
    """On a CPU a tensor made without `device=` looks at home. The meta device has no numbers: it
    refuses a tensor from elsewhere, and to tell the host a number."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: nullcontext())  # meta has none

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            given = operator(*args, **kwargs or {})
            tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, given)))
            assert {x.device.type for x in tensors} <= {"meta"}, operator
            seen.add(operator.overloadpacket.__name__)
            return given

    model, seen = make_model().float().to("meta"), set()
    decoder = CapturedDecoder(model, 3, 12)
    with torch.no_grad(), Devices():
        decoder.step(3, 8, temperature, EOS)
    assert {"embedding", "index_put_", "mm"} <= seen, "the test must see what is called"


def test_the_first_step_with_a_key_is_one_step(small_graphs, monkeypatch):
    """A stand-in for CUDA's graphs records while it captures, and runs nothing: with it, rollouts
    are the plain path's. So the warm-up is a step, and what is captured runs at replays alone."""

    class Graph:
        def replay(self):
            ran.append("replay")
            step(*self.key)

    @contextmanager
    def graph(graph, pool, stream):
        monkeypatch.setattr(decoder, "step", lambda *key: setattr(graph, "key", key))
        yield
        monkeypatch.setattr(decoder, "step", eager)

    def eager(*key):
        ran.append("warm-up")
        step(*key)

    model, ran = make_model(), []
    decoder = CapturedDecoder(model, 45, 40)
    step, stream = decoder.step, SimpleNamespace(wait_stream=lambda other: None)
    decoder.captures, decoder.stream, decoder.pool = True, stream, None
    monkeypatch.setattr(decoder, "step", eager)
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("graph", graph),
        ("stream", lambda stream: nullcontext()),
        ("current_stream", lambda device: stream),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    asked = {"group_size": 10, "max_new_tokens": 25, "eos_id": EOS}
    for seed in (1, 1, 2):
        captured = decoder.generate(model, PROMPTS, **asked, seed=seed)
        assert_same(captured, generate(model, PROMPTS, **asked, seed=seed))
    assert ran.count("warm-up") == len(decoder.graphs) > 3
    assert ran.count("replay") > 2 * len(decoder.graphs)


def test_a_rollout_moves_no_tensor_of_the_decoder(small_graphs):
    """Graphs hold addresses. Compaction reads and writes the one cache in place."""

    def addresses():
        parts = vars(decoder) | vars(decoder.cache) | vars(decoder.rollout)
        return {name: x.data_ptr() for name, x in parts.items() if torch.is_tensor(x)}

    model = make_model(eos_bias=2.0)
    decoder = CapturedDecoder(model, 45, 40)
    before, sizes, select = addresses(), [], type(decoder.cache).select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(decoder.cache),
            "select",
            lambda *given: (sizes.append(len(given[1])), select(*given)),
        )
        decoder.generate(model, PROMPTS, group_size=11, max_new_tokens=30, eos_id=EOS)
    assert len(sizes) >= 3, "prefill, and batches that shrink"
    assert addresses() == before and {"keys", "values", "lengths", "noise", "tokens"} <= set(before)


def test_a_captured_decoder_that_does_not_fit_is_refused():
    model = make_model()
    decoder = CapturedDecoder(model, 4, 12)
    with pytest.raises(
        ValueError, match=r"^5 rows of 5 positions do not fit a decoder for 4 rows of 12 positions$"
    ):
        decoder.generate(model, [[1, 2]], group_size=5, max_new_tokens=3, eos_id=EOS)
    with pytest.raises(ValueError, match="4 rows of 13 positions"):
        decoder.generate(model, [[1, 2]], group_size=4, max_new_tokens=11, eos_id=EOS)
    with pytest.raises(ValueError, match="another model's"):
        decoder.generate(make_model(), [[1, 2]], max_new_tokens=3, eos_id=EOS)


# ----------------------------------------------------- on a GPU: pytest --noconftest -k on_a_gpu

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="conftest.py hides GPUs: run these with --noconftest"
)


@on_a_gpu
def test_replayed_graphs_sample_what_the_plain_path_does_on_a_gpu(small_graphs):
    model = make_model().float().cuda()
    decoder = CapturedDecoder(model, 45, 40)
    asked = {"group_size": 10, "max_new_tokens": 25, "eos_id": EOS}
    rollouts = []
    for seed in (1, 1, 2, 3):  # the first captures, the second replays
        captured = decoder.generate(model, PROMPTS, **asked, seed=seed)
        assert_same(captured, generate(model, PROMPTS, **asked, seed=seed))
        rollouts.append(rows_of(captured))
        graphs = len(decoder.graphs)
    assert graphs > 3
    assert rollouts[0] == rollouts[1] != rollouts[2] != rollouts[3]
    model.load_state_dict(make_model(seed=1).state_dict())
    captured = decoder.generate(model, PROMPTS, **asked, seed=3)
    assert_same(captured, generate(model, PROMPTS, **asked, seed=3))
    assert rows_of(captured) != rollouts[3], "graphs follow the weights"


@on_a_gpu
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_graphs_follow_an_optimizer_on_a_gpu(small_graphs, in_bfloat16):
    """After a step in place, captured graphs say what the plain path says of the new weights: no
    graph reads old weights that autocast once cast."""
    model = make_model().float().cuda()
    model.in_bfloat16 = in_bfloat16
    decoder = CapturedDecoder(model, 45, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    tokens = torch.tensor([PROMPTS[0]], device="cuda")
    asked = {"group_size": 10, "max_new_tokens": 25, "eos_id": EOS, "seed": 1}
    old = decoder.generate(model, PROMPTS, **asked)
    for _ in range(3):
        model(tokens).logsumexp(dim=-1).sum().backward()
        optimizer.step()
        plain, captured = (
            generate(model, PROMPTS, **asked),
            decoder.generate(model, PROMPTS, **asked),
        )
        width = min(plain.tokens.shape[1], captured.tokens.shape[1])
        same = (plain.tokens[:, :width] == captured.tokens[:, :width]).long().cumprod(dim=1).bool()
        same &= plain.mask[:, :width] & captured.mask[:, :width]
        assert same.sum() > 0.8 * plain.mask.sum()
        gap = (plain.logps[:, :width] - captured.logps[:, :width])[same].abs().mean()
        assert gap <= (1e-2 if in_bfloat16 else 1e-5)
    assert rows_of(captured) != rows_of(old)


@on_a_gpu
def test_a_replay_allocates_nothing_on_a_gpu(small_graphs):
    """All that a captured step allocates lies in the pool of its graph."""
    model = make_model().float().cuda()
    decoder = CapturedDecoder(model, 45, 40)
    asked = {"group_size": 10, "max_new_tokens": 25, "eos_id": EOS}
    decoder.generate(model, PROMPTS, **asked)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for graph in decoder.graphs.values():
        decoder.cache.lengths.zero_()  # a step more fits, whichever graph it is
        graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@on_a_gpu
def test_deterministic_kernels_are_captured_too_on_a_gpu(small_graphs):
    """index_put, cumsum and searchsorted as --deterministic has them, within graphs."""
    model = make_model().float().cuda()
    decoder = CapturedDecoder(model, 45, 40)
    asked = {"group_size": 10, "max_new_tokens": 25, "eos_id": EOS, "seed": 1}
    torch.use_deterministic_algorithms(True)
    try:
        rollouts = [decoder.generate(model, PROMPTS, **asked) for _ in range(2)]
        assert_same(rollouts[0], generate(model, PROMPTS, **asked))
        assert_same(*rollouts, tolerance=0)
    finally:
        torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_a_mask_is_memory_efficient_on_a_gpu(dtype, monkeypatch):
    """It takes masks, shared keys as `Attention` folds them, and strided views of a cache. Flash
    attention takes no mask."""
    chosen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **how):
        params = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, 0.0, False, False)
        kernels = torch.backends.cuda
        chosen.append(
            (
                kernels.can_use_flash_attention(params, False),
                kernels.can_use_efficient_attention(params, False),
            )
        )
        return attend(query, key, value, attn_mask=attn_mask, **how)

    model = make_model().float().cuda()
    model.in_bfloat16 = dtype == torch.bfloat16
    decoder = CapturedDecoder(model, 4, 40)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        decoder.step(4, 32, 1.0, EOS)
    assert chosen and set(chosen) == {(False, True)}
