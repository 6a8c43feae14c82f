"""Is the gradient biased? Exact answers, by enumerating everything that a tiny policy can say.

    python -m experiments.lessons.bias                   # three tables, in a few seconds
    python -m experiments.lessons.bias --plot bias.png   # and a picture (needs matplotlib)

The policy says at most three tokens: "a", "b" and ".", which ends an output. That makes 15 outputs,
whose probabilities follow from 21 logits. So every expectation over what the policy samples is a
finite sum, and the expected gradient of a loss is exact. The losses are the functions of grpo.py,
called on each group that could be sampled.
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
    """The log-probability of each token of each output, (15, 4), and 0 outside the mask."""
    logps, zero = logits.log_softmax(dim=1), logits.new_zeros(())
    rows = []
    for output in OUTPUTS:
        places = [(PREFIXES.index(output[:t]), "ab.".index(x)) for t, x in enumerate(output)]
        tokens = [logps[place] for place in places]
        rows.append(torch.stack([zero, *tokens, *[zero] * (LONGEST - len(output))]))
    return torch.stack(rows)


def probabilities(logits: Tensor) -> Tensor:
    """The probabilities of the outputs, (15,)."""
    return output_logps(logits).sum(dim=1).exp()


def prefix_probabilities(logits: Tensor) -> Tensor:
    """How likely an output is to come past each prefix, (7,)."""
    chances = probabilities(logits)
    past = [[o.startswith(prefix) and o != prefix for o in OUTPUTS] for prefix in PREFIXES]
    return torch.stack([chances[rows].sum() for rows in past])


# -------------------------------------------------------------------------------- exact gradients


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def true_gradient(logits: Tensor, values: Tensor) -> Tensor:
    """The gradient of the expectation of `values` (15,) of the outputs, which an unbiased estimator
    gives on average."""
    logits = logits.clone().requires_grad_()
    return gradient((probabilities(logits) * values).sum(), logits)


def kl_gradient(logits: Tensor, ref_logits: Tensor, sampler: Tensor, reverse: bool) -> Tensor:
    """The gradient of KL(pi || ref), or of KL(ref || pi), at each prefix, summed as often as
    `sampler` comes past the prefix."""
    logits = logits.clone().requires_grad_()
    policy, reference = logits.log_softmax(dim=1), ref_logits.log_softmax(dim=1)
    first, second = (policy, reference) if reverse else (reference, policy)
    per_prefix = (first.exp() * (first - second)).sum(dim=1)
    return gradient((prefix_probabilities(sampler) * per_prefix).sum(), logits)


def all_groups(size: int) -> list[tuple[list[int], int]]:
    """Every group of `size` outputs, and in how many orders it can be sampled."""

    def orders(group: tuple[int, ...]) -> int:
        return math.factorial(size) // math.prod(map(math.factorial, Counter(group).values()))

    groups = combinations_with_replacement(range(len(OUTPUTS)), size)
    return [(list(group), orders(group)) for group in groups]


def expected_gradient(
    logits: Tensor, rewards: Tensor, group_size: int, variant: str, scale: str | None = None
) -> Tensor:
    """The direction in which `policy_loss` moves the policy, (7, 3), averaged over every group that
    the policy can sample. One group is one optimizer step. `scale` stands in for the variant's
    own."""
    logits = logits.clone().requires_grad_()
    logps, chances = output_logps(logits), probabilities(logits).detach()
    how, expected = {"variant": variant, "max_tokens": LONGEST}, 0.0
    for group, orders in all_groups(group_size):
        advantages = group_advantages(rewards[group], group_size, scale or VARIANTS[variant].scale)
        loss, _ = policy_loss(logps[group], advantages, MASK[group], **how)
        expected = expected - orders * chances[group].prod() * loss
    return gradient(expected, logits)


def kl_term_gradient(
    logits: Tensor, reference: Tensor, sampler: Tensor, kl: str, variant: str = "dr_grpo"
) -> Tensor:
    """The average gradient of the term that beta weighs, (7, 3), over the outputs that `sampler`
    can say. A limit of one token makes dr_grpo's divisor 1, so that the term is a sum over tokens;
    grpo's divisor is |o_i|."""
    logits = logits.clone().requires_grad_()
    tensors = (output_logps(logits), output_logps(sampler), output_logps(reference), MASK)
    how, expected = {"variant": variant, "beta": 1.0, "kl": kl, "max_tokens": 1}, 0.0
    for chance, *one in zip(probabilities(sampler), *(x.split(1) for x in tensors)):
        logps, old_logps, ref_logps, mask = one
        past = {"old_logps": old_logps, "ref_logps": ref_logps}
        loss, _ = policy_loss(logps, torch.zeros(1), mask, **past, **how)
        expected = expected + chance * loss
    return gradient(expected, logits)


def weight_of_question(pass_rate: float, group_size: int, scale: str) -> float:
    """What the gradient of a question with right and wrong answers is multiplied by, on average
    over its groups. Each group has some number of right outputs, and `group_advantages` says what
    right and wrong outputs get."""
    weight, G = 0.0, group_size
    for right in range(1, G):
        wrong = G - right
        rewards = torch.tensor([1.0] * right + [0.0] * wrong, dtype=torch.float64)
        chance = math.comb(G, right) * pass_rate**right * (1 - pass_rate) ** wrong
        first, *_, last = group_advantages(rewards, G, scale).tolist()
        # A right output pulls along the gradient of the pass rate over the pass rate, and a wrong
        # output against it, over the rest.
        weight += chance * (right / G * first / pass_rate - wrong / G * last / (1 - pass_rate))
    return weight


# ---------------------------------------------------------------------------------- the questions


def angle(one: Tensor, other: Tensor) -> float:
    """In degrees, from 0 (the same direction) to 180 (the opposite one)."""
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine(one, other)))))


def cosine(one: Tensor, other: Tensor) -> float:
    return ((one * other).sum() / (one.norm() * other.norm())).item()


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the length of the second."""
    return ((one - other).norm() / other.norm()).item()


# "accuracy" asks for a b in the second place, "format" for the end mark: the sum is 0, 1 or 2.
REWARDS = [float(output[1:2] == "b") + float(output.endswith(".")) for output in OUTPUTS]
REWARDS = torch.tensor(REWARDS, dtype=torch.float64)


def print_deviation(group_size: int) -> None:
    print(
        """1. Does the standard deviation bias the gradient?

Right or wrong, one question: the direction stays, the size depends on the pass rate.
Groups of 8; what the question's gradient is multiplied by:
"""
    )
    rates = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    print(f"{'pass rate':>16}" + "".join(f"{rate:8.2f}" for rate in rates))
    for scale in ADVANTAGES:
        if scale == "batch":  # of one question, the batch is the group: "batch" is "std" here
            continue
        weights = [weight_of_question(rate, 8, scale) for rate in rates]
        print(f"{scale:>16}" + "".join(f"{weight:8.3f}" for weight in weights))
    logits = random_logits(0)
    graded = expected_gradient(logits, REWARDS, group_size, "reinforce", scale="std")
    degrees = angle(graded, true_gradient(logits, REWARDS))
    print(
        f"""
Yes, between questions: a question that is nearly always or nearly never solved weighs more. Where
rewards have grades, within a question too: by {degrees:.1f} degrees here (rewards 0, 1 and 2,
groups of {group_size}).
"""
    )


def print_variants(group_size: int) -> None:
    setting = f"Groups of {group_size}, all at ratio 1, against the true policy gradient."
    print(f"2. Does the length normaliser? {setting}\n")
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
angle: degrees between the expected gradient and the true one, with the variant's own advantages,
and with advantages that are less the mean only. size: the expected gradient's norm over the true
one's. cos(longer): cosine with the gradient of the expected length.

rloo is exact. reinforce is the truth times 1 - 1/G = {1 - 1 / group_size:.3f}. dr_grpo is this over
the limit of {LONGEST} tokens. A mean over tokens, of an output or of a step, turns the gradient.
Here, where short outputs earn more, it turns too far toward short ones.
"""
    )


def print_kl() -> None:
    print(
        """3. Which gradient does a KL estimator give when it stands in the loss? Its distance to
zero, to the forward KL's gradient and to the reverse KL's. Then its distance to the reverse KL's
where an older policy sampled, and where the loss is divided by |o_i|. All distances are relative
to the size of the reverse KL's gradient.
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
        best = divided * (divided * reverse).sum() / divided.pow(2).sum()  # any multiple would do
        print(f"{kind:10} {cells} {distance(best, reverse):13.3f}")
    print(
        """
k3, as published, gives the gradient of the forward KL. k2 gives the reverse KL's, and so does k3
times the ratio, off-policy too. k1 gives nothing on average. 1/|o_i| depends on what is sampled,
so it turns each of them: the last column is for the best multiple of the gradient."""
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
