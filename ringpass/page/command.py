"""`ringpass dump open DIR`: shows the page of a dump directory.

Makes index.html if it is missing, or anew with --again or a profile, prints its path, and opens it where there is a
display.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import webbrowser
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringpass.errors import OptionError
from ringpass.page.dumped import PAGE, write_page
from ringpass.page.profile import measured, rank_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`open DIR [--again] [--trace FILE ..] [--no-browser]`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    form = actions.add_parser("open", help="show the page of a dump directory", description=__doc__)
    form.add_argument("directory", type=Path, metavar="DIR", help="what RINGPASS_DUMP or the option 'dump' named")
    form.add_argument("--again", action="store_true", help="make the page anew if it is there")
    about = "profiles of torch.profiler, one of each rank (.json, .json.gz)"
    form.add_argument("--trace", type=Path, nargs="+", default=[], metavar="FILE", help=about)
    form.add_argument("--no-browser", action="store_true", help="only print the path")


def run(args: argparse.Namespace) -> int:
    """Prints the page's path; 0.  Raises OptionError for a directory without a dump."""
    page = args.directory / PAGE
    if args.again or args.trace or not page.is_file():
        page = write_page(args.directory, _profiles(args.trace))
    print(page.resolve())
    if not args.no_browser and has_display():
        webbrowser.open(page.resolve().as_uri())
    return 0


def has_display() -> bool:
    """Whether a browser's window could be seen."""
    if sys.platform.startswith(("win", "darwin")):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _profiles(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The profiles in these files; raises OptionError for one without ranges of ringpass, or two of one rank."""
    found = [_profile(path) for path in paths]
    ranks = [rank_of(profile, i) for i, profile in enumerate(found)]
    for i, (path, profile) in enumerate(zip(paths, found, strict=True)):
        if not measured([profile]):
            raise OptionError(
                f"--trace {path} holds no range of ringpass: expected what torch.profiler exports of a compiled model"
            )
        if ranks[i] in ranks[:i]:
            raise OptionError(f"--trace {path} is of rank {ranks[i]}, as {paths[ranks.index(ranks[i])]} is: give one")
    return found


def _profile(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        found = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise OptionError(f"--trace {path}: expected a file in Chrome's trace format, but: {error}") from error
    return found if isinstance(found, dict) else {"traceEvents": found}
