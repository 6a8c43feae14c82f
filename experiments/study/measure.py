"""Measure how a run's base model and its R1-Zero differ, on many completions of few held-out
problems.

    python -m experiments.study.measure out/chains-cpu-grpo-seed0   # two minutes; RUN/measured.json

Each model's completions give pass@k, majority votes, lengths, styles, and how well the model checks
its own steps. Then a thought is opened for the model, and the model checks steps that were written
for it. Styles and checks are known for the tasks of chains alone, in all their languages.
"""

import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS
from data.chains import APPLY, Chains
from data.languages import LANGUAGES
from data.problem import Problem, stream
from kit.evaluate import Answers, grade, held_out_problems, majority_is_right, pass_at_k
from kit.flags import command_line, saved_config
from kit.run import set_up
from model import Transformer, write_whole
from rewards import accuracy_reward, extract_answer
from sample import decode_completions, generate, load_policy, tokenizer_of
from train import Config

OPENINGS = ("<think>", "<think>\n#1")  # beginnings of a completion, put behind the prompt
OPENED = 16  # completions of each problem and opening
ROWS = 1024  # completions sampled at once
PROBLEMS, SAMPLES = 40, 256  # problems of each level; completions of each problem
PARTS = {  # the factors of accuracy, and what a gain by each is
    "share": "by a better style",
    "right": "right more often within it",
    "counted": "tags around right answers",
}
OPERATORS = {word: sign for spoken in LANGUAGES.values() for sign, word in spoken.operators.items()}
EQUALS, RIGHT, WRONG = (
    "|".join({getattr(spoken, name) for spoken in LANGUAGES.values()})
    for name in ("equals", "right", "wrong")
)
STEP = re.compile(
    rf"#\d+ (\d+) ({'|'.join(OPERATORS)}) (\d+) (?:{EQUALS}) (\d+)"
    rf"(?: (?:({RIGHT})|({WRONG}) (\d+)))?"
)


# ------------------------------------------------------------------------ what a completion shows


def style_of(text: str) -> str:
    """The style of a completion: "checked" if it checks a step, "steps" if it has a step, else
    "glib"."""
    steps = STEP.findall(text)
    if any(right or wrong for *_, right, wrong, _ in steps):
        return "checked"
    return "steps" if steps else "glib"


def last_number(text: str) -> str | None:
    """The answer, read leniently: the last number of the text, in a tag or not."""
    return next(iter(re.findall("[0-9]+", text)[-1:]), None)


def checks(text: str) -> Counter:
    """Counts over the steps that a text checks: right and wrong steps, how many of each it calls
    wrong, and how many wrong steps it mends. A step is right if its result follows from the two
    numbers that it names."""
    counts = Counter()
    for total, word, operand, said, right, wrong, mended in STEP.findall(text):
        if right or wrong:  # the word of the check
            truth = max(0, APPLY[OPERATORS[word]](int(total), int(operand)))
            kind = "right" if int(said) == truth else "wrong"
            counts += Counter({kind: 1, f"{kind}, called wrong": int(bool(wrong))})
            counts["wrong, mended"] += kind == "wrong" and mended == str(truth)
    return counts


# --------------------------------------------------------------------------- what a model is like


def ask(
    config: Config, model: Transformer, problems: list[Problem], samples: int, opening: str = ""
) -> Answers:
    """`samples` completions of each problem at temperature 1. They begin with `opening`, which is
    put behind the prompt. The noise is the same for every model, and different for every
    problem."""
    answers, part, tokenizer = [], max(1, ROWS // samples), tokenizer_of(model)
    begun = tokenizer.encode(opening, tags=True)
    seed = stream(config.seed, "measure", samples).getrandbits(63)
    look = {"desc": "ask", "leave": False, "dynamic_ncols": True, "disable": None}
    for start in tqdm(range(0, len(problems), part), **look):
        asked = problems[start : start + part]
        rollout = generate(
            model,
            [tokenizer.encode(problem.prompt) + begun for problem in asked],
            group_size=samples,
            max_new_tokens=config.max_new_tokens - len(begun),
            eos_id=tokenizer.eos_id,
            seed=seed,
            first_row=start * samples,
        )
        texts = [opening + text for text in decode_completions(rollout, tokenizer)]
        answers += zip(texts, (rollout.ends - rollout.starts + len(begun)).tolist())
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def mean(values: list) -> float | None:
    """The mean, or None for no values: 0 would be a made-up number."""
    return float(np.mean(values)) if len(values) else None


Keys = list[list[str]]  # for each problem, the answers that count as right


def own(problems: list[Problem]) -> Keys:
    """Keys for accuracy: each problem's own answer."""
    return [[problem.answer] for problem in problems]


def of_others(problems: list[Problem]) -> Keys:
    """Keys for chance: the answers of the level's other problems, without the problem's own answer.
    The list is empty if a level has only one answer."""
    return [
        [x.answer for x in problems if x.level == p.level and x.answer != p.answer]
        for p in problems
    ]


def by_style(answers: Answers, keys: Keys) -> dict[str, dict]:
    """Three shares for each style.

    "share": the completions in this style, among all completions. "right": the right completions
    among these, by the answer tag or read leniently. "counted": the completions that the accuracy
    rule counts, among the right completions; the rule wants the tag. A completion is right to the
    share of its problem's keys that it gives. A problem without keys counts for "share" alone.
    """
    found = []
    for group, own_keys in zip(answers, keys):
        for text, _ in group:
            given, last = extract_answer(text), last_number(text)
            right = mean([key in (given, last) for key in own_keys])
            found.append((style_of(text), right, mean([key == given for key in own_keys])))
    table = {}
    for style in sorted({style for style, *_ in found}):
        of_style = [(right, counted) for each, right, counted in found if each == style]
        share = len(of_style) / len(found)
        known = [(right, counted) for right, counted in of_style if right is not None]
        right, counted = (sum(column) for column in zip(*known)) if known else (0, 0)
        table[style] = {
            "share": share,
            "right": right / len(known) if known else None,
            "counted": counted / right if right else None,
        }
    return table


def gain_parts(before: dict[str, dict], after: dict[str, dict]) -> dict[str, float]:
    """The part of each factor in the gain in accuracy. The parts add up to the gain.

    Accuracy is the sum over styles of share x right x counted. A factor's part is its Shapley value
    (Shapley 1953): change the three factors one by one, and take the mean over all orders of what
    the factor's change adds. If a model never uses a style, the other model's values stand in.
    """

    def value(style: str, name: str, new: bool) -> float:
        model, other = (after, before) if new else (before, after)
        if name == "share":
            return model.get(style, {}).get(name, 0.0)
        known = (each.get(style, {}).get(name) for each in (model, other))
        return next((x for x in known if x is not None), 0.0)

    def accuracy(changed: set[str]) -> float:
        styles = sorted({*before, *after})
        factors = ([value(style, name, name in changed) for name in PARTS] for style in styles)
        return sum(map(math.prod, factors))

    parts = dict.fromkeys(PARTS, 0.0)
    for order in itertools.permutations(PARTS):
        for i, name in enumerate(order):
            added = accuracy({*order[: i + 1]}) - accuracy({*order[:i]})
            parts[name] += added / math.factorial(len(PARTS))
    return parts


def lengths(problems: list[Problem], answers: Answers) -> dict[str, dict[str, float | None]]:
    """Mean tokens of a completion by level: over all completions, over right and wrong completions,
    and over completions in the style "steps"."""
    table = {}
    for level in sorted({problem.level for problem in problems}):
        rows = [
            (tokens, accuracy_reward(text, problem.answer) == 1, style_of(text) == "steps")
            for problem, group in zip(problems, answers)
            for text, tokens in group
            if problem.level == level
        ]
        table[str(level)] = {
            "all": mean([tokens for tokens, *_ in rows]),
            "right": mean([tokens for tokens, right, _ in rows if right]),
            "wrong": mean([tokens for tokens, right, _ in rows if not right]),
            "steps": mean([tokens for tokens, _, steps in rows if steps]),
        }
    return table


def votes(problems: list[Problem], answers: Answers, k: int) -> float:
    """maj@k: the share of groups of k completions whose most frequent answer is right."""
    return mean(
        [
            majority_is_right([extract_answer(text) for text, _ in group[i : i + k]], p)
            for p, group in zip(problems, answers)
            for i in range(0, len(group) - k + 1, k)
        ]
    )


def pass_at(problems: list[Problem], answers: Answers, keys: Keys) -> dict[str, dict]:
    """Unbiased pass@k by level, for k = 1, 2, 4 ... up to the number of samples. A problem's pass@k
    is the mean over its keys. None if no problem of the level has a key."""
    n, found = len(answers[0]), defaultdict(list)  # by level and problem, how often each key came
    for problem, group, own_keys in zip(problems, answers, keys):
        given = Counter(extract_answer(text) for text, _ in group)
        found[problem.level] += [[given[key] for key in own_keys]] if own_keys else []
    return {
        str(level): {
            str(k): mean([mean([pass_at_k(n, right, k) for right in counts]) for counts in asked])
            for k in (2**i for i in range(n.bit_length()))
        }
        for level, asked in sorted(found.items())
    }


@torch.no_grad()
def forced_checks(config: Config, model: Transformer, problems: list[Problem]) -> dict[str, float]:
    """How a model checks the second of two steps that were written for it. The first step is right
    and checked. Uses the English problems of two operations or more.

    Mean probabilities, for right and for wrong second steps: "checked", that the model checks the
    step; "called wrong", that it calls the step wrong, given that it checks. "mended": that it
    names the right number, given that it called a wrong step wrong.
    """
    tokenizer, spoken = tokenizer_of(model), LANGUAGES["en"]
    right_id, wrong_id = (tokenizer.encode(f" {word}")[0] for word in (spoken.right, spoken.wrong))
    kinds = [
        f"{kind}, {what}" for kind in ("right", "wrong") for what in ("checked", "called wrong")
    ]
    found = {name: [] for name in (*kinds, "mended")}
    for problem in (
        problem for problem in problems if problem.language == "en" and problem.level > 1
    ):
        first, sign, operand, next_sign, next_operand = problem.expression.split(" ")[:5]
        total = APPLY[sign](int(first), int(operand))
        truth = APPLY[next_sign](total, int(next_operand))
        step = f"#1 {first} {spoken.operators[sign]} {operand} is {total} ok"
        begun = f"<think>\n{step}\n#2 {total} {spoken.operators[next_sign]} {next_operand} is"
        for said in range(max(0, truth - 2), truth + 3):  # a slip in the corpus is 1 or 2 off
            kind = "right" if said == truth else "wrong"
            text = tokenizer.encode(f"{begun} {said}", tags=True)
            tokens = tokenizer.encode(problem.prompt) + text
            after = torch.tensor([[*tokens, wrong_id]], device=config.device)
            named, following = model(after, first=len(tokens) - 1)[0].softmax(-1)
            right, wrong = named[right_id].item(), named[wrong_id].item()
            found[f"{kind}, checked"].append(right + wrong)
            found[f"{kind}, called wrong"].append(wrong / (right + wrong))
            if kind == "wrong":
                found["mended"].append(following[tokenizer.encode(f" {truth}")[0]].item())
    return {name: mean(values) for name, values in found.items()}


def describe(problems: list[Problem], answers: Answers, hardest: int) -> dict[str, dict]:
    """All measurements of completions. The levels up to `hardest` were trained on. Harder levels
    count for pass@k and lengths alone, and the first of them also for styles."""

    def only(belongs: Callable[[int], bool]) -> tuple[list[Problem], Answers]:
        rows = [(p, group) for p, group in zip(problems, answers) if belongs(p.level)]
        return [p for p, _ in rows], [group for _, group in rows]

    asked, said = only(lambda level: level <= hardest)
    harder, tried = only(lambda level: level == hardest + 1)
    everything = [(p, text) for p, group in zip(asked, said) for text, _ in group]
    return {
        "pass@1": mean(grade(asked, said)),
        "lenient": mean([last_number(text) == p.answer for p, text in everything]),
        "votes": {str(k): votes(asked, said, k) for k in (1, 16, 64) if k <= len(said[0])},
        "pass@k": pass_at(problems, answers, own(problems)),
        "pass@k by chance": pass_at(problems, answers, of_others(problems)),
        "styles": by_style(said, own(asked)),
        "styles, one operation more": by_style(tried, own(harder)),
        "the same by chance": by_style(tried, of_others(harder)),
        "lengths": lengths(problems, answers),
        "checks": {
            **sum((checks(text) for _, text in everything), Counter()),
            "completions": len(everything),
        },
    }


def examine(
    config: Config, model: Transformer, problems: list[Problem], samples: int
) -> dict[str, dict]:
    """All measurements of one model: of its own completions, of completions after an opening, and
    of its checks of steps that were written for it."""
    hardest = config.levels[-1]
    asked = [problem for problem in problems if problem.level <= hardest]
    return {
        **describe(problems, ask(config, model, problems, samples), hardest),
        "opened": {
            opening: mean(grade(asked, ask(config, model, asked, OPENED, opening)))
            for opening in OPENINGS
        },
        "forced checks": forced_checks(config, model, asked),
    }


# ------------------------------------------------------------------------------------ the command


def finished_run(folder: Path) -> Config:
    """The configuration of a run that has ended. Raises ValueError, in one line, if the folder
    holds no such run."""
    if not (folder / "result.json").is_file():
        reason = "is not the folder of a run that has ended: it holds no result.json"
        raise ValueError(f"{folder} {reason}")
    return saved_config(Config, {"resume": str(folder)})


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run that has ended")
    text = f"held-out problems of each level [{PROBLEMS}]"
    add("--problems", type=int, default=PROBLEMS, help=text)
    add("--samples", type=int, default=SAMPLES, help=f"completions of each problem [{SAMPLES}]")
    flags = parser.parse_args(arguments)
    try:
        if flags.problems < 1 or flags.samples < 16:
            raise ValueError("--problems must be at least 1 and --samples at least 16")
        config = finished_run(flags.run)
        if not isinstance(TASKS[config.task], Chains):
            reason = f"its task is {config.task}, and only tasks of chains can be measured"
            raise ValueError(f"{flags.run}: {reason}")
        set_up(config)
        models = {
            name: load_policy(flags.run / f"{name}.pt", config.device)
            for name in ("base", "r1_zero")
        }
    except ValueError as error:
        parser.error(str(error))
    problems, levels = [], config.levels
    # No problem of level 1 is held out.
    for level in range(max(2, levels[0]), levels[-1] + TASKS[config.task].beyond + 1):
        purpose = f"measure {level}"
        problems += held_out_problems(config.task, [level], flags.problems, config.seed, purpose)
    measured = {}
    for name, model in models.items():
        model.in_bfloat16 = config.in_bfloat16
        measured[name] = examine(config, model, problems, flags.samples)
    parts = gain_parts(measured["base"]["styles"], measured["r1_zero"]["styles"])
    result = {"problems": flags.problems, "samples": flags.samples, **measured, "gain": parts}
    whole = (flags.problems, flags.samples) == (PROBLEMS, SAMPLES)
    size = "" if whole else f"_{flags.problems}x{flags.samples}"
    path = flags.run / f"measured{size}.json"  # a smaller measurement gets another name
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    print(summary(result), f"-> {path}", sep="\n")


def summary(result: dict) -> str:
    """The main numbers, in words."""
    lines = []
    for name in ("base", "r1_zero"):
        found = result[name]
        opened = ", ".join(f"{right:.1%} after {text!r}" for text, right in found["opened"].items())
        styles = ", ".join(
            f"{style} {each['share']:.1%}" for style, each in found["styles"].items()
        )
        right = f"pass@1 {found['pass@1']:.1%}, read leniently {found['lenient']:.1%}"
        lines.append(f"{name}: {right}, {opened}; {styles}")
    parts = (f"{100 * result['gain'][name]:+.1f} {text}" for name, text in PARTS.items())
    return "\n".join([*lines, f"the gain, in points: {', '.join(parts)}"])


if __name__ == "__main__":
    main(sys.argv[1:])
