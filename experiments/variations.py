"""Runs of train.py in which one thing is other than any flag can say: the advantage, the reward, the prompts kept.

    python experiments/variations.py mean_only --variant mean_only --init out/cpu-grpo-seed0/base.pt --out out/mean_only
    python experiments/variations.py dynamic_sampling --init out/cpu-grpo-seed0/base.pt --out out/dynamic
    python experiments/variations.py paid_by_step --init out/cpu-grpo-seed0/base.pt --out out/paid_by_step

The flags after the name are train.py's. A run goes on (`--resume`) by the same name only; this file is not compared. To
write one: a function that changes something of train.py, and its name in VARIATIONS. What stands in the rewards that
`train.score` returns is logged.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data.arithmetic import Problem
from data.tokenizer import Tokenizer
from grpo import VARIANTS, Variant
from sample import CapturedDecoder, Rollout

PAID_PER_STEP = 0.5
MOST_ROUNDS = 8  # rollouts that may be sampled to fill one

sample_rollout, score = train.sample_rollout, train.score  # as they are without any variation


def mean_only() -> None:
    """GRPO without the standard deviation: one half of Dr. GRPO (Liu et al. 2025)."""
    VARIANTS["mean_only"] = Variant("Liu et al. 2025, the advantage alone", scale="none")


def dynamic_sampling() -> None:
    """DAPO's (Yu et al. 2025, section 3.2): groups without signal are replaced by groups that have one."""
    train.sample_rollout = refilled_rollout


def refilled_rollout(
    config: train.Config, run: train.Run, tokenizer: Tokenizer, step: int, decoder: CapturedDecoder | None
) -> tuple[list[Problem], Rollout, dict[str, Tensor]]:
    """As many groups as ever, those with a signal first: prompts are sampled until these are enough, or MOST_ROUNDS
    rollouts have been. The log says how many it took, "rounds"."""
    problems, rollouts, rewards, signals = [], [], [], []
    while len(rollouts) < MOST_ROUNDS and sum(int(signal.sum()) for signal in signals) < config.prompts:
        number = step * MOST_ROUNDS + len(rollouts)
        asked, rollout, scored = sample_rollout(config, run, tokenizer, number, decoder)
        groups = scored["reward"].view(-1, config.group_size)
        signals.append((groups != groups[:, :1]).any(dim=1))
        problems += asked
        rollouts.append(rollout)
        rewards.append(scored)
    silent = ~torch.cat(signals)
    kept = silent.int().argsort(stable=True)[: config.prompts]
    rows = (kept[:, None] * config.group_size + torch.arange(config.group_size)).flatten()
    scored = {name: torch.cat([each[name] for each in rewards])[rows] for name in rewards[0]}
    scored["rounds"] = torch.full((len(rows),), float(len(rollouts)))
    return [problems[i] for i in kept.tolist()], joined(rollouts, rows, tokenizer.eos_id), scored


def joined(rollouts: list[Rollout], rows: Tensor, eos_id: int) -> Rollout:
    """These rows of several rollouts, counted through all of them, as one rollout."""
    width = max(rollout.tokens.shape[1] for rollout in rollouts)
    fill = {"tokens": eos_id}
    fields = {}
    for name in vars(rollouts[0]):
        parts = [getattr(rollout, name) for rollout in rollouts]
        if parts[0].dim() == 2:
            parts = [F.pad(part, (0, width - part.shape[1]), value=fill.get(name, 0)) for part in parts]
        fields[name] = torch.cat(parts)[rows.to(parts[0].device)]
    return Rollout(**fields)


def paid_by_step() -> None:
    """A reward with a hole: each step of a thought in the right format earns something, so that the model may think
    longer."""
    train.score = lambda *asked: with_steps(score(*asked), asked[-1], where="format")


def paid_by_right_step() -> None:
    """The hole closed: steps earn only where they lead to the right answer."""
    train.score = lambda *asked: with_steps(score(*asked), asked[-1], where="accuracy")


def with_steps(rewards: dict[str, Tensor], completions: list[str], where: str) -> dict[str, Tensor]:
    steps = torch.tensor([PAID_PER_STEP * text.count("#") for text in completions]) * rewards[where]
    return rewards | {"reward": rewards["reward"] + steps, "steps": steps}


VARIATIONS = {each.__name__: each for each in (mean_only, dynamic_sampling, paid_by_step, paid_by_right_step)}


def main(arguments: list[str]) -> None:
    name, *flags = arguments or [""]
    if name not in VARIATIONS:
        sys.exit(f"variations.py: name one of {', '.join(VARIATIONS)}, then flags of train.py")
    VARIATIONS[name]()
    train.main(flags, f"experiments/variations.py {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
