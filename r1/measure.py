"""What the stages are measured by."""

import re
from functools import partial

import torch

from data import TASKS
from data.batches import padded
from data.chains import TAGS_AROUND
from data.corpus import encode_document
from data.languages import LANGUAGES
from data.problem import Problem, stream
from grpo import token_logps
from kit.evaluate import answer_problems, grade, held_out_problems, mean
from model import ScalarModel, Transformer
from rewards import format_reward, language_consistency_reward
from rlhf.measure import gold_of
from rlhf.reward_model import all_scores, compare, draw_pairs
from sample import tokenizer_of

SAMPLES = 4  # completions of each problem and of each request
SHARES = ("right", "format", "korean", "readable")  # measures that are shares
TESTED = 1000  # new pairs of each kind that the judge is measured on


def readable(problem: Problem, completion: str) -> bool:
    """Whether a person can follow the thought about a chain: a step for each operation, in order
    and in the language of the question, then the answer, and nothing else.

    The numbers of a chain must be the problem's. Results may be wrong: `accuracy` sees to them. A
    step must begin with the result of the step before it. Never raises.
    """
    spoken, (first, *rest) = LANGUAGES[problem.language], problem.expression.split(" ")
    total, lines = re.escape(first), []
    for index, (operator, operand) in enumerate(zip(rest[::2], rest[1::2]), 1):
        result = f"(?P<total{index}>[0-9]+)"
        word = spoken.operators[operator]
        lines.append(f"\n#{index} {total} {word} {operand} {spoken.equals} {result}")
        total = f"(?P=total{index})"
    return bool(re.fullmatch(TAGS_AROUND.format("".join(lines), "[0-9]+"), completion))


def measure(config, model: Transformer) -> dict[str, float]:
    """The measures of a model. Means over held-out chains and over requests, `SAMPLES` completions
    of each, at temperature 1. "korean" is the language reward of Korean questions. "gold" is of
    requests about numbers that training asks about, "gold_held_out" about other numbers."""
    how = {"limit": config.max_new_tokens, "seed": config.seed}
    count, purpose = config.eval_problems, "evaluation"
    problems = held_out_problems(config.task, config.levels, count, config.seed, purpose)
    answers = answer_problems(model, problems, SAMPLES, **how)
    texts = [(problem, text) for problem, group in zip(problems, answers) for text, _ in group]
    about = {held_out: gold_of(model, held_out=held_out, **how) for held_out in (False, True)}
    return {
        "right": mean(grade(problems, answers)),
        "format": mean([format_reward(text) for _, text in texts]),
        "korean": mean(
            [language_consistency_reward(text, "ko") for p, text in texts if p.language == "ko"]
        ),
        "readable": mean([readable(problem, text) for problem, text in texts]),
        "gold": about[False]["gold"],
        "gold_held_out": about[True]["gold"],
        "web_loss": web_loss(config, model),
        "completion_tokens": mean([tokens for group in answers for _, tokens in group]),
    }


@torch.no_grad()
def web_loss(config, model: Transformer) -> float:
    """What fine-tuning and RL cost elsewhere: the mean loss, in nats a token, on 400 new documents
    of the web that the base model read."""
    rng, tokenizer = stream(config.seed, "new documents"), tokenizer_of(model)
    write = (
        TASKS[config.task].document(rng, config.levels, config.max_seq_len) for _ in range(400)
    )
    tokens, mask, _ = padded([encode_document(x, tokenizer) for x in write], tokenizer.pad_id)
    tokens, mask = tokens.to(config.device), mask.to(config.device)
    return -token_logps(model(tokens), tokens)[mask].mean().item()


def agreement(config, judge: ScalarModel, asked: Transformer) -> dict:
    """The share of people's choices that the judge agrees with, on new pairs of answers."""
    draw = partial(draw_pairs, config, asked, TESTED)
    drawn = {"new": draw("new pairs"), "held-out": draw("held-out pairs", held_out=True)}
    return compare(config, {"reward": partial(all_scores, judge)}, drawn)
