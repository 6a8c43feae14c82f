"""Five exercises, and whether they are solved. The page experiments/lessons/README.md sets them.

    python -m experiments.lessons.exercises 1    # is the first one solved?
    python -m experiments.lessons.exercises      # which are?

The status is 0 if all that were asked are solved, else 1.
"""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from data import TASKS, check_task
from data.corpus import check_room, check_words
from data.problem import Problem, sample_problems, stream
from grpo import ADVANTAGES, KL_ESTIMATORS, VARIANTS, group_advantages, policy_loss
from kit.flags import command_line
from rewards import RULES, extract_answer


class NotYet(Exception):
    """What is still missing or wrong, in one line."""


def row_of(table: dict, name: str, where: str):
    """A row that the exercise asks for."""
    if name not in table:
        raise NotYet(f'{where} has no row "{name}" yet')
    return table[name]


# --------------------------------------------------------------------------------------- 1 the clip


def slopes(variant: str, ratio: float, advantage: float) -> float:
    """The gradient of the objective of one token with respect to its log-probability."""
    logps = torch.tensor([[0.0, math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True]])
    given = torch.tensor([advantage], dtype=torch.float64)
    loss, _ = policy_loss(logps, given, mask, old_logps=torch.zeros_like(logps), variant=variant)
    return 0.0 - torch.autograd.grad(loss, logps)[0][0, 1].item()


def one_sided() -> None:
    """A token that pays may become as likely as it will; one that does not still stops at 0.8."""
    row_of(VARIANTS, "one_sided", "grpo.VARIANTS")
    for ratio in (1.1, 1.3, 3.0):
        if not math.isclose(slopes("one_sided", ratio, 1.0), ratio):
            raise NotYet(f"at ratio {ratio} and advantage 1 the gradient must be {ratio}: no clip")
    for ratio, advantage in ((0.5, -1.0), (0.7, -1.0), (0.9, -1.0), (0.5, 1.0), (1.5, -1.0)):
        found, wanted = (slopes(name, ratio, advantage) for name in ("one_sided", "grpo"))
        if not math.isclose(found, wanted):
            reason = f"at ratio {ratio} and advantage {advantage:g} the gradient must be grpo's"
            raise NotYet(f"{reason}, {wanted:g}, not {found:g}")


# ----------------------------------------------------------------------------------- 2 the baseline


def median() -> None:
    """The median of the group as the baseline, and no division."""
    row_of(ADVANTAGES, "median", "grpo.ADVANTAGES")
    for rewards in ([0, 0, 0, 0, 2], [1, 1, 1, 0, 2], [0, 1, 2, 1], [0, 0, 1, 2], [0, 1]):
        *_, low, high = sorted(rewards)[: len(rewards) // 2 + 1]
        middle = high if len(rewards) % 2 else (low + high) / 2
        given = torch.tensor(rewards, dtype=torch.float64)
        found = group_advantages(given, len(rewards), "median").tolist()
        wanted = [reward - middle for reward in rewards]
        if not all(map(math.isclose, found, wanted)):
            raise NotYet(f"the rewards {rewards} must have the advantages {wanted}, not {found}")
    used = [name for name, row in VARIANTS.items() if row.scale == "median"]
    if not used:
        raise NotYet('no row of grpo.VARIANTS uses it yet: add one with scale="median"')


# ------------------------------------------------------------------------------------- 3 the reward


def brief() -> None:
    """Pays for few words, and only where the answer is right."""
    rule = row_of(RULES, "brief", "rewards.RULES")
    (problem,) = sample_problems(stream(0, "exercise"), TASKS["chains"], [2], 1)
    thoughts = [" word" * count for count in (0, 1, 4, 16, 64, 1000)]
    said = [f"<think>{x}</think><answer> {problem.answer}</answer>" for x in thoughts]
    paid = [rule(text, problem) for text in said]
    if not all(0 <= x <= 1 for x in paid) or not paid == sorted(paid, reverse=True):
        raise NotYet(f"longer thoughts must earn no more, and all from 0 to 1, not {paid}")
    if not paid[1] > paid[3] > paid[5]:
        raise NotYet(f"1 word must earn more than 16, and 16 more than 1000, not {paid[1::2]}")
    for text in (said[1].replace(problem.answer, "no"), "", "<think>", problem.answer):
        if rule(text, problem):
            raise NotYet(f"{text!r} is no right answer and must earn 0: else silence pays")


# ----------------------------------------------------------------------------------------- 4 the KL


def gradient_of(row: Callable, old: Tensor, ref: Tensor, logits: Tensor) -> Tensor:
    """The expected gradient of an estimator over the tokens of an older policy."""
    logits = logits.clone().requires_grad_()
    logps = logits.log_softmax(dim=0)
    expected = (old.exp() * row(ref - logps, (logps - old).exp())).sum()
    return torch.autograd.grad(expected, logits)[0]


def reverse_kl(old: Tensor, ref: Tensor, logits: Tensor) -> Tensor:
    """The gradient of KL(pi || ref)."""
    logits = logits.clone().requires_grad_()
    logps = logits.log_softmax(dim=0)
    return torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits)[0]


def k2_off_policy() -> None:
    """k2, whose expected gradient is the reverse KL's for tokens of an older policy too."""
    row = row_of(KL_ESTIMATORS, "k2_old", "grpo.KL_ESTIMATORS")
    noise = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = torch.randn(3, 5, generator=noise, dtype=torch.float64)
        old, ref, logits = drawn[0].log_softmax(0), drawn[1].log_softmax(0), drawn[2]
        wanted, found = reverse_kl(old, ref, logits), gradient_of(row, old, ref, logits)
        if not torch.allclose(found, wanted):
            off = ((found - wanted).norm() / wanted.norm()).item()
            raise NotYet(
                f"off-policy its expected gradient is {off:.0%} away from the reverse KL's"
            )
    logps = torch.randn(5, generator=noise, dtype=torch.float64)
    if not torch.allclose(row(logps, torch.ones_like(logps)), logps**2 / 2):
        raise NotYet("where the ratio is 1, its value must be k2's")


# --------------------------------------------------------------------------------------- 5 the task


def asked(name: str, held_out: bool = False) -> list[Problem]:
    """Problems of a row of TASKS."""
    task, (least, most) = TASKS[name], TASKS[name].levels
    levels = [level for level in range(least, most + 1) if level not in task.apart]
    return sample_problems(stream(0, f"{held_out}"), task, levels, 200, held_out=held_out)


def own_task() -> None:
    """A row "mine" that asks what no other row asks, and knows what is right."""
    task = row_of(TASKS, "mine", "data.TASKS")
    if task.name != "mine":
        raise NotYet(f'the row "mine" must have this as its name, not "{task.name}"')
    try:
        check_task("mine")
        least, most = task.levels
        check_room("mine", most, most + task.beyond, task.max_seq_len, task.max_new_tokens)
        check_words("mine", range(least, most + 1), task.max_seq_len)
        task.parse(task.example)
    except ValueError as error:
        raise NotYet(str(error)) from None
    problems, held_out = asked("mine"), asked("mine", held_out=True)
    prompts = {problem.prompt for problem in problems}
    for other in TASKS:
        if other != "mine" and prompts & {problem.prompt for problem in asked(other)}:
            raise NotYet(f"it asks what {other} asks already")
    if shared := prompts & {problem.prompt for problem in held_out}:
        raise NotYet(f"{min(shared)!r} is both a training and a held-out problem")
    for problem in problems:
        if not task.is_right(problem, problem.answer) or task.is_right(problem, ""):
            raise NotYet(f"of {problem.prompt!r}, its answer must be right and an empty one not")
    rng, levels = stream(0, "documents"), range(least, most + 1)
    documents = [task.document(rng, levels, task.max_seq_len) for _ in range(500)]
    if not any(extract_answer(written.text) for written in documents):
        raise NotYet("none of 500 documents answers in the tags: a policy would never earn a point")


# -------------------------------------------------------------------------------------- the command

EXERCISES: dict[int, Callable[[], None]] = {
    1: one_sided,
    2: median,
    3: brief,
    4: k2_off_policy,
    5: own_task,
}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("number", nargs="?", type=int, choices=EXERCISES, help="of the exercise")
    number = parser.parse_args(arguments).number
    missing = 0
    for each in [number] if number else EXERCISES:
        try:
            EXERCISES[each]()
            print(f"{each}  solved")
        except NotYet as error:
            print(f"{each}  not yet: {error}")
            missing += 1
    sys.exit(min(1, missing))


if __name__ == "__main__":
    main(sys.argv[1:])
