"""Attention masks and biases as scalar functions of (b, h, q, k).

    >>> window = parse("k <= q & q - k < 4")
    >>> classify(window, (8, 12), (0, 4))      # queries 8..11, keys 0..3
    'empty'
    >>> str(window)
    'k <= q & q - k < 4'

An expression is a tree of frozen nodes over the four indices, constants, loads from tensors (*leaves*: padding masks,
document ids, bias tables), `x0[b, k]`, and *tables*, arrays that are known when the schedule is made, `t1f2e3d[q]`.
One expression serves every purpose: it is evaluated for any tile by putting the tile's positions in place of q and k,
so no S x S tensor is ever built; it is classified over a box of positions by interval arithmetic; its text is what the
dump prints and what the ring op carries, so that nothing hides in a closure.

A *score function* is an expression over one index more, `score`, the scaled product of query and key.

Contract: `parse(str(e)) == e`.  `classify` never calls a tile empty or full that is not (the converse may happen).
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringpass.masks.constants import Known, outward

EMPTY, FULL, PARTIAL = "empty", "full", "partial"
KINDS = (EMPTY, PARTIAL, FULL)
Bound = Any  # a float, or a float64 array of them: one per box
Interval = tuple[Bound, Bound]
Box = dict[str, Interval]  # closed intervals
Spans = tuple[NDArray[Any], NDArray[Any]]  # starts and stops of half-open ranges

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
"""Comparisons bind tighter than & and |, unlike in Python: the text is that of mathematics, `parse` regroups it."""


@dataclass(frozen=True)
class Expr:
    """Base of the five kinds of node."""

    def __str__(self) -> str:
        return _text(self, 0)


@dataclass(frozen=True)
class Index(Expr):
    """One of the indices b, h, q, k, or `score`."""

    name: str


@dataclass(frozen=True)
class Const(Expr):
    """A bool, int or float."""

    value: bool | int | float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class Load(Expr):
    """Element `indices` of leaf number `leaf`."""

    leaf: int
    indices: tuple[Expr, ...]


@dataclass(frozen=True)
class Table(Expr):
    """Element `indices` of a known array."""

    known: Known
    indices: tuple[Expr, ...]


@dataclass(frozen=True)
class Call(Expr):
    """Operator `op` of the table `OPERATORS` on `args`."""

    op: str
    args: tuple[Expr, ...]


TRUE, FALSE = Const(True), Const(False)
B, H, Q, K, SCORE = Index("b"), Index("h"), Index("q"), Index("k"), Index("score")


# --- operators: what torch computes, and what an interval becomes -----------------------------------------------------


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


def call(op: str, *args: Expr) -> Expr:
    """Node `op(*args)`, with the identities of `and`, `or`, `not` and `where` applied."""
    if op in ("and", "or"):
        unit, zero = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
        if zero in args:
            return zero
        rest = tuple(a for a in args if a != unit)
        return unit if not rest else rest[0] if len(rest) == 1 or rest[0] == rest[1] else Call(op, rest)
    if op == "not" and isinstance(args[0], Const):
        return Const(not args[0].value)
    if op == "where" and isinstance(args[0], Const):
        return args[1] if args[0].value else args[2]
    if op in ("add", "sub") and args[1] == Const(0):
        return args[0]
    if op == "add" and args[0] == Const(0):
        return args[1]
    if op == "mul" and args[1] == Const(1):
        return args[0]
    if op in ("add", "sub", "mul") and all(isinstance(a, Const) and type(a.value) is int for a in args):
        return Const(OPERATORS[op][0](*(a.value for a in args)))  # type: ignore[attr-defined]
    return Call(op, args)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """Node that converts `expr` to `dtype`."""
    return Call("cast", (expr, Index(str(dtype).removeprefix("torch."))))


CAUSAL = call("le", K, Q)


# --- text -------------------------------------------------------------------------------------------------------------


TABLES: dict[str, Known] = {}
"""The arrays of patterns by digest, which is how a text names them; kept for the life of the process."""


def table(values: Any, *indices: Expr) -> Table:
    """A table that a text may name."""
    known = Known(values)
    return Table(TABLES.setdefault(known.digest, known), indices)


def _text(e: Expr, outer: int) -> str:
    if isinstance(e, Index):
        return e.name
    if isinstance(e, Table):
        return f"t{e.known.digest}[{', '.join(_text(i, 0) for i in e.indices)}]"
    if isinstance(e, Const):
        return f"float('{e.value}')" if isinstance(e.value, float) and not math.isfinite(e.value) else repr(e.value)
    if isinstance(e, Load):
        return f"x{e.leaf}[{', '.join(_text(i, 0) for i in e.indices) or '()'}]"
    assert isinstance(e, Call)
    if e.op == "cast":
        return f"{e.args[1]}({_text(e.args[0], 0)})"
    if e.op in INFIX:
        sign, rank, _ = INFIX[e.op]  # comparisons do not chain
        text = f"{_text(e.args[0], rank + (rank == COMPARISON))} {sign} {_text(e.args[1], rank + 1)}"
    else:
        rank = COMPARISON if e.op == "not" else ATOM  # Python's `not` takes all of a comparison that follows it
        text = f"{e.op}({', '.join(_text(a, 0) for a in e.args)})"
    return f"({text})" if rank < outer else text


PARSING = threading.Lock()
"""One `ast.parse` at a time: before CPython 3.11.8, two threads in it raise a SystemError now and then (gh-106905)."""


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """The expression that `text` spells.  Raises ValueError where it is not one."""
    python = text.replace("&", " and ").replace("|", " or ")
    try:
        with PARSING:
            tree = ast.parse(python.strip(), mode="eval")
        return _from_ast(tree.body)
    except (SyntaxError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a mask expression: {text!r}") from error


def _from_ast(n: Any) -> Expr:
    if isinstance(n, ast.Name):
        return {i.name: i for i in (B, H, Q, K, SCORE)}[n.id]
    if isinstance(n, ast.Constant):
        if isinstance(n.value, bool | int | float):
            return Const(n.value)
        raise ValueError(n.value)
    if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub) and isinstance(n.operand, ast.Constant):
        return Const(-n.operand.value)  # type: ignore[operator,arg-type]
    if isinstance(n, ast.UnaryOp):
        return Call({ast.Not: "not"}[type(n.op)], (_from_ast(n.operand),))  # type: ignore[index]
    if isinstance(n, ast.Subscript):
        items = n.slice.elts if isinstance(n.slice, ast.Tuple) else [n.slice]
        name, indices = n.value.id, tuple(_from_ast(i) for i in items)  # type: ignore[attr-defined]
        return Table(TABLES[name[1:]], indices) if name[0] == "t" else Load(int(name.removeprefix("x")), indices)
    if isinstance(n, ast.BoolOp):
        op = "and" if isinstance(n.op, ast.And) else "or"
        return reduce(lambda a, b: Call(op, (a, b)), map(_from_ast, n.values))
    if isinstance(n, ast.Call):
        return _from_call(n)
    sides, sign = ([n.left, *n.comparators], n.ops[0]) if isinstance(n, ast.Compare) else ([n.left, n.right], n.op)
    left, right = map(_from_ast, sides)
    return Call({node: name for name, (_, _, node) in INFIX.items()}[type(sign)], (left, right))


def _from_call(n: ast.Call) -> Expr:
    name = n.func.id  # type: ignore[attr-defined]
    if name == "float":
        return Const(float(n.args[0].value))  # type: ignore[attr-defined]
    args = tuple(_from_ast(a) for a in n.args)
    if name in DTYPES:
        (arg,) = args
        return Call("cast", (arg, Index(name)))
    code = OPERATORS[name][1].__code__
    fits = len(args) == code.co_argcount or (code.co_flags & inspect.CO_VARARGS and len(args) > code.co_argcount)
    if name in INFIX or name == "cast" or not fits or n.keywords:
        raise ValueError(f"{name} of {len(args)} arguments")
    return Call(name, args)


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(expr: Expr, positions: dict[str, Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """Value of `expr` on one tile, broadcastable to (B, H, Lq, Lk): dims on which it does not depend have size 1.

    `positions` maps b, h, q, k to int64 tensors of shapes (B,1,1,1), (1,H,1,1), (1,1,Lq,1), (1,1,1,Lk), and,
    for a score function, `score` to the tile's scores.
    Differentiable in floating-point leaves.
    """
    known: dict[Expr, Any] = {}

    def value(e: Expr) -> Any:
        if e not in known:
            known[e] = compute(e)
        return known[e]

    def compute(e: Expr) -> Any:
        if isinstance(e, Index):
            return positions[e.name]
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Load):
            return leaves[e.leaf][tuple(value(i) for i in e.indices)] if e.indices else leaves[e.leaf]
        if isinstance(e, Table):
            return e.known.tensor(positions["q"])[tuple(value(i) for i in e.indices)]
        assert isinstance(e, Call)
        if e.op == "cast":
            x = value(e.args[0])
            dtype = DTYPES[e.args[1].name]  # type: ignore[attr-defined]
            device = positions["q"].device
            return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)
        args = [value(a) for a in e.args]
        truths = e.op in ("add", "mul") and all(isinstance(a, bool) for a in args)
        if truths or e.op in ("min", "max", "not", "abs", *REAL_FUNCTIONS):  # True + True is True in a tensor
            exact = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
            args = [_tensor(a, positions, exact if isinstance(a, float) else None) for a in args]
        if e.op == "pow" and not any(isinstance(a, Tensor) for a in args):
            args[0] = _tensor(args[0], positions)
        if e.op == "where":
            args[0] = _tensor(args[0], positions)
            if float in (type(args[1]), type(args[2])) and not any(isinstance(a, Tensor) for a in args[1:]):
                args[1:] = [torch.full((), a, dtype=torch.float64, device=args[0].device) for a in args[1:]]  # exact
        return OPERATORS[e.op][0](*args)

    out = _tensor(value(expr), positions)
    return out.reshape((1,) * (4 - out.ndim) + tuple(out.shape))


def _tensor(x: Any, positions: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=positions["q"].device)


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
        return expr.known.bounds([bounds(i, box) for i in expr.indices])
    assert isinstance(expr, Call)
    if expr.op == "cast":
        inner = bounds(expr.args[0], box)
        return _cast_bounds(inner, expr.args[1].name)  # type: ignore[attr-defined]
    args = [bounds(a, box) for a in expr.args]
    if expr.op in ("and", "or", "not"):
        args = [_cast_bounds(a, "bool") for a in args]
    low, high = OPERATORS[expr.op][1](*args)
    kind = kind_of(expr) if expr.op in ("add", "sub", "mul", "floordiv", "mod", "neg", "abs") else ""
    if kind == "int" or (kind and expr.op not in ("neg", "abs")):
        if kind == "bool":
            return _cast_bounds((low, high), "bool")  # True + True is True
        if kind == "float":  # it may be rounded
            exact = _whole(expr) & (np.abs(low) < 2**24) & (np.abs(high) < 2**24)
        else:  # beyond, a float64 bound is rounded, or the integers wrap
            least, most = _range(expr)
            exact = ~(np.isfinite(low) & (low < least)) & ~(np.isfinite(high) & (high > most))
        return np.where(exact, low, -np.inf), np.where(exact, high, np.inf)
    return low, high


def _range(expr: Expr) -> tuple[float, float]:
    """The integers that torch computes an integer expression in, as far as a float64 counts them one by one."""
    dtype = _integers(expr)
    if dtype.kind == "b" or dtype.itemsize == 8:
        return 1.0 - 2**53, 2**53 - 1.0
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


@lru_cache(maxsize=4096)
def _integers(expr: Expr) -> np.dtype[Any]:
    """The dtype of an integer expression: numbers written in it take that of the tensors."""
    if isinstance(expr, Table):
        return expr.known.values.dtype
    if isinstance(expr, Call) and expr.op == "cast":
        return np.dtype(expr.args[1].name)  # type: ignore[attr-defined]
    if isinstance(expr, Call) and kind_of(expr) == "int":
        parts = [_integers(a) for a in expr.args[expr.op == "where" :] if not isinstance(a, Const)]
        return np.result_type(*parts) if parts else np.dtype(np.int64)
    return np.dtype(bool if kind_of(expr) == "bool" else np.int64)


@lru_cache(maxsize=4096)
def kind_of(expr: Expr) -> str:
    """bool, int or float: what torch computes with.  A load counts as float, the widest."""
    if isinstance(expr, Const):
        return type(expr.value).__name__
    if isinstance(expr, Call):
        if expr.op == "cast":
            dtype = DTYPES[expr.args[1].name]  # type: ignore[attr-defined]
            return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
        if expr.op == "div" or expr.op in REAL_FUNCTIONS:
            return "float"
        if expr.op in ("not", "xor") or INFIX.get(expr.op, ("", ATOM))[1] <= COMPARISON:
            return "bool"
        kinds = [kind_of(a) for a in (expr.args[1:] if expr.op == "where" else expr.args)]
        return next(kind for kind in ("float", "int", "bool") if kind in kinds)
    if isinstance(expr, Table):
        return "bool" if expr.known.values.dtype == bool else "int"
    return "int" if isinstance(expr, Index) and expr != SCORE else "float"


@lru_cache(maxsize=4096)
def _whole(expr: Expr) -> bool:
    """Whether the value is surely a whole number."""
    if isinstance(expr, Const):
        return math.isfinite(expr.value) and expr.value == int(expr.value)
    if isinstance(expr, Call):
        if kind_of(expr) != "float":
            return True
        args = expr.args[:1] if expr.op == "cast" else expr.args[1:] if expr.op == "where" else expr.args
        return expr.op not in ("div", "pow", *REAL_FUNCTIONS) and all(map(_whole, args))
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


def classify_all(expr: Expr, q: Spans, k: Spans) -> NDArray[Any]:
    """`classify` of many tiles at once, as indices into KINDS: tile i is q[0][i]:q[1][i] x k[0][i]:k[1][i]."""
    box = {"q": (q[0].astype(float), q[1] - 1.0), "k": (k[0].astype(float), k[1] - 1.0)}
    full = empty = np.asarray(True)
    for point in _points(expr):
        low, high = bounds(expr, {**box, **point})
        full, empty = full & (low == 1.0) & (high == 1.0), empty & (low == 0.0) & (high == 0.0)
    return np.broadcast_to(np.where(full, 2, np.where(empty, 0, 1)), q[0].shape).astype(np.int8)


def extents(expr: Expr) -> dict[str, int]:
    """How many batch elements and heads the tables of `expr` tell apart, by the name of the index: b, h."""
    pairs = [pair for found in tables(expr) for pair in zip(found.indices, found.known.shape, strict=True)]
    return {i.name: n for i, n in pairs if isinstance(i, Index) and i in (B, H) and n > 1}


def tables(expr: Expr) -> Iterator[Table]:
    """The tables in `expr`."""
    if isinstance(expr, Table):
        yield expr
    for part in parts(expr):
        yield from tables(part)


def parts(expr: Expr) -> tuple[Expr, ...]:
    """What `expr` is made of."""
    return expr.args if isinstance(expr, Call) else expr.indices if isinstance(expr, Load | Table) else ()


def rebuilt(expr: Expr, new: Callable[[Expr], Expr]) -> Expr:
    """`expr` with `new(part)` for each of its parts."""
    made = tuple(map(new, parts(expr)))
    if made == parts(expr):
        return expr
    return call(expr.op, *made) if isinstance(expr, Call) else replace(expr, indices=made)  # type: ignore[call-arg]


def _points(expr: Expr) -> Iterator[Box]:
    """One box for each batch element and head that the tables tell apart."""
    sizes = extents(expr)
    for values in product(*(range(n) for n in sizes.values())):
        yield {name: (float(i), float(i)) for name, i in zip(sizes, values, strict=True)}


@lru_cache(maxsize=1024)
def without_data(expr: Expr, unknown: bool) -> Expr:
    """`expr` with `unknown` for each condition that depends on data (leaves, batch, head).

    True gives where the mask may hold, False where it must.

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
    if isinstance(expr, Table):  # one batch element or head after the other is classified
        return any(_has_data(i) for i in expr.indices if i not in (B, H))
    return isinstance(expr, Load) or expr in (B, H, SCORE)


def loads(expr: Expr) -> set[int]:
    """The leaves that `expr` reads."""
    own = {expr.leaf} if isinstance(expr, Load) else set()
    return own.union(*map(loads, parts(expr)))


def replace_loads(expr: Expr, new: Callable[[int, tuple[Expr, ...]], Expr]) -> Expr:
    """`expr` with each load of leaf i at `indices` replaced by `new(i, indices)`."""
    found = rebuilt(expr, lambda part: replace_loads(part, new))
    return new(found.leaf, found.indices) if isinstance(found, Load) else found


def substitute(expr: Expr, old: Expr, new: Expr) -> Expr:
    """`expr` with each part that is `old` replaced by `new`."""
    return new if expr == old else rebuilt(expr, lambda part: substitute(part, old, new))


def renumber(expr: Expr, numbers: dict[int, int]) -> Expr:
    """`expr` with its leaves renumbered."""
    return replace_loads(expr, lambda leaf, indices: Load(numbers[leaf], indices))


def bind(expr: Expr, values: Mapping[int, Known]) -> Expr:
    """`expr` with the leaves whose values are known turned into tables.

    >>> print(classify(bind(parse("x0[k]"), {0: Known([True, True, False])}), (0, 3), (0, 2)))
    full
    """
    return replace_loads(expr, lambda i, indices: gathered(values[i], indices) if i in values else Load(i, indices))


def gathered(known: Known, indices: tuple[Expr, ...]) -> Table:
    """Element `indices` of `known`; where one index alone reads a table of its own, read once: bounds then are exact.

    >>> gathered(Known([5, 6, 7]), (Table(Known([2, 0]), (Q,)),)).known.values
    array([7, 5])
    """
    varying = [dim for dim, i in enumerate(indices) if i not in (B, H) and not isinstance(i, Const)]
    inner = indices[varying[0]] if len(varying) == 1 else None
    if not isinstance(inner, Table) or inner.known.values.ndim != 1:
        return Table(known, indices)
    dim = varying[0]
    values = Known(known.values.take(inner.known.values, dim))
    return Table(values, (*indices[:dim], *inner.indices, *indices[dim + 1 :]))
