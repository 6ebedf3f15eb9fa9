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
from pathlib import Path
from typing import Any

from ringpass.errors import OptionError
from ringpass.page.dumped import PAGE, write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`open DIR [--again] [--trace FILE] [--no-browser]`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    form = actions.add_parser("open", help="show the page of a dump directory", description=__doc__)
    form.add_argument("directory", type=Path, metavar="DIR", help="what RINGPASS_DUMP or the option 'dump' named")
    form.add_argument("--again", action="store_true", help="make the page anew if it is there")
    form.add_argument("--trace", type=Path, metavar="FILE", help="a profile in Chrome's trace format (.json, .json.gz)")
    form.add_argument("--no-browser", action="store_true", help="only print the path")


def run(args: argparse.Namespace) -> int:
    """Prints the page's path; 0.  Raises OptionError for a directory without a dump."""
    page = args.directory / PAGE
    if args.again or args.trace or not page.is_file():
        page = write_page(args.directory, _trace(args.trace) if args.trace else None)
    print(page.resolve())
    if not args.no_browser and has_display():
        webbrowser.open(page.resolve().as_uri())
    return 0


def has_display() -> bool:
    """Whether a browser's window could be seen."""
    if sys.platform.startswith(("win", "darwin")):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _trace(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        found = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, ValueError) as error:
        raise OptionError(f"--trace {path}: expected a file in Chrome's trace format, but: {error}") from error
    return found if isinstance(found, dict) else {"traceEvents": found}
