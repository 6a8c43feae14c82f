"""How much faster several processes are: a step of GRPO and a step of pretraining, in one line.

    python -m experiments.machine.several --preset cpu
    torchrun --nproc_per_node 2 -m experiments.machine.several --preset cpu
    torchrun --nproc_per_node 2 -m experiments.machine.several --preset gpu --prompts 8 --shape 20M

Weights are random, all completions differ in their reward, and so every row is trained on. Seconds
are the CPU time of the slowest process, so other work on the machine does not count, nor does
waiting. Communication is measured apart, as often as a step needs it. Medians of --repeat steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch

import train
from data import get_tokenizer
from data.batches import BATCHES_PER_POOL
from data.corpus import document_batches
from kit import parallel
from kit.flags import command_line
from kit.run import set_up
from model import ModelConfig, Transformer

SHAPES = {"20M": {"n_layer": 6, "n_head": 8, "n_kv_head": 8, "d_model": 512, "d_ff": 1408}}


def configuration(args: argparse.Namespace) -> train.Config:
    knobs = train.PRESETS[args.preset] | SHAPES.get(args.shape, {}) | {"preset": args.preset}
    knobs |= {"prompts": args.prompts} if args.prompts else {}
    knobs |= {"max_new_tokens": args.tokens} if args.tokens else {}
    return train.Config(**knobs, device="cpu").filled()


def random_model(config: train.Config) -> Transformer:
    words = get_tokenizer(config.task)
    names = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "max_seq_len", "task")
    shape = {name: getattr(config, name) for name in names}
    fitting = {"vocab_size": words.vocab_size, "vocabulary": words.fingerprint}
    model = Transformer(ModelConfig(**fitting, **shape))
    model.init_weights(config.seed, words.pieces)
    return model


def seconds(work: Callable[[], object], repeat: int) -> float:
    """The median CPU time of some work in the slowest process."""
    found = []
    for _ in range(repeat):
        started = time.process_time()
        work()
        found.append(max(parallel.gather(time.process_time() - started)))
    return statistics.median(found)


def measure(config: train.Config, repeat: int) -> dict[str, float]:
    """Seconds of the parts of a step, by name."""
    model, run = random_model(config), SimpleNamespace(stage="", step=0)
    run.steps, run.show = lambda stage, count, model, **state: range(count), lambda record: None
    run.log = run.show
    optimizer, kept = train.make_optimizer(model), {}

    def sample() -> None:
        kept["rollout"] = train.sample(config, model, 0)[1]

    def update() -> None:
        rollout = kept["rollout"]
        advantages = torch.arange(float(len(rollout.tokens))) % config.group_size + 1
        inputs, teaches = train.loss_inputs(config, model, None, rollout, advantages)
        train.update(config, run, model, optimizer, 1e-6, rollout, inputs, teaches)

    def communicate() -> None:
        """What a step of GRPO exchanges."""
        parallel.gather([x.numpy() for x in vars(mine).values() if isinstance(x, torch.Tensor)])
        for _ in range(config.inner_epochs * config.minibatches):
            parallel.add_up(model)
            parallel.gather({"loss": 0.0})
        parallel.gather(0)

    found = {"sample": seconds(sample, repeat), "update": seconds(update, repeat)}
    whole = kept["rollout"]
    own = parallel.mine(len(whole.tokens))
    mine = replace(whole, **{name: getattr(whole, name)[own] for name in whole.__annotations__})
    found["communication"] = seconds(communicate, repeat)
    sizes = (config.pretrain_tokens, config.max_seq_len)
    web = document_batches(config.task, config.levels, config.seed, *sizes)
    web(0)

    def pretrain() -> None:
        train.imitate(config, run, "base", random_model(config), web, BATCHES_PER_POOL, 1e-6)
        web.pools[1].result()  # the documents that a process makes meanwhile, all of them

    found["pretrain"] = seconds(pretrain, 1) / BATCHES_PER_POOL
    return found


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="cpu", choices=train.PRESETS, help="of train.py [cpu]")
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="another model's")
    parser.add_argument("--prompts", type=int, default=0, help="fewer prompts than the preset's")
    parser.add_argument("--tokens", type=int, default=0, help="shorter completions")
    parser.add_argument("--repeat", type=int, default=3, help="steps [3]")
    parallel.hush()
    args = parser.parse_args(arguments)
    config = configuration(args)
    parallel.start(config.device)
    set_up(config)
    found, rows = measure(config, args.repeat), config.prompts * config.group_size
    step = found["sample"] + found["update"]
    weights = sum(weight.numel() for weight in random_model(config).parameters())
    print(
        f"{weights / 1e6:.2f}M weights, {rows} rows of {config.max_new_tokens} tokens, "
        f"{parallel.size()} process(es): {rows / found['sample']:.0f} samples/s, "
        f"step {step:.2f} s, communication {100 * found['communication'] / step:.1f} %, "
        f"pretraining step {1000 * found['pretrain']:.1f} ms"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
