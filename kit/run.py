"""A run: its folder, its log, and stages that resume bit for bit where they were stopped.

    with open_run(config, "train.py") as run:
        for step in run.steps("base", 5000, model, optimizer=optimizer):
            ...
            run.log({"loss": loss})
        found = run.once("base", lambda: evaluate(model))
        run.finish({"base": found})

A stage is a loop over `run.steps`. All modules, optimizers and tensors that change in it are named
there. They are saved every few seconds, and restored when the run resumes. Everything else in a
stage must be a function of the seed and the step, so it need not be saved. A stage that has ended
has its model in <stage>.pt: `run.steps` then loads this file and yields no step. So a job of any
number of stages resumes by running again from its first line.

Only the model of an ended stage comes back. If a later stage needs more, `run.once` keeps it as
plain data, or it is a function of the models.
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
from unicodedata import east_asian_width

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kit import parallel
from kit.flags import refuse
from kit.parallel import rank_zero_only
from model import (
    check_weights,
    load_tensors,
    load_weights,
    one_line,
    save_model,
    save_tensors,
    write_whole,
)

try:
    import fcntl
except ImportError:  # on Windows nothing stops two processes from resuming one run
    fcntl = None

ROOT = Path(__file__).parent.parent
SAVE_EVERY = float(os.environ.get("SAVE_EVERY", 20))  # seconds between two saves; tests set 0
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
KEPT = ("ended", "results", "seconds", "kept", "stopped")  # attributes of a run in last.pt
State = dict[str, nn.Module | torch.optim.Optimizer | Tensor]  # the state of a stage, by name


class Run:
    """One run of a job, and its folder. The head of this file shows how a job uses it."""

    def __init__(self, config, program: str):
        self.config, self.program, self.sources = config, program, sources()
        self.folder = Path(os.path.normpath(config.out))
        self.ended: list[str] = []  # names of the ended stages
        self.results: dict[str, dict] = {}  # results of `once`, by name
        self.seconds: dict[str, float] = {}  # time of each stage, and time between stages
        self.stopped: dict = {}  # the unfinished stage in last.pt: its name, step and state
        self.kept = {"log.jsonl": 0, "looks.jsonl": 0}  # bytes of these files at the last save
        self.lines: dict[str, Lines] = {}  # these files, once they are open
        self.named: list[str] = []  # the stages that this process has reached
        self.saved_device = config.device
        self.begun = False  # whether this process writes to the folder
        self.saved = "nothing"  # what is saved, in words
        self.clock = self.saved_at = time.perf_counter()
        self.stage, self.step, self.bar = "", 0, None
        self.stepping, self.stop_asked = False, 0

    # ------------------------------------------------------------------------- what a job calls

    def steps(self, stage: str, count: int, model: nn.Module, **state) -> Iterator[int]:
        """Yield the steps of a stage that remain of `count`.

        `model` and `state` are restored before the first step, and saved every SAVE_EVERY seconds.
        A state of None is left out. The model is written to <stage>.pt at the end. Use each name of
        a stage once in a job, and do not leave its loop by `break`. Raises ValueError if last.pt
        has the state of another job, and if <stage>.pt is missing or damaged.
        """
        if stage in (*self.named, "last"):
            raise ValueError(f"{stage} names two stages, or is the name of last.pt")
        self.named.append(stage)
        if stage in self.ended:
            load_weights(self.folder / f"{stage}.pt", model)
            return
        named = {"model": model} | {name: x for name, x in state.items() if x is not None}
        first = self.restore(stage, count, named)
        self.begin()
        self.stage = stage
        self.say_saved({"stage": stage, "step": first})
        look = {"desc": stage, "bar_format": BAR, "dynamic_ncols": True, "disable": None}
        self.bar = tqdm(range(first, count), initial=first, total=count, **look)
        self.stepping = True  # until the end of the stage, a signal waits for the next save
        for step in self.bar:
            self.step = step
            yield step
            stop = self.stop_agreed()
            if stop or time.perf_counter() - self.saved_at > SAVE_EVERY:
                self.save({"stage": stage, "step": step + 1, "state": states(named)})
            if stop:
                raise KeyboardInterrupt(stop)
        parallel.copy_first(model)
        self.check_finite(states(named))
        self.write_model(f"{stage}.pt", model)
        self.ended.append(stage)
        self.book(stage)
        self.save()
        self.stepping = False
        if stop := self.stop_agreed():
            raise KeyboardInterrupt(stop)

    def once(self, name: str, make: Callable[[], dict]) -> dict:
        """The result of `make`, which a run computes once and then keeps: a dict of plain data, not
        empty. Raises ValueError within a stage, and if last.pt holds an unfinished stage."""
        if name not in self.results:
            if self.stopped or self.stepping:
                raise self.foreign(ValueError(f"{name!r} is asked for in the middle of a stage"))
            self.begin()
            self.results[name] = json.loads(json.dumps(make()))  # plain numbers: last.pt holds them
            self.save()
        return self.results[name]

    @rank_zero_only
    def log(self, record: dict) -> None:
        """Add a line to log.jsonl, with the current stage and step."""
        with self.writing():
            self.lines["log.jsonl"].add({"stage": self.stage, "step": self.step + 1, **record})

    @rank_zero_only
    def look(self, record: dict) -> None:
        """Add a line to looks.jsonl, with the current stage: the model's completions of a few
        problems."""
        with self.writing():
            self.lines["looks.jsonl"].add({"stage": self.stage, **record})

    def show(self, numbers: dict[str, float], keep: bool = False) -> None:
        """Show numbers beside the progress bar; with `keep`, also print them above it."""
        shown = "  ".join(f"{name} {x:.{2 if x < 10 else 1}f}" for name, x in numbers.items())
        self.bar.set_postfix_str(shown)
        if keep:
            self.bar.write(f"step {self.step + 1:4}  {shown}")

    def tell(self, text: str) -> None:
        """Print a line of text above the bar, without its middle if the terminal is too narrow."""
        self.bar.write(fit(" ".join(text.split()), shutil.get_terminal_size().columns))

    @rank_zero_only
    def write(self, name: str, text: str) -> None:
        """Write a file of the run's folder, whole or not at all."""
        with self.writing():
            write_whole(self.folder / name, text.encode())

    @rank_zero_only
    def write_model(self, name: str, model: nn.Module) -> None:
        """Write a model to a file of the run's folder, whole or not at all."""
        with self.writing():
            save_model(self.folder / name, model)

    def finish(self, result: dict) -> None:
        """Write result.json: the run has ended."""
        self.book("evaluation")
        seconds = self.seconds | {"total": sum(self.seconds.values())}
        self.write("result.json", json.dumps(result | {"seconds": seconds}, indent=2) + "\n")

    def times(self) -> str:
        """The seconds of the stages and their sum, in words."""
        each = (f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return f"{', '.join(each)}, together {sum(self.seconds.values()):.0f} s"

    # ---------------------------------------------------------------------- what last.pt holds

    @rank_zero_only
    def save(self, stopped: dict | None = None) -> None:
        """Write last.pt. The logs go to disk first, so that last.pt never counts a line that is
        lost. Raises FloatingPointError for a state that is not finite, and keeps the old file."""
        self.stopped = stopped or {}
        self.check_finite(self.stopped.get("state", {}))
        self.book(self.stopped.get("stage", "evaluation"))
        with self.writing():
            self.kept = {name: lines.flush() for name, lines in self.lines.items()}
        written = {name: getattr(self, name) for name in (*KEPT, "program", "sources")}
        written |= {"settings": asdict(self.config), "made_by": made_by(self.config)}
        with self.writing():
            save_tensors(self.folder / "last.pt", written)
        self.saved_at, self.saved_device = time.perf_counter(), self.config.device
        self.say_saved(self.stopped)

    def say_saved(self, stopped: dict) -> None:
        """Note in words what is saved: a step of a stage, or the end of a stage."""
        self.saved = f"the end of {self.ended[-1]}" if self.ended else "its start"
        if stopped:
            self.saved = f"step {stopped['step']} of {stopped['stage']}"

    def restore(self, stage: str, count: int, named: State) -> int:
        """Restore the state of a stopped stage. Returns the number of steps that were done."""
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

    def check_finite(self, state: dict) -> None:
        """Raise FloatingPointError for a state that is not finite."""
        for name, x in state.items():
            if not finite(x):
                raise FloatingPointError(
                    f"{self.stage} stopped at step {self.step + 1}: its {name} is NaN or infinite; "
                    "last.pt is from before; a lower learning rate may help"
                )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Wraps every write to the folder, so that its OSError differs from an OSError of the
        job."""
        try:
            yield
        except OSError as error:
            raise CannotWrite(f"{self.folder} cannot be written ({error.strerror})") from None

    def foreign(self, error: Exception) -> ValueError:
        return ValueError(f"{self.folder}/last.pt: not what a run saves ({one_line(error)})")

    def book(self, part: str) -> None:
        """Add the time since the last call to a part's."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.clock
        self.clock = now

    # -------------------------------------------------------------------- from open to close

    @rank_zero_only
    def check_new(self) -> None:
        """Raise ValueError if the folder of a new run exists already."""
        if os.path.lexists(self.folder):
            command = f": {self.command()}" if (self.folder / "last.pt").exists() else ""
            advice = f"{self.folder} exists: name another folder with --out, or move that one away"
            raise ValueError(advice + (f", or go on with it{command}" if command else ""))

    def begin(self) -> None:
        """Make the folder of a new run, whole or not at all, and never over another folder."""
        if self.begun:
            return
        if not self.lines and parallel.rank() == 0:
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
                self.check_new()  # another process may have made it
                if isinstance(error, OSError):
                    reason = f"--out {folder} cannot be made ({error.strerror})"
                    raise ValueError(f"{reason}: name another folder") from None
                raise
            self.folder = folder
        self.begun = True

    def fill_folder(self) -> None:
        for source in self.sources:
            (self.folder / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, self.folder / source)
        settings = {"program": self.program, **asdict(self.config)}
        settings = json.dumps(settings, indent=2) + "\n"
        write_whole(self.folder / "config.json", settings.encode())
        for name in self.kept:
            (self.folder / name).touch()
        self.open_lines()
        self.save()

    @rank_zero_only
    def open_lines(self) -> None:
        self.lines = {name: Lines(self.folder / name, kept) for name, kept in self.kept.items()}

    def resume(self) -> None:
        """Restore the run from its last save. Writes nothing. Raises ValueError, in one line, if
        the run could not go on to the result that it would have had."""
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
            for name in KEPT:
                if type(saved[name]) is not type(getattr(self, name)):
                    raise ValueError(f"{name} is {saved[name]!r}")
                setattr(self, name, saved[name])
            if set(self.kept) != {"log.jsonl", "looks.jsonl"}:
                raise ValueError(f"it counts on {', '.join(map(str, self.kept))}")
            for name, kept in self.kept.items():
                if type(kept) is not int or kept < 0:
                    raise ValueError(f"{kept!r} bytes of {name}")
            if not all(isinstance(source, str) for source in saved["sources"]):
                raise ValueError(f"sources is {saved['sources']!r}")
            self.sources = saved["sources"]
            for name, result in self.results.items():
                if not isinstance(result, dict) or not result:
                    raise ValueError(f"the result {name} is {result!r}")
            self.seconds = {name: float(x) for name, x in self.seconds.items()}
            self.say_saved(self.stopped)
        except (KeyError, TypeError, ValueError) as error:
            raise self.foreign(error) from None
        for source in saved["sources"]:
            ours, copy = ROOT / source, folder / source
            if not (copy.is_file() and ours.is_file() and copy.read_bytes() == ours.read_bytes()):
                advice = f"cp {shlex.join([source, str(copy)])}"
                reason = f"{source} is not the {copy} that the run began with"
                raise ValueError(f"{reason}: to go on with this code all the same, {advice}")
        self.open_lines()
        self.saved_device = saved["settings"]["device"]
        print(f"{folder}: going on after {self.saved}")
        if saved.get("made_by") != made_by(self.config):
            here = f"this is {made_by(self.config)}"
            print(f"it was saved by {saved.get('made_by')}, but {here}: bits may differ")

    def way_on(self) -> str:
        """What is saved and how to resume, to follow the reason of a stop; "" if nothing is
        saved."""
        return f"; {self.saved} is saved. To go on: {self.command()}" if self.begun else ""

    def command(self) -> str:
        """The command that resumes the run."""
        program = self.program
        if not program.startswith("-m "):
            program = shlex.quote(os.path.relpath(ROOT / program))
        device = ["--device", self.config.device]
        flags = [f"--resume={self.folder}", *device * (self.config.device != self.saved_device)]
        python = "python"
        if parallel.size() > 1:
            python = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
        return f"{python} {program} {shlex.join(flags)}"

    def stop_agreed(self) -> int:
        """The number of a signal that any process of the run has received, else 0."""
        return max(parallel.gather(self.stop_asked))

    def on_signal(self, number: int, frame: object) -> None:
        """Handle a signal. Within a stage, the first signal waits for the step to end and be saved.
        A second signal, or a signal between stages, ends the run at once."""
        if self.stop_asked or not self.stepping:
            raise KeyboardInterrupt(number)
        self.stop_asked = number
        # Not print, which the signal may have interrupted. The reader of stderr may be gone.
        with contextlib.suppress(OSError):
            told = b"\nstopping when this step is done (once more: at once)\n"
            os.write(sys.stderr.fileno(), told)


def fit(line: str, width: int) -> str:
    """The line, cut in the middle if it needs more than `width` columns. A Korean letter takes two
    columns."""
    start, end = line[: len(line) // 2], line[len(line) // 2 :]
    middle = ""
    while sum(1 + (east_asian_width(x) in "WF") for x in start + middle + end) > max(width, 5):
        middle = " ... "
        start, end = (start[:-1], end) if len(start) > len(end) else (start, end[1:])
    return start + middle + end


class CannotWrite(Exception):
    """The folder of a run cannot be written: a full disk, or the folder is gone."""


class Lines:
    """A file with a JSON record on each line. Lines after the first `kept` bytes were written after
    the last save. The resumed run writes them again, so new lines replace them. Raises ValueError
    if another process holds the file, or if the first `kept` bytes are not whole lines."""

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
        """Force all lines to disk. Returns the size of the file in bytes."""
        self.file.truncate()
        os.fsync(self.file.fileno())
        return self.file.tell()


def states(named: State) -> dict:
    """What last.pt keeps of modules, optimizers and tensors."""
    return {name: state_of(x) for name, x in named.items()}


def state_of(x: nn.Module | torch.optim.Optimizer | Tensor) -> dict | Tensor:
    if isinstance(x, torch.optim.Optimizer):
        moments = x.state_dict()["state"]  # param_groups come from the code, not from a file
        return {"moments": moments, "count": len(moments)}
    return x if isinstance(x, Tensor) else x.state_dict()


@torch.no_grad()
def set_state(
    name: str, x: nn.Module | torch.optim.Optimizer | Tensor, found: dict | Tensor
) -> None:
    """Load what `state_of` returned into x. Raises ValueError, or an error of torch, if `found` is
    not a state of x."""
    if not finite(found):
        raise ValueError(f"{name} holds numbers that are NaN or infinite")
    if isinstance(x, torch.optim.Optimizer):
        weights = [weight for group in x.param_groups for weight in group["params"]]
        moments, kinds = found["moments"], set()
        for i, kept in moments.items():  # load_state_dict does not check shapes
            kinds.add(tuple(kept))
            fits = (torch.Size(), weights[i].shape)
            shapes = all(m.shape == fits[key != "step"] for key, m in kept.items())
            if not shapes or {m.dtype for m in kept.values()} != {weights[i].dtype}:
                raise ValueError(f"{name} is not one of these weights")
        if len(moments) != found["count"] or len(kinds) > 1:
            raise ValueError(f"{name} is not whole")
        moments = {
            i: {key: m.contiguous() for key, m in kept.items()} for i, kept in moments.items()
        }
        x.load_state_dict({"state": moments, "param_groups": x.state_dict()["param_groups"]})
    elif isinstance(x, Tensor):
        if (found.shape, found.dtype) != (x.shape, x.dtype):
            raise ValueError(f"{name} has the shape {tuple(found.shape)} and {found.dtype}")
        x.copy_(found)
    else:
        check_weights(found, x)
        x.load_state_dict(found)


def finite(x: object) -> bool:
    if isinstance(x, dict):
        return all(map(finite, x.values()))
    return not isinstance(x, Tensor) or bool(x.isfinite().all())


def sources() -> list[str]:
    """The code of a run: the loaded files of this repository, without the tests."""
    root = ROOT.resolve()
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = {Path(path).resolve() for path in loaded if path and os.path.isfile(path)}
    ours = (path.relative_to(root) for path in paths if path.is_relative_to(root))
    return sorted(str(path) for path in ours if path.parts[0] not in ("tests", ".venv"))


def multiplies_in_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware. False if this is unknown: float32 always
    works."""
    there = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


def made_by(config) -> str:
    """The torch version, device and dtype, and how many processes. With the code, settings and
    seed, they decide every bit."""
    cuda = torch.device(config.device).type == "cuda"
    name = torch.cuda.get_device_name if cuda else lambda _: torch.backends.cpu.get_cpu_capability()
    dtype = "bfloat16" if config.in_bfloat16 else "float32"
    made_by = f"torch {torch.__version__} on {config.device} ({name(config.device)}) in {dtype}"
    return made_by + (f" by {parallel.size()} processes" if parallel.size() > 1 else "")


def set_up(config) -> None:
    """Set the threads and the determinism of torch, once, before a process computes anything.
    Raises ValueError, in one line, for a device that does not exist."""
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic or config.device.startswith("cpu"))
    torch.backends.cuda.enable_cudnn_sdp(False)  # slow here: it makes a plan for each new shape
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or deterministic products raise
    if config.cuda_graphs and not config.device.startswith("cuda") and not config.resume:
        raise ValueError(f"--cuda_graphs needs a CUDA device, and --device is {config.device}")
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = f"cannot be used here ({str(error).splitlines()[0]})"
        raise ValueError(f"--device {config.device} {reason}; --device cpu can") from None
    if config.dtype == "bfloat16" and not config.in_bfloat16:
        print(f"{config.device} has no fast bfloat16: matrix products will be in float32")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short. For a CPU, torch has no type of error for it."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "allocate memory" in str(error) or "not enough memory" in str(error)


@contextlib.contextmanager
def open_run(config, program: str) -> Iterator[Run]:
    """The run that a configuration asks for, new or resumed.

    `program` is the script that was started, or "-m package.module". An error before the run has
    begun ends the program with one line and status 2. A later signal, a full disk, too little
    memory and numbers that are not finite also end it with one line. It says what is saved and how
    to resume. Any other error of the job keeps its traceback.
    """
    run = Run(config, program)
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, run.on_signal) for number in signals}
    name = program.split()[1] if program.startswith("-m ") else program
    try:
        parallel.start(config.device)
        set_up(config)
        run.resume() if config.resume else run.check_new()
        parallel.gather(None)  # before a process writes, all have read
        yield run
        parallel.end()
    except KeyboardInterrupt as stop:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # a further signal must not cut the last line
        if run.begun:
            print(f"\nstopped{run.way_on()}", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or parallel.rank() > 0:  # only a traceback can be seen there
            raise
        advice = "run again with a lower --micro_batch or --prompts"
        sys.exit(f"{name}: {config.device} has too little memory: {advice}{run.way_on()}")
    except FloatingPointError as error:
        sys.exit(f"{name}: {error}")
    except BrokenPipeError:
        sys.exit(f"{name}: nobody reads its output any more{run.way_on()}")
    except parallel.Lost:
        sys.exit(f"{name}: another process of this run has stopped{run.way_on()}")
    except CannotWrite as error:
        sys.exit(f"{name}: {error}{run.way_on()}")
    except (ValueError, OSError) as error:
        if run.begun:
            raise  # a mistake in the job: it needs the traceback
        refuse(name, str(error))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for lines in run.lines.values():
            with contextlib.suppress(OSError):  # a full disk, which was reported before
                lines.file.close()
