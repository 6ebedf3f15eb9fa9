"""Closed forms: each data-free condition of a mask in one canonical form, by sympy.

    >>> from ringpass.masks.expr import parse
    >>> print(simplify(parse("not(k > q) & q - 4095 <= k & q >= k")))
    k <= q & q - k < 4096
    >>> print(simplify(parse("k // 2 * 2 - q // 2 * 2 <= 0")))
    k // 2 <= q // 2

Models write one mask in many ways; kernels, classification and readers need one form.  A comparison of integers without
data gets a sum on either side, with coefficients in lowest terms.  `not` moves inwards.  Repeated and constant parts
are dropped, and so are terms of `&` that another term implies; bounds that exclude each other are False.

Contract: the value is the same for all b, h, q, k >= 0 and all data.  What sympy cannot write as a sum stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache, reduce
from itertools import combinations
from typing import Any

import sympy

from ringpass.masks.expr import (
    CAUSAL,
    FALSE,
    SCORE,
    TRUE,
    Call,
    Const,
    Expr,
    Index,
    K,
    Load,
    Q,
    Table,
    call,
    cast_dtype,
)
from ringpass.masks.intervals import bounds, kind_of
from ringpass.masks.operators import OPERATORS

OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
Sum = dict[Expr, int]  # coefficient of each term; Const(1) carries the constant
ONE = Const(1)


@lru_cache(maxsize=4096)
def simplify(expr: Expr) -> Expr:
    """The closed form of a mask."""
    if not isinstance(expr, Call):
        return expr
    if expr.op == "not":
        return _negated(expr.args[0])
    if expr.op in ("and", "or"):
        return _joined(expr.op, [simplify(a) for a in expr.args])
    if expr.op in OPPOSITE and all(_integer(a) for a in expr.args):
        return _comparison(expr.op, *expr.args)
    if expr.op == "cast":
        return expr
    return call(expr.op, *(simplify(a) if kind_of(a) == "bool" else a for a in expr.args))


def _negated(inner: Expr) -> Expr:
    if isinstance(inner, Call) and inner.op == "not" and kind_of(inner.args[0]) == "bool":
        return simplify(inner.args[0])
    if isinstance(inner, Call) and inner.op in ("and", "or") and kind_of(inner) == "bool":
        return _joined("or" if inner.op == "and" else "and", [simplify(call("not", a)) for a in inner.args])
    if isinstance(inner, Call) and inner.op in OPPOSITE and all(_integer(a) for a in inner.args):
        return simplify(Call(OPPOSITE[inner.op], inner.args))
    simpler = simplify(inner)
    return call("not", inner) if simpler == inner else _negated(simpler)


def _integer(expr: Expr) -> bool:
    """Whether `expr` is an integer that depends on positions alone."""
    if isinstance(expr, Load | Table):
        return False
    if isinstance(expr, Call):
        integer = OPERATORS[expr.op].integral or _widened(expr)
        return integer and all(_integer(a) for a in (expr.args[:1] if expr.op == "cast" else expr.args))
    return (isinstance(expr, Index) and expr != SCORE) or (isinstance(expr, Const) and type(expr.value) is int)


def _widened(expr: Call) -> bool:
    return expr.op == "cast" and cast_dtype(expr) == "int64"


# --- comparisons ------------------------------------------------------------------------------------------------------


def _comparison(op: str, left: Expr, right: Expr) -> Expr:
    total = _sum(call("sub", left, right))
    if total is None:
        return call(op, left, right)
    if op in ("gt", "ge"):
        total = {term: -n for term, n in total.items()}
    constant = total.pop(ONE, 0) + (op in ("lt", "gt"))  # integers: a < b is a + 1 <= b
    found = _equation(op, total, constant) if op in ("eq", "ne") else _inequality(total, constant)
    low, high = bounds(found, {})
    return Const(bool(low)) if low == high else found


def _inequality(terms: Sum, constant: int) -> Expr:
    """terms + constant <= 0."""
    if not terms:
        return Const(constant <= 0)
    unit = math.gcd(*terms.values())
    most = -constant // unit  # terms / unit <= most
    left, right = _sides({term: n // unit for term, n in terms.items()})
    if left == K and right == Q and most == 0:
        return CAUSAL
    if left is None or (right is not None and left != Q):
        assert right is not None
        return call("ge", right, Const(-most)) if left is None else call("le", left, _plus(right, most))
    return call("lt", left if right is None else call("sub", left, right), Const(most + 1))


def _equation(op: str, terms: Sum, constant: int) -> Expr:
    """terms + constant == 0, or != 0."""
    if not terms:
        return Const((constant == 0) == (op == "eq"))
    unit = math.gcd(*terms.values())
    if constant % unit:
        return Const(op == "ne")
    unit = unit if next(iter(terms.values())) > 0 else -unit  # the first term stands on the left
    left, right = _sides({term: n // unit for term, n in terms.items()})
    assert left is not None
    most = -constant // unit
    return call(op, left, Const(most) if right is None else _plus(right, most))


def _sides(terms: Sum) -> tuple[Expr | None, Expr | None]:
    """The terms with positive coefficients, and the others negated; None: no term."""
    sides = []
    for sign in (1, -1):
        side = {term: n * sign for term, n in terms.items() if n * sign > 0}
        parts = [term if n == 1 else call("mul", Const(n), term) for term, n in side.items()]
        sides.append(reduce(lambda a, b: call("add", a, b), parts) if parts else None)
    return sides[0], sides[1]


def _plus(expr: Expr, n: int) -> Expr:
    return call("add", expr, Const(n)) if n >= 0 else call("sub", expr, Const(-n))


def constant(expr: Expr) -> Expr | None:
    """The value of an integer expression that is the same everywhere; None for any other."""
    if not _integer(expr):
        return expr if isinstance(expr, Const) else None
    total = _sum(expr)
    return Const(total.get(ONE, 0)) if total is not None and not {*total} - {ONE} else None


@lru_cache(maxsize=4096)
def linear(expr: Expr) -> Mapping[Expr, int] | None:
    """The coefficient of each term of an integer expression of positions; that of Const(1) is the constant.

    None where it is not a sum.
    """
    return _sum(expr) if _integer(expr) else None


# --- sums, by sympy ---------------------------------------------------------------------------------------------------


def _sum(expr: Expr) -> Sum | None:
    """`expr` as a sum of integer multiples of terms, or None."""
    terms: dict[Any, Expr] = {}
    expanded = sympy.expand(_to_sympy(expr, terms))
    out: Sum = {}
    for symbols, n in expanded.as_coefficients_dict().items():
        if not n.is_Integer or (symbols != 1 and symbols not in terms):
            return None
        if n != 0:
            out[ONE if symbols == 1 else terms[symbols]] = int(n)
    return dict(sorted(out.items(), key=lambda item: str(item[0])))


def _to_sympy(expr: Expr, terms: dict[Any, Expr]) -> Any:
    """`expr` over symbols, one for each part that is not a sum; `terms` maps them to these parts."""
    if isinstance(expr, Const):
        return sympy.Integer(expr.value)
    if isinstance(expr, Call):
        if _widened(expr):
            return _to_sympy(expr.args[0], terms)
        if expr.op in ("add", "sub", "mul", "neg"):
            args = [_to_sympy(a, terms) for a in expr.args]
            return -args[0] if expr.op == "neg" else {"add": sympy.Add, "mul": sympy.Mul}.get(expr.op, _minus)(*args)
    symbol = sympy.Symbol(str(expr), integer=True)
    terms[symbol] = expr
    return symbol


def _minus(a: Any, b: Any) -> Any:
    return a - b


# --- and, or ----------------------------------------------------------------------------------------------------------


def _joined(op: str, args: Iterable[Expr]) -> Expr:
    """`and` or `or` of closed forms: flat, each part once, k <= q first, without parts that another one implies."""
    parts: list[Expr] = []
    for arg in args:
        parts += _parts(op, arg)
    unit, zero = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
    if zero in parts:
        return zero
    unique = [p for p in dict.fromkeys(parts) if p != unit]
    if op == "and" and any(_exclude(a, b) for a, b in combinations(unique, 2)):
        return FALSE
    if op == "and":
        unique = [p for p in unique if not any(_implies(other, p) for other in unique if other != p)]
    unique.sort(key=lambda p: p != CAUSAL)
    return reduce(lambda a, b: Call(op, (a, b)), unique) if unique else unit


def _parts(op: str, expr: Expr) -> list[Expr]:
    if isinstance(expr, Call) and expr.op == op:
        return [part for arg in expr.args for part in _parts(op, arg)]
    return [expr]


def _implies(a: Expr, b: Expr) -> bool:
    """Whether closed form `a` implies `b`: two bounds on the same sum, of which `a` is the tighter."""
    ours, theirs = (_bound(x) for x in (a, b))
    return ours is not None and theirs is not None and ours[0] == theirs[0] and ours[1] < theirs[1]


def _exclude(a: Expr, b: Expr) -> bool:
    """Whether closed forms `a` and `b` cannot both hold: an upper bound on a sum below a lower bound on it."""
    ours, theirs = (_bound(x) for x in (a, b))
    if ours is None or theirs is None:
        return False
    return ours[0] == frozenset((t, -n) for t, n in theirs[0]) and ours[1] + theirs[1] < 0


def _bound(expr: Expr) -> tuple[frozenset[tuple[Expr, int]], int] | None:
    """`expr` as terms <= n."""
    if not (isinstance(expr, Call) and expr.op in ("le", "lt", "ge") and all(_integer(a) for a in expr.args)):
        return None
    left, right = reversed(expr.args) if expr.op == "ge" else expr.args
    total = _sum(call("sub", left, right))
    if total is None:
        return None
    return frozenset((t, n) for t, n in total.items() if t != ONE), -total.get(ONE, 0) - (expr.op == "lt")
