"""memory: what one rank holds while a step runs, buffer by buffer, from its lowered forward and backward.

    found = memory_of(forward, backward)
    found.peak, found.kinds, found.program

What makes a buffer, a model of what Inductor does:

    a view                      nothing: it is its base
    a pointwise op, a merge     nothing where every reader is fused with it: pointwise ops or reductions that all run
                                after the same products, attention tiles and transfers.  Else a buffer, which takes
                                the place of an operand of its size that nobody reads later
    a tile of attention, a mask a buffer for each result, and while it runs what its body takes beside (`scratch`)
    any other op                a buffer for each result
    an input of the graph       counted apart: parameters, their gradients, the inputs of the call

A buffer lives from the node that makes it to the last one that reads it, through views and fused ops; what is sent, to
the wait.  Its memory may wait longer for a buffer that takes it over (`reuse`).  What the forward saves, and the
results that the caller holds, live until the backward has read them, or until its end.  For each result that the loss
is not made of, autograd makes a gradient of zeros, which lives until the backward has read it.

Contract: an estimate.  `benchmarks/peaks.py` compares it with what is measured; docs/explain.md has the figures.
Scratch memory of kernels other than tiles is not counted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringpass import ops
from ringpass.explain.reuse import UNCOUNTED, Life, Span, alive, occupy
from ringpass.explain.scratch import scratch_of
from ringpass.nodes import hint_of, mutates, tags_of, tensors_of
from ringpass.ops import gradient_sums, pooling, primitives

Storage = tuple[Node, int]
"""A buffer: the node that makes it, and which of its results it is."""
KINDS = ("parameters", "gradients", "inputs", "saved", "communication", "temporary")
VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze",
        "alias", "detach", "as_strided", "split", "split_with_sizes", "unbind", "unfold", "reshape", "real", "imag",
        "view_as_real", "view_as_complex", "diagonal", "chunk", "unflatten", "flatten", "narrow", "_reshape_alias",
    )
    if hasattr(torch.ops.aten, name)
)  # fmt: skip
ALIASES = (primitives.wait, gradient_sums.wait_sum)
REDUCTIONS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "sum", "mean", "amax", "amin", "var", "var_mean", "any", "all", "prod", "argmax", "argmin", "max", "min",
    )
)  # fmt: skip
POINTWISE = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "clone", "_to_copy", "copy", "full", "full_like", "zeros_like", "ones_like", "arange", "iota", "where", "cat",
        "slice_scatter", "select_scatter", "embedding", "index", "gather", "constant_pad_nd", "select_backward",
        "slice_backward", "empty", "new_zeros", "zeros", "ones", "scalar_tensor", "new_full", "masked_fill", "flip",
        "repeat",
    )
    if hasattr(torch.ops.aten, name)
)  # fmt: skip
"""Ops that Inductor writes as pointwise, though torch does not tag them so."""
COMMUNICATION = frozenset({
    *ops.COMMUNICATING, *pooling.BUFFERED, primitives.pack, pooling.pack_heads, gradient_sums.start_sum,
}) - {ops.shard, ops.ring_attention, ops.ring_attention_backward}  # fmt: skip
MESSAGES = frozenset({*ops.COMMUNICATING, *pooling.BUFFERED, gradient_sums.start_sum})
"""Ops that Inductor calls as collectives, so that it knows their results to be aligned."""
PRODUCTS = frozenset({torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm})
"""Ops whose results Inductor allocates."""
SCATTERS = frozenset({
    torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten.scatter, torch.ops.aten.scatter_add,
    torch.ops.aten.scatter_reduce, torch.ops.aten._unsafe_masked_index_put_accumulate,
})  # fmt: skip
"""Ops for which Inductor writes a kernel that is never fused with its readers."""
TRAINED, FIXED = "trained", "fixed"
SIZED = 1024  # bytes; smaller buffers are not listed in the program


@dataclass(frozen=True)
class Moment:
    """What is alive after one node, in bytes, without parameters, gradients and inputs."""

    phase: str
    node: str
    live: int


@dataclass(frozen=True)
class Memory:
    """`kinds`: bytes by kind at the peak; `peak`: their sum; `activations`: its part that the step itself allocates;
    `held`: what the forward leaves until the backward; `program`: the moments at which the sum grows or shrinks."""

    kinds: Mapping[str, int]
    peak: int
    activations: int
    held: int
    program: tuple[Moment, ...] = ()


@dataclass
class _Phase:
    """The liveness of one graph: storages, which are buffers, and who reads them last."""

    graph: Graph
    name: str
    bases: dict[Storage, Storage] = field(default_factory=dict)
    position: dict[Node, int] = field(default_factory=dict)
    level: dict[Node, int] = field(default_factory=dict)
    fused: set[Node] = field(default_factory=set)
    added: set[Node] = field(default_factory=set)  # additions that are part of a product

    def __post_init__(self) -> None:
        self.added = {add for node in self.graph.nodes if (add := _added(node))}
        for i, node in enumerate(self.graph.nodes):
            self.position[node] = i
            self._add(node)
        self._fuse()

    # --- storages ---------------------------------------------------------------------------------------------------

    def _add(self, node: Node) -> None:
        """Notes the storages of a node, and at which level it runs: after how many kernels that are not fused."""
        readers = [n for n in node.all_input_nodes if n in self.level]
        self.level[node] = max((self.level[n] + (not self.fusable(n) and _runs(n)) for n in readers), default=0)
        if node.op == "output":
            return
        source = _viewed(node)
        for i, _ in enumerate(tensors_of(node)):
            if node.target is operator.getitem:
                first = node.args[0]
                assert isinstance(first, Node)
                key = (first, int(node.args[1]) if len(tensors_of(first)) > 1 else 0)  # type: ignore[arg-type]
                self.bases[node, i] = self.bases.get(key, key)
            elif source is not None:
                self.bases[node, i] = self.bases.get((source, 0), (source, 0))
            else:
                self.bases[node, i] = (node, i)

    def storages(self, node: Node) -> list[Storage]:
        """Those that a node's results are in."""
        return list(
            dict.fromkeys(self.bases[node, i] for i, _ in enumerate(tensors_of(node)) if (node, i) in self.bases)
        )

    def size(self, storage: Storage) -> int:
        """Bytes of a storage."""
        x: Tensor = tensors_of(storage[0])[storage[1]]
        return hint_of(x.numel()) * x.element_size()

    # --- fusion -----------------------------------------------------------------------------------------------------

    def _fuse(self) -> None:
        """Finds the nodes whose results are never written to memory."""
        for node in reversed(list(self.graph.nodes)):
            if _added(node):
                self.fused.add(node)
            elif self.fusable(node) and not mutates(node):
                readers = list(self._readers(node))
                levels = {self.level[r] for r in readers}
                if len(levels) == 1 and all(map(self.fusable, readers)):
                    self.fused.add(node)
                    self.level[node] = levels.pop()  # it waits until its readers can run

    def fusable(self, node: Node) -> bool:
        """Whether Inductor may write a node into the kernel of its neighbours."""
        return _fusable(node) and node not in self.added

    def _readers(self, node: Node) -> Iterable[Node]:
        """The nodes that read a node's results, through views."""
        for user in node.users:
            if user.op == "call_function" and (_viewed(user) is not None or user.target is operator.getitem):
                yield from self._readers(user)
            else:
                yield user

    def operands(self, node: Node) -> list[Storage]:
        """What a node reads, through fused nodes, in the order in which its code names it."""
        found: dict[Storage, None] = {}
        seen: set[Node] = set()
        waiting = node.all_input_nodes[::-1]
        while waiting:
            x = waiting.pop()
            if x in seen:
                continue
            seen.add(x)
            found.update(dict.fromkeys(self.storages(x)))
            if x in self.fused or x.target is operator.getitem or _viewed(x) is not None:
                waiting += x.all_input_nodes[::-1]
        return list(found)

    # --- life -------------------------------------------------------------------------------------------------------

    def last_reads(self) -> dict[Storage, int]:
        """The position of the last node that reads each storage, where fused nodes read when their readers run.

        What is sent is read until the wait.
        """
        runs_at: dict[Node, int] = {}
        last: dict[Storage, int] = {}
        for node in reversed(list(self.graph.nodes)):
            at = self.position[node]
            if node in self.fused or _viewed(node) is not None or node.target is operator.getitem:
                at = max((runs_at[user] for user in node.users), default=at)
            runs_at[node] = at
            for operand in node.all_input_nodes:
                for storage in self.storages(node if node.target is operator.getitem else operand):
                    last[storage] = max(last.get(storage, -1), at)
            if node.target in pooling.BUFFERED:
                waits = max((self.position[x] for x in self._waits(node)), default=at)
                for storage in (s for sent in node.args[0] for s in self.storages(sent)):
                    last[storage] = max(last.get(storage, -1), waits)
        return last

    def allocated(self, node: Node) -> bool:
        """Whether Inductor allocates a node's results, and no operator does."""
        packet = getattr(node.target, "overloadpacket", None)
        return _fusable(node) or packet in PRODUCTS or packet in SCATTERS

    def unaligned(self) -> set[Node]:
        """The nodes whose results Inductor takes for unaligned: inputs on a CPU, and what operators make of those."""
        found: set[Node] = set()
        for node in self.position:
            if node.op == "placeholder":
                tensors = tensors_of(node)
                known = not tensors or tensors[0].device.type != "cpu"
            else:
                own = self.allocated(node) or node.target in MESSAGES
                known = own or not any(x in found for x in node.all_input_nodes)
            if not known:
                found.add(node)
        return found

    def _waits(self, node: Node) -> Iterable[Node]:
        """The nodes that wait for what a node has started; until then what it sends is there."""
        for user in node.users:
            if user.target is operator.getitem:
                yield from self._waits(user)
            elif user.target is primitives.wait:
                yield user


def _viewed(node: Node) -> Node | None:
    """What a node is a view of; None: it is none."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    first = node.args[0] if node.args else None
    if target in ALIASES or packet in VIEWS:
        return first if isinstance(first, Node) else None
    return None


def _runs(node: Node) -> bool:
    """Whether a node is a kernel: no input, view or part of a result."""
    return node.op == "call_function" and _viewed(node) is None and node.target is not operator.getitem


def _fusable(node: Node) -> bool:
    """Whether Inductor writes the code of a node, as pointwise or as a reduction."""
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    pointwise = torch.Tag.pointwise in tags_of(node) or node.target is primitives.merge
    prims = getattr(node.target, "namespace", "") == "prims"
    return pointwise or prims or packet in POINTWISE or packet in REDUCTIONS


def _added(node: Node) -> Node | None:
    """The addition that Inductor makes part of a product on a CPU, `addmm`, if there is one: its only reader."""
    if node.target is not torch.ops.aten.mm.default or len(node.users) != 1 or node.meta["val"].device.type != "cpu":
        return None
    (add,) = node.users
    if add.target is not torch.ops.aten.add.Tensor or add.kwargs or add.meta["val"].shape != node.meta["val"].shape:
        return None
    products = [x for x in add.args if isinstance(x, Node) and x.target is node.target]
    return add if products[0] is node and all(isinstance(x, Node) for x in add.args) else None


@dataclass
class _Account:
    """The most there was, by kind, and the moments on the way."""

    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    program: list[Moment] = field(default_factory=list)
    scratch: dict[Any, int] = field(default_factory=dict)  # of calls that are alike

    def run(self, phase: _Phase, lives: Sequence[Life], others: Sequence[Span] = ()) -> None:
        """Runs through a graph; `others`: what Inductor counts beside the buffers."""
        steps = len(phase.position)
        counted = ((x.start, x.read, x.size) for x in lives if x.read != UNCOUNTED)
        occupy(lives, alive([*counted, *others], steps))
        live = alive(((x.start, x.stop, x.size) for x in lives), steps).tolist()
        makes = {x.start for x in lives}
        for node, at in phase.position.items():
            if at in makes and node.op == "call_function":
                self._note(phase.name, node, live[at], (x for x in lives if x.start <= at <= x.stop))

    def _note(self, phase: str, node: Node, live: int, lives: Iterable[Life]) -> None:
        """The moment at which a node runs: its operands, its results, and what its kernel needs are there."""
        scratch = scratch_of(node, self.scratch)
        live += scratch
        if not self.program or abs(live - self.program[-1].live) >= SIZED:
            self.program.append(Moment(phase, node.name, live))
        if live > self.peak:
            self.peak = live
            self.at_peak = {**dict.fromkeys(KINDS, 0), "temporary": scratch}
            for life in lives:
                self.at_peak[life.kind] += life.size


def memory_of(forward: GraphModule, backward: GraphModule | None, results: int, inputs: Sequence[str] = ()) -> Memory:
    """The memory of one graph's step.

    `results`: how many outputs of the forward the caller gets, which are the first; what follows is saved.
    `inputs`: of each input of the forward, what it is: TRAINED, FIXED (a parameter or buffer without a gradient), or
    anything else, an input of the call.
    """
    account = _Account()
    phase = _Phase(forward.graph, "forward")
    given = forward.graph.find_nodes(op="placeholder")
    fixed = dict.fromkeys(KINDS[:3], 0)
    for node, what in zip(given, [*inputs, *[""] * (len(given) - len(inputs))], strict=True):
        size = sum(phase.size(s) for s in phase.storages(node))
        fixed["parameters" if what in (TRAINED, FIXED) else "inputs"] += size
        fixed["gradients"] += size if what == TRAINED and backward is not None else 0
    returned: Any = next(iter(forward.graph.find_nodes(op="output"))).args[0]
    kept = {s for x in returned if isinstance(x, Node) for s in phase.storages(x)}
    saved = {s for x in returned[results:] if isinstance(x, Node) for s in phase.storages(x)}
    lives = _lives(phase, kept, saved)
    account.run(phase, lives)
    held = {life.key: life for life in lives if life.key in kept}
    if backward is not None:
        _run_backward(backward, account, phase, returned, results, held)
    kinds = {**fixed, **{kind: account.at_peak.get(kind, 0) for kind in KINDS[3:]}}
    return Memory(kinds, sum(kinds.values()), account.peak, sum(x.size for x in held.values()), tuple(account.program))


def _lives(
    phase: _Phase, keep: Set[Storage], saved: Set[Storage] = frozenset(), given: Sequence[Life] = ()
) -> list[Life]:
    """The buffers that a graph makes, before their memory is given on; those in `keep` live until its end.

    `given`: those that are there before it starts, and may be overwritten where they end.
    """
    last, end = phase.last_reads(), len(phase.position) - 1
    known = {x.key: x for x in given}
    found: list[Life] = []
    unaligned = phase.unaligned()
    for node, at in phase.position.items():
        if node.op != "call_function" or node in phase.fused or node.target is operator.getitem:
            continue
        allocated = phase.allocated(node)
        made = []
        for storage in (s for s in phase.storages(node) if s[0] is node and phase.size(s)):
            stop = end if storage in keep else max(at, last.get(storage, at))
            kind = "saved" if storage in saved else "communication" if node.target in COMMUNICATION else "temporary"
            dtype = tensors_of(node)[storage[1]].dtype
            gives = node not in unaligned and storage not in keep
            made.append(Life(storage, phase.size(storage), kind, at, stop, stop, dtype, allocated, gives))
        if made and phase.fusable(node):  # in place of an operand that ends here
            ends = (known[s] for s in phase.operands(node) if s in known and s not in keep)
            dead = next((x for x in ends if x.read == x.stop == at and x.size == made[0].size and x.start < at), None)
            if dead is not None:
                dead.stop, made[0].takes = at - 1, False
        found += made
        known |= {x.key: x for x in made}
    return found


def _run_backward(
    backward: GraphModule,
    account: _Account,
    forward: _Phase,
    returned: Sequence[Any],
    results: int,
    held: dict[Storage, Life],
) -> None:
    """The backward, whose inputs are what the forward saved, by name, and the gradients of its results."""
    phase = _Phase(backward.graph, "backward")
    last, end = phase.last_reads(), len(phase.position) - 1
    names = {x.name: x for x in returned[results:] if isinstance(x, Node)}
    owned = {s for x in returned[:results] if isinstance(x, Node) for s in forward.storages(x)}
    results_back: Any = next(iter(backward.graph.find_nodes(op="output"))).args[0]
    gradients = {s for x in results_back if isinstance(x, Node) for s in phase.storages(x)}
    reads: dict[Storage, int] = {}
    seen_as: dict[Storage, Storage] = {}
    before: list[Life] = []
    others: list[Span] = []
    for node in backward.graph.find_nodes(op="placeholder"):
        source = names.get(node.name)
        base = next(iter(forward.storages(source)), None) if source is not None else None
        for storage in phase.storages(node):
            at = last.get(storage, 0)
            if base is not None and base in held:
                reads[base], seen_as[base] = max(reads.get(base, 0), at), storage
            elif node.name.startswith("tangents"):  # of results that the loss is not made of: zeros
                before.append(Life(storage, phase.size(storage), "temporary", 0, at, UNCOUNTED))
            elif not node.name.startswith("primals"):  # a view of a parameter: Inductor believes that it may go
                others.append((0, at, phase.size(storage)))
    for key, life in held.items():
        read = reads.get(key, UNCOUNTED)
        stop = end if key in owned or key not in reads else read
        before.append(Life(seen_as.get(key, key), life.size, life.kind, 0, stop, read))
    account.run(phase, [*before, *_lives(phase, gradients, given=before)], others)
