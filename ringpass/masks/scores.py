"""Splits a score function into a mask, an additive bias, and any other function of the score.

    where(c, 0, -inf) + t[k - q]           mask c, bias t[k - q]
    where(c, score + t[h], -inf)           mask c, bias t[h]
    where(c, 0, finfo.min)                 mask c, if every row surely sees a key; else a bias
    tanh(score / 50) * 50                  a function of the score

Contract: softmax of the parts equals softmax of the score function for every row, also where all keys are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from ringpass.masks.expr import SCORE, TRUE, Call, Const, Expr, K, Load, Q, call
from ringpass.masks.intervals import bounds, kind_of
from ringpass.masks.rewrite import substitute, without_data
from ringpass.masks.simplify import simplify
from ringpass.nodes import Size

T = TypeVar("T")
ZERO = Const(0)
LEAST = tuple(torch.finfo(t).min for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""Finite fills that models use instead of -inf to mask a pair.  A row of nothing else attends to all keys equally."""
Split = tuple[Expr, Expr | None]


def split_bias(expr: Expr, rows: Size | None = None) -> Split:
    """An additive mask as (mask, bias); bias None: 0.  `where(c, 0, -inf)` is the mask c.

    So is `where(c, 0, finfo.min)` if each of the `rows`, as from `rows_with_keys`, certainly sees a key; any other
    finite fill stays a bias.
    """
    return best_split(lambda fills: split_sum(expr, fills), rows)


def best_split(split: Callable[[tuple[float, ...]], tuple[Expr, T]], rows: Size | None) -> tuple[Expr, T]:
    """`split`(fills that mask): with the finite fills, if every row then still sees a key; else with -inf alone."""
    found = split((-math.inf, *LEAST))
    return found if rows is not None and sees_a_key(found[0], rows) else split((-math.inf,))


def sees_a_key(mask: Expr, rows: Size) -> bool:
    """Whether every row certainly sees the key of its position, or the first key.  `rows`: their number."""
    certain = without_data(simplify(mask), False)
    last = float(rows - 1) if isinstance(rows, int) else math.inf
    for key in (Q, ZERO):
        seen = simplify(substitute(certain, K, key))
        if seen == TRUE or (kind_of(seen) == "bool" and bool(bounds(seen, {"q": (0.0, last)})[0] == 1.0)):
            return True
    return False


def rows_with_keys(queries: Size, keys: Size) -> Size | None:
    """The number of queries, if there is a key at the position of each; else None."""
    return queries if keys is queries or bool(queries == keys) or (type(queries) is int and queries < keys) else None


def split_sum(expr: Expr, fills: tuple[float, ...]) -> Split:
    """`split_bias` where each number of `fills` masks a pair."""
    if not isinstance(expr, Call) or expr.op not in ("where", "add"):
        return TRUE, expr
    if expr.op == "where":
        c, *sides = expr.args
        for seen, inside, outside in ((c, *sides), (call("not", c), *reversed(sides))):
            if _number(outside) in fills:
                more, bias = split_sum(inside, fills)
                return call("and", seen, more), None if bias == Const(0.0) else bias
        return TRUE, expr
    (left, a), (right, b) = (split_sum(x, fills) for x in expr.args)
    rest = [x for x in (a, b) if x is not None and x != Const(0.0)]
    return call("and", left, right), call("add", *rest) if len(rest) == 2 else rest[0] if rest else None


def _number(expr: Expr) -> float | None:
    """The value of `expr` if it is a constant, maybe cast; else None."""
    inner = expr.args[0] if isinstance(expr, Call) and expr.op == "cast" else expr
    return inner.value if isinstance(inner, Const) else None


# --- score functions -------------------------------------------------------------------------------------------------


def scored(expr: Expr) -> bool:
    """Whether `expr` depends on the score."""
    if isinstance(expr, Call):
        return any(map(scored, expr.args))
    return any(map(scored, expr.indices)) if isinstance(expr, Load) else expr == SCORE


def separated(expr: Expr, exact: bool, rows: Size | None = None) -> tuple[Expr, Expr | None, Expr | None]:
    """A score function as (mask, bias, any other function); without a bias where adding it would not be `exact`.

    `rows`: as in `split_bias`.
    """
    seen, (bias, rest) = best_split(lambda fills: _separated(expr, exact, fills), rows)
    return seen, bias, rest


def _separated(expr: Expr, exact: bool, fills: tuple[float, ...]) -> tuple[Expr, tuple[Expr | None, Expr | None]]:
    seen, inner = _peeled(expr, fills)
    added = _addend(inner)
    if added is None:
        return seen, (None, inner)
    if inner == SCORE:
        return seen, (None, None)
    closed, bias = split_sum(added, fills)
    seen = call("and", seen, closed)
    return seen, ((bias, None) if bias is None or exact else (None, call("add", SCORE, bias)))


def _peeled(expr: Expr, fills: tuple[float, ...]) -> tuple[Expr, Expr]:
    """A score function as (mask, rest): where(c, x, -inf) and x + where(c, 0, -inf) are x under the mask c."""
    if not isinstance(expr, Call):
        return TRUE, expr
    if expr.op == "where" and not scored(expr.args[0]):
        c, a, b = expr.args
        for seen, inner, other in ((c, a, b), (call("not", c), b, a)):
            if _number(other) in fills:
                more, rest = _peeled(inner, fills)
                return call("and", seen, more), rest
    if expr.op == "add" and _addend(expr) is None:  # a mask added to a function that is no sum
        inner, added = expr.args if scored(expr.args[0]) else reversed(expr.args)
        seen, bias = split_sum(added, fills) if not scored(added) else (TRUE, added)
        if bias is None:
            more, rest = _peeled(inner, fills)
            return call("and", seen, more), rest
    return TRUE, expr


def _addend(expr: Expr) -> Expr | None:
    """f, where a score function is score + f (0 for the score alone)."""
    if expr == SCORE:
        return Const(0)
    if isinstance(expr, Call) and expr.op in ("add", "sub"):
        left, right = expr.args
        if expr.op == "add" and not scored(left):
            left, right = right, left
        inner = None if scored(right) else _addend(left)
        return None if inner is None else call(expr.op, inner, right)
    return None
