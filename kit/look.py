"""A look at held-out problems while a model learns: numbers for the log, and a few completions,
token by token, for looks.jsonl."""

from collections.abc import Callable

from torch import Tensor

from data import TASKS
from data.problem import Problem, stream
from data.tokenizer import Tokenizer
from kit.evaluate import mean, mean_measures, mean_think_tokens
from kit.metrics import Rewards
from kit.parallel import generate
from kit.run import Run
from model import Transformer
from rewards import is_right
from sample import Rollout, complete, decode_completions, tokenizer_of

SHOWN = 3  # problems of a look that looks.jsonl shows


def look(
    run: Run,
    model: Transformer,
    problems: list[Problem],
    reward: Callable,
    advantage: Callable,
    *,
    done: int,
    group_size: int,
    limit: int,
    seed: int,
) -> tuple[Rollout, dict[str, float]]:
    """Sample `group_size` completions of each problem, of at most `limit` tokens, and show a few in
    looks.jsonl, as those of a model that has made `done` steps. The noise is the same at each look.
    `reward` and `advantage` are the functions of the training. Returns the rollout and numbers for
    the log: accuracy, if there is a rule, and measures of thinking."""
    limits = {"group_size": group_size, "max_new_tokens": limit}
    noise = stream(seed, "noise of a look").getrandbits(63)
    rollout = complete(model, problems, generate, seed=noise, **limits)
    tokenizer = tokenizer_of(model)
    texts = decode_completions(rollout, tokenizer)
    rewards = reward(problems, rollout, run.step)
    advantages = advantage(rewards, rollout)
    shown = told(problems, rollout, texts, rewards, advantages, SHOWN, tokenizer)
    run.look({"step": done, "problems": shown})
    run.tell(f"{problems[0].expression}: {texts[0]}")
    groups = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
    right = mean([is_right(text, p) for p, group in zip(problems, groups) for text in group])
    numbers = {"think_tokens": mean_think_tokens(texts, tokenizer)}
    numbers |= mean_measures(problems, groups)
    return rollout, numbers if right is None else {"held_out_accuracy": right, **numbers}


def told(
    problems: list[Problem],
    rollout: Rollout,
    texts: list[str],
    rewards: Rewards,
    advantages: Tensor,
    count: int,
    tokenizer: Tokenizer,
) -> list[dict]:
    """The completions of the first `count` problems, token by token, as they stand in
    looks.jsonl."""
    G = len(texts) // len(problems)
    by_token = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(rollout.mask)

    def completion(row: int, problem: Problem) -> dict:
        said = slice(rollout.starts[row], rollout.ends[row])
        return {
            "tokens": [tokenizer.decode([token]) for token in rollout.tokens[row, said].tolist()],
            "logps": [round(x, 4) for x in rollout.logps[row, said].tolist()],
            "entropy": [round(x, 4) for x in rollout.entropy[row, said].tolist()],
            "rewards": {name: round(values[row].item(), 4) for name, values in rewards.items()},
            "measures": TASKS[problem.task].measures(problem, texts[row]),
            "advantage": [round(x, 4) for x in by_token[row, said].tolist()],
        }

    return [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "completions": [completion(row, problem) for row in range(i * G, (i + 1) * G)],
        }
        for i, problem in enumerate(problems[:count])
    ]
