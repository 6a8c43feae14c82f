"""One tiny step of GRPO with every tensor printed and the loss worked out by hand beside it.

    python -m experiments.lessons.by_hand

Two prompts, four completions of each. The completions are made up, and so are their tokens'
probabilities under the old and the new policy. Rewards, advantages and losses come from rewards.py
and grpo.py. The numbers "by hand" use no tensor: a reader can do the same sums on paper.
"""

import statistics

import torch
from torch import Tensor

from data import get_tokenizer
from grpo import VARIANTS, clipped_surrogate, group_advantages, policy_loss
from rewards import accuracy_reward, format_reward

LIMIT = 10  # the most tokens of a completion: dr_grpo's divisor
ASKED = {" 7 plus 8 is": "15", " 9 minus 4 is": "5"}
SAMPLED = {  # each completion, and the new policy's probability over the old one's at each token
    "<think> easy</think><answer> 15</answer>": [1.0, 1.1, 1.25, 0.9, 1.3, 0.75, 1.0],
    "<answer> 15</answer>": [1.0, 1.5, 1.0, 0.7],
    " 15": [0.7, 1.1],
    " 14": [1.25, 0.9],
    " 5": [1.1, 1.0],
    " 6": [0.9, 1.0],
    "<answer> 3</answer>": [1.0, 1.1, 1.0, 1.2],
    " 4": [0.9, 0.9],
}
OLD_PROBABILITY = 0.5  # of every token, under the old policy


def build() -> tuple[Tensor, ...]:
    """The tensors of the step: tokens, mask, rewards, logps and old_logps. Rewards are (B,), all
    others (B, T)."""
    tokenizer = get_tokenizer("chains")
    prompts = [tokenizer.encode(prompt) for prompt in ASKED for _ in range(4)]
    completions = [[*tokenizer.encode(text, tags=True), tokenizer.eos_id] for text in SAMPLED]
    width = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions))
    tokens = torch.full((len(completions), width), tokenizer.pad_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    ratio = torch.ones_like(tokens, dtype=torch.float64)
    for row, (prompt, completion, ratios) in enumerate(zip(prompts, completions, SAMPLED.values())):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor(prompt + completion)
        mask[row, start:end] = True
        ratio[row, start:end] = torch.tensor(ratios, dtype=torch.float64)
    answers = [answer for answer in ASKED.values() for _ in range(4)]
    rules = [accuracy_reward(*pair) + format_reward(pair[0]) for pair in zip(SAMPLED, answers)]
    rewards = torch.tensor(rules, dtype=torch.float64)
    old_logps = torch.full_like(ratio, OLD_PROBABILITY).log().masked_fill(~mask, 0.0)
    logps = (old_logps + ratio.log()).requires_grad_()
    return tokens, mask, rewards, logps, old_logps


def advantages_by_hand(rewards: list[float], scale: str) -> list[float]:
    """The advantages of one group."""
    mean = sum(rewards) / len(rewards)
    divisor = 1.0 if scale == "none" else statistics.stdev(rewards) + 1e-4
    return [(reward - mean) / divisor for reward in rewards]


def objective_by_hand(advantage: float, ratio: float, low: float, high: float) -> float:
    """The clipped objective of one token."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, clipped * advantage)


def show(name: str, values: Tensor, mask: Tensor, form: str) -> None:
    """Print a (B, T) tensor, with a dot where the mask is False."""
    print(f"\n{name}")
    for row, (line, chosen) in enumerate(zip(values.tolist(), mask.tolist())):
        cells = [format(value, form) if real else "." for value, real in zip(line, chosen)]
        print(f"  row {row} " + "".join(f"{cell:>7}" for cell in cells))


def main() -> None:
    tokens, mask, rewards, logps, old_logps = build()
    adjacent = "2 prompts, 4 completions of each, adjacent: B = 8 rows."
    print(f"{adjacent} <eos> ends a completion and is trained; <pad> is not.")
    for row, text in enumerate(SAMPLED):
        print(f"  row {row} {list(ASKED)[row // 4]!r} -> {text + '<eos>'!r}")
    show(f"tokens {tuple(tokens.shape)}", tokens, torch.ones_like(mask), "d")
    show("mask: True on the sampled tokens", mask.int(), torch.ones_like(mask), "d")

    equation = "accuracy + format, less the group's mean, over its standard deviation + 0.0001"
    print(f"\nrewards and advantages: {equation}")
    advantages = group_advantages(rewards, 4)
    for start in (0, 4):
        group = rewards[start : start + 4].tolist()
        mean, deviation = sum(group) / 4, statistics.stdev(group)
        for row, by_hand in enumerate(advantages_by_hand(group, "std"), start):
            terms = f"({rewards[row]:.0f} - {mean:.2f}) / ({deviation:.4f} + 0.0001)"
            computed = f"group_advantages {advantages[row]:7.4f}"
            print(f"  row {row}  by hand {terms} = {by_hand:7.4f}   {computed}")
    print("  The second group has no signal: equal rewards, no advantage, no gradient.")

    ratio = (logps - old_logps).exp().detach()
    show("ratio = exp(logps - old_logps); old_logps are log 0.5 everywhere", ratio, mask, ".2f")
    objective = clipped_surrogate(ratio, logps.detach(), advantages[:, None], 0.2, 0.2)
    show(
        "objective of each token, grpo: min(ratio A, clip(ratio, 0.8, 1.2) A)",
        objective,
        mask,
        ".3f",
    )
    loss, _ = policy_loss(logps, advantages, mask, old_logps=old_logps)
    gradient = 100 * torch.autograd.grad(-loss, logps)[0]
    name = "gradient of J with respect to each logp, times 100: 0 where the clip holds"
    show(name, gradient, mask, ".2f")

    sizes = f"lengths {mask.sum(dim=1).tolist()}, {mask.sum()} tokens, limit {LIMIT}"
    print(f"\nthe loss under three variants ({sizes})")
    lengths = [len(ratios) for ratios in SAMPLED.values()]
    for variant in ("grpo", "dr_grpo", "dapo"):
        row, sums = VARIANTS[variant], []
        groups = (rewards[start : start + 4].tolist() for start in (0, 4))
        by_hand = [a for group in groups for a in advantages_by_hand(group, row.scale)]
        for a, ratios in zip(by_hand, SAMPLED.values()):
            sums.append(sum(objective_by_hand(a, r, row.clip_low, row.clip_high) for r in ratios))
        divisor = {"grpo": 8, "dr_grpo": 8 * LIMIT, "dapo": sum(lengths)}[variant]
        per_output = lengths if variant == "grpo" else [1] * 8  # divides the sum over its tokens
        total = -sum(each / length for each, length in zip(sums, per_output)) / divisor
        pairs = zip(sums[:4], per_output)  # the sums of the second group are 0
        terms = [f"{each:.4f}/{length}".removesuffix("/1") for each, length in pairs]
        text = " + ".join(terms).replace("+ -", "- ")
        print(f"  {variant:8} by hand -({text}) / {divisor} = {total:.4f}")
        advantages = group_advantages(rewards, 4, row.scale)
        settings = {"variant": variant, "max_tokens": LIMIT}
        loss, _ = policy_loss(logps, advantages, mask, old_logps=old_logps, **settings)
        print(f"  {'':8} policy_loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
