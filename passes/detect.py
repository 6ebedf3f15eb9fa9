"""detect: captured graph -> attention sites, each with its mask as a scalar function of (b, h, q, k).

A *site* is one `aten.scaled_dot_product_attention` node.  Its `attn_mask`, given as an input or built in the graph, is
pulled back to an expression of `ringpass.mask`: element [b, h, q, k] of the mask node is rewritten through views,
broadcasts, indexing and pointwise ops until it rests on positions, constants and loads from *leaves*, the tensors that
hold data (a padding mask, document ids, a bias table).

    element(arange(n), [i])               = i
    element(expand(x), [.., i, ..])       = element(x, [.., 0 or i, ..])
    element(x & y, idx)                   = element(x, idx) & element(y, idx)
    element(diff(x), idx)                 = element(x, idx) - element(x, idx - 1), where that is one number
    element(index(x, [r, c]), idx)        = element(x, [element(r, idx), element(c, idx)])
    element(anything else, idx)           = load of leaf `x` at idx

Contract: the expression equals the mask for every element.  Nothing is guessed: a node that no line above covers is a
leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass import mask as m
from ringpass.closed_form import constant, simplify
from ringpass.errors import OptionError, UnsupportedError
from ringpass.mask import CAUSAL, TRUE, Const, Expr, Load, call
from ringpass.passes.factors import args_of
from ringpass.passes.heads import unrepeated

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionSite:
    """One attention call.  `mask` is boolean (True: may attend), `bias` is added to the scaled scores or None."""

    index: int
    node: Node
    q: Node
    k: Node
    v: Node
    mask: Expr
    bias: Expr | None
    leaves: tuple[Node, ...]
    scale: float
    dropout: float

    def __str__(self) -> str:
        shapes = " ".join(f"{n}{list(x.meta['val'].shape)}" for n, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        leaves = ", ".join(f"x{i} = {leaf.name}{list(leaf.meta['val'].shape)}" for i, leaf in enumerate(self.leaves))
        parts = [f"site {self.index} ({self.node.name}): {shapes}", f"mask {self.mask}"]
        parts += [f"bias {self.bias}"] if self.bias is not None else []
        parts += [f"leaves {leaves}"] if leaves else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        return "; ".join([*parts, f"scale {self.scale:.6g}"])


def detect(gm: GraphModule, also: Expr = TRUE) -> tuple[AttentionSite, ...]:
    """The sites of `gm`, in graph order; `also` is ANDed with the mask of each.

    Raises UnsupportedError for an attention call that cannot be read.
    """
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is SDPA]
    sites = [_site(gm, index, node) for index, node in enumerate(nodes)]
    return tuple(replace(_grouped(site), mask=simplify(call("and", site.mask, also))) for site in sites)


def _grouped(site: AttentionSite) -> AttentionSite:
    k, v = unrepeated(site.k, site.v)
    return replace(site, k=k, v=v)


def _site(gm: GraphModule, index: int, node: Node) -> AttentionSite:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    width = q.meta["val"].shape[-1]
    scale, dropout = given.get("scale"), given.get("dropout_p", 0.0)
    for name, value in (("scale", scale), ("dropout_p", dropout)):
        if isinstance(value, Node):
            raise UnsupportedError(f"{node.name}: {name} is computed in the graph ({value.name}); pass a Python number")
    allowed: Expr = TRUE
    bias: Expr | None = None
    leaves: tuple[Node, ...] = ()
    if given.get("attn_mask") is not None:
        allowed, bias, leaves = _mask(gm, given["attn_mask"], q.meta["val"].ndim)
    if given.get("is_causal", False):
        allowed = simplify(call("and", CAUSAL, allowed))
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    return AttentionSite(index, node, q, k, v, allowed, bias, leaves, scale, float(dropout))


def _mask(gm: GraphModule, node: Node, query_dims: int) -> tuple[Expr, Expr | None, tuple[Node, ...]]:
    """(boolean mask, additive bias, leaves) of an attn_mask node, which broadcasts to the scores of the queries."""
    puller = Puller(gm)
    scores = {4: (m.B, m.H, m.Q, m.K), 3: (m.B, m.Q, m.K), 2: (m.Q, m.K)}.get(query_dims, ())
    rank = node.meta["val"].ndim
    if not 2 <= rank <= len(scores):
        raise UnsupportedError(
            f"attention mask {node.name} has {rank} dims, expected 2 to {len(scores)} for such queries"
        )
    expr = puller.element(node, puller.clip(node, scores[len(scores) - rank :]))
    allowed, bias = (expr, None) if node.meta["val"].dtype == torch.bool else _split_bias(expr)
    allowed = simplify(allowed)
    used = sorted(_leaves(allowed) | (_leaves(bias) if bias is not None else set()))
    numbers = {old: new for new, old in enumerate(used)}
    renamed = m.renumber(bias, numbers) if bias is not None else None
    return m.renumber(allowed, numbers), renamed, tuple(puller.leaves[i] for i in used)


def scalar_function(allowed: Callable[..., Any]) -> Expr:
    """The expression of a function of scalar tensors (b, h, q, k).  Raises OptionError for what is not elementwise."""
    try:
        gm = make_fx(lambda *at: allowed(*at), pre_dispatch=True)(*(torch.zeros((), dtype=torch.int64) for _ in "bhqk"))
    except Exception as error:
        raise OptionError(
            "the mask function cannot be traced on scalar indices: it may neither branch on them nor index a tensor "
            f"by them ({error})"
        ) from error
    *indices, output = (n for n in gm.graph.nodes if n.op in ("placeholder", "output"))
    result = output.args[0]
    if isinstance(result, bool):
        return Const(result)
    if not isinstance(result, Node) or result.meta["val"].dtype != torch.bool or result.meta["val"].ndim:
        raise OptionError("the mask function must return a boolean scalar for scalar indices")
    puller = Puller(gm)
    for node, index in zip(indices, (m.B, m.H, m.Q, m.K), strict=True):
        puller.known[node, ()] = index
    expr = puller.element(result, ())
    if puller.leaves:
        names = ", ".join(n.name for n in puller.leaves)
        raise OptionError(f"the mask function reads tensors, or uses ops that have no closed form: {names}")
    return expr


def _split_bias(expr: Expr) -> tuple[Expr, Expr | None]:
    """An additive mask as (mask, bias): `where(c, 0, -inf)` is the mask c; a finite fill is not the same and stays."""
    if isinstance(expr, m.Call) and expr.op == "where":
        c, a, b = expr.args
        if a == Const(0.0) and b == Const(-math.inf):
            return c, None
        if a == Const(-math.inf) and b == Const(0.0):
            return call("not", c), None
    return TRUE, expr


def _leaves(expr: Expr) -> set[int]:
    if isinstance(expr, Load):
        return {expr.leaf}.union(*(_leaves(i) for i in expr.indices))
    return set().union(*(_leaves(a) for a in expr.args)) if isinstance(expr, m.Call) else set()


# --- pulling an element back through the graph ------------------------------------------------------------------------

Indices = tuple[Expr, ...]
ZERO = Const(0)


@dataclass
class Puller:
    """Rewrites elements of nodes to expressions; collects the leaves that they rest on."""

    gm: GraphModule
    leaves: list[Node] = field(default_factory=list)
    known: dict[tuple[Node, Indices], Expr] = field(default_factory=dict)

    def element(self, node: Any, indices: Indices) -> Expr:
        """Element `indices` of `node` (one index per dim; size-1 dims are indexed by 0)."""
        if not isinstance(node, Node):
            return Const(node)
        if isinstance(node.meta.get("val"), torch.SymInt):
            return Const(int(node.meta["val"]))  # a length in the mask's arithmetic: a guard, alike on all ranks
        key = (node, indices)
        if key not in self.known:
            rule = RULES.get(node.target) if node.op == "call_function" else None
            found = rule(self, node, indices) if rule else None
            self.known[key] = self.leaf(node, indices) if found is None else found
        return self.known[key]

    def leaf(self, node: Node, indices: Indices) -> Expr:
        """A load from `node`, or its value where it is a constant of one element."""
        constant = _constant(self.gm, node)
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


def _constant(gm: GraphModule, node: Node) -> Any:
    while node.op == "call_function" and node.target in (
        aten.lift_fresh_copy.default,
        aten.detach.default,
        aten.clone.default,
    ):
        node = args_of(node)[0]
    if node.op != "get_attr":
        return None
    value = getattr(gm, str(node.target), None)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.requires_grad:
        return value.item()
    return None


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
        if op in ("and", "or", "xor") and node.meta["val"].dtype != torch.bool:
            return None
        return call(op, *(_operand(p, a, indices, truth="logical" in str(node.target)) for a in node.args))

    RULES.update(dict.fromkeys(targets, rule))


def _operand(p: Puller, node: Any, indices: Indices, truth: bool) -> Expr:
    """An operand's element; for the logical_ ops, whether it is not zero."""
    found = p.element(node, p.clip(node, indices))
    needs = truth and isinstance(node, Node) and node.meta["val"].dtype != torch.bool
    return m.cast(found, torch.bool) if needs else found


def _overloads(*names: str) -> list[Any]:
    """The overloads of ATen ops that exist in this torch, by `name.overload`."""
    packets = [(getattr(aten, n.split(".")[0], None), n.split(".")[1]) for n in names]
    return [getattr(p, o) for p, o in packets if p is not None and o in p.overloads()]


for _op in ("le", "lt", "ge", "gt", "eq", "ne"):
    _pointwise(_op, *_overloads(f"{_op}.Tensor", f"{_op}.Scalar"))
for _op in ("add", "sub", "mul", "div"):
    _pointwise(_op, *_overloads(f"{_op}.Tensor", f"{_op}.Scalar"))
for _op in ("and", "or", "xor"):
    _pointwise(
        _op,
        *_overloads(
            f"__{_op}__.Tensor",
            f"__{_op}__.Scalar",
            f"bitwise_{_op}.Tensor",
            f"bitwise_{_op}.Scalar",
            f"logical_{_op}.default",
        ),
    )
_pointwise("not", *_overloads("logical_not.default"))
_pointwise("neg", aten.neg.default)
_pointwise("abs", aten.abs.default)
_pointwise("log", aten.log.default)
_pointwise("exp", aten.exp.default)
_pointwise("min", *_overloads("minimum.default", "min.other"))
_pointwise("max", *_overloads("maximum.default", "max.other"))
_pointwise("floordiv", *_overloads("floor_divide.default", "floor_divide.Scalar"))
_pointwise("mod", *_overloads("remainder.Tensor", "remainder.Scalar"))
_pointwise("where", *_overloads("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"))


@_rule(aten.bitwise_not.default)
def _not(p: Puller, node: Node, indices: Indices) -> Expr | None:
    return call("not", p.element(node.args[0], indices)) if node.meta["val"].dtype == torch.bool else None


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
    return m.cast(inner, node.meta["val"].dtype)


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
    return Const(number) if exact or dtype != torch.float64 else m.cast(Const(number), dtype)


def _fill(position: int | None, value: Any = None) -> Rule:
    def rule(p: Puller, node: Node, indices: Indices) -> Expr | None:
        number = value if position is None else node.args[position]
        return None if isinstance(number, Node) else _typed(number, node.meta["val"].dtype)

    return rule


RULES.update(dict.fromkeys(_overloads("ones.default", "new_ones.default", "ones_like.default"), _fill(None, 1)))
RULES.update(dict.fromkeys(_overloads("zeros.default", "new_zeros.default", "zeros_like.default"), _fill(None, 0)))
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
    inner, outer = source.meta["val"].shape, node.meta["val"].shape
    kept = [i for n, i in zip(outer, indices, strict=True) if not _is_one(n)]
    if [n for n in outer if not _is_one(n)] == [n for n in inner if not _is_one(n)]:
        rest = iter(kept)
        return p.element(source, tuple(ZERO if _is_one(n) else next(rest) for n in inner))
    if not all(type(n) is int for n in (*inner, *outer)):
        return None
    flat: Expr = ZERO
    for n, i in zip(outer, indices, strict=True):
        flat = call("add", call("mul", flat, Const(n)), i)
    strides = [math.prod(inner[d + 1 :]) for d in range(len(inner))]
    parts = [call("mod", call("floordiv", flat, Const(s)), Const(n)) for s, n in zip(strides, inner, strict=True)]
    return p.element(source, tuple(ZERO if n == 1 else part for n, part in zip(inner, parts, strict=True)))


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
    from_the_end = any(
        m.bounds(i, {})[0] < 0 for i in at
    )  # a negative index counts from the end: only a load does that
    return p.leaf(source, (*at, *tail)) if from_the_end else p.element(source, (*at, *tail))


@_rule(aten.embedding.default)
def _embedding(p: Puller, node: Node, indices: Indices) -> Expr:
    return p.element(node.args[0], (p.element(node.args[1], indices[:-1]), indices[-1]))
