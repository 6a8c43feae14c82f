"""The tokenizer: a `tiktoken.Encoding` whose ranks are made right here, so nothing is downloaded.

Ids 0-255 are the single bytes, so any text can be encoded. Then come whole words and whole numbers,
each with the space or line break before it, as in GPT-2. So " 12" is one token, and so is "\n#2",
which opens the second step of a thought.

The tags of R1-Zero's format, the end of a sequence and the padding are special tokens, which no
text can spell. A caller may allow the tags with `tags=True`, and never does for text from a user.
"""

import hashlib
from collections.abc import Sequence

import tiktoken

MAX_NUMBER = 99  # numbers above this are spelt digit by digit
MAX_STEP = 16  # indices of steps above this are spelt digit by digit too
SPEAKERS = ("User:", "\nAssistant:")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Every character matches one alternative, so that decode(encode(text)) == text.
PIECE = r"[ \n]?#?\p{N}+|[ \n]?\p{L}+:?|[ \n]?[^\s\p{L}\p{N}]|\s"


class Tokenizer:
    """Text to token ids and back. `eos_id` ends a sequence; `pad_id` fills a batch and is never
    trained on. `pieces` are the bytes of each id, and `line_breaks` are the ids that begin a line.
    `fingerprint` tells this vocabulary from any other, as ids mean nothing to a model that learned
    other words.

    Raises ValueError, in one line, for a word that stands twice, as a number would, and for a word
    that texts split."""

    def __init__(self, words: Sequence[str]) -> None:
        words = [f" {word}" for word in (*words, *range(MAX_NUMBER + 1))]
        steps = [f"\n#{index}" for index in range(1, MAX_STEP + 1)]
        pieces = [bytes([value]) for value in range(256)]
        pieces += [text.encode() for text in (*SPEAKERS, *words, *steps)]
        if twice := [piece for piece in pieces if pieces.count(piece) > 1]:
            word = twice[0].decode().strip()
            raise ValueError(f"the word {word!r} stands twice in the vocabulary of a task")
        special = {text: len(pieces) + i for i, text in enumerate((*TAGS, "<eos>", "<pad>"))}
        self._encoding = tiktoken.Encoding(
            name="miniature",
            pat_str=PIECE,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens=special,
        )
        self._tags = set(TAGS)
        for word in words:
            if len(self.encode(word)) != 1:
                raise ValueError(f"{word[1:]!r} is not one word: letters alone, or a single sign")
        self.eos_id: int = special["<eos>"]
        self.pad_id: int = special["<pad>"]
        self.vocab_size: int = self._encoding.n_vocab
        self.pieces: list[bytes] = [*pieces, *(text.encode() for text in special)]
        self.line_breaks: list[int] = [i for i, x in enumerate(self.pieces) if x[:1] == b"\n"]
        vocabulary = b"\0".join((PIECE.encode(), *self.pieces))
        self.fingerprint: str = hashlib.sha256(vocabulary).hexdigest()[:16]

    def encode(self, text: str, tags: bool = False) -> list[int]:
        """The ids of `text`. With `tags`, "<think>" and the other tags become their special tokens.
        Without, they are ordinary characters, as text from a user must be."""
        special = self._tags if tags else set()
        return self._encoding.encode(text, allowed_special=special, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, tags included. Bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode(ids)
