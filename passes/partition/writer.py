"""partition: captured graph + placement -> the program of one rank.  The only writer of graphs before autograd.

A value is *replicated* (full length, the same on every rank) or *sharded* (each rank has its tokens of one axis).  A
node that `place` put on axis A takes its operands with a dim on A sharded, and the others replicated, through the op
`replicate` where they need a gradient.  A node that runs replicated gathers operands that are sharded; each gather is
reported with its reason and bytes.  What is written for an op is in its record (`passes.op_rules`).

    placeholders; replicate(parameters) in buckets
    for node in graph, if live: write it in its mode, lengths that name S become L
    outputs: sharded ones are described to the caller, which shows them as tensors of global shape

Contract: the sequence of nodes does not depend on the rank, but in recurrences (`recurrence_writer`); constants do.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from ringpass import ops
from ringpass.devices import device_of
from ringpass.errors import RingpassError, UnsupportedError
from ringpass.layouts.layout import REPLICATED, Layout
from ringpass.nodes import (
    args_of,
    bound_of,
    bytes_of,
    first_of,
    mutates,
    op_name,
    operands_of,
    outside_no_grad,
    returned_or_written,
    size_of,
    source_line,
)
from ringpass.passes.capture.capture import Captured
from ringpass.passes.failures import CannotWriteError
from ringpass.passes.op_rules.spec import GraphSize, Rank, ShardArgs
from ringpass.passes.op_rules.table import draws_counter_based, draws_shared, reads, rule_for
from ringpass.passes.partition.attention import write_site
from ringpass.passes.partition.emitter import Emitter
from ringpass.passes.partition.flops import flops_of, whole_work
from ringpass.passes.partition.partitioned import Gather, OutputSize, Partitioned, ShardedInput, ShardedOutput
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.partition.recurrence_writer import RecurrenceWriter
from ringpass.passes.plan.plan import RingPlan
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import product

BUCKET_BYTES = 25 * 2**20
Use = tuple[Node, bool]
"""An input, and whether ops on an axis read it, of which each rank makes a part of its gradient, or replicated ones."""


def partition(
    captured: Captured, placement: PlacementPlan, plan: RingPlan, rank: Rank, strict: bool, gather_outputs: bool
) -> Partitioned:
    """Writes the program of `rank`.

    Raises UnsupportedError under `strict` where something must be gathered, CannotWriteError where a record fails.
    """
    return Writer(captured, placement, plan, rank, strict, gather_outputs).write()


class Writer(Emitter):
    """The program of one rank while it is written: the replicated and the sharded form of each captured node."""

    def __init__(
        self,
        captured: Captured,
        placement: PlacementPlan,
        plan: RingPlan,
        rank: Rank,
        strict: bool,
        gather_outputs: bool,
    ) -> None:
        super().__init__(captured, placement, rank)
        self.plan, self.strict, self.gather_outputs = plan, strict, gather_outputs
        self.replicas: dict[Node, Node] = {}
        self.shards: dict[Node, Node] = {}
        self.resharded: dict[tuple[Node, int], Node] = {}  # shards on another axis than the node runs on
        self.broadcasts: dict[Node, Node] = {}
        self.parts: dict[Node, tuple[int, int]] = {}  # slices that are taken when the output is used
        self.gathers: list[Gather] = []
        self.whole: dict[Node, int] = {}  # nodes that follow from gathered values on every rank, and their FLOPs
        self.host_copies: dict[Node, Node] = {}
        self.recurrences: dict[Any, RecurrenceWriter] = {}  # by recurrence
        self.seed: Node | None = None
        self.streams = 0
        self.keeps = True  # whether what is written now may serve later nodes: not inside a no_grad region of the model

    def write(self) -> Partitioned:
        """Writes the program, and describes its inputs and outputs."""
        nodes, live = list(self.captured.gm.graph.nodes), self.placement.live
        placeholders = [node for node in nodes if node.op == "placeholder"]
        sharded = tuple(filter(None, (self._write_input(i, node) for i, node in enumerate(placeholders))))
        if any(self._draws(n) for n in live):
            with self.captured.fake_mode:
                self.seed = self.placeholder("ringpass_seed", {"val": self._seed()})
        self._replicate_parameters()
        self._copy_inputs_to_host()
        for node in nodes:
            if node in live and node.op not in ("placeholder", "output"):
                self.origin = node
                self._write_or_refuse(node)
        outputs, extras = self._write_outputs(nodes[-1])
        inputs = [n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"]
        positions = {one.position for one in sharded}
        for i, fake in enumerate(self.captured.inputs):
            inputs[i] = inputs[i] if i in positions else fake
        gm = GraphModule(self.captured.gm, self.graph)
        reads = any(node.target is ops.host_copy for node in self.graph.nodes)
        draws, seeded = any(draws_shared(n) for n in live), self.seed is not None
        gathers, work = tuple(self.gathers), whole_work(self.whole)
        return Partitioned(gm, tuple(inputs), outputs, extras, gathers, work, seeded, sharded, draws, reads)

    def _seed(self) -> torch.Tensor:
        """What stands for the seed of a call, on the device where its random numbers are drawn."""
        return torch.zeros((), dtype=torch.int64, device=device_of(self.captured.inputs))

    def _write_input(self, position: int, node: Node) -> ShardedInput | None:
        """The placeholder of an input: replicated, or, if it comes sharded, of the local shape."""
        axis = self.placement.modes[node]
        if axis is None:
            self.replicas[node] = self.placeholder(node.name, node.meta)
            return None
        dim = next(i for i, d in enumerate(self.placement.sweep.dims(node)) if self.placement.axes(d))
        value, layout = node.meta["val"], axis.layout
        shape = [*value.shape[:dim], layout.length(self.rank.rank, value.shape[dim]), *value.shape[dim + 1 :]]
        with self.captured.fake_mode:
            shard = torch.empty(shape, dtype=value.dtype, device=value.device)
        shard.requires_grad_(self.captured.inputs[position].requires_grad)
        self.shards[node] = self.placeholder(node.name, {**node.meta, "val": shard})
        return ShardedInput(position, dim, layout.name)

    # --- one node ---------------------------------------------------------------------------------------------------

    def _write_or_refuse(self, node: Node) -> None:
        """One captured node, in its mode.  Raises CannotWriteError where its record fails on local tokens."""
        try:
            self._write(node)
        except RingpassError:
            raise
        except Exception as error:
            if self.placement.modes[node] is None:
                raise
            raise CannotWriteError(node) from error

    def _write(self, node: Node) -> None:
        """One captured node, in its mode."""
        axis, rule, recurrence = self.placement.modes[node], rule_for(node), self.placement.recurrences.get(node)
        if isinstance(node.meta.get("val"), torch.SymInt):
            return  # written on demand, from the sizes of the inputs
        if recurrence is not None:
            return self.recurrences.setdefault(recurrence, RecurrenceWriter(self, recurrence)).write(node, self.shards)
        if node in self.replicas:
            return  # one of several results that were reduced
        if node in self.placement.sites:
            (self.replicas if axis is None else self.shards)[node] = write_site(self, self.placement.sites[node])
        elif node not in self.placement.slices and (part := self._returned_part(node)) is not None:
            self.parts[node] = part
        elif axis is not None and self.placement.reduces(node):
            self._write_reduced(node, axis)
        elif axis is not None:
            self.shards[node] = self._checked(rule.write(self, node, axis), node, axis)
        elif (selected := self._write_selected(node)) is not None:
            self.replicas[node] = selected
        else:
            self.replicas[node] = self._write_replicated(node)
            gathered = any(n in self.whole or (n in self.shards and n in self.replicas) for n in reads(node))
            if gathered and not mutates(node):
                self.whole[node] = flops_of(node)

    def _write_reduced(self, node: Node, axis: Axis) -> None:
        """A node that sums over `axis`; of several results, those that are read."""
        reduce = rule_for(node).reduce
        assert reduce is not None, node
        written = reduce(self, node, axis)
        if isinstance(written, Node):
            self.replicas[node] = written
        else:
            read = [user for user in node.users if user in self.placement.live]
            self.replicas |= {user: written[args_of(user)[1]] for user in read}

    def _returned_part(self, node: Node) -> tuple[int, int] | None:
        """The tokens of a sharded value that `node` takes, where it does nothing else and is nothing but an output."""
        taken = rule_for(node).output_part(node) if node.op == "call_function" else None
        if taken is None or self.gather_outputs or not self.keeps:
            return None
        source, (dim, start, stop, step) = first_of(node), taken
        shape, axis = source.meta["val"].shape, self.placement.modes[source]
        users = [n for n in node.users if n in self.placement.live]
        returned = all(user.op == "output" for user in users) and shape != node.meta["val"].shape
        if axis is None or source not in self.shards or not isinstance(shape[dim], int) or not returned:
            return None
        sharded, outer, tokens, *_ = self.shard_args(source, axis)
        first, last, _ = slice(start, stop).indices(shape[dim])
        return (first, last) if (sharded, outer, tokens, step) == (dim, 1, shape[dim], 1) else None

    def _write_selected(self, node: Node) -> Node | None:
        """The tokens that `node` takes of a sharded value; None where it takes none, or many: it is gathered then.

        At most half of the value is taken so, by all that take of it; more than a rank holds is reported.  Of a section
        nothing is: a rank may hold none of it.
        """
        select = rule_for(node).select if node.op == "call_function" else None
        source = first_of(node) if select else node
        axis = self.placement.modes[source]
        if select is None or axis is None or not self.is_sharded(source) or axis.layout.section:
            return None
        if not self.placement.few_are_taken(source):
            return None
        dim, outer, *_ = self.shard_args(source, axis)
        size = source.meta["val"].shape[dim]
        if outer == 1:
            unit = product(self.placement.sweep.dims(source)[dim][1:])
            if not unit.is_Integer:
                return None
            axis = replace(axis, tokens=size, layout=axis.layout.in_units(int(unit)))
        elif not isinstance(outer, int) or not isinstance(axis.tokens, int) or size != outer * axis.tokens:
            return None
        taken = select(self, node, self.shards[source], dim, axis)
        if taken is not None and self.rank.world * bytes_of(node) > bytes_of(source):
            self.report(node, f"{op_name(node)} takes more tokens than a rank holds")
        return taken

    def _write_replicated(self, node: Node) -> Node:
        if node.op == "get_attr":
            new = self.graph.get_attr(str(node.target))
            new.meta.update(node.meta)
            return new
        self.keeps = outside_no_grad(node, self.keeps)
        known = self.placement.sweep.notes[node].known
        reason = f"{op_name(node)} needs all tokens" if known else f"no rule for {op_name(node)}"
        if mutates(node):
            reason = "output"  # what a call leaves in an input is one of its outputs
        return rule_for(node).write_replicated(self, node, reason)

    def _checked(self, new: Node, node: Node, axis: Axis) -> Node:
        """A record that is wrong about its op shows here: the local result must have the local shape."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in value.shape):
            got, want = list(new.meta["val"].shape), self.local_shape(node, axis)
            assert got == want, f"{op_name(node)} on local tokens gave {got}, its rule says {want}"
        return new

    # --- what records ask for ---------------------------------------------------------------------------------------

    def next_stream(self) -> int:
        """A number of its own for each random op, the same on every rank."""
        self.streams += 1
        return self.streams

    def replicated_args(self) -> ShardArgs:
        """`shard_args` of a value that is replicated."""
        return ShardArgs(0, 1, 1, REPLICATED, self.rank.world, self.rank.rank)

    def is_sharded(self, node: Node) -> bool:
        """Whether `node` has been written sharded, and not replicated."""
        return node in self.shards and node not in self.replicas

    def either(self, node: Node, reason: str) -> GraphSize:
        """`node` in whichever form there is, for an op that reads its dtype and device alone."""
        return self.shards[node] if self.is_sharded(node) else self.operand(node, None, reason)

    # --- operands ---------------------------------------------------------------------------------------------------

    def operands(self, node: Node, axis: Axis | None, reason: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of `node` with each node in them as `operand` gives it."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.operand(n, axis, reason))
        return args, kwargs

    def operands_by_name(self, node: Node, axis: Axis, reason: str) -> dict[str, Any]:
        """The arguments of an ATen op by name, with each node as `operand` gives it."""
        return {k: self.operand(x, axis, reason) if isinstance(x, Node) else x for k, x in bound_of(node).items()}

    def operand(self, node: Node, axis: Axis | None, reason: str) -> GraphSize:
        """`node` as an operand of what runs on `axis` (None: replicated): a size, its local tokens, or all tokens."""
        if isinstance(node.meta.get("val"), torch.SymInt):
            return self.size(size_of(node.meta["val"]))
        if axis is None:
            return self.replicated(node, reason)
        assert self.origin is not None
        source = self.placement.source(self.origin, node, axis)
        return self.sharded(node, axis) if source else self.broadcast(node, reason)

    def replicated(self, node: Node, reason: str) -> Node:
        """`node` at full length: gathered, and reported with `reason`, if it is sharded."""
        if node not in self.replicas and rule_for(node).constant:
            self.replicas[node] = self._write_replicated(node)
        if node not in self.replicas:
            axis = self.placement.modes[node]
            assert axis is not None and isinstance(node.meta["val"], torch.Tensor), node
            if not self.placement.few_tokens(node):
                self.report(node, reason)
            args = self.shard_args(node, axis)
            gathered = self.emit(ops.gather, self.shards[node], *args, self.rank.group, name=f"{node.name}_gathered")
            gathered = self.ordered(gathered, args, inverse=True)
            if not self.keeps:
                return gathered
            self.replicas[node] = gathered
        return self.replicas[node]

    def report(self, node: Node, reason: str) -> None:
        """Notes that `node` is gathered on every rank.  Raises UnsupportedError under `strict`, except for outputs."""
        op = op_name(self.origin) if self.origin is not None and self.origin.op == "call_function" else ""
        gather = Gather(node.name, reason, bytes_of(node), source_line(self.origin), op)
        if self.strict and reason != "output":
            raise UnsupportedError(
                f"strict=True refuses to {gather}. The op reads tokens of all ranks: rewrite that line token by "
                "token, or drop strict to gather (same numbers, more memory)."
            )
        self.gathers.append(gather)

    def sharded(self, node: Node, axis: Axis) -> Node:
        """This rank's tokens of `node` on `axis`, redistributed if the node runs on another axis."""
        if node in self.shards and self.placement.modes[node] is axis:
            return self.shards[node]
        if (node, axis.index) not in self.resharded:
            moved = self._write_redistribution(node, axis) or self._write_all_to_all(node, axis)
            shard = moved or self._write_shard(node, axis)
            if not self.keeps:
                return shard
            self.resharded[node, axis.index] = shard
        return self.resharded[node, axis.index]

    def _write_shard(self, node: Node, axis: Axis) -> Node:
        """Of all tokens, those of this rank."""
        args = self.shard_args(node, self._axis_of(node, axis))._replace(layout=axis.layout.name)
        replicated = self.ordered(self.replicated(node, "used on another sequence axis"), args, inverse=False)
        return self.emit(ops.shard, replicated, *args, self.rank.group, name=f"{node.name}_local")

    def _write_redistribution(self, node: Node, axis: Axis) -> Node | None:
        """The tokens of another slice of the axis's sequence, sent to where those of `axis` are that they go with."""
        source = self._axis_of(node, axis)
        if source is axis or self.placement.modes[node] is not source or node not in self.shards:
            return None
        *where, layout, world, rank = self.shard_args(node, source)
        args = *where, layout, axis.layout.name, world, rank, self.rank.group
        return self.emit(ops.redistribute, self.shards[node], *args, name=f"{node.name}_moved")

    def _write_all_to_all(self, node: Node, axis: Axis) -> Node | None:
        """All tokens of this rank's part of another dim, from its tokens with all of that dim, or back."""
        source = self.placement.modes[node]
        if source is None or source is axis or node not in self.shards or not self.placement.on(node, axis):
            return None
        held, wanted = self.shard_args(node, source), self.shard_args(node, axis)
        if held.dim == wanted.dim:
            return None
        x = self.ordered(self.shards[node], wanted, inverse=False)
        args = *held[:4], *wanted[:4], self.rank.world, self.rank.rank, self.rank.group
        moved = self.emit(ops.all_to_all, x, *args, name=f"{node.name}_all_to_all")
        return self.ordered(moved, held, inverse=True)

    def _axis_of(self, node: Node, axis: Axis) -> Axis:
        """`axis`, or the axis of its sequence that `node` is on instead."""
        if self.placement.on(node, axis):
            return axis
        (found,) = {a for d in self.placement.sweep.operand_dims(node) for a in self.placement.axes(d)}
        assert found.sequence is axis.sequence and found.sequence is not None, (node, found, axis)
        return found

    def ordered(self, replicated: Node, shard_args: tuple[Any, ...], inverse: bool) -> Node:
        """All tokens in the order of the layout's curve, or, inverse, back in their own."""
        dim, outer, tokens, layout, world, _ = shard_args
        order = Layout(layout, world).order
        if order is None:
            return replicated
        name = f"{replicated.name}_{'restored' if inverse else 'permuted'}"
        return self.emit(ops.permute, replicated, dim, outer, tokens, str(order), inverse, name=name)

    def broadcast(self, node: Node, reason: str) -> Node:
        """`node` replicated, for ops on an axis: its gradients are summed over ranks."""
        replicated = self.replicated(node, reason)
        if node not in self.placement.tracked or (not self.keeps and node not in self.broadcasts):
            return replicated
        if node not in self.broadcasts:
            self._replicate([(node, True)])
        return self.broadcasts[node]

    def _replicate(self, uses: list[Use]) -> None:
        """One `replicate` of several values; nodes that run replicated read its results from now on too."""
        uses = sorted(uses, key=lambda use: not use[1])  # those that replicated nodes read come last
        equal = sum(not on_axis for _, on_axis in uses)
        values = [self.replicas[node] for node, _ in uses]
        out = self.emit(ops.replicate, values, equal, self.rank.rank, self.rank.group, name="replicate")
        for i, (node, on_axis) in enumerate(uses):
            name = f"{node.name}_replicated" if on_axis else f"{node.name}_equal"
            (self.broadcasts if on_axis else self.replicas)[node] = self.emit(operator.getitem, out, i, name=name)

    def _replicate_parameters(self) -> None:
        """One `replicate` per bucket of inputs, those that the forward uses last first: their gradients come first."""
        uses: dict[Use, None] = {}
        keeps = True
        for node in self.captured.gm.graph.nodes:
            keeps = outside_no_grad(node, keeps)
            if keeps and node in self.placement.live:
                uses |= dict.fromkeys(self._uses(node))
        buckets: list[list[Use]] = []
        filled = BUCKET_BYTES
        for use in reversed(uses):
            filled += bytes_of(use[0])
            if filled > BUCKET_BYTES:
                buckets.append([])
                filled = bytes_of(use[0])
            buckets[-1].append(use)
        for bucket in buckets:
            self._replicate(bucket)

    def host_copy(self, value: Node) -> Node:
        """`value` on the host: one copy for all sites that read it."""
        if value not in self.host_copies:
            copy = self.emit(ops.host_copy, value, name=f"{value.name}_on_host")
            if not self.keeps:
                return copy
            self.host_copies[value] = copy
        return self.host_copies[value]

    def _copy_inputs_to_host(self) -> None:
        """Inputs that prune schedules are read first: the host waits for no work of this call."""
        for site in self.placement.sites.values():
            for leaf in (site.ordered.leaves[i] for i in site.pruning):
                if leaf.op == "placeholder" and leaf in self.replicas:
                    self.host_copy(self.replicas[leaf])

    def _uses(self, node: Node) -> list[Use]:
        """The inputs whose gradients `node` makes parts of, if it runs on an axis, or may make differ between ranks."""
        on_axis = [(x, True) for x in self.placement.replicated_operands(node) if self._needs_gradient(x)]
        made_alone = [(x, False) for x in operands_of(node) if self._differs(x, node)]
        return [*on_axis, *made_alone]

    def _needs_gradient(self, node: Node) -> bool:
        return node.op == "placeholder" and node in self.placement.tracked and node in self.replicas

    def _differs(self, node: Node, user: Node) -> bool:
        """Whether each rank computes a gradient of the parameter `node` through `user` by itself."""
        if self.rank.world == 1 or not self._needs_gradient(node):
            return False
        if node not in self._parameters or returned_or_written(node):
            return False
        return self.placement.reaches_replicated(user)

    @cached_property
    def _parameters(self) -> frozenset[Node]:
        """The inputs that are parameters."""
        given = zip(self.captured.gm.graph.find_nodes(op="placeholder"), self.captured.inputs, strict=True)
        return frozenset(node for node, value in given if isinstance(value, torch.nn.Parameter))

    def _draws(self, node: Node) -> bool:
        site = self.placement.sites.get(node)
        return draws_counter_based(node) or (site is not None and site.site.dropout > 0)

    # --- outputs ----------------------------------------------------------------------------------------------------

    def _write_outputs(self, output: Node) -> tuple[tuple[ShardedOutput | None, ...], int]:
        """The output node; returns what each output is (None: replicated), and how many sizes stand after them."""
        self.origin = None
        results: list[Any] = []
        described: list[ShardedOutput | None] = []
        extras: list[Node] = []
        for value in args_of(output)[0]:
            if value in self.parts:
                results.append(self.shards[first_of(value)])
                source = self._describe(first_of(value), extras)
                described.append(replace(source, name=value.name, part=self.parts[value]))
            elif isinstance(value, Node) and self._by_tokens(value) and not self.gather_outputs:
                results.append(self.shards[value])
                described.append(self._describe(value, extras))
            else:
                results.append(self.operand(value, None, "output") if isinstance(value, Node) else value)
                described.append(None)
        node = self.graph.output((*results, *extras))
        node.meta.update(output.meta)
        return tuple(described), len(extras)

    def _by_tokens(self, node: Node) -> bool:
        """Whether ranks hold their tokens of an output, rather than parts of another dim."""
        return self.is_sharded(node) and self.placement.modes[node] in self.placement.axis_of.values()

    def _describe(self, node: Node, extras: list[Node]) -> ShardedOutput:
        axis = self.placement.modes[node]
        assert axis is not None
        dim, outer, tokens, layout, *_ = self.shard_args(node, axis)

        def returned(n: GraphSize) -> OutputSize:
            if not isinstance(n, Node):
                return n
            if n not in extras:
                extras.append(n)
            return "extra", extras.index(n)

        return ShardedOutput(node.name, dim, returned(outer), returned(tokens), layout)
