"""A run as one page of HTML: its curves, and what the model says, look by look.

    python -m experiments.watch.page out/signs-cpu-grpo-seed0     # -> run.html, in this folder
    python -m experiments.watch.page out/RUN out/OTHER            # two runs side by side
    python -m experiments.watch.page out/RUN --watch              # again and again as the run goes

The page needs no package, server or network: open it in any browser. With --watch it is written
again whenever the run has logged something, and it reloads itself. It shows what the files of the
run hold: the curves of log.jsonl, the groups of looks.jsonl, token by token, and the answers of
samples.txt. Of a run of rlhf.compare it also shows the paths of result.json.
"""

import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data.signs import Signs
from experiments.study.pictures import BASE, CHANCE, DR_GRPO, GRPO, HACK, OTHER
from kit.flags import command_line
from model import write_whole

TEMPLATE = Path(__file__).with_suffix(".html")
EVERY = 3  # seconds between two looks of --watch at the files, and between two reloads
COLOURS = {"first": GRPO, "second": DR_GRPO, "up": GRPO, "down": HACK}  # what a colour stands for
COLOURS |= {"unsure": DR_GRPO, "entropy": CHANCE, "gold": OTHER, "proxy": HACK, "limit": BASE}
ANSWER = re.compile(r"^\[([^]:]+): ((?:accuracy \d|without a rule), format \d)\] ", re.MULTILINE)

SAID = ("prompt", "said", "proxy", "gold")  # of an answer at a point of a path


@dataclass(frozen=True)
class Panel:
    """Lines over the steps of a stage: the name of each field of the log, the first drawn solid.
    The panel is shown if a run has logged the first field."""

    title: str
    reading: str  # which question it answers, and how to read it
    fields: dict[str, str]


LEARNING = (  # of a stage with rewards
    Panel(
        "right answers, held out",
        "Does it learn the task? Held-out problems should rise with the training problems; if they "
        "stay behind, the model learned the problems.",
        {"held_out_accuracy": "held out", "accuracy": "training"},
    ),
    Panel(
        "tokens of a completion",
        "Does it think longer, and where does that help? If only wrong answers grow, length is "
        "padding.",
        {"completion_tokens": "all", "right_tokens": "right", "wrong_tokens": "wrong"},
    ),
    Panel(
        "tries of a completion",
        "Does it search? Above the dashed line it tries more often than any document that it has "
        "read.",
        {"tries": "tries"},
    ),
    Panel(
        "thoughts in steps",
        "Does it work the problem out? The share of held-out completions that work in steps.",
        {"in_steps": "share"},
    ),
    Panel(
        "gold and the judge's score",
        "Is what pays also good? If the reward rises and gold falls, the judge is hacked.",
        {"gold": "gold, held out", "reward": "reward, training"},
    ),
    Panel(
        "rules and judge",
        "Who pays? The mean reward by rules, and the mean score of the learned judge.",
        {"judge": "judge", "rules": "rules"},
    ),
    Panel(
        "entropy, nats a token",
        "Is there still something to explore? Near 0 the completions of a group are all alike.",
        {"entropy": "entropy"},
    ),
    Panel(
        "share of groups without signal",
        "How much of a step is wasted? A group that is all right or all wrong has no advantage and "
        "teaches nothing.",
        {"no_signal": "share"},
    ),
    Panel(
        "KL(policy, base), nats a token",
        "How far has it gone from the base model? The further, the more it may have forgotten.",
        {"base_kl": "KL"},
    ),
)
IMITATION = (  # of every other stage
    Panel(
        "loss",
        "Does it still learn? The loss falls fast, then slowly; at a flat end more steps add "
        "little.",
        {"loss": "loss"},
    ),
    Panel(
        "probability of true verdicts",
        'Can it check? The mean probability of "yes" and "no" in the documents; all are true.',
        {"verdict_prob": "probability"},
    ),
    Panel(
        "pairs in the right order",
        "Does it tell the better answer? At 0.5 it guesses, but a tie counts as wrong; noise in "
        "the choices keeps it from 1.",
        {"accuracy": "training", "held_out_accuracy": "held out"},
    ),
    Panel(
        "norm of the gradient",
        "Is it stable? Single peaks are harmless; a rise that stays is not.",
        {"grad_norm": "norm"},
    ),
)


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines. A last line that is half written is left out. Raises
    ValueError, in one line, for a line that no run wrote."""
    whole = path.read_bytes().split(b"\n")[:-1]
    try:
        records = [json.loads(line) for line in whole]
        if all({"stage", "step"} <= record.keys() for record in records):
            return records
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} has a line that no run of this version wrote")


def read_run(folder: Path) -> dict:
    """What the page shows of a run, as plain data. Raises ValueError, in one line, if the folder
    holds no run, a run of another version, or a run that has logged nothing yet."""
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not the folder of a run: it holds no {name}")
    log = read_lines(folder / "log.jsonl")
    if not log:
        raise ValueError(
            f"{folder} has logged nothing yet: wait for its first steps, then try again"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        looks = read_lines(folder / "looks.jsonl") if (folder / "looks.jsonl").is_file() else []
        names = dict.fromkeys(record["stage"] for record in (*log, *looks))
        stages = {name: {"curves": {}, "looks": []} for name in names}
        for name, stage in stages.items():
            stage |= curves_of([record for record in log if record["stage"] == name])
        pieces: dict[str, int] = {}
        for record in looks:
            found = [shown_problem(problem, pieces) for problem in record["problems"]]
            stages[record["stage"]]["looks"].append({"step": record["step"], "problems": found})
        result, samples = folder / "result.json", folder / "samples.txt"
        return {
            "name": folder.resolve().name,
            "settings": {name: config[name] for name in ("program", "task", "variant", "seed")},
            "stages": stages,
            "pieces": list(pieces),
            "samples": answers_in(samples.read_text()) if samples.is_file() else [],
            "paths": paths_of(json.loads(result.read_text())) if result.is_file() else {},
        }
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"its files are of another version ({type(error).__name__}: {error})"
        raise ValueError(f"{folder} cannot be shown: {reason}") from None


def curves_of(records: list[dict]) -> dict:
    """The panels of a stage, and for each field of them its finite points [step, value]."""
    panels = LEARNING if any("reward" in record for record in records) else IMITATION
    fields = {field for panel in panels for field in panel.fields}
    points = {
        field: [
            [record["step"], short(record[field])]
            for record in records
            if math.isfinite(record.get(field, math.nan))
        ]
        for field in fields
    }
    found = {field: line for field, line in points.items() if line}
    shown = [asdict(panel) for panel in panels if next(iter(panel.fields)) in found]
    return {"panels": shown, "curves": found}


def short(x: float) -> float:
    """A number to 4 significant digits: a page of megabytes opens slowly."""
    return float(f"{x:.4g}")


def shown_problem(problem: dict, pieces: dict[str, int]) -> dict:
    """A problem of a look for the page. Tokens become indices into `pieces`, which grows, and an
    advantage that is the same at all tokens becomes one number."""

    def shown(said: dict) -> dict:
        advantage = [short(x) for x in said["advantage"]]
        return {
            "tokens": [pieces.setdefault(piece, len(pieces)) for piece in said["tokens"]],
            "logps": [round(x, 3) for x in said["logps"]],
            "entropy": [round(x, 3) for x in said["entropy"]],
            "advantage": advantage[0] if len(set(advantage)) == 1 else advantage,
            "rewards": {name: short(x) for name, x in said["rewards"].items()},
            "measures": {name: short(x) for name, x in said["measures"].items()},
        }

    completions = [shown(said) for said in problem["completions"]]
    return {"prompt": problem["prompt"], "answer": problem["answer"], "completions": completions}


def answers_in(text: str) -> list[dict]:
    """The problems of samples.txt, and what each model says to them."""
    problems = []
    for block in re.split(r"\n\n(?=User: )", text.strip("\n")):
        prompt, *parts = ANSWER.split(block)
        said = zip(parts[::3], parts[1::3], parts[2::3])
        answers = [
            {"model": name, "score": score, "text": x.rstrip("\n")} for name, score, x in said
        ]
        problems.append({"prompt": prompt.rstrip("\n"), "said": answers})
    return problems


def paths_of(result: dict) -> dict[str, list[dict]]:
    """The paths of rlhf.compare: at each point the KL, the judge's score ("proxy") and gold on
    held-out requests, and what the model says there."""

    def shown(point: dict) -> dict:
        point = point | point.get("held_out", {})
        answers = [{x: said[x] for x in SAID} for said in point.get("said", [])]
        return {x: short(point[x]) for x in ("kl", "proxy", "gold")} | {"said": answers}

    paths = {name: x for name, x in result.items() if isinstance(x, dict) and "points" in x}
    return {name: [shown(point) for point in path["points"]] for name, path in paths.items()}


def page(runs: list[dict], reload: bool = False) -> str:
    """The page of these runs as HTML. Whatever a model said is data in it, never markup."""
    limits = {"tries": [Signs.most_tries, "most in any document"]}
    shown = {"runs": runs, "limits": limits, "reload": EVERY if reload else 0}
    shown["colours"] = {name: colour.removeprefix("tab:") for name, colour in COLOURS.items()}
    data = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return TEMPLATE.read_text().replace("{{data}}", data.replace("<", "\\u003c"))


def write_page(folders: list[Path], path: Path, reload: bool = False) -> None:
    write_whole(path, page([read_run(folder) for folder in folders], reload).encode())


def watch(folders: list[Path], path: Path) -> None:
    """Write the page whenever the runs have logged something, until all have ended. The last page
    no longer reloads itself, also after Ctrl-C."""
    seen = None
    try:
        while not all((folder / "result.json").exists() for folder in folders):
            files = [folder / name for folder in folders for name in ("log.jsonl", "looks.jsonl")]
            sizes = [file.stat().st_size for file in files if file.exists()]
            if sizes != seen:
                write_page(folders, path, reload=True)
                seen = sizes
            time.sleep(EVERY)
    except KeyboardInterrupt:
        pass
    write_page(folders, path)


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "run", nargs="+", type=Path, help="folder of a run, finished or not; or two"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="[run.html in the first folder]")
    parser.add_argument("--watch", action="store_true", help="write it again as the run goes")
    args = parser.parse_args(arguments)
    path = args.out or args.run[0] / "run.html"
    if len(args.run) > 2:
        parser.error("a page shows one run or two")
    try:
        write_page(args.run, path, args.watch)
        print(f"-> {path}", flush=True)
        if args.watch:
            watch(args.run, path)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
