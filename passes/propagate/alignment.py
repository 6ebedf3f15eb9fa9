"""lines: which factors are runs of the same tokens.

    w = x[:, 1:]          token i of w stands where token i + 1 of x does
    j = cat([w, y], 1)    token i of w stands where token i of j does, and so does x from there on

A *line* is a row of places; a factor on it is a run of them, from its offset on.  What a slice or a concatenation makes
is a run of the line of its operands, so tokens that are taken apart and put together again are found to be the same.

Contract: a factor has one place.  What would give it another (`x[:, 1:]` beside `x[:, :-1]`) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy


class Lines:
    """Weighted union-find: each factor leads to another, at an offset from its first token.

    `root(factor)` is the class of a factor.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self.above: dict[Any, tuple[Any, Any]] = {}
        self.members: dict[Any, list[Any]] = {}  # of each line

    def place(self, factor: Any) -> tuple[Any, Any]:
        """(the line, the offset of the factor's first token on it)."""
        top, offset = self.root(factor), sympy.Integer(0)
        while top in self.above:
            top, step = self.above[top]
            offset += step
        return top, offset

    def join(self, whole: Any, part: Any, offset: Any) -> bool:
        """From now on, `part` is the run of `whole` from `offset` on; False, if it stands elsewhere."""
        (top, base), (other, start) = self.place(whole), self.place(part)
        if top is other:
            return same(base + offset, start)
        self.above[other] = top, base + offset - start
        self.members[top] = self.members.get(top, [top]) + self.members.pop(other, [other])
        return True

    def tie(self, a: Any, b: Any) -> bool:
        """Whether two factors may become one class."""
        return not any(x in self.above or x in self.members for x in (a, b)) or self.join(a, b, 0)

    def runs(self, factor: Any) -> Iterator[tuple[Any, Any]]:
        """(factor, offset from the given one's first token) of all on its line."""
        line, start = self.place(factor)
        for other in dict.fromkeys(map(self.root, self.members.get(line, [factor]))):
            yield other, sympy.expand(self.place(other)[1] - start)

    def run(self, factor: Any, offset: Any, size: Any) -> Any:
        """The factor whose `size` tokens begin at `offset` from the given one's first token, or None."""
        found = (f for f, at in self.runs(factor) if same(at, offset) and same(f.size, size))
        return next(found, None)


def same(a: Any, b: Any) -> bool:
    """Whether two numbers of tokens are equal for every length."""
    return bool(sympy.expand(a - b) == 0)
