"""takes: a few tokens of a local value, whole on every rank, without moving the others.

    x[:, 0]                    each rank looks up where it holds token 0; the one that does gives it, the others zeros;
    x[:, -3:]                  the sum over ranks is the tokens
    x[arange(B), last]         the same with positions that are data

Contract: taken only where the result is at most half of the value; anything else is gathered.  What is gathered, or
taken but more than a rank's share, is reported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import args_of, bytes_of, first_of, op_name, size_of, slice_of
from ringpass.passes.partition.emitter import Emitter
from ringpass.passes.plan.axes import Axis

aten = torch.ops.aten
TAKES = ("select.int", "slice.Tensor", "index.Tensor", "index_select.default")


class Takes(Emitter):
    """Writes selects, slices and indices along the sequence."""

    locals: dict[Node, Any]
    wholes: dict[Node, Any]

    def _report(self, node: Node, reason: str) -> None:
        raise NotImplementedError

    def _write_taken(self, node: Node) -> Node | None:
        """The tokens that `node` takes of a local value; None where it does not, or where they are many."""
        if op_name(node) not in TAKES:
            return None
        source = first_of(node)
        axis = self.placement.modes[source]
        if axis is None or source not in self.locals or source in self.wholes or 2 * bytes_of(node) > bytes_of(source):
            return None
        dim, outer, tokens, *_ = self._shard_args(source, axis)
        if outer != 1 or source.meta["val"].shape[dim] != axis.tokens:
            return None
        x = self.locals[source]
        indexed = op_name(node) == "index.Tensor"
        taken = self._indexed(node, x, dim, axis) if indexed else self._selected(node, x, dim, axis)
        if taken is not None and self.rank.world * bytes_of(node) > bytes_of(source):
            self._report(node, f"{op_name(node)} takes more tokens than a rank holds")
        return taken

    def _selected(self, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
        """The tokens of a select, a slice or an index_select along the sequence."""
        positions = self._positions(node, dim)
        if positions is None:
            return None
        held, at = self._located(positions, axis)
        part = self._emit(aten.index_select.default, x, dim, at, name=node.name)
        held = self._emit(aten.view.default, held, [-1] + [1] * (x.meta["val"].ndim - dim - 1))
        taken = self._summed(part, held)
        return self._emit(aten.squeeze.dim, taken, dim) if op_name(node) == "select.int" else taken

    def _positions(self, node: Node, dim: int) -> Node | None:
        """The positions, 1-D, that a select or slice along `dim` takes, or an index_select."""
        name, args, device = op_name(node), args_of(node), node.meta["val"].device
        if name == "index_select.default":
            return (
                self._operand(args[2], None, "positions") if args[1] % first_of(node).meta["val"].ndim == dim else None
            )
        if name == "select.int":
            along, start, step, count = args[1] % first_of(node).meta["val"].ndim, args[2], 1, 1
        else:
            along, start, _, step = slice_of(node)
            start, count = start or 0, self._size(size_of(node.meta["val"].shape[dim]))
        if along != dim or not all(type(n) is int for n in (start, step)):
            return None
        first = self._emit(aten.arange.default, count, device=device)
        scaled = self._emit(aten.mul.Tensor, first, step) if step != 1 else first
        return self._emit(aten.add.Tensor, scaled, start)

    def _indexed(self, node: Node, x: Node, dim: int, axis: Axis) -> Node | None:
        """x[.., positions, ..] with integer positions along the sequence, and others before or after them."""
        picks = list(args_of(node)[1])
        if dim >= len(picks) or picks[dim] is None or any(self._is_local(p) for p in picks if p is not None):
            return None
        given: list[Any] = [None if p is None else self._operand(p, None, "positions") for p in picks]
        held, given[dim] = self._located(given[dim], axis)
        part = self._emit(aten.index.Tensor, x, given, name=node.name)
        after = x.meta["val"].ndim - len(picks) + sum(p is None for p in picks[dim:])
        held = self._emit(aten.view.default, held, [*held.meta["val"].shape, *[1] * after])
        return self._summed(part, held)

    def _is_local(self, node: Node) -> bool:
        return node in self.locals and node not in self.wholes

    def _located(self, positions: Node, axis: Axis) -> tuple[Node, Node]:
        """Whether this rank holds the token at each of `positions`, and its row here (0 where it does not)."""
        where = axis.layout.name, self.rank.world, self.rank.rank
        rows = self._emit(ops.locate, positions, self._tokens(axis), *where, name=f"{positions.name}_rows")
        return self._emit(aten.ge.Scalar, rows, 0), self._emit(aten.clamp_min.default, rows, 0)

    def _summed(self, part: Node, held: Node) -> Node:
        """The tokens, from the rank that holds each of them."""
        mine = self._emit(aten.where.ScalarOther, held, part, 0)
        return self._emit(ops.reduce, mine, self.rank.group, name=f"{part.name}_taken")
