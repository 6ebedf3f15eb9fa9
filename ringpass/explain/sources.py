"""sources: the lines of the model that nodes come from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch.fx import Node

from ringpass.explain.data import Source
from ringpass.nodes import source_line

LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<number>\d+), in \S+\s*(?P<text>.*)')


def source_of(node: Node | None) -> Source:
    """The line of a node."""
    return parsed(source_line(node))


def parsed(text: str) -> Source:
    """The line that `ringpass.nodes.source_line` describes; nothing where it says nothing.

    >>> parsed('File "model.py", line 7, in forward x = x.softmax(1)')
    Source(source='model.py:7', line='x = x.softmax(1)')
    """
    found = LINE.match(text.strip())
    if found is None:
        return Source()
    return Source(f"{shown(found['file'])}:{found['number']}", found["text"].strip() or None)


def shown(file: str) -> str:
    """A path as people write it: relative to the working directory, or from `site-packages` on."""
    path = Path(file)
    if path.is_relative_to(os.getcwd()):
        return path.relative_to(os.getcwd()).as_posix()
    if "site-packages" in path.parts:
        return Path(*path.parts[path.parts.index("site-packages") + 1 :]).as_posix()
    return file


def short(text: str) -> str:
    """A message whose paths are relative to the working directory, where they lie in it."""
    return text.replace(os.getcwd() + os.sep, "")
