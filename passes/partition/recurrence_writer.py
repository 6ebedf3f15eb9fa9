"""recurrence_writer: one rank's part of a recurrence: its own chunks, and the states that it receives and sends.

    picks, and what follows from them     written by the owner of the chunk alone
    hand-over                             `send_states` on one rank, `receive_states` on the other, nothing elsewhere
    writes                                the values that this rank owns, into its local chunks
    views                                 tokens of whole chunks, redistributed, as local chunks; and back

Contract: ranks write different nodes, but what passes between two of them stands in one order on all.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node, map_arg

from ringpass import ops
from ringpass.nodes import args_of, first_of, tensors_of
from ringpass.passes.op_rules.spec import GraphSize, Writer
from ringpass.passes.op_rules.table import rule_for
from ringpass.passes.partition.recurrence import Recurrence
from ringpass.passes.propagate.axis import Axis

aten = torch.ops.aten


class RecurrenceWriter:
    """What has been written of one recurrence."""

    def __init__(self, writer: Writer, recurrence: Recurrence) -> None:
        self.writer, self.recurrence = writer, recurrence
        self.values: dict[Node, Node] = {}  # owned values, made here or received
        self.whole: dict[Node, Node] = {}  # tokens of whole chunks
        self.token: Node | None = None
        self.handed = 0

    def write(self, node: Node, shards: dict[Node, Node]) -> None:
        """One captured node of the recurrence; into `shards` its local tokens or chunks, if it has those of several."""
        recurrence, writer = self.recurrence, self.writer
        while self.handed < len(recurrence.handed) and recurrence.handed[self.handed].reader is node:
            self._hand_over()
        if node in recurrence.owned:
            if node in recurrence.picks:
                self._pick(node)
            elif recurrence.owners[recurrence.owned[node]] == writer.rank.rank:
                args, kwargs = map_arg((node.args, node.kwargs), self._operand)
                self.values[node] = writer.copy(node, args, kwargs)
            return
        local = self._put(node) if node in recurrence.writes else self._view(node)
        if node in recurrence.ends and self.token is not None:
            local = writer.emit(ops.end_states, local, self.token, name=f"{node.name}_end")
        if node in recurrence.leaving:
            local = self._moved(
                node, local, recurrence.layout, recurrence.leaving[node].layout.name, recurrence.leaving[node]
            )
        shards[node] = local

    def _operand(self, node: Node) -> GraphSize:
        """An operand of a node that is owned here."""
        return self.values[node] if node in self.values else self.writer.operand(node, None, "operand of a recurrence")

    def _pick(self, node: Node) -> None:
        """The part of a chunk, of the local ones."""
        (chunk, each), source, writer = self.recurrence.picks[node], first_of(node), self.writer
        local = self._chunks(source)
        if self.recurrence.owners[chunk] != writer.rank.rank:
            return
        taken = rule_for(node).takes_part(node)
        assert taken is not None
        dim, start, stop = taken
        shift = (self.recurrence.index(chunk) - chunk) * each
        alone = local.meta["val"].ndim > node.meta["val"].ndim
        bounds = (start + shift,) if alone else (start + shift, stop + shift)
        self.values[node] = writer.copy(node, (local, dim, *bounds), {})

    def _chunks(self, node: Node) -> Node:
        """The local chunks of a value, or their tokens."""
        recurrence, writer = self.recurrence, self.writer
        axis = recurrence.entering.get(node)
        if axis is None:
            return writer.sharded(node, recurrence.axis)
        if node not in self.whole:
            self.whole[node] = self._moved(node, writer.sharded(node, axis), axis.layout.name, recurrence.layout, axis)
        return self.whole[node]

    def _moved(self, node: Node, x: Node, layout: str, other: str, axis: Axis) -> Node:
        """Tokens of `node` in another layout of their axis."""
        dim, outer, tokens, _, world, rank = self.writer.shard_args(node, axis)
        args = dim, outer, tokens, layout, other, world, rank, self.writer.rank.group
        return self.writer.emit(ops.redistribute, x, *args, name=f"{node.name}_moved")

    def _put(self, node: Node) -> Node:
        """What is owned here, put into the local chunks."""
        (put, each), recurrence, writer = self.recurrence.writes[node], self.recurrence, self.writer
        mine = [(n, a, b) for n, a, b in put.parts if recurrence.owners[a // each] == writer.rank.rank]
        if put.base is None:
            return writer.copy(node, ([self.values[n] for n, _, _ in mine], *args_of(node)[1:]), node.kwargs)
        local: Node = writer.sharded(put.base, recurrence.axis)
        for part, start, stop in mine:
            shift = (recurrence.index(start // each) - start // each) * each
            bounds = put.dim, start + shift, stop + shift
            local = writer.emit(aten.slice_scatter.default, local, self.values[part], *bounds, name=node.name)
        return local

    def _view(self, node: Node) -> Node:
        """Tokens as chunks of tokens, or back, at the local size."""
        recurrence, writer, source = self.recurrence, self.writer, first_of(node)
        if node not in recurrence.leaving:
            shape = writer.local_shape(node, recurrence.axis)
            return writer.emit(aten.reshape.default, self._chunks(source), shape, name=node.name)
        dim = writer.shard_args(node, recurrence.leaving[node]).dim
        shape = list(node.meta["val"].shape)
        shape[dim] = recurrence.unit * recurrence.owners.count(writer.rank.rank)
        return writer.emit(aten.reshape.default, writer.sharded(source, recurrence.axis), shape, name=node.name)

    def _hand_over(self) -> None:
        """The next transfer, which only two ranks write."""
        one, writer = self.recurrence.handed[self.handed], self.writer
        if self.token is None:
            entering = [self._element(self._chunks(n)) for n in self.recurrence.begins]
            like = entering or [self._chunks(first_of(next(iter(self.recurrence.picks))))]
            self.token = writer.emit(ops.begin_states, like, name="states_begin")
        self.handed += 1
        (value,), name = tensors_of(one.value), one.value.name
        if writer.rank.rank == one.src:
            states = [self.token, self.values[one.value]]
            self.token = writer.emit(ops.send_states, states, one.dst, writer.rank.group, name=f"{name}_sent")
        elif writer.rank.rank == one.dst:
            args = self.token, list(value.shape), value.dtype, one.src, writer.rank.group
            received = writer.emit(ops.receive_states, *args, name=f"{name}_transfer")
            self.token = writer.emit(operator.getitem, received, 0, name=f"{name}_token")
            self.values[one.value] = writer.emit(operator.getitem, received, 1, name=f"{name}_received")

    def _element(self, x: Node) -> Node:
        """The first element of a value."""
        for _ in range(x.meta["val"].ndim):
            x = self.writer.emit(aten.select.int, x, 0, 0)
        return x
