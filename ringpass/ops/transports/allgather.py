"""All keys gathered first: a baseline to measure against."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ringpass.kernels.blocks import row_slice
from ringpass.layouts.ranges import Ranges
from ringpass.ops import boundary
from ringpass.ops.accumulate import RowAccumulator, add, fold_ranges, label, row_accumulator
from ringpass.ops.transports.base import Served, Transport, zero_block
from ringpass.precision import accumulator
from ringpass.schedule.site import Site


class AllGather(Transport):
    """Every rank gathers all keys before its first tile; one reduce-scatter returns their gradients.

    The tiles are those of the ring.  Holds K, V and their gradients at full length.
    """

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        super().__init__(site, k, v)
        layout = site.problem.key_layout
        self.where = (2, 1, site.problem.keys, layout.name, site.world, site.rank, site.group)
        self.gathers = site.world > 1 and not layout.replicated
        self.given: list[tuple[Ranges, tuple[Tensor, ...]]] = []

    @property
    def returned_rows(self) -> Ranges:
        """None: all gradients come at once, in `finish`."""
        return ()

    def blocks(self, backward: bool) -> Iterator[tuple[Served, list[Tensor]]]:
        """Gathers K and V, then yields the tokens of each step of the ring; nothing is in flight."""
        full = [self.k, self.v]
        if self.gathers:
            with label("gather_keys"):
                full = [boundary.gather(x, *self.where) for x in full]
        for index, step in enumerate(self.steps(0)):
            if index == 0:
                yield [(0, step, (self.k, self.v))], []
            elif step.tokens:
                yield [(0, step, (rows_at(full[0], step.tokens), rows_at(full[1], step.tokens)))], []

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        """Keeps the gradients for `finish`."""
        self.given.append((served.pop()[1].tokens, grads[0]))

    def finish(self, local_sums: list[RowAccumulator]) -> None:
        """Reduce-scatters the gradients of all keys."""
        if not self.gathers:
            return
        dtype, spans = accumulator(self.k.dtype), [span for ranges, _ in self.given for span in ranges]
        total = row_accumulator(self.site.problem.keys, dtype, lambda: spans)
        for ranges, grads in self.given:
            fold_ranges(total, ranges, grads, "add_gradients")
        with label("reduce_scatter_gradients"):
            sums = total.join(partial(zero_block, self.k, self.v, dtype))
            home = tuple(boundary.reduce_scatter(x, *self.where) for x in sums)
        local_sums[0].fold((0, self.k.shape[2]), home, add, "add_gradients_home")


def rows_at(x: Tensor, spans: Ranges) -> Tensor:
    """The rows (dim 2) of `x` in `spans`."""
    parts = [row_slice(x, span) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
