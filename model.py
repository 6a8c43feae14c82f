"""A small decoder transformer, its key/value cache, and how a model is saved and loaded.

RMSNorm before each sublayer, grouped-query attention, SwiGLU, no biases, embeddings tied to the
output. No dropout: the policy that samples and the policy that is trained must be the same
function. Positions enter as rotary angles alone, which tell distances. So a model can read on where
no text of its training went.

B rows; T token positions; S positions held in the cache; V vocabulary.
"""

import contextlib
import copy
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LONGEST = 65536  # positions that a model may have
ROTARY_BASE = 1000.0  # the slowest channels turn once in thousands of tokens: no context is longer


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    n_layer: int  # blocks
    n_head: int  # query heads
    n_kv_head: int  # key/value heads, each shared by n_head / n_kv_head query heads
    d_model: int  # width of the residual stream
    d_ff: int  # width of the feed-forward layer
    max_seq_len: int  # longest prompt plus completion, in tokens
    vocabulary: str = ""  # a name for the words that the ids stand for: `Tokenizer.fingerprint`
    task: str = ""  # the row of data.TASKS whose words these are

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


class KVCache:
    """Keys and values of up to `rows` sequences, each of up to `capacity` positions. Their memory
    is allocated once, with the type and device of `like`.

    The first B rows are in use. Rows may have different lengths: `lengths` (B,) counts the
    positions of each row that hold real tokens. A row's next token is written there, over the
    padding that a short prompt left behind.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor):
        shape = (config.n_layer, rows, config.n_kv_head, capacity, config.head_dim)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.filled = 0  # no row is longer; on the host, so that reading it never waits for a GPU

    def write(
        self, layer: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, n_kv_head, T, head_dim) at `positions` (B, T). Return all keys
        and values of the layer, (B, n_kv_head, S, head_dim) each."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)
        held = slice(len(positions)), slice(None), slice(self.filled)
        return self.keys[layer][held], self.values[layer][held]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, at the front; a row named G times is copied G times."""
        kept = slice(len(rows)), slice(None), slice(self.filled)
        for held in (self.keys, self.values):
            # Copy in place and layer by layer: memory that was never used before is slow at first.
            for layer in range(len(held)):
                held[layer][kept] = held[layer, :, :, : self.filled].index_select(0, rows)
        self.lengths = self.lengths[rows]

    def first(self, rows: int, filled: int) -> "KVCache":
        """The first rows, of which none is longer than `filled`, as a cache in the same memory."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, :rows], self.values[:, :rows]
        part.lengths, part.filled = self.lengths[:rows], filled
        return part


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): turn each pair of channels by its angle. x is (B, heads,
    T, head_dim); cos and sin are (B, 1, T, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.d_model, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        B, T, d_model = x.shape
        qkv = self.qkv(x).view(B, T, sum(self.heads), self.head_dim).transpose(1, 2)
        queries, keys, values = qkv.split(self.heads, dim=1)  # (B, heads, T, head_dim)
        queries, keys = (rotate(x, *angles).to(values.dtype) for x in (queries, keys))
        if cache is None:
            attended = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=True
            )
        else:
            keys, values = cache.write(self.layer, positions, keys, values)
            # The query heads that share keys become more queries of one head, (B, n_kv_head,
            # n_head / n_kv_head * T, head_dim). With a mask, enable_gqa would copy the cache.
            shared = queries.reshape(B, keys.shape[1], -1, self.head_dim)
            attended = F.scaled_dot_product_attention(shared, keys, values, attn_mask=mask)
            attended = attended.reshape(queries.shape)
        return self.out(attended.transpose(1, 2).reshape(B, T, d_model))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.d_model)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *attention_args)
        return x + self.feed_forward(self.feed_forward_norm(x))


def normal(shape: torch.Size, std: float, *key: object) -> Tensor:
    """Normal numbers that depend on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return std * torch.randn(shape, generator=generator)


class Transformer(nn.Module):
    """The decoder. Raises ValueError where the config does not fit together."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.d_model % (2 * config.n_head) or config.n_head % config.n_kv_head:
            rule = "d_model must be a multiple of 2 * n_head, and n_head of n_kv_head"
            raise ValueError(f"{rule}: {config}")
        if not 0 < config.max_seq_len <= LONGEST:
            raise ValueError(f"max_seq_len must be from 1 to {LONGEST}: {config}")
        self.config = config
        self.in_bfloat16 = False  # whether blocks multiply in it; weights and logits stay float32
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model)
        frequency = ROTARY_BASE ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.arange(config.max_seq_len)[:, None] * frequency  # (max_seq_len, head_dim / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        if not angle.is_meta:  # there, shapes are all that is asked for
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0, pieces: Sequence[bytes] | None = None) -> None:
        """Draw each weight by (seed, its name), and each row of the embedding by (seed, its token),
        given the bytes of each token. So a token more changes no other number."""
        pieces = pieces or range(self.config.vocab_size)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:  # the gains of the norms
                weight.fill_(1.0)
            elif name == "embedding.weight":
                for row, piece in zip(weight, pieces, strict=True):
                    row.copy_(normal(row.shape, 0.02, seed, name, piece))
            else:
                # A layer keeps the scale of its input. The layers that write to the residual stream
                # share that scale among them.
                writes = name.endswith(("out.weight", "down.weight"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if writes else 1.0
                std = scale / math.sqrt(weight.shape[1])
                weight.copy_(normal(weight.shape, std, seed, name))

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        first: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T - first, V) for what follows each of `tokens` (B, T) int64 from column
        `first` on, in float32 at least. Takes and raises what `hidden` does."""
        x = self.hidden(tokens, cache, first, positions)
        # Outside of autocast: bfloat16 would be off by a hundredth at logits of 5.
        return at_least_float32(F.linear(x, self.embedding.weight))

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        first: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What the output layer reads, (B, T - first, d_model): each of `tokens` (B, T) int64 from
        column `first` on, in the light of those before it. Raises ValueError for more tokens than
        the context holds.

        Without a cache, rows start at position 0, or have the `positions` (B, T) int64, and are
        right-padded: attention is causal, so padding never reaches a real token. With a cache, the
        tokens continue each row after its `cache.lengths` positions.
        """
        T = tokens.shape[1]
        if positions is not None and cache is not None:
            raise ValueError("with a cache the positions follow from its lengths: give none")
        if T > self.config.max_seq_len:
            raise ValueError(f"{T} tokens exceed the context of {self.config.max_seq_len}")
        if cache is None:
            if positions is None:
                positions = torch.arange(T, device=tokens.device)[None]  # (1, T), for every row
            mask = None
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=tokens.device)  # (B, T)
            cache.filled += T
            held = torch.arange(cache.filled, device=tokens.device)
            # A token sees its row up to itself, (B, 1, T, S), with each query head of a group.
            mask = (held <= positions[:, :, None])[:, None]
            mask = mask.repeat(1, 1, self.config.n_head // self.config.n_kv_head, 1)
            cache.lengths += T  # in place: a captured step reads them where they are
        angles = self.cos[positions][:, None], self.sin[positions][:, None]
        x = self.embedding(tokens)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            for block in self.blocks:
                x = block(x, angles, positions, mask, cache)
        return self.norm(x[:, first:])


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ScalarModel(nn.Module):
    """One number at each position: the trunk of a Transformer under a linear head. A reward model's
    number is a score, a value model's an expected return.

    The head starts at 0, and so does every output. The trunk starts as a Transformer's does;
    `model.trunk.load_state_dict(policy.state_dict())` starts it from a policy. Blocks multiply in
    bfloat16 where `model.trunk.in_bfloat16` says so. Raises ValueError as a Transformer does.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Transformer(config)
        self.head = nn.Linear(config.d_model, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, first: int = 0, positions: Tensor | None = None) -> Tensor:
        """(B, T - first), in float32 at least: the number at column t has read `tokens` (B, T)
        int64 up to column t, and t itself. Takes and raises what `Transformer.hidden` does."""
        x = self.trunk.hidden(tokens, first=first, positions=positions)
        return at_least_float32(self.head(x).squeeze(-1))


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a new file beside the old, flush it to disk and rename it into place. Whatever happens
    on the way, the old file stays whole. Raises OSError where it cannot, as on a full disk."""
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk gets its room back
        raise


def save_tensors(path: str | Path, data: dict) -> None:
    """Write tensors and plain data (numbers, text, lists, dicts) to a file, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write_whole(path, buffer.getbuffer())


def load_tensors(path: str | Path, device: str = "cpu") -> dict:
    """Read what `save_tensors` wrote. Nothing in the file is run. Raises ValueError where the
    file is missing, damaged by so much as a bit, or holds anything but tensors and plain data. The
    message is one line, and names the file."""
    if not os.path.isfile(path):  # a pipe would be waited for
        folder = f"a folder, not a model file such as {path}/base.pt"
        reason = folder if os.path.isdir(path) else "there is no such file"
        raise ValueError(f"{path}: {reason}")
    try:
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        reason = "holds more than tensors and plain data, and so might run code"
        raise ValueError(f"{path}: {reason}") from None
    except Exception as error:  # zipfile and torch.load raise a dozen types on damaged files
        reason = f"damaged, or not a file of this project ({one_line(error)})"
        raise ValueError(f"{path}: {reason}") from None


def check_archive(file: BinaryIO) -> None:
    """Raise an error unless the file is one zip archive as torch.save writes it, from its first
    byte to its last, and every checksum fits. torch.load looks at none of this."""
    end = struct.Struct("<4s16xH")  # the last record, and how long the comment behind it is
    size = file.seek(-end.size, os.SEEK_END) + end.size
    last = end.unpack(file.read())
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if last != (b"PK\5\6", 0) or entries[0].header_offset:
            raise ValueError("there is something before or behind its archive")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("it is compressed, and would be larger than it is")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} does not fit its content")


def one_line(error: Exception) -> str:
    """What an error says, on one line and short enough for another message to hold it."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def save_model(path: str | Path, model: nn.Module) -> None:
    """Write a model's config and weights to one file, for `load_model`, whole or not at all."""
    save_tensors(path, {"config": asdict(model.config), "weights": model.state_dict()})


def load_model(path: str | Path, device: str = "cpu", kind: type = Transformer) -> nn.Module:
    """Read what `save_model` wrote of a model of this kind, Transformer or ScalarModel. Raises
    ValueError as `load_tensors` does, for the other kind, and for weights that do not fit the
    config or are not finite."""
    saved = load_tensors(path, device)
    try:
        config, weights = ModelConfig(**saved["config"]), saved["weights"]
        if config.n_layer > len(weights):
            raise ValueError(f"{config.n_layer} layers of {len(weights)} weights")
        with torch.device("meta"):  # no memory: the config may ask for any size, the file may not
            check_weights(weights, kind(config))
        model = kind(config).to(device)
    except Exception as error:
        raise ValueError(f"{path}: holds no model that fits together ({one_line(error)})") from None
    set_weights(path, model, saved)
    return model


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Set a model's weights from a file. Raises ValueError as `load_model` does, and where the file
    holds a model of another config."""
    saved = load_tensors(path, next(model.parameters()).device)
    if not isinstance(saved, dict) or saved.get("config") != asdict(model.config):
        raise ValueError(f"{path}: holds a model of another shape or vocabulary")
    set_weights(path, model, saved)


def set_weights(path: str | Path, model: nn.Module, saved: dict) -> None:
    """The part that `load_model` and `load_weights` share. Raises ValueError as they do."""
    try:
        check_weights(saved["weights"], model)
        model.load_state_dict(saved["weights"])
    except Exception as error:
        raise ValueError(f"{path}: holds no model that fits together ({one_line(error)})") from None
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError(f"{path}: holds weights that are NaN or infinite")


def check_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raise an error unless the weights have the names, shapes and dtypes of a model's, each number
    in a place of its own."""
    found, wanted = (
        {name: (*x.shape, x.stride(), x.dtype) for name, x in state.items()}
        for state in (weights, model.state_dict())
    )
    for name in found | wanted:
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name} is {found.get(name)}, not {wanted.get(name)}")
