"""What a model has become: gold, the judge's score, the KL to where it started; what it costs."""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

import train
from data.problem import Problem, stream
from kit.evaluate import answer_problems, grade, held_out_problems, mean, mean_measures, share
from model import Transformer
from rlhf.preferences import REQUESTS, requests
from sample import Rollout, complete, decode_completions, tokenizer_of

ASKED, SHOWN = 120, 8  # requests of a point on a path, and those whose answer it shows


def evaluation_requests(seed: int, held_out: bool) -> list[Problem]:
    return requests(240, seed, "evaluation requests", held_out)


def gold_of(model: Transformer, *, limit: int, seed: int, held_out: bool) -> dict[str, float]:
    """Gold of a model's answers and its parts, means over 240 requests, 4 answers of each."""
    problems = evaluation_requests(seed, held_out)
    noise = stream(seed, "evaluation requests, noise").getrandbits(63)
    answers = answer_problems(model, problems, 4, limit=limit, seed=noise)
    return mean_measures(problems, [[text for text, _ in group] for group in answers])


def measure(config: train.Config, model: Transformer) -> dict:
    """Gold of a model's answers, about numbers that documents answer about and about others; and
    pass@1 of held-out chains, which training on requests could cost."""
    how = {"limit": config.max_new_tokens, "seed": config.seed}
    chains = held_out_problems(config.task, config.levels, 120, config.seed, "evaluation")
    return {
        "seen": gold_of(model, held_out=False, **how),
        "held_out": gold_of(model, held_out=True, **how),
        "chains": mean(grade(chains, answer_problems(model, chains, 4, **how))),
    }


def gold_table(found: dict[str, dict]) -> str:
    """What `measure` found of some models, as lines of text."""
    lines = [f"{'':24}{''.join(f'{name:>9}' for name in found)}"]
    for split in ("seen", "held_out"):
        cells = "".join(f"{model[split]['gold']:9.2f}" for model in found.values())
        lines.append(f"{f'gold, {split} numbers'.replace('_', '-'):24}{cells}")
    cells = "".join(f"{share(model['chains']):>9}" for model in found.values())
    return "\n".join([*lines, f"{'pass@1 of chains':24}{cells}"])


# -------------------------------------------------------------------------------- over-optimisation


def point_requests(seed: int, held_out: bool) -> list[Problem]:
    return requests(ASKED, seed, "requests of a point", held_out)


def ask(
    config: train.Config,
    model: Transformer,
    score: train.Reward,
    problems: list[Problem],
    samples: int,
    first_row: int = 0,
) -> tuple[Rollout, list[str], Tensor, Tensor]:
    """A model's answers to requests: rollout and texts, the judge's score of each answer and its
    gold, (B,) float32 each. The noise, that of rows from `first_row` on, is the same for every
    model."""
    how = {"group_size": samples, "max_new_tokens": config.max_new_tokens, "first_row": first_row}
    noise = stream(config.seed, "noise of a point").getrandbits(63)
    rollout = complete(model, problems, seed=noise, **how)
    texts = decode_completions(rollout, tokenizer_of(model))
    golds = [REQUESTS.gold(problems[i // samples], text) for i, text in enumerate(texts)]
    return rollout, texts, score(problems, rollout, 0)["reward"], torch.tensor(golds)


def log_ratios(reference: Transformer, rollout: Rollout, size: int) -> Tensor:
    """log(pi / pi_ref) of each completion of a rollout, (B,), in nats, where pi sampled it at
    temperature 1. The mean is an unbiased estimate of KL(pi || pi_ref)."""
    rows = np.arange(len(rollout.tokens))
    return (rollout.logps - train.rollout_logps(reference, rollout, rows, size)).sum(dim=1)


def point(
    config: train.Config,
    policy: Transformer,
    sft: Transformer,
    score: train.Reward,
    held_out: bool = True,
) -> dict:
    """Where a policy stands on its path, by 4 answers to each of ASKED requests of a split: KL to
    the fine-tuned model in nats a completion, the judge's score and gold, means over the answers;
    and what it says to the first few requests."""
    problems = point_requests(config.seed, held_out)
    rollout, texts, scores, golds = ask(config, policy, score, problems, samples=4)
    prompts = [problem.prompt for problem in problems]
    said = zip(prompts, texts[::4], scores[::4].tolist(), golds[::4].tolist())
    names = ("prompt", "said", "proxy", "gold")
    return {
        "kl": log_ratios(sft, rollout, config.micro_batch).mean().item(),
        "proxy": scores.mean().item(),
        "gold": golds.mean().item(),
        "tokens": float((rollout.ends - rollout.starts).mean()),
        "said": [dict(zip(names, each)) for each in list(said)[:SHOWN]],
    }


def best_of(scores: Tensor, n: int) -> Tensor:
    """The picks of best-of-n, (P, N // n) int64, given the scores (P, N) of N answers to each of P
    prompts: the column of the highest score among the first n answers, among the next n, and so on.
    Raises ValueError for an n that does not divide N."""
    P, N = scores.shape
    if N % n:
        raise ValueError(f"{N} answers are not groups of {n}")
    return scores.view(P, -1, n).argmax(dim=2) + torch.arange(0, N, n)


def gold_of_best(
    config: train.Config, model: Transformer, score: train.Reward, n: int, held_out: bool
) -> dict[str, float]:
    """`gold_of` for best-of-n of the model's answers: the same requests, 4 picks for each."""
    problems, answers = evaluation_requests(config.seed, held_out), []
    for i, problem in enumerate(problems):  # one at a time: all at once would fill the memory
        _, texts, scores, _ = ask(config, model, score, [problem], 4 * n, first_row=4 * n * i)
        answers.append([texts[pick] for pick in best_of(scores[None], n)[0].tolist()])
    return mean_measures(problems, answers)


def best_of_kl(n: int) -> float:
    """The KL in nats a completion of best-of-n to the model that it picks from: log n - (n - 1) / n
    (Gao et al. 2022). It is less where answers are equal."""
    return math.log(n) - (n - 1) / n


def bytes_held(trained: list[nn.Module], frozen: list[nn.Module]) -> int:
    """Bytes of the weights of all models, and of the gradients and of AdamW's moments of those that
    are trained, counted from tensors. Activations are not counted."""
    held = [weight for model in (*trained, *frozen) for weight in model.parameters()]
    for model in map(copy.deepcopy, trained):
        optimizer = train.make_optimizer(model)
        optimizer.step()
        held += [weight.grad for weight in model.parameters()]
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        held += [moment for moment in moments if moment.dim()]  # a count of steps is no moment
    return sum(x.numel() * x.element_size() for x in held)
