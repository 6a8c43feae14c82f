"""Rejection-sampling fine-tuning (RFT), a control that GRPO has to beat.

    python -m experiments.study.rejection_sampling out/chains-cpu-grpo-seed0
    python -m experiments.study.rejection_sampling out/chains-cpu-grpo-seed0 --rounds 80

It starts from the run's base model and samples the rollouts of the run's GRPO steps: the same
problems, as many completions. It keeps the completions that satisfy both rules, and fine-tunes on
them (Yuan et al. 2023). With several rounds, the newest model samples each round: online RFT
(DeepSeekMath, section 5.2.1). A round trains on as many tokens as it sampled, prompts included,
however few completions it kept. Writes RUN/rejection_sampling_ROUNDS.json.
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
from model import Transformer, save_model, write_whole
from sample import Rollout, load_policy, tokenizer_of

LR = 3e-4  # the best of 1e-4, 3e-4, 1e-3 and 3e-3 (NOTES.md)


def split(problems: list[Problem], rollout: Rollout) -> tuple[list[Row], list[Row]]:
    """All rows of a rollout, and the rows that earn the reward of accuracy and of format. A row is
    a prompt and its completion, without padding."""
    padded_rows = zip(rollout.starts.tolist(), rollout.ends.tolist(), rollout.tokens.tolist())
    rows = [(start, tokens[:end]) for start, end, tokens in padded_rows]
    rules = train.rules({"accuracy": 1.0, "format": 1.0}, get_tokenizer(problems[0].task))
    points = rules(problems, rollout, 0)["reward"]
    return rows, [row for row, earned in zip(rows, points.tolist()) if earned == 2]


def batches(
    config: train.Config, rows: list[Row], budget: int, number: int
) -> Iterator[tuple[float, list[Row]]]:
    """Batches of rows in random order, over and over, until `budget` tokens are used. Before each
    batch stands the share of the budget that is used already."""
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
    """Train the model in place. `sample` is the argument of `train.grpo`. Returns the number of
    sampled tokens, and the share of completions that each round kept."""
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
    add("--rounds", type=int, default=1, help="rounds of sampling and training [1]")
    add("--lr", type=float, default=LR, help=f"peak learning rate [{LR}]")
    text = "a JSON file; the model goes beside it [RUN/rejection_sampling_ROUNDS.json]"
    add("--out", metavar="FILE", type=Path, help=text)
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
    path = flags.out or flags.run / f"rejection_sampling_{flags.rounds}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path.with_suffix(".pt"), model)
    result = {"rounds": flags.rounds, "lr": flags.lr, **found}
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    kept = f"{found['kept'][0]:.1%} in the first round, {found['kept'][-1]:.1%} in the last"
    print(f"kept {kept}; pass@1 {found['model']['pass@1']:.3f} -> {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
