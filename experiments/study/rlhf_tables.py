"""The numbers of the chapter on RLHF: results/rlhf.json from finished runs, and the tables of
rlhf/README.md from that file.

    python -m experiments.study.rlhf_tables --judges RUN RUN RUN --compared RUN RUN RUN \\
        --searched RUN RUN RUN
    python -m experiments.study.rlhf_tables     # the tables again, from results/rlhf.json

Judges are runs of rlhf.reward_model, compared are runs of rlhf.compare, searched are runs of
experiments.study.rlhf_search.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from experiments.study.collect import RESULTS, ROOT, cell, grid, made_on, processor, write_into_page
from experiments.study.rlhf_search import WITHIN, chosen
from experiments.study.search import spread
from kit.flags import command_line
from rlhf.compare import nearest
from rlhf.methods import METHODS

PAGE = ROOT / "rlhf" / "README.md"
NAMES = {"dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
PUSHED = {  # stages of rlhf.compare, as the pages call them
    "best_of_n": "best of n",
    "dpo": "DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "grpo_free": "GRPO, no KL",
    "grpo_fewer": "GRPO, no KL, a judge of a quarter of the pairs",
    "grpo_rule": "GRPO, no KL, a rule mixed in",
}
HACKED = "grpo_free"  # the stage whose samples are shown
OWN = ("seed", "out", "init")  # settings of each run


# ---------------------------------------------------------------------------------- from the runs


def read(folder: Path, program: str) -> tuple[dict, dict]:
    """The settings and the result of a finished run. Raises ValueError, in one line, for a folder
    that holds none, or the run of another program."""
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} is not the folder of a finished run: it holds no result.json")
    settings = json.loads((folder / "config.json").read_text())
    if settings.pop("program") != f"-m {program}":
        raise ValueError(f"{folder} was not made by python -m {program}")
    return settings, json.loads((folder / "result.json").read_text())


def read_all(folders: list[Path], program: str, free: tuple[str, ...] = OWN) -> list[tuple]:
    """`read` of runs that differ in nothing but the settings in `free`, by seed. Raises ValueError,
    in one line, for others."""
    runs = [read(folder, program) for folder in folders]
    for folder, (settings, _) in zip(folders, runs):
        first = runs[0][0]
        if differing := [x for x in settings if x not in free and settings[x] != first[x]]:
            raise ValueError(f"{folder} differs from {folders[0]} in {', '.join(differing)}")
    return sorted(runs, key=lambda run: run[1]["seed"])


def rounded(x):
    """The same plain data, with numbers of four digits behind the point."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x


def without_samples(points: list[dict]) -> list[dict]:
    return [{name: value for name, value in at.items() if name != "said"} for at in points]


def published(judges: list[Path], compared: list[Path], searched: list[Path]) -> dict:
    """What results/rlhf.json holds. Raises ValueError, in one line, for runs that do not belong
    together."""
    trained = read_all(judges, "rlhf.reward_model")
    pushed = read_all(compared, "rlhf.compare")
    tried = read_all(searched, "experiments.study.rlhf_search", (*OWN, "searched"))
    settings, seeds = pushed[0][0], []
    for _, result in pushed:
        seed = {name: result[name] for name in ("seed", "sft", "costs")}
        for stage in (*METHODS, HACKED):
            seed[f"{stage}_end"] = result[stage]["points"][-1]["said"]
        for stage in PUSHED:
            seed[stage] = without_samples(result[stage]["points"])
        seed["seconds"] = {stage: result[stage]["seconds"] for stage in METHODS}
        for stage in METHODS:
            seed[f"{stage}_close"] = result[f"{stage}_close"]
        seeds.append(seed | {"dpo_chosen": without_samples([result["dpo_chosen"]])[0]})
    search = {"seed": tried[0][1]["seed"]}
    for _, result in tried:
        for name in METHODS.keys() & result.keys():
            search[name] = [x | {"points": without_samples(x["points"])} for x in result[name]]
    found = {
        "hardware": processor(),
        "torch": version("torch"),
        "nats": settings["nats"],
        "completions": settings["steps"] * settings["prompts"] * settings["group_size"],
        "pairs": settings["pairs"],
        "judges": [
            {name: result[name] for name in ("seed", "base", "sft", "agreement")}
            for _, result in trained
        ],
        "seeds": seeds,
        "search": search,
    }
    return rounded(found)


# -------------------------------------------------------------------------------------- the tables


def of_seeds(results: dict) -> str:
    told = ", ".join(str(each["seed"]) for each in results["seeds"])
    return f"Seeds {told}, each with a base model and a judge of its own: mean (lowest to highest)."


def judges(results: dict) -> str:
    """How often a judge agrees with people, on four kinds of pairs."""
    names = {
        "gold": "gold itself",
        "reward": "reward model",
        "random": "the same from random weights",
        "length": "length alone",
    }
    rows = []
    for kind in results["judges"][0]["agreement"]:
        found = [each["agreement"][kind] for each in results["judges"]]
        rows.append([f"{kind} pairs", *(cell([x[name] for x in found]) for name in names)])
    below = f"`python -m rlhf.reward_model --seed SEED`. {of_seeds(results)} {made_on(results)}"
    return grid(["agreement with people", *names.values()], rows, below)


def at_one_kl(results: dict) -> str:
    """Each method at the point of its path that is nearest to the KL of the comparison."""
    seeds, nats = results["seeds"], results["nats"]
    picks = [nearest(seed["best_of_n"], nats) for seed in seeds]
    models = {
        "fine-tuned, the start": [{"kl": 0.0, **seed["sft"]} for seed in seeds],
        f"best of {picks[0]['n']}": [{"kl": x["held_out"]["kl"], **x} for x in picks],
        **{NAMES[name]: [seed[f"{name}_close"] for seed in seeds] for name in METHODS},
    }
    rows = []
    for name, each in models.items():
        numbers = [[x["kl"] for x in each]]
        numbers += [[x[split]["gold"] for x in each] for split in ("held_out", "seen")]
        if "facts" in each[0]["held_out"]:
            numbers.append([x["held_out"]["facts"] for x in each])
            numbers.append([x["held_out"]["mistakes"] for x in each])
        cells = [spread(x) for x in numbers] + ["-"] * (5 - len(numbers))
        chains = cell([x["chains"] for x in each]) if "chains" in each[0] else "-"
        rows.append([name, *cells, chains])
    head = ["", "KL, nats", "gold, held-out numbers", "gold, seen numbers"]
    head += ["true facts", "mistakes", "chains right"]
    far = [
        f"{NAMES[name]} (seed {seed['seed']}, {seed[f'{name}_close']['kl']:.2f} nats)"
        for name in METHODS
        for seed in seeds
        if abs(seed[f"{name}_close"]["kl"] - nats) > WITHIN * nats
    ]
    told = f"Not within 10 % of the KL: {', '.join(far)}." if far else "All are within 10 % of it."
    below = f"`python -m rlhf.compare --seed SEED`, at {nats:g} nats. {told} {of_seeds(results)}"
    return grid(head, rows, f"{below} {made_on(results)}")


def costs(results: dict) -> str:
    """What each method holds and asks for."""
    held, steps = results["seeds"][0]["costs"], results["completions"]
    judged = results["pairs"]
    asks = {
        "ppo": (f"{steps:,}", f"{judged:,}"),
        "grpo": (f"{steps:,}", f"{judged:,}"),
        "dpo": ("0", f"{judged:,}"),
        "best_of_n": ("n for each answer", f"{judged:,}"),
        "grpo by rules": ("as GRPO", "0"),
    }
    names = NAMES | {"best_of_n": "best of n", "grpo by rules": "GRPO by rules (R1-Zero)"}
    rows = []
    for name, x in held.items():
        took = [seed["seconds"].get(name) for seed in results["seeds"]]
        took = [seconds for seconds in took if seconds is not None]
        cells = [str(x["models"]), str(x["trained"]), f"{x['bytes'] / 1e6:.1f}", *asks[name]]
        rows.append([names[name], *cells, spread(took) if took else "-"])
    head = ["", "models held", "of them trained", "MB", "completions sampled", "pairs judged"]
    below = "MB: float32 weights, gradients and AdamW's moments of these models, counted."
    below += " No activations. GRPO by rules has no reference here."
    return grid([*head, "CPU seconds"], rows, f"{below} {made_on(results)}")


def over_optimised(results: dict) -> str:
    """Where gold is highest on each path, and where the path ends."""
    seeds, rows = results["seeds"], []
    for stage, name in PUSHED.items():
        paths = [[at["held_out"] for at in seed[stage]] for seed in seeds]
        best = [max(path, key=lambda at: at["gold"]) for path in paths]
        ends = [path[-1] for path in paths]
        cells = [spread([x["gold"] for x in best]), spread([x["kl"] for x in best])]
        cells += [spread([x[of] for x in ends]) for of in ("gold", "proxy", "kl")]
        rows.append([name, *cells])
    start = spread([seed["best_of_n"][0]["held_out"]["gold"] for seed in seeds])
    head = ["", "most gold", "at a KL of", "gold at the end", "judge's score", "KL"]
    below = f"Held-out numbers; at the start gold is {start}, and the judge's score about 0."
    return grid(head, rows, f"{below} {of_seeds(results)} {made_on(results)}")


def searched(results: dict) -> str:
    """The settings that were tried, at the KL of the comparison, on seen numbers."""
    search, nats, rows = results["search"], results["nats"], []
    for name in METHODS:
        best = chosen(search[name], nats)
        for each in search[name]:
            close = nearest(each["points"], nats, "seen")
            told = ", ".join(f"`{knob}` {value:g}" for knob, value in each["settings"].items())
            mark = "chosen" if best and each["settings"] == best["settings"] else ""
            numbers = (f"{close['seen'][x]:.2f}" for x in ("kl", "proxy", "gold"))
            rows.append([NAMES[name], told, str(close["step"]), *numbers, mark])
    head = ["", "settings", "step", "KL", "judge's score", "gold", ""]
    below = f"Seed {search['seed']}, seen numbers. {made_on(results)}"
    return grid(head, rows, below)


def samples(results: dict) -> str:
    """What the policy says that GRPO pushed without a KL, as a block of text."""
    seed, lines = results["seeds"][0], ["```"]
    for each in seed[f"{HACKED}_end"]:
        lines.append(each["prompt"].partition("\n")[0])
        lines.append(f"Assistant:{each['said']}")
        lines.append(f"           judge {each['proxy']:.2f}, gold {each['gold']:.1f}\n")
    end = seed[HACKED][-1]
    told = f"Seed {seed['seed']}, after {end['step']} steps, {end['held_out']['kl']:.1f} nats."
    return "\n".join(lines).rstrip() + f"\n```\n\n{told} The first samples, none left out."


TABLES = {
    "judges": judges,
    "one KL": at_one_kl,
    "costs": costs,
    "over-optimised": over_optimised,
    "searched": searched,
    "hacked samples": samples,
}


def comment(name: str) -> str:
    return f"{name}: made by experiments/study/rlhf_tables.py"


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    for flag, program in (
        ("--judges", "rlhf.reward_model"),
        ("--compared", "rlhf.compare"),
        ("--searched", "experiments.study.rlhf_search"),
    ):
        text = f"folders of finished runs of {program}"
        parser.add_argument(flag, nargs="+", type=Path, default=[], metavar="RUN", help=text)
    flags = parser.parse_args(arguments)
    folders = flags.judges, flags.compared, flags.searched
    if any(folders) and not all(folders):
        parser.error("give --judges, --compared and --searched together, or none of them")
    if any(folders):
        try:
            results = published(*folders)
        except ValueError as error:
            parser.error(str(error))
        (RESULTS / "rlhf.json").write_text(json.dumps(results) + "\n")
    results = json.loads((RESULTS / "rlhf.json").read_text())
    for name, table in TABLES.items():
        write_into_page(comment(name), table(results), [PAGE])
        print(table(results), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
