"""Is the gradient biased? Exact answers, by enumerating all outputs of a tiny policy.

    python -m experiments.lessons.bias                   # three tables, in a few seconds
    python -m experiments.lessons.bias --plot bias.png   # and a picture (needs matplotlib)

An output has at most three tokens: "a", "b" and ".", which ends it. There are 15 outputs, and 21
logits give their probabilities. So an expectation over outputs is a finite sum, and the expected
gradient of a loss is exact. The losses are the functions of grpo.py, called on every group that the
policy can sample.
"""

import math
import sys
from collections import Counter
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from torch import Tensor

from experiments.watch.plot import check_picture
from grpo import ADVANTAGES, KL_ESTIMATORS, VARIANTS, group_advantages, policy_loss
from kit.flags import command_line

# -------------------------------------------------------------------------------- the tiny policy

LONGEST = 3
PREFIXES = ["", "a", "b", "aa", "ab", "ba", "bb"]
OUTPUTS = [f"{prefix}." for prefix in PREFIXES]
OUTPUTS += [prefix + token for prefix in PREFIXES if len(prefix) == LONGEST - 1 for token in "ab"]
LENGTHS = torch.tensor([len(output) for output in OUTPUTS], dtype=torch.float64)
MASK = torch.arange(LONGEST + 1) <= LENGTHS[:, None]
MASK[:, 0] = False  # the prompt


def random_logits(seed: int) -> Tensor:
    """The logits of the next token after each prefix, (7, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), 3, generator=generator, dtype=torch.float64)


def output_logps(logits: Tensor) -> Tensor:
    """The log-probability of each token of each output, (15, 4); 0 outside the mask."""
    logps, zero = logits.log_softmax(dim=1), logits.new_zeros(())
    rows = []
    for output in OUTPUTS:
        tokens = [logps[PREFIXES.index(output[:t]), "ab.".index(x)] for t, x in enumerate(output)]
        padding = [zero] * (LONGEST - len(output))
        rows.append(torch.stack([zero, *tokens, *padding]))
    return torch.stack(rows)


def probabilities(logits: Tensor) -> Tensor:
    """The probabilities of the outputs, (15,)."""
    return output_logps(logits).sum(dim=1).exp()


def prefix_probabilities(logits: Tensor) -> Tensor:
    """The probability that an output begins with each prefix, (7,)."""
    chances = probabilities(logits)
    begins = [[output.startswith(prefix) for output in OUTPUTS] for prefix in PREFIXES]
    return torch.stack([chances[rows].sum() for rows in begins])


# -------------------------------------------------------------------------------- exact gradients


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def true_gradient(logits: Tensor, values: Tensor) -> Tensor:
    """The gradient, (7, 3), of the expected value of an output, given `values` (15,). An unbiased
    estimator gives it on average."""
    logits = logits.clone().requires_grad_()
    return gradient((probabilities(logits) * values).sum(), logits)


def kl_gradient(logits: Tensor, ref_logits: Tensor, sampler: Tensor, reverse: bool) -> Tensor:
    """The gradient, (7, 3), of the reverse KL(pi || ref) or the forward KL(ref || pi). The KL of
    each prefix is weighted by the probability that `sampler` reaches it."""
    logits = logits.clone().requires_grad_()
    policy, reference = logits.log_softmax(dim=1), ref_logits.log_softmax(dim=1)
    log_p, log_q = (policy, reference) if reverse else (reference, policy)
    per_prefix = (log_p.exp() * (log_p - log_q)).sum(dim=1)  # KL(p || q)
    return gradient((prefix_probabilities(sampler) * per_prefix).sum(), logits)


def all_groups(size: int) -> list[tuple[list[int], int]]:
    """Every group of `size` outputs, and the number of orders in which it can be sampled."""

    def orders(group: tuple[int, ...]) -> int:
        return math.factorial(size) // math.prod(map(math.factorial, Counter(group).values()))

    groups = combinations_with_replacement(range(len(OUTPUTS)), size)
    return [(list(group), orders(group)) for group in groups]


def expected_gradient(
    logits: Tensor, rewards: Tensor, group_size: int, variant: str, scale: str | None = None
) -> Tensor:
    """The expected gradient of minus `policy_loss`, (7, 3), over all groups that the policy can
    sample. One group is one optimizer step. `scale` names the row of ADVANTAGES; without it, the
    variant's own."""
    logits = logits.clone().requires_grad_()
    logps, chances = output_logps(logits), probabilities(logits).detach()
    settings, expected = {"variant": variant, "max_tokens": LONGEST}, 0.0
    for group, orders in all_groups(group_size):
        advantages = group_advantages(rewards[group], group_size, scale or VARIANTS[variant].scale)
        loss, _ = policy_loss(logps[group], advantages, MASK[group], **settings)
        expected = expected - orders * chances[group].prod() * loss
    return gradient(expected, logits)


def kl_term_gradient(
    logits: Tensor, reference: Tensor, sampler: Tensor, kl: str, variant: str = "dr_grpo"
) -> Tensor:
    """The expected gradient of the loss's KL term, (7, 3), over outputs drawn from `sampler`. With
    `max_tokens` 1, dr_grpo divides by 1, so its term is a sum over tokens. grpo divides by
    |o_i|."""
    logits = logits.clone().requires_grad_()
    tensors = (output_logps(logits), output_logps(sampler), output_logps(reference), MASK)
    settings, expected = {"variant": variant, "beta": 1.0, "kl": kl, "max_tokens": 1}, 0.0
    for chance, *row in zip(probabilities(sampler), *(x.split(1) for x in tensors)):
        logps, old_logps, ref_logps, mask = row
        others = {"old_logps": old_logps, "ref_logps": ref_logps}
        loss, _ = policy_loss(logps, torch.zeros(1), mask, **others, **settings)
        expected = expected + chance * loss
    return gradient(expected, logits)


def weight_of_question(pass_rate: float, group_size: int, scale: str) -> float:
    """The expected factor on the true gradient of a question whose rewards are 1 and 0. It is a sum
    over the number of right outputs in a group. A group of equal rewards adds 0."""
    weight, G = 0.0, group_size
    for right in range(1, G):
        wrong = G - right
        rewards = torch.tensor([1.0] * right + [0.0] * wrong, dtype=torch.float64)
        chance = math.comb(G, right) * pass_rate**right * (1 - pass_rate) ** wrong
        high, *_, low = group_advantages(rewards, G, scale).tolist()
        # With pass rate p, E[grad log pi | right] = grad p / p, and given wrong -grad p / (1 - p).
        weight += chance * (right / G * high / pass_rate - wrong / G * low / (1 - pass_rate))
    return weight


# ---------------------------------------------------------------------------------- the questions


def angle(one: Tensor, other: Tensor) -> float:
    """The angle in degrees, from 0 (the same direction) to 180 (opposite directions)."""
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine(one, other)))))


def cosine(one: Tensor, other: Tensor) -> float:
    return ((one * other).sum() / (one.norm() * other.norm())).item()


def distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, relative to the norm of `other`."""
    return ((one - other).norm() / other.norm()).item()


# An output earns 1 for "b" as its second token ("accuracy"), and 1 for the end mark ("format").
REWARDS = [float(output[1:2] == "b") + float(output.endswith(".")) for output in OUTPUTS]
REWARDS = torch.tensor(REWARDS, dtype=torch.float64)


def print_deviation(group_size: int) -> None:
    print(
        """1. Does the standard deviation bias the gradient?

One question with right and wrong answers: the direction stays, the size depends on the pass rate.
The factor on the question's true gradient, for groups of 8:
"""
    )
    rates = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    print(f"{'pass rate':>16}" + "".join(f"{rate:8.2f}" for rate in rates))
    for scale in ADVANTAGES:
        if scale == "batch":  # with one question the batch is the group, so "batch" equals "std"
            continue
        weights = [weight_of_question(rate, 8, scale) for rate in rates]
        print(f"{scale:>16}" + "".join(f"{weight:8.3f}" for weight in weights))
    logits = random_logits(0)
    found = expected_gradient(logits, REWARDS, group_size, "reinforce", scale="std")
    degrees = angle(found, true_gradient(logits, REWARDS))
    print(
        f"""
Yes, between questions: a question that is nearly always or nearly never solved weighs more.
Within a question too, if rewards are graded: with rewards 0, 1 and 2 and groups of {group_size},
the gradient turns by {degrees:.1f} degrees.
"""
    )


def print_variants(group_size: int) -> None:
    print("2. Does the length normalizer bias the gradient?\n")
    print(f"Groups of {group_size}, ratio 1 everywhere, compared with the true policy gradient:\n")
    logits = random_logits(0)
    target, longer = true_gradient(logits, REWARDS), true_gradient(logits, LENGTHS)
    columns = f"{'angle':>7} {'if mean only':>13} {'size':>8} {'cos(longer)':>12}"
    print(f"{'':10} {'advantages':>14} {'aggregation':>26} {columns}")
    print(f"{'truth':10} {'':14} {'':26} {0:7.1f} {'':13} {1:8.3f} {cosine(target, longer):12.3f}")
    for name, row in VARIANTS.items():
        found = expected_gradient(logits, REWARDS, group_size, name)
        mean_only = expected_gradient(logits, REWARDS, group_size, name, scale="none")
        functions = (row.per_output, row.normalizer)
        aggregation = ", ".join(getattr(f, "__name__", "partial") for f in functions)
        print(
            f"{name:10} {row.scale:>14} {aggregation:>26} "
            f"{angle(found, target):7.1f} {angle(mean_only, target):13.1f} "
            f"{(found.norm() / target.norm()).item():8.3f} {cosine(found, longer):12.3f}"
        )
    print(
        f"""
angle: degrees between the expected and the true gradient, with the variant's own advantages.
if mean only: the same angle, with advantages that only subtract the group's mean.
size: the norm of the expected gradient over the norm of the true gradient.
cos(longer): the cosine with the gradient of the expected length.

rloo gives the true gradient. reinforce gives it times 1 - 1/G, which is {1 - 1 / group_size:.3f}.
dr_grpo divides the gradient of reinforce by the limit of {LONGEST} tokens. Dividing by the sampled
tokens of an output, or of a step, turns the gradient. Short outputs earn more here, and the
gradient turns too far toward them.
"""
    )


def print_kl() -> None:
    print(
        """3. Which gradient does a KL estimator give as a term of the loss?

Its distance to zero, to the gradient of the forward KL, and to the gradient of the reverse KL.
Then the distance to the reverse KL's gradient again: where an older policy sampled, and where the
loss divides by |o_i|. A distance of 1 is the norm of the reverse KL's gradient.
"""
    )
    logits, reference, older = (random_logits(seed) for seed in (0, 1, 2))
    columns = f"{'to zero':>8} {'to forward':>11} {'to reverse':>11} {'off-policy':>11}"
    print(f"{'':10} {columns} {'with 1/|o_i|':>13}")
    forward, reverse = (kl_gradient(logits, reference, logits, which) for which in (False, True))
    older_reverse = kl_gradient(logits, reference, older, True)
    for kind in KL_ESTIMATORS:
        found = kl_term_gradient(logits, reference, logits, kind)
        targets = (torch.zeros_like(logits), forward, reverse)
        gaps = [((found - target).norm() / reverse.norm()).item() for target in targets]
        gaps.append(distance(kl_term_gradient(logits, reference, older, kind), older_reverse))
        cells = " ".join(f"{gap:11.3f}" for gap in gaps)[3:]
        divided = kl_term_gradient(logits, reference, logits, kind, variant="grpo")
        best = divided * (divided * reverse).sum() / divided.pow(2).sum()  # the nearest multiple
        print(f"{kind:10} {cells} {distance(best, reverse):13.3f}")
    print(
        """
k3, as published, gives the gradient of the forward KL. k2 gives the gradient of the reverse KL.
k3_ratio (k3 times the ratio) gives it too, and also off-policy. k1 gives zero on average.
1/|o_i| depends on the sample, so it turns each gradient. The last column allows for size: it takes
the multiple of the gradient that is nearest to the reverse KL's."""
    )


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    rates = torch.linspace(0.01, 0.99, 99).tolist()
    for scale, size, label, style in (
        ("leave_one_out", 8, "leave-one-out: exact", "k--"),
        ("none", 8, "mean only", "C0"),
        ("std", 8, "standardised, G = 8", "C1"),
        ("std", 64, "standardised, G = 64", "C2"),
    ):
        weights = [weight_of_question(rate, size, scale) for rate in rates]
        left.plot(rates, weights, style, label=label)
    left.set(title="What a question weighs", xlabel="pass rate")
    left.set(ylabel="times its true gradient", ylim=(0, 8))
    left.legend()

    lengths = range(1, 101)
    middle.plot(lengths, [1 / length for length in lengths], label="grpo, gspo: 1/|o|")
    middle.plot(lengths, [0.02] * len(lengths), label="dapo, cispo: 1/(mean length), here 50")
    middle.plot(lengths, [0.01] * len(lengths), "k--", label="dr_grpo: 1/limit, here 100")
    middle.set(title="What a token weighs", xlabel="tokens of its output")
    middle.set(ylabel="times its advantage", yscale="log")
    middle.legend()

    logits, reference = random_logits(0), random_logits(1)
    bars = {"reverse KL": kl_gradient(logits, reference, logits, True)}
    bars["forward KL"] = kl_gradient(logits, reference, logits, False)
    bars |= {kind: kl_term_gradient(logits, reference, logits, kind) for kind in KL_ESTIMATORS}
    share = 1 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        places = [token + 0.78 * (share * (i + 0.5) - 0.5) for token in range(3)]
        look = {"color": ("k", "0.6")[i] if i < 2 else f"C{i - 2}", "width": 0.72 * share}
        label = f"{name} (all 0)" if name == "k1" else name
        right.bar(places, values[0].tolist(), label=label, **look)
    right.set_xticks(range(3), ["a", "b", "."])
    right.axhline(0, color="k", linewidth=0.5)
    right.set(title="Expected gradient of the KL term", xlabel="logit of the first token")
    right.legend(ncols=2)
    figure.savefig(path, dpi=110, format="png")
    print(f"\n-> {path}")


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--group_size", type=int, default=2, choices=(2, 3), help="outputs of a group [2]")
    add("--plot", metavar="FILE", type=Path, help="draw a picture, as a PNG")
    args = parser.parse_args(arguments)
    check_picture(parser, "--plot", args.plot)
    print_deviation(args.group_size)
    print_variants(args.group_size)
    print_kl()
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
