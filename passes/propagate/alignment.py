"""alignment: which factors are slices of the same sequence.

    w = x[:, 1:]          token i of w is token i + 1 of x
    j = cat([w, y], 1)    token i of w is token i of j, and x follows from there on

An aligned *sequence* is a class of factors, each at an offset from the first token.  What a slice or a concatenation
makes is a slice of its operands' sequence, so tokens that are taken apart and put together again are found to be the
same.

Contract: a factor has one offset.  What would give it another (`x[:, 1:]` beside `x[:, :-1]`) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import sympy

FactorT = TypeVar("FactorT", bound=Hashable)


class SequenceAlignment(Generic[FactorT]):
    """Weighted union-find: each factor leads to another, at an offset in tokens from its first token.

    `root(factor)` is the class of a factor.
    """

    def __init__(self, root: Callable[[FactorT], FactorT]) -> None:
        self.root = root
        self.above: dict[FactorT, tuple[FactorT, sympy.Expr]] = {}
        self.members: dict[FactorT, list[FactorT]] = {}  # of each sequence

    def locate(self, factor: FactorT) -> tuple[FactorT, sympy.Expr]:
        """(the sequence, the offset of the factor's first token in it)."""
        top, offset = self.root(factor), sympy.Integer(0)
        while top in self.above:
            top, step = self.above[top]
            offset += step
        return top, offset

    def has(self, factor: FactorT) -> bool:
        """Whether a factor, which leads its class, is a slice of another or has slices."""
        return factor in self.above or factor in self.members

    def join(self, sequence: FactorT, part: FactorT, offset: sympy.Expr) -> bool:
        """From now on, `part` is the slice of `sequence` from `offset` on; False if it is at another offset already."""
        (top, base), (other, start) = self.locate(sequence), self.locate(part)
        if top is other:
            return same(base + offset, start)
        self.above[other] = top, base + offset - start
        self.members[top] = self.members.get(top, [top]) + self.members.pop(other, [other])
        return True

    def tie(self, a: FactorT, b: FactorT) -> bool:
        """Whether two factors may become one class."""
        return not (self.has(a) or self.has(b)) or self.join(a, b, sympy.Integer(0))

    def slices(self, factor: FactorT) -> Iterator[tuple[FactorT, sympy.Expr]]:
        """(factor, offset from the given one's first token) of every factor of its sequence."""
        sequence, start = self.locate(factor)
        for other in dict.fromkeys(map(self.root, self.members.get(sequence, [factor]))):
            yield other, sympy.expand(self.locate(other)[1] - start)

    def slice(self, factor: FactorT, offset: sympy.Expr, size: sympy.Expr) -> FactorT | None:
        """The factor whose `size` tokens begin at `offset` from the given one's first token, or None."""
        found = (f for f, at in self.slices(factor) if same(at, offset) and same(getattr(f, "size", None), size))
        return next(found, None)


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two numbers of tokens are equal for every length."""
    return bool(sympy.expand(a - b) == 0)
