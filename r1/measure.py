"""What each stage is measured by, and the table of all stages."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from data import TASKS
from data.batches import padded
from data.chains import TAGS_AROUND
from data.corpus import encode_document
from data.languages import LANGUAGES
from data.problem import Problem, stream
from grpo import token_logps
from kit.evaluate import answer_problems, grade, held_out_problems, mean, share
from model import Transformer
from rewards import format_reward, language_consistency_reward
from rlhf.preferences import gold_of
from sample import tokenizer_of

SAMPLES = 4  # completions of each problem and of each request
ORDER = ("base", "r1_zero", "dev1", "dev2", "dev3", "r1", "student_base", "student", "student_grpo")
COLUMNS = {  # of the table: the head of each measure
    "right": "right",
    "format": "format",
    "korean": "Korean",
    "readable": "readable",
    "gold": "gold",
    "gold_held_out": "held-out",
    "tokens": "tokens",
    "seconds": "seconds",
}
Found = dict[str, dict[str, float]]  # the measures of each stage, by their names


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


def sampled_tokens(folder: Path, stage: str, rows: int) -> int:
    """The tokens that a stage of GRPO sampled in rollouts of `rows` rows, from the run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return round(sum(x["completion_tokens"] * rows for x in lines if x["stage"] == stage))


def line(name: str, found: dict[str, float]) -> str:
    """A row of the table."""
    shares = "".join(f"{share(found[x]):>10}" for x in ("right", "format", "korean", "readable"))
    golds = "".join(f"{found[x]:10.2f}" for x in ("gold", "gold_held_out"))
    return f"{name:14}{shares}{golds}{found['tokens']:12,.0f}{found['seconds']:10.0f}"


def head() -> str:
    *names, tokens, seconds = COLUMNS.values()
    return f"{'':14}{''.join(f'{name:>10}' for name in names)}{tokens:>12}{seconds:>10}"


# What the paper's Table 2 shows, as differences between stages (AIME 2024, IF-Eval, AlpacaEval 2),
# and what R1 must be. A difference counts from a point on.
SIGNS: dict[str, Callable[[Found], bool]] = {
    "the cold start costs reasoning: Dev1 is less often right than R1-Zero": lambda x: (
        x["dev1"]["right"] < x["r1_zero"]["right"] - 0.01
    ),
    "the cold start follows instructions: Dev1 is more readable than R1-Zero": lambda x: (
        x["dev1"]["readable"] > x["r1_zero"]["readable"] + 0.01
    ),
    "reasoning RL wins it back: Dev2 is more often right than Dev1": lambda x: (
        x["dev2"]["right"] > x["dev1"]["right"] + 0.01
    ),
    "stage 3 keeps it: Dev3 is right as often as Dev2, to a point": lambda x: (
        x["dev3"]["right"] > x["dev2"]["right"] - 0.01
    ),
    "stage 3 is liked better: the gold of Dev3 is above Dev2's": lambda x: (
        x["dev3"]["gold_held_out"] > x["dev2"]["gold_held_out"] + 0.1
    ),
    "RL for all is liked better: the gold of R1 is above Dev3's": lambda x: (
        x["r1"]["gold_held_out"] > x["dev3"]["gold_held_out"] + 0.1
    ),
    "R1 is right as often as the best stage, to a point": lambda x: (
        x["r1"]["right"] > max(x[stage]["right"] for stage in ORDER[:6]) - 0.01
    ),
    "R1 is readable and in the question's language, above 95 %": lambda x: (
        min(x["r1"]["readable"], x["r1"]["korean"]) > 0.95
    ),
    "a student that imitates is right more often than by GRPO": lambda x: (
        x["student"]["right"] > x["student_grpo"]["right"] + 0.01
    ),
}


def signs(found: Found) -> dict[str, bool]:
    return {text: seen(found) for text, seen in SIGNS.items()}
