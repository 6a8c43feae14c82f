"""Rejection-sampling fine-tuning, a control that GRPO has to beat: keep the completions that earn
the point of every rule, and train on them as on documents (RFT: Yuan et al. 2023; online RFT:
DeepSeekMath, section 5.2.1).

    python -m experiments.study.rejection_sampling out/chains-cpu-grpo-seed0
    python -m experiments.study.rejection_sampling out/chains-cpu-grpo-seed0 --rounds 80

It starts from the run's base model. With several rounds it is online: the newest model samples
each. It samples the problems of the run's own GRPO steps, as many completions of them, and then
trains on as many tokens as it has sampled (prompts included), however few it has kept. Writes
RUN/rejection_sampling_ROUNDS.json.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

import train
from data import get_tokenizer
from data.batches import Row, padded
from data.problem import Problem, stream
from experiments.study.measure import finished_run
from grpo import token_logps
from kit.evaluate import evaluate
from kit.flags import command_line
from kit.run import set_up
from model import Transformer, write_whole
from sample import Rollout, load_policy, tokenizer_of

LR = 3e-4  # of 1e-4, 3e-4, 1e-3 and 3e-3 the best (NOTES.md)


def split(problems: list[Problem], rollout: Rollout) -> tuple[list[Row], list[Row]]:
    """The rows of a rollout, prompt and completion; and the rows with which both of R1-Zero's rules
    are content."""
    cut = zip(rollout.starts.tolist(), rollout.ends.tolist(), rollout.tokens.tolist())
    rows = [(start, tokens[:end]) for start, end, tokens in cut]
    rules = train.rules({"accuracy": 1.0, "format": 1.0}, get_tokenizer(problems[0].task))
    points = rules(problems, rollout, 0)["reward"]
    return rows, [row for row, earned in zip(rows, points.tolist()) if earned == 2]


def batches(
    config: train.Config, rows: list[Row], budget: int, number: int
) -> Iterator[tuple[float, list[Row]]]:
    """Batches of rows in random order, again and again, until `budget` tokens are used; each with
    the share that was used before it."""
    rng, order, used = stream(config.seed, "rejection sampling", number), [], 0
    while used < budget:
        batch, size = [], 0
        while size < config.pretrain_tokens:
            order = order or rng.sample(rows, len(rows))
            batch.append(order.pop())
            size += len(batch[-1][1])
        yield used / budget, batch
        used += size


def rejection_sampling(
    config: train.Config,
    model: Transformer,
    rounds: int,
    lr: float,
    sample: Callable = train.sample,
) -> dict:
    """Change the model in place. `sample` is as `train.grpo` takes it. Returns how many tokens were
    sampled, and the share of the completions that was kept in each round."""
    optimizer, pad_id = train.make_optimizer(model), tokenizer_of(model).pad_id
    tokens, shares = 0, []
    look = {"desc": "rejection sampling", "unit": "round", "dynamic_ncols": True, "disable": None}
    for number in tqdm(range(rounds), **look):
        rows, kept = [], []
        for step in range(number * config.steps // rounds, (number + 1) * config.steps // rounds):
            sampled, good = split(*sample(config, model, step))
            rows, kept = rows + sampled, kept + good
        if not kept:
            advice = "start from a better base model"
            raise ValueError(f"round {number + 1} has no completion to keep: {advice}")
        budget = sum(len(ids) for _, ids in rows)
        tokens += budget
        shares.append(len(kept) / len(rows))
        for done, batch in batches(config, kept, budget, number):
            ids, mask = (x.to(config.device) for x in padded(batch, pad_id)[:2])
            loss = -token_logps(model(ids), ids, config.temperature)[mask].mean()
            loss.backward()
            thousandths = 1000 * (number + done) / rounds
            rate = train.learning_rate(lr, thousandths, 1000, warmup=20, decay_from=0.5)
            train.optimizer_step(model, optimizer, rate, config.max_grad_norm)
    return {"tokens": tokens, "kept": shares}


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run that has ended")
    add("--rounds", type=int, default=1, help="of sampling and then training [1]")
    add("--lr", type=float, default=LR, help=f"peak learning rate [{LR}]")
    flags = parser.parse_args(arguments)
    try:
        config = finished_run(flags.run)
        if not 1 <= flags.rounds <= config.steps:
            raise ValueError(f"--rounds must be from 1 to the {config.steps} steps of the run")
        set_up(config)
        model = load_policy(flags.run / "base.pt", config.device)
        model.in_bfloat16 = config.in_bfloat16
        found = rejection_sampling(config, model, flags.rounds, flags.lr)
    except ValueError as error:
        parser.error(str(error))
    counts = {"problems": config.eval_problems, "samples": config.eval_samples}
    counts |= {"limit": config.max_new_tokens, "seed": config.seed}
    found |= {"model": evaluate(model, config.task, config.levels, **counts)}
    path = flags.run / f"rejection_sampling_{flags.rounds}.json"
    result = {"rounds": flags.rounds, "lr": flags.lr, **found}
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    kept = f"{found['kept'][0]:.1%} at first, {found['kept'][-1]:.1%} at last"
    print(f"kept {kept}; pass@1 {found['model']['pass@1']:.3f} -> {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
