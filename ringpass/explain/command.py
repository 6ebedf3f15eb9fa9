"""What the backend would make of a model on P ranks: no process, no GPU, no memory for the model.

    ringpass explain model.py:make --world-size 8
    ringpass explain model.py:make --world-size 8 --html report.html
    ringpass explain model.py:make --world-size 8 --device H100 --json report.json
    ringpass explain model.py:make --world-size 16 --diff report.json

FILE:FACTORY names a function of a file, or of a module, that returns (model, args) or (model, args, kwargs): the model
and the arguments of one call, which may be made under torch.device("meta").

Exit code: 0; 1 if the memory does not fit the device, or, with --strict, if the verdict names a problem; 2 for bad
input.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringpass.errors import InputError, OptionError, RingpassError
from ringpass.explain.difference import difference
from ringpass.explain.report import Report, media_of
from ringpass.explain.request import UNNAMED, Request
from ringpass.explain.run import explain_call

PACKAGE = Path(__file__).parents[1]
PATIENCE = 2.0  # seconds after which progress is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("factory", metavar="FILE:FACTORY", help="a function that returns (model, args[, kwargs])")
    parser.add_argument("--world-size", type=int, required=True, metavar="P", help="number of ranks")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the rank that is shown; default: 0")
    parser.add_argument("--options", default="{}", metavar="JSON", help="""options, as '{"layout": "zigzag"}'""")
    parser.add_argument("--machine", default=None, metavar="M", help="a preset, or a file that `measure` wrote")
    parser.add_argument("--device", default=None, metavar="D", help="what a rank has: H100, 24GiB, a number of bytes")
    parser.add_argument("--json", default=None, metavar="F", help="write the report to a file; - for the output")
    parser.add_argument("--html", default=None, metavar="F", help="write the page of the report to a file")
    parser.add_argument("--diff", default=None, metavar="F", help="show what changed since a report that --json wrote")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if the verdict names a problem")


def run(args: argparse.Namespace) -> int:
    """Explains, and prints or writes the report; returns the exit code.

    Raises OptionError and InputError for bad input.
    """
    options, earlier = _options(args.options), _earlier(args.diff) if args.diff else None
    _check_endings(args.json, args.html)
    with _progress(f"explaining {args.factory} on {args.world_size} ranks"):
        with _code_of_users(f"{args.factory} cannot be made"):
            model, arguments, keywords = _made(args.factory)
        device, machine = _device(args.device), args.machine
        request = Request(model, arguments, keywords, args.world_size, args.rank, options, machine, device, None)
        with _code_of_users("the model does not run"):
            report = explain_call(request)
    report = replace(report, command=report.command.replace(UNNAMED, shlex.quote(args.factory)))
    try:
        if args.html is not None:
            report.save(args.html)
        _show(report, args.json, earlier)
    except OSError as error:
        raise InputError(f"the report cannot be written: {error}") from error
    wrong = report.verdict.fits is False or (args.strict and bool(report.verdict.problems))
    return int(wrong)


@contextmanager
def _code_of_users(what: str) -> Iterator[None]:
    """Errors of the code that is explained, or torch's on it, are bad input, shown in full; not those of ringpass."""
    try:
        yield
    except RingpassError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(PACKAGE):
            raise
        traceback.print_exception(error)
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{what}: {type(error).__name__}: {first}") from error


def _show(report: Report, path: str | None, earlier: dict[str, Any] | None) -> None:
    if path == "-":
        print(report.to_json())
    elif path is not None:
        report.save(path)
    if earlier is not None:
        try:
            found = difference(earlier, report.to_dict())
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(f"--diff names a report that lacks something: {type(error).__name__}: {error}") from error
        print(found, file=sys.stderr if path == "-" else sys.stdout)
    elif path != "-":
        print(report)


def _check_endings(json_path: str | None, html_path: str | None) -> None:
    if json_path not in (None, "-"):
        media_of(str(json_path))
    if html_path is not None and media_of(html_path) != ".html":
        raise InputError(f"--html must name a file that ends in .html, got {html_path!r}")


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        expected = """--options must be JSON, such as '{"layout": "zigzag"}'"""
        raise OptionError(f"{expected}, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"--options must be a JSON object, got {text!r}")
    return found


def _earlier(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"--diff must name a report that --json wrote, got {path!r}: {error}") from error
    if not isinstance(found, dict) or "verdict" not in found:
        raise InputError(f"--diff must name a report that --json wrote, and {path!r} holds none")
    return found


def _device(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text


def _made(factory: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, and the arguments of a call."""
    where, _, name = factory.rpartition(":")
    if not where:
        raise InputError(f"expected FILE:FACTORY, such as model.py:make, got {factory!r}")
    function = getattr(_module(where), name, None)
    if not callable(function):
        raise InputError(f"{where} has no function {name!r}")
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], tuple | list):
        raise InputError(f"{factory} must return (model, args) or (model, args, kwargs), got {type(made).__name__}")
    return made[0], tuple(made[1]), dict(made[2]) if len(made) == 3 else {}


def _module(where: str) -> Any:
    """The module of a path or of a dotted name."""
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise InputError(f"there is no module {where!r}: {error}") from error
    path = Path(where)
    if not path.is_file():
        raise InputError(f"there is no file {where!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes can be found by name
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """A line on stderr once the block has run for PATIENCE seconds; with rich, on a terminal, a spinner."""
    done = threading.Event()

    def show() -> None:
        if done.wait(PATIENCE):
            return
        if not sys.stderr.isatty():
            print(f"{what} ..", file=sys.stderr, flush=True)
            return
        try:
            from rich.console import Console
        except ImportError:
            print(f"{what} ..", file=sys.stderr, flush=True)
            return
        with Console(stderr=True).status(what):
            done.wait()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
