"""The operators of mask expressions: one record for each, which all other modules of the mask language read.

>>> OPERATORS["le"].compute(2, 3), OPERATORS["le"].infix.sign
(True, '<=')
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Bound = Any  # a float, or a float64 array of them: one per box
Interval = tuple[Bound, Bound]

COMPARISON, ATOM = 4, 8  # precedences
"""Comparisons bind tighter than & and |, as in mathematics and unlike in Python; `parse` accounts for it."""


class Infix(NamedTuple):
    """How an operator of two operands is written: its sign, its precedence, and its node in Python's grammar."""

    sign: str
    precedence: int
    node: type[ast.AST]


@dataclass(frozen=True)
class Operator:
    """An operator of mask expressions.

    compute: the value, from tensors and numbers.
    bounds: the interval of the value, from those of the operands; it takes as many arguments as the operator.
    infix: how it is written; None: as a call, `name(x, y)`.
    dtype: "bool" or "float", the kind of the result; "": the widest kind of the operands.
    integral: from integers it makes an integer, in any dtype.
    wraps: from integers it may leave the range of their dtype, and wrap.
    rounds: from floating-point numbers it may make one that is rounded.
    tensors: `compute` takes tensors alone, no numbers.
    aten: the ATen ops, by name.overload, that `from_graph` reads as this operator.
    """

    compute: Callable[..., Any]
    bounds: Callable[..., Interval]
    infix: Infix | None = None
    dtype: str = ""
    integral: bool = False
    wraps: bool = False
    rounds: bool = False
    tensors: bool = False
    aten: tuple[str, ...] = ()


# --- intervals ----------------------------------------------------------------------------------------------------

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

# --- the table --------------------------------------------------------------------------------------------------------


def _overloads(*names: str) -> tuple[str, ...]:
    """Each op on tensors, and on a tensor and a number."""
    return tuple(f"{name}.{overload}" for name in names for overload in ("Tensor", "Scalar"))


def _logical(name: str) -> tuple[str, ...]:
    return (*_overloads(f"__{name}__", f"bitwise_{name}"), f"logical_{name}.default")


def _comparison(name: str, infix: Infix, surely: Any, never: Any) -> Operator:
    """An operator that compares: `surely` and `never` say where it is certain, from the intervals of the operands."""
    return Operator(getattr(operator, name), _compare(surely, never), infix, dtype="bool", aten=_overloads(name))


def _unknown(a: Interval) -> Interval:
    return UNKNOWN


lowest, highest = np.minimum, np.maximum
OPERATORS: dict[str, Operator] = {
    "or": Operator(
        operator.or_,
        lambda a, b: (highest(a[0], b[0]), highest(a[1], b[1])),
        Infix("|", 1, ast.BitOr),
        dtype="bool",
        aten=_logical("or"),
    ),
    "and": Operator(
        operator.and_,
        lambda a, b: (lowest(a[0], b[0]), lowest(a[1], b[1])),
        Infix("&", 3, ast.BitAnd),
        dtype="bool",
        aten=_logical("and"),
    ),
    "xor": Operator(operator.xor, lambda a, b: (0.0, 1.0), dtype="bool", aten=_logical("xor")),
    "not": Operator(
        torch.logical_not,
        lambda a: (1.0 - a[1], 1.0 - a[0]),
        dtype="bool",
        tensors=True,
        aten=("logical_not.default",),
    ),
    "lt": _comparison("lt", Infix("<", 4, ast.Lt), lambda a, b: a[1] < b[0], lambda a, b: a[0] >= b[1]),
    "le": _comparison("le", Infix("<=", 4, ast.LtE), lambda a, b: a[1] <= b[0], lambda a, b: a[0] > b[1]),
    "gt": _comparison("gt", Infix(">", 4, ast.Gt), lambda a, b: a[0] > b[1], lambda a, b: a[1] <= b[0]),
    "ge": _comparison("ge", Infix(">=", 4, ast.GtE), lambda a, b: a[0] >= b[1], lambda a, b: a[1] < b[0]),
    "eq": _comparison("eq", Infix("==", 4, ast.Eq), _equal, _apart),
    "ne": _comparison("ne", Infix("!=", 4, ast.NotEq), _apart, _equal),
    "add": Operator(
        operator.add,
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        Infix("+", 6, ast.Add),
        integral=True,
        wraps=True,
        rounds=True,
        aten=_overloads("add"),
    ),
    "sub": Operator(
        operator.sub,
        lambda a, b: (a[0] - b[1], a[1] - b[0]),
        Infix("-", 6, ast.Sub),
        integral=True,
        wraps=True,
        rounds=True,
        aten=_overloads("sub"),
    ),
    "mul": Operator(
        operator.mul,
        lambda a, b: _corners(np.multiply, a, b),
        Infix("*", 7, ast.Mult),
        integral=True,
        wraps=True,
        rounds=True,
        aten=_overloads("mul"),
    ),
    "div": Operator(
        operator.truediv, lambda a, b: UNKNOWN, Infix("/", 7, ast.Div), dtype="float", aten=_overloads("div")
    ),
    "floordiv": Operator(
        operator.floordiv,
        _floordiv,
        Infix("//", 7, ast.FloorDiv),
        integral=True,
        wraps=True,
        rounds=True,
        aten=("floor_divide.default", "floor_divide.Scalar"),
    ),
    "mod": Operator(
        operator.mod,
        _modulo,
        Infix("%", 7, ast.Mod),
        integral=True,
        wraps=True,
        rounds=True,
        aten=_overloads("remainder"),
    ),
    "neg": Operator(operator.neg, lambda a: (-a[1], -a[0]), integral=True, wraps=True, aten=("neg.default",)),
    "min": Operator(
        torch.minimum,
        lambda a, b: (lowest(a[0], b[0]), lowest(a[1], b[1])),
        integral=True,
        tensors=True,
        aten=("minimum.default", "min.other"),
    ),
    "max": Operator(
        torch.maximum,
        lambda a, b: (highest(a[0], b[0]), highest(a[1], b[1])),
        integral=True,
        tensors=True,
        aten=("maximum.default", "max.other"),
    ),
    "abs": Operator(torch.abs, _absolute, integral=True, wraps=True, tensors=True, aten=("abs.default",)),
    "pow": Operator(torch.pow, lambda a, b: UNKNOWN, aten=("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")),
    "where": Operator(
        torch.where, _where, aten=("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
    ),
    "bucket": Operator(_bucket, _bucket_bounds, integral=True),
    "cast": Operator(lambda x, dtype: x.to(dtype), lambda a, dtype: UNKNOWN),
    **{
        name: Operator(getattr(torch, name), _unknown, dtype="float", tensors=True, aten=(f"{name}.default",))
        for name in REAL_FUNCTIONS
    },
}
INFIX = {name: found.infix for name, found in OPERATORS.items() if found.infix}
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)}  # fmt: skip
"""`cast` is written as the name of its dtype: `float32(q - k)`."""
