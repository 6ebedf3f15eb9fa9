"""The operators of mask expressions: their torch function, their interval arithmetic, and their text."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bound = Any  # a float, or a float64 array of them: one per box
Interval = tuple[Bound, Bound]

INFIX = {  # operator -> (text, precedence, python ast node)
    "or": ("|", 1, ast.BitOr),
    "and": ("&", 3, ast.BitAnd),
    "lt": ("<", 4, ast.Lt),
    "le": ("<=", 4, ast.LtE),
    "gt": (">", 4, ast.Gt),
    "ge": (">=", 4, ast.GtE),
    "eq": ("==", 4, ast.Eq),
    "ne": ("!=", 4, ast.NotEq),
    "add": ("+", 6, ast.Add),
    "sub": ("-", 6, ast.Sub),
    "mul": ("*", 7, ast.Mult),
    "div": ("/", 7, ast.Div),
    "floordiv": ("//", 7, ast.FloorDiv),
    "mod": ("%", 7, ast.Mod),
}
COMPARISON, ATOM = 4, 8  # precedences
"""Comparisons bind tighter than & and |, as in mathematics and unlike in Python; `parse` accounts for it."""


# --- operators: in torch, and on intervals ----------------------------------------------------------------------------


# Interval arithmetic works on whole arrays of boxes at once: a bound is a float or a float64 array.


def _corners(fn: Callable[[Bound, Bound], Bound], a: Interval, b: Interval) -> Interval:
    with np.errstate(all="ignore"):
        values = [fn(x, y) for x in a for y in b]
    nan = reduce(np.logical_or, map(np.isnan, values))
    return np.where(nan, -np.inf, reduce(np.fmin, values)), np.where(nan, np.inf, reduce(np.fmax, values))


def _compare(surely: Callable[[Interval, Interval], Any], never: Callable[[Interval, Interval], Any]) -> Any:
    return lambda a, b: (np.where(surely(a, b), 1.0, 0.0), np.where(never(a, b), 0.0, 1.0))


def _equal(a: Interval, b: Interval) -> Any:
    return (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])


def _apart(a: Interval, b: Interval) -> Any:
    return (a[1] < b[0]) | (b[1] < a[0])


def _floordiv(a: Interval, b: Interval) -> Interval:
    known = (b[0] == b[1]) & (b[0] > 0) & np.isfinite(a[0]) & np.isfinite(a[1])
    with np.errstate(all="ignore"):
        low, high = np.floor_divide(a[0], b[0]), np.floor_divide(a[1], b[0])
    return np.where(known, low, -np.inf), np.where(known, high, np.inf)


def _modulo(a: Interval, b: Interval) -> Interval:
    known = (b[0] == b[1]) & (b[0] > 0)
    with np.errstate(all="ignore"):
        low, high, starts, ends = *(np.floor_divide(x, b[0]) for x in a), *(np.mod(x, b[0]) for x in a)
    inside = np.isfinite(a[0]) & np.isfinite(a[1]) & (low == high)
    most = np.where(np.isfinite(a[0]) & (a[0] == np.floor(a[0])), b[0] - 1, b[0])
    bottom, top = np.where(inside, starts, 0.0), np.where(inside, ends, most)
    return np.where(known, bottom, -np.inf), np.where(known, top, np.inf)


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    low = np.where(c[0] != c[1], np.minimum(a[0], b[0]), np.where(c[0] != 0, a[0], b[0]))
    return low, np.where(c[0] != c[1], np.maximum(a[1], b[1]), np.where(c[0] != 0, a[1], b[1]))


def _absolute(a: Interval) -> Interval:
    ends = np.abs(a[0]), np.abs(a[1])
    return np.where((a[0] <= 0) & (a[1] >= 0), 0.0, np.minimum(*ends)), np.maximum(*ends)


def _bucket(x: Tensor | int, *edges: int) -> Tensor:
    """How many of the ascending `edges` are at most x."""
    where = torch.as_tensor(x)
    return torch.bucketize(where, torch.tensor(edges, dtype=torch.int64, device=where.device), right=True)


def _bucket_bounds(x: Interval, *edges: Interval) -> Interval:
    at = np.array([edge[0] for edge in edges])
    return np.searchsorted(at, x[0], side="right") * 1.0, np.searchsorted(at, x[1], side="right") * 1.0


UNKNOWN: Interval = (-math.inf, math.inf)
REAL_FUNCTIONS = (
    "log", "log2", "log10", "log1p", "exp", "exp2", "expm1", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "asin",
    "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sigmoid", "erf", "erfc", "relu", "sign",
    "floor", "ceil", "round", "trunc", "frac",
)  # fmt: skip
"""Functions of one real number, by their names in torch and in ATen."""
lowest, highest = np.minimum, np.maximum
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Interval]]] = {
    "or": (operator.or_, lambda a, b: (highest(a[0], b[0]), highest(a[1], b[1]))),
    "and": (operator.and_, lambda a, b: (lowest(a[0], b[0]), lowest(a[1], b[1]))),
    "xor": (operator.xor, lambda a, b: (0.0, 1.0)),
    "not": (torch.logical_not, lambda a: (1.0 - a[1], 1.0 - a[0])),
    "lt": (operator.lt, _compare(lambda a, b: a[1] < b[0], lambda a, b: a[0] >= b[1])),
    "le": (operator.le, _compare(lambda a, b: a[1] <= b[0], lambda a, b: a[0] > b[1])),
    "gt": (operator.gt, _compare(lambda a, b: a[0] > b[1], lambda a, b: a[1] <= b[0])),
    "ge": (operator.ge, _compare(lambda a, b: a[0] >= b[1], lambda a, b: a[1] < b[0])),
    "eq": (operator.eq, _compare(_equal, _apart)),
    "ne": (operator.ne, _compare(_apart, _equal)),
    "add": (operator.add, lambda a, b: (a[0] + b[0], a[1] + b[1])),
    "sub": (operator.sub, lambda a, b: (a[0] - b[1], a[1] - b[0])),
    "mul": (operator.mul, lambda a, b: _corners(np.multiply, a, b)),
    "div": (operator.truediv, lambda a, b: UNKNOWN),
    "floordiv": (operator.floordiv, _floordiv),
    "mod": (operator.mod, _modulo),
    "neg": (operator.neg, lambda a: (-a[1], -a[0])),
    "min": (torch.minimum, lambda a, b: (lowest(a[0], b[0]), lowest(a[1], b[1]))),
    "max": (torch.maximum, lambda a, b: (highest(a[0], b[0]), highest(a[1], b[1]))),
    "abs": (torch.abs, _absolute),
    "pow": (torch.pow, lambda a, b: UNKNOWN),
    "where": (torch.where, _where),
    "bucket": (_bucket, _bucket_bounds),
    "cast": (lambda x, dtype: x.to(dtype), lambda a, dtype: UNKNOWN),
    **{name: (getattr(torch, name), lambda a: UNKNOWN) for name in REAL_FUNCTIONS},
}
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)}  # fmt: skip
"""`cast` is written as the name of its dtype: `float32(q - k)`."""
