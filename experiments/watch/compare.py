"""Two runs side by side: what was set differently, how they ended, and what their logs say.

    python -m experiments.watch.compare out/chains-cpu-grpo-seed0 out/harder
    python -m experiments.watch.compare out/chains-cpu-grpo-seed0 out/harder --plot compare.png

--plot needs matplotlib: pip install -r experiments/requirements.txt. A run that is still going or
was stopped is compared as far as its log goes.
"""

import json
import sys
from pathlib import Path

from experiments.watch.plot import add_stage, check_picture, choose_curves, draw_curves, read_log
from kit.flags import command_line

LAST = 10  # log lines that count as the end of a run

Run = tuple[dict, list[dict], dict]  # settings, lines of the log, result (empty until it has ended)


def read_run(folder: Path, stage: str) -> Run:
    """A run's settings, log lines of a stage, and result. Raises ValueError, in one line, if the
    folder holds no run, or if the stage has not begun."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no config.json")
    records = read_log(folder, stage)
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    return json.loads((folder / "config.json").read_text()), records, result


def code_that_differs(folders: list[Path]) -> list[str]:
    """The names of the code files that are not equal in all folders, or missing in one."""

    def texts(name: str) -> set[str]:
        paths = [folder / name for folder in folders]
        return {path.read_text() if path.is_file() else "" for path in paths}

    found = {str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.py")}
    return [name for name in sorted(found) if len(texts(name)) > 1]


def mean(records: list[dict], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return sum(values) / len(values) if values else None


def cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: list[tuple[str, object, object]]) -> None:
    print(f"\n{title:36} {'A':>14} {'B':>14} {'B - A':>10}")
    for name, one, two in rows:
        numbers = isinstance(one, float) and isinstance(two, float)
        gap = f"{two - one:+.3g}" if numbers else ""
        print(f"{name:36} {cell(one):>14} {cell(two):>14} {gap:>10}".rstrip())


def numbers(metrics: dict) -> dict[str, float]:
    """All numbers of an evaluation by name; in a part of it, as "beyond 6" or "thinking
    in_steps"."""
    parts = [(name, part) for name, part in metrics.items() if isinstance(part, dict)]
    nested = {f"{name} {key}": x for name, part in parts for key, x in part.items()}
    return {name: x for name, x in (metrics | nested).items() if isinstance(x, float)}


def print_results(configs: list[dict], one: dict, two: dict) -> None:
    """Print the final evaluations and the times of two runs that have ended."""
    for name, what in (("eval_problems", "problems"), ("eval_samples", "completions a problem")):
        counts = [config.get(name) for config in configs]
        if counts[0] != counts[1]:
            print(f"\nevaluations differ in size: {counts[0]} {what} in A, {counts[1]} in B")
    for name in one:
        if isinstance(one[name], dict) and name in two:
            found, other = numbers(one[name]), numbers(two[name])
            title = name if name == "seconds" else f"{name}, held out"
            print_table(title, [(key, found.get(key), other.get(key)) for key in found | other])


def print_comparison(folders: list[Path], runs: list[Run], stage: str) -> None:
    (config, records, ended), (other_config, other_records, other_ended) = runs
    for letter, folder, (_, lines, result) in zip("AB", folders, runs):
        state = "" if result else "; the run has not ended"
        print(f"{letter}  {folder}, step {lines[-1]['step']} of {stage}{state}")
    if changed := code_that_differs(folders):
        command = f"diff {folders[0] / changed[0]} {folders[1] / changed[0]}"
        print(f"the code differs: {', '.join(changed)} ({command})")
    pairs = {name: (config.get(name), other_config.get(name)) for name in config | other_config}
    differing = [(name, a, b) for name, (a, b) in pairs.items() if name != "out" and a != b]
    print_table("what was set differently", differing)
    if ended and other_ended:
        print_results([config, other_config], ended, other_ended)
    fields = dict.fromkeys(name for record in (*records, *other_records) for name in record)
    fields = [name for name in fields if name not in ("stage", "step")]
    steps = min(len(records), len(other_records))  # how far both runs have come
    for start in dict.fromkeys((max(0, steps - LAST), 0)):  # the last steps, then all steps
        one, two = records[start:steps], other_records[start:steps]
        means = [(name, mean(one, name), mean(two, name)) for name in fields]
        print_table(f"log, mean over steps {one[0]['step']} to {one[-1]['step']}", means)


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("run", nargs=2, type=Path, help="folder of a run")
    add_stage(parser)
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw both runs' curves, as a PNG"
    )
    parser.add_argument("--curves", metavar="A,B,...", help="fields of the log to draw")
    args = parser.parse_args(arguments)
    check_picture(parser, "--plot", args.plot)
    try:
        runs = [read_run(folder, args.stage) for folder in args.run]
    except ValueError as error:
        parser.error(str(error))
    named = zip("AB", args.run, runs)
    logs = {f"{letter}  {folder.name}": records for letter, folder, (_, records, _) in named}
    curves = choose_curves(parser, args.curves, args.stage, list(logs.values()))
    print_comparison(args.run, runs, args.stage)
    if args.plot:
        draw_curves(args.plot, logs, curves)


if __name__ == "__main__":
    main(sys.argv[1:])
