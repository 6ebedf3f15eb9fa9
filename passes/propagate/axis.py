"""One sequence axis of a graph: its tokens, and the layout by which ranks hold them."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ringpass.layouts.layout import Layout
from ringpass.nodes import Size, hint_of
from ringpass.passes.propagate.factors import Factor


@dataclass(frozen=True, eq=False)
class Axis:
    """A sequence dim of S `tokens`, of which each rank holds those that `layout` gives it.

    `sequence`: the aligned sequence (`propagate.alignment`) of which the axis is a slice that agrees with the other
    slices of it, from token `offset` on; None: it stands alone.  A section of a sequence may have no tokens on a rank.
    `units`: the index of the axis of whose units the tokens are parts; None: they are no parts of units.
    """

    index: int
    factor: Factor
    tokens: Size
    layout: Layout
    sequence: Factor | None = None
    offset: sympy.Expr = sympy.Integer(0)
    units: int | None = None

    @property
    def hint(self) -> int:
        """S in this compilation, as an int."""
        return hint_of(self.tokens)

    def reaches_all(self, scheme: str) -> bool:
        """Whether every rank would hold at least one token under the layout `scheme`, such as "zigzag", if it must."""
        layout = self.layout.with_scheme(scheme)
        return self.layout.section is not None or all(layout.length(rank, self.hint) for rank in range(layout.world))

    def __str__(self) -> str:
        return f"axis {self.index}: {self.tokens} tokens, {self.layout.name}"
