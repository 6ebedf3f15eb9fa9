"""The command line: `ringpass COMMAND`, or `python -m ringpass COMMAND`; a line in COMMANDS for each command.

Exit codes: 0 fine, 1 the command found a problem, 2 bad input (arguments, files, or what a model cannot do).
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import ringpass
from ringpass import demo, doctor, measure
from ringpass.errors import RingpassError
from ringpass.explain import command as explain
from ringpass.page import command as dump


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line, an example, its arguments, and its function of them.

    `run` returns the exit code.  `text`: what `ringpass COMMAND --help` says before the arguments.
    """

    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    text: str | None = None


COMMANDS: Mapping[str, Command] = {
    "doctor": Command(
        "find what keeps ringpass from running here, and the remedy", "ringpass doctor",
        doctor.add_arguments, doctor.run, doctor.__doc__,
    ),
    "explain": Command(
        "show what would be made of a model on P ranks", "ringpass explain model.py:make --world-size 8",
        explain.add_arguments, explain.run, explain.__doc__,
    ),
    "dump": Command(
        "show a dump directory as a page", "ringpass dump open DIR",
        dump.add_arguments, dump.run, dump.__doc__,
    ),
    "demo": Command(
        "train a small model on 2 ranks and on 1, and compare", "ringpass demo --ranks 2",
        demo.add_arguments, demo.run, demo.__doc__,
    ),
    "measure": Command(
        "measure this machine, for the option 'machine'", "ringpass measure > machine.json",
        measure.add_arguments, measure.run, measure.__doc__,
    ),
}  # fmt: skip
EXIT_CODES = "exit codes: 0 fine, 1 found a problem, 2 bad input"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except RingpassError as error:
        print(f"ringpass {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells report SIGINT


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    width = max(len(command.example) for command in COMMANDS.values())
    examples = "\n".join(f"  {command.example:<{width}}   {command.summary}" for command in COMMANDS.values())
    parser = argparse.ArgumentParser(
        prog=_program(sys.argv[0]),
        description="Tools around the torch.compile backend 'ring_dilated'.",
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=form,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        epilog = f"example: {command.example}\n\n{EXIT_CODES}"
        command.add_arguments(
            commands.add_parser(
                name, help=command.summary, description=command.text, epilog=epilog, formatter_class=form
            )
        )
    return parser


def _program(started: str) -> str:
    """How the command line was started, from `sys.argv[0]`.

    >>> _program("/usr/bin/ringpass"), _program("/site-packages/ringpass/__main__.py")
    ('ringpass', 'python -m ringpass')
    """
    return "python -m ringpass" if Path(started).name == "__main__.py" else "ringpass"


def _version() -> str:
    return f"ringpass {ringpass.__version__}, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
