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
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

import torch

from ringpass.errors import ParseError
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

MOST_CHARACTERS, MOST_BRACKETS = 1 << 17, 128  # of a text: in all, and open at once (Python's grammar has 200)
MOST_NODES, MOST_DEPTH = 8192, 256  # of its expression
MOST_LEAVES = 1 << 16
ALLOWED = re.compile(r"[A-Za-z0-9_ \t\n()\[\],.+\-*/%<>=!&|']*")
PREFIXES = re.compile(r"(?:(?:\bnot\b|-)\s*){64}")  # more signs in a row than an expression has
SYNTAX = (SyntaxError, LookupError, AttributeError, TypeError, ValueError, RecursionError, MemoryError)


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """The expression of `text`, which is never evaluated.

    Raises ParseError if it is not a mask expression, or has more than MOST_CHARACTERS, MOST_NODES or MOST_DEPTH levels.
    """
    _check_size(text)
    python = text.replace("&", " and ").replace("|", " or ")
    try:
        with PARSING:
            tree = ast.parse(python.strip(), mode="eval")
        found = _from_ast(tree.body)
    except SYNTAX as error:
        raise ParseError(f"not a mask expression: {_excerpt(text)}") from error
    _check_tree(found, text)
    return found


def _excerpt(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:200]!r} .. ({len(text)} characters)"


def _check_size(text: str) -> None:
    """Before Python's grammar sees it, whose time and stack grow with the text."""
    if len(text) > MOST_CHARACTERS:
        raise ParseError(f"a mask expression has at most {MOST_CHARACTERS} characters, got {_excerpt(text)}")
    if not ALLOWED.fullmatch(text):
        raise ParseError(f"not a mask expression, for its characters: {_excerpt(text)}")
    if len(re.findall(r"\w+|[^\w\s]", text)) > 4 * MOST_NODES:  # with signs, brackets and commas
        raise ParseError(f"a mask expression has at most {MOST_NODES} nodes, got {_excerpt(text)}")
    depth = deepest = 0
    for sign in re.findall(r"[()\[\]]", text):
        depth += 1 if sign in "([" else -1
        deepest = max(deepest, depth)
    if deepest > MOST_BRACKETS or PREFIXES.search(text):
        raise ParseError(f"a mask expression has at most {MOST_BRACKETS} levels of brackets, got {_excerpt(text)}")


def _check_tree(expr: Expr, text: str) -> None:
    level, count, depth = [expr], 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MOST_NODES or depth > MOST_DEPTH:
            what = f"{MOST_NODES} nodes" if count > MOST_NODES else f"{MOST_DEPTH} levels"
            raise ParseError(f"a mask expression has at most {what}, got {_excerpt(text)}")
        level = [part for one in level for part in parts(one)]


def _from_ast(n: Any) -> Expr:
    if isinstance(n, ast.Name):
        return {i.name: i for i in (B, H, Q, K, SCORE)}[n.id]
    if isinstance(n, ast.Constant):
        return _constant(n.value)
    if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub) and isinstance(n.operand, ast.Constant):
        return _constant(-n.operand.value)  # type: ignore[operator]
    if isinstance(n, ast.UnaryOp):
        if not isinstance(n.op, ast.Not):
            raise ValueError(n.op)
        return Call("not", (_from_ast(n.operand),))
    if isinstance(n, ast.Subscript):
        return _from_subscript(n)
    if isinstance(n, ast.BoolOp):
        op = "and" if isinstance(n.op, ast.And) else "or"
        return reduce(lambda a, b: Call(op, (a, b)), map(_from_ast, n.values))
    if isinstance(n, ast.Call):
        return _from_call(n)
    if isinstance(n, ast.Compare):
        (sign,), (right,) = n.ops, n.comparators  # comparisons do not chain
        return Call(_SIGNS[type(sign)], (_from_ast(n.left), _from_ast(right)))
    return Call(_SIGNS[type(n.op)], (_from_ast(n.left), _from_ast(n.right)))


_SIGNS: dict[type, str] = {infix.node: name for name, infix in INFIX.items()}


def _constant(value: object) -> Const:
    """A number; Python's grammar refuses those of more than 4,300 digits."""
    if not isinstance(value, bool | int | float):
        raise ValueError(value)
    return Const(value)


def _from_subscript(n: ast.Subscript) -> Expr:
    items = n.slice.elts if isinstance(n.slice, ast.Tuple) else [n.slice]
    name, indices = n.value.id, tuple(_from_ast(i) for i in items)  # type: ignore[attr-defined]
    if name[0] == "t":
        found = TABLES[name[1:]]
        if len(indices) != len(found.shape):
            raise ValueError(f"{len(indices)} indices of a table of {len(found.shape)} dims")
        return Table(found, indices)
    if not re.fullmatch(r"x\d{1,5}", name) or int(name[1:]) >= MOST_LEAVES:
        raise ValueError(name)
    return Load(int(name[1:]), indices)


def _from_call(n: ast.Call) -> Expr:
    name = n.func.id  # type: ignore[attr-defined]
    if n.keywords:
        raise ValueError(f"{name} with keywords")
    if name == "float":
        (number,) = n.args
        if not isinstance(number, ast.Constant) or not isinstance(number.value, str):
            raise ValueError("float of no text")
        return Const(float(number.value))
    args = tuple(_from_ast(a) for a in n.args)
    if name in DTYPES:
        (arg,) = args
        return Call("cast", (arg, Index(name)))
    code = OPERATORS[name].bounds.__code__
    fits = len(args) == code.co_argcount or (code.co_flags & inspect.CO_VARARGS and len(args) > code.co_argcount)
    if name in INFIX or name == "cast" or not fits:
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
