"""Two runs side by side: what was set differently, how they ended, and what their logs say.

    python experiments/compare.py out/cpu-grpo-seed0 out/harder
    python experiments/compare.py out/cpu-grpo-seed0 out/harder --plot compare.png   # needs matplotlib

A run that is still going, or that stopped, is compared as far as its log goes.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds experiments/

from experiments.plot import check_picture, choose_curves, draw_curves, read_log

LAST = 10  # steps

Run = tuple[dict, list[dict], dict]  # configuration, GRPO lines of the log, result (empty where it has not ended)


def read_run(folder: Path) -> Run:
    """Raises ValueError, in one line, where the folder is not that of a run, or GRPO has not begun."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no config.json")
    records = read_log(folder)
    result = folder / "result.json"
    ended = json.loads(result.read_text()) if result.is_file() else {}
    return json.loads((folder / "config.json").read_text()), records, ended


def code_that_differs(folders: list[Path]) -> list[str]:
    def texts(name: str) -> set[str]:
        return {(folder / name).read_text() if (folder / name).is_file() else "" for folder in folders}

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
        print(f"{name:36} {cell(one):>14} {cell(two):>14} {f'{two - one:+.3g}' if numbers else '':>10}".rstrip())


def print_comparison(folders: list[Path], runs: list[Run]) -> None:
    (config, records, ended), (other_config, other_records, other_ended) = runs
    for letter, folder, run in zip("AB", folders, runs):
        print(f"{letter}  {folder}, {len(run[1])} of {run[0]['steps']} steps of GRPO")
    if changed := code_that_differs(folders):
        print(f"the code differs too: {', '.join(changed)} (diff {folders[0] / changed[0]} {folders[1] / changed[0]})")
    names = [name for name in config | other_config if name != "out" and config.get(name) != other_config.get(name)]
    print_table("what was set differently", [(name, config.get(name), other_config.get(name)) for name in names])
    if ended and other_ended:
        for model, title in (("base", "base model, held out"), ("r1_zero", "R1-Zero, held out")):
            one, two = ended[model], other_ended[model]
            print_table(title, [(name, one[name], two.get(name)) for name in one if isinstance(one[name], float)])
    fields = [name for name in records[-1] | records[0] | other_records[0] if name not in ("phase", "step")]
    steps = min(len(records), len(other_records))  # those that both have taken
    for first in (max(1, steps - LAST + 1), 1):
        part = slice(first - 1, steps)
        rows = [(name, mean(records[part], name), mean(other_records[part], name)) for name in fields]
        print_table(f"log, mean over steps {first} to {steps}", rows)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs=2, type=Path, help="folder of a run")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw their curves, as a PNG")
    parser.add_argument("--curves", metavar="A,B,...", help="fields of the log to draw")
    args = parser.parse_args(arguments)
    check_picture(parser, "--plot", args.plot)
    try:
        runs = [read_run(folder) for folder in args.run]
    except ValueError as error:
        parser.error(str(error))
    logs = {f"{letter}  {folder.name}": records for letter, folder, (_, records, _) in zip("AB", args.run, runs)}
    curves = choose_curves(parser, args.curves, "grpo", list(logs.values()))
    print_comparison(args.run, runs)
    if args.plot:
        draw_curves(args.plot, logs, curves)


if __name__ == "__main__":
    main(sys.argv[1:])
