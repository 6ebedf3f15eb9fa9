"""Rewrites mask expressions: leaves become constants, conditions on data become True or False."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from ringpass.masks.constants import ConstantArray
from ringpass.masks.expr import SCORE, B, Call, Const, Expr, H, Load, Table, call, rebuilt
from ringpass.masks.intervals import kind_of


@lru_cache(maxsize=1024)
def without_data(expr: Expr, unknown: bool) -> Expr:
    """`expr` with `unknown` for each condition that depends on data (leaves, batch, head).

    `unknown` True gives where the mask may hold, False where it must.

    >>> from ringpass.masks.expr import parse
    >>> print(without_data(parse("k <= q & not(x0[b, k])"), True))
    k <= q
    """
    if isinstance(expr, Call) and expr.op in ("and", "or"):
        return call(expr.op, *(without_data(a, unknown) for a in expr.args))
    if isinstance(expr, Call) and expr.op == "not":
        return call("not", without_data(expr.args[0], not unknown))
    if isinstance(expr, Call) and expr.op == "where" and kind_of(expr) == "bool":
        c, a, b = (without_data(x, unknown) for x in expr.args)
        otherwise = call("not", without_data(expr.args[0], not unknown))
        return call("or", call("or", call("and", c, a), call("and", otherwise, b)), call("and", a, b))
    return Const(unknown) if _has_data(expr) else expr


def _has_data(expr: Expr) -> bool:
    if isinstance(expr, Call):
        return any(_has_data(a) for a in (expr.args[:1] if expr.op == "cast" else expr.args))
    if isinstance(expr, Table):  # batch elements and heads are classified one by one
        return any(_has_data(i) for i in expr.indices if i not in (B, H))
    return isinstance(expr, Load) or expr in (B, H, SCORE)


def replace_loads(expr: Expr, new: Callable[[int, tuple[Expr, ...]], Expr]) -> Expr:
    """`expr` with each load of leaf i at `indices` replaced by `new(i, indices)`."""
    found = rebuilt(expr, lambda part: replace_loads(part, new))
    return new(found.leaf, found.indices) if isinstance(found, Load) else found


def substitute(expr: Expr, old: Expr, new: Expr) -> Expr:
    """`expr` with each part that is `old` replaced by `new`."""
    return new if expr == old else rebuilt(expr, lambda part: substitute(part, old, new))


def renumber(expr: Expr, numbers: dict[int, int]) -> Expr:
    """`expr` with each leaf i as leaf `numbers[i]`."""
    return replace_loads(expr, lambda leaf, indices: Load(numbers[leaf], indices))


def bind(expr: Expr, values: Mapping[int, ConstantArray]) -> Expr:
    """`expr` with the leaves in `values` replaced by tables.

    >>> from ringpass.masks.expr import parse
    >>> from ringpass.masks.intervals import classify
    >>> print(classify(bind(parse("x0[k]"), {0: ConstantArray([True, True, False])}), (0, 3), (0, 2)))
    full
    """
    return replace_loads(expr, lambda i, indices: gathered(values[i], indices) if i in values else Load(i, indices))


def tables_as_leaves(expr: Expr, first: int) -> tuple[Expr, tuple[ConstantArray, ...]]:
    """`expr` with tables replaced by loads of the leaves `first`, `first` + 1, ..; and the arrays of these leaves.

    >>> from ringpass.masks.expr import parse, table, Q
    >>> found, arrays = tables_as_leaves(call("eq", table([5, 6], Q), table([5, 6], Call("add", (Q, Const(1))))), 2)
    >>> print(found, [array.values.tolist() for array in arrays])
    x2[q] == x2[q + 1] [[5, 6]]
    """
    numbers: dict[ConstantArray, int] = {}

    def loaded(part: Expr) -> Expr:
        found = rebuilt(part, loaded)
        if not isinstance(found, Table):
            return found
        return Load(numbers.setdefault(found.array, first + len(numbers)), found.indices)

    return loaded(expr), tuple(numbers)


def gathered(array: ConstantArray, indices: tuple[Expr, ...]) -> Table:
    """Element `indices` of `array`; a table that is the only varying index is composed with it, for exact bounds.

    >>> from ringpass.masks.expr import Q
    >>> gathered(ConstantArray([5, 6, 7]), (Table(ConstantArray([2, 0]), (Q,)),)).array.values
    array([7, 5])
    """
    varying = [dim for dim, i in enumerate(indices) if i not in (B, H) and not isinstance(i, Const)]
    inner = indices[varying[0]] if len(varying) == 1 else None
    if not isinstance(inner, Table) or inner.array.values.ndim != 1:
        return Table(array, indices)
    dim = varying[0]
    values = ConstantArray(array.values.take(inner.array.values, dim))
    return Table(values, (*indices[:dim], *inner.indices, *indices[dim + 1 :]))
