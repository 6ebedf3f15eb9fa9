"""Factors: which dims of which tensors are the same index, found by one sweep of rules over the captured graph.

A *factor* is one index variable of the program: batch, sequence, head, channel.  Each dim of each tensor is a list of
factors, most often one; after `view(B * S, V)` the first dim is the list [B, S], and a later view splits it again along
its factors, never by guessing from sizes.  Rules tie factors together (`add` ties the dims of its operands, `linear`
the leading dims of input and output); a union-find keeps the classes.  The *sequence axes* are the classes of the query
and key dims of the attention sites: by then every other tensor's sequence dim is known, forward and backward alike.

For each node the sweep also notes which factors the op needs *replicated* (softmax over them, a slice of them) and
which it *reduces* (sums over); for every other factor, op on shards equals shards of op.

    for node in graph:
        dims[node], note = rule(node)      # ties factors, notes those needed replicated and those reduced
    axis of a site = class of the one factor in its query (key) dim
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
from torch.fx import GraphModule, Node

from ringpass.nodes import Size, op_name, operands_of, size_of, tensors_of
from ringpass.passes.failures import Failures
from ringpass.passes.propagate.alignment import SequenceAlignment

Factors = tuple["Factor", ...]
"""One dim of a tensor: its factors, outermost first; none for a dim of size 1."""
Dims = tuple[Factors, ...]
"""All dims of a tensor."""
Results = Dims | tuple[Dims, ...]
"""Dims of an op's result, or of each of its results."""


class Factor:
    """An index variable over `size` elements.

    `parent` leads to its class, `parts` to the factors that it was split into; `number` is the order of creation.
    """

    __slots__ = ("number", "parent", "parts", "size")
    numbers = itertools.count()

    def __init__(self, size: sympy.Expr) -> None:
        self.size, self.number = size, next(Factor.numbers)
        self.parent: Factor | None = None
        self.parts: Factors | None = None

    def __repr__(self) -> str:
        return f"f{id(self) % 9973}:{self.size}"


@dataclass
class Note:
    """What the sweep found out about one node: factors that it needs replicated, factors over which it sums.

    `redistributed`: pairs of factors that the op takes as equal, though they are different slices of one sequence
    (`x[:, 1:] - x[:, :-1]`): the tokens of the first are sent to the ranks of those of the second.
    """

    need_replication: list[Factor] = field(default_factory=list)
    reduction: list[Factor] = field(default_factory=list)
    redistributed: list[tuple[Factor, Factor]] = field(default_factory=list)
    known: bool = True  # False: the op has no rule


@dataclass
class Routing:
    """Rows of (token, expert) pairs, sorted by expert; see `passes.op_rules.routing`."""

    pairs: dict[Factor, Factors] = field(default_factory=dict)  # rows -> what they are an order of
    order: dict[Node, tuple[Factor, int]] = field(default_factory=dict)  # the pair of each row, divided by k
    back: dict[Node, Factor] = field(default_factory=dict)  # the row of each pair
    counts: dict[Node, Factor] = field(default_factory=dict)  # rows of each expert


class Rule(Protocol):
    """What the sweep asks of an op's record, `passes.op_rules.spec.OpRule`."""

    @property
    def dims(self) -> Callable[[Sweep, Node, Note], Results | None]:
        """(sweep, node, note) -> the dims of the result; None: not understood."""

    @property
    def computes(self) -> bool:
        """Whether the result is computed, rather than looked up or given."""


class Sweep:
    """The state of the sweep, and the vocabulary in which rules are written.

    `computed`: values that ranks hold sharded or compute from tokens: sharded inputs, and what follows from a product
    or a norm; not tables, nor other inputs.  `in_sections`: whether many slices of a sequence may be sections of it.
    """

    def __init__(self, computed: Iterable[Node] = (), in_sections: bool = True) -> None:
        self.values: dict[Node, Any] = {}  # Dims, or a tuple of Dims for several results
        self.notes: dict[Node, Note] = {}
        self.fused: dict[Factors, Factor] = {}
        self.routing = Routing()
        self.alignment = SequenceAlignment(self.root)
        self.merged: list[Factor] = []  # factors that stand for several in a row in `alignment`
        self.computed = set(computed)
        self.in_sections = in_sections
        self.halos: dict[Node, int] = {}  # nodes that read tokens around each token, and along which dim
        self.slices: dict[Node, int] = {}  # nodes that slice or join sequences, and along which dim
        self.sections: list[Factor] = []  # slices of a sequence that is worked through in several

    def run(self, gm: GraphModule, rule_for: Callable[[Node], Rule], failures: Failures) -> Sweep:
        """Applies the rule of every node, in order."""
        for node in gm.graph.nodes:
            note = self.notes[node] = Note()
            if rule_for(node).computes or not self.computed.isdisjoint(node.all_input_nodes):
                self.computed.add(node)
            if node.op == "output" or not tensors_of(node):
                continue
            if node.op in ("placeholder", "get_attr"):
                self.values[node] = self.fresh(node.meta["val"].shape)
                continue
            dims = None
            with failures.of("propagate", node):
                dims = self._checked(node, rule_for(node).dims(self, node, note))
            self.values[node] = self._unknown(node, note) if dims is None else dims
        return self

    def _checked(self, node: Node, dims: Results | None) -> Results | None:
        if dims is not None and not self.fits(node, dims):
            raise ValueError(f"the rule of {op_name(node)} gives {dims}, which do not fit its result")
        return dims

    def fits(self, node: Node, dims: Results) -> bool:
        """Whether these dims are as many as the values of `node` have, and of their sizes where these are known."""
        return self.fits_value(node.meta["val"], dims)

    def fits_value(self, values: Any, dims: Any) -> bool:
        """The same of one value, a tensor or several."""
        if isinstance(values, torch.Tensor):
            return self._has_dims(values, dims)
        pairs: Any = zip(values, dims, strict=True)
        return all(self.fits_value(x, of_one) for x, of_one in pairs if isinstance(x, torch.Tensor | tuple | list))

    def _has_dims(self, x: torch.Tensor, dims: Dims) -> bool:
        if len(dims) != x.ndim:
            return False
        sizes = [(n, product(self.resolve(d))) for n, d in zip(x.shape, dims, strict=True) if isinstance(n, int)]
        return all(n <= 1 or n == size for n, size in sizes)

    # --- the vocabulary of rules ------------------------------------------------------------------------------------

    def new(self, n: Size | sympy.Expr) -> Factors:
        """A factor of its own for a dim of size n; none for size 1."""
        return self.fresh_sizes(size_of(n))

    def fresh_sizes(self, *sizes: sympy.Expr) -> Factors:
        """A factor of its own for each size but 1."""
        return tuple(Factor(size) for size in sizes if size != 1)

    def fresh(self, shape: Sequence[Size | sympy.Expr]) -> Dims:
        """A factor of its own for each dim of `shape`."""
        return tuple(self.new(n) for n in shape)

    def dims(self, node: Node) -> Dims:
        """Dims of a node that produces one tensor, in resolved factors."""
        return tuple(self.resolve(d) for d in self.values[node])

    def operand_dims(self, node: Node) -> Dims:
        """All dims of all tensors that `node` produces, in resolved factors."""
        return tuple(self.resolve(d) for dims in self.results(node) for d in dims)

    def results(self, node: Node) -> list[Dims]:
        """The dims of each tensor that `node` produces, also in lists among its results."""

        def listed(value: Any, dims: Any) -> list[Dims]:
            if isinstance(value, torch.Tensor):
                return [dims]
            return [d for pair in zip(value, dims, strict=True) for d in listed(*pair)] if dims else []

        return listed(node.meta.get("val"), self.values.get(node, ()))

    def resolve(self, factors: Iterable[Factor]) -> Factors:
        """The classes of `factors`: split ones as their parts, fused ones as one."""
        out = [part for factor in factors for part in self._parts(factor)]
        for parts, fused in self.fused.items():
            for at in range(len(out) - len(parts), -1, -1):
                if tuple(out[at : at + len(parts)]) == parts:
                    out[at : at + len(parts)] = [fused]
        return tuple(out)

    def _parts(self, factor: Factor) -> Iterator[Factor]:
        """The classes of what a factor was split into, before any are fused."""
        root = self.root(factor)
        if root.parts is None:
            yield root
        else:
            for part in root.parts:
                yield from self._parts(part)

    def fuse(self, factors: Factors) -> Factor:
        """From now on, `factors` in a row are one index, such as the rows and columns of patches."""
        return self.fused.setdefault(factors, Factor(product(factors)))

    def root(self, factor: Factor) -> Factor:
        """The class of a factor."""
        while factor.parent is not None:
            factor = factor.parent
        return factor

    def tie(self, a: Factors, b: Factors, note: Note) -> Factors:
        """Declares two dims to be one index, and returns it; `note` gets what cannot be, or only by moving tokens."""
        a, b = self.resolve(a), self.resolve(b)
        if a != b and any(f in self.routing.pairs for f in (*a, *b)):  # rows are in an order of their own
            note.need_replication += [*a, *b]
            return a
        if len(a) == 1 and len(b) > 1:
            a, b = b, a
        if len(b) == 1 and len(a) > 1 and product(a) == b[0].size:
            if not self.alignment.tie(self.index(a), b[0]):  # another slice of the same sequence
                note.redistributed.append((b[0], self.index(a)))
                return a
            b[0].parts = a
            self.merged.insert(0, b[0])
            return a
        if [f.size for f in a] != [f.size for f in b] and product(a) == product(b):
            a, b = self._refine(a, b)
        if [f.size for f in a] != [f.size for f in b]:
            note.need_replication += [*a, *b]
            return a
        kept = []
        for x, y in zip(map(self.root, a), map(self.root, b), strict=True):
            if x is not y and self.alignment.tie(x, y):
                y.parent = x
            elif x is not y:
                x, y = sorted((x, y), key=lambda factor: factor.number)  # what is there first stays where it is
                note.redistributed.append((y, x))
            kept.append(x)
        return self.resolve(kept)

    def index(self, factors: Factors) -> Factor:
        """One factor for a dim of these, which may be several in a row, such as the rows and columns of patches."""
        if len(factors) == 1:
            return factors[0]
        found = next((one for one in self.merged if self.resolve([one]) == self.resolve(factors)), None)
        if found is None:
            found = Factor(product(factors))
            found.parts = factors
            self.merged.append(found)
        return found

    def aligned(self, factor: Factor) -> Factor:
        """What stands in `alignment` for `factor`, which several may have been fused into."""
        parts = next((parts for parts, fused in self.fused.items() if fused is factor), (factor,))
        return self.index(parts)

    def slice_of(
        self, source: Factors, offset: sympy.Expr, size: sympy.Expr, new: bool, section: bool = False
    ) -> Factors | None:
        """The slice of `size` of a dim's tokens from `offset` on; None where it is not known, and not to be `new`.

        `section`: a new slice is one of several in which the sequence is worked through.
        """
        tokens = self.index(source)
        found = self.alignment.slice(tokens, offset, size)
        if found is None and new:
            found = Factor(size)
            self.alignment.join(tokens, found, offset)
            if section:
                self.sections.append(found)
        return None if found is None else self.resolve([found])

    def is_section(self, factors: Factors) -> bool:
        """Whether a dim of these factors is one of several slices in which a sequence is worked through."""
        return len(factors) == 1 and any(self.root(section) is self.root(factors[0]) for section in self.sections)

    def sequence(self, factors: Factors) -> tuple[Factor, sympy.Expr]:
        """(the sequence of which a dim of these factors is a slice, the offset of the dim's first token in it)."""
        return self.alignment.locate(self.aligned(factors[0]) if len(factors) == 1 else self.index(factors))

    def joined(self, parts: Sequence[tuple[Factors, sympy.Expr]], note: Note) -> Factors:
        """The dim of the concatenation of `parts`, each (its dim, its size).

        Factors that are at another offset already are needed replicated; a part without factors is new.
        """
        offsets = [sum((n for _, n in parts[:i]), sympy.Integer(0)) for i in range(len(parts))]
        total = sum((n for _, n in parts), sympy.Integer(0))
        located = [(self.index(f), at) for (f, _), at in zip(parts, offsets, strict=True) if f]
        first, before = located[0]
        joined = self.alignment.slice(first, -before, total)
        if joined is None:
            joined = Factor(total)
            if any(self.is_section((part,)) for part, _ in located):
                self.sections.append(joined)
        for part, at in located:
            if not self.alignment.join(joined, part, at):
                note.need_replication.append(part)
        return self.resolve([joined])

    def broadcast(self, operands: Sequence[Dims], note: Note) -> Dims:
        """Dims of a pointwise op: right-aligned dims are tied, size-1 dims follow the others."""
        out: list[Factors] = [()] * max((len(d) for d in operands), default=0)
        for dims in operands:
            for position, factors in enumerate(dims, start=len(out) - len(dims)):
                if factors:
                    out[position] = self.tie(out[position], factors, note) if out[position] else factors
        return tuple(out)

    def broadcast_beside(self, operands: Sequence[Dims], left_out: Collection[int], note: Note) -> Dims:
        """The same of operands of one rank, in which the dims `left_out` are not tied, and have no factors."""
        return self.broadcast([tuple(() if d in left_out else f for d, f in enumerate(o)) for o in operands], note)

    def reshape(self, dims: Dims, shape: Sequence[Size | sympy.Expr], note: Note) -> Dims:
        """Dims after a view to `shape`: each takes the next factors, one is split where a new dim ends inside it.

        Of an empty tensor, only first dims that stay as they are keep their factors.
        """
        if any(size_of(n) == 0 for n in shape):
            return self._reshape_empty(dims, shape, note)
        atoms = [f for d in dims for f in self.resolve(d)]
        out: list[Factors] = []
        for n in shape:
            got, wanted = [], size_of(n)
            while wanted != 1:
                if not atoms:
                    return self._give_up(dims, shape, note)
                first = atoms.pop(0)
                rest = sympy.cancel(wanted / first.size)
                if is_integral(rest):
                    got.append(first)
                    wanted = rest
                    continue
                inner = sympy.cancel(first.size / wanted)
                if not is_integral(inner):
                    return self._give_up(dims, shape, note)
                first.parts = (Factor(wanted), Factor(inner))
                if self.alignment.has(first):
                    self.merged.append(first)
                got.append(first.parts[0])
                atoms.insert(0, first.parts[1])
                wanted = sympy.Integer(1)
            out.append(tuple(got))
        return tuple(out)

    def _reshape_empty(self, dims: Dims, shape: Sequence[Size | sympy.Expr], note: Note) -> Dims:
        pairs = zip(dims, shape, strict=False)
        kept = list(itertools.takewhile(lambda pair: product(self.resolve(pair[0])) == size_of(pair[1]), pairs))
        passing = tuple(self.resolve(d) for d, _ in kept)
        return (*passing, *self._give_up(dims[len(passing) :], shape[len(passing) :], note))

    def _refine(self, a: Factors, b: Factors) -> tuple[Factors, Factors]:
        """Two dims of as many elements, each split where the other one is, if that is possible."""
        self.reshape((a,), [f.size for f in b], Note())
        a = self.resolve(a)
        self.reshape((b,), [f.size for f in a], Note())
        return a, self.resolve(b)

    def _give_up(self, dims: Dims, shape: Sequence[Size | sympy.Expr], note: Note) -> Dims:
        note.need_replication += [f for d in dims for f in self.resolve(d)]
        return self.fresh(shape)

    def _unknown(self, node: Node, note: Note) -> Results:
        """No rule: every factor of every operand is needed replicated."""
        note.known = False
        note.need_replication += [f for operand in operands_of(node) for d in self.operand_dims(operand) for f in d]
        fresh: Results = self._fresh_results(node.meta["val"])
        return fresh

    def _fresh_results(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.fresh(value.shape)
        return tuple(map(self._fresh_results, value)) if isinstance(value, tuple | list) else ()


def propagate(
    gm: GraphModule,
    rule_for: Callable[[Node], Rule],
    computed: Iterable[Node] = (),
    failures: Failures | None = None,
    in_sections: bool = True,
) -> Sweep:
    """Sweeps the graph once.  `computed`: the inputs that come sharded; an op whose rule fails has no rule.

    `in_sections`: whether each rank works on its own tokens of each of many slices of a sequence.
    """
    return Sweep(computed, in_sections).run(gm, rule_for, failures or Failures())


def product(factors: Iterable[Factor]) -> sympy.Expr:
    """The size of a dim of these factors."""
    return sympy.prod([f.size for f in factors], sympy.Integer(1))


def is_integral(expr: sympy.Expr) -> bool:
    """Whether a quotient of sizes is a whole number for every value of its symbols."""
    denominator = sympy.fraction(sympy.together(expr))[1]
    return bool(denominator == 1 and (not expr.is_number or expr.is_integer))
