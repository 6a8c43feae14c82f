"""The transformer and its cache: two ways to compute one function."""

import os
import signal
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from model import (
    ROTARY_BASE,
    KVCache,
    ModelConfig,
    ScalarModel,
    Transformer,
    load_model,
    load_weights,
    save_model,
)

SHAPE = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 40, "max_seq_len": 16}
CONFIG = ModelConfig(11, **SHAPE)
EXACTLY = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def model():
    """In float64, and with weights far from their small start, so that every part matters."""
    model = Transformer(CONFIG).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model


def random_tokens(*shape):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("pieces", [[1] * 9, [9], [4, 1, 1, 3]])
def test_cache_equals_full_forward(model, pieces):
    tokens = random_tokens(3, 9)
    cache = KVCache(CONFIG, rows=3, capacity=12, like=model.embedding.weight)
    cached = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(tokens), **CLOSE)


def test_cache_equals_full_forward_with_ragged_prompts(model):
    """Prompts of 2 and 5 tokens are prefilled together. Row 1 is copied twice and row 0 once. Each
    row goes on by 3 tokens."""
    tokens = random_tokens(2, 5)
    lengths = torch.tensor([2, 5])
    cache = KVCache(CONFIG, rows=3, capacity=8, like=model.embedding.weight)
    cache.lengths = torch.zeros_like(lengths)
    model(tokens, cache)
    cache.lengths = lengths
    cache.select(torch.tensor([1, 0, 1]))
    more = random_tokens(3, 3)
    cached = torch.stack([model(more[:, i : i + 1], cache)[:, 0] for i in range(3)], dim=1)
    for row, source in enumerate([1, 0, 1]):
        whole = torch.cat((tokens[source, : lengths[source]], more[row]))[None]
        torch.testing.assert_close(cached[row], model(whole)[0, -3:], **CLOSE)


def test_attention_may_come_in_any_layout(model, monkeypatch):
    """A kernel of CUDA, which tests do not have, gives what no view can fold back into heads."""
    honest = F.scaled_dot_product_attention

    def scattered(*args, **kwargs):
        return honest(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    tokens = random_tokens(3, 9)
    expected = model(tokens)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scattered)
    cache = KVCache(CONFIG, rows=3, capacity=12, like=model.embedding.weight)
    cached = torch.cat([model(piece, cache) for piece in tokens.split([4, 1, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(cached, expected, **CLOSE)


def test_a_token_sees_itself_and_what_came_before_alone(model):
    tokens = random_tokens(1, 8)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-6).all()


def test_logits_from_a_column_on_are_those_of_the_whole(model):
    tokens = random_tokens(3, 9)
    torch.testing.assert_close(model(tokens, first=4), model(tokens)[:, 4:], **CLOSE)
    cache = KVCache(CONFIG, rows=3, capacity=12, like=model.embedding.weight)
    torch.testing.assert_close(model(tokens, cache, first=8), model(tokens)[:, 8:], **CLOSE)


def test_padding_on_the_right_and_other_rows_do_not_change_a_row(model):
    tokens = random_tokens(4, 10)
    alone = model(tokens[2:3, :6])
    together = model(tokens)[2:3, :6]
    torch.testing.assert_close(alone, together, **CLOSE)


def test_position_matters(model):
    """The same token behind the same tokens, but farther from another one."""
    logits = model(torch.tensor([[5, 7, 7, 7]]))[0]
    assert (logits[1:] - logits[:-1]).abs().amax(dim=-1).min() > 1e-3


def by_hand(model, tokens, positions):
    """The logits of one row, a token and a head at a time. Rotary angles turn complex numbers."""
    half = model.config.head_dim // 2
    speeds = ROTARY_BASE ** -(torch.arange(half, dtype=torch.float64) / half)

    def turned(x, position):
        return torch.view_as_real(
            torch.complex(x[:half], x[half:]) * torch.exp(1j * position * speeds)
        )

    x = model.embedding.weight[tokens]
    for block in model.blocks:
        H, K, d = block.attention.heads[0], block.attention.heads[1], model.config.head_dim
        qkv = (block.attention_norm(x) @ block.attention.qkv.weight.T).view(len(x), -1, d)
        attended = torch.zeros(len(x), H, d, dtype=x.dtype)
        for t in range(len(x)):
            for head in range(H):
                query = turned(qkv[t, head], positions[t])
                keys = qkv[: t + 1, H + head // (H // K)]
                keys = [turned(key, position) for key, position in zip(keys, positions)]
                scores = torch.stack([(query * key).sum() for key in keys]) / d**0.5
                attended[t, head] = scores.softmax(0) @ qkv[: t + 1, H + K + head // (H // K)]
        x = x + attended.flatten(1) @ block.attention.out.weight.T
        gate, value = (block.feed_forward_norm(x) @ block.feed_forward.up.weight.T).chunk(2, dim=1)
        x = x + (gate * gate.sigmoid() * value) @ block.feed_forward.down.weight.T
    return model.norm(x) @ model.embedding.weight.T


POSITIONS = {  # of rows of 6 tokens
    "as they come": [0, 1, 2, 3, 4, 5],
    "a jump": [0, 1, 2, 11, 12, 13],
    "from elsewhere": [4, 5, 6, 7, 8, 9],
    "in another order": [3, 0, 5, 1, 4, 2],
    "all the same": [7, 7, 7, 7, 7, 7],
}


@pytest.mark.parametrize("name", POSITIONS)
def test_tokens_stand_where_their_positions_say(model, name):
    """Against the model written out by hand."""
    tokens, positions = random_tokens(6), torch.tensor(POSITIONS[name])
    with torch.no_grad():
        logits = model(tokens[None], positions=positions[None])[0]
        # The model's angles were computed in float32.
        torch.testing.assert_close(logits, by_hand(model, tokens, positions), rtol=0, atol=1e-4)
        moved = (logits - model(tokens[None])[0]).abs().amax(dim=-1)
        usual = torch.arange(6)
        for t, change in enumerate(moved.tolist()):  # a token sees how far the others stand
            same = torch.equal(positions[: t + 1] - positions[t], usual[: t + 1] - t)
            assert change < 1e-4 if same else change > 1e-3


def test_each_row_has_its_own_positions(model):
    """Given for every row or for one, from column 0 or not: the same as each row alone."""
    tokens, positions = random_tokens(len(POSITIONS), 6), torch.tensor(list(POSITIONS.values()))
    together = model(tokens, positions=positions)
    for row in range(len(tokens)):
        alone = model(tokens[row : row + 1], positions=positions[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **CLOSE)
    as_they_come = positions[:1]
    for given in (as_they_come, as_they_come.expand(positions.shape)):
        torch.testing.assert_close(model(tokens, positions=given), model(tokens), **EXACTLY)
    torch.testing.assert_close(
        model(tokens, first=4, positions=positions), together[:, 4:], **CLOSE
    )


def test_rotary_angles_tell_distances_alone(model):
    """A row may stand anywhere; but not with a gap in it."""
    tokens = random_tokens(1, 6)
    here, there, apart = (
        model(tokens, positions=torch.tensor([POSITIONS[name]]))
        for name in ("as they come", "from elsewhere", "a jump")
    )
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
    assert (here - apart)[0, 3:].abs().amax(dim=-1).min() > 1e-3


def test_logits_are_float32_when_the_weights_are_bfloat16():
    assert Transformer(CONFIG).bfloat16()(random_tokens(1, 3)).dtype == torch.float32


def test_bfloat16_log_probabilities_are_near_float32s(model):
    """Matrix products alone are in bfloat16: the weights and their gradients stay float32. The
    cache agrees."""
    model, tokens = model.float(), random_tokens(3, 9)
    exact = model(tokens).log_softmax(dim=-1)
    model.in_bfloat16 = True
    logps = model(tokens).log_softmax(dim=-1)
    assert logps.dtype == torch.float32
    assert 1e-4 < (logps - exact).abs().mean() < 0.1
    cache = KVCache(CONFIG, rows=3, capacity=9, like=model.embedding.weight.bfloat16())
    cached = torch.cat([model(piece, cache) for piece in tokens.split(1, dim=1)], dim=1)
    assert (cached.log_softmax(dim=-1) - logps).abs().mean() < 0.05
    logps.sum().backward()
    assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}


def test_the_seed_decides_the_weights_and_nothing_else_does():
    torch.manual_seed(1)
    one = Transformer(CONFIG).state_dict()
    torch.manual_seed(2)
    two = Transformer(CONFIG)
    torch.testing.assert_close(one, two.state_dict(), **EXACTLY)
    two.init_weights(5)
    assert (one["embedding.weight"] != two.state_dict()["embedding.weight"]).all()


def drawn(words, seed=0, **changes):
    """The first weights of a model of these words, and the row of each of its tokens."""
    tokenizer = Tokenizer(words)
    model = Transformer(replace(CONFIG, vocab_size=tokenizer.vocab_size, **changes))
    model.init_weights(seed, tokenizer.pieces)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return weights, dict(zip(tokenizer.pieces, weights.pop("embedding.weight")))


@pytest.mark.parametrize("more", [("moon", "sun", "star"), ("sun", "moon", "star")])
def test_a_word_more_changes_no_other_number(more):
    """Wherever it stands: every weight by its name, every row of the embedding by its token."""
    weights, rows = drawn(("sun", "star"))
    found, found_rows = drawn(more)
    torch.testing.assert_close(found, weights, **EXACTLY)
    assert set(found_rows) - set(rows) == {b" moon"}
    torch.testing.assert_close({piece: found_rows[piece] for piece in rows}, rows, **EXACTLY)


def test_a_longer_context_changes_no_other_number():
    torch.testing.assert_close(drawn(("sun",), max_seq_len=40), drawn(("sun",)), **EXACTLY)


def test_another_seed_draws_every_matrix_and_row_anew():
    """And within a seed no two matrices and no two rows are alike: each has its own key."""
    (weights, rows), (other, other_rows) = drawn(("sun",)), drawn(("sun",), seed=1)
    lines = [
        (name, i, row) for name, w in weights.items() if w.dim() == 2 for i, row in enumerate(w)
    ]
    assert len({name for name, *_ in lines}) == 4 * CONFIG.n_layer
    for name, i, row in lines:
        assert (row != other[name][i]).float().mean() > 0.99, (name, i)
    for piece, row in rows.items():
        assert (row != other_rows[piece]).float().mean() > 0.99, piece
    every = [row[:8] for row in (*(row for *_, row in lines), *rows.values())]
    scaled = torch.stack([row / row.norm() for row in every])
    alike = scaled @ scaled.T - torch.eye(len(scaled))
    assert alike.max() < 0.9999


def test_first_weights_have_their_scale():
    """A layer keeps the scale of its input, and writes less to the residual stream."""
    weights, rows = drawn(("sun",), d_model=256, d_ff=256, n_layer=2)
    embedding = torch.stack(list(rows.values()))
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    for name, weight in weights.items():
        expected = 1 / 16 / (2 if name.endswith(("out.weight", "down.weight")) else 1)
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert weight.std() == pytest.approx(expected, rel=0.05), name


def test_a_saved_model_comes_back_equal(model, tmp_path):
    save_model(tmp_path / "model.pt", model.float())
    loaded, other = load_model(tmp_path / "model.pt"), Transformer(CONFIG)
    assert loaded.config == CONFIG
    load_weights(tmp_path / "model.pt", other)
    for found in (loaded, other):
        torch.testing.assert_close(found.state_dict(), model.state_dict(), **EXACTLY)
        torch.testing.assert_close(found(random_tokens(2, 5)), model(random_tokens(2, 5)))


def test_a_config_that_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="n_head"):
        Transformer(ModelConfig(11, 1, n_head=3, n_kv_head=1, d_model=32, d_ff=8, max_seq_len=4))
    with pytest.raises(ValueError, match="n_kv_head"):
        Transformer(ModelConfig(11, 1, n_head=4, n_kv_head=3, d_model=32, d_ff=8, max_seq_len=4))


class Trap:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return print, ("this must never be printed",)


def damaged_files(folder):
    good = folder / "good.pt"
    save_model(good, Transformer(CONFIG))
    content = good.read_bytes()
    saved = torch.load(good, weights_only=True)
    config, weights = saved["config"], saved["weights"]
    broken = {**weights, "norm.weight": torch.full((32,), torch.nan)}
    yield "missing.pt", None
    yield "empty.pt", b""
    yield "truncated.pt", content[: len(content) // 2]
    yield "text.pt", b"these are no weights"
    yield "other_shape.pt", {"config": {**config, "d_ff": 48}, "weights": weights}
    yield "no_config.pt", weights
    yield "no_weights.pt", {"config": config}
    yield "a_list.pt", [1, 2, 3]
    yield "unknown_field.pt", {"config": {**config, "dropout": 0.1}, "weights": weights}
    yield "not_a_number.pt", {"config": config, "weights": broken}
    yield "code.pt", {"config": config, "weights": Trap()}
    for size in ("n_layer", "d_model", "d_ff", "n_head", "vocab_size", "max_seq_len"):
        for number in (-1, 0, 10**9, 10**30):
            huge = {**config, size: number}
            yield f"{size}_{number}.pt", {"config": huge, "weights": weights}
    thin = {name: torch.zeros(()).expand(weight.shape) for name, weight in weights.items()}
    yield "one_number.pt", {"config": config, "weights": thin}
    for dtype in (torch.complex64, torch.int32, torch.bool):
        cast = {name: weight.to(dtype) for name, weight in weights.items()}
        yield f"{dtype}.pt", {"config": config, "weights": cast}
    yield "before.pt", b"#!/bin/sh\n" + content
    yield "behind.pt", content + b"\0"
    yield "twice.pt", content + content
    with zipfile.ZipFile(good, "a") as archive:  # 32 MB of zeros in a file of a hundred kB
        archive.writestr("archive/data/zeros", bytes(2**25), zipfile.ZIP_DEFLATED)
    yield "bomb.pt", good.read_bytes()


class TookTooLong(BaseException):
    """Not an Exception: the code under test catches these."""


@pytest.fixture
def ten_seconds():
    def stop(number, frame):
        raise TookTooLong

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def load_other_weights(path):
    load_weights(path, Transformer(CONFIG))


@pytest.mark.parametrize("load", [load_model, load_other_weights])
def test_files_that_are_no_models_are_refused_in_one_line(load, tmp_path, capfd, ten_seconds):
    """At once, whatever size the config or an archive claims."""
    os.mkfifo(tmp_path / "pipe.pt")  # nobody writes into it
    with pytest.raises(ValueError, match=r"pipe\.pt: there is no such file"):
        load(tmp_path / "pipe.pt")
    for name, content in damaged_files(tmp_path):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, d_ff=48),
        replace(CONFIG, n_head=2),
        replace(CONFIG, vocab_size=12),
        replace(CONFIG, vocabulary="of another task"),
    ],
)
def test_weights_of_another_shape_or_vocabulary_are_refused(config, tmp_path):
    """Even where the tensors would fit. The model keeps its own weights."""
    save_model(tmp_path / "other.pt", Transformer(config))
    model = Transformer(CONFIG)
    model.init_weights(5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other\.pt: .* another shape or vocabulary") as error:
        load_weights(tmp_path / "other.pt", model)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, **EXACTLY)


def test_a_save_that_fails_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_model(path, Transformer(CONFIG))
    before = path.read_bytes()

    def disk_is_full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, Transformer(CONFIG))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "the half-written file should be gone"


def test_a_file_with_a_flipped_bit_is_refused_or_as_good(tmp_path):
    """torch.load looks at no checksum: a flipped bit in a weight would pass for a weight. A bit
    that is not refused has no meaning."""
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    save_model(good, Transformer(ModelConfig(3, 1, 1, 1, d_model=2, d_ff=1, max_seq_len=1)))
    content, expected = good.read_bytes(), load_model(good).state_dict()
    refused = 0
    for i in range(0, len(content), 3):
        bad.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            loaded = load_model(bad).state_dict()
        except ValueError as error:
            refused += 1
            assert "bad.pt" in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(loaded[name], weight) for name, weight in expected.items()), i
    assert refused > 100


def test_positions_and_a_cache_are_not_given_together():
    """The positions of cached rows follow from the lengths that the cache holds."""
    model = Transformer(CONFIG)
    cache = KVCache(CONFIG, 1, 4, like=model.embedding.weight)
    with pytest.raises(ValueError, match="give none"):
        model(torch.tensor([[1]]), cache, positions=torch.tensor([[0]]))


# ------------------------------------------------------------------------------------ scalar models


def scalar_model(trunk):
    """A scalar model on a copy of this trunk, whose head is the output layer's row of token 7."""
    model = ScalarModel(trunk.config).to(trunk.embedding.weight.dtype)
    model.trunk.load_state_dict(trunk.state_dict())
    model.trunk.in_bfloat16 = trunk.in_bfloat16
    model.head.weight.data.copy_(trunk.embedding.weight[7:8])
    return model


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("how", [{}, {"first": 3}, {"positions": torch.arange(14).view(2, 7)}])
def test_a_scalar_model_reads_what_the_output_layer_reads(model, how, in_bfloat16):
    """One trunk, normed once: with a token's row of the embedding for its head, its numbers are
    that token's logits. A bias shifts them all."""
    model, tokens = model.float(), random_tokens(2, 7)
    model.in_bfloat16 = in_bfloat16
    scalar = scalar_model(model)
    found, expected = scalar(tokens, **how), model(tokens, **how)[..., 7]
    assert found.dtype == torch.float32 and found.shape == (2, 7 - how.get("first", 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    scalar.head.bias.data.fill_(0.5)
    torch.testing.assert_close(scalar(tokens, **how), expected + 0.5, rtol=0, atol=1e-6)


def test_a_new_scalar_model_says_0_and_its_head_can_learn():
    """In float32, though the weights are bfloat16. The first gradient reaches the head alone: the
    head lets it through to the trunk once it is not 0."""
    model = ScalarModel(CONFIG).bfloat16()
    found = model(random_tokens(2, 5))
    assert found.dtype == torch.float32 and not found.any()
    (found - 1).square().sum().backward()
    assert model.head.weight.grad.any() and model.head.bias.grad.any()
    assert not model.trunk.embedding.weight.grad.any()


@pytest.mark.parametrize("kind", [Transformer, ScalarModel])
def test_a_model_of_each_kind_comes_back_as_its_own_kind_alone(kind, model, tmp_path):
    """As the other kind its file is refused, in one line. train.py and sample.py ask for a
    Transformer, so neither can take a reward model for a policy."""
    path, saved = tmp_path / "model.pt", model if kind is Transformer else scalar_model(model)
    save_model(path, saved.float())
    same, other = kind(CONFIG), (ScalarModel if kind is Transformer else Transformer)(CONFIG)
    load_weights(path, same)
    for found in (load_model(path, kind=kind), same):
        torch.testing.assert_close(found.state_dict(), saved.state_dict(), **EXACTLY)
    complaint = r"model\.pt: holds no model that fits together \(\S+ is "
    with pytest.raises(ValueError, match=complaint):
        load_weights(path, other)
    with pytest.raises(ValueError, match=complaint):
        load_model(path, **{"kind": ScalarModel} if kind is Transformer else {})
