"""Attention masks and biases as scalar functions of (b, h, q, k).

    >>> window = parse("k <= q & q - k < 4")
    >>> str(window)
    'k <= q & q - k < 4'

An expression is a tree of frozen nodes over the four indices, constants, loads from tensors (*leaves*: padding masks,
document ids, bias tables), `x0[b, k]`, and *tables*, constant arrays when the schedule is made, `t1f2e3d[q]`.
One expression serves every purpose.  It is evaluated for a tile by substituting the tile's positions for q and k, so
that no S x S tensor is ever built.  It is classified over a box of positions by interval arithmetic.  Its text is what
the dump prints and what the ring op carries, so that nothing is hidden in a closure.

A *score function* is an expression over one more index, `score`, the scaled product of query and key.

Contract: `parse(str(e)) == e`.
"""

from __future__ import annotations

import ast
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

import torch

from ringpass.masks.constants import ConstantArray
from ringpass.masks.operators import ATOM, COMPARISON, DTYPES, INFIX, OPERATORS


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
    """Element `indices` of a constant array."""

    array: ConstantArray
    indices: tuple[Expr, ...]


@dataclass(frozen=True)
class Call(Expr):
    """Operator `op` of the table `OPERATORS` on `args`."""

    op: str
    args: tuple[Expr, ...]


TRUE, FALSE = Const(True), Const(False)
B, H, Q, K, SCORE = Index("b"), Index("h"), Index("q"), Index("k"), Index("score")


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
    numbers = [a.value for a in args if isinstance(a, Const) and type(a.value) is int]
    if op in ("add", "sub", "mul") and len(numbers) == len(args):
        return Const(OPERATORS[op].compute(*numbers))
    return Call(op, args)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """Node that converts `expr` to `dtype`."""
    return Call("cast", (expr, Index(str(dtype).removeprefix("torch."))))


def cast_dtype(expr: Call) -> str:
    """The name of the dtype to which a `cast` converts."""
    name = expr.args[1]
    assert isinstance(name, Index)
    return name.name


CAUSAL = call("le", K, Q)


# --- text -------------------------------------------------------------------------------------------------------------


TABLES: dict[str, ConstantArray] = {}
"""Constant arrays by digest, the name of a table in a text; kept for the life of the process."""


def table(values: Any, *indices: Expr) -> Table:
    """A table that `parse` can look up by its digest."""
    array = ConstantArray(values)
    return Table(TABLES.setdefault(array.digest, array), indices)


def _text(e: Expr, outer: int) -> str:
    if isinstance(e, Index):
        return e.name
    if isinstance(e, Table):
        return f"t{e.array.digest}[{', '.join(_text(i, 0) for i in e.indices)}]"
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
    """The expression of `text`.  Raises ValueError if it is not a mask expression."""
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
        if not isinstance(n.op, ast.Not):
            raise ValueError(n.op)
        return Call("not", (_from_ast(n.operand),))
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
    code = OPERATORS[name].bounds.__code__
    fits = len(args) == code.co_argcount or (code.co_flags & inspect.CO_VARARGS and len(args) > code.co_argcount)
    if name in INFIX or name == "cast" or not fits or n.keywords:
        raise ValueError(f"{name} of {len(args)} arguments")
    return Call(name, args)


def tables(expr: Expr) -> Iterator[Table]:
    """The tables in `expr`."""
    if isinstance(expr, Table):
        yield expr
    for part in parts(expr):
        yield from tables(part)


def parts(expr: Expr) -> tuple[Expr, ...]:
    """The operands of `expr`."""
    return expr.args if isinstance(expr, Call) else expr.indices if isinstance(expr, Load | Table) else ()


def rebuilt(expr: Expr, new: Callable[[Expr], Expr]) -> Expr:
    """`expr` with each operand `part` replaced by `new(part)`."""
    made = tuple(map(new, parts(expr)))
    if made == parts(expr):
        return expr
    return call(expr.op, *made) if isinstance(expr, Call) else replace(expr, indices=made)  # type: ignore[call-arg]


def loads(expr: Expr) -> set[int]:
    """The leaves that `expr` reads."""
    direct = {expr.leaf} if isinstance(expr, Load) else set()
    return direct.union(*map(loads, parts(expr)))
