"""The search for a method's settings in RLHF: the same number of them for each method, on a seed
that is not reported.

    python -m experiments.study.rlhf_search --searched dpo --seed 10 --init out/RUN/base.pt

The rule: at the point of each path whose KL is nearest to --nats, the setting with most gold on
*seen* numbers is chosen. A path without a point within 10 % of --nats is out.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from kit import flags
from kit.run import Run, open_run
from rlhf import methods, reward_model
from rlhf.compare import nearest, path
from rlhf.methods import METHODS
from rlhf.reward_model import judge

TRIED = {  # learning rates and betas of each method
    "dpo": (("dpo_lr", "dpo_beta"), [(2e-4, 0.1), (2e-4, 0.2), (4e-4, 0.2)]),
    "ppo": (("ppo_lr", "ppo_beta"), [(3e-4, 0.05), (3e-4, 0.1), (6e-4, 0.1)]),
    "grpo": (("lr", "beta"), [(3e-4, 0.1), (3e-4, 0.2), (6e-4, 0.2)]),
}
WITHIN = 0.1  # of the KL at which methods are compared


@dataclass(frozen=True)
class Config(methods.Config):
    """Every knob of the comparison, and the method whose settings are searched."""

    searched: str = "dpo"  # method

    method: ClassVar = "search"
    CHOICES: ClassVar = methods.Config.CHOICES | {"searched": list(METHODS)}


def settings_of(name: str) -> list[dict[str, float]]:
    """The settings that are tried for a method."""
    knobs, tried = TRIED[name]
    return [dict(zip(knobs, values)) for values in tried]


def chosen(tried: list[dict], nats: float) -> dict | None:
    """The setting that the rule chooses, None where no path comes near."""
    close = [{"settings": x["settings"], **nearest(x["points"], nats)} for x in tried]
    near = [x for x in close if abs(x["kl"] - nats) <= WITHIN * nats]
    return max(near, key=lambda x: x["gold"], default=None)


def search(config: Config, run: Run) -> None:
    """What all start from; the method with each setting, and the points of its path."""
    at, tried = methods.start(config, run), []
    for number, settings in enumerate(settings_of(config.searched), 1):
        stage, how = f"{config.searched}_try{number}", replace(config, **settings)
        METHODS[config.searched](how, run, stage, at)
        walked = partial(path, how, run, stage, at.sft, judge(at.reward), held_out=False)
        found = run.once(stage, walked)
        tried.append({"settings": settings, **found})
    run.finish({"device": config.device, "seed": config.seed, config.searched: tried})
    print(f"\n{report(tried, config.nats)}\n\n{run.times()}")


def report(tried: list[dict], nats: float) -> str:
    """Each setting at the point of its path that is nearest to this KL, and the choice."""
    lines = [f"{'':32}{'step':>6}{'KL':>8}{'proxy':>8}{'gold':>8}    on seen numbers"]
    for each in tried:
        close = nearest(each["points"], nats)
        name = ", ".join(f"{knob} {value:g}" for knob, value in each["settings"].items())
        cells = "".join(f"{close[x]:8.2f}" for x in ("kl", "proxy", "gold"))
        lines.append(f"{name:32}{close['step']:6}{cells}")
    best = chosen(tried, nats)
    return "\n".join([*lines, f"chosen: {best['settings'] if best else 'none comes near'}"])


def main(arguments: list[str]) -> None:
    presets, program = reward_model.PRESETS, "-m experiments.study.rlhf_search"
    config = flags.parse(Config, presets, arguments, __doc__, "rlhf_search")
    with open_run(config, program) as run:
        search(config, run)


if __name__ == "__main__":
    main(sys.argv[1:])
