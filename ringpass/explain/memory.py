"""memory: what one rank holds while a step runs, buffer by buffer, from its lowered forward and backward.

    found = memory_of(forward, backward)
    found.peak, found.kinds, found.program

What makes a buffer, a model of what Inductor does:

    a view                      nothing: it is its base
    a pointwise op, a merge     nothing where every reader is fused with it: a pointwise op or reduction for which no
                                product, attention tile or transfer has to run in between.  Else a buffer, which takes
                                the place of an operand of its size that nobody reads later
    a tile of attention, a mask a buffer for each result, and while it runs what its body takes beside (`scratch`)
    any other op                a buffer for each result
    an input of the graph       counted apart: parameters, their gradients, the inputs of the call

A buffer lives from the node that makes it to the last one that reads it, through views and fused ops.  What the forward
saves, and the results that the caller holds, live until the backward has read them, or until its end.

Contract: an estimate.  `benchmarks/memory.py` measures; docs/explain.md has both.  Scratch memory of other kernels is
not counted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ringpass import ops
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

    def __post_init__(self) -> None:
        for i, node in enumerate(self.graph.nodes):
            self.position[node] = i
            self._add(node)
        self._fuse()

    # --- storages ---------------------------------------------------------------------------------------------------

    def _add(self, node: Node) -> None:
        """Notes the storages of a node, and at which level it runs: after how many kernels that are not fused."""
        readers = [n for n in node.all_input_nodes if n in self.level]
        self.level[node] = max((self.level[n] + (not _fusable(n) and _runs(n)) for n in readers), default=0)
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
            if node.op == "call_function" and _fusable(node) and not mutates(node):
                readers = list(self._readers(node))
                if readers and all(_fusable(r) and self.level[r] == self.level[node] for r in readers):
                    self.fused.add(node)

    def _readers(self, node: Node) -> Iterable[Node]:
        """The nodes that read a node's results, through views."""
        for user in node.users:
            if user.op == "call_function" and (_viewed(user) is not None or user.target is operator.getitem):
                yield from self._readers(user)
            else:
                yield user

    # --- life -------------------------------------------------------------------------------------------------------

    def last_reads(self) -> dict[Storage, int]:
        """The position of the last node that reads each storage, where fused nodes read when their readers run."""
        runs_at: dict[Node, int] = {}
        last: dict[Storage, int] = {}
        for node in reversed(list(self.graph.nodes)):
            at = self.position[node]
            if node in self.fused or _viewed(node) is not None or node.target is operator.getitem:
                at = max((runs_at[user] for user in node.users), default=at)
            runs_at[node] = at
            for operand in node.all_input_nodes:
                for storage in self.storages(operand):
                    last[storage] = max(last.get(storage, -1), at)
        return last


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
    """Whether Inductor may write a node into the kernel of its neighbours."""
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    pointwise = torch.Tag.pointwise in tags_of(node) or node.target is primitives.merge
    prims = getattr(node.target, "namespace", "") == "prims"
    return pointwise or prims or packet in POINTWISE or packet in REDUCTIONS


@dataclass
class _Account:
    """What is alive, by kind, and the most there was."""

    kind: dict[Any, str] = field(default_factory=dict)
    size: dict[Any, int] = field(default_factory=dict)
    live: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    program: list[Moment] = field(default_factory=list)
    scratch: dict[Any, int] = field(default_factory=dict)  # of calls that are alike

    def take(self, key: Any, size: int, kind: str) -> None:
        """A buffer is allocated."""
        if size:
            self.kind[key], self.size[key] = kind, size
            self.live += size

    def give(self, key: Any) -> None:
        """A buffer is freed."""
        self.live -= self.size.pop(key, 0)

    def note(self, phase: str, node: str, scratch: int) -> None:
        """The moment at which a node runs: its operands, its results, and what its kernel needs are there."""
        live = self.live + scratch
        if not self.program or abs(live - self.program[-1].live) >= SIZED:
            self.program.append(Moment(phase, node, live))
        if live > self.peak:
            self.peak = live
            self.at_peak = {**dict.fromkeys(KINDS, 0), "temporary": scratch}
            for key, size in self.size.items():
                self.at_peak[self.kind[key]] += size


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
    kept = [s for x in returned if isinstance(x, Node) for s in phase.storages(x)]
    saved_outputs = {s for x in returned[results:] if isinstance(x, Node) for s in phase.storages(x)}
    _run(phase, account, keep=set(kept), saved=saved_outputs)
    held = account.live
    if backward is not None:
        _run_backward(backward, account, phase, returned, results)
    kinds = {**fixed, **{kind: account.at_peak.get(kind, 0) for kind in KINDS[3:]}}
    return Memory(kinds, sum(kinds.values()), account.peak, held, tuple(account.program))


def _run(phase: _Phase, account: _Account, keep: set[Storage], saved: set[Storage], free: bool = True) -> None:
    """Runs through a graph, allocating and freeing."""
    last = phase.last_reads()
    dying: dict[int, list[Storage]] = {}
    for storage, at in last.items():
        if storage not in keep:
            dying.setdefault(at, []).append(storage)
    for node in phase.graph.nodes:
        at = phase.position[node]
        made = [s for s in phase.storages(node) if s[0] is node] if node.op != "placeholder" else []
        if node in phase.fused or node.op in ("output", "get_attr") or node.target is operator.getitem:
            made = []
        ends = dying.get(at, [])
        if made and _fusable(node):  # in place of an operand that ends here
            reused = [s for s in ends if s in account.size and account.size[s] == phase.size(made[0])]
            for storage in reused[:1]:
                account.give(storage)
        for storage in made:
            kind = "saved" if storage in saved else "communication" if node.target in COMMUNICATION else "temporary"
            account.take(storage, phase.size(storage), kind)
        if made:
            account.note(phase.name, node.name, scratch_of(node, account.scratch))
        for storage in made:
            if storage not in last and storage not in keep:
                account.give(storage)
        for storage in ends:
            account.give(storage)


def _run_backward(
    backward: GraphModule, account: _Account, forward: _Phase, returned: Sequence[Any], results: int
) -> None:
    """The backward, whose inputs are what the forward saved, by name, and the gradients of its results."""
    phase = _Phase(backward.graph, "backward")
    names = {x.name: x for x in returned[results:] if isinstance(x, Node)}
    held = {s for x in returned[:results] if isinstance(x, Node) for s in forward.storages(x)}
    results_back: Any = next(iter(backward.graph.find_nodes(op="output"))).args[0]
    gradients = {s for x in results_back if isinstance(x, Node) for s in phase.storages(x)}
    for node in backward.graph.find_nodes(op="placeholder"):
        source = names.get(node.name)
        for storage in phase.storages(node):
            if source is None:
                continue
            base = next(iter(forward.storages(source)), None)
            if base is not None and base in account.size and base not in held:
                account.size[storage], account.kind[storage] = account.size.pop(base), account.kind.pop(base)
    for base in gradients:
        if base[0].op != "placeholder":
            phase.fused.discard(base[0])
    _run(phase, account, keep=gradients, saved=set())
