"""A run: its folder, its log, and stages that go on where they were stopped, to the bit.

    with open_run(config, "train.py") as run:
        for step in run.steps("base", 5000, model, optimizer=optimizer):
            ...
            run.log({"loss": loss})
        found = run.once("base", lambda: evaluate(model))
        run.finish({"base": found})

A stage is a loop over `run.steps`. Whatever changes while it runs is named there: modules,
optimizers, tensors. They are saved every few seconds and restored when the run is resumed. All else
in a stage must be a function of the seed and the step: then nothing else has to be saved. A stage
that has ended left its model in <stage>.pt: `run.steps` then loads that file and yields no step. So
a job of any number of stages is resumed by calling it again from its first line.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kit.flags import refuse
from model import load_tensors, load_weights, one_line, save_model, save_tensors, write_whole

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes from going on with one run
    fcntl = None

ROOT = Path(__file__).parent.parent
SAVE_EVERY = float(os.environ.get("SAVE_EVERY", 20))  # seconds between two saves; tests set 0
State = dict[str, nn.Module | torch.optim.Optimizer | Tensor]  # what changes in a stage, by name


class Run:
    """One run of a job, and its folder. See the head of this file for how a job uses it."""

    def __init__(self, config, program: str):
        self.config, self.program = config, program
        self.folder = Path(os.path.normpath(config.out))
        self.ended: list[str] = []  # stages
        self.results: dict[str, dict] = {}  # of `once`
        self.seconds: dict[str, float] = {}  # of each stage, and of what lies between stages
        self.stopped: dict = {}  # the stage that last.pt is in the middle of: name, step and state
        self.kept = {"log.jsonl": 0, "looks.jsonl": 0}  # bytes of each that last.pt speaks of
        self.lines: dict[str, Lines] = {}  # these files, once they are open
        self.begun = False  # whether this process has anything of the folder in its hands
        self.saved = "nothing"
        self.clock = self.saved_at = time.perf_counter()
        self.stage, self.step, self.bar = "", 0, None
        self.stepping, self.stop_asked = False, 0

    # ------------------------------------------------------------------------- what a job calls

    def steps(self, stage: str, count: int, model: nn.Module, **state) -> Iterator[int]:
        """The steps of a stage that are still to do, of `count`.

        `model` and `state` are restored before the first step and saved as time goes by; a state of
        None is left out. The model goes to <stage>.pt at the end. A stage's name stands for it
        once in a job, and its loop is left by no `break`. Raises ValueError where last.pt holds
        another job's state.
        """
        path = self.folder / f"{stage}.pt"
        if stage in self.ended:
            load_weights(path, model)
            return
        named = {"model": model} | {name: x for name, x in state.items() if x is not None}
        first = self.restore(stage, count, named)
        self.begin()
        self.stage, self.saved = stage, f"step {first} of {stage}"
        look = {"desc": stage, "unit": "step", "dynamic_ncols": True, "disable": None}
        self.bar = tqdm(range(first, count), initial=first, total=count, **look)
        for step in self.bar:
            self.step, self.stepping = step, True
            yield step
            if self.stop_asked or time.perf_counter() - self.saved_at > SAVE_EVERY:
                self.save({"stage": stage, "step": step + 1, "state": states(named)})
            self.stepping = False
            if self.stop_asked:
                raise KeyboardInterrupt(self.stop_asked)
        save_model(self.folder / f"{stage}.pt", model)
        self.ended.append(stage)
        self.book(stage)
        self.save()

    def once(self, name: str, make: Callable[[], dict]) -> dict:
        """The plain data that `make` gives, made once in the life of the run."""
        if not self.stopped:
            self.begin()
        if name not in self.results:
            self.results[name] = json.loads(json.dumps(make()))  # plain numbers: last.pt holds them
            self.save()
        return self.results[name]

    def log(self, record: dict) -> None:
        """Add a line to log.jsonl, for the step of the stage that is under way."""
        self.lines["log.jsonl"].add({"stage": self.stage, "step": self.step + 1, **record})

    def look(self, record: dict) -> None:
        """Add a line to looks.jsonl: what the model of this step says to a few problems."""
        self.lines["looks.jsonl"].add({"stage": self.stage, "step": self.step + 1, **record})

    def show(self, numbers: dict[str, float], keep: bool = False) -> None:
        """Put numbers beside the bar; with `keep`, also on a line above it that stays."""
        shown = {name: f"{x:.2f}" for name, x in numbers.items()}
        self.bar.set_postfix(shown)
        if keep:
            words = "  ".join(f"{name} {x}" for name, x in shown.items())
            self.bar.write(f"step {self.step + 1:4}  {words}")

    def finish(self, result: dict) -> None:
        """Write result.json: the run has ended."""
        self.book("evaluation")
        seconds = self.seconds | {"total": sum(self.seconds.values())}
        text = json.dumps(result | {"seconds": seconds}, indent=2) + "\n"
        write_whole(self.folder / "result.json", text.encode())

    def times(self) -> str:
        each = (f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return f"{', '.join(each)}, together {sum(self.seconds.values()):.0f} s"

    # ---------------------------------------------------------------------- what last.pt holds

    def save(self, stopped: dict | None = None) -> None:
        """Bring last.pt up to date. The logs go to disk first: last.pt speaks of no line that is
        not there. Raises FloatingPointError for a state that is not finite: the last one stays."""
        self.stopped = stopped or {}
        for name, x in self.stopped.get("state", {}).items():
            if not finite(x):
                raise FloatingPointError(
                    f"{self.stage} stopped at step {self.step + 1}: its {name} is NaN or infinite; "
                    "last.pt is from before; a lower learning rate may help"
                )
        self.book(self.stopped.get("stage", "evaluation"))
        self.kept = {name: lines.flush() for name, lines in self.lines.items()}
        names = ("program", "ended", "results", "seconds", "kept", "stopped")
        written = {name: getattr(self, name) for name in names}
        written |= {"settings": asdict(self.config), "made_by": made_by(self.config)}
        save_tensors(self.folder / "last.pt", written)
        self.saved_at = time.perf_counter()
        if self.stopped:
            self.saved = f"step {self.stopped['step']} of {self.stopped['stage']}"
        elif self.ended:
            self.saved = f"the end of {self.ended[-1]}"

    def restore(self, stage: str, count: int, named: State) -> int:
        """Bring the state back to where the stage was stopped. Returns the steps that were done."""
        if not self.stopped:
            return 0
        try:
            step, found = self.stopped["step"], self.stopped["state"]
            if self.stopped["stage"] != stage:
                raise ValueError(f"it is in the stage {self.stopped['stage']!r}, not {stage!r}")
            if type(step) is not int or not 0 <= step <= count:
                raise ValueError(f"its step is {step!r}")
            if set(found) != set(named):
                raise ValueError(f"its state is {', '.join(found)}, not {', '.join(named)}")
            for name, x in named.items():
                set_state(name, x, found[name])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise self.foreign(error) from None
        self.stopped = {}
        return step

    def foreign(self, error: Exception) -> ValueError:
        return ValueError(f"{self.folder}/last.pt: not what a run saves ({one_line(error)})")

    def book(self, part: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.clock
        self.clock = now

    # -------------------------------------------------------------------- from open to close

    def check_new(self) -> None:
        """Raise ValueError where the folder of a new run is there already."""
        if os.path.lexists(self.folder):
            command = f": {self.command()}" if (self.folder / "last.pt").exists() else ""
            advice = f"{self.folder} exists: name another folder with --out, or move that one away"
            raise ValueError(advice + (f", or go on with it{command}" if command else ""))

    def begin(self) -> None:
        """Make the folder of a new run: whole or not at all, and in nobody's way."""
        if self.begun:
            return
        if not self.lines:
            folder = self.folder
            made = [path for path in folder.parents if not path.exists()]
            self.folder = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
            try:
                self.folder.mkdir(parents=True)
                self.fill_folder()
                self.folder.rename(folder)
            except BaseException as error:
                shutil.rmtree(self.folder, ignore_errors=True)
                for path in made:
                    with contextlib.suppress(OSError):
                        path.rmdir()
                self.folder = folder
                self.check_new()  # whoever was faster has it
                if isinstance(error, OSError):
                    reason = f"--out {folder} cannot be made ({error.strerror})"
                    raise ValueError(f"{reason}: name another folder") from None
                raise
            self.folder = folder
        self.begun = True

    def fill_folder(self) -> None:
        for source in sources(self.program):
            (self.folder / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, self.folder / source)
        settings = json.dumps(asdict(self.config), indent=2) + "\n"
        write_whole(self.folder / "config.json", settings.encode())
        for name in self.kept:
            (self.folder / name).touch()
        self.open_lines()
        self.save()

    def open_lines(self) -> None:
        self.lines = {name: Lines(self.folder / name, kept) for name, kept in self.kept.items()}

    def resume(self) -> None:
        """Take up the run as it was when it was last saved. Writes nothing. Raises ValueError, in
        one line, where it could not go on to what it would have become."""
        folder = self.folder
        if (folder / "result.json").exists():
            raise ValueError(f"{folder} has ended: what came of it is in result.json")
        if links := [path for path in folder.rglob("*") if path.is_symlink()]:
            reason = "a link, which could lead a run to write elsewhere: put a file in its place"
            raise ValueError(f"{links[0]} is {reason}")
        saved = load_tensors(folder / "last.pt", self.config.device)
        try:
            if saved["program"] != self.program:
                raise ValueError(f"{saved['program']} made it, and must go on with it")
            for name in ("ended", "results", "seconds", "kept", "stopped"):
                if type(saved[name]) is not type(getattr(self, name)):
                    raise ValueError(f"{name} is {saved[name]!r}")
                setattr(self, name, saved[name])
            for name, kept in self.kept.items():
                if type(kept) is not int or kept < 0:
                    raise ValueError(f"{kept!r} bytes of {name}")
            for name, result in self.results.items():
                if not isinstance(result, dict) or not result:
                    raise ValueError(f"the result {name} is {result!r}")
            self.seconds = {name: float(x) for name, x in self.seconds.items()}
            self.saved = f"the end of {self.ended[-1]}" if self.ended else "its start"
            if self.stopped:
                self.saved = f"step {self.stopped['step']} of {self.stopped['stage']}"
        except (KeyError, TypeError, ValueError) as error:
            raise self.foreign(error) from None
        for source in sources(self.program):
            copy = folder / source
            if not copy.is_file() or copy.read_bytes() != (ROOT / source).read_bytes():
                advice = f"cp {shlex.join([source, str(copy)])}"
                reason = f"{source} is not the {copy} that the run began with"
                raise ValueError(f"{reason}: to go on with this code all the same, {advice}")
        self.open_lines()
        print(f"{folder}: going on after {self.saved}")
        if saved.get("made_by") != made_by(self.config):
            here = f"this is {made_by(self.config)}"
            print(f"it was saved by {saved.get('made_by')}, and {here}: not the same to the bit")

    def command(self) -> str:
        """What a person types to go on."""
        program = self.program
        if not program.startswith("-m "):
            program = shlex.quote(os.path.relpath(ROOT / program))
        return f"python {program} {shlex.quote(f'--resume={self.folder}')}"

    def on_signal(self, number: int, frame: object) -> None:
        """The first signal lets the step end, so that it can be saved. A second one, or one between
        two stages, where all is saved, leaves at once."""
        if self.stop_asked or not self.stepping:
            raise KeyboardInterrupt(number)
        self.stop_asked = number
        with contextlib.suppress(OSError):  # whoever reads it may be gone; print may be at work
            os.write(2, b"\nstopping when this step is done (once more: at once)\n")


class Lines:
    """A file of JSON records, a line each. Lines behind the first `kept` bytes came after the last
    save: they go when the next is written, as the run writes them again. Raises ValueError where
    another process has the file, or where it does not hold what was kept."""

    def __init__(self, path: Path, kept: int):
        self.file = path.open("r+b")
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
        except BlockingIOError:
            advice = "wait for it, or stop it"
            raise ValueError(
                f"{path.parent} is being written by another process: {advice}"
            ) from None
        content = self.file.read(kept)
        if len(content) < kept or not (b"\n" + content).endswith(b"\n"):
            raise ValueError(f"{path} has lost lines, or was changed, since last.pt was saved")

    def add(self, record: dict) -> None:
        rounded = {
            name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in record.items()
        }
        self.file.write(json.dumps(rounded, ensure_ascii=False).encode() + b"\n")
        self.file.truncate()

    def flush(self) -> int:
        """Bring all lines to disk; returns their bytes."""
        self.file.truncate()
        os.fsync(self.file.fileno())
        return self.file.tell()


def states(named: State) -> dict:
    """What is saved of modules, optimizers and tensors."""
    return {name: state_of(x) for name, x in named.items()}


def state_of(x: nn.Module | torch.optim.Optimizer | Tensor) -> dict | Tensor:
    if isinstance(x, torch.optim.Optimizer):
        return x.state_dict()["state"]  # its groups are the code's
    return x if isinstance(x, Tensor) else x.state_dict()


def set_state(
    name: str, x: nn.Module | torch.optim.Optimizer | Tensor, found: dict | Tensor
) -> None:
    """Undo `state_of`. Raises ValueError, or whatever torch raises, for what is no state of x."""
    if not finite(found):
        raise ValueError(f"{name} holds numbers that are NaN or infinite")
    if isinstance(x, torch.optim.Optimizer):
        weights = [weight for group in x.param_groups for weight in group["params"]]
        like = {
            i: {"step": (), "exp_avg": w.shape, "exp_avg_sq": w.shape}
            for i, w in enumerate(weights)
        }
        # load_state_dict looks at no shape.
        if found and {i: shapes(kept) for i, kept in found.items()} != like:
            raise ValueError(f"{name} is not one of these weights")
        moments = {i: {key: m.contiguous() for key, m in kept.items()} for i, kept in found.items()}
        x.load_state_dict({"state": moments, "param_groups": x.state_dict()["param_groups"]})
    elif isinstance(x, Tensor):
        if shapes(found) != x.shape:
            raise ValueError(f"{name} has the shape {shapes(found)}")
        x.copy_(found)
    else:
        x.load_state_dict(found)


def shapes(x: dict | Tensor):
    return {name: y.shape for name, y in x.items()} if isinstance(x, dict) else x.shape


def finite(x: object) -> bool:
    if isinstance(x, dict):
        return all(map(finite, x.values()))
    return not isinstance(x, Tensor) or bool(x.isfinite().all())


def sources(program: str) -> list[str]:
    """The files that a run keeps as it ran with them: the rooms, and the package of its program."""
    folders = ["", "data/", "kit/"]
    if program.startswith("-m "):
        folders.append(program.split()[1].rpartition(".")[0].replace(".", "/") + "/")
    paths = (path for folder in folders for path in sorted(ROOT.glob(f"{folder}*.py")))
    return [str(path.relative_to(ROOT)) for path in paths]


def multiplies_in_bfloat16(device: str) -> bool:
    """Whether it does so in hardware; where that cannot be known, float32 is what always works."""
    there = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


def made_by(config) -> str:
    """What decides the bits, beside the code, the settings and the seed."""
    cuda = torch.device(config.device).type == "cuda"
    name = torch.cuda.get_device_name if cuda else lambda _: torch.backends.cpu.get_cpu_capability()
    dtype = "bfloat16" if config.in_bfloat16 else "float32"
    return f"torch {torch.__version__} on {config.device} ({name(config.device)}) in {dtype}"


def set_up(config) -> None:
    """What a process sets once, before it computes anything. Raises ValueError, in one line, for a
    device that is not there."""
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic or config.device.startswith("cpu"))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or matrix products on a GPU refuse
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = f"cannot be used here ({str(error).splitlines()[0]})"
        raise ValueError(f"--device {config.device} {reason}; --device cpu can") from None
    if config.dtype == "bfloat16" and not config.in_bfloat16:
        print(f"{config.device} has no fast bfloat16: matrix products will be in float32")


@contextlib.contextmanager
def open_run(config, program: str = "train.py") -> Iterator[Run]:
    """The run that a configuration asks for, new or resumed.

    `program` is how it is started: a script of the root, or "-m package.module". What is wrong
    before the run has begun ends the program with one line and status 2; what ends it later, with
    one line that says what is saved and how to go on.
    """
    run = Run(config, program)
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, run.on_signal) for number in signals}
    name = program.split()[1] if program.startswith("-m ") else program
    try:
        set_up(config)
        run.resume() if config.resume else run.check_new()
        yield run
    except KeyboardInterrupt as stop:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # once more says nothing more
        if run.begun:
            print(f"\nstopped; {run.saved} is saved. To go on: {run.command()}", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except torch.OutOfMemoryError:
        advice = "run again with a lower --micro_batch or --prompts"
        reason = f"{config.device} has too little memory: {advice}"
        sys.exit(f"{name}: {reason}. {run.saved} is saved. To go on: {run.command()}")
    except FloatingPointError as error:
        sys.exit(f"{name}: {error}")
    except BrokenPipeError:
        reason = "what it prints is not read any more"
        sys.exit(f"{name}: {reason}. {run.saved} is saved. To go on: {run.command()}")
    except (ValueError, OSError) as error:
        if not run.begun:
            refuse(name, str(error))
        if isinstance(error, ValueError):
            raise
        reason = f"{run.folder} cannot be written ({error.strerror})"
        sys.exit(f"{name}: {reason}. {run.saved} is saved. To go on, once it can: {run.command()}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for lines in run.lines.values():
            with contextlib.suppress(OSError):  # of a line that did not fit the disk: it was said
                lines.file.close()
