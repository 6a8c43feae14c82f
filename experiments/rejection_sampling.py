"""Rejection-sampling fine-tuning, a control that GRPO has to beat: keep the completions that earn the point of every
rule, and train on them as on documents (RFT: Yuan et al. 2023; online RFT: DeepSeekMath, section 5.2.1).

    python experiments/rejection_sampling.py out/cpu-grpo-seed0                # from that run's base model
    python experiments/rejection_sampling.py out/cpu-grpo-seed0 --rounds 80    # online: each round by the newest model

It samples the problems of the run's own GRPO steps, as many completions of them, and then trains on as many tokens as
it has sampled (prompts included), however few it has kept. Writes RUN/rejection_sampling_ROUNDS.json.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

from tqdm import tqdm

from data.tokenizer import Tokenizer, get_tokenizer
from experiments.measure import finished_run
from grpo import token_logps
from model import Transformer, write_whole
from sample import decode_completions, load_policy
from train import (
    Config,
    complete,
    evaluate,
    learning_rate,
    make_optimizer,
    optimizer_step,
    padded,
    sample_problems,
    score,
    set_up,
    stream,
)

Rows = list[tuple[int, list[int]]]  # as train.padded takes them: tokens of the prompt; tokens of prompt and completion
LR = 3e-4  # of 1e-4, 3e-4, 1e-3 and 3e-3 the best (NOTES.md)


def sampled_rows(config: Config, model: Transformer, tokenizer: Tokenizer, step: int) -> tuple[Rows, list[bool]]:
    """What the model says to the problems of a step of GRPO, and with which of it all rules are content."""
    levels = range(config.min_level, config.max_level + 1)
    problems = sample_problems(config, "problems", step, config.prompts, held_out=False, levels=levels)
    seed = stream(config.seed, "rollout", step).getrandbits(63)
    how = {"group_size": config.group_size, "temperature": config.temperature, "seed": seed}
    rollout = complete(config, model, tokenizer, problems, **how)
    rewards = score(config, problems, decode_completions(rollout, tokenizer))
    prompts, completions = rollout.mask.int().argmax(dim=1).tolist(), rollout.mask.sum(dim=1).tolist()
    rows = [(p, row[: p + c]) for row, p, c in zip(rollout.tokens.tolist(), prompts, completions)]
    return rows, ((rewards["accuracy"] == 1) & (rewards["format"] == 1)).tolist()


def batches(config: Config, rows: Rows, budget: int, number: int) -> Iterator[tuple[float, Rows]]:
    """Batches of rows in random order, again and again, until `budget` tokens are used; each with the share that was
    used before it."""
    rng, order, used = stream(config.seed, "rejection sampling", number), [], 0
    while used < budget:
        batch, size = [], 0
        while size < config.pretrain_tokens:
            order = order or rng.sample(rows, len(rows))
            batch.append(order.pop())
            size += len(batch[-1][1])
        yield used / budget, batch
        used += size


def rejection_sampling(config: Config, model: Transformer, tokenizer: Tokenizer, rounds: int, lr: float) -> dict:
    """Change the model in place. Returns how much was sampled and kept, and the share kept in each round."""
    optimizer, tokens, shares = make_optimizer(model, weight_decay=0.0), 0, []
    for number in tqdm(range(rounds), desc="rejection sampling", unit="round", dynamic_ncols=True, disable=None):
        rows, good = [], []
        for step in range(number * config.steps // rounds, (number + 1) * config.steps // rounds):
            some, content = sampled_rows(config, model, tokenizer, step)
            rows, good = rows + some, good + content
        kept, budget = [row for row, keep in zip(rows, good) if keep], sum(len(row) for _, row in rows)
        if not kept:
            raise ValueError(f"round {number + 1} has no completion to keep: start from a better base model")
        tokens += budget
        shares.append(len(kept) / len(rows))
        for done, batch in batches(config, kept, budget, number):
            ids, mask = (x.to(config.device) for x in padded(batch, tokenizer.pad_id))
            loss = -token_logps(model(ids), ids, config.temperature)[mask].mean()
            loss.backward()
            thousandths = 1000 * (number + done) / rounds
            rate = learning_rate(lr, thousandths, 1000, warmup=20, decay_from=0.5)
            optimizer_step(model, optimizer, rate, config.max_grad_norm)
    return {"tokens": tokens, "kept": shares}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run that has ended")
    parser.add_argument("--rounds", type=int, default=1, help="of sampling and then training [1]")
    parser.add_argument("--lr", type=float, default=LR, help=f"peak learning rate [{LR}]")
    flags = parser.parse_args(arguments)
    try:
        config, tokenizer = finished_run(flags.run), get_tokenizer()
        if not 1 <= flags.rounds <= config.steps:
            raise ValueError(f"--rounds must be from 1 to the {config.steps} steps of the run")
        model = load_policy(flags.run / "base.pt", tokenizer, config.device)
        model.in_bfloat16 = config.in_bfloat16
        set_up(config)
        found = rejection_sampling(config, model, tokenizer, flags.rounds, flags.lr)
    except ValueError as error:
        parser.error(str(error))
    result = {"rounds": flags.rounds, "lr": flags.lr, **found, "model": evaluate(config, model, tokenizer)}
    path = flags.run / f"rejection_sampling_{flags.rounds}.json"
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    kept, right = f"{found['kept'][0]:.1%} at first, {found['kept'][-1]:.1%} at last", result["model"]["pass@1"]
    print(f"kept {kept}; pass@1 {right:.3f} -> {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
