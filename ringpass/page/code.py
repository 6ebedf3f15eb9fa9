"""Graphs as text, for the panel that shows two stages side by side: colours, lines of the model, differences.

    >>> text = '''# File: model.py:3 in forward, code: y = x + 1
    ... add: "f32[4]" = torch.ops.aten.add.Tensor(x, 1)'''
    >>> stage("captured.py", text).sources
    ('model.py:3', 'model.py:3')

A line belongs to the model's line that the last `# File:` comment above it names.  Two lines of two graphs are *alike*
if they give a value of the same name by the same op; then only shapes or operands may differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from html import escape
from itertools import combinations
from typing import Any

from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, Text, Token

FILE = re.compile(r"\s*# File: (.+?):(\d+) in (\S+), code: (.*)")
UNKNOWN = re.compile(r"\s*# (File:|No stacktrace)")
GIVES = re.compile(r"""\s*(\w+)(?:: "[^"]*")? = (\S+?)(?:\(|\[|$)""")
CLASSES = {Comment: "c", Keyword: "k", String: "s", Number: "m", Name: "", Operator: "", Punctuation: "", Text: ""}
MODEL = "model"
"""The name of the stage that is made of the model's own lines."""


@dataclass(frozen=True)
class Stage:
    """A graph's text: its lines as HTML, the same without colours, and the model's line of each ("" if not known)."""

    name: str
    lines: tuple[str, ...]
    plain: tuple[str, ...]
    sources: tuple[str, ...]


@lru_cache(maxsize=32)
def stage(name: str, text: str) -> Stage:
    """`text` line by line; a file that is no Python has no colours."""
    plain = tuple(text.rstrip("\n").split("\n"))
    lines = tuple(_coloured(text)) if name.endswith(".py") else tuple(map(escape, plain))
    return Stage(name, lines, plain, tuple(_sources(plain)))


def stages(texts: Mapping[str, str]) -> list[Stage]:
    """The stages of `texts`, and before them the model's lines that their comments name."""
    found = [stage(name, text) for name, text in texts.items()]
    model = _model(found)
    return [model, *found] if model.plain else found


def as_data(found: Sequence[Stage]) -> dict[str, Any]:
    """For the page: stages, with the model's lines by number, and the differences of each two graphs."""
    numbers = {source: i for i, source in enumerate(dict.fromkeys(s for x in found for s in x.sources))}
    graphs = [x for x in found if x.name.endswith(".py")]
    return {
        "sources": list(numbers),
        "stages": [{"name": x.name, "lines": x.lines, "sources": [numbers[s] for s in x.sources]} for x in found],
        "differences": {f"{a.name} {b.name}": differences(a.plain, b.plain) for a, b in combinations(graphs, 2)},
    }


def differences(before: Sequence[str], after: Sequence[str]) -> list[list[int]]:
    """[start, stop, start, stop] in lines of both texts: the parts in which they are not alike.

    >>> differences(["a", "x = f(1)", "c"], ["a", "x = f(2)", "d", "c"])
    [[2, 2, 2, 3]]
    """
    return [[*part] for part in _differences(tuple(before), tuple(after))]


@lru_cache(maxsize=32)
def _differences(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[tuple[int, int, int, int], ...]:
    matcher = SequenceMatcher(None, list(map(_key, before)), list(map(_key, after)), autojunk=False)
    return tuple((a, b, c, d) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal")


def difference(before: str, text_before: str, after: str, text_after: str) -> str:
    """The differences of two texts as `diff -u` writes them, without context.

    >>> print(difference("a.py", "x = f(1)\\ny = g(x)", "b.py", "x = f(2)\\nz = g(x)"))
    --- a.py
    +++ b.py
    @@ -2,1 +2,1 @@
    -y = g(x)
    +z = g(x)
    """
    old, new = text_before.split("\n"), text_after.split("\n")
    lines = [f"--- {before}", f"+++ {after}"]
    for a, b, c, d in differences(old, new):
        lines.append(f"@@ -{a + 1},{b - a} +{c + 1},{d - c} @@")
        lines += [f"-{line}" for line in old[a:b]] + [f"+{line}" for line in new[c:d]]
    return "\n".join(lines)


def _key(line: str) -> str:
    match = GIVES.match(line)
    return f"{match[1]} = {match[2]}" if match else line.strip()


def _sources(lines: Sequence[str]) -> list[str]:
    now, out = "", []
    for line in lines:
        if UNKNOWN.match(line):
            match = FILE.match(line)
            now = f"{match[1]}:{match[2]}" if match else ""
        elif not line.strip():
            now = ""
        out.append(now)
    return out


def _model(found: Sequence[Stage]) -> Stage:
    """The model's lines that comments name, by file and number."""
    seen = {(m[1], int(m[2])): (m[3], m[4]) for x in found for line in x.plain if (m := FILE.match(line))}
    plain, lines, sources, last = [], [], [], ""
    for (path, number), (function, code) in sorted(seen.items()):
        if path != last:
            plain.append(f"# {path}")
            lines.append(f"<i class=c>{escape(plain[-1])}</i>")
            sources.append("")
            last = path
        plain.append(f"{number:>5}  {code}  # in {function}")
        lines.append(f"<i class=l>{number:>5}</i>  {''.join(_coloured(code))}  <i class=c># in {escape(function)}</i>")
        sources.append(f"{path}:{number}")
    return Stage(MODEL, tuple(lines), tuple(plain), tuple(sources))


def _coloured(text: str) -> list[str]:
    """Lines of Python as HTML: `i` elements of a class of one letter, which styles of the page colour."""
    lines: list[list[str]] = [[]]
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text.rstrip("\n")):
        css = _class(kind, value)
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append([])
            if part:
                lines[-1].append(f"<i class={css}>{escape(part, False)}</i>" if css else escape(part, False))
    return ["".join(line) for line in lines]


def _class(kind: Any, value: str) -> str:
    while kind is not Token and kind not in CLASSES:
        kind = kind.parent
    return CLASSES.get(kind, "")
