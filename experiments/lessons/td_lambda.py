"""From Monte Carlo to TD(lambda): what a value model buys, what it costs, and why GRPO, which has
none, is Monte Carlo. Exact numbers, by enumerating every output of a toy.

    python -m experiments.lessons.td_lambda

An output is four steps, and each step is right with probability 0.7. The reward comes at the end: 1
if at least three steps are right. So the true value of every prefix is a short sum, and so is the
true advantage of a step: the value after it, less the value before it. The estimates come from
`rlhf.ppo.gae` and, for a group's mean, from `grpo.group_advantages`.
"""

import math
from itertools import product

import torch
from torch import Tensor

from grpo import group_advantages
from rlhf.ppo import gae

STEPS, RIGHT, ENOUGH = 4, 0.7, 3  # steps, chance that one is right, right steps that earn 1
OUTPUTS = list(product("+-", repeat=STEPS))  # a right step is "+", a wrong step "-"
SHOWN = ("+", "-", "+", "+")  # the output that is worked out
LAMBDAS = (0.0, 0.5, 0.8, 0.95, 1.0)
GROUPS = (2, 8, 64)


def chance(steps: tuple[str, ...]) -> float:
    """The probability that the policy says these steps."""
    return math.prod(RIGHT if step == "+" else 1 - RIGHT for step in steps)


def reward(output: tuple[str, ...]) -> float:
    return float(output.count("+") >= ENOUGH)


def value(prefix: tuple[str, ...]) -> float:
    """The expected reward of an output that begins so."""
    rests = product("+-", repeat=STEPS - len(prefix))
    return sum(chance(rest) * reward(prefix + rest) for rest in rests)


def wrong(prefix: tuple[str, ...]) -> float:
    """A critic that sees the last step alone, and believes in it."""
    return value(()) if not prefix else 0.9 if prefix[-1] == "+" else 0.1


CRITICS = {  # what each expects of an output that begins so
    "right": value,
    "half right": lambda prefix: (value(prefix) + wrong(prefix)) / 2,
    "wrong": wrong,
    "of the question": lambda prefix: value(()),  # knows the pass rate, and nothing of the steps
}


def true_advantages() -> Tensor:
    """Of each step of each output, (16, 4) float64."""
    rows = [[value(o[: t + 1]) - value(o[:t]) for t in range(STEPS)] for o in OUTPUTS]
    return torch.tensor(rows, dtype=torch.float64)


def estimates(critic: str, lam: float) -> Tensor:
    """The advantages that `gae` gives each step of each output, (16, 4) float64."""
    values = [[CRITICS[critic](output[:t]) for t in range(STEPS)] for output in OUTPUTS]
    values = torch.tensor(values, dtype=torch.float64)
    rewards = torch.zeros_like(values)
    rewards[:, -1] = torch.tensor([reward(output) for output in OUTPUTS])
    return gae(rewards, values, torch.ones_like(values, dtype=torch.bool), lam=lam)[0]


def in_a_group(size: int, earned: float) -> list[tuple[float, float]]:
    """What an output that earned this gets in a group: (probability, advantage) for each number of
    right outputs among the others. "leave_one_out" is the group's mean without the shrinking by
    1 - 1/size that comes of counting the output itself."""
    found = []
    for others in range(size):
        rewards = torch.tensor([earned] + [1.0] * others + [0.0] * (size - 1 - others))
        advantage = group_advantages(rewards.double(), size, "leave_one_out")[0].item()
        ways = math.comb(size - 1, others)
        right = value(())
        found.append((ways * right**others * (1 - right) ** (size - 1 - others), advantage))
    return found


def group_estimates(size: int) -> tuple[Tensor, Tensor]:
    """The mean and the variance, over the rest of the group, of the advantage that each step of
    each output gets, (16, 4) float64 each."""
    moments = []
    for output in OUTPUTS:
        drawn = in_a_group(size, reward(output))
        mean = sum(p * x for p, x in drawn)
        moments.append((mean, sum(p * (x - mean) ** 2 for p, x in drawn)))
    means, variances = torch.tensor(moments, dtype=torch.float64).T
    return means[:, None].expand(-1, STEPS), variances[:, None].expand(-1, STEPS)


def bias_and_noise(found: Tensor, variance: Tensor | float = 0.0) -> tuple[float, float]:
    """How far estimates (16, 4) are from the true advantages, as root mean squares over the steps
    that the policy takes.

    Bias is what no number of outputs averages away: the expected difference between the steps that
    could follow a prefix, less the true difference. A shift that is the same for both steps is
    none: as a baseline, it leaves the expected gradient as it is. Noise is all the rest: the shift,
    and what the rest of the output and `variance` add.
    """
    chances = torch.tensor([chance(output) for output in OUTPUTS], dtype=torch.float64)
    error = found - true_advantages()
    bias = torch.zeros_like(error)
    for t in range(STEPS):

        def expected(length: int, t: int = t) -> Tensor:
            """The mean error at step t over all outputs with the same first steps, (16,)."""
            same = torch.tensor([[a[:length] == b[:length] for b in OUTPUTS] for a in OUTPUTS])
            weights = same * chances
            return weights @ error[:, t] / weights.sum(dim=1)

        bias[:, t] = expected(t + 1) - expected(t)  # given the step, less given its prefix alone
    weights = chances[:, None].expand(-1, STEPS) / STEPS
    squares = [(weights * (x**2 + y)).sum().item() for x, y in ((bias, 0), (error, variance))]
    return math.sqrt(squares[0]), math.sqrt(max(0.0, squares[1] - squares[0]))


def main() -> None:
    row, size = OUTPUTS.index(SHOWN), true_advantages()
    print(f"the output {' '.join(SHOWN)} earns {reward(SHOWN):.0f}; pass rate {value(()):.4f}")
    prefixes = [SHOWN[:t] for t in range(STEPS)]
    print(f"{'value before each step':34}" + "".join(f"{value(p):8.3f}" for p in prefixes))
    shown = {"true advantage of each step": size[row]}
    shown["TD error, right critic (lambda 0)"] = estimates("right", 0.0)[row]
    shown["TD(0.8), right critic"] = estimates("right", 0.8)[row]
    shown["Monte Carlo (lambda 1)"] = estimates("right", 1.0)[row]
    shown["TD error, wrong critic"] = estimates("wrong", 0.0)[row]
    shown["GRPO: reward less the pass rate"] = estimates("of the question", 1.0)[row]
    for name, numbers in shown.items():
        print(f"{name:34}" + "".join(f"{x:8.3f}" for x in numbers.tolist()))

    print("\nbias and noise of the advantage of a step, by critic")
    print(f"{'lambda':9}" + "".join(f"{name:>18}" for name in CRITICS))
    for lam in LAMBDAS:
        cells = [bias_and_noise(estimates(name, lam)) for name in CRITICS]
        print(f"{lam:<9}" + "".join(f"{bias:10.3f}{noise:8.3f}" for bias, noise in cells))
    print("\nno critic: reward less the mean of the others in a group")
    for count in GROUPS:
        bias, noise = bias_and_noise(*group_estimates(count))
        print(f"G = {count:<5}{bias:10.3f}{noise:8.3f}")


if __name__ == "__main__":
    main()
