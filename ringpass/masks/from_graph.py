"""Recovers a mask expression from a graph: an element of a node is rewritten, op by op, in terms of its inputs.

    element(arange(n), [i])               = i
    element(expand(x), [.., i, ..])       = element(x, [.., 0 or i, ..])
    element(x & y, idx)                   = element(x, idx) & element(y, idx)
    element(diff(x), idx)                 = element(x, idx) - element(x, idx - 1), where that is one number
    element(index(x, [r, c]), idx)        = element(x, [element(r, idx), element(c, idx)])
    element(anything else, idx)           = load of leaf `x` at idx

Contract: the expression equals the element for all indices.  Nothing is guessed: a node without a rule is a leaf, a
tensor of data (a padding mask, document ids, a bias table).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from ringpass.masks.expr import B, Call, Const, Expr, H, K, Load, Q, call, cast, loads, parts
from ringpass.masks.intervals import bounds
from ringpass.masks.operators import OPERATORS
from ringpass.masks.rewrite import renumber
from ringpass.masks.scores import Scores
from ringpass.masks.simplify import constant, simplify
from ringpass.nodes import args_of

aten = torch.ops.aten
Indices = tuple[Expr, ...]
ZERO = Const(0)
COORDINATES = {4: (B, H, Q, K), 3: (B, Q, K), 2: (Q, K)}
"""The indices of the dims of scores, by the number of dims."""


@dataclass
class Puller:
    """Rewrites elements of nodes to expressions; collects the leaves that they read.

    `bound`: for the placeholders of a body, their values in the enclosing graph.  `products`: nodes whose element at
    the given indices is the given expression.
    """

    leaves: list[Node] = field(default_factory=list)
    known: dict[tuple[Node, Indices], Expr] = field(default_factory=dict)
    bound: dict[Node, Any] = field(default_factory=dict)
    products: dict[Node, tuple[Indices, Expr]] = field(default_factory=dict)

    def element(self, node: Any, indices: Indices) -> Expr:
        """Element `indices` of `node` (one index per dim; size-1 dims are indexed by 0)."""
        node = self.bound.get(node, node)
        if not isinstance(node, Node):
            return Const(node)
        if isinstance(node.meta.get("val"), torch.SymInt):
            return Const(int(node.meta["val"]))  # a length in the mask's arithmetic: a guard, alike on all ranks
        if node in self.products and indices == self.products[node][0]:
            return self.products[node][1]
        key = (node, indices)
        if key not in self.known:
            rule = RULES.get(node.target) if node.op == "call_function" else None
            found = rule(self, node, indices) if rule else None
            self.known[key] = self.leaf(node, indices) if found is None else found
        return self.known[key]

    def leaf(self, node: Node, indices: Indices) -> Expr:
        """A load from `node`, or the value of a constant with one element."""
        node = self.bound.get(node, node)
        constant = _constant(node)
        if constant is not None:
            return Const(constant)
        if node not in self.leaves:
            self.leaves.append(node)
        return Load(self.leaves.index(node), indices)

    def clip(self, node: Any, indices: Sequence[Expr]) -> Indices:
        """The last of `indices` that `node` has dims for, 0 where its dim has size 1: broadcasting, read backwards."""
        value = node.meta["val"] if isinstance(node, Node) else None
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        tail = tuple(indices)[len(indices) - len(shape) :]
        return tuple(ZERO if _is_one(n) else i for n, i in zip(shape, tail, strict=True))


def _is_one(n: Any) -> bool:
    return type(n) is int and n == 1


def _constant(node: Node) -> Any:
    while node.op == "call_function" and node.target in (
        aten.lift_fresh_copy.default,
        aten.detach.default,
        aten.clone.default,
    ):
        node = args_of(node)[0]
    if node.op != "get_attr":
        return None
    value = getattr(node.graph.owning_module, str(node.target), None)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.requires_grad:
        return value.item()
    return None


# --- rules ------------------------------------------------------------------------------------------------------------

Rule = Callable[[Puller, Node, Indices], Expr | None]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, fn))
        return fn

    return register


def _pointwise(op: str, *targets: Any) -> None:
    def rule(p: Puller, node: Node, indices: Indices) -> Expr | None:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode", None) is not None:
            return None
        if OPERATORS[op].dtype == "bool" and node.meta["val"].dtype != torch.bool:
            return None
        return call(op, *(_operand(p, a, indices, truth="logical" in str(node.target)) for a in node.args))

    RULES.update(dict.fromkeys(targets, rule))


def _operand(p: Puller, node: Any, indices: Indices, truth: bool) -> Expr:
    """An operand's element; for the logical_ ops, whether it is not zero."""
    found = p.element(node, p.clip(node, indices))
    needs = truth and isinstance(node, Node) and node.meta["val"].dtype != torch.bool
    return cast(found, torch.bool) if needs else found


def _overloads(*names: str) -> list[Any]:
    """The overloads of ATen ops that exist in this torch, by `name.overload`."""
    packets = [(getattr(aten, n.split(".")[0], None), n.split(".")[1]) for n in names]
    return [getattr(p, o) for p, o in packets if p is not None and o in p.overloads()]


for _name, _operator in OPERATORS.items():
    _pointwise(_name, *_overloads(*_operator.aten))


@_rule(aten.bitwise_not.default)
def _not(p: Puller, node: Node, indices: Indices) -> Expr | None:
    return call("not", p.element(node.args[0], indices)) if node.meta["val"].dtype == torch.bool else None


@_rule(*_overloads("div.Tensor_mode", "div.Scalar_mode"))
def _div(p: Puller, node: Node, indices: Indices) -> Expr | None:
    mode: Any = node.kwargs["rounding_mode"]
    op = {"floor": "floordiv", None: "div"}.get(mode)
    return call(op, *(p.element(x, p.clip(x, indices)) for x in node.args)) if op else None


@_rule(*_overloads("silu.default"))
def _silu(p: Puller, node: Node, indices: Indices) -> Expr:
    inner = p.element(node.args[0], indices)
    return call("mul", inner, call("sigmoid", inner))


@_rule(*_overloads("rsub.Tensor", "rsub.Scalar"))
def _rsub(p: Puller, node: Node, indices: Indices) -> Expr | None:
    subtracted, other = args_of(node)[:2]
    if args_of(node)[2:] not in ((), (1,)) or node.kwargs.get("alpha", 1) != 1:
        return None
    return call("sub", *(p.element(x, p.clip(x, indices)) for x in (other, subtracted)))


@_rule(*_overloads("square.default"))
def _square(p: Puller, node: Node, indices: Indices) -> Expr:
    inner = p.element(node.args[0], indices)
    return call("mul", inner, inner)


@_rule(*_overloads("clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_max.default"))
def _clamp(p: Puller, node: Node, indices: Indices) -> Expr:
    """By comparisons: at a bound the gradient is that of what is clamped."""
    names = ("self", "max") if node.target is aten.clamp_max.default else ("self", "min", "max")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    found = p.element(given["self"], p.clip(given["self"], indices))
    for side, beyond in (("min", "lt"), ("max", "gt")):
        if given.get(side) is not None:
            bound = p.element(given[side], p.clip(given[side], indices))
            found = call("where", call(beyond, found, bound), bound, found)
    return found


@_rule(*_overloads("masked_fill.Scalar", "masked_fill.Tensor"))
def _masked_fill(p: Puller, node: Node, indices: Indices) -> Expr:
    x, where, value = args_of(node)
    fill = p.element(value, p.clip(value, indices))
    if isinstance(fill, Const) and node.meta["val"].is_floating_point():
        fill = _typed(fill.value, node.meta["val"].dtype)
    return call("where", p.element(where, p.clip(where, indices)), fill, p.element(x, p.clip(x, indices)))


@_rule(*_overloads("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default"))
def _to(p: Puller, node: Node, indices: Indices) -> Expr:
    source = args_of(node)[0]
    inner = p.element(source, indices)
    if source.meta["val"].dtype == node.meta["val"].dtype:
        return inner
    if isinstance(inner, Const):
        return _typed(inner.value, node.meta["val"].dtype)
    return cast(inner, node.meta["val"].dtype)


@_rule(*_overloads(
    "contiguous.default", "clone.default", "alias.default", "detach.default", "lift_fresh_copy.default",
    "lift_fresh.default",
))  # fmt: skip
def _same(p: Puller, node: Node, indices: Indices) -> Expr:
    return p.element(node.args[0], indices)


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(p: Puller, node: Node, indices: Indices) -> Expr | None:
    start = 0 if node.target is aten.arange.default else node.args[0]
    step = node.args[2] if node.target is aten.arange.start_step and len(node.args) > 2 else 1
    if not (isinstance(start, int) and isinstance(step, int)) or node.meta["val"].is_floating_point():
        return None
    return call("add", call("mul", indices[0], Const(step)), Const(start))


def _typed(value: Any, dtype: torch.dtype) -> Expr:
    """A constant of `dtype`; converted in the expression where float32, torch's default, would round it."""
    if not dtype.is_floating_point:
        return Const(bool(value) if dtype == torch.bool else int(value))
    number = float(value)
    exact = not math.isfinite(number) or torch.tensor(number, dtype=torch.float32).item() == number
    return Const(number) if exact or dtype != torch.float64 else cast(Const(number), dtype)


def _fill(position: int | None, value: Any = None) -> Rule:
    def rule(p: Puller, node: Node, indices: Indices) -> Expr | None:
        number = value if position is None else node.args[position]
        return None if isinstance(number, Node) else _typed(number, node.meta["val"].dtype)

    return rule


RULES.update(dict.fromkeys(_overloads("ones.default", "new_ones.default", "ones_like.default"), _fill(None, 1)))
RULES.update(dict.fromkeys(_overloads("zeros.default", "new_zeros.default", "zeros_like.default"), _fill(None, 0)))
RULES.update(dict.fromkeys(_overloads("scalar_tensor.default"), _fill(0)))
RULES.update(dict.fromkeys(_overloads("full.default", "full_like.default"), _fill(1)))
RULES.update(dict.fromkeys(_overloads("new_full.default"), _fill(2)))


@_rule(aten.tril.default, aten.triu.default)
def _triangle(p: Puller, node: Node, indices: Indices) -> Expr | None:
    offset = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
    if not isinstance(offset, int):
        return None
    inside = call(
        "le" if node.target is aten.tril.default else "ge", indices[-1], call("add", indices[-2], Const(offset))
    )
    inner, dtype = p.element(node.args[0], indices), node.meta["val"].dtype
    if dtype == torch.bool:
        return call("and", inside, inner)
    return call("where", inside, inner, _typed(0, dtype))


@_rule(*_overloads("diff.default"))
def _diff(p: Puller, node: Node, indices: Indices) -> Expr | None:
    """Differences of neighbours that are the same everywhere, the one with what is prepended too: diff(arange) is 1."""
    source, *given = args_of(node)
    defaults: tuple[Any, ...] = (1, -1, None, None)
    order, dim, prepend, append = (*given, *defaults[len(given) :])
    dim %= len(indices)
    if order != 1 or append is not None or dim != len(indices) - 1:
        return None
    lead, at = indices[:-1], indices[-1]
    first = p.element(source, (*lead, at if prepend is not None else call("add", at, Const(1))))
    before = p.element(source, (*lead, call("sub", at, Const(1)) if prepend is not None else at))
    step = constant(call("sub", first, before))
    if step is not None and prepend is not None:
        start = call("sub", p.element(source, (*lead, ZERO)), p.element(prepend, p.clip(prepend, (*lead, ZERO))))
        step = step if _is_one(prepend.meta["val"].shape[-1]) and constant(start) == step else None
    return step


@_rule(*_overloads("cumsum.default"))
def _cumsum(p: Puller, node: Node, indices: Indices) -> Expr | None:
    """Sums of nothing: of a condition that holds nowhere."""
    source, dim = args_of(node)[:2]
    inner = simplify(p.element(source, indices))
    nothing = isinstance(inner, Const) and inner.value == 0 and dim % len(indices) == len(indices) - 1
    return Const(0) if nothing and not node.meta["val"].is_floating_point() else None


# --- views and indexing -----------------------------------------------------------------------------------------------


@_rule(aten.unsqueeze.default)
def _unsqueeze(p: Puller, node: Node, indices: Indices) -> Expr:
    dim = args_of(node)[1] % len(indices)
    return p.element(node.args[0], indices[:dim] + indices[dim + 1 :])


@_rule(aten.expand.default)
def _expand(p: Puller, node: Node, indices: Indices) -> Expr:
    return p.element(node.args[0], p.clip(node.args[0], indices))


@_rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(p: Puller, node: Node, indices: Indices) -> Expr:
    args, order = args_of(node), list(range(len(indices)))
    if node.target is aten.permute.default:
        order = [d % len(order) for d in args[1]]
    else:
        a, b = (args[1] % len(order), args[2] % len(order)) if node.target is aten.transpose.int else (0, -1)
        order[a], order[b] = order[b], order[a]
    inner: list[Expr] = [ZERO] * len(order)
    for position, dim in enumerate(order):
        inner[dim] = indices[position]
    return p.element(args[0], tuple(inner))


@_rule(
    *_overloads(
        "view.default", "reshape.default", "_unsafe_view.default", "squeeze.dim", "squeeze.dims", "squeeze.default"
    )
)
def _view(p: Puller, node: Node, indices: Indices) -> Expr | None:
    source = args_of(node)[0]
    at = regrouped(indices, node.meta["val"].shape, source.meta["val"].shape)
    return None if at is None else p.element(source, at)


def regrouped(indices: Indices, shape: Sequence[Any], into: Sequence[Any]) -> Indices | None:
    """Where element `indices` of a tensor of `shape` is in a view of it of shape `into`; None for symbolic sizes.

    >>> print(*regrouped((B, H, Q), (2, 3, 5), (6, 5)))
    b * 3 + h q
    """
    groups = _groups(shape, into)
    if groups is None:
        return None
    out: list[Expr] = [ZERO] * len(into)
    for ours, theirs in groups:
        flat = reduce(lambda a, d: _merged(a, shape[d], indices[d]), ours[1:], indices[ours[0]])
        for d in reversed(theirs[1:]):
            flat, out[d] = _divided(flat, into[d])
        out[theirs[0]] = flat
    return tuple(out)


def _groups(shape: Sequence[Any], into: Sequence[Any]) -> list[tuple[list[int], list[int]]] | None:
    """The dims of two shapes, but for those of size 1, in the least groups of equal numbers of elements."""
    ours, theirs = ([d for d, n in enumerate(s) if not _is_one(n)] for s in (shape, into))
    groups: list[tuple[list[int], list[int]]] = []
    while ours and theirs:
        a, b = [ours.pop(0)], [theirs.pop(0)]
        while (m_ := math.prod(shape[d] for d in a)) != (n := math.prod(into[d] for d in b)):
            fewer, rest = (a, ours) if m_ < n else (b, theirs)
            if not rest or not all(type(x) is int for x in (*shape, *into)):
                return None
            fewer.append(rest.pop(0))
        groups.append((a, b))
    return None if ours or theirs else groups


def _merged(flat: Expr, n: int, index: Expr) -> Expr:
    """flat * n + index, where that is not what `_divided` took apart."""
    divided = isinstance(flat, Call) and isinstance(index, Call) and (flat.op, index.op) == ("floordiv", "mod")
    if divided and parts(flat) == parts(index) == (parts(flat)[0], Const(n)):
        return parts(flat)[0]
    return call("add", call("mul", flat, Const(n)), index)


def _divided(flat: Expr, n: int) -> tuple[Expr, Expr]:
    """flat // n and flat % n, where that is not what `_merged` put together."""
    if isinstance(flat, Call) and flat.op == "add":
        left, right = flat.args
        if isinstance(left, Call) and left.op == "mul" and left.args[1] == Const(n):
            return left.args[0], right
    return call("floordiv", flat, Const(n)), call("mod", flat, Const(n))


@_rule(aten.slice.Tensor)
def _slice(p: Puller, node: Node, indices: Indices) -> Expr | None:
    defaults: tuple[Any, ...] = (0, None, None, 1)
    source, *given = args_of(node)
    dim, start, _, step = (*given, *defaults[len(given) :])
    start = 0 if start is None else start
    if not all(isinstance(x, int) for x in (dim, start, step)) or start < 0:
        return None
    at = list(indices)
    at[dim] = call("add", call("mul", at[dim], Const(step)), Const(start))
    shape = source.meta["val"].shape
    return p.element(source, tuple(ZERO if _is_one(n) else i for n, i in zip(shape, at, strict=True)))


@_rule(aten.select.int)
def _select(p: Puller, node: Node, indices: Indices) -> Expr | None:
    source, dim, at = args_of(node)
    shape = source.meta["val"].shape
    if not (isinstance(at, int) and isinstance(dim, int)) or (at < 0 and not isinstance(shape[dim], int)):
        return None
    dim %= len(shape)
    fixed = Const(at % shape[dim] if at < 0 else at)
    return p.element(source, (*indices[:dim], fixed, *indices[dim:]))


@_rule(aten.index.Tensor)
def _index(p: Puller, node: Node, indices: Indices) -> Expr | None:
    source, picks = args_of(node)
    if any(i is None or i.meta["val"].dtype == torch.bool for i in picks):
        return None
    rest = source.meta["val"].ndim - len(picks)
    lead, tail = indices[: len(indices) - rest], indices[len(indices) - rest :]
    at = [p.element(i, p.clip(i, lead)) for i in picks]
    from_the_end = [bool(bounds(i, {})[0] < 0) for i in at]  # a negative index counts from the end: so does a load's
    if any(from_the_end) and RULES.get(source.target) is _index:
        sizes = source.meta["val"].shape
        at = [_wrapped(i, n) if end else i for i, n, end in zip(at, sizes, from_the_end, strict=False)]
    elif any(from_the_end):
        return p.leaf(source, (*at, *tail))
    return p.element(source, (*at, *tail))


def _wrapped(index: Expr, size: Any) -> Expr:
    """An index that may count from the end as one that does not."""
    return call("where", call("lt", index, ZERO), call("add", index, Const(int(size))), index)


@_rule(aten.embedding.default)
def _embedding(p: Puller, node: Node, indices: Indices) -> Expr:
    return p.element(node.args[0], (p.element(node.args[1], indices[:-1]), indices[-1]))


# --- what was found ---------------------------------------------------------------------------------------------------


def numbered(puller: Puller, scores: Scores) -> tuple[Scores, tuple[Node, ...]]:
    """(scores, leaves): the leaves that the expressions of `scores` load, numbered from 0; its masks simplified."""
    keyless = scores.keyless and replace(scores.keyless, mask=simplify(scores.keyless.mask))
    found = replace(scores, mask=simplify(scores.mask), keyless=keyless)
    used = sorted(set[int]().union(*map(loads, found.expressions)))
    numbers = {old: new for new, old in enumerate(used)}
    return found.rewritten(lambda e: renumber(e, numbers)), tuple(puller.leaves[i] for i in used)
