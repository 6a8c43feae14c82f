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
from typing import ClassVar

import train
from kit import flags
from kit.run import Run, open_run
from model import ScalarModel, Transformer
from r1.distill import rollouts_for, student_base
from r1.for_all import rules_or_judge, sample_for_all
from r1.lessons import fine_tune, lessons, tokens_of, written
from r1.table import Table, finish
from rlhf import reward_model, scalar_model
from rlhf.preferences import rows_of
from rlhf.reward_model import clear, draw_pairs, fit
from rlhf.reward_model import judge as judged_by
from sample import tokenizer_of


@dataclass(frozen=True)
class Config(reward_model.Config):
    """Every knob of rlhf.reward_model, and those of the stages."""

    steps: int = 60  # rollouts of R1-Zero
    cold_documents: int = 64  # stage 1: documents that a person would write
    cold_steps: int = 8  # stage 1: optimizer steps
    reasoning_steps: int = 60  # stage 2: rollouts
    curated: int = 500  # stage 3: answers that people write; three times as many problems are asked
    sft_steps: int = 125  # stage 3: optimizer steps
    all_steps: int = 80  # stage 4: rollouts
    all_beta: float = 0.2  # stage 4: weight of the KL to Dev3
    judged_from: float = 0.75  # stage 4: share of the rollouts before requests and their judge come
    request_share: float = 0.5  # stage 4: share of requests among the prompts from then on
    student_layers: int = 2  # blocks of the student
    student_width: int = 32  # its width; a third of its feed-forward layers' width
    student_steps: int = 4000  # optimizer steps of its pretraining
    distill_steps: int = 300  # optimizer steps of its fine-tuning
    eval_problems: int = 300  # held-out chains of each evaluation

    method: ClassVar = "r1"
    RANGES: ClassVar = reward_model.Config.RANGES | {
        **dict.fromkeys(("judged_from", "request_share"), (0, 1)),
        "cold_documents": (1, 2**31 - 1),
    }
    UNUSED: ClassVar = ("rewards", "eval_samples")


RULES = {"accuracy": 1.0, "format": 1.0}  # R1-Zero's
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
    pairs, model = draw_pairs(config, asked, config.pairs, "pairs"), scalar_model(base)
    fit(config, run, "reward", model, clear(config, pairs), rows_of(pairs))
    return model


def rl_for_all(
    config: Config, run: Run, stage: str, start: Transformer, judge: ScalarModel
) -> Transformer:
    """Stage 4: rules where there are rules, the judge where there are none, and a KL to `start`."""
    policy = copy.deepcopy(start)
    reward = rules_or_judge(SPOKEN, tokenizer_of(policy), judged_by(judge))
    config = replace(config, steps=config.all_steps, beta=config.all_beta)
    train.grpo(config, run, stage, policy, start, reward, sample=sample_for_all)
    return policy


# ---------------------------------------------------------------------------------------- the job


def four_stages(config: Config, run: Run) -> None:
    """A resumed run comes through here from the top: what has ended is loaded."""
    table = Table(config, run)
    add = table.add
    web = 0 if config.init else config.pretrain_steps * config.pretrain_tokens
    base = add("base", train.base_model(config, run), web)
    tokenizer = tokenizer_of(base)
    add("r1_zero", reason(config, run, "r1_zero", base, RULES, config.steps))

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
    finish(table, judge)


def main(arguments: list[str]) -> None:
    presets = reward_model.PRESETS
    config = flags.parse(Config, presets, arguments, __doc__, "r1.four_stages")
    with open_run(config, "-m r1.four_stages") as run:
        four_stages(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
