"""The numbers of the chapter on RLHF: results/rlhf.json from finished runs, and the tables of
rlhf/README.md from that file.

    python -m experiments.study.rlhf_tables --judged RUN RUN RUN     # of rlhf.reward_model
    python -m experiments.study.rlhf_tables --compared RUN RUN RUN   # of rlhf.compare
    python -m experiments.study.rlhf_tables --searched RUN RUN RUN   # of rlhf_search, a method each
    python -m experiments.study.rlhf_tables                          # the tables again
"""

import json
import sys
from pathlib import Path

from experiments.study.collect import (
    RESULTS,
    ROOT,
    cell,
    check_one_configuration,
    grid,
    made_here,
    made_on,
    spread,
    write_into_page,
)
from experiments.study.rlhf_search import TRIED, WITHIN, chosen
from kit.flags import command_line
from rlhf.compare import nearest
from rlhf.dpo import CHOOSING
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
PARTS = {  # what a model is measured by, beside chains: split and part of gold
    "gold, held-out numbers": ("held_out", "gold"),
    "gold, seen numbers": ("seen", "gold"),
    "true facts, held-out": ("held_out", "facts"),
    "mistakes, held-out": ("held_out", "mistakes"),
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
    check_one_configuration(folders, [settings for settings, _ in runs], free)
    return sorted(runs, key=lambda run: run[1]["seed"])


def rounded(x):
    """The same plain data, with numbers of four digits behind the point."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x


def without_samples(points: list[dict]) -> list[dict]:
    kept = ("step", "n", "kl", "proxy", "gold", "tokens")
    return [{name: at[name] for name in kept if name in at} for at in points]


def judged(folders: list[Path]) -> list[dict]:
    """What runs of rlhf.reward_model found."""
    runs = read_all(folders, "rlhf.reward_model")
    return [{x: result[x] for x in ("seed", "base", "sft", "agreement")} for _, result in runs]


def compared(folders: list[Path]) -> dict:
    """What runs of rlhf.compare found: a path for each stage, with samples of one."""
    runs, seeds = read_all(folders, "rlhf.compare"), []
    for _, result in runs:
        seed = {name: result[name] for name in ("seed", "sft", "costs", "best_of_n_close")}
        for stage in PUSHED:
            seed[stage] = without_samples(result[stage]["points"])
        for stage in METHODS:
            seed[f"{stage}_close"] = result[f"{stage}_close"]
        seed["seconds"] = {stage: result[stage]["seconds"] for stage in METHODS}
        seeds.append(seed | {"said": result[HACKED]["points"][-1]["said"]})
    how = runs[0][0]
    completions = how["steps"] * how["prompts"] * how["group_size"]
    asked = {"pairs": how["pairs"], "choosing": CHOOSING, "completions": completions}
    return {"nats": how["nats"], **asked, "seeds": seeds}


def searched(folders: list[Path]) -> dict:
    """What runs of rlhf_search found, of one seed: for each method the settings and their paths."""
    knobs = [knob for knobs, _ in TRIED.values() for knob in knobs]  # each search has its own
    free = (*OWN, "searched", *knobs)
    runs = read_all(folders, "experiments.study.rlhf_search", free)
    found = {"seed": runs[0][0]["seed"], "nats": runs[0][0]["nats"]}
    for settings, result in runs:
        if settings["seed"] != found["seed"]:
            raise ValueError(f"a search of seed {settings['seed']} beside one of {found['seed']}")
        tried = result[settings["searched"]]
        found[settings["searched"]] = [
            each | {"points": without_samples(each["points"])} for each in tried
        ]
    return found


# -------------------------------------------------------------------------------------- the tables


def of_seeds(seeds: list[dict]) -> str:
    told = ", ".join(str(each["seed"]) for each in seeds)
    return f"Seeds {told}, each with a base model and a judge of its own: mean (lowest to highest)."


def table_of_judges(results: dict) -> str:
    """How often a judge agrees with people, on four kinds of pairs."""
    names = {
        "gold": "gold itself",
        "reward": "reward model",
        "random": "the same from random weights",
        "length": "length alone",
    }
    rows = []
    judges = results["judged"]
    for kind in judges[0]["agreement"]:
        found = [each["agreement"][kind] for each in judges]
        rows.append([f"{kind} pairs", *(cell([x[name] for x in found]) for name in names)])
    below = f"`python -m rlhf.reward_model --seed SEED`. {of_seeds(judges)} {made_on(results)}"
    return grid(["agreement with people", *names.values()], rows, below)


def at_one_kl(results: dict) -> str:
    """Each method at the point of its path that is nearest to the KL of the comparison."""
    seeds, nats = results["compared"]["seeds"], results["compared"]["nats"]
    models = {
        "fine-tuned, the start": [{"kl": 0.0, **seed["sft"]} for seed in seeds],
        f"best of {seeds[0]['best_of_n_close']['n']}": [seed["best_of_n_close"] for seed in seeds],
        **{NAMES[name]: [seed[f"{name}_close"] for seed in seeds] for name in METHODS},
    }
    rows = []
    for name, each in models.items():
        cells = [spread([x["kl"] for x in each])]
        cells += [spread([x[split][part] for x in each]) for split, part in PARTS.values()]
        chains = [x["chains"] for x in each if "chains" in x]  # best of n is no model of its own
        rows.append([name, *cells, cell(chains) if chains else "-"])
    head = ["", "KL, nats", *PARTS, "chains right"]
    far = [
        f"{NAMES[name]} (seed {seed['seed']}, {seed[f'{name}_close']['kl']:.2f} nats)"
        for name in METHODS
        for seed in seeds
        if abs(seed[f"{name}_close"]["kl"] - nats) > WITHIN * nats
    ]
    told = f"Not within 10 % of the KL: {', '.join(far)}." if far else "All are within 10 % of it."
    below = f"`python -m rlhf.compare --seed SEED`, at {nats:g} nats. {told} {of_seeds(seeds)}"
    return grid(head, rows, f"{below} {made_on(results)}")


def costs(results: dict) -> str:
    """What each method holds and asks for."""
    found, seeds = results["compared"], results["compared"]["seeds"]
    held, sampled, pairs = seeds[0]["costs"], f"{found['completions']:,}", f"{found['pairs']:,}"
    asks = {
        "ppo": (sampled, pairs),
        "grpo": (sampled, pairs),
        "dpo": ("0", f"{found['pairs'] + found['choosing']:,}"),
        "best_of_n": ("n for each answer", pairs),
        "grpo by rules": ("as GRPO", "0"),
    }
    names = NAMES | {"best_of_n": "best of n", "grpo by rules": "GRPO by rules (R1-Zero)"}
    rows = []
    for name, x in held.items():
        took = [seed["seconds"].get(name) for seed in seeds]
        took = [seconds for seconds in took if seconds is not None]
        cells = [str(x["models"]), str(x["trained"]), f"{x['bytes'] / 1e6:.1f}", *asks[name]]
        rows.append([names[name], *cells, spread(took) if took else "-"])
    head = ["", "models held", "of them trained", "MB", "completions of the policy", "pairs judged"]
    below = "MB: float32 weights, gradients and AdamW's moments of these models, counted; no "
    below += "activations. A pair is two completions of the fine-tuned model; the reward model of "
    below += f"the other methods has learned from DPO's. {found['choosing']:,} more choose DPO's "
    below += "step, whose copy on disk is not counted. GRPO by rules has no reference here. "
    below += (
        "CPU seconds: one thread, without pairs and judge, with the looks of each stage (DPO's "
    )
    below += "are many)."
    return grid([*head, "CPU seconds"], rows, f"{below} {made_on(results)}")


def over_optimised(results: dict) -> str:
    """Gold on each path where the methods are compared, and where the path ends."""
    seeds, nats, rows = results["compared"]["seeds"], results["compared"]["nats"], []
    for stage, name in PUSHED.items():
        paths = [seed[stage] for seed in seeds]
        early, ends = [nearest(path, nats) for path in paths], [path[-1] for path in paths]
        cells = [spread([x[of] for x in early]) for of in ("gold", "kl")]
        cells += [spread([x[of] for x in ends]) for of in ("gold", "proxy", "kl")]
        rows.append([name, *cells])
    gold, proxy = (spread([seed["best_of_n"][0][x] for seed in seeds]) for x in ("gold", "proxy"))
    head = ["", f"gold near {nats:g} nats", "KL", "gold at the end", "judge's score", "KL"]
    below = f"Held-out numbers; at the start gold is {gold}, and the judge's score {proxy}."
    return grid(head, rows, f"{below} {of_seeds(seeds)} {made_on(results)}")


def table_of_the_search(results: dict) -> str:
    """The settings that were tried, at the KL of the comparison, on seen numbers."""
    search, nats, rows = results["searched"], results["searched"]["nats"], []
    for name in METHODS:
        best = chosen(search[name], nats)
        for each in search[name]:
            close = nearest(each["points"], nats)
            told = ", ".join(f"`{knob}` {value:g}" for knob, value in each["settings"].items())
            mark = "chosen" if best and each["settings"] == best["settings"] else ""
            numbers = (f"{close[x]:.2f}" for x in ("kl", "proxy", "gold"))
            rows.append([NAMES[name], told, str(close["step"]), *numbers, mark])
    head = ["", "settings", "step", "KL", "judge's score", "gold", ""]
    below = f"Seed {search['seed']}, seen numbers. {made_on(results)}"
    return grid(head, rows, below)


def samples(results: dict) -> str:
    """What the policy says that GRPO pushed without a KL, as a block of text."""
    seed, lines = results["compared"]["seeds"][0], ["```"]
    for each in seed["said"]:
        lines.append(each["prompt"].partition("\n")[0])
        lines.append(f"Assistant:{each['said']}")
        lines.append(f"           judge {each['proxy']:.2f}, gold {each['gold']:.1f}\n")
    end = seed[HACKED][-1]
    told = f"Seed {seed['seed']}, after {end['step']} steps, {end['kl']:.1f} nats."
    return "\n".join(lines).rstrip() + f"\n```\n\n{told} The first samples, none left out."


TABLES = {  # for each block of the page: the part of the results, and the function
    "judges": ("judged", table_of_judges),
    "one KL": ("compared", at_one_kl),
    "costs": ("compared", costs),
    "over-optimised": ("compared", over_optimised),
    "searched": ("searched", table_of_the_search),
    "hacked samples": ("compared", samples),
}


def comment(name: str) -> str:
    return f"{name}: made by experiments/study/rlhf_tables.py"


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    for flag, program in (
        ("--judged", "rlhf.reward_model"),
        ("--compared", "rlhf.compare"),
        ("--searched", "experiments.study.rlhf_search"),
    ):
        text = f"folders of finished runs of {program}, whose part is written anew"
        parser.add_argument(flag, nargs="+", type=Path, metavar="RUN", help=text)
    flags, file = parser.parse_args(arguments), RESULTS / "rlhf.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for read_part in (judged, compared, searched):
        if folders := getattr(flags, read_part.__name__):
            try:
                results[read_part.__name__] = rounded(read_part(folders))
            except ValueError as error:
                parser.error(str(error))
            results |= made_here()
    file.write_text(json.dumps(results) + "\n")
    for name, (part, table) in TABLES.items():
        if part in results:
            write_into_page(comment(name), table(results), [PAGE])
            print(table(results), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
