"""Masks over tokens as masks over positions along a curve.

    >>> from ringpass.masks.expr import parse
    >>> column = of_curve_positions(parse("q % 3"), {"q": Order((2, 3))})      # at each position, on a 2 x 3 grid
    >>> column.array.values.tolist() == (Order((2, 3)).permutation.values % 3).tolist()
    True

The largest subexpressions that depend on q alone, or on k alone, and on no data become tables of their values at all
curve positions, so that interval arithmetic knows their exact range over an interval of the curve.  Reads of data use
the token at the position.

Contract: `of_curve_positions(expr, orders)` at positions i and j is `expr` at the tokens at these positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ringpass.layouts.hilbert import Order
from ringpass.masks.constants import Array
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import Call, Const, Expr, Index, Load, Table, call, table
from ringpass.masks.intervals import kind_of
from ringpass.masks.rewrite import gathered

Orders = Mapping[str, Order]  # by index, q or k; absent: the original order of tokens


def of_curve_positions(expr: Expr, orders: Orders) -> Expr:
    """`expr`, a function of tokens, as a function of positions along `orders`, for the indices named there."""
    alone = _alone(expr)
    if alone in orders and kind_of(expr) != "float":
        return _tabled(expr, alone, orders[alone])
    if isinstance(expr, Load):
        return Load(expr.leaf, tuple(of_curve_positions(i, orders) for i in expr.indices))
    if isinstance(expr, Table):
        found = gathered(expr.array, tuple(of_curve_positions(i, orders) for i in expr.indices))
        return table(found.array.values, *found.indices)
    if isinstance(expr, Call) and expr.op == "cast":
        return Call("cast", (of_curve_positions(expr.args[0], orders), expr.args[1]))
    return call(expr.op, *(of_curve_positions(a, orders) for a in expr.args)) if isinstance(expr, Call) else expr


def _alone(expr: Expr) -> str:
    """The only index that `expr` depends on; "" if it depends on none, on several, or on data."""
    names = _names(expr)
    return names.pop() if len(names) == 1 else ""


def _names(expr: Expr) -> set[str]:
    if isinstance(expr, Index):
        return {expr.name}
    if isinstance(expr, Load):
        return {"data", "more data"}
    parts = expr.indices if isinstance(expr, Table) else expr.args if isinstance(expr, Call) else ()
    cast = isinstance(expr, Call) and expr.op == "cast"
    return set().union(*map(_names, parts[:1] if cast else parts))


def _tabled(expr: Expr, name: str, order: Order) -> Expr:
    """The table of `expr` at all positions; `expr` itself where both agree: `q < 1` of a prefix keeps its edge."""
    values = _values(expr, order.permutation.values)
    if values.dtype == np.bool_ and (values == values[0]).all():
        return Const(bool(values[0]))
    same = np.array_equal(values, _values(expr, np.arange(order.tokens)))
    return expr if same else table(values, Index(name))


def _values(expr: Expr, tokens: Array) -> Array:
    at, nought = torch.from_numpy(tokens), torch.zeros((), dtype=torch.int64)
    found = evaluate(expr, {"b": nought, "h": nought, "q": at, "k": at}, [])
    return found.reshape(-1).expand(len(tokens)).numpy()
