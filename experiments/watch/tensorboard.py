"""The log of a run as TensorBoard events, for those who live there.

    python -m experiments.watch.tensorboard out/signs-cpu-grpo-seed0    # -> tensorboard/ in it

Each stage is a TensorBoard run of its own, each number of a log line a scalar at its step. Events
of an earlier call are replaced. Needs tensorboard: pip install tensorboard.
"""

import importlib.util
import sys
from pathlib import Path

from experiments.watch.page import read_lines
from kit.flags import command_line


def write_events(folder: Path) -> Path:
    """Write the log of a run as events, a folder for each stage. Returns the folder of all. Raises
    ValueError, in one line, if the folder holds no run."""
    from torch.utils.tensorboard import SummaryWriter

    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no log.jsonl")
    records, events = read_lines(folder / "log.jsonl"), folder / "tensorboard"
    if not records:
        raise ValueError(f"{folder} has logged nothing yet: wait for its first steps")
    for old in events.glob("*/events.out.tfevents.*"):
        old.unlink()
    for stage in dict.fromkeys(record["stage"] for record in records):
        with SummaryWriter(str(events / stage)) as writer:
            for record in records:
                if record["stage"] == stage:
                    numbers = {name: x for name, x in record.items() if isinstance(x, int | float)}
                    step = numbers.pop("step")
                    for name, x in numbers.items():
                        writer.add_scalar(name, x, step)
    return events


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run, finished or not")
    folders = parser.parse_args(arguments).run
    if not importlib.util.find_spec("tensorboard"):
        parser.error("this needs tensorboard: pip install tensorboard")
    try:
        for folder in folders:
            print(f"-> {write_events(folder)}")
    except ValueError as error:
        parser.error(str(error))
    print(f"look at it: tensorboard --logdir {folders[0] / 'tensorboard'}")


if __name__ == "__main__":
    main(sys.argv[1:])
