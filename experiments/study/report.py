"""The README's tables of phenomena, levers and the hacked reward, from the JSON of study.py.

    python -m experiments.study.report     # writes them again from experiments/results

A row of the phenomena has a claim of the papers, the numbers found here, and the numbers of
controls to hold against them. It ends with the number of seeds that show the claim; the row's
`seen` decides this from the runs. If a row compares shares, `Share.clear` says if the margin is
enough.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.study.collect import RESULTS, at, grid, made_on, write_into_page
from experiments.study.measure import OPENED
from experiments.watch.diagnose import ends

BASE, R1 = "base", "r1_zero"
WHOLE, SAMPLES = 500, 16  # held-out problems of an evaluation, and completions of each
FEWER = 200  # held-out problems of an evaluation, for runs of which the study has many
Seed = dict  # all results of one seed, from study.phenomena_of
Number = Callable[[Seed], float | None]  # None if there is nothing to count


def beyond(model: str, above: int, k: int, what: str = "pass@k") -> Number:
    """pass@k at a level that is `above` the hardest trained level."""
    return lambda seed: seed["measured"][model][what][str(highest(seed) + above)][str(k)]


def levels(seed: Seed) -> list[int]:
    """The trained levels that are measured. Level 1 is not, as no problem of it is held out."""
    return sorted(map(int, seed[BASE]["by_level"]))


def highest(seed: Seed) -> int:
    return levels(seed)[-1]


def lowest(seed: Seed) -> int:
    return levels(seed)[0]


def one_more(seed: Seed) -> int:
    return highest(seed) + 1


def at_level(model: str, level: Number) -> Number:
    """pass@1 at one of the trained levels."""
    return lambda seed: seed[model]["by_level"][str(level(seed))]


def slope(model: str, kind: str = "all") -> Number:
    """The tokens that one more operation adds to a completion of this kind: the slope of a least
    squares fit over the trained levels."""

    def number(seed: Seed) -> float | None:
        lengths = seed["measured"][model]["lengths"]
        points = [(level, lengths[str(level)][kind]) for level in levels(seed)]
        if any(tokens is None for _, tokens in points):
            return None
        x, y = (sum(values) / len(points) for values in zip(*points))
        return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)

    return number


def last(name: str, *run: str) -> Number:
    """The mean of a field over the last tenth of the log lines that have it."""
    return lambda seed: ends(at(*run, "log")(seed), name)[1]


def first(name: str, *run: str) -> Number:
    """The mean of a field over the first tenth of the log lines that have it."""
    return lambda seed: ends(at(*run, "log")(seed), name)[0]


@dataclass(frozen=True)
class Share:
    """A measured share, or a difference of shares, and the variance of its error."""

    value: float
    variance: float = 0.0

    def __sub__(self, other: "Share") -> "Share":
        return Share(self.value - other.value, self.variance + other.variance)

    def __mul__(self, factor: float) -> "Share":
        return Share(self.value * factor, self.variance * factor**2)

    @property
    def clear(self) -> bool:
        """Whether the share is above 0 by more than twice its standard error. A seed shows a row
        that compares shares only if the difference is clear.

        The variance is binomial, p (1 - p) / n. One hit and one miss are added to p, so shares of 0
        and 1 have an error too. For a share of completions, `n` counts completions, as if they were
        independent. Completions of one problem are not. But by the pass@1 and pass@2 of
        measured.json, this adds at most a tenth to the variance with 16 completions a problem. For
        pass@k and votes, which take all completions of a problem, `n` counts problems. Two shares
        count as independent, although both models answer the same problems.
        """
        return self.value > 2 * math.sqrt(self.variance)


def share_of(value: float, n: float) -> Share:
    """A share measured on n completions or problems."""
    p = (value * n + 1) / (n + 2)
    return Share(value, p * (1 - p) / n)


def evaluated(run: str) -> int:
    """The number of completions in the evaluation of a run, as study.py plans it."""
    whole = run in ("main", "rejection sampling", "online rejection sampling")
    return (WHOLE if whole else FEWER) * SAMPLES


def completions(seed: Seed) -> int:
    """The number of completions on trained levels in measured.json."""
    return problems(seed) * len(levels(seed)) * seed["measured"]["samples"]


def problems(seed: Seed) -> int:
    """The number of problems of each level in measured.json."""
    return seed["measured"]["problems"]


def beats(one: Number, other: Number, n: Number) -> Callable[[Seed], bool]:
    """Whether one share is clearly above another, both measured on `n`. False if a share is
    unknown."""

    def seen(seed: Seed) -> bool:
        pair = one(seed), other(seed)
        return None not in pair and (share_of(pair[0], n(seed)) - share_of(pair[1], n(seed))).clear

    return seen


def crossing(above: int) -> Number:
    """The least k from which on the base model stays clearly ahead, at a level that is `above` the
    hardest trained level. Infinity if there is none."""

    def number(seed: Seed) -> float:
        ks = map(int, seed["measured"][BASE]["pass@k"][str(highest(seed) + above)])
        least = math.inf
        for k in sorted(ks, reverse=True):
            if not beats(beyond(BASE, above, k), beyond(R1, above, k), problems)(seed):
                break
            least = k
        return least

    return number


def own_checks(what: str, among: str) -> Number:
    """The base model's checks of the kind `what`, as a share of its checks of the kind `among`."""

    def number(seed: Seed) -> float | None:
        found = seed["measured"][BASE]["checks"]
        return found.get(what, 0) / found[among] if among in found else None

    return number


def in_style(name: str, model: str, what: str, style: str) -> Number:
    """A share of the completions of a style, from measure.by_style."""
    return lambda seed: seed["measured"][model][what].get(style, {}).get(name)


def share(model: str, style: str) -> Number:
    """The share of a model's completions that have this style."""
    return lambda seed: in_style("share", model, "styles", style)(seed) or 0.0


def helped(seed: Seed) -> list[Share]:
    """The base model's shares of right answers with help: read leniently, or with an opened
    thought."""
    base, opened = seed["measured"][BASE], problems(seed) * len(levels(seed)) * OPENED
    lenient = share_of(base["lenient"], completions(seed))
    return [lenient, *(share_of(value, opened) for value in base["opened"].values())]


def thinks(run: str, model: str, language: str) -> Number:
    """The share of the Korean questions that are thought through in a language."""
    return at(run, model, "thinking", f"ko_thinks_in_{language}")


def right_in_korean(run: str) -> Number:
    return at(run, R1, "by_language", "ko")


def in_korean(run: str, number: Number, seed: Seed) -> Share:
    """A share of a run's completions of Korean questions, which are half of all questions."""
    return share_of(number(seed), evaluated(run) / 2)


class Spread:
    """The values of a number over the seeds. Its format is the mean and, if the values differ, the
    range. The spec `%` gives percent, `d` gives the range alone as whole numbers, and other specs
    are as for a float."""

    def __init__(self, values: list[float | None]):
        self.values = values

    def __format__(self, spec: str) -> str:
        if any(value is None for value in self.values):
            return "-"
        scale, spec, unit = (100, ".1f", " %") if spec == "%" else (1, spec, "")
        if spec == "d":
            bounds = sorted({min(self.values), max(self.values)})
            return "-".join("never" if value == math.inf else str(value) for value in bounds)
        mean = sum(self.values) / len(self.values)
        low, high, mean = (
            format(scale * value, spec) for value in (min(self.values), max(self.values), mean)
        )
        return mean + unit + (f" ({low}-{high})" if low != high else "")


@dataclass(frozen=True)
class Row:
    """A row of the table. `here` and `against` are templates: together they have a field for each
    of `numbers`, in this order. `seen` says whether a seed shows the claim."""

    what: str
    papers: str
    here: str
    against: str
    numbers: tuple[Number, ...]
    seen: Callable[[Seed], bool]


CHANCE = "pass@k by chance"
CONTROLS = ("longer", "rejection sampling", "online rejection sampling")


def millions(what: str) -> Number:
    return lambda seed: seed["tokens"][what] / 1e6


def kl_of_a_completion(seed: Seed) -> float:
    """KL(R1-Zero, base) of a whole completion, in nats."""
    return last("base_kl")(seed) * seed[R1]["completion_tokens"]


def least_kl(seed: Seed) -> float | None:
    """The least KL to the base model, in nats, of a policy that is always right by the accuracy
    rule: -ln of the base model's share of right completions, in any style."""
    right = seed["measured"][BASE]["pass@1"]
    return -math.log(right) if right else None


def least_kl_in_steps(seed: Seed) -> float | None:
    """The least KL to the base model of a policy that is always right, and always in steps."""
    factors = ("share", "right", "counted")
    right = math.prod(in_style(name, BASE, "styles", "steps")(seed) or 0 for name in factors)
    return -math.log(right) if right else None


def goes_no_further(seed: Seed) -> bool:
    """Whether the KL is at most `least_kl` plus twice the standard error of `least_kl`."""
    least = least_kl(seed)
    if least is None:
        return False
    right = share_of(seed["measured"][BASE]["pass@1"], completions(seed))
    error = math.sqrt(right.variance) / right.value  # the error of ln p is the error of p over p
    return kl_of_a_completion(seed) <= least + 2 * error


def gain_at(seed: Seed, level: Number) -> Share:
    """The gain in pass@1 at a level by GRPO."""
    n = evaluated("main") / len(levels(seed))
    before, after = (share_of(at_level(model, level)(seed), n) for model in (BASE, R1))
    return after - before


ROWS = (
    Row(
        "right answers at temperature 1 (pass@1) rise",
        "15.6 -> 77.9 % (R1-Zero, AIME)",
        "{:%} -> {:%}; greedy {:%} -> {:%}",
        "the base read leniently, tags or no tags: {:%}; "
        "its thought opened for it, up to `#1`: {:%}",
        (
            at(BASE, "pass@1"),
            at(R1, "pass@1"),
            at(BASE, "greedy"),
            at(R1, "greedy"),
            at("measured", BASE, "lenient"),
            at("measured", BASE, "opened", "<think>\n#1"),
        ),
        lambda seed: all(
            (share_of(seed[R1]["pass@1"], evaluated("main")) - base).clear for base in helped(seed)
        ),
    ),
    Row(
        "the majority of 16 is better still",
        "86.7 %",
        "{:%} -> {:%}",
        "pass@1 of the same completions: {:%} -> {:%}",
        (
            at("measured", BASE, "votes", "16"),
            at("measured", R1, "votes", "16"),
            at("measured", BASE, "pass@1"),
            at("measured", R1, "pass@1"),
        ),
        lambda seed: (
            (
                share_of(seed["measured"][R1]["votes"]["16"], problems(seed) * len(levels(seed)))
                - share_of(seed["measured"][R1]["pass@1"], completions(seed))
            ).clear
        ),
    ),
    Row(
        "hard problems gain more than easy ones",
        "MATH level 5: 55 -> 90 %, level 4: 78 -> 95 %",
        "level {:d}: {:%} -> {:%}; level {:d}: {:%} -> {:%}",
        "level {:d}, beyond the trained ones: {:%} -> {:%}",
        (
            lowest,
            at_level(BASE, lowest),
            at_level(R1, lowest),
            highest,
            at_level(BASE, highest),
            at_level(R1, highest),
            one_more,
            beyond(BASE, 1, 1),
            beyond(R1, 1, 1),
        ),
        lambda seed: (gain_at(seed, highest) - gain_at(seed, lowest)).clear,
    ),
    Row(
        "GRPO is worth more than its tokens spent otherwise",
        "GRPO > online RFT > RFT (DeepSeekMath)",
        "{:%}, for {:.2f} million tokens sampled and read",
        "pretraining, {:.2f} million more: {:%}; rejection sampling, {:.2f}: {:%}; "
        "the same online, {:.2f}: {:%}",
        (
            at(R1, "pass@1"),
            millions("GRPO"),
            millions("longer"),
            at("longer", "pass@1"),
            millions("rejection sampling"),
            at("rejection sampling", "pass@1"),
            millions("online rejection sampling"),
            at("online rejection sampling", "pass@1"),
        ),
        lambda seed: all(
            (
                share_of(seed[R1]["pass@1"], evaluated("main"))
                - share_of(seed[name]["pass@1"], evaluated(name))
            ).clear
            for name in CONTROLS
        ),
    ),
    Row(
        "more than half of the gain is a better style",
        "-",
        "of {:.1f} points: better style {:.1f}, right more often in a style {:.1f}, "
        "tags around right answers {:.1f}",
        "completions in steps: {:%} -> {:%}; right among these: {:%} -> {:%}",
        (
            lambda seed: 100 * sum(seed["measured"]["gain"].values()),
            *(
                lambda seed, part=part: 100 * seed["measured"]["gain"][part]
                for part in ("share", "right", "counted")
            ),
            share(BASE, "steps"),
            share(R1, "steps"),
            in_style("right", BASE, "styles", "steps"),
            in_style("right", R1, "styles", "steps"),
        ),
        lambda seed: seed["measured"]["gain"]["share"] > sum(seed["measured"]["gain"].values()) / 2,
    ),
    Row(
        "it goes no further from the base than being right takes, in whatever style",
        "-",
        "KL(R1-Zero, base) of a completion: {:.2f} nats, compared with the least by which all "
        "could be right: {:.2f} (-ln of the base's share of right completions)",
        "the least by which all could be right and in steps: {:.2f}",
        (kl_of_a_completion, least_kl, least_kl_in_steps),
        goes_no_further,
    ),
    Row(
        "pass@k: the base overtakes at large k",
        "at k of tens to hundreds (Yue et al.)",
        "level {:d}, the hardest trained one, k = 16: base {:%}, R1-Zero {:%}",
        "the base is ahead from k on: {:d}",
        (highest, beyond(BASE, 0, 16), beyond(R1, 0, 16), crossing(0)),
        lambda seed: crossing(0)(seed) < math.inf,
    ),
    Row(
        "beyond what was trained on, the base solves more",
        "RL narrows (Yue et al.)",
        "level {:d}, k = 16: base {:%} (by chance {:%}), R1-Zero {:%} (by chance {:%})",
        "right of the base's direct answers: {:%} (by chance {:%}); "
        "of its steps: {:%} (by chance {:%})",
        (
            one_more,
            beyond(BASE, 1, 16),
            beyond(BASE, 1, 16, CHANCE),
            beyond(R1, 1, 16),
            beyond(R1, 1, 16, CHANCE),
            in_style("right", BASE, "styles, one operation more", "glib"),
            in_style("right", BASE, "the same by chance", "glib"),
            in_style("right", BASE, "styles, one operation more", "steps"),
            in_style("right", BASE, "the same by chance", "steps"),
        ),
        lambda seed: all(
            beats(beyond(BASE, 1, 16), other, problems)(seed)
            for other in (beyond(R1, 1, 16), beyond(BASE, 1, 16, CHANCE))
        ),
    ),
    Row(
        "completions grow longer",
        "hundreds -> thousands of tokens",
        "{:.1f} -> {:.1f} tokens",
        "Dr. GRPO's loss, which favours no length: {:.1f}; "
        "wrong answers at the end: {:.1f}, by Dr. GRPO's {:.1f}",
        (
            at(BASE, "completion_tokens"),
            at(R1, "completion_tokens"),
            at("dr_grpo", R1, "completion_tokens"),
            last("wrong_tokens"),
            last("wrong_tokens", "dr_grpo"),
        ),
        lambda seed: (
            seed["dr_grpo"][R1]["completion_tokens"] > 1.5 * seed[BASE]["completion_tokens"]
        ),
    ),
    Row(
        "harder problems are thought about longer",
        "< 7,000 to > 18,000 tokens (R1)",
        "{:.1f} -> {:.1f} tokens for each operation more",
        "within thoughts in steps alone the base has {:.1f}",
        (slope(BASE), slope(R1), slope(BASE, "steps")),
        lambda seed: slope(R1)(seed) > 2 * slope(BASE)(seed),
    ),
    Row(
        "self-checks become frequent",
        "reflective words 5 to 7 times as many",
        "{:%} -> {:%} of the completions check a step",
        "base: calls {:%} of its wrong steps wrong (mends {:%} of these), {:%} of its right ones; "
        "of given {:%}, {:%}",
        (
            share(BASE, "checked"),
            share(R1, "checked"),
            own_checks("wrong, called wrong", "wrong"),
            own_checks("wrong, mended", "wrong, called wrong"),
            own_checks("right, called wrong", "right"),
            at("measured", BASE, "forced checks", "wrong, called wrong"),
            at("measured", BASE, "forced checks", "right, called wrong"),
        ),
        lambda seed: (
            (
                share_of(share(R1, "checked")(seed), completions(seed))
                - share_of(share(BASE, "checked")(seed), completions(seed)) * 1.5
            ).clear
        ),
    ),
    Row(
        "the language of the thought drifts",
        "R1-Zero mixes languages",
        "Korean questions thought through in English: {:%} -> {:%}",
        "with the language reward: {:%}",
        (
            thinks("language", BASE, "en"),
            thinks("language", R1, "en"),
            thinks("language_reward", R1, "en"),
        ),
        lambda seed: (in_korean("language", thinks("language", R1, "en"), seed) - Share(0.5)).clear,
    ),
    Row(
        "the language reward costs accuracy",
        '"slight"; 5 to 10 points at 3B (Cross-lingual collapse)',
        "right answers to Korean questions: {:%} with it",
        "without: {:%}",
        (right_in_korean("language_reward"), right_in_korean("language")),
        lambda seed: (
            (
                in_korean("language", right_in_korean("language"), seed)
                - in_korean("language_reward", right_in_korean("language_reward"), seed)
            ).clear
        ),
    ),
    Row(
        "entropy falls",
        "73 % of it in a twelfth of the run (Cui et al.)",
        "{:.3f} -> {:.3f} nats a token",
        "groups without signal: {:%} -> {:%}; KL to the base at the end: {:.3f} nats a token",
        (first("entropy"), last("entropy"), first("no_signal"), last("no_signal"), last("base_kl")),
        lambda seed: last("entropy")(seed) < first("entropy")(seed) / 2,
    ),
)


def phenomena_table(results: dict) -> str:
    seeds, rows = results["seeds"], []
    for row in ROWS:
        numbers = [Spread([number(seed) for seed in seeds]) for number in row.numbers]
        cut = row.here.count("{")
        here, against = row.here.format(*numbers[:cut]), row.against.format(*numbers[cut:])
        count = sum(bool(row.seen(seed)) for seed in seeds)
        rows.append([row.what, row.papers, here, against, f"{count} of {len(seeds)}"])
    head = ["the papers say", "number", "here", "held against it", "seen in"]
    return grid(head, rows, made_with(results))


LEVER_COLUMNS = {  # for each head, the number below it and the number's format
    "held out, step 20": ("held out, step 20", "%"),
    "pass@1 at the end": ("pass@1", "%"),
    "one operation more": ("beyond", "%"),
    "tokens": ("completion_tokens", ".1f"),
    "KL to the base": ("base_kl", ".3f"),
    "silent groups": ("silent", "%"),
    "completions": ("completions", ",.0f"),
}


def levers_table(results: dict) -> str:
    rows = []
    for lever in results["levers"]:
        how = " ".join(f"`{words}`" for words in (lever["variation"], lever["flags"]) if words)
        cells = [
            format(Spread([seed[name] for seed in lever["seeds"]]), spec)
            for name, spec in LEVER_COLUMNS.values()
        ]
        rows.append([lever["label"], how, *cells])
    return grid(["lever", "flags", *LEVER_COLUMNS], rows, made_with(results))


def hacked_table(results: dict) -> str:
    rows = []
    for lever in results["rewards"]:
        seeds = lever["seeds"]
        reward, accuracy = (
            " -> ".join(format(Spread(end), spec) for end in zip(*(seed[name] for seed in seeds)))
            for name, spec in (("reward", ".2f"), ("accuracy", "%"))
        )
        right = Spread([seed["pass@1"] for seed in seeds])
        tokens = Spread([seed["completion_tokens"] for seed in seeds])
        found = Counter(name for seed in seeds for name in seed["diagnose"])
        complaints = [f"{name} ({count} of {len(seeds)})" for name, count in found.items()]
        said = ", ".join(complaints) or "nothing"
        rows.append([lever["label"], reward, accuracy, f"{right:%}", f"{tokens:.1f}", said])
    head = ["rewarded for", "reward in training", "accuracy in training"]
    head += ["pass@1", "tokens", "diagnose.py finds"]
    return grid(head, rows, made_with(results))


def made_with(results: dict) -> str:
    """The line below a table: command, seeds, hardware and torch."""
    spread = f"{results['spread']}: mean (lowest-highest)"
    return f"`{results['command']}`, {spread}. {made_on(results)}"


TABLES = {"phenomena": phenomena_table, "levers": levers_table, "hacked": hacked_table}


def main(folder: Path = RESULTS) -> None:
    """Print the tables of all results in a folder. The tables of experiments/results also go into
    the README."""
    for name, table in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            text = table(json.loads(path.read_text()))
            print(f"\n{text}")
            if folder == RESULTS:
                write_into_page(f"{name}: made by experiments/study/report.py", text)


if __name__ == "__main__":
    main()
