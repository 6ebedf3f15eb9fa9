"""One sequence axis of a graph: its tokens, and the layout by which ranks hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from ringpass.layouts.layout import Layout
from ringpass.nodes import hint_of
from ringpass.passes.propagate.factors import Factor


@dataclass(frozen=True, eq=False)
class Axis:
    """`tokens` is S, an int or a SymInt; `hint` its value in this compilation.

    `sequence`: the aligned sequence (`propagate.alignment`) of which the axis is a slice that agrees with the other
    slices of it, from token `offset` on; None: it stands alone.
    """

    index: int
    factor: Factor
    tokens: Any
    layout: Layout
    sequence: Factor | None = None
    offset: Any = sympy.Integer(0)

    @property
    def hint(self) -> int:
        """S in this compilation."""
        return hint_of(self.tokens)

    def reaches_all(self, scheme: str) -> bool:
        """Whether each rank holds tokens of it under the layout `scheme`."""
        layout = self.layout.with_scheme(scheme)
        return all(layout.length(rank, self.hint) for rank in range(layout.world))

    def __str__(self) -> str:
        return f"axis {self.index}: {self.tokens} tokens, {self.layout.name}"
