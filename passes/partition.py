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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node, Proxy, map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils.checkpoint import CheckpointPolicy

from ringpass import ops
from ringpass.errors import UnsupportedError
from ringpass.kernels import accumulator
from ringpass.layout import Layout
from ringpass.mask import TRUE, Expr, call
from ringpass.passes.capture import Captured
from ringpass.passes.factors import Sweep, args_of, first_of, hint_of, size_of, tensors_of
from ringpass.passes.placement import Placement, draws_elsewhere, is_dropout, place
from ringpass.passes.plan import Axis, RingPlan, SitePlan
from ringpass.passes.rules import CONSTANT, CREATION, LOSSES, PATTERNED, RESIZED, SUMS, op_name
from ringpass.places import of_places
from ringpass.selection import TopBlocks, chosen_blocks

aten = torch.ops.aten
BUCKET_BYTES = 25 * 2**20
KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id")


@dataclass(frozen=True)
class Rank:
    """Who this rank is.  `group` is the process group's name."""

    rank: int
    world: int
    group: str


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
    draws: bool  # random ops that draw from the default generator, which the ranks must then share


def partition(
    captured: Captured, plan: RingPlan, sweep: Sweep, rank: Rank, strict: bool, gather_outputs: bool
) -> Partitioned:
    """Writes the program of `rank`.  Raises UnsupportedError under `strict` where something must be gathered."""
    return _Writer(captured, place(captured, plan, sweep), plan, rank, strict, gather_outputs).write()


class _Writer:
    def __init__(
        self, captured: Captured, placement: Placement, plan: RingPlan, rank: Rank, strict: bool, gather_outputs: bool
    ) -> None:
        self.captured, self.placement, self.plan, self.rank = captured, placement, plan, rank
        self.strict, self.gather_outputs = strict, gather_outputs
        self.graph = Graph()
        self.wholes: dict[Node, Any] = {}
        self.locals: dict[Node, Any] = {}
        self.shards: dict[tuple[Node, int], Node] = {}
        self.broadcasts: dict[Node, Node] = {}
        self.parts: dict[Node, tuple[int, int]] = {}  # slices that are taken when the output is used
        self.gathers: list[Gather] = []
        self.sizes: dict[Any, Any] = {}
        self.lengths: dict[int, Any] = {}
        self.seed: Node | None = None
        self.streams = 0
        self.origin: Node | None = None  # the captured node being written
        self.keeps = True  # whether what is written now may serve later nodes: not inside a no_grad region of the model

    def write(self) -> Partitioned:
        nodes, live = list(self.captured.gm.graph.nodes), self.placement.live
        for node in nodes:
            if node.op == "placeholder":
                self.wholes[node] = self._placeholder(node.name, node.meta)
        if any(self._draws(n) for n in live):
            with self.captured.fake_mode:
                self.seed = self._placeholder("ringpass_seed", {"val": torch.zeros((), dtype=torch.int64)})
        self._replicate_parameters()
        for node in nodes:
            if node in live and node.op not in ("placeholder", "output"):
                self.origin = node
                self._write(node)
        outputs, extras = self._write_outputs(nodes[-1])
        inputs = tuple(n.meta["val"] for n in self.graph.nodes if n.op == "placeholder")
        inputs = (*self.captured.inputs, *inputs[len(self.captured.inputs) :])
        gm = GraphModule(self.captured.gm, self.graph)
        draws = any(draws_elsewhere(n) for n in live)
        return Partitioned(gm, inputs, outputs, extras, tuple(self.gathers), self.seed is not None, draws)

    # --- one node ---------------------------------------------------------------------------------------------------

    def _write(self, node: Node) -> None:
        axis = self.placement.modes[node]
        if isinstance(node.meta.get("val"), torch.SymInt):
            return  # written on demand, from the sizes of the inputs
        if node in self.placement.sites:
            (self.wholes if axis is None else self.locals)[node] = self._write_site(self.placement.sites[node])
        elif (part := self._returned_part(node)) is not None:
            self.parts[node] = part
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
        if node.target is torch._C._set_grad_enabled:
            self.keeps = bool(node.args[0]) or not torch.is_grad_enabled()
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
        args, kwargs = self._operands(node, axis, f"operand of {name}")
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
        bias, score = ("" if x is None else str(x) for x in (site.bias, site.score))
        learned, pruned = (",".join(map(str, numbers)) for numbers in (self.placement.learned(plan), pruning))
        call = self._emit(
            ops.ring_attention, q, k, v, leaves, seed, str(mask), bias, site.scale, site.dropout, stream, *lengths,
            *names, problem.tile, *who, self.plan.comm, score, str(plan.dilation or ""), learned, pruned,
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
        names = [layout.map if self.plan.along_curve else layout.name for layout in layouts]
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
            chosen = of_places(chosen, {name: layout.order for name, layout in layouts if layout.order})
        return call("and", plan.placed.mask, chosen)

    # --- sums over the sequence -------------------------------------------------------------------------------------

    def _write_sum(self, node: Node, axis: Axis) -> Node:
        """The local part of a sum, added over ranks.  A mean divides by the full number of elements."""
        name = op_name(node)
        if name == "cross_entropy_loss.default":
            return self._write_loss(node, axis)
        args, kwargs = self._operands(node, axis, f"operand of {name}")
        if name in LOSSES:
            return self._write_elementwise_loss(node, args, kwargs)
        if name not in SUMS:
            return self._emit(ops.reduce, self._copy(node, args, kwargs), self.rank.group, name=f"{node.name}_reduced")
        value, result = first_of(node).meta["val"], node.meta["val"]
        position = SUMS[name]
        dims = args[position] if position is not None and len(args) > position else kwargs.get("dim")
        keep = args[position + 1] if position is not None and len(args) > position + 1 else kwargs.get("keepdim", False)
        dims = list(range(value.ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
        part = self._emit(aten.sum.dim_IntList, args[0], dims, keep, dtype=accumulator(result.dtype), name=node.name)
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if name.startswith("mean"):
            count = self._size(sympy.prod([size_of(value.shape[d]) for d in dims]))
            total = self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")
        return total if total.meta["val"].dtype == result.dtype else self._emit(aten.to.dtype, total, result.dtype)

    def _write_elementwise_loss(self, node: Node, args: Any, kwargs: Any) -> Node:
        """The local sum of an element-wise loss, reduced; a mean divides by the full number of elements."""
        position = LOSSES[op_name(node)]
        reduction = args[position] if len(args) > position else kwargs.get("reduction", 1)
        named = {k: v for k, v in kwargs.items() if k != "reduction"}
        schema: Any = node.target
        missing = [named.pop(a.name, a.default_value) for a in schema._schema.arguments[len(args) : position]]
        summed = (*args[:position], *missing, 2, *args[position + 1 :])
        part = self._emit(node.target, *summed, name=node.name, **named)  # type: ignore[arg-type]
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if reduction == 2:
            return total
        shapes = [a.meta["val"].shape for a in node.args[:2] if isinstance(a, Node)]
        count = self._size(sympy.prod([size_of(n) for n in torch.broadcast_shapes(*shapes)]))
        return self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")

    def _write_loss(self, node: Node, axis: Axis) -> Node:
        """cross_entropy_loss: the local sum, reduced; a mean divides by the number (weight) of targets that count."""
        defaults: tuple[Any, ...] = (None, None, None, 1, -100, 0.0)
        given = args_of(node)
        logits, target, weight, reduction, ignored, smoothing = (*given, *defaults[len(given) :])
        kwargs = dict(node.kwargs)
        weight, reduction = kwargs.get("weight", weight), kwargs.get("reduction", reduction)
        ignored, smoothing = kwargs.get("ignore_index", ignored), kwargs.get("label_smoothing", smoothing)
        operands = [self._operand(x, axis, "loss") if isinstance(x, Node) else x for x in (logits, target, weight)]
        part = self._emit(aten.cross_entropy_loss.default, *operands, 2, ignored, smoothing, name=node.name)
        total = self._emit(ops.reduce, part, self.rank.group, name=f"{node.name}_reduced")
        if reduction == 2:
            return total
        counted = self._emit(aten.ne.Scalar, operands[1], ignored)
        if weight is not None:
            safe = self._emit(aten.where.ScalarOther, counted, operands[1], 0)
            weights = self._emit(aten.index.Tensor, operands[2], [safe])
            counted = self._emit(aten.where.ScalarOther, counted, weights, 0.0)
        count = self._emit(
            ops.reduce, self._emit(aten.sum.default, counted), self.rank.group, name=f"{node.name}_targets"
        )
        return self._emit(aten.div.Tensor, total, count, name=f"{node.name}_mean")

    # --- operands ---------------------------------------------------------------------------------------------------

    def _operands(self, node: Node, axis: Axis | None, reason: str) -> tuple[Any, Any]:
        return map_arg((node.args, node.kwargs), lambda n: self._operand(n, axis, reason))

    def _operand(self, node: Node, axis: Axis | None, reason: str) -> Any:
        if isinstance(node.meta.get("val"), torch.SymInt):
            return self._size(size_of(node.meta["val"]))
        if axis is None:
            return self._whole(node, reason)
        return self._local(node, axis) if self.placement.on(node, axis) else self._broadcast(node, reason)

    def _whole(self, node: Node, reason: str) -> Any:
        """`node` at full length: gathered, and reported, if it is local."""
        if node not in self.wholes:
            axis = self.placement.modes[node]
            assert axis is not None and isinstance(node.meta["val"], torch.Tensor), node
            gather = Gather(node.name, reason, _bytes(node), _where(self.origin))
            if self.strict and reason != "output":
                raise UnsupportedError(
                    f"strict=True refuses to {gather}. The op reads tokens of all ranks: rewrite that line token by "
                    "token, or drop strict to gather (same numbers, more memory)."
                )
            self.gathers.append(gather)
            args = self._shard_args(node, axis)
            whole = self._emit(ops.gather, self.locals[node], *args, self.rank.group, name=f"{node.name}_gathered")
            whole = self._ordered(whole, args, inverse=True)
            if not self.keeps:
                return whole
            self.wholes[node] = whole
        return self.wholes[node]

    def _local(self, node: Node, axis: Axis) -> Any:
        """This rank's tokens of `node` on `axis`."""
        if node in self.locals and self.placement.modes[node] is axis:
            return self.locals[node]
        if (node, axis.index) not in self.shards:
            whole, args = self._whole(node, "change of axis"), self._shard_args(node, axis)
            whole = self._ordered(whole, args, inverse=False)
            local = self._emit(ops.shard, whole, *args, self.rank.group, name=f"{node.name}_local")
            if not self.keeps:
                return local
            self.shards[node, axis.index] = local
        return self.shards[node, axis.index]

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
        uses = [n for node in self.captured.gm.graph.nodes for n in self.placement.broadcast_operands(node)]
        buckets: list[list[Node]] = []
        filled = BUCKET_BYTES
        for node in dict.fromkeys(uses):
            if node.op == "placeholder" and node in self.placement.tracked:
                filled += _bytes(node)
                if filled > BUCKET_BYTES:
                    buckets.append([])
                    filled = _bytes(node)
                buckets[-1].append(node)
        for bucket in buckets:
            self._replicate(bucket)

    def _draws(self, node: Node) -> bool:
        return is_dropout(node) or (node in self.placement.sites and self.placement.sites[node].site.dropout > 0)

    # --- sizes ------------------------------------------------------------------------------------------------------

    def _shard_args(self, node: Node, axis: Axis) -> tuple[Any, ...]:
        """(dim, outer, tokens, layout, world, rank) of `node` on `axis`, as the boundary operators take them."""
        for dim, factors in enumerate(self.placement.sweep.dims(node)):
            for position, factor in enumerate(factors):
                if self.placement.axis_of.get(factor) is axis:
                    outer = self._size(sympy.prod([f.size for f in factors[:position]]))
                    return dim, outer, self._tokens(axis), axis.layout.name, self.rank.world, self.rank.rank
        raise AssertionError(f"{node} has no dim on {axis}")

    def _local_shape(self, node: Node, axis: Axis) -> list[Any]:
        shape = [size_of(n) for n in node.meta["val"].shape]
        for dim, factors in enumerate(self.placement.sweep.dims(node)):
            if any(self.placement.axis_of.get(f) is axis for f in factors):
                rest = self._size(sympy.cancel(shape[dim] / size_of(axis.tokens)))
                length = self._length(axis)
                shape[dim] = length if rest == 1 else self._compute(operator.mul, rest, length)
            else:
                shape[dim] = self._size(shape[dim])
        return shape

    def _tokens(self, axis: Axis) -> Any:
        return self._size(size_of(axis.tokens))

    def _length(self, axis: Axis) -> Any:
        """L, the number of local tokens."""
        if axis.index not in self.lengths:
            self.lengths[axis.index] = self._compute(
                lambda s: axis.layout.length(self.rank.rank, s), self._tokens(axis)
            )
        return self.lengths[axis.index]

    def _size(self, expr: Any) -> Any:
        """A size expression as an int, or as a node computed from the graph's symbolic inputs."""
        expr = sympy.sympify(expr)
        if expr.is_number:
            return int(expr)
        if expr not in self.sizes:
            self.sizes[expr] = self._size_node(expr)
        return self.sizes[expr]

    def _size_node(self, expr: Any) -> Any:
        if expr.is_Symbol:
            for node in self.graph.nodes:
                value = node.meta.get("val")
                if node.op == "placeholder" and isinstance(value, torch.SymInt) and value.node.expr == expr:
                    return node
            raise UnsupportedError(f"the size {expr} is no input of the graph")
        known = {sympy.Add: operator.add, sympy.Mul: operator.mul}
        name = type(expr).__name__
        fn = next((f for kind, f in known.items() if isinstance(expr, kind)), None)
        fn = fn or {
            "FloorDiv": operator.floordiv,
            "PythonMod": operator.mod,
            "Mod": operator.mod,
            "Max": torch.sym_max,
            "Min": torch.sym_min,
        }.get(name)
        if fn is None:
            raise UnsupportedError(f"cannot compute the size {expr} in the graph: {name}")
        first, *rest = [self._size(a) for a in expr.args]
        for other in rest:
            first = self._compute(fn, first, other)
        return first

    def _compute(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn` on ints and size nodes; the arithmetic is written into the graph."""
        if not any(isinstance(a, Node) for a in args):
            return fn(*args)
        tracer = GraphAppendingTracer(self.graph)
        out = fn(*(Proxy(a, tracer) if isinstance(a, Node) else a for a in args))
        for node in self.graph.nodes:
            if "val" not in node.meta and node.op == "call_function":
                node.meta["val"] = node.target(*_fakes(node.args))
        return out.node

    # --- emission ---------------------------------------------------------------------------------------------------

    def _copy(self, node: Node, args: Any, kwargs: Any) -> Node:
        """The same call on new operands; what is no ATen op (higher-order ops, mode switches) keeps the fake it had."""
        if isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
            return self._emit(node.target, *args, name=node.name, **kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta.update(node.meta)
        return new

    def _emit(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """Appends a call, with its fake value and the meta of the node that it comes from."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        with self.captured.fake_mode, torch.no_grad():
            node.meta["val"] = target(*_fakes(args), **_fakes(kwargs))
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in KEPT_META if k in self.origin.meta})
        if target in ops.COMMUNICATING and "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return node

    def _placeholder(self, name: str, meta: dict[str, Any]) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(meta)
        return node

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


def _fakes(args: Any) -> Any:
    return map_arg(args, lambda n: n.meta["val"])


def slice_of(node: Node) -> tuple[Any, ...]:
    """(dim, start, stop, step) of an `aten.slice`; dim counts from the front."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given = args_of(node)[1:]
    dim, *bounds = (*given, *defaults[len(given) :])
    return dim % node.meta["val"].ndim, *bounds


def _keeps_shape(node: Node) -> bool:
    return bool(first_of(node).meta["val"].shape == node.meta["val"].shape)


def _bytes(node: Node) -> int:
    return sum(hint_of(t.numel()) * t.element_size() for t in tensors_of(node))


def _where(node: Node | None) -> str:
    """The model's line that a node comes from."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines() if node is not None else []
    files = [i for i, line in enumerate(lines) if line.strip().startswith("File ")]
    return " ".join(line.strip() for line in lines[files[-1] : files[-1] + 2]) if files else ""
