"""Stage 4's prompts and their reward: rules where there are rules, a judge where there are none."""

import torch

import train
from data import TASKS
from data.problem import Problem, sample_problems, stream
from data.tokenizer import Tokenizer
from kit.metrics import Rewards
from model import Transformer
from rewards import RULES
from rlhf.preferences import REQUESTS
from sample import Rollout, complete, decode_completions


def asked_of_all(config, step: int) -> list[Problem]:
    """The problems of a step: chains, and in the last part of the steps also requests. The paper
    has general prompts, and the reward for them, in the last 400 of its 1,700 steps."""
    late = step >= config.judged_from * config.steps
    count = round(config.request_share * config.prompts) if late else 0
    rng, rest = stream(config.seed, "problems for all", step), config.prompts - count
    chains, levels = TASKS[config.task], (config.levels, REQUESTS.levels[:1])
    problems = sample_problems(rng, chains, levels[0], rest, first=step * rest)
    return problems + sample_problems(rng, REQUESTS, levels[1], count, first=step * count)


def sample_for_all(config, policy: Transformer, step: int) -> tuple[list[Problem], Rollout]:
    """As `train.sample`, of these problems."""
    problems = asked_of_all(config, step)
    names = ("group_size", "max_new_tokens", "temperature")
    how = {name: getattr(config, name) for name in names}
    how["seed"] = stream(config.seed, "rollout for all", step).getrandbits(63)
    return problems, complete(policy, problems, **how)


def rules_or_judge(
    weights: dict[str, float], tokenizer: Tokenizer, judge: train.Reward
) -> train.Reward:
    """The weighted rules where a problem has a rule, else the judge. "reward" is the sum of "rules"
    and "judge"; each is 0 where it has no say."""

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        texts = decode_completions(rollout, tokenizer)
        G = len(texts) // len(problems)
        has_rule = [problem.is_right("") is not None for problem in problems for _ in range(G)]
        rules = torch.tensor(
            [
                sum(x * RULES[rule](text, problems[row // G]) for rule, x in weights.items() if has)
                for row, (text, has) in enumerate(zip(texts, has_rule))
            ],
            dtype=torch.float32,
        )
        scores = judge(problems, rollout, step)["reward"]
        judged = scores.masked_fill(torch.tensor(has_rule), 0.0)
        return {"reward": rules + judged, "rules": rules, "judge": judged}

    return reward
