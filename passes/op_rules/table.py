"""One rule per ATen op: how its output's dims come from its operands'.  Op knowledge is data wherever it can be.

`EINSUM` holds ops whose rule is a line: letters are factors, `*` any leading dims, `!` after a letter: needed whole.
Pointwise ops need no entry (torch tags them).  The rest are small functions `(sweep, node, note) -> dims`; None, or no
rule at all, means that every operand is needed whole: the op is then run replicated and reported by name.

Ops that act along a dim (softmax, slice, cat, cumsum) need that dim whole and leave the others alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ringpass.nodes import args_of, bound_of, first_of, op_name, operands_of
from ringpass.passes.op_rules import routing
from ringpass.passes.op_rules import slicing as run_rules
from ringpass.passes.propagate.factors import CONV1D, Dims, Factors, Note, Sweep, product

aten = torch.ops.aten
Rule = Callable[[Sweep, Node, Note], Any]

EINSUM = {
    "linear.default": "*i,oi,o->*o",
    "mm.default": "mk,kn->mn",
    "bmm.default": "bmk,bkn->bmn",
    "addmm.default": "mn,mi,in->mn",
    "baddbmm.default": "bmn,bmk,bkn->bmn",
    "mv.default": "mk,k->m",
    "outer.default": "m,n->mn",
    "embedding.default": "v!d,*->*d",
}
POINTWISE = {
    "to.dtype", "to.dtype_layout", "to.device", "_to_copy.default", "contiguous.default", "clone.default",
    "alias.default", "detach.default", "lift_fresh_copy.default", "lift_fresh.default", "dropout.default",
    "zeros_like.default", "ones_like.default", "full_like.default", "masked_fill.Scalar", "masked_fill.Tensor",
    "copy.default", "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "where.self", "gelu.default",
    "silu.default", "relu.default", "relu6.default", "leaky_relu.default", "elu.default", "hardtanh.default",
    "hardswish.default", "mish.default", "softplus.default", "selu.default", "celu.default", "log_sigmoid.default",
    "prelu.default", "square.default", "rsub.Scalar", "rsub.Tensor", "float_power.Tensor_Scalar",
    "bitwise_not.default", "logical_not.default", "clamp.default", "clamp.Tensor", "isfinite.default",
    "isinf.default", "isnan.default", "nan_to_num.default", "min.other", "max.other", "empty_like.default",
    "__and__.Tensor", "__and__.Scalar", "__or__.Tensor", "__or__.Scalar", "real.default", "imag.default",
    "conj.default", "_conj.default", "resolve_conj.default", "resolve_neg.default", "polar.default", "complex.default",
}  # fmt: skip
CREATION = {
    "arange.default", "arange.start", "arange.start_step", "zeros.default", "ones.default", "full.default",
    "empty.memory_format", "new_zeros.default", "new_ones.default", "new_full.default", "new_empty.default",
    "scalar_tensor.default", "eye.default", "eye.m", "linspace.default", "randn.default", "rand.default",
}  # fmt: skip
CONSTANT = {
    "zeros.default", "ones.default", "full.default", "new_zeros.default", "new_ones.default", "new_full.default",
}  # fmt: skip
"""Creation ops whose every element is the same: a shard of one is the same op at the local size."""

VIEWS = {
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
    "view_as.default", "reshape_as.default",
}  # fmt: skip
RESIZED = {
    **dict.fromkeys(VIEWS, 1),
    "expand.default": 1,
    **dict.fromkeys(CONSTANT, 0),
    **{f"new_{n}.default": 1 for n in ("zeros", "ones", "full")},
}
"""Ops that name output sizes, and the position of that argument."""

FUNCTION = "autograd_function_apply"

PATTERNED = ("type_as.default", "to.other")
"""Ops whose second operand only lends its dtype."""

WHOLE_DIM = {
    "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default", "cumsum.default", "cumprod.default",
    "logcumsumexp.default", "flip.default", "roll.default", "tril.default", "triu.default", "glu.default",
}  # fmt: skip
SUMS = {"sum.dim_IntList", "sum.default", "mean.dim", "mean.default"}
LOSSES = {
    "mse_loss.default", "l1_loss.default", "smooth_l1_loss.default", "huber_loss.default", "soft_margin_loss.default",
    "kl_div.default", "binary_cross_entropy.default", "binary_cross_entropy_with_logits.default",
}  # fmt: skip
"""Element-wise losses; their `reduction` is 0 (none), 1 (mean) or 2 (sum)."""
REDUCTIONS = {
    "amax.default", "amin.default", "any.dim", "all.dim", "argmax.default", "argmin.default", "max.dim", "min.dim",
    "var.correction", "std.correction", "logsumexp.default", "prod.dim_int", "any.default", "all.default",
    "max.default", "min.default", "var.dim", "norm.ScalarOpt_dim", "linalg_vector_norm.default", "std.dim",
    "var_mean.correction", "std_mean.correction",
}  # fmt: skip


def rule_for(node: Node) -> Rule:
    """The rule of a node's op."""
    name = op_name(node)
    if name in RULES:
        return RULES[name]
    if name in EINSUM:
        return _einsum
    target = node.target
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if name in POINTWISE or (tagged and not target._schema.is_mutable):  # type: ignore[union-attr]
        return _pointwise
    return no_rule


def no_rule(sweep: Sweep, node: Node, note: Note) -> None:
    """Every operand is needed whole."""


# --- whole families ---------------------------------------------------------------------------------------------------


def _pointwise(sweep: Sweep, node: Node, note: Note) -> Dims:
    if len(operands_of(node)) == 1:
        routing.counts_too(sweep, node)
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    return tuple(d if d else sweep.new(n) for d, n in zip(dims, node.meta["val"].shape, strict=True))


def _einsum(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Applies a line of `EINSUM`.  Factors that are not in the output are summed over."""
    left, right = EINSUM[op_name(node)].split("->")
    letters: dict[str, Factors] = {}
    leading: Dims = ()
    operands = [a for a in node.args if isinstance(a, Node)]
    terms = [t for a, t in zip(node.args, left.split(","), strict=False) if isinstance(a, Node)]
    for operand, term in zip(operands, terms, strict=True):
        dims, names = sweep.dims(operand), [c for c in term if c not in "*!"]
        names = names[max(0, len(names) - len(dims)) :]  # addmm's bias may lack leading dims
        if "*" in term:
            leading = dims[: len(dims) - len(names)]
        for name, factors in zip(names, dims[len(dims) - len(names) :], strict=True):
            letters[name] = (
                sweep.tie(letters[name], factors, note)
                if letters.get(name) and factors
                else letters.get(name) or factors
            )
        note.whole += [f for c, after in zip(term, term[1:], strict=False) if after == "!" for f in letters[c]]
    note.summed += [f for name, factors in letters.items() if name not in right for f in factors if f not in note.whole]
    return (*leading, *(letters[c] for c in right if c != "*"))


def _creation(sweep: Sweep, node: Node, note: Note) -> Dims:
    return sweep.fresh(node.meta["val"].shape)


def _view(sweep: Sweep, node: Node, note: Note) -> Dims:
    return sweep.reshape(sweep.dims(first_of(node)), node.meta["val"].shape, note)


def dims_of(node: Node) -> list[int]:
    """The dims along which an op acts, counted from the front; all where it names none."""
    bound, rank = bound_of(node), first_of(node).meta["val"].ndim
    default = {"tril.default": (-2, -1), "triu.default": (-2, -1), "glu.default": -1}.get(op_name(node))
    given = bound.get("dim", bound.get("dims", default))
    listed = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
    return [d % rank for d in listed] if rank else []


def _whole_dim(sweep: Sweep, node: Node, note: Note) -> Dims:
    routing.counts_too(sweep, node)
    dims = sweep.dims(first_of(node))
    note.whole += [f for d in dims_of(node) for f in dims[d]]
    return tuple(d if d else sweep.new(n) for d, n in zip(dims, node.meta["val"].shape, strict=True))


def _reduction(sweep: Sweep, node: Node, note: Note) -> Any:
    dims, picked = sweep.dims(first_of(node)), dims_of(node)
    target = note.summed if op_name(node) in SUMS else note.whole
    target += [f for d in picked for f in dims[d]]
    values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    keep = values[0].ndim == len(dims)
    out = tuple(() if d in picked else f for d, f in enumerate(dims) if keep or d not in picked)
    return out if isinstance(node.meta["val"], torch.Tensor) else (out,) * len(values)


# --- single ops -------------------------------------------------------------------------------------------------------


def _matmul(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    a, b = (sweep.dims(n) for n in args_of(node))
    if len(a) < 2 or len(b) < 2:
        return None
    note.summed += sweep.tie(a[-1], b[-2], note)
    return (*sweep.broadcast([a[:-2], b[:-2]], note), a[-2], b[-1])


def _attention(sweep: Sweep, node: Node, note: Note) -> Dims:
    q, k, v = (sweep.dims(n) for n in args_of(node)[:3])
    sweep.broadcast([q[:1], k[:1], v[:1]], note)
    sweep.tie(k[-2], v[-2], note)
    return (*q[:-1], v[-1])


def _flex_attention(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """Its output, and two numbers per row: log-sum-exp and maximum."""
    out = _attention(sweep, node, note)
    return out, out[:-1], out[:-1]


def _norm(count: Callable[[Node], int]) -> Rule:
    def rule(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims = sweep.dims(first_of(node))
        note.whole += [f for d in dims[len(dims) - count(node) :] for f in d]
        return dims

    return rule


def _permuted(order: Callable[[Node, int], list[int]]) -> Rule:
    def rule(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims = sweep.dims(first_of(node))
        return tuple(dims[d] for d in order(node, len(dims)))

    return rule


def _swapped(node: Node, rank: int) -> list[int]:
    args, order = args_of(node), list(range(rank))
    a, b = (args[1], args[2]) if len(args) > 2 else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _expand(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims, shape = sweep.dims(first_of(node)), node.meta["val"].shape
    dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(d if d else sweep.new(n) for d, n in zip(dims, shape, strict=True))


def _as_complex(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Pairs in the last dim are one number."""
    *dims, pairs = sweep.dims(first_of(node))
    note.whole += pairs
    return tuple(dims)


def _as_real(sweep: Sweep, node: Node, note: Note) -> Dims:
    return (*sweep.dims(first_of(node)), sweep.new(2))


def _unsqueeze(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims = list(sweep.dims(first_of(node)))
    dims.insert(args_of(node)[1] % (len(dims) + 1), ())
    return tuple(dims)


def _select(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims = list(sweep.dims(first_of(node)))
    note.whole += dims.pop(args_of(node)[1])
    return tuple(dims)


def _pieces(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """split, chunk, unbind: the dim is needed whole, the others pass."""
    dims = list(sweep.dims(first_of(node)))
    drop = op_name(node) == "unbind.int"
    dim = bound_of(node).get("dim", 0) % len(dims)
    values = node.meta["val"]
    if drop:
        note.whole += dims.pop(dim)
        return (tuple(dims),) * len(values)
    if len(values) == 1:
        return (tuple(dims),)
    note.whole += dims[dim]
    return tuple((*dims[:dim], sweep.new(v.shape[dim]), *dims[dim + 1 :]) for v in values)


def _getitem(sweep: Sweep, node: Node, note: Note) -> Dims:
    value = sweep.values[first_of(node)]
    return tuple(sweep.resolve(d) for d in value[node.args[1]])


def _topk(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """Values and indices: the dim is needed whole, the others pass."""
    dims = list(sweep.dims(first_of(node)))
    dim = bound_of(node).get("dim", -1) % len(dims)
    note.whole += dims[dim]
    dims[dim] = sweep.new(node.meta["val"][0].shape[dim])
    return (tuple(dims),) * 2


def _gather(sweep: Sweep, node: Node, note: Note) -> Dims:
    """x.gather(dim, index): of index's shape; other dims where both have the same size go together."""
    source, picks = (sweep.dims(n) for n in operands_of(node))
    dim = args_of(node)[1] % len(picks)
    out = []
    for d, (f, g) in enumerate(zip(source, picks, strict=True)):
        if d == dim or product(f) != product(g):
            note.whole += (*f, *g) if d != dim else f
            out.append(g)
        else:
            out.append(sweep.tie(f, g, note) if f else g)
    return tuple(out)


def _floor_divide(sweep: Sweep, node: Node, note: Note) -> Dims:
    return routing.divided(sweep, node, note) or _pointwise(sweep, node, note)


def _stack(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims = list(sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note))
    dim = bound_of(node).get("dim", 0)
    dims.insert(dim % (len(dims) + 1), sweep.new(node.meta["val"].shape[dim]))
    return tuple(dims)


def _squeeze(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Only dims of size 1 can go, and they have no factors."""
    return sweep.reshape(sweep.dims(first_of(node)), node.meta["val"].shape, note)


def _loss(sweep: Sweep, node: Node, note: Note) -> Dims:
    """An element-wise loss: its mean or sum is over every dim."""
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    if bound_of(node).get("reduction", 1) == 0:
        return dims
    note.summed += [f for d in dims for f in d]
    return ()


def _broadcast_tensors(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    return (dims,) * len(node.meta["val"])


ELEMENTWISE = {
    "mul", "add", "sub", "truediv", "neg", "pow", "tanh", "sigmoid", "exp", "log", "erf", "sqrt", "rsqrt", "abs",
    "relu", "square", "reciprocal", "radd", "rmul", "rsub", "set_grad_enabled",
}  # fmt: skip


def _function(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...] | None:
    """An autograd.Function whose forward and backward are elementwise, on tensors of one shape."""
    shape = node.meta["val"][0].shape
    bodies: Any = [getattr(node.graph.owning_module, str(body.target)) for body in args_of(node)[:2]]
    for inner in [n for body in bodies for n in body.graph.nodes if n.op != "output"]:
        value = inner.meta.get("example_value")
        name = inner.target if isinstance(inner.target, str) else getattr(inner.target, "__name__", "")
        known = inner.op == "placeholder" or (inner.op.startswith("call") and name.strip("_") in ELEMENTWISE)
        if not known or (isinstance(value, torch.Tensor) and value.shape != shape):
            return None
    dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)
    return (dims,) * len(node.meta["val"])


def _equation(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """einsum: letters are factors; those that the result lacks are summed over."""
    equation, operands = args_of(node)[:2]
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    letters: dict[str, Factors] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        for name, factors in zip(term, sweep.dims(operand), strict=True):
            letters[name] = (
                sweep.tie(letters[name], factors, note)
                if letters.get(name) and factors
                else (letters.get(name) or factors)
            )
    note.summed += [f for name, factors in letters.items() if name not in result for f in factors]
    return tuple(letters[name] for name in result)


def _first_operand(sweep: Sweep, node: Node, note: Note) -> Dims:
    return sweep.dims(first_of(node))


def _embedding(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Gradients scaled by the frequency of ids, and sparse ones, need all ids in one place."""
    bound = bound_of(node)
    if bound.get("scale_grad_by_freq") or bound.get("sparse"):
        return None
    return _einsum(sweep, node, note)


def _repeat_heads(sweep: Sweep, node: Node, note: Note) -> Dims:
    dims, dim = list(sweep.dims(first_of(node))), bound_of(node).get("dim")
    if dim is None:
        return sweep.unknown(node, note)  # type: ignore[no-any-return]
    note.whole += dims[dim]
    dims[dim] = sweep.new(node.meta["val"].shape[dim])
    return tuple(dims)


def _cross_entropy(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Logits (N, C) or (C), targets (N): the class dim is needed whole, the mean or sum is over N."""
    logits, target = (sweep.dims(n) for n in args_of(node)[:2])
    if len(logits) != 2 or len(target) != 1:
        return None
    note.whole += logits[1]
    rows = sweep.tie(logits[0], target[0], note) if logits[0] and target[0] else logits[0]
    if bound_of(node).get("reduction", 1) == 0:
        return (rows,)
    note.summed += rows
    return ()


def _index(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """x[i, j, ..]: the picked dims are needed whole, the index tensors' dims stand in their place."""
    source, picks = sweep.dims(first_of(node)), list(args_of(node)[1])
    if len(picks) == 1 and (dims := routing.picked(sweep, first_of(node), picks[0])) is not None:
        return dims
    at = [d for d, p in enumerate(picks) if p is not None]
    if at != list(range(at[0], at[-1] + 1)) or any(picks[d].meta["val"].dtype == torch.bool for d in at):
        return None
    note.whole += [f for d in at for f in source[d]]
    inner = sweep.broadcast([sweep.dims(picks[d]) for d in at], note)
    return (*source[: at[0]], *inner, *source[at[-1] + 1 :])


RULES: dict[str, Rule] = {
    **dict.fromkeys(CREATION, _creation),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(WHOLE_DIM, _whole_dim),
    **dict.fromkeys([*SUMS, *REDUCTIONS], _reduction),
    "slice.Tensor": run_rules.sliced,
    "cat.default": run_rules.concatenated,
    **dict.fromkeys([CONV1D, "conv2d.default", "conv3d.default"], run_rules.convolved),
    **dict.fromkeys(["pad.default", "constant_pad_nd.default"], run_rules.padded),
    "repeat.default": run_rules.same_or_whole,
    **dict.fromkeys(["squeeze.dim", "squeeze.dims", "squeeze.default"], _squeeze),
    **dict.fromkeys(["split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int"], _pieces),
    **dict.fromkeys(["transpose.int", "t.default", "numpy_T.default"], _permuted(_swapped)),
    "mT.default": _permuted(lambda node, rank: [*range(rank - 2), rank - 1, rank - 2]),
    "permute.default": _permuted(lambda node, rank: [d % rank for d in args_of(node)[1]]),
    **dict.fromkeys(LOSSES, _loss),
    "matmul.default": _matmul,
    "scaled_dot_product_attention.default": _attention,
    "flex_attention": _flex_attention,
    "layer_norm.default": _norm(lambda node: len(args_of(node)[1])),
    "rms_norm.default": _norm(lambda node: len(args_of(node)[1])),
    "expand.default": _expand,
    "view_as_complex.default": _as_complex,
    "view_as_real.default": _as_real,
    "unsqueeze.default": _unsqueeze,
    "select.int": _select,
    "stack.default": _stack,
    "getitem": _getitem,
    "type_as.default": _first_operand,
    "to.other": _first_operand,
    "embedding.default": _embedding,
    "broadcast_tensors.default": _broadcast_tensors,
    "repeat_interleave.self_int": _repeat_heads,
    "cross_entropy_loss.default": _cross_entropy,
    "index.Tensor": _index,
    "einsum.default": _equation,
    "topk.default": _topk,
    "sort.default": routing.sort,
    "histc.default": routing.count,
    "index_put.default": routing.put_back,
    "floor_divide.default": _floor_divide,
    **dict.fromkeys(routing.GROUPED, routing.grouped),
    "gather.default": _gather,
    FUNCTION: _function,
}
assert operator.getitem.__name__ in RULES
