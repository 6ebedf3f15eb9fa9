"""The command line: `python -m ringpass COMMAND`, a line in COMMANDS for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ringpass import measure
from ringpass.errors import RingpassError
from ringpass.page import command as dump


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line, its arguments, and its function of them, which returns the exit code."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    text: str | None = None


COMMANDS: Mapping[str, Command] = {
    "measure": Command(
        "measure this machine, for the option 'machine'", measure.add_arguments, measure.run, measure.__doc__
    ),
    "dump": Command("show a dump directory: dump open DIR", dump.add_arguments, dump.run, dump.__doc__),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except RingpassError as error:
        print(f"ringpass {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ringpass", description="Tools around the backend ring_dilated.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        form = argparse.RawDescriptionHelpFormatter
        command.add_arguments(
            commands.add_parser(name, help=command.summary, description=command.text, formatter_class=form)
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
