"""The value of a mask expression, on one tile or for one pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass.masks.expr import Call, Const, Expr, Index, Load, Table, cast_dtype
from ringpass.masks.operators import DTYPES, OPERATORS


def evaluate(expr: Expr, positions: dict[str, Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """The value of `expr` on one tile, broadcastable to (B, H, Lq, Lk): dims on which it does not depend have size 1.

    `positions` maps b, h, q, k to int64 tensors of shapes (B,1,1,1), (1,H,1,1), (1,1,Lq,1), (1,1,1,Lk), and,
    for a score function, `score` to the tile's scores (B, H, Lq, Lk).  Loads read `leaves`, by number.
    Differentiable in floating-point leaves and in the scores.
    """
    out = value_at(expr, positions, leaves)
    return out.reshape((1,) * (4 - out.ndim) + tuple(out.shape))


def value_at(expr: Expr, positions: dict[str, Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """As `evaluate`, of the shape to which positions of any shapes broadcast: a scalar where these are scalars."""
    return _tensor(_Evaluation(positions, leaves).value(expr), positions)


class _Evaluation:
    """The values of an expression's parts, each computed once.

    They are free as soon as the evaluation is: no function refers to itself, which only the garbage collector undoes.
    """

    def __init__(self, positions: dict[str, Tensor], leaves: Sequence[Tensor]) -> None:
        self.positions, self.leaves = positions, leaves
        self.known: dict[Expr, Any] = {}

    def value(self, e: Expr) -> Any:
        """The value of a part: a tensor, or a number where it depends on no tensor."""
        if e not in self.known:
            self.known[e] = self._computed(e)
        return self.known[e]

    def _element(self, x: Tensor, at: Sequence[Expr]) -> Any:
        indices = [_tensor(self.value(i), self.positions) for i in at]
        return torch.ops.aten.index(x, indices)  # also for scalars under vmap

    def _computed(self, e: Expr) -> Any:
        positions = self.positions
        if isinstance(e, Index):
            return positions[e.name]
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Load):
            return self._element(self.leaves[e.leaf], e.indices) if e.indices else self.leaves[e.leaf]
        if isinstance(e, Table):
            return self._element(e.array.tensor(positions["q"]), e.indices)
        assert isinstance(e, Call)
        if e.op == "cast":
            x = self.value(e.args[0])
            dtype = DTYPES[cast_dtype(e)]
            device = positions["q"].device
            return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)
        args = [self.value(a) for a in e.args]
        truths = e.op in ("add", "mul") and all(isinstance(a, bool) for a in args)
        if truths or OPERATORS[e.op].tensors:  # True + True is True in a tensor
            exact = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
            args = [_tensor(a, positions, exact if isinstance(a, float) else None) for a in args]
        if e.op == "pow" and not any(isinstance(a, Tensor) for a in args):
            args[0] = _tensor(args[0], positions)
        if e.op == "where":
            args[0] = _tensor(args[0], positions)
            if float in (type(args[1]), type(args[2])) and not any(isinstance(a, Tensor) for a in args[1:]):
                args[1:] = [torch.full((), a, dtype=torch.float64, device=args[0].device) for a in args[1:]]  # exact
        return OPERATORS[e.op].compute(*args)


def _tensor(x: Any, positions: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=positions["q"].device)
