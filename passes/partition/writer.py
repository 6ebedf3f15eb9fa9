"""partition: captured graph + plan -> the program of one rank.  The only writer of graphs before autograd.

A value is *whole* (full length, the same on every rank) or *local* (this rank's tokens of one axis).  A node that
`placement` put on axis A takes its operands with a dim on A local, and the others whole, through `replicate` where they
need a gradient.  A node that runs whole gathers operands that are local; each gather is reported with its reason and
bytes.

    placeholders; replicate(parameters) in buckets
    for node in graph, if live: write it in its mode, lengths that name S become L
    outputs: local ones are described to the caller, which shows them as tensors of global shape

Contract: the sequence of nodes does not depend on the rank; ranks differ in constants only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from ringpass import ops
from ringpass.errors import UnsupportedError
from ringpass.layouts.layout import Layout
from ringpass.layouts.reindex import of_curve_positions
from ringpass.masks.expr import TRUE, Expr, call
from ringpass.nodes import args_of, bytes_of, first_of, op_name, size_of, slice_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.op_rules.reductions import Sums
from ringpass.passes.op_rules.selecting import Takes
from ringpass.passes.op_rules.slicing_writer import Runs
from ringpass.passes.op_rules.table import CONSTANT, CREATION, FUNCTION, PATTERNED, RESIZED
from ringpass.passes.partition.emitter import Rank
from ringpass.passes.partition.placement import Placement, draws_elsewhere, is_dropout, place
from ringpass.passes.plan.axes import Axis
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.passes.propagate.factors import Sweep
from ringpass.schedule.block_selection import TopBlocks, chosen_blocks

aten = torch.ops.aten
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class LocalOutput:
    """An output that holds this rank's tokens; `dim` has size outer * L * inner.

    `outer` and `tokens` are ints, or `("extra", i)`: the value of extra output i, where they are symbolic.  `part`: the
    model returns these tokens alone (start, stop), such as the last ones for a cache.
    """

    name: str
    dim: int
    outer: Any
    tokens: Any
    layout: str
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class LocalInput:
    """Input number `position` is this rank's tokens in dim `dim`."""

    position: int
    dim: int
    layout: str


@dataclass(frozen=True)
class Gather:
    """A value that had to be gathered: which, why, at how many bytes, for which line of the model."""

    value: str
    reason: str
    bytes: int
    where: str

    def __str__(self) -> str:
        return f"gather {self.value} ({self.bytes} bytes): {self.reason}{f', {self.where}' if self.where else ''}"


@dataclass(frozen=True)
class Partitioned:
    """One rank's program.  `inputs`: fakes for its placeholders: the captured graph's, then the seed if `seeded`."""

    gm: GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[LocalOutput | None, ...]
    extras: int  # symbolic sizes returned after the outputs
    gathers: tuple[Gather, ...]
    seeded: bool
    shares: tuple[LocalInput, ...]
    draws: bool  # random ops that draw from the default generator, which the ranks must then share


def partition(
    captured: Captured,
    plan: RingPlan,
    sweep: Sweep,
    rank: Rank,
    strict: bool,
    gather_outputs: bool,
    shares: Mapping[int, int] | None = None,
) -> Partitioned:
    """Writes the program of `rank`.  Raises UnsupportedError under `strict` where something must be gathered.

    `shares`: numbers of the inputs of which each rank has its own tokens, and in which dim.
    """
    placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    placement = place(captured, plan, sweep, {placeholders[i]: dim for i, dim in (shares or {}).items()})
    return _Writer(captured, placement, plan, rank, strict, gather_outputs).write()


class _Writer(Sums, Takes, Runs):
    def __init__(
        self, captured: Captured, placement: Placement, plan: RingPlan, rank: Rank, strict: bool, gather_outputs: bool
    ) -> None:
        super().__init__(captured, placement, rank)
        self.plan, self.strict, self.gather_outputs = plan, strict, gather_outputs
        self.wholes: dict[Node, Any] = {}
        self.locals: dict[Node, Any] = {}
        self.shards: dict[tuple[Node, int], Node] = {}
        self.broadcasts: dict[Node, Node] = {}
        self.parts: dict[Node, tuple[int, int]] = {}  # slices that are taken when the output is used
        self.gathers: list[Gather] = []
        self.seed: Node | None = None
        self.streams = 0
        self.keeps = True  # whether what is written now may serve later nodes: not inside a no_grad region of the model

    def write(self) -> Partitioned:
        nodes, live = list(self.captured.gm.graph.nodes), self.placement.live
        given = [node for node in nodes if node.op == "placeholder"]
        shares = tuple(filter(None, (self._write_input(i, node) for i, node in enumerate(given))))
        if any(self._draws(n) for n in live):
            with self.captured.fake_mode:
                self.seed = self._placeholder("ringpass_seed", {"val": torch.zeros((), dtype=torch.int64)})
        self._replicate_parameters()
        for node in nodes:
            if node in live and node.op not in ("placeholder", "output"):
                self.origin = node
                self._write(node)
        outputs, extras = self._write_outputs(nodes[-1])
        inputs = [n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"]
        local = {share.position for share in shares}
        for i, fake in enumerate(self.captured.inputs):
            inputs[i] = inputs[i] if i in local else fake
        gm = GraphModule(self.captured.gm, self.graph)
        draws = any(draws_elsewhere(n) for n in live)
        seeded = self.seed is not None
        return Partitioned(gm, tuple(inputs), outputs, extras, tuple(self.gathers), seeded, shares, draws)

    def _write_input(self, position: int, node: Node) -> LocalInput | None:
        """The placeholder of an input: whole, or, if it comes in shares, of the local shape."""
        axis = self.placement.modes[node]
        if axis is None:
            self.wholes[node] = self._placeholder(node.name, node.meta)
            return None
        dim = next(i for i, d in enumerate(self.placement.sweep.dims(node)) if self.placement.axes(d))
        value, layout = node.meta["val"], axis.layout
        shape = [*value.shape[:dim], layout.length(self.rank.rank, value.shape[dim]), *value.shape[dim + 1 :]]
        with self.captured.fake_mode:
            local = torch.empty(shape, dtype=value.dtype, device=value.device)
        local.requires_grad_(self.captured.inputs[position].requires_grad)
        self.locals[node] = self._placeholder(node.name, {**node.meta, "val": local})
        return LocalInput(position, dim, layout.name)

    # --- one node ---------------------------------------------------------------------------------------------------

    def _write(self, node: Node) -> None:
        axis = self.placement.modes[node]
        if isinstance(node.meta.get("val"), torch.SymInt):
            return  # written on demand, from the sizes of the inputs
        if node in self.placement.sites:
            (self.wholes if axis is None else self.locals)[node] = self._write_site(self.placement.sites[node])
        elif axis is not None and node in self.placement.runs:
            self.locals[node] = self._checked(self._write_run(node, axis), node, axis)
        elif (part := self._returned_part(node)) is not None:
            self.parts[node] = part
        elif axis is None and (taken := self._write_taken(node)) is not None:
            self.wholes[node] = taken
        elif axis is None:
            self.wholes[node] = self._write_whole(node)
        elif self.placement.sums(node):
            self.wholes[node] = self._write_sum(node, axis)
        else:
            self.locals[node] = self._write_local(node, axis)

    def _returned_part(self, node: Node) -> tuple[int, int] | None:
        """The tokens of a local value that `node` takes, where it does nothing else and is nothing but an output."""
        if op_name(node) != "slice.Tensor" or self.gather_outputs or not self.keeps or _keeps_shape(node):
            return None
        source, (dim, start, stop, step) = first_of(node), slice_of(node)
        axis, length = self.placement.modes[source], source.meta["val"].shape[dim]
        users = [n for n in node.users if n in self.placement.live]
        if (
            axis is None
            or source not in self.locals
            or not isinstance(length, int)
            or any(u.op != "output" for u in users)
        ):
            return None
        sharded, outer, tokens, *_ = self._shard_args(source, axis)
        first, last, _ = slice(start, stop).indices(length)
        return (first, last) if (sharded, outer, tokens, step) == (dim, 1, length, 1) else None

    def _write_whole(self, node: Node) -> Any:
        if node.op == "get_attr":
            new = self.graph.get_attr(str(node.target))
            new.meta.update(node.meta)
            return new
        self.keeps = _keeps_after(node, self.keeps)
        known = self.placement.sweep.notes[node].known
        reason = f"{op_name(node)} needs all tokens" if known else f"no rule for {op_name(node)}"
        if op_name(node) in CREATION:  # a tensor to take dtype and device from need not be whole
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._like(n, reason))
            return self._copy(node, args, kwargs)
        if op_name(node) in PATTERNED:
            return self._emit(
                aten.to.dtype, self._whole(first_of(node), reason), node.meta["val"].dtype, name=node.name
            )
        args, kwargs = self._operands(node, None, reason)
        if is_dropout(node):
            return self._write_dropout(node, args[0], (0, 1, 1, "replicated", self.rank.world, self.rank.rank))
        return self._copy(node, args, kwargs)

    def _write_local(self, node: Node, axis: Axis) -> Any:
        name = op_name(node)
        if is_dropout(node):
            return self._write_dropout(node, self._local(first_of(node), axis), self._shard_args(node, axis))
        if name == "dropout.default" or (name == "slice.Tensor" and _keeps_shape(node)):
            return self._local(first_of(node), axis)
        if name in PATTERNED:
            return self._emit(aten.to.dtype, self._local(first_of(node), axis), node.meta["val"].dtype, name=node.name)
        if self.placement.reads_around(node, axis):
            return self._checked(self._write_halo(node, axis), node, axis)
        args, kwargs = self._operands(node, axis, f"operand of {name}")
        if name == FUNCTION:  # elementwise: its results are like its operands
            new = self._copy(node, args, kwargs)
            new.meta["val"] = (args[2].meta["val"],) * len(node.meta["val"])
            return new
        if node in self.placement.sweep.routing.back:
            rows = self._local_shape(node, axis)[0]
            numbers = self._emit(aten.arange.default, rows, device=node.meta["val"].device)
            return self._copy(node, (*args[:2], numbers), kwargs)
        if name not in RESIZED:
            return self._checked(self._copy(node, args, kwargs), node, axis)
        shape, position = self._local_shape(node, axis), RESIZED[name]
        if name in CONSTANT or name == "expand.default":
            return self._copy(node, (*args[:position], shape, *args[position + 1 :]), kwargs)
        return self._emit(aten.reshape.default, args[0], shape, name=node.name)

    def _checked(self, new: Node, node: Node, axis: Axis) -> Node:
        """A rule that is wrong about an op shows here: its local result must have the local shape."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in value.shape):
            got, want = list(new.meta["val"].shape), self._local_shape(node, axis)
            assert got == want, f"{op_name(node)} on local tokens gave {got}, its rule says {want}"
        return new

    def _like(self, node: Node, reason: str) -> Any:
        """`node` as a pattern for dtype and device: whichever form there is."""
        if node in self.locals and node not in self.wholes:
            return self.locals[node]
        return self._operand(node, None, reason)

    def _write_dropout(self, node: Node, x: Node, shard_args: tuple[Any, ...]) -> Node:
        rate = float(args_of(node)[1])
        return self._emit(ops.dropout, x, self.seed, rate, self._stream(), *shard_args, name=node.name)

    def _stream(self) -> int:
        self.streams += 1
        return self.streams

    def _write_site(self, plan: SitePlan) -> Node:
        """Ring attention over the ranks; over this one alone where the site is replicated, all tokens on each."""
        site, problem, reason = plan.placed, plan.problem, f"attention {plan.site.node.name}"
        assert problem is not None
        q = self._local(site.q, plan.query_axis) if plan.query_axis else self._whole(site.q, reason)
        k, v = (self._keys(x, plan, reason) for x in (site.k, site.v))
        read = self._broadcast if plan.query_axis else self._whole
        leaves = [read(leaf, f"mask of {site.node.name}") for leaf in site.leaves]
        missing = 4 - site.q.meta["val"].ndim  # (B, S, D) has one head, (S, D) one batch too
        for _ in range(missing):
            q, k, v = (self._emit(aten.unsqueeze.default, x, min(1, x.meta["val"].ndim - 2)) for x in (q, k, v))
        batch = q.meta["val"].shape[0]
        k, v = (
            self._emit(aten.expand.default, x, [batch, -1, -1, -1]) if x.meta["val"].shape[0] != batch else x
            for x in (k, v)
        )
        names = problem.query_layout.name, problem.key_layout.name
        lengths = [self._size(size_of(x.meta["val"].shape[-2])) for x in (site.q, site.k)]
        if plan.query_axis is None:  # sharded ones are in their order already
            sides = list(zip((q, k, v), (0, 1, 1), strict=True))
            q, k, v = (self._ordered(x, (2, 1, lengths[i], names[i], 1, 0), inverse=False) for x, i in sides)
        seed, stream = (self.seed, self._stream()) if site.dropout else (None, 0)
        who = (self.rank.rank if plan.query_axis else 0), problem.world, self.rank.group
        mask, pruning = site.mask, plan.pruning
        if self.plan.approximate:
            leaves.append(self._choose_blocks(self.plan.approximate, plan, q, k, lengths, who))
            mask, pruning = self._chosen(plan, len(leaves) - 1), (*pruning, len(leaves) - 1)
        bias, score, sink = ("" if x is None else str(x) for x in (site.bias, site.score, site.sink))
        learned, pruned = (",".join(map(str, numbers)) for numbers in (self.placement.learned(plan), pruning))
        call = self._emit(
            ops.ring_attention, q, k, v, leaves, seed, str(mask), bias, site.scale, site.dropout, stream, *lengths,
            *names, problem.tile, *who, self.plan.comm, score, str(plan.dilation or ""), sink, learned, pruned,
            name=f"ring_attention_{site.index}",
        )  # fmt: skip
        out = self._emit(operator.getitem, call, 0, name=site.node.name)
        if plan.query_axis is None:
            out = self._ordered(out, (2, 1, lengths[0], names[0], 1, 0), inverse=True)
        for _ in range(missing):
            out = self._emit(aten.squeeze.dim, out, min(1, out.meta["val"].ndim - 3))
        return out

    def _keys(self, x: Node, plan: SitePlan, reason: str) -> Any:
        if plan.query_axis is None:
            return self._whole(x, reason)
        return self._local(x, plan.key_axis) if plan.key_axis else self._broadcast(x, reason)

    def _choose_blocks(self, how: TopBlocks, plan: SitePlan, q: Node, k: Node, lengths: Any, who: Any) -> Node:
        """The pairs of blocks that attend, the same on every rank: blocks of tokens, or of places along the curve."""
        rank, world, group = who
        assert plan.problem is not None
        layouts = plan.problem.query_layout, plan.problem.key_layout
        names = [layout.assignment if self.plan.along_curve else layout.name for layout in layouts]
        site = plan.placed if self.plan.along_curve else plan.site
        means = []
        for side, x, tokens, layout in zip("qk", (q, k), lengths, names, strict=True):
            where = 2, 1, tokens, layout, world, rank, group
            detached = self._emit(aten.detach.default, x)
            means.append(self._emit(ops.block_means, detached, how.block, *where, name=f"block_means_{side}"))
        about = site.scale, str(site.mask), *lengths, how.block, how.density, how.mass
        return self._emit(ops.choose_blocks, *means, *about, name=f"chosen_blocks_{site.index}")

    def _chosen(self, plan: SitePlan, leaf: int) -> Expr:
        """The mask of a site, and only the pairs of blocks that leaf number `leaf` keeps."""
        assert plan.problem is not None and self.plan.approximate is not None
        chosen = chosen_blocks(TRUE, leaf, self.plan.approximate)
        if not self.plan.along_curve:
            layouts = (("q", plan.problem.query_layout), ("k", plan.problem.key_layout))
            chosen = of_curve_positions(chosen, {name: layout.order for name, layout in layouts if layout.order})
        return call("and", plan.placed.mask, chosen)

    # --- operands ---------------------------------------------------------------------------------------------------

    def _operand(self, node: Node, axis: Axis | None, reason: str) -> Any:
        if isinstance(node.meta.get("val"), torch.SymInt):
            return self._size(size_of(node.meta["val"]))
        if axis is None:
            return self._whole(node, reason)
        assert self.origin is not None
        source = self.placement.source(self.origin, node, axis)
        return self._local(node, axis) if source else self._broadcast(node, reason)

    def _whole(self, node: Node, reason: str) -> Any:
        """`node` at full length: gathered, and reported, if it is local."""
        if node not in self.wholes and op_name(node) in CONSTANT:
            self.wholes[node] = self._write_whole(node)
        if node not in self.wholes:
            axis = self.placement.modes[node]
            assert axis is not None and isinstance(node.meta["val"], torch.Tensor), node
            self._report(node, reason)
            args = self._shard_args(node, axis)
            whole = self._emit(ops.gather, self.locals[node], *args, self.rank.group, name=f"{node.name}_gathered")
            whole = self._ordered(whole, args, inverse=True)
            if not self.keeps:
                return whole
            self.wholes[node] = whole
        return self.wholes[node]

    def _report(self, node: Node, reason: str) -> None:
        """Notes that `node` is to be whole on every rank; refuses it under `strict`, but for outputs."""
        gather = Gather(node.name, reason, bytes_of(node), _where(self.origin))
        if self.strict and reason != "output":
            raise UnsupportedError(
                f"strict=True refuses to {gather}. The op reads tokens of all ranks: rewrite that line token by "
                "token, or drop strict to gather (same numbers, more memory)."
            )
        self.gathers.append(gather)

    def _local(self, node: Node, axis: Axis) -> Any:
        """This rank's tokens of `node` on `axis`; from another axis that it is on they are moved there."""
        if node in self.locals and self.placement.modes[node] is axis:
            return self.locals[node]
        if (node, axis.index) not in self.shards:
            local = self._write_move(node, axis) or self._write_shard(node, axis)
            if not self.keeps:
                return local
            self.shards[node, axis.index] = local
        return self.shards[node, axis.index]

    def _write_shard(self, node: Node, axis: Axis) -> Node:
        """Of all tokens, those of this rank."""
        whole, args = self._whole(node, "change of axis"), self._shard_args(node, self._own(node, axis))
        dim, outer, tokens, _, world, rank = args
        args = dim, outer, tokens, axis.layout.name, world, rank
        whole = self._ordered(whole, args, inverse=False)
        return self._emit(ops.shard, whole, *args, self.rank.group, name=f"{node.name}_local")

    def _write_move(self, node: Node, axis: Axis) -> Node | None:
        """The tokens of another run of the axis's line, sent to where those of `axis` are that they go with."""
        own = self._own(node, axis)
        if own is axis or self.placement.modes[node] is not own or node not in self.locals:
            return None
        *where, layout, world, rank = self._shard_args(node, own)
        args = *where, layout, axis.layout.name, world, rank, self.rank.group
        return self._emit(ops.redistribute, self.locals[node], *args, name=f"{node.name}_moved")

    def _own(self, node: Node, axis: Axis) -> Axis:
        """`axis`, or the axis of its line that `node` is on instead."""
        if self.placement.on(node, axis):
            return axis
        (own,) = {a for d in self.placement.sweep.operand_dims(node) for a in self.placement.axes(d)}
        assert own.line is axis.line and own.line is not None, (node, own, axis)
        return own

    def _ordered(self, whole: Node, shard_args: tuple[Any, ...], inverse: bool) -> Node:
        """All tokens in the order of the layout's curve, or, inverse, back in their own."""
        dim, outer, tokens, layout, world, _ = shard_args
        order = Layout(layout, world).order
        name = f"{whole.name}_{'restored' if inverse else 'permuted'}"
        return self._emit(ops.permute, whole, dim, outer, tokens, str(order), inverse, name=name) if order else whole

    def _broadcast(self, node: Node, reason: str) -> Any:
        """`node` whole for consumers on an axis: their gradients are summed over ranks."""
        whole = self._whole(node, reason)
        if node not in self.placement.tracked or (not self.keeps and node not in self.broadcasts):
            return whole
        if node not in self.broadcasts:
            self._replicate([node])
        return self.broadcasts[node]

    def _replicate(self, nodes: list[Node]) -> None:
        out = self._emit(ops.replicate, [self.wholes[n] for n in nodes], self.rank.group, name="replicate")
        for i, node in enumerate(nodes):
            self.broadcasts[node] = self._emit(operator.getitem, out, i, name=f"{node.name}_replicated")

    def _replicate_parameters(self) -> None:
        """One `replicate` per bucket of inputs that consumers on an axis read whole, in order of first use."""
        uses: list[Node] = []
        keeps = True
        for node in self.captured.gm.graph.nodes:
            keeps = _keeps_after(node, keeps)
            uses += self.placement.broadcast_operands(node) if keeps else []
        buckets: list[list[Node]] = []
        filled = BUCKET_BYTES
        for node in dict.fromkeys(uses):
            if node.op == "placeholder" and node in self.placement.tracked and node in self.wholes:
                filled += bytes_of(node)
                if filled > BUCKET_BYTES:
                    buckets.append([])
                    filled = bytes_of(node)
                buckets[-1].append(node)
        for bucket in buckets:
            self._replicate(bucket)

    def _draws(self, node: Node) -> bool:
        return is_dropout(node) or (node in self.placement.sites and self.placement.sites[node].site.dropout > 0)

    def _write_outputs(self, output: Node) -> tuple[tuple[LocalOutput | None, ...], int]:
        self.origin = None
        results: list[Any] = []
        described: list[LocalOutput | None] = []
        extras: list[Node] = []
        for value in args_of(output)[0]:
            local = isinstance(value, Node) and value in self.locals and value not in self.wholes
            if value in self.parts:
                results.append(self.locals[first_of(value)])
                whole = self._describe(first_of(value), extras)
                described.append(replace(whole, name=value.name, part=self.parts[value]))
            elif local and not self.gather_outputs:
                results.append(self.locals[value])
                described.append(self._describe(value, extras))
            else:
                results.append(self._operand(value, None, "output") if isinstance(value, Node) else value)
                described.append(None)
        node = self.graph.output((*results, *extras))
        node.meta.update(output.meta)
        return tuple(described), len(extras)

    def _describe(self, node: Node, extras: list[Node]) -> LocalOutput:
        axis = self.placement.modes[node]
        assert axis is not None
        dim, outer, tokens, layout, *_ = self._shard_args(node, axis)

        def known(n: Any) -> Any:
            if not isinstance(n, Node):
                return n
            if n not in extras:
                extras.append(n)
            return ("extra", extras.index(n))

        return LocalOutput(node.name, dim, known(outer), known(tokens), layout)


def _keeps_after(node: Node, keeps: bool) -> bool:
    """Whether the nodes after this one are outside the model's no_grad regions; `keeps`: whether this one is."""
    switches = node.target is torch._C._set_grad_enabled
    return bool(node.args[0]) or not torch.is_grad_enabled() if switches else keeps


def _keeps_shape(node: Node) -> bool:
    return bool(first_of(node).meta["val"].shape == node.meta["val"].shape)


def _where(node: Node | None) -> str:
    """The model's line that a node comes from."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines() if node is not None else []
    files = [i for i, line in enumerate(lines) if line.strip().startswith("File ")]
    return " ".join(line.strip() for line in lines[files[-1] : files[-1] + 2]) if files else ""
