"""PPO's value model against GRPO's group mean, at equal completions: how right each becomes,
whether the value model learned anything, and what it costs.

    python -m experiments.study.value_model runs --task chains --seed 10      # all rows of ROWS
    python -m experiments.study.value_model runs --task signs --seed 0 --rows grpo_8 ppo_8
    python -m experiments.study.value_model critics out/value_model/signs-seed0/grpo_8/base.pt
    python -m experiments.study.value_model examine out/value_model/signs-seed10/ppo_8
    python -m experiments.study.value_model machine out/value_model/signs-seed10/grpo_8/base.pt
    python -m experiments.study.value_model publish          # results/ppo.json, tables, picture

`runs` skips what is done. `critics` lets value models learn beside a policy that stays. `examine`
rolls out from prefixes of thoughts: what the value model expects there can then be held against
what comes. `machine` counts bytes and seconds, and `publish` collects.
"""

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import train
from data import TASKS, get_tokenizer
from data.problem import Problem, stream
from data.signs import Signs, tries_of
from experiments.machine.bench import SHAPES
from experiments.study import pictures
from experiments.study.collect import (
    RESULTS,
    ROOT,
    cell,
    grid,
    made_here,
    made_on,
    spread,
    write_into_page,
)
from experiments.study.study import Job, do
from experiments.watch.plot import check_picture, read_log
from kit.evaluate import held_out_problems
from kit.flags import command_line, saved_config
from kit.run import set_up
from model import ModelConfig, ScalarModel, Transformer, load_model, write_whole
from rewards import is_right, rule_weights
from rlhf import ppo, scalar_model
from rlhf.ppo import explained_variance, rollout_values, values_of
from sample import Rollout, complete, decode_completions, generate, load_policy, tokenizer_of

OUT = Path("out/value_model")
PAGE = ROOT / "rlhf" / "PPO.md"
STEPS = ("--steps", "60")
ROWS = {  # the flags of each run beside these; all take 256 completions a step
    "grpo_4": ("--prompts", "64", "--group_size", "4"),
    "grpo_8": (),
    "grpo_16": ("--prompts", "16", "--group_size", "16"),
    "ppo_1": ("--prompts", "256", "--group_size", "1"),
    "ppo_4": ("--prompts", "64", "--group_size", "4"),
    "ppo_8": (),
    "ppo_16": ("--prompts", "16", "--group_size", "16"),
    "ppo_8_lam95": ("--lam", "0.95"),
    "ppo_8_length": ("--lam_alpha", "0.5"),
    "ppo_8_cold": ("--value_warmup", "0"),
    "ppo_8_epochs": ("--inner_epochs", "2"),
}
PASSES = "two passes over a rollout"
CRITICS = {  # whether the value model begins at the mean reward, and what else is changed
    "as it is": (True, {}),
    "a quarter of the learning rate": (True, {"value_lr": 5e-4}),
    PASSES: (True, {"inner_epochs": 2}),
    "begins at 0": (False, {}),
    "begins at 0, no clip": (False, {"value_clip": math.inf}),
    "begins at 0, no clip, two passes": (False, {"value_clip": math.inf, "inner_epochs": 2}),
}
LOOKS = (2, 4, 8)  # rollouts that these have learned from when they are measured
CHOOSING = 10  # the seed of the grid; settings are compared on others
COMMAND = "python -m experiments.study.value_model"
LAST = 10  # steps at the end of a run whose explained variance is averaged
HELD_OUT, SAMPLES = 128, 4  # problems, completions of each
PREFIXES, ROLLOUTS = 80, 64  # prefixes of these, completions from a prefix
AT_ONCE = 4  # prefixes that are rolled out together
DRAWN = 3  # level of the thoughts in the picture: four numbers
TURNS = 3
METHODS = {"GRPO": train.Config, "PPO": ppo.Config}
SHAPE = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "max_seq_len")


# -------------------------------------------------------------------------------------------- runs


def jobs(folder: Path, task: str, seed: int, rows: list[str], init: Path | None) -> list[Job]:
    """A job for each row. Without `init`, the others begin with the base model of grpo_8."""

    def job(row: str, init: Path | None, *needs: Job) -> Job:
        run = folder / row
        program = ["train.py"] if row.startswith("grpo") else ["-m", "rlhf.ppo"]
        flags = ["--task", task, "--seed", str(seed), "--out", str(run), *STEPS, *ROWS[row]]
        flags += ["--init", str(init)] if init else []

        def command() -> list[str]:
            return [*program, *(["--resume", str(run)] if (run / "last.pt").exists() else flags)]

        return Job(folder, row, command, run / "result.json", needs, 3.0)

    if init:
        return [job(row, init) for row in rows]
    first = job("grpo_8", None)
    base = folder / "grpo_8" / "base.pt"
    return [first, *(job(row, base, first) for row in rows if row != "grpo_8")]


def run_of(folder: Path) -> dict:
    """What the table needs of a finished run."""
    result = json.loads((folder / "result.json").read_text())
    settings = json.loads((folder / "config.json").read_text())
    stage = "r1_zero" if "r1_zero" in result else "ppo"
    log, rows = read_log(folder, stage), settings["prompts"] * settings["group_size"]
    explained = [each["explained_variance"] for each in log[-LAST:] if stage == "ppo"]
    return {
        "task": settings["task"],
        "seed": settings["seed"],
        "row": folder.name,
        "base": result["base"]["pass@1"],
        **{name: result[stage][name] for name in ("pass@1", "format", "completion_tokens")},
        "looks": {x["step"]: x["held_out_accuracy"] for x in log if "held_out_accuracy" in x},
        "explained variance": float(np.mean(explained)) if explained else None,
        "completions": rows * len(log),
        "tokens": round(rows * sum(each["completion_tokens"] for each in log)),
    }


# ---------------------------------------------------------------------------- what V = P(right) is


def rewards_from(
    policy: Transformer, begun: list[tuple[Problem, list[int]]], config: ppo.Config
) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts of problems from prefixes of a completion: their rewards, and which are right,
    (N, ROLLOUTS) each. The prefixes go by length, a few at a time, and the longest of these says
    how much room all have."""
    tokenizer, weights = tokenizer_of(policy), rule_weights(config.rewards)
    rewards, right = np.zeros((2, len(begun), ROLLOUTS))
    order = sorted(range(len(begun)), key=lambda index: len(begun[index][1]))
    for first in range(0, len(order), AT_ONCE):
        part = order[first : first + AT_ONCE]
        room = config.max_new_tokens - max(len(begun[index][1]) for index in part)
        ids = [tokenizer.encode(begun[index][0].prompt) + begun[index][1] for index in part]
        how = {"group_size": ROLLOUTS, "max_new_tokens": room, "first_row": first * ROLLOUTS}
        rollout = generate(policy, ids, eos_id=tokenizer.eos_id, seed=config.seed, **how)
        for row, rest in enumerate(decode_completions(rollout, tokenizer)):
            index, column = part[row // ROLLOUTS], row % ROLLOUTS
            problem, prefix = begun[index]
            text = tokenizer.decode(prefix) + rest
            right[index, column] = is_right(text, problem)
            rewards[index, column] = sum(
                weight * train.RULES[name](text, problem) for name, weight in weights.items()
            )
    return rewards, right


def against_rollouts(values: np.ndarray, rewards: np.ndarray) -> dict:
    """N values against the rewards (N, R) of rollouts from the same N prefixes.

    "knowable" is the share of the rewards' variance that lies between prefixes, unbiased. A perfect
    value model's explained variance would be as much. "error" is the mean absolute error.
    """
    means, within = rewards.mean(axis=1), rewards.var(axis=1, ddof=1).mean()
    between = means.var(ddof=1) - within / rewards.shape[1]
    return {
        "knowable": between / (between + within),
        "correlation": np.corrcoef(values, means)[0, 1],
        "error": np.abs(values - means).mean(),
        "error of a constant": np.abs(means.mean() - means).mean(),
    }


def calibration(policy: Transformer, value: ScalarModel, config: ppo.Config) -> dict:
    """The value model on held-out completions: its explained variance, and its values against
    rollouts, at prefixes drawn evenly from all tokens."""
    asked = held_out_problems(config.task, config.levels, HELD_OUT, config.seed, "value model")
    how = {"group_size": SAMPLES, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    rollout = complete(policy, asked, **how)
    reward = train.rules(rule_weights(config.rewards), tokenizer_of(policy))
    values = rollout_values(value, rollout, config.micro_batch)
    returns = reward(asked, rollout, 0)["reward"][:, None].expand_as(values)
    places = rollout.mask.nonzero().tolist()
    places = stream(config.seed, "prefixes").sample(places, min(PREFIXES, len(places)))
    begun = [
        (asked[row // SAMPLES], rollout.tokens[row, rollout.starts[row] : t].tolist())
        for row, t in places
    ]
    rewards, _ = rewards_from(policy, begun, config)
    found = against_rollouts(np.array([values[row, t].item() for row, t in places]), rewards)
    explained = explained_variance(values, returns, rollout.mask)
    return {"explained variance": explained.item(), **{name: float(x) for name, x in found.items()}}


def critics(policy: Transformer, config: ppo.Config) -> dict:
    """What a value model knows of this policy after a few rollouts, in each of several ways
    to learn. Explained variances are of held-out problems. The values of PASSES are held against
    rollouts."""
    reward = train.rules(rule_weights(config.rewards), tokenizer_of(policy))

    def rewarded(problems: list[Problem], rollout: Rollout) -> tuple[Rollout, Tensor, dict]:
        rewards = reward(problems, rollout, 0)
        returns = rewards["reward"][:, None].expand(rollout.mask.shape)
        return rollout, returns, rewards

    learned = [rewarded(*train.sample(config, policy, step)) for step in range(LOOKS[-1])]
    asked = held_out_problems(config.task, config.levels, HELD_OUT, config.seed, "critics")
    how = {"group_size": SAMPLES, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    held_out, came, _ = rewarded(asked, complete(policy, asked, **how))
    found, models = {name: [] for name in CRITICS}, {}
    for name, (at_the_mean, settings) in CRITICS.items():
        now, value = replace(config, **settings), models.setdefault(name, scalar_model(policy))
        optimizer = train.make_optimizer(value)
        if at_the_mean:
            ppo.begin_at_the_mean(value, learned[0][2], learned[0][0], config.micro_batch)
        for step, (rollout, returns, _) in enumerate(learned):
            before = rollout_values(value, rollout, config.micro_batch)
            lr = train.learning_rate(now.value_lr, step, config.steps, **ppo.RATES)
            for rows in train.minibatches(now, step, len(returns)):
                ppo.add_value_gradient(now, value, rollout, before, returns, rows)
                train.optimizer_step(value, optimizer, lr, config.max_grad_norm)
            if step + 1 in LOOKS:
                values = rollout_values(value, held_out, config.micro_batch)
                found[name].append(explained_variance(values, came, held_out.mask).item())
    return {"explained": found, **looked_at(policy, models[PASSES], config)}


def thoughts(policy: Transformer, value: ScalarModel, config: ppo.Config) -> list[dict]:
    """Two completions of held-out problems token by token, with the value before each token and
    what rollouts from there earn: of the right ones with up to four tries the one with most, and of
    the wrong ones."""
    asked = held_out_problems(config.task, [DRAWN], HELD_OUT, config.seed, "thoughts")
    rollout = complete(policy, asked, max_new_tokens=config.max_new_tokens, seed=config.seed)
    texts = decode_completions(rollout, tokenizer_of(policy))
    tries = [len(tries_of(problem, text)) for problem, text in zip(asked, texts)]
    found = []
    for right in (True, False):
        rows = [
            row
            for row, text in enumerate(texts)
            if rollout.finished[row] and tries[row] <= 4 and is_right(text, asked[row]) == right
        ]
        if rows:
            row = max(rows, key=tries.__getitem__)
            found.append(along(policy, value, config, asked[row], rollout, row))
    return found


def along(
    policy: Transformer,
    value: ScalarModel,
    config: ppo.Config,
    problem: Problem,
    rollout: Rollout,
    row: int,
) -> dict:
    """One completion: its tokens, and at each place the value and the rollouts from there."""
    tokens = rollout.tokens[row, : rollout.ends[row]]
    said = tokens[rollout.starts[row] :].tolist()
    with torch.no_grad():
        values = values_of(value, tokens[None])[0, rollout.starts[row] :].tolist()
    begun = [(problem, said[:t]) for t in range(len(said))]
    rewards, right = (x.mean(axis=1) for x in rewards_from(policy, begun, config))
    decode = tokenizer_of(policy).decode
    return {
        "problem": problem.expression,
        "tokens": [decode([token]) for token in said],
        "value": [round(x, 4) for x in values],
        "reward": [round(x, 4) for x in rewards.tolist()],
        "right": [round(x, 4) for x in right.tolist()],
    }


def examine(folder: Path) -> dict:
    """What a finished run's value model knows, as its value.json holds it."""
    if not (folder / "result.json").is_file() or not (folder / "ppo_value.pt").is_file():
        raise ValueError(f"{folder} is not the folder of a finished run of rlhf.ppo")
    config = saved_config(ppo.Config, {"resume": str(folder)})
    set_up(config)
    policy = load_policy(folder / "ppo.pt")
    value = load_model(folder / "ppo_value.pt", kind=ScalarModel)
    return {"row": folder.name, **looked_at(policy, value, config)}


def looked_at(policy: Transformer, value: ScalarModel, config: ppo.Config) -> dict:
    found = {"task": config.task, "seed": config.seed, **calibration(policy, value, config)}
    if isinstance(TASKS[config.task], Signs):
        found["thoughts"] = thoughts(policy, value, config)
    return found


# ------------------------------------------------------------------------------ seconds and bytes


class OneStep:
    """A run in no folder that makes one step and keeps its CPU seconds and its log. It is not the
    first of a stage, and the stage believes in many more: no look at held-out problems is due."""

    def steps(self, stage: str, count: int, model: nn.Module, **state) -> Iterator[int]:
        self.stage, self.step = stage, 1
        named = {"policy": model, **state}.values()
        self.models = [x for x in named if isinstance(x, nn.Module)]
        self.optimizers = [x for x in named if isinstance(x, torch.optim.Optimizer)]
        started = time.process_time()
        yield self.step
        self.seconds = time.process_time() - started

    def show(self, numbers: dict[str, float], keep: bool = False) -> None:
        pass

    def log(self, record: dict) -> None:
        self.record = record


def by_chance(problems: list[Problem], rollout: Rollout, step: int) -> dict[str, Tensor]:
    """Rewards for random weights, which earn none by rule: nearly every group has a signal."""
    generator = torch.Generator().manual_seed(step)
    return {"reward": torch.randint(2, (len(rollout.tokens),), generator=generator).float()}


def kept_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """The bytes that a forward pass keeps for its backward pass, without the weights."""
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = forward()  # while it lives, no memory is used twice
    del graph
    return sum(size for place, size in kept.items() if place not in weights)


def cost(method: str, base: Transformer, reward: train.Reward, **settings) -> dict:
    """The CPU seconds of one step and the bytes that are held for training. Equal arguments but
    for the method give equal rollouts."""
    more = {"value_warmup": 0} if method == "PPO" else {}
    config = METHODS[method](task=base.config.task, steps=10**6, eval_every=10**6, **settings)
    config = replace(config.filled(), **more)
    run, policy, sampled = OneStep(), copy.deepcopy(base), {}

    def sample(config: train.Config, policy: Transformer, step: int) -> tuple:
        started = time.process_time()
        problems, sampled["rollout"] = train.sample(config, policy, step)
        sampled["seconds"] = time.process_time() - started
        return problems, sampled["rollout"]

    if method == "GRPO":
        train.grpo(config, run, "cost", policy, base, reward, sample)
    else:
        ppo.ppo(config, run, "cost", policy, base, scalar_model(base), reward, sample)
    rollout, size = sampled["rollout"], config.micro_batch
    *_, (part, columns) = train.micro_batches(rollout, np.arange(len(rollout.tokens)), size)
    forwards = [lambda: train.logps_of(policy, rollout, part, columns, 1.0)]
    if method == "PPO":
        tokens = rollout.tokens[part, : columns.stop]
        forwards.append(lambda: values_of(run.models[1], tokens, columns.start))
    weights = [weight for model in run.models for weight in model.parameters()]
    moments = [
        x for each in run.optimizers for state in each.state.values() for x in state.values()
    ]
    return {
        "method": method,
        "models trained": len(run.models),
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.grad.nbytes for weight in weights),
        "moments": sum(x.nbytes for x in moments),
        "activations": [kept_for_backward(*each) for each in zip(forwards, run.models)],
        "sampling": sampled["seconds"],
        "the rest": run.seconds - sampled["seconds"],
        "completion_tokens": run.record["completion_tokens"],
        "no_signal": run.record["no_signal"],
    }


def costs(models: list[Path]) -> list[dict]:
    """The costs of both methods in turns, from the weights of each model under its rules, and from
    millions of random weights."""
    found = []
    for path in (*models, None):
        if path:
            base = load_policy(path)
            settings = {name: getattr(base.config, name) for name in SHAPE}
            reward = train.rules(rule_weights(train.Config.rewards), tokenizer_of(base))
        else:
            words, shape = get_tokenizer("signs"), dict(zip(SHAPE, (*SHAPES["5M"], 96)))
            named = {"vocab_size": words.vocab_size, "vocabulary": words.fingerprint}
            base, reward = Transformer(ModelConfig(task="signs", **named, **shape)), by_chance
            settings = shape | {"prompts": 8, "max_new_tokens": 48}
        turns = [cost(method, base, reward, **settings) for method in [*METHODS] * TURNS]
        found.append(
            {
                "model": f"{base.config.task}, {path.stem}" if path else "random weights",
                "parameters": sum(weight.numel() for weight in base.parameters()),
                "turns": turns,
            }
        )
    return found


# ----------------------------------------------------------------------------------------- results

MEASURES = ("explained variance", "knowable", "correlation", "error", "error of a constant")


def of(records: list[dict], **wanted) -> list[dict]:
    return [each for each in records if all(each[name] == x for name, x in wanted.items())]


def named(row: str) -> str:
    """A row in words: the method and its flags."""
    return f"{row.partition('_')[0].upper()} `{' '.join(ROWS[row])}`".removesuffix(" ``")


def grid_table(results: dict) -> str:
    """The runs of the seed on which settings were chosen: a row for each, tasks side by side."""
    runs = of(results["runs"], seed=CHOOSING)
    tasks = sorted({run["task"] for run in runs})
    rows = []
    for row in dict.fromkeys(run["row"] for run in runs):
        cells = []
        for task in tasks:
            (run,) = of(runs, task=task, row=row) or [None]
            explained = run and run["explained variance"]
            cells.append(cell([run["pass@1"]]) if run else "-")
            cells.append("-" if explained is None else f"{explained:.2f}")
        rows.append([named(row), *cells])
    head = [f"{task}: {what}" for task in tasks for what in ("right", "explained")]
    below = (
        f"`{COMMAND} runs --task TASK --seed {CHOOSING}`: {runs[0]['completions']:,} completions "
    )
    below += f"each. Explained: mean of the last {LAST} steps. {made_on(results)}"
    return grid(["method", *head], rows, below)


def seeds_table(results: dict) -> str:
    """The same settings on other seeds, and whether the ranges of two methods lie apart."""
    runs = [run for run in results["runs"] if run["seed"] != CHOOSING]
    rows = []
    for task in sorted({run["task"] for run in runs}):
        group_mean = of(runs, task=task, row="grpo_8")
        rows.append([task, "base model", "-", cell([run["base"] for run in group_mean])])
        rows[-1] += ["-"] * 3
        for row in dict.fromkeys(run["row"] for run in of(runs, task=task)):
            found = of(runs, task=task, row=row)
            explained = [run["explained variance"] for run in found]
            rows.append(
                [
                    task,
                    named(row),
                    cell([halfway(run) for run in found]),
                    cell([run["pass@1"] for run in found]),
                    "-" if found == group_mean else against(found, group_mean),
                    "-" if None in explained else spread(explained),
                    spread([run["tokens"] / 1e6 for run in found]),
                ]
            )
    seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
    head = ["task", "method", "right, half-way", "right", "against GRPO", "explained"]
    below = (
        f"`{COMMAND} runs --task TASK --seed SEED --rows ROW`, seeds {seeds}: mean (lowest-highest)"
    )
    below += f"; {runs[0]['completions']:,} completions each. {made_on(results)}"
    return grid([*head, "million tokens"], rows, below)


def halfway(run: dict) -> float:
    """The held-out accuracy at the look in the middle."""
    looks = list(run["looks"].values())
    return looks[(len(looks) - 1) // 2]


def against(found: list[dict], others: list[dict]) -> str:
    """Whether all runs of a method end above all of another."""
    ours, theirs = ([run["pass@1"] for run in runs] for runs in (found, others))
    if min(ours) > max(theirs):
        return "above, all seeds"
    return "below, all seeds" if max(ours) < min(theirs) else "ranges overlap"


def values_table(results: dict) -> str:
    """What each examined value model knows."""
    rows = [
        [each["task"], str(each["seed"]), named(each["row"]), *(f"{each[x]:.2f}" for x in MEASURES)]
        for each in results["examined"]
    ]
    below = (
        f"`{COMMAND} examine RUN`: {HELD_OUT} held-out problems, {SAMPLES} completions of each, "
    )
    below += f"and {ROLLOUTS} from each of {PREFIXES} prefixes. {made_on(results)}"
    return grid(["task", "seed", "run", *MEASURES], rows, below)


def costs_table(results: dict) -> str:
    """Bytes and seconds of both methods, for each model."""
    rows = []
    for each in results["costs"]:
        for method in METHODS:
            turns = of(each["turns"], method=method)
            parts = [[turn[name] for turn in turns] for name in ("sampling", "the rest")]
            rows.append(
                [
                    f"{each['model']}, {each['parameters']:,}",
                    method,
                    str(turns[0]["models trained"]),
                    *(f"{turns[0][x] / 1e6:.1f}" for x in ("weights", "gradients", "moments")),
                    " + ".join(f"{x / 1e6:.0f}" for x in turns[0]["activations"]),
                    *(f"{statistics.median(part):.2f}" for part in parts),
                ]
            )
    head = ["weights", "method", "models trained", "weights, MB", "gradients", "moments"]
    head += ["activations", "seconds of sampling", "seconds of the rest"]
    below = f"`{COMMAND} machine BASE R1_ZERO`: one step, of the same completions for both. "
    below += f"CPU seconds of one thread, median of {TURNS} in turns; other work ran beside it. "
    below += "Activations: what a micro-batch keeps of the policy, then of the value model. "
    below += made_on(results)
    return grid(head, rows, below)


def critics_table(results: dict) -> str:
    """The explained variance of each way to learn."""
    found = results["critics"]
    rows = [[name, *(f"{x:.2f}" for x in each)] for name, each in found["explained"].items()]
    below = (
        f"`{COMMAND} critics BASE --seed {found['seed']}`: of the base model of {found['task']}, "
    )
    below += (
        f"256 completions a rollout; {HELD_OUT} held-out problems, {SAMPLES} completions of each. "
    )
    below += f"Knowable: {found['knowable']:.2f}. {made_on(results)}"
    return grid(["the value model", *(f"after {n} rollouts" for n in LOOKS)], rows, below)


TABLES = {  # each with its part of the results, without which it is left out
    "critics": (lambda results: results["critics"], critics_table),
    "values": (lambda results: results["examined"], values_table),
    "seeds": (
        lambda results: [run for run in results["runs"] if run["seed"] != CHOOSING],
        seeds_table,
    ),
    "grid": (lambda results: of(results["runs"], seed=CHOOSING), grid_table),
    "costs": (lambda results: results["costs"], costs_table),
}


def tables(results: dict) -> dict[str, str]:
    """The tables of what has been run, by name."""
    return {name: table(results) for name, (part, table) in TABLES.items() if part(results)}


def publish(folder: Path) -> None:
    """Write results/ppo.json from all that has ended in a folder, its tables and its picture."""
    order = list(ROWS)
    ended = sorted(
        (path.parent for path in folder.glob("*/*/result.json")),
        key=lambda run: (run.parent.name, order.index(run.name)),
    )
    paths = [folder / "critics.json", *(run / "value.json" for run in ended), folder / "costs.json"]
    critics, *examined, costs = (
        json.loads(path.read_text()) if path.is_file() else {} for path in paths
    )
    drawn = [each.pop("thoughts", []) for each in (*examined, critics)]
    results = {
        **made_here(),
        "runs": [run_of(run) for run in ended],
        "examined": [each for each in examined if each],
        "critics": critics,
        "costs": costs,
        "thoughts": next(filter(None, drawn), []),
    }
    (RESULTS / "ppo.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, text in tables(results).items():
        write_into_page(f"{name}: made by experiments/study/value_model.py", text, pages=[PAGE])
    pictures.draw_results(RESULTS)


# --------------------------------------------------------------------------------------- commands


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("runs", help="train").add_argument
    add("--task", choices=("chains", "signs"), required=True)
    add("--seed", type=int, required=True)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the grid [all]")
    add("--init", type=Path, help="a base model [the one that grpo_8 pretrains]")
    add("--lanes", type=int, default=1, help="runs at a time [1]")
    add = commands.add_parser("critics", help="ways for a value model to learn").add_argument
    add("model", type=Path, help="a model file, the policy")
    add("--seed", type=int, default=CHOOSING, help=f"[{CHOOSING}]")
    add = commands.add_parser("examine", help="RUN/value.json").add_argument
    add("run", type=Path, help="folder of a run of rlhf.ppo that has ended")
    add = commands.add_parser("machine", help="bytes and seconds").add_argument
    add("model", nargs="+", type=Path, help="a model file, as a step's first policy")
    commands.add_parser("publish", help="the JSON, the tables, the picture")
    flags = parser.parse_args(arguments)
    try:
        if flags.command == "runs":
            folder = (OUT / f"{flags.task}-seed{flags.seed}").absolute()
            do(jobs(folder, flags.task, flags.seed, flags.rows, flags.init), flags.lanes)
        elif flags.command == "critics":
            torch.set_num_threads(1)
            policy = load_policy(flags.model)
            config = ppo.Config(task=policy.config.task, seed=flags.seed).filled()
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / "critics.json").write_text(json.dumps(critics(policy, config)) + "\n")
        elif flags.command == "examine":
            found = json.dumps(examine(flags.run)) + "\n"
            write_whole(flags.run / "value.json", found.encode())
        elif flags.command == "machine":
            torch.set_num_threads(1)
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / "costs.json").write_text(json.dumps(costs(flags.model)) + "\n")
        else:
            check_picture(parser, "publish", RESULTS / "value.png")
            publish(OUT)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
