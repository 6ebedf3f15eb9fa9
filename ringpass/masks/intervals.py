"""Classifies a mask over a box of positions as empty, full or partial, by interval arithmetic.

    >>> from ringpass.masks.expr import parse
    >>> window = parse("k <= q & q - k < 4")
    >>> classify(window, (8, 12), (0, 4))      # queries 8..11, keys 0..3
    'empty'

Contract: a tile that `classify` calls empty or full is; one that it calls partial may be any of the three.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from functools import lru_cache, reduce
from itertools import product
from typing import Any

import numpy as np
import torch

from ringpass.masks.constants import Array, outward
from ringpass.masks.expr import SCORE, B, Call, Const, Expr, H, Index, Load, Table, cast_dtype, tables
from ringpass.masks.operators import DTYPES, OPERATORS, UNKNOWN, Interval

EMPTY, FULL, PARTIAL = "empty", "full", "partial"
KINDS = (EMPTY, PARTIAL, FULL)
EMPTY_CODE, PARTIAL_CODE, FULL_CODE = range(len(KINDS))  # indices into KINDS, as `classify_all` returns them
Box = dict[str, Interval]  # closed intervals
IntervalArrays = tuple[Array, Array]  # starts and stops of half-open ranges


def selected(intervals: IntervalArrays, where: Array | slice) -> IntervalArrays:
    """The intervals at the indices, or where the bools, `where`."""
    return intervals[0][where], intervals[1][where]


# --- classification ---------------------------------------------------------------------------------------------------


def bounds(expr: Expr, box: Box) -> Interval:
    """A closed interval that holds every value of `expr` over `box`, or over each of an array of boxes.

    Booleans count as 0 and 1.
    """
    if isinstance(expr, Index):
        return box.get(expr.name, UNKNOWN if expr == SCORE else (0.0, math.inf))
    if isinstance(expr, Const):
        number = float(expr.value)
        return (number, number) if abs(number) < 2**53 else outward(number, number)
    if isinstance(expr, Load):
        return UNKNOWN
    if isinstance(expr, Table):
        return expr.array.bounds([bounds(i, box) for i in expr.indices])
    assert isinstance(expr, Call)
    if expr.op == "cast":
        inner = bounds(expr.args[0], box)
        return _cast_bounds(inner, cast_dtype(expr))
    args = [bounds(a, box) for a in expr.args]
    if expr.op in ("and", "or", "not"):
        args = [_cast_bounds(a, "bool") for a in args]
    record = OPERATORS[expr.op]
    low, high = record.bounds(*args)
    kind = kind_of(expr) if record.wraps or record.rounds else ""
    if (kind == "int" and record.wraps) or (kind in ("bool", "float") and record.rounds):
        if kind == "bool":
            return _cast_bounds((low, high), "bool")  # True + True is True
        if kind == "float":  # it may be rounded
            exact = _is_integral(expr) & (np.abs(low) < 2**24) & (np.abs(high) < 2**24)
        else:  # beyond these, a float64 bound is rounded, or the integers wrap
            least, most = _range(expr)
            exact = ~(np.isfinite(low) & (low < least)) & ~(np.isfinite(high) & (high > most))
        return np.where(exact, low, -np.inf), np.where(exact, high, np.inf)
    return low, high


def _range(expr: Expr) -> tuple[float, float]:
    """The integers that torch represents in the dtype of `expr`, at most those that a float64 holds exactly."""
    dtype = _integers(expr)
    if dtype.kind == "b" or dtype.itemsize == 8:
        return 1.0 - 2**53, 2**53 - 1.0
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


@lru_cache(maxsize=4096)
def _integers(expr: Expr) -> np.dtype[Any]:
    """The dtype of an integer expression: literals take the dtype of the tensors."""
    if isinstance(expr, Table):
        return expr.array.values.dtype
    if isinstance(expr, Call) and expr.op == "cast":
        return np.dtype(cast_dtype(expr))
    if isinstance(expr, Call) and kind_of(expr) == "int":
        parts = [_integers(a) for a in expr.args[expr.op == "where" :] if not isinstance(a, Const)]
        return np.result_type(*parts) if parts else np.dtype(np.int64)
    return np.dtype(bool if kind_of(expr) == "bool" else np.int64)


@lru_cache(maxsize=4096)
def kind_of(expr: Expr) -> str:
    """bool, int or float: the kind of dtype that torch computes with.  A load counts as float, the widest."""
    if isinstance(expr, Const):
        return type(expr.value).__name__
    if isinstance(expr, Call):
        if expr.op == "cast":
            dtype = DTYPES[cast_dtype(expr)]
            return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
        if OPERATORS[expr.op].dtype:
            return OPERATORS[expr.op].dtype
        kinds = [kind_of(a) for a in (expr.args[1:] if expr.op == "where" else expr.args)]
        return next(kind for kind in ("float", "int", "bool") if kind in kinds)
    if isinstance(expr, Table):
        return "bool" if expr.array.values.dtype == bool else "int"
    return "int" if isinstance(expr, Index) and expr != SCORE else "float"


@lru_cache(maxsize=4096)
def _is_integral(expr: Expr) -> bool:
    """Whether the value is certainly an integer."""
    if isinstance(expr, Const):
        return math.isfinite(expr.value) and expr.value == int(expr.value)
    if isinstance(expr, Call):
        if kind_of(expr) != "float":
            return True
        args = expr.args[:1] if expr.op == "cast" else expr.args[1:] if expr.op == "where" else expr.args
        integral = OPERATORS[expr.op].integral or expr.op in ("cast", "where")
        return integral and all(map(_is_integral, args))
    return isinstance(expr, Table) or (isinstance(expr, Index) and expr != SCORE)


def _cast_bounds(inner: Interval, dtype: str) -> Interval:
    low, high = inner
    if dtype == "bool":
        return np.where((low > 0) | (high < 0), 1.0, 0.0), np.where((low == 0) & (high == 0), 0.0, 1.0)
    if dtype not in ("int32", "int64", "float32", "float64"):
        return UNKNOWN
    exact = reduce(operator.and_, ((np.abs(x) < 2**24) & (x == np.floor(x)) for x in inner))
    return np.where(exact, low, -np.inf), np.where(exact, high, np.inf)


def classify(expr: Expr, queries: tuple[int, int], keys: tuple[int, int]) -> str:
    """EMPTY, FULL or PARTIAL for the half-open position ranges `queries` x `keys`, for every batch and head."""
    (q, k) = ((np.array([start]), np.array([stop])) for start, stop in (queries, keys))
    return KINDS[int(classify_all(expr, q, k)[0])]


def classify_all(expr: Expr, q: IntervalArrays, k: IntervalArrays) -> Array:
    """`classify` of many tiles at once, as indices into KINDS: tile i is q[0][i]:q[1][i] x k[0][i]:k[1][i]."""
    box = {"q": (q[0].astype(float), q[1] - 1.0), "k": (k[0].astype(float), k[1] - 1.0)}
    full = empty = np.asarray(True)
    for point in _points(expr):
        low, high = bounds(expr, {**box, **point})
        full, empty = full & (low == 1.0) & (high == 1.0), empty & (low == 0.0) & (high == 0.0)
    return np.broadcast_to(np.where(full, 2, np.where(empty, 0, 1)), q[0].shape).astype(np.int8)


def extents(expr: Expr) -> dict[str, int]:
    """The number of batch elements (b) and heads (h) for which the tables of `expr` differ."""
    pairs = [pair for found in tables(expr) for pair in zip(found.indices, found.array.shape, strict=True)]
    return {i.name: n for i, n in pairs if isinstance(i, Index) and i in (B, H) and n > 1}


def _points(expr: Expr) -> Iterator[Box]:
    """One box for each batch element and head for which the tables differ."""
    sizes = extents(expr)
    for values in product(*(range(n) for n in sizes.values())):
        yield {name: (float(i), float(i)) for name, i in zip(sizes, values, strict=True)}
