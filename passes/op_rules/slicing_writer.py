"""runs: slices, concatenations and pads along the sequence, on local tokens.

    x[:, 1:]                  the local rows but the first, on the rank that holds token 0; all of them elsewhere
    cat([cls, patches])       the local patches, after the CLS token on the rank that holds it
    cat([text, image])        the local text, then the local image: each has been dealt out by itself
    pad(x, (0, 0, 0, 5))      the local tokens, then this rank's share of the five
    conv1d(x, w, padding=1)   conv1d(halo(x, 1, 1), w), and of what it gives, the rows of local tokens
    pad(x, (0, 0, 1, -1))     halo(x, 1, 0), without the last row of each run of tokens
    conv1d(pad(x, (2, 0)), w) conv1d(halo(padded, 2, 0), w), and of what it gives for all of `padded`, the rows of x

Contract: a conv1d and a shift move what stands around each run of local tokens, and no more; the others move nothing,
for a token is on the same rank in all runs of its line (`pieces`).  What is whole, such as CLS, is cut to this rank's
share of it.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from ringpass import ops
from ringpass.layouts.layout import assigned
from ringpass.nodes import args_of, first_of, op_name, size_of
from ringpass.passes.op_rules.slicing import halo_of
from ringpass.passes.partition.emitter import Emitter
from ringpass.passes.partition.placement import parts_of
from ringpass.passes.plan.axes import Axis
from ringpass.passes.propagate.alignment import same
from ringpass.passes.propagate.factors import CONV1D

aten = torch.ops.aten


class Runs(Emitter):
    """Writes the nodes of `Placement.runs`, and those that read around their tokens."""

    def _local(self, node: Node, axis: Axis) -> Any:
        raise NotImplementedError

    def _whole(self, node: Node, reason: str) -> Any:
        raise NotImplementedError

    def _write_run(self, node: Node, axis: Axis) -> Node:
        name, dim = op_name(node), self.placement.sweep.runs[node]
        if name == "slice.Tensor":
            return self._write_slice(node, axis, dim)
        if name == CONV1D:
            return self._write_inner(node, axis, dim)
        return self._write_cat(node, axis, dim) if name == "cat.default" else self._write_pad(node, axis, dim)

    def _write_slice(self, node: Node, axis: Axis, dim: int) -> Node:
        around = self.placement.modes[first_of(node)]
        assert around is not None
        return self._run_of(self._local(first_of(node), around), around, node, axis, dim)

    def _run_of(self, x: Node, around: Axis, node: Node, axis: Axis, dim: int) -> Node:
        """Of the local tokens `x` of axis `around`, those of its run `axis`."""
        start = self._before(around, axis.offset)
        stop = self._compute(operator.add, start, self._length(axis))
        return self._emit(aten.slice.Tensor, x, dim, start, stop, name=node.name)

    def _write_inner(self, node: Node, axis: Axis, dim: int) -> Node:
        """A conv1d of more tokens than it makes: as if it made as many, and of these the run that it makes."""
        around = self.placement.modes[first_of(node)]
        assert around is not None
        every = self._write_halo(node, around, int(axis.offset - around.offset))
        return self._run_of(every, around, node, axis, dim)

    def _write_cat(self, node: Node, axis: Axis, dim: int) -> Node:
        rows = []
        for part, offset in parts_of(node, dim):
            own = self.placement.axis_along(part, dim)
            rows.append(self._local(part, own) if own else self._share(part, axis, dim, offset))
        return self._emit(aten.cat.default, rows, dim, name=node.name)

    def _share(self, part: Node, axis: Axis, dim: int, offset: Any) -> Node:
        """Of a few whole tokens at `offset` of the axis: all, on the rank that holds them there, none elsewhere."""
        holder = self.placement.holder(axis, offset, part, dim)
        assert holder is not None
        size = self._size(size_of(part.meta["val"].shape[dim]))
        args = dim, 1, size, assigned([holder]), self.rank.world, self.rank.rank, self.rank.group
        return self._emit(ops.shard, self._whole(part, "a part of a sequence"), *args, name=f"{part.name}_local")

    def _write_pad(self, node: Node, axis: Axis, dim: int) -> Node:
        source, amounts = first_of(node), list(args_of(node)[1])
        own = self.placement.axis_along(source, dim)
        assert own is not None
        low = self._before(axis, own.offset)
        rest = self._compute(operator.sub, self._length(axis), self._length(own))
        at = 2 * (node.meta["val"].ndim - 1 - dim)
        amounts[at : at + 2] = low, self._compute(operator.sub, rest, low)
        return self._copy(node, (self._local(source, own), amounts, *args_of(node)[2:]), node.kwargs)

    def _write_halo(self, node: Node, axis: Axis, offset: int = 0) -> Node:
        """A conv1d or a shift, of the local tokens and those around them; what it makes begins at `offset`."""
        source, (low, high, step) = first_of(node), halo_of(node, offset)
        around = self._shard_args(source, axis)
        dim, layout = around[0], axis.layout
        runs = layout.ranges if isinstance(axis.tokens, int) else layout.spans  # as many as any length has
        most = len(list(runs(self.rank.rank, axis.hint)))
        size = size_of(source.meta["val"].shape[dim])
        each = self._size(sympy.cancel(size / step / size_of(axis.tokens)))
        x = self._local(source, axis)
        rows = self._emit(ops.halo, x, *around, most, low, high, self.rank.group, name=f"{source.name}_around")
        if op_name(node) == CONV1D:
            given = {**self._operands_by_name(node, axis, "weights"), "input": rows, "padding": [0]}
            rows, before, after = self._emit_bound(node.target, given), 0, (low + high) // step
        else:
            before, after = high, low
        at = self._emit(ops.interior_rows, rows, *around, each, before, after)
        return self._emit(aten.index_select.default, rows, dim, at, name=node.name)

    def _before(self, axis: Axis, place: Any) -> Any:
        """How many local tokens of `axis` stand before a place of its line, at which it is cut."""
        size, at = size_of(axis.tokens), sympy.expand(place - axis.offset)
        ends = {cut: cut if cut >= 0 else size + cut for cut in (0, *axis.layout.split_points)}
        cut = next((cut for cut, end in ends.items() if same(end, at)), None)
        assert cut is not None or same(at, size), (axis, place)
        return self._compute(lambda s: axis.layout.before(self.rank.rank, s, cut), self._tokens(axis))
