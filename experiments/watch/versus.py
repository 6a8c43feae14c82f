"""Is my loss better? Three seeds with a change and without it, from the same three base models: the
difference of every measure beside the noise of seeds, and a verdict in words.

    python -m experiments.watch.versus --variant mine          # a row that you added to VARIANTS
    python -m experiments.watch.versus --beta 0.05 --kl k2     # any flags of train.py
    python -m experiments.watch.versus --patch my.diff         # a change that no flag can make
    python -m experiments.watch.versus                         # what you edited since the last time
    python -m experiments.watch.versus --variant mine --both "--task signs"   # with other sizes

The first call makes the runs without the change, and keeps them: later calls reuse them. With the
change, each seed starts from the base model of its run without. Task, problems, sampling noise and
evaluation are the same, so a difference is taken seed by seed. All runs use a copy of the code that
is made at the start: edit on meanwhile. Stop it at any time; the same command goes on.

Without a flag, the change is what differs between this tree and the code of the kept runs. So call
it once before you edit a row in place, and once after. The picture needs matplotlib.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from experiments.study.study import Job, do
from experiments.watch.compare import cell, code_that_differs, mean, numbers, read_run
from experiments.watch.plot import STAGE
from kit.flags import command_line
from kit.run import ROOT

BOTH = "--preset tiny --steps 40 --eval_problems 200"
T95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
WORDS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}
HELD = (  # settings of the base model and of the evaluation: equal with the change and without
    *("task", "min_level", "max_level", "max_seq_len", "max_new_tokens", "device", "dtype"),
    *("n_layer", "n_head", "n_kv_head", "d_model", "d_ff"),
    *("pretrain_steps", "pretrain_tokens", "pretrain_lr"),
    *("eval_every", "eval_problems", "eval_samples", "seed", "init", "resume"),
)
PARSE = """
import dataclasses, json, sys, train
from kit import flags
config = flags.parse(train.Config, train.PRESETS, sys.argv[1:], train.__doc__, "versus")
print(json.dumps(dataclasses.asdict(config)))
"""

# ------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """A measure of the runs without the change and of the runs with it, seed by seed."""

    name: str
    without: list[float]
    changed: list[float]

    @property
    def by_seed(self) -> list[float]:
        return [two - one for one, two in zip(self.without, self.changed)]

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed)

    @property
    def margin(self) -> float:
        """Half the 95 % interval of the mean difference, by Student's t."""
        seeds = len(self.without)
        return T95[seeds] * statistics.stdev(self.by_seed) / seeds**0.5

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0. Without any change it does for one measure in 20."""
        return abs(self.mean) > self.margin


def measures(folder: Path) -> dict[str, float]:
    """The final evaluation of a run, and the mean of each field of its log, which tells how fast
    it learned. Seconds are no measure of a loss."""
    _, records, result = read_run(folder, STAGE)
    fields = dict.fromkeys(name for record in records for name in record)
    logged = {
        f"log {name}": mean(records, name)
        for name in fields
        if name not in ("stage", "step", "lr") and not name.endswith("_seconds")
    }
    return numbers(result["r1_zero"]) | logged


def differences(without: list[Path], changed: list[Path]) -> list[Difference]:
    """The difference of every measure that all runs have."""
    sides = [[measures(folder) for folder in folders] for folders in (without, changed)]
    found = []
    for name in sides[0][0]:
        if all(name in run for side in sides for run in side):
            found.append(Difference(name, *([run[name] for run in side] for side in sides)))
    return found


def table(found: list[Difference]) -> str:
    head = f"{'measure':28}{'without':>10}{'noise':>10}{'with':>10}{'difference':>12}{'margin':>10}"
    lines = [head]
    for each in found:
        said = "" if not each.clear else "  higher" if each.mean > 0 else "  lower"
        row = [statistics.mean(each.without), statistics.stdev(each.without)]
        cells = "".join(f"{cell(x):>10}" for x in (*row, statistics.mean(each.changed)))
        lines.append(f"{each.name:28}{cells}{each.mean:>+12.3g}{each.margin:>10.3g}{said}")
    return "\n".join(lines)


def verdict(found: list[Difference]) -> str:
    """What the runs say, in words: of the first measure, which is pass@1 where there is a rule, and
    of the others."""
    seeds, first = WORDS[len(found[0].without)], found[0]
    if not any(x for each in found for x in each.by_seed):
        return "The change changes nothing: every number of every seed is the same."
    by_seed = ", ".join(f"{100 * x:+.1f}" for x in first.by_seed)
    said = f"{first.name} {100 * first.mean:+.1f} points (by seed {by_seed})"
    margin = f"{100 * first.margin:.1f} points"
    if first.clear:
        kind = "Better" if first.mean > 0 else "Worse"
        said = f"{kind}: {said}, more than the noise of {seeds} seeds explains ({margin})."
    else:
        said = f"No difference that {seeds} seeds can show: {said}; it takes more than {margin}."
    others = [each for each in found[1:] if each.clear]
    names = ", ".join(f"{each.name} {'higher' if each.mean > 0 else 'lower'}" for each in others)
    by_chance = f"about {len(found) / 20:.0f} of {len(found)} measures would be so by chance"
    return f"{said}\nClear beside it: {names or 'nothing'} ({by_chance})."


def draw(path: Path, found: list[Difference], logs: dict[str, list[list[dict]]]) -> None:
    """Two panels: accuracy over the steps, a line for each run; and the differences of the shares
    of the evaluation, a dot for each seed and the interval of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    field = "accuracy" if "accuracy" in next(iter(logs.values()))[0][0] else "reward"
    figure, (curves, dots) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, (name, runs) in zip(("tab:gray", "tab:red"), logs.items()):
        for i, records in enumerate(runs):
            steps, values = zip(*((record["step"], record[field]) for record in records))
            label = None if i else name
            curves.plot(steps, values, color=color, alpha=0.8, linewidth=1, label=label)
    curves.set(title=f"{field} of the rollouts, a line for each seed", xlabel="step")
    curves.legend(fontsize="small")
    shares = [each for each in found if re.match("pass|maj|greedy|format|by_|beyond", each.name)]
    for row, each in enumerate(shares):
        points = [100 * x for x in each.by_seed]
        dots.plot(points, [row] * len(points), "o", color="tab:red", alpha=0.4)
        width = 100 * each.margin
        dots.errorbar(100 * each.mean, row, xerr=width, fmt="|", color="black", capsize=3)
    dots.axvline(0, color="tab:gray", linewidth=1)
    dots.set(title="with less without, and what noise explains", xlabel="points")
    dots.set_yticks(range(len(shares)), [each.name for each in shares])
    dots.invert_yaxis()
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


# ------------------------------------------------------------------------------- the code, the runs


def copy_code(folder: Path, patch: Path | None) -> str:
    """Copy what train.py runs into a new folder, with the patch applied. Returns a digest of it.
    Raises ValueError, in one line, if the patch does not apply."""
    for path in (path for wing in ("*.py", "data/*.py", "kit/*.py") for path in ROOT.glob(wing)):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    if patch:
        # Else git takes the repository around the copy for the place of the patch, and skips it.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())}
        elsewhere = [f"--exclude={each}" for each in ("tests/*", "experiments/*", "*.md")]
        command = ["git", "apply", *elsewhere, str(patch.resolve())]
        how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, **how)
        if done.returncode:
            reason = " ".join(done.stderr.split())[:200]
            raise ValueError(f"--patch {patch} does not apply to this tree ({reason})")
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:6]


def settings_of(code: Path, flags: list[str]) -> dict:
    """The configuration that these flags ask of this copy of train.py. A mistake in them ends the
    program with the line of train.py."""
    command = [sys.executable, "-c", PARSE, *flags]
    done = subprocess.run(command, cwd=code, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def check_held(one: dict, two: dict) -> None:
    """Raise ValueError, in one line, for a setting that both sides must share and do not."""
    for name in HELD:
        if one[name] != two[name]:
            reason = f"--{name} must be the same with the change and without"
            raise ValueError(f"{reason}, {one[name]!r}, not {two[name]!r}: put it into --both")


def slug(text: str) -> str:
    """The text as the name of a folder."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def seed_job(side: Path, seed: int, flags: list[str], needs: tuple[Job, ...] = ()) -> Job:
    """The run of one seed with the code of its side, from the base model of the run it needs."""
    run = side / f"seed{seed}"
    init = [f"--init={need.makes.parent / 'base.pt'}" for need in needs]

    def command() -> list[str]:
        program = str(side / "code" / "train.py")
        if (run / "last.pt").exists():
            return [program, f"--resume={run}"]
        return [program, *flags, f"--seed={seed}", f"--out={run}", *init]

    return Job(side, run.name, command, run / "result.json", needs, 1.0 if needs else 2.5)


def sides(out: Path, both: str, change: list[str], patch: Path | None) -> tuple[Path, Path | None]:
    """The folders of the runs without the change and with it, each with its copy of the code. There
    is no second one if neither a flag nor the code differs. Raises ValueError, in one line, for a
    change of what both sides must share."""
    folder = out.absolute() / slug(both)
    folder.mkdir(parents=True, exist_ok=True)
    without = folder / "without"
    with tempfile.TemporaryDirectory(dir=folder) as made:
        new, old = Path(made) / "changed", without
        digest = copy_code(new / "code", patch)
        if not without.exists():
            old = Path(made) / "without"
            copy_code(old / "code", None)
        changes = change or code_that_differs([old / "code", new / "code"])
        check_held(
            settings_of(old / "code", both.split()),
            settings_of(new / "code", [*both.split(), *change]),
        )
        name = slug(" ".join([patch.stem if patch else "", *change])) or "code"
        changed = folder / f"{name}-{digest}" if changes else None
        if old != without:
            old.rename(without)
        if changed and not changed.exists():
            new.rename(changed)
    return without, changed


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--patch", metavar="FILE", type=Path, help="a diff to apply for the change")
    add("--both", default=BOTH, metavar="FLAGS", help=f"flags of both sides [{BOTH!r}]")
    add("--seeds", type=int, default=3, choices=T95, help="seeds, from 3 to 10 [3]")
    add("--lanes", type=int, default=os.cpu_count() or 1, help="runs at a time [one a core]")
    add("--out", type=Path, default=Path("out/versus"), help="folder of the runs [out/versus]")
    args, change = parser.parse_known_args(arguments)
    if args.lanes < 1:
        parser.error("--lanes must be at least 1")
    if args.patch and not args.patch.is_file():
        parser.error(f"--patch {args.patch}: there is no such file")
    try:
        without, changed = sides(args.out, args.both, change, args.patch)
    except ValueError as error:
        parser.error(str(error))
    jobs = [seed_job(without, seed, args.both.split()) for seed in range(args.seeds)]
    if changed:
        flags = [*args.both.split(), *change]
        jobs += [seed_job(changed, seed, flags, (jobs[seed],)) for seed in range(args.seeds)]
    if not changed and all(job.makes.exists() for job in jobs):
        reason = "neither a flag nor the code differs from the runs that are kept"
        parser.error(f"{reason}: edit the code, or name flags of train.py or a --patch")
    do(jobs, min(args.lanes, len(jobs)))
    if not changed:
        advice = "make your change, and call this again"
        print(f"-> {without}: {advice} (if it is made: git diff > my.diff; --patch my.diff)")
        return
    report(args.seeds, without, changed)


def report(seeds: int, without: Path, changed: Path) -> None:
    """Print what was changed, the table and the verdict; draw the picture."""
    folders = [[side / f"seed{seed}" for seed in range(seeds)] for side in (without, changed)]
    found = differences(*folders)
    settings = [json.loads((side[0] / "config.json").read_text()) for side in folders]
    names = [name for name in settings[1] if name not in ("out", "init")]
    differing = [
        f"{name} {settings[0].get(name)} -> {settings[1][name]}"
        for name in names
        if settings[0].get(name) != settings[1][name]
    ]
    code = code_that_differs([side / "code" for side in (without, changed)])
    print(f"changed settings: {', '.join(differing) or 'none'}")
    print(f"changed code: {', '.join(code) or 'none'}", end="")
    print(f" (diff -r {without}/code {changed}/code)" if code else "")
    print(f"\n{table(found)}\n\n{verdict(found)}")
    if not importlib.util.find_spec("matplotlib"):
        print("no picture without matplotlib: pip install -r experiments/requirements.txt")
        return
    sides = zip((without, changed), folders)
    logs = {side.name: [read_run(run, STAGE)[1] for run in runs] for side, runs in sides}
    draw(changed / "versus.png", found, logs)
    print(f"-> {changed}/versus.png")


if __name__ == "__main__":
    main(sys.argv[1:])
