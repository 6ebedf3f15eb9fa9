"""Ops that act along dims which they need replicated: norms, softmax, scans, flips.  All other dims pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ringpass.nodes import args_of, bound_of, defaults_of, first_of, op_name
from ringpass.passes.op_rules import routing
from ringpass.passes.op_rules.spec import OpRule
from ringpass.passes.propagate.factors import Dims, Note, Sweep

DEFAULT_DIMS: dict[str, Any] = {"tril.default": (-2, -1), "triu.default": (-2, -1), "msort.default": 0}
"""Of ops that have no argument for them."""


def dims_of(node: Node) -> list[int]:
    """The dims along which an op acts, counted from the front: those that it names, or by default; else all."""
    bound, rank = bound_of(node), first_of(node).meta["val"].ndim
    default = {"dim": DEFAULT_DIMS.get(op_name(node)), **defaults_of(node)}["dim"]
    given = bound.get("dim", bound.get("dims", default))
    listed = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
    return [d % rank for d in listed] if rank else []


def _along_dims(sweep: Sweep, node: Node, note: Note) -> Dims:
    routing.counts_too(sweep, node)
    dims = sweep.dims(first_of(node))
    note.need_replication += [f for d in dims_of(node) for f in dims[d]]
    return tuple(d if d else sweep.new(n) for d, n in zip(dims, node.meta["val"].shape, strict=True))


def _glu(sweep: Sweep, node: Node, note: Note) -> Dims:
    """It halves its dim."""
    dims, (dim,) = list(_along_dims(sweep, node, note)), dims_of(node)
    dims[dim] = sweep.new(node.meta["val"].shape[dim])
    return tuple(dims)


def _last_dims(count: Callable[[Node], int]) -> Callable[[Sweep, Node, Note], Dims]:
    """The dims of an op that acts along its last `count` dims."""

    def dims_rule(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims = sweep.dims(first_of(node))
        note.need_replication += [f for d in dims[len(dims) - count(node) :] for f in d]
        return dims

    return dims_rule


_NORM = OpRule(_last_dims(lambda node: len(args_of(node)[1])), computes=True)
RULES = {
    **dict.fromkeys((
        "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default", "cumsum.default",
        "cumprod.default", "logcumsumexp.default", "flip.default", "roll.default", "tril.default", "triu.default",
    ), OpRule(_along_dims)),
    "glu.default": OpRule(_glu),
    "layer_norm.default": _NORM,
    "rms_norm.default": _NORM,
}  # fmt: skip
