"""Block-sparse patterns: which keys a query may attend to, as a small algebra.

    >>> pattern = causal() & (window(3) | sink(1))
    >>> print(pattern)
    k <= q & (q - k < 4 | k < 1)
    >>> pattern(q=7, k=0), pattern(q=7, k=3), pattern(q=7, k=4)
    (True, False, True)

    run = torch.compile(model, backend="ring_dilated", options={"mask": causal() & window(4095)})

A pattern is ANDed with the model's own mask.  Positions are those of the model's own order, 0 to S - 1; b is the batch
element, h the query head.  `&`, `|` and `~` combine patterns; `from_function` takes a function.
Tiles that a pattern leaves empty are neither computed nor sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch

from ringpass.closed_form import simplify
from ringpass.errors import OptionError
from ringpass.mask import FALSE, TRUE, Expr, call, evaluate, parse

MOST = 2**40  # tokens; longer than any sequence, and exact in all arithmetic


@dataclass(frozen=True)
class Pattern:
    """A boolean expression over b, h, q and k."""

    expr: Expr

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(simplify(call("and", self.expr, _expr(other))))

    def __or__(self, other: Pattern) -> Pattern:
        return Pattern(simplify(call("or", self.expr, _expr(other))))

    def __invert__(self) -> Pattern:
        return Pattern(simplify(call("not", self.expr)))

    def __str__(self) -> str:
        return str(self.expr)

    def __call__(self, q: int, k: int, b: int = 0, h: int = 0) -> bool:
        """Whether query `q` may attend to key `k`."""
        at = {name: torch.tensor(n).view(1, 1, 1, 1) for name, n in zip("bhqk", (b, h, q, k), strict=True)}
        return bool(evaluate(self.expr, at, []))


def _expr(other: object) -> Expr:
    if not isinstance(other, Pattern):
        raise OptionError(f"a pattern combines with a pattern, not with {type(other).__name__}: see ringpass.patterns")
    return other.expr


def _pattern(text: str) -> Pattern:
    return Pattern(simplify(parse(text)))


def _natural(name: str, value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < MOST:
        raise OptionError(f"{name} must be an int of at least {least} and below 2**40, got {value!r}")
    return value


def everything() -> Pattern:
    """Every pair."""
    return Pattern(TRUE)


def nothing() -> Pattern:
    """No pair."""
    return Pattern(FALSE)


def causal() -> Pattern:
    """Each query sees itself and what came before."""
    return _pattern("k <= q")


def window(before: int, after: int | None = None) -> Pattern:
    """At most `before` tokens back and `after` ahead; with `after` None no limit ahead (combine with `causal`)."""
    back = _pattern(f"q - k <= {_natural('before', before)}")
    return back if after is None else back & _pattern(f"k - q <= {_natural('after', after)}")


def dilated_window(count: int, rate: int) -> Pattern:
    """Every `rate`-th token on both sides, `count` of them on each."""
    _natural("rate", rate, 1)
    reach = _natural("count", count) * rate
    return window(reach, reach) & _pattern(f"q % {rate} == k % {rate}")


def sink(tokens: int) -> Pattern:
    """The first `tokens` keys, for every query (attention sinks)."""
    return _pattern(f"k < {_natural('tokens', tokens, 1)}")


def global_tokens(tokens: int) -> Pattern:
    """The first `tokens` see all and are seen by all (Longformer, BigBird)."""
    return sink(tokens) | _pattern(f"q < {_natural('tokens', tokens, 1)}")


def prefix(tokens: int) -> Pattern:
    """Causal, but for a prefix of `tokens` whose tokens all see each other (prefix-LM)."""
    return causal() | sink(tokens) if tokens else causal()


def block_causal(block: int) -> Pattern:
    """Causal by blocks: each query sees its own block whole, and all blocks before."""
    return _pattern(f"k // {_natural('block', block, 1)} <= q // {block}")


def strided(stride: int) -> Pattern:
    """Sparse Transformer, strided: the last `stride` tokens, and every `stride`-th one before."""
    return causal() & (window(_natural("stride", stride, 1) - 1) | _pattern(f"(q - k) % {stride} == 0"))


def fixed(block: int, summary: int) -> Pattern:
    """Sparse Transformer, fixed: the own block, and the last `summary` tokens of every block."""
    if _natural("summary", summary, 1) > _natural("block", block, 1):
        raise OptionError(f"summary must be at most the block, got {summary} of {block}")
    return causal() & (_pattern(f"q // {block} == k // {block}") | _pattern(f"k % {block} >= {block - summary}"))


def documents(lengths: Sequence[int]) -> Pattern:
    """Documents packed one after the other: each token sees its own document (combine with `causal`).

    >>> print(causal() & documents([3, 5]))
    k <= q & bucket(k, 3) == bucket(q, 3)

    `lengths` add up to S; tokens beyond would belong to the last document.
    """
    if not len(lengths):
        raise OptionError("documents takes the lengths of at least one document")
    for length in lengths:
        _natural("each length", length, 1)
    ends = [*accumulate(lengths)][:-1]
    q, k = (f"bucket({x}, {', '.join(map(str, ends))})" for x in "qk")
    return _pattern(f"{q} == {k}") if len(lengths) > 1 else everything()


def grid_window(sizes: Sequence[int], radius: int, skip: int = 0) -> Pattern:
    """Tokens of an (H, W) or (T, H, W) grid, in row-major order, that are at most `radius` apart in every direction.

    The first `skip` tokens are not on the grid: they see all and are seen by all.
    """
    if not 1 <= len(sizes) <= 3:
        raise OptionError(f"a grid has one to three sizes, got {list(sizes)}")
    for size in sizes:
        _natural("each size of the grid", size, 1)
    _natural("radius", radius)
    q, k = (f"({x} - {_natural('skip', skip)})" if skip else x for x in "qk")
    parts, stride = [], 1
    for size in reversed(sizes):
        i, j = (f"({f'{x} // {stride}' if stride > 1 else x}) % {size}" for x in (q, k))
        parts.append(_pattern(f"abs({i} - {j}) <= {radius}"))
        stride *= size
    near: Pattern = reduce(Pattern.__and__, parts)
    return near | global_tokens(skip) if skip else near


def from_function(allowed: Callable[..., Any]) -> Pattern:
    """Any `mask_mod(b, h, q, k)` made of comparisons and arithmetic on its four indices.

    >>> print(from_function(lambda b, h, q, k: (k <= q) & (q - k < 16)))
    k <= q & q - k < 16

    Raises OptionError where the function captures tensors, branches on its arguments or is not elementwise.
    """
    from ringpass.passes.detect import scalar_function

    signature = inspect.signature(allowed)
    try:
        signature.bind(0, 0, 0, 0)
    except TypeError as error:
        raise OptionError(f"a mask function takes (b, h, q, k), this one takes {signature}") from error
    return Pattern(simplify(scalar_function(allowed)))
