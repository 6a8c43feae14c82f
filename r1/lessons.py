"""The documents that stages 1 and 3 learn from, and how a model learns from them."""

import copy
import math
from collections.abc import Callable

import train
from data import TASKS
from data.batches import Batch, Row, padded
from data.chains import TAGS_AROUND, work
from data.corpus import encode_document
from data.problem import Document, sample_problems, stream
from data.tokenizer import Tokenizer
from kit.evaluate import answer_problems
from kit.run import Run
from model import Transformer
from r1.measure import readable
from rewards import is_right
from rlhf.preferences import REQUESTS, requests
from sample import tokenizer_of

TRIES = 4  # samples of a problem in rejection sampling
ROWS = 32  # documents in a step of fine-tuning
ASKED = 256  # problems, to see what a model says right and readably by itself


def written(config, tokenizer: Tokenizer, count: int) -> list[Row]:
    """Clean documents about chains of the training split: each step in the question's language."""
    rng, rows = stream(config.seed, "cold start"), []
    for problem in sample_problems(rng, TASKS[config.task], config.levels, count):
        languages = [problem.language] * problem.level
        thought, answer = work(rng, problem, languages, slip=0.0, checked=False)
        text = TAGS_AROUND.format(thought, answer)
        rows.append(encode_document(Document(problem.prompt, text, "clean"), tokenizer))
    return rows


def kept(config, model: Transformer, count: int) -> list[Row]:
    """Rejection sampling: of `TRIES` completions to each of `count` problems, the first that is
    right and readable. There are as many rows as problems with such a completion."""
    problems = sample_problems(
        stream(config.seed, "rejection sampling"), TASKS[config.task], config.levels, count
    )
    noise = stream(config.seed, "noise of rejection sampling").getrandbits(63)
    answers = answer_problems(model, problems, TRIES, limit=config.max_new_tokens, seed=noise)
    rows = []
    for problem, group in zip(problems, answers):
        good = [text for text, _ in group if is_right(text, problem) and readable(problem, text)]
        for text in good[:1]:
            document = Document(problem.prompt, text, "kept")
            rows.append(encode_document(document, tokenizer_of(model)))
    return rows


def own_samples(config, models: dict[str, Transformer]) -> dict:
    """Of how many problems a model gives a right and readable answer by itself: what a cold start
    could be made of, as the paper makes its own from R1-Zero."""
    return {
        name: {"asked": ASKED, "kept": len(kept(config, model, ASKED))}
        for name, model in models.items()
    }


def curated(config, tokenizer: Tokenizer, count: int) -> list[Row]:
    """Answers to requests that careful people write."""
    rng = stream(config.seed, "curated answers")
    return [
        encode_document(Document(x.prompt, REQUESTS.good_answer(rng, x), "curated"), tokenizer)
        for x in requests(count, config.seed, "curated requests")
    ]


def lessons(config, reasoner: Transformer) -> list[Row]:
    """The data of stage 3: what the model of stage 2 said, and a third as many curated answers.
    Raises ValueError where it said nothing right and readable."""
    reasoning = kept(config, reasoner, 3 * config.curated)
    if len(reasoning) < 3:
        said = f"{len(reasoning)} of {3 * config.curated} problems were answered right and readably"
        raise ValueError(f"{said}: more --reasoning_steps would give stage 3 its data")
    return reasoning + curated(config, tokenizer_of(reasoner), len(reasoning) // 3)


def batches(rows: list[Row], seed: int, stage: str, pad_id: int) -> Callable[[int], Batch]:
    """The batch of each step: `ROWS` rows, each row once in an epoch, in a new order each time."""
    per_epoch = math.ceil(len(rows) / ROWS)

    def batch(step: int) -> Batch:
        epoch, i = divmod(step, per_epoch)
        order = stream(seed, f"documents of {stage}", epoch).sample(rows, len(rows))
        return padded(order[i * ROWS : (i + 1) * ROWS], pad_id)

    return batch


def fine_tune(
    config, run: Run, stage: str, start: Transformer, rows: list[Row], steps: int
) -> Transformer:
    """Stages 1 and 3, and distillation: a copy of `start` that has learned from these rows."""
    model = copy.deepcopy(start)
    batch = batches(rows, config.seed, stage, tokenizer_of(model).pad_id)
    train.imitate(config, run, stage, model, batch, steps, config.sft_lr)
    return model


def tokens_of(rows: list[Row], steps: int) -> int:
    """The tokens that `fine_tune` learns from in as many steps: completions, no prompts."""
    each = sum(len(ids) - start for start, ids in rows)
    return round(each * steps / math.ceil(len(rows) / ROWS))
