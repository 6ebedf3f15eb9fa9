"""Products: linear layers, matrix products, einsum, embeddings.

`EINSUM` states most of them as a line: letters are factors, `*` any leading dims; `!` after a letter: needed
replicated.  A letter that the result lacks is summed over.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from ringpass import ops
from ringpass.nodes import args_of, bound_of, op_name
from ringpass.passes.op_rules.spec import OpRule, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Factors, Note, Sweep

aten = torch.ops.aten
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


def _einsum(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Applies a line of `EINSUM`."""
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
        _tie(sweep, letters, names, dims[len(dims) - len(names) :], note)
        marked = (c for c, after in zip(term, term[1:], strict=False) if after == "!")
        note.need_replication += [f for c in marked for f in letters[c]]
    summed = (f for name, factors in letters.items() if name not in right for f in factors)
    note.reduction += [f for f in summed if f not in note.need_replication]
    return (*leading, *(letters[c] for c in right if c != "*"))


def _tie(sweep: Sweep, letters: dict[str, Factors], names: Iterable[str], dims: Dims, note: Note) -> None:
    """Ties each dim to the factors that its letter stands for so far."""
    for name, factors in zip(names, dims, strict=True):
        known = letters.get(name)
        letters[name] = sweep.tie(known, factors, note) if known and factors else known or factors


def _equation(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """`torch.einsum` with an explicit result and without an ellipsis; None: another one."""
    equation, operands = args_of(node)[:2]
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    letters: dict[str, Factors] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        _tie(sweep, letters, term, sweep.dims(operand), note)
    note.reduction += [f for name, factors in letters.items() if name not in result for f in factors]
    return tuple(letters[name] for name in result)


def _matmul(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    a, b = (sweep.dims(n) for n in args_of(node))
    if len(a) < 2 or len(b) < 2:
        return None
    note.reduction += sweep.tie(a[-1], b[-2], note)
    return (*sweep.broadcast([a[:-2], b[:-2]], note), a[-2], b[-1])


def _embedding(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Gradients scaled by the frequency of ids, and sparse ones, need all ids in one place."""
    bound = bound_of(node)
    if bound.get("scale_grad_by_freq") or bound.get("sparse"):
        return None
    return _einsum(sweep, node, note)


def _reduce(writer: Writer, node: Node, axis: Axis) -> Node:
    """The product over local tokens, added over ranks."""
    args, kwargs = writer.operands(node, axis, f"operand of {op_name(node)}")
    return writer.emit(ops.reduce, writer.copy(node, args, kwargs), writer.rank.group, name=f"{node.name}_reduced")


RULES = {
    **dict.fromkeys(EINSUM, OpRule(_einsum, computes=True)),
    **dict.fromkeys(("mv.default", "outer.default"), OpRule(_einsum)),
    **dict.fromkeys(("mm.default", "bmm.default"), OpRule(_einsum, computes=True, reduce=_reduce)),
    "embedding.default": OpRule(_embedding, computes=True),
    "einsum.default": OpRule(_equation, computes=True, reduce=_reduce),
    "matmul.default": OpRule(_matmul, computes=True, reduce=_reduce),
}
