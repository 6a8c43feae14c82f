"""DeepSeek-R1's four stages, each from the model that the paper starts it from; before them
R1-Zero, after them a smaller student.

    python -m r1.four_stages                          # all of it, from random weights
    python -m r1.four_stages --init out/RUN/base.pt   # from a base model of the world
    python -m r1.four_stages --resume out/RUN         # go on with a run that was stopped

    base -- GRPO by rules ------------------------------------> R1-Zero
    base -- 1. cold start --> Dev1 -- 2. GRPO, also language --> Dev2
    base -- 3. what Dev2 said, and curated answers, 3:1 ------> Dev3 -- 4. RL for all --> R1

Dev1 to Dev3 are the paper's names (Nature 645, fig. 2). Each stage writes <out>/<stage>.pt.
"""

import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

import train
from data import TASKS
from data.problem import Problem, sample_problems, stream
from data.requests import HELD_OUT
from kit import flags
from kit.evaluate import compare_samples, held_out_problems, share
from kit.metrics import Rewards
from kit.run import Run, open_run
from model import ScalarModel, Transformer
from r1.distill import rollouts_for, student_base, teacher_costs
from r1.lessons import fine_tune, kept, lessons, tokens_of, written
from r1.measure import head, line, measure, sampled_tokens, signs
from rlhf import reward_model, scalar_model
from rlhf.preferences import REQUESTS, sample_pairs
from rlhf.reward_model import all_scores, clear, compare, fit
from rlhf.reward_model import judge as judge_of
from sample import Rollout, complete, tokenizer_of


@dataclass(frozen=True)
class Config(reward_model.Config):
    """Every knob of rlhf.reward_model, and those of the stages."""

    steps: int = 60  # rollouts of R1-Zero
    cold_documents: int = 64  # stage 1: documents that a person would write
    cold_steps: int = 8  # stage 1: optimizer steps
    reasoning_steps: int = 60  # stage 2: rollouts
    curated: int = 250  # stage 3: answers that people write; three times as many problems are asked
    sft_steps: int = 60  # stage 3: optimizer steps
    all_steps: int = 60  # stage 4: rollouts
    all_beta: float = 0.2  # stage 4: weight of the KL to Dev3
    judged_from: float = 0.5  # stage 4: share of the rollouts before requests and their judge come
    request_share: float = 0.5  # stage 4: share of requests among the prompts from then on
    student_layers: int = 2  # blocks of the student
    student_width: int = 32  # its width; a third of its feed-forward layers' width
    student_steps: int = 4000  # optimizer steps of its pretraining
    distill_steps: int = 300  # optimizer steps of its fine-tuning

    method: ClassVar = "r1"
    RANGES: ClassVar = reward_model.Config.RANGES | {
        **dict.fromkeys(("judged_from", "request_share"), (0, 1)),
        "cold_documents": (1, 2**31 - 1),
    }


RULES = {"accuracy": 1.0, "format": 1.0}  # R1-Zero's
TESTED = 1000  # new pairs of each kind that the judge is measured on
ASKED = 256  # problems, to see what a model gets right and readable by itself
SPOKEN = RULES | {"language": 1.0}  # from stage 2 on

# ------------------------------------------------------------------------------------- the stages


def reason(
    config: Config, run: Run, stage: str, start: Transformer, weights: dict[str, float], steps: int
) -> Transformer:
    """GRPO by rules: R1-Zero and stage 2."""
    policy = copy.deepcopy(start)
    reward = train.rules(weights, tokenizer_of(policy))
    train.grpo(replace(config, steps=steps), run, stage, policy, start, reward)
    return policy


def learn_judge(config: Config, run: Run, base: Transformer, asked: Transformer) -> ScalarModel:
    """The stage "reward": a reward model from the base model, by people's choices between two
    answers of the model that is asked."""
    how = {"noise": config.noise, "limit": config.max_new_tokens, "seed": config.seed}
    pairs = sample_pairs(asked, config.pairs, purpose="pairs", **how)
    answers = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    model = scalar_model(base)
    fit(config, run, "reward", model, clear(config, pairs), answers)
    return model


def agreement(config: Config, model: ScalarModel, asked: Transformer) -> dict:
    """The share of people's choices that the reward model agrees with, on new pairs."""
    how = {"noise": config.noise, "limit": config.max_new_tokens, "seed": config.seed}
    drawn = {
        "new": sample_pairs(asked, TESTED, purpose="new pairs", **how),
        "held-out": sample_pairs(asked, TESTED, purpose="held-out pairs", held_out=True, **how),
    }
    return compare(config, {"reward": partial(all_scores, model)}, drawn)


def rl_for_all(
    config: Config, run: Run, stage: str, start: Transformer, judge: ScalarModel
) -> Transformer:
    """Stage 4: rules where there are rules, the judge where there are none, and a KL to `start`."""
    policy = copy.deepcopy(start)
    reward = rules_or_judge(train.rules(SPOKEN, tokenizer_of(policy)), judge_of(judge))
    config = replace(config, steps=config.all_steps, beta=config.all_beta)
    train.grpo(config, run, stage, policy, start, reward, sample=sample_for_all)
    return policy


def asked_of_all(config: Config, step: int) -> list[Problem]:
    """The problems of a step of stage 4: chains; in the last part of the steps also requests. The
    paper's stage 4 has general prompts, and their reward, in the last 400 of 1,700 steps."""
    late = step >= config.judged_from * config.steps
    count = round(config.request_share * config.prompts) if late else 0
    rng, rest = stream(config.seed, "problems for all", step), config.prompts - count
    levels = (config.levels, REQUESTS.levels[:1])
    chains = sample_problems(rng, TASKS[config.task], levels[0], rest, first=step * rest)
    return chains + sample_problems(rng, REQUESTS, levels[1], count, first=step * count)


def sample_for_all(config: Config, policy: Transformer, step: int) -> tuple[list[Problem], Rollout]:
    """As `train.sample`, of the problems of stage 4."""
    problems = asked_of_all(config, step)
    names = ("group_size", "max_new_tokens", "temperature")
    how = {name: getattr(config, name) for name in names}
    how["seed"] = stream(config.seed, "rollout for all", step).getrandbits(63)
    return problems, complete(policy, problems, **how)


def rules_or_judge(rules: train.Reward, judged: train.Reward) -> train.Reward:
    """Rules where a problem has a rule, else the judge. "reward" is the sum of "rules" and "judge";
    each is 0 where it has no say, so the judge never sees a chain."""

    def reward(problems: list[Problem], rollout: Rollout, step: int) -> Rewards:
        B, G = len(rollout.tokens), len(rollout.tokens) // len(problems)
        parts = {"rules": torch.zeros(B), "judge": torch.zeros(B)}
        has_rule = [problem.is_right("") is not None for problem in problems]
        for name, of_part, wanted in (("rules", rules, True), ("judge", judged, False)):
            asked = [i for i, has in enumerate(has_rule) if has == wanted]
            if asked:
                rows = (G * torch.tensor(asked)[:, None] + torch.arange(G)).flatten()
                fields = (rollout.tokens, rollout.mask, rollout.logps, rollout.entropy)
                part = Rollout(*(x[rows] for x in (*fields, rollout.finished)))
                parts[name][rows] = of_part([problems[i] for i in asked], part, step)["reward"]
        return {"reward": parts["rules"] + parts["judge"], **parts}

    return reward


# ---------------------------------------------------------------------------------------- the job


class Stages:
    """The models of a job, and the rows of its table: each is measured once, and printed."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self.models: dict[str, Transformer] = {}
        self.found: dict[str, dict[str, float]] = {}

    def add(self, stage: str, model: Transformer, tokens: int | None = None) -> Transformer:
        """`tokens` are what imitation learned from. Where there are none, the log says what GRPO
        sampled."""
        if tokens is None:
            rows = self.config.prompts * self.config.group_size
            tokens = sampled_tokens(self.run.folder, stage, rows)
        found = self.run.once(stage, lambda: measure(self.config, model))
        found = found | {"tokens": tokens, "seconds": self.run.seconds[stage]}
        self.models[stage], self.found[stage] = model, found
        print("\n".join([head()] * (len(self.found) == 1) + [line(stage, found)]), flush=True)
        return model


def four_stages(config: Config, run: Run) -> None:
    """A resumed run comes through here from the top: what has ended is loaded."""
    add = (stages := Stages(config, run)).add
    web = 0 if config.init else config.pretrain_steps * config.pretrain_tokens
    base = add("base", train.base_model(config, run), web)
    tokenizer = tokenizer_of(base)
    zero = add("r1_zero", reason(config, run, "r1_zero", base, RULES, config.steps))

    # Stage 1, cold start: a few clean documents, learned by the base model.
    rows, steps = written(config, tokenizer, config.cold_documents), config.cold_steps
    dev1 = add("dev1", fine_tune(config, run, "dev1", base, rows, steps), tokens_of(rows, steps))

    # Stage 2, reasoning RL: as R1-Zero, and a reward for the language of the question.
    dev2 = add("dev2", reason(config, run, "dev2", dev1, SPOKEN, config.reasoning_steps))

    # Stage 3: what Dev2 said that is right and readable, and a third as many curated answers to
    # requests, learned by the base model again.
    rows, steps = lessons(config, dev2), config.sft_steps
    dev3 = add("dev3", fine_tune(config, run, "dev3", base, rows, steps), tokens_of(rows, steps))

    # Stage 4, RL for all: rules where there are rules, and a judge who learned what people prefer.
    judge = learn_judge(config, run, base, dev3)
    add("r1", rl_for_all(config, run, "r1", dev3, judge))

    # Distillation: the same data, learned by a smaller model; and GRPO on that model instead.
    web = config.student_steps * config.pretrain_tokens
    small, steps = add("student_base", student_base(config, run, base), web), config.distill_steps
    add("student", fine_tune(config, run, "student", small, rows, steps), tokens_of(rows, steps))
    count = rollouts_for(config, rows)
    add("student_grpo", reason(config, run, "student_grpo", small, SPOKEN, count))

    found = {"stages": stages.found, "signs": signs(stages.found)}
    found["judge"] = run.once("judge", partial(agreement, config, judge, dev3))
    found["own"] = run.once("own", partial(own_samples, config, {"r1_zero": zero, "base": base}))
    said, _ = compare_samples(stages.models, shown(config), config.max_new_tokens, config.seed)
    run.write("samples.txt", said)
    run.finish({"device": config.device, "seed": config.seed, **found})
    print(f"\n{said}\n{report(found)}\n\n{run.times()}\n{run.folder}/ has it all.")


def own_samples(config: Config, models: dict[str, Transformer]) -> dict:
    """Of how many problems a model gives a right and readable answer, that a cold start could be
    made of: as the paper makes its own from R1-Zero."""
    return {
        name: {"asked": 256, "kept": len(kept(config, model, 256))}
        for name, model in models.items()
    }


def shown(config: Config) -> list[Problem]:
    """The Korean problem and the request that samples.txt shows, both held out."""
    chains = held_out_problems(config.task, config.levels, 8, config.seed, "samples")
    return [
        next(x for x in chains if x.language == "ko" and x.level > 1),
        REQUESTS.ask("about", HELD_OUT[-1], "en"),
    ]


def report(found: dict) -> str:
    """What of the paper's table was seen, what the judge is worth, what the student cost."""
    lines = [f"{'seen' if seen else 'not seen':10}{text}" for text, seen in found["signs"].items()]
    for pairs, row in found["judge"].items():
        lines.append(f"the judge agrees with {share(row['reward'])} of people's choices ({pairs})")
    for model, own in found["own"].items():
        lines.append(f"{model}: {own['kept']} of {own['asked']} problems right and readable")
    cost = teacher_costs(found["stages"])
    lines.append(f"the student's teacher: {cost['tokens']:,.0f} tokens, {cost['seconds']:.0f} s")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    presets = reward_model.PRESETS
    config = flags.parse(Config, presets, arguments, __doc__, "r1.four_stages")
    with open_run(config, "-m r1.four_stages") as run:
        four_stages(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
