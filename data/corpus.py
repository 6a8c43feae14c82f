"""The web in miniature as a model reads it: documents of a task, as token ids, in batches.

python -m data.corpus                # prints ten documents of the default task, signs
python -m data.corpus chains-en-ko   # of another row of TASKS
"""

import random
import re
import sys
from collections.abc import Sequence

import torch

from data import TASKS, get_tokenizer
from data.batches import BATCHES_PER_POOL, Batch, Batches, Row, cut_pool, jumping
from data.problem import Document, stream
from data.tokenizer import TAGS, Tokenizer

WORD = re.compile(r"[ \n]?[^\W\d_]+:?")  # letters, as the tokenizer cuts a text
SAMPLE = 100  # documents that are searched for unknown words


def encode_document(written: Document, tokenizer: Tokenizer) -> Row:
    """The tokens of a document, the end token last, and how many of them are its question."""
    question = tokenizer.encode(written.question)
    text = tokenizer.encode(written.text, tags=True)
    return len(question), [*question, *text, tokenizer.eos_id]


def document_batches(
    task: str, levels: Sequence[int], seed: int, tokens_a_batch: int, room: int
) -> Batches:
    """The pretraining batch of each step: documents of at most `room` tokens, none about a held-out
    problem. Positions jump where a line begins."""
    tokenizer = get_tokenizer(task)

    def make_pool(number: int) -> list[Batch]:
        rng, rows, tokens = stream(seed, "documents", number), [], 0
        while tokens < BATCHES_PER_POOL * tokens_a_batch:
            written = TASKS[task].document(rng, levels, room)
            rows.append(encode_document(written, tokenizer))
            tokens += len(rows[-1][1])
        batches = cut_pool(rows, tokenizer.pad_id, rng)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        how = (tokenizer.line_breaks, room, noise)
        return [(tokens, mask, jumping(tokens, *how)) for tokens, mask, _ in batches]

    return Batches(make_pool)


def check_room(task: str, level: int, hardest: int, room: int, max_new_tokens: int) -> None:
    """Raise ValueError, in one line, where the longest document of the level, or the longest prompt
    of the hardest level with `max_new_tokens` more, exceeds a context of `room` tokens."""
    tokenizer = get_tokenizer(task)
    _, written = encode_document(TASKS[task].longest(level), tokenizer)
    prompt, _ = encode_document(TASKS[task].longest(hardest), tokenizer)
    for name, tokens in (
        (f"level {hardest} with --max_new_tokens", prompt + max_new_tokens),
        (f"documents of --max_level {level}", len(written)),
    ):
        if tokens > room:
            reason = f"{tokens} tokens exceed the context of {room} (--max_seq_len)"
            raise ValueError(f"{name}: {reason}")


def check_words(task: str, levels: Sequence[int], room: int) -> None:
    """Raise ValueError, in one line, where a sample of the task's documents holds a word that is
    not in its vocabulary. The model would have to spell it byte by byte."""
    rng, tokenizer = stream(0, "words"), get_tokenizer(task)
    for _ in range(SAMPLE):
        written = TASKS[task].document(rng, levels, room)
        for word in WORD.findall(written.question + re.sub("|".join(TAGS), "", written.text)):
            if len(tokenizer.encode(word)) > 1:
                reason = f"the documents of {task} say {word.strip()!r}, which its words lack"
                raise ValueError(f"{reason}: a model would spell it byte by byte")


if __name__ == "__main__":
    name = sys.argv[1] if sys.argv[1:] else "signs"
    if name not in TASKS:
        sys.exit(f"data.corpus: {name} is no task; the tasks are {', '.join(TASKS)}")
    rng, (least, most) = random.Random(0), TASKS[name].levels
    for _ in range(10):
        written = TASKS[name].document(rng, range(least, most + 1))
        print(f"--- {written.style}\n{written.question}{written.text}")
