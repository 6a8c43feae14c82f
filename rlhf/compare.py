"""DPO, PPO, GRPO and best-of-n from one fine-tuned model, by one judge, at one KL; and what
becomes of a policy that is pushed on.

    python -m rlhf.compare                          # base, fine-tuning, reward model, all methods
    python -m rlhf.compare --init out/RUN/base.pt   # from a base model of the world

A method walks away from the fine-tuned model. Points on its path are measured on requests about
held-out numbers: the KL, the judge's score and gold. Methods are compared at the point of their
path whose KL is nearest to --nats.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import train
from kit import flags
from kit.evaluate import share
from kit.run import Run, open_run
from model import ScalarModel, Transformer
from rlhf import reward_model, scalar_model
from rlhf.measure import (
    ask,
    best_of,
    best_of_kl,
    bytes_held,
    gold_of_best,
    measure,
    point,
    point_requests,
)
from rlhf.methods import METHODS, Config, by_grpo, start, with_rule
from rlhf.reward_model import fit, judge
from sample import load_policy

MOST = 64  # answers from which best-of-n picks


def path(
    config: Config, run: Run, stage: str, sft: Transformer, score: train.Reward, **which
) -> dict:
    """The points of a stage's path, by the models that it left."""
    files = {int(re.search(r"(\d+).pt$", x.name)[1]): x for x in run.folder.glob(f"{stage}_[0-9]*")}
    walked = [{"step": 0, **point(config, sft, sft, score, **which)}]
    for step, file in sorted(files.items()):
        walked.append({"step": step, **point(config, load_policy(file), sft, score, **which)})
    return {"points": walked}


def nearest(points: list[dict], nats: float) -> dict:
    """The point behind the start whose KL is nearest to this."""
    return min(points[1:], key=lambda at: abs(at["kl"] - nats))


def pick_best(config: Config, sft: Transformer, score: train.Reward) -> dict:
    """Best-of-n of the fine-tuned model's answers, for each n that is a power of 2."""
    problems = point_requests(config.seed, held_out=True)
    *_, scores, golds = ask(config, sft, score, problems, samples=MOST)
    scores, golds, points = scores.view(-1, MOST), golds.view(-1, MOST), []
    for n in (2**i for i in range(MOST.bit_length())):
        picks = best_of(scores, n)
        proxy, gold = (x.gather(1, picks).mean().item() for x in (scores, golds))
        points.append({"n": n, "kl": best_of_kl(n), "proxy": proxy, "gold": gold})
    return {"points": points}


def best_of_close(config: Config, sft: Transformer, score: train.Reward, points: list) -> dict:
    """Best-of-n at the KL of the comparison, by the requests that `measure` asks."""
    close = nearest(points, config.nats)
    splits = {"held_out": True, "seen": False}
    golds = {x: gold_of_best(config, sft, score, close["n"], y) for x, y in splits.items()}
    return {"n": close["n"], "kl": close["kl"], **golds}


def costs(sft: Transformer, reward: ScalarModel) -> dict[str, dict[str, int]]:
    """How many models each method holds and trains, and their bytes. Of DPO's steps, the best so
    far is a file: it is not counted."""
    held = {
        "ppo": ([sft, reward], [sft, reward]),
        "grpo": ([sft], [sft, reward]),
        "dpo": ([sft], [sft]),
        "best_of_n": ([], [sft, reward]),
        "grpo by rules": ([sft], []),
    }
    return {
        name: {
            "models": len(trained) + len(frozen),
            "trained": len(trained),
            "bytes": bytes_held(trained, frozen),
        }
        for name, (trained, frozen) in held.items()
    }


def clocked(run: Run, stage: str, learn: Callable) -> float | None:
    """Run a stage; the CPU seconds that it took. None for a stage that was stopped and went on,
    which no clock saw whole."""
    whole, began = not run.stopped and stage not in run.ended, time.process_time()
    learn(run, stage)
    taken = time.process_time() - began
    return run.once(f"{stage}_seconds", lambda: {"cpu": taken if whole else None})["cpu"]


def compare(config: Config, run: Run) -> None:
    """What all start from; each method, and the points of its path; each at one KL."""
    at = start(config, run)
    worse, few = scalar_model(at.base), at.pairs[: int(config.fewer * len(at.pairs))]
    fit(config, run, "reward_fewer", worse, few, at.answers)
    score, free = judge(at.reward), replace(config, beta=0.0)
    found = {"sft": run.once("sft", partial(measure, config, at.sft))}
    found["best_of_n"] = run.once("best_of_n", partial(pick_best, config, at.sft, score))
    picks = partial(best_of_close, config, at.sft, score, found["best_of_n"]["points"])
    found["best_of_n_close"] = run.once("best_of_n_close", picks)
    stages = {name: partial(learn, config) for name, learn in METHODS.items()} | {
        "grpo_free": partial(by_grpo, free),
        "grpo_fewer": partial(by_grpo, free, score=judge(worse)),
        "grpo_rule": partial(by_grpo, free, score=with_rule(score, config.rule)),
    }
    for stage, learn in stages.items():
        seconds = clocked(run, stage, partial(learn, at=at))
        by = judge(worse) if stage == "grpo_fewer" else score
        walked = run.once(stage, partial(path, config, run, stage, at.sft, by))
        found[stage] = walked | {"seconds": seconds}
    for stage in METHODS:
        close = nearest(found[stage]["points"], config.nats)
        policy, name = load_policy(run.folder / f"{stage}_{close['step']}.pt"), f"{stage}_close"
        measured = run.once(name, partial(measure, config, policy))
        found[name] = {"step": close["step"], "kl": close["kl"], **measured}
    found["costs"] = costs(at.sft, at.reward)
    run.finish({"device": config.device, "seed": config.seed, **found})
    print(f"\n{report(config, found)}\n\n{run.times()}")


def report(config: Config, found: dict) -> str:
    """Each method at one KL, and the end of each path, as two tables."""
    lines = [f"{f'at {config.nats:g} nats':18}{'KL':>8}{'gold':>8}{'seen':>8}{'chains':>9}"]
    close = {"fine-tuned": {"kl": 0.0, **found["sft"]}}
    picks = found["best_of_n_close"]
    close[f"best of {picks['n']}"] = picks  # no model of its own, so no chains
    for stage in METHODS:
        close[f"{stage}, {found[f'{stage}_close']['step']} steps"] = found[f"{stage}_close"]
    for name, model in close.items():
        golds = "".join(f"{model[split]['gold']:8.2f}" for split in ("held_out", "seen"))
        chains = share(model["chains"]) if "chains" in model else "-"
        lines.append(f"{name:18}{model['kl']:8.2f}{golds}{chains:>9}")
    lines.append(f"\n{'end of the path':18}{'KL':>8}{'gold':>8}{'judge':>8}")
    for stage, walked in found.items():
        if "points" in walked:
            end = walked["points"][-1]
            cells = "".join(f"{end[name]:8.2f}" for name in ("kl", "gold", "proxy"))
            lines.append(f"{stage:18}{cells}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    config = flags.parse(Config, reward_model.PRESETS, arguments, __doc__, "rlhf.compare")
    with open_run(config, "-m rlhf.compare") as run:
        compare(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
