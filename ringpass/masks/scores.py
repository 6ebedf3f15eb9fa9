"""Splits a score function into a mask, an additive bias, and any other function of the score.

    where(c, 0, -inf) + t[k - q]           mask c, bias t[k - q]
    where(c, score + t[h], -inf)           mask c, bias t[h]
    where(c, 0, -1e9)                      mask c; rows that see no key under it attend as the score function says
    tanh(score / 50) * 50                  a function of the score

A *fill* is a number that masks a pair.  Beside a visible key, a finite one is as good as -inf.  A row of nothing else
attends to all its keys by what is left of their scores beside the fill, often nothing: such a row is *keyless*.

Contract: softmax of the parts equals softmax of the score function for every row, also where all keys are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ringpass.masks.expr import FALSE, SCORE, TRUE, Call, Const, Expr, K, Load, Q, call, parts
from ringpass.masks.intervals import bounds, kind_of
from ringpass.masks.rewrite import substitute, without_data
from ringpass.masks.simplify import simplify
from ringpass.nodes import Size

ZERO = Const(0)
LEAST = tuple(torch.finfo(t).min for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
LOST = 2.0**20
"""Scores that are smaller than this are lost in a fill whose unit in the last place is twice as large."""
LARGE = 2.0**17
"""A finite number that is smaller than minus this masks a pair: no score comes near it.  So do those of `LEAST`."""
Split = tuple[Expr, Expr | None]
Masks = Callable[[float], bool]
"""Whether a number is a fill."""


@dataclass(frozen=True)
class Keyless:
    """How the rows attend that see no key under a mask: by a score function, under another mask.

    uniform: "filled": their scores are one number; "added": they are all lost in the fill, which is added to them, so
    that they are equal and have gradients nonetheless; empty: neither is certain.
    """

    mask: Expr
    score: Expr
    uniform: str = ""


@dataclass(frozen=True)
class Scores:
    """What becomes of scores: a mask, and at most one of a bias and a score function; None: none.

    sink: the score of one more key, whose value is 0; None: no such key.
    keyless: how the rows attend that see no key under `mask`; None: these rows give 0.
    unsupported: why the score function is not read, in words.
    """

    mask: Expr
    bias: Expr | None = None
    score: Expr | None = None
    sink: Expr | None = None
    keyless: Keyless | None = None
    unsupported: str = ""

    def rewritten(self, change: Callable[[Expr], Expr]) -> Scores:
        """The same with each expression changed."""
        bias, score, sink = (None if e is None else change(e) for e in (self.bias, self.score, self.sink))
        keyless = self.keyless and replace(
            self.keyless, mask=change(self.keyless.mask), score=change(self.keyless.score)
        )
        return Scores(change(self.mask), bias, score, sink, keyless, self.unsupported)

    @property
    def expressions(self) -> list[Expr]:
        """All of them."""
        others = (self.keyless.mask, self.keyless.score) if self.keyless else ()
        found = self.mask, self.bias, self.score, self.sink, *others
        return [e for e in found if e is not None]


def split_bias(expr: Expr, dtype: torch.dtype, rows: Size | None = None, within: Expr = TRUE) -> Scores:
    """What an additive mask does to scores under the mask `within`.  `where(c, 0, -inf)` is the mask c.

    So is `where(c, 0, finfo.min)`; if not each of the `rows`, as from `rows_with_keys`, certainly sees a key, the rows
    that see none are keyless.  `dtype`: that of the scores.
    """
    return _best(lambda masks: Scores(*split_sum(expr, masks)), expr, dtype, rows, within)


def separated(expr: Expr, exact: bool, dtype: torch.dtype, rows: Size | None = None, within: Expr = TRUE) -> Scores:
    """What a score function does, under the mask `within`; without a bias where adding it would not be `exact`.

    `dtype`, `rows`: as in `split_bias`.
    """
    return _best(lambda masks: _separated(expr, exact, masks), expr, dtype, rows, within)


def _best(split: Callable[[Masks], Scores], expr: Expr, dtype: torch.dtype, rows: Size | None, within: Expr) -> Scores:
    """`split`(what masks) with all fills, and what keyless rows do, if there may be some."""
    hard, soft = (_within(split(masks), within) for masks in (_is_infinite, _is_fill))
    if left := [x for x in (soft.bias, soft.score) if x is not None and _has_fill(x)]:
        return replace(hard, unsupported=f"it masks by a finite number in a way that is not known ({left[0]})")
    if not _values(expr) or (rows is not None and sees_a_key(soft.mask, rows)):
        return soft
    if len(_values(expr)) > 1 or not _one_alone(expr, rows):
        return replace(hard, unsupported="it adds several finite fills, and a row may see no key (mask by -inf)")
    whole = expr if scored(expr) else call("add", SCORE, expr)  # in the order of the model, which rounds each sum
    (fill,) = _values(expr)
    how = _uniform(expr, soft, -fill * torch.finfo(dtype).eps / 4)
    return replace(soft, keyless=Keyless(hard.mask, Call("sub", (whole, Const(fill))), how))


def _within(found: Scores, mask: Expr) -> Scores:
    return replace(found, mask=call("and", mask, found.mask))


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


# --- fills ------------------------------------------------------------------------------------------------------------


def _is_infinite(value: float) -> bool:
    return value == -math.inf


def _is_fill(value: float) -> bool:
    return value in LEAST or value <= -LARGE


def _values(expr: Expr) -> set[float]:
    """The finite fills in `expr`."""
    found = _replaced(expr)
    if found is None:
        return set[float]().union(*map(_values, parts(expr)))
    inner, _, value = found
    more = set() if inner == expr else _values(inner)
    return more if _is_infinite(value) else more | {value}


def _fills_once(expr: Expr) -> bool:
    """Whether a pair that is masked by finite fills has the value of one, rather than of a sum of them."""
    found = _replaced(expr)
    if found is not None:
        return found[0] == expr or found[1] == FALSE or _fills_once(found[0])
    filled = [part for part in parts(expr) if _values(part)]
    return not filled or (len(filled) == 1 and _fills_once(filled[0]))


def _uniform(expr: Expr, soft: Scores, lost: float) -> str:
    """`Keyless.uniform` of a function with one fill; scores up to `lost` are lost in it."""
    if scored(expr) and _is_filled(expr):
        return "filled"
    plain = soft.bias is None and soft.score is None and _fills_once(expr) and not _lifts(expr)
    return "added" if plain and lost >= LOST else ""


def _lifts(expr: Expr) -> bool:
    """Whether anything in `expr` is lifted to a fill, which divides gradients in two where both are equal."""
    return _lifted(expr) is not None or any(map(_lifts, parts(expr)))


def _is_filled(expr: Expr) -> bool:
    """Whether a finite fill stands wherever one masks a pair."""
    found = _filled(expr, _is_fill)
    if found is None or found[0] == expr or _is_infinite(found[2]):
        return not _values(expr)
    return _is_filled(found[0])


def _one_alone(expr: Expr, rows: Size | None) -> bool:
    """Whether, in each row that sees no key, some key is masked by one finite fill alone."""
    if _fills_once(expr):
        return True
    found = _replaced(expr)
    filled = [found[0]] if found is not None else [part for part in parts(expr) if _values(part)]
    if len(filled) == 1:
        return _one_alone(filled[0], rows)
    if not isinstance(expr, Call) or expr.op != "add" or rows is None:
        return False
    left, right = filled
    return any(_fills_once(a) and sees_a_key(_unfilled(b), rows) for a, b in ((left, right), (right, left)))


def _unfilled(expr: Expr) -> Expr:
    """The condition under which no fill of `expr` masks a pair."""
    return _separated(expr, True, _is_fill).mask if scored(expr) else split_sum(expr, _is_fill)[0]


def _replaced(expr: Expr) -> tuple[Expr, Expr, float] | None:
    """(x, c, fill) where `expr` is x under the condition c, and a fill elsewhere; c False: x is lifted to the fill."""
    return _filled(expr, _is_fill) or _lifted(expr)


def _has_fill(expr: Expr) -> bool:
    """Whether a number in `expr` is a finite fill, other than one that a known mask of integers is multiplied by."""
    if isinstance(expr, Const):
        return type(expr.value) is float and math.isfinite(expr.value) and _is_fill(-abs(expr.value))
    return _product(expr, _is_fill) is None and any(map(_has_fill, parts(expr)))


def _filled(expr: Expr, masks: Masks) -> tuple[Expr, Expr, float] | None:
    """(x, c, fill) where `expr` is x under the condition c, and a fill elsewhere."""
    if isinstance(expr, Call) and expr.op == "where" and not scored(expr.args[0]):
        c, a, b = expr.args
        for seen, inside, outside in ((c, a, b), (call("not", c), b, a)):
            value = _number(outside)
            if value is not None and masks(value):
                return inside, seen, value
    return _product(expr, masks)


def _product(expr: Expr, masks: Masks) -> tuple[Expr, Expr, float] | None:
    """The same of (1 - x) * fill, whose condition is x != 0: what is left of it where x is a bool is 0."""
    if not isinstance(expr, Call) or expr.op != "mul":
        return None
    for x, factor in (expr.args, expr.args[::-1]):
        value, found = _number(factor), _complement(x)
        if value is None or found is None or scored(found[0]):
            continue
        inner, sign = found
        if masks(sign * value) and math.isfinite(value):
            boolean = kind_of(inner) == "bool"
            seen = inner if boolean else call("ne", inner, ZERO)
            return (Const(0.0) if boolean else expr), seen, sign * value
    return None


def _complement(expr: Expr) -> tuple[Expr, int] | None:
    """(x, 1) where `expr` is 1 - x, (x, -1) where it is x - 1, for a bool or an integer x, maybe cast."""
    expr = _uncast(expr)
    if isinstance(expr, Call) and expr.op == "sub":
        for x, one, sign in ((expr.args[1], expr.args[0], 1), (expr.args[0], expr.args[1], -1)):
            if _number(one) == 1:
                return _uncast(x), sign
    return (call("not", expr), 1) if kind_of(expr) == "bool" else None


def _lifted(expr: Expr) -> tuple[Expr, Expr, float] | None:
    """(x, False, fill) where `expr` is max(x, fill), or where(x < fill, fill, x)."""
    if not isinstance(expr, Call) or expr.op not in ("max", "where"):
        return None
    if expr.op == "max":
        pairs = [expr.args, expr.args[::-1]]
    else:
        below, least, x = expr.args
        pairs = [(x, least)] if below == call("lt", x, least) else []
    for x, least in pairs:
        value = _number(least)
        if value is not None and _is_fill(value) and not _is_infinite(value):
            return x, FALSE, value
    return None


def _number(expr: Expr) -> float | None:
    """The value of `expr` if it is a constant, maybe cast; else None."""
    inner = _uncast(expr)
    return inner.value if isinstance(inner, Const) else None


def _uncast(expr: Expr) -> Expr:
    return expr.args[0] if isinstance(expr, Call) and expr.op == "cast" else expr


# --- additive masks ---------------------------------------------------------------------------------------------------


def split_sum(expr: Expr, masks: Masks) -> Split:
    """An additive mask as (mask, bias); bias None: 0."""
    if (filled := _filled(expr, masks)) is not None:
        inside, seen, _ = filled
        more, bias = (TRUE, inside) if inside == expr else split_sum(inside, masks)
        return call("and", seen, more), None if bias == Const(0.0) else bias
    if not isinstance(expr, Call) or expr.op != "add":
        return TRUE, expr
    (left, a), (right, b) = (split_sum(x, masks) for x in expr.args)
    rest = [x for x in (a, b) if x is not None and x != Const(0.0)]
    return call("and", left, right), call("add", *rest) if len(rest) == 2 else rest[0] if rest else None


# --- score functions --------------------------------------------------------------------------------------------------


def scored(expr: Expr) -> bool:
    """Whether `expr` depends on the score."""
    if isinstance(expr, Call):
        return any(map(scored, expr.args))
    return any(map(scored, expr.indices)) if isinstance(expr, Load) else expr == SCORE


def _separated(expr: Expr, exact: bool, masks: Masks) -> Scores:
    seen, inner = _peeled(expr, masks)
    added = _addend(inner)
    if added is None:
        return Scores(seen, None, inner)
    if inner == SCORE:
        return Scores(seen)
    closed, bias = split_sum(added, masks)
    seen = call("and", seen, closed)
    return Scores(seen, bias) if bias is None or exact else Scores(seen, None, call("add", SCORE, bias))


def _peeled(expr: Expr, masks: Masks) -> tuple[Expr, Expr]:
    """A score function as (mask, rest): where(c, x, -inf) and x + where(c, 0, -inf) are x under the mask c."""
    if not isinstance(expr, Call):
        return TRUE, expr
    if masks is _is_fill and (lifted := _lifted(expr)) is not None:
        return _peeled(lifted[0], masks)
    if expr.op == "where" and (filled := _filled(expr, masks)) is not None:
        inner, seen, _ = filled
        more, rest = _peeled(inner, masks)
        return call("and", seen, more), rest
    if expr.op == "add" and _addend(expr) is None:  # a mask added to a function that is no sum
        inner, added = expr.args if scored(expr.args[0]) else reversed(expr.args)
        seen, bias = split_sum(added, masks) if not scored(added) else (TRUE, added)
        if bias is None:
            more, rest = _peeled(inner, masks)
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
