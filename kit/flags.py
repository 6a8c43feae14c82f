"""Any frozen dataclass as a command line.

Each field is a flag, with the field's default, and the comment behind the field is its help. The
class has CHOICES, the values that a field can take; NAMES, what the text of a field may name;
RANGES, the bounds of a number; and UNUSED, the fields that are no flags of this program.
"""

import argparse
import inspect
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, get_args

import torch

from kit import parallel
from model import load_tensors, one_line

COMMENTED = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
MOST = {int: 2**31 - 1, float: 1e30}  # the bound of a number without a range


def command_line(description: str, program: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of the description, and whose errors are one line."""
    return argparse.ArgumentParser(
        prog=program,
        usage=argparse.SUPPRESS,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def refuse(program: str, reason: str) -> NoReturn:
    """End the program, as argparse does, with one line and status 2."""
    print(f"{program}: error: {reason}", file=sys.stderr)
    sys.exit(2)


def parse(
    Config: type, presets: dict[str, dict], arguments: list[str], description: str, program: str
):
    """The configuration that a command line asks for. Flags override the preset, and the preset
    overrides the defaults. With --resume it is the configuration of that run. A mistake ends the
    program with one line."""
    parallel.hush()
    parser = command_line(description, program)
    helps = {name: text for base in Config.__mro__[-2::-1] for name, text in comments(base)}
    for field in fields(Config):
        if field.name in Config.UNUSED:
            continue
        choices = Config.CHOICES.get(field.name)
        takes = {"type": kind(field), "metavar": "", "choices": choices}
        takes = {"action": argparse.BooleanOptionalAction} if field.type is bool else takes
        named = ", ".join(choices or Config.NAMES.get(field.name, ()))
        text = f"{helps.get(field.name, '')}{': ' if named else ''}{named}"
        text = f"{text} [{field.default!r}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **takes)
    given = vars(parser.parse_args(arguments))
    try:
        if "resume" in given:
            config = saved_config(Config, given)
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            given = {"preset": "cpu", "device": device} | given
            config = Config(**presets[given["preset"]] | given).filled()
        check_values(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def comments(Config: type) -> list[tuple[str, str]]:
    """The name of each field of a class, and the comment behind it in the source."""
    return COMMENTED.findall(textwrap.dedent(inspect.getsource(Config)))


def kind(field) -> type:
    """The type of a field's value; float for "float | None"."""
    return (get_args(field.type) or [field.type])[0]


def saved_config(Config: type, given: dict):
    """The saved configuration of the run in `given["resume"]`, with this folder as its --out.
    Raises ValueError, in one line, if the folder holds no run, and for any other flag but
    --device."""
    folder = Path(given["resume"])
    if others := sorted(set(given) - {"resume", "device"}):
        raise ValueError(f"--resume goes on with the settings of {folder}: leave --{others[0]} out")
    saved = load_tensors(folder / "last.pt")
    try:
        settings = saved["settings"] | given | {"out": str(folder)}
        for field in fields(Config):
            if type(settings[field.name]) not in (get_args(field.type) or [field.type]):
                raise TypeError(f"{field.name} is {settings[field.name]!r}")
        return Config(**settings)
    except (KeyError, TypeError) as error:
        reason = f"not what a run saves ({one_line(error)})"
        raise ValueError(f"{folder}/last.pt: {reason}") from None


def check_values(config) -> None:
    """Raise ValueError, in one line, for a value that is not among the choices of its field, or not
    in its range."""
    for field in fields(config):
        value, number = getattr(config, field.name), kind(field)
        choices = config.CHOICES.get(field.name)
        if choices and value not in choices:
            raise ValueError(f"--{field.name} must be one of {', '.join(choices)}, not {value!r}")
        if number not in MOST or value is None:
            continue
        default = (1 if number is int else 0, MOST[number])
        least, most = config.RANGES.get(field.name, default)
        if not least <= value <= most:
            raise ValueError(f"--{field.name} must be from {least:g} to {most:g}, not {value!r}")
