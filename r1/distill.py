"""Distillation: the data of stage 3, learned by a smaller model; and GRPO on that model instead.

The paper fine-tunes smaller base models on 800,000 samples of R1's data, and finds that this beats
RL on the smaller model (section 6, and its supplement F). The comparison here is at equal tokens
of the student. The teacher's tokens and seconds are told beside it: GRPO needs no teacher.
"""

from dataclasses import replace

import train
from data.batches import Row
from data.corpus import document_batches
from kit.run import Run
from model import Transformer
from r1.lessons import tokens_of
from sample import tokenizer_of

TEACHER = ("base", "dev1", "dev2")  # the stages that stage 3's data cost


def student_base(config, run: Run, teacher: Transformer) -> Transformer:
    """The stage "student_base": a smaller model, pretrained on the same web as its teacher."""
    sizes = {"n_layer": config.student_layers, "d_model": config.student_width}
    model = Transformer(replace(teacher.config, **sizes, d_ff=3 * config.student_width))
    model.init_weights(config.seed, tokenizer_of(teacher).pieces)
    model.in_bfloat16 = config.in_bfloat16
    model.to(config.device)
    sizes = (config.pretrain_tokens, config.max_seq_len)
    web = document_batches(config.task, config.levels, config.seed, *sizes)
    train.imitate(config, run, "student_base", model, web, config.student_steps, config.pretrain_lr)
    return model


def rollouts_for(config, rows: list[Row]) -> int:
    """How many rollouts of GRPO sample about as many tokens as the student learns from, where
    completions are as long as the teacher's."""
    length = sum(len(ids) - start for start, ids in rows) / len(rows)
    tokens = tokens_of(rows, config.distill_steps)
    return max(1, round(tokens / (length * config.prompts * config.group_size)))


def teacher_costs(found: dict[str, dict]) -> dict[str, float]:
    """What the data of stage 3 cost before a student could read it, but for the sampling."""
    return {name: sum(found[stage][name] for stage in TEACHER) for name in ("tokens", "seconds")}
