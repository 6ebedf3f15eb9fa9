"""Block-sparse patterns: which keys a query may attend to, as a small algebra.

    >>> pattern = causal() & (window(3) | sink(1))
    >>> print(pattern)
    k <= q & (q - k < 4 | k < 1)
    >>> pattern(q=7, k=0), pattern(q=7, k=3), pattern(q=7, k=4)
    (True, False, True)

    run = torch.compile(model, backend="ring_dilated", options={"mask": causal() & window(4095)})

A pattern is ANDed with the model's own mask.  q and k are positions in the model's original order of tokens, 0 to
S - 1; b is the batch element, h the query head.  `&`, `|` and `~` combine patterns; `from_function` takes a function.
What a pattern leaves out is neither computed nor sent, tile by tile.

Patterns made of arrays (document ids, block lists) are for one length.  Every rank must pass the same arrays; their
digests are compared before the first step.

All sizes and lengths are in tokens.  Each function raises OptionError for a number that is not an int, is negative (or
0, where that makes no sense), or is 2**40 or more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringpass.errors import OptionError
from ringpass.masks.constants import Array
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import FALSE, TRUE, B, Const, Expr, H, K, Q, call, parse, table, tables
from ringpass.masks.intervals import bounds
from ringpass.masks.simplify import simplify
from ringpass.nodes import hint_of

Values = Tensor | Array | Sequence[Any]  # what numpy takes as an array
MOST = 2**40  # tokens; longer than any sequence, and exact in all arithmetic
MOST_BLOCKS = 2**14  # for each pair of which `random_blocks` draws a number


@dataclass(frozen=True)
class Pattern:
    """A boolean expression over b, h, q and k, made by the functions of this module.

    `tokens`: the only length S that it fits; None: any.  Combining patterns for different lengths raises OptionError.
    """

    expr: Expr
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.expr, Expr):
            raise OptionError(
                f"a Pattern is made by the functions of ringpass.patterns, such as causal() and window(4095), or by "
                f"from_function(lambda b, h, q, k: k <= q), not of {self.expr!r}"
            )
        if self.tokens is not None:
            _natural("tokens", self.tokens)

    def __and__(self, other: Pattern) -> Pattern:
        return self._with(other, "and")

    def __or__(self, other: Pattern) -> Pattern:
        return self._with(other, "or")

    __rand__, __ror__ = __and__, __or__  # reached for what is no pattern, which `_with` refuses

    def __invert__(self) -> Pattern:
        return Pattern(simplify(call("not", self.expr)), self.tokens)

    def __str__(self) -> str:
        return str(self.expr)

    def __call__(self, q: int, k: int, b: int = 0, h: int = 0) -> bool:
        """Whether query `q` may attend to key `k`, in batch element `b` and query head `h`."""
        for name, n in zip("bhqk", (b, h, q, k), strict=True):
            _natural(name, n)
        at = {name: torch.tensor(n).view(1, 1, 1, 1) for name, n in zip("bhqk", (b, h, q, k), strict=True)}
        return bool(evaluate(self.expr, at, []))

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raises OptionError unless the pattern fits an attention of `queries` x `keys` tokens with these dims."""
        if self.tokens is not None and (queries, keys) != (self.tokens, self.tokens):
            raise OptionError(
                f"the option 'mask' is for {self.tokens} tokens, and the attention has {hint_of(queries)} queries and "
                f"{hint_of(keys)} keys: make the pattern for this length"
            )
        for entry in tables(self.expr):
            box = {name: (0.0, int(n) - 1.0) for name, n in zip("bhqk", (batch, heads, queries, keys), strict=True)}
            for index, n in zip(entry.indices, entry.array.shape, strict=True):
                low, high = bounds(index, box)
                if low < -n or high >= n or (index in (B, H) and high != n - 1):
                    raise OptionError(
                        f"the option 'mask' holds an array of shape {list(entry.array.shape)} that is read at {index} "
                        f"from {low:g} to {high:g}, for {batch} batch elements, {heads} heads, {queries} queries and "
                        f"{keys} keys: give an array that fits"
                    )

    def _with(self, other: object, op: str) -> Pattern:
        if not isinstance(other, Pattern):
            raise OptionError(
                f"a pattern combines with a pattern, not with {type(other).__name__}: see ringpass.patterns"
            )
        lengths = {n for n in (self.tokens, other.tokens) if n is not None}
        if len(lengths) > 1:
            raise OptionError(
                f"patterns for {' and for '.join(map(str, sorted(lengths)))} tokens contradict each other"
            )
        return Pattern(simplify(call(op, self.expr, other.expr)), *lengths)


def _pattern(text: str) -> Pattern:
    return Pattern(simplify(parse(text)))


def _natural(name: str, value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < MOST:
        raise OptionError(f"{name} must be an int of at least {least} and below 2**40, got {value!r}")
    return value


def everything() -> Pattern:
    """Every query may attend to every key: the default of the option `mask`."""
    return Pattern(TRUE)


def nothing() -> Pattern:
    """No query may attend to any key: the neutral element of `|`."""
    return Pattern(FALSE)


def causal() -> Pattern:
    """Each query sees itself and all tokens before it.

    >>> print(causal())
    k <= q
    """
    return _pattern("k <= q")


def window(before: int, after: int | None = None) -> Pattern:
    """At most `before` tokens back and `after` ahead; with `after` None no limit ahead (combine with `causal`).

    >>> print(causal() & window(4095))
    k <= q & q - k < 4096
    """
    back = _pattern(f"q - k <= {_natural('before', before)}")
    return back if after is None else back & _pattern(f"k - q <= {_natural('after', after)}")


def dilated_window(count: int, rate: int) -> Pattern:
    """Every `rate`-th token on both sides, `count` of them on each.

    >>> [k for k in range(12) if dilated_window(2, rate=3)(q=6, k=k)]
    [0, 3, 6, 9]
    """
    _natural("rate", rate, 1)
    reach = _natural("count", count) * rate
    return window(reach, reach) & _pattern(f"q % {rate} == k % {rate}")


def sink(tokens: int) -> Pattern:
    """The first `tokens` keys, for every query (attention sinks).

    >>> print(causal() & (window(3) | sink(1)))
    k <= q & (q - k < 4 | k < 1)
    """
    return _pattern(f"k < {_natural('tokens', tokens, 1)}")


def global_tokens(tokens: int) -> Pattern:
    """The first `tokens` tokens see all and are seen by all (Longformer, BigBird).

    >>> print(causal() & window(2) | global_tokens(1))
    k <= q & q - k < 3 | k < 1 | q < 1
    """
    return sink(tokens) | _pattern(f"q < {_natural('tokens', tokens, 1)}")


def prefix(tokens: int) -> Pattern:
    """Causal, except for a prefix of `tokens` tokens that all see each other (prefix-LM).

    >>> pattern = prefix(4)
    >>> pattern(q=1, k=3), pattern(q=1, k=4)
    (True, False)
    """
    return causal() | sink(tokens) if _natural("tokens", tokens) else causal()


def block_causal(block: int) -> Pattern:
    """Causal by blocks of `block` tokens: each query sees all of its block and all earlier blocks.

    >>> [k for k in range(9) if block_causal(3)(q=4, k=k)]
    [0, 1, 2, 3, 4, 5]
    """
    return _pattern(f"k // {_natural('block', block, 1)} <= q // {block}")


def strided(stride: int) -> Pattern:
    """Sparse Transformer, strided: the last `stride` tokens, and every `stride`-th one before.

    >>> [k for k in range(12) if strided(4)(q=9, k=k)]
    [1, 5, 6, 7, 8, 9]
    """
    return causal() & (window(_natural("stride", stride, 1) - 1) | _pattern(f"(q - k) % {stride} == 0"))


def fixed(block: int, summary: int) -> Pattern:
    """Sparse Transformer, fixed: the query's block, and the last `summary` tokens of every block, causal.

    >>> [k for k in range(12) if fixed(4, summary=1)(q=9, k=k)]
    [3, 7, 8, 9]

    Raises OptionError if `summary` is larger than `block`.
    """
    if _natural("summary", summary, 1) > _natural("block", block, 1):
        raise OptionError(f"summary must be at most the block, got {summary} of {block}")
    return causal() & (_pattern(f"q // {block} == k // {block}") | _pattern(f"k % {block} >= {block - summary}"))


def documents(
    lengths: Sequence[int] | None = None, *, cu_seqlens: Values | None = None, ids: Values | None = None
) -> Pattern:
    """Documents packed into one sequence: each token sees its own document (combine with `causal`).

    >>> print(causal() & documents([3, 5]))
    k <= q & bucket(k, 3) == bucket(q, 3)

    Either the `lengths` of the documents, in tokens; or `cu_seqlens`, where they begin and the last one ends:
    [0, 3, 8]; or `ids`, the document of each token, ints of shape (S,) or (B, S), in any order.
    Raises OptionError unless exactly one of them is given, for a length below 1, or for an array of another shape.
    """
    given = [x for x in (lengths, cu_seqlens, ids) if x is not None]
    if len(given) != 1:
        raise OptionError(f"documents takes one of lengths, cu_seqlens and ids, got {len(given)} of them")
    if ids is not None:
        return _documents_of(_array("ids", ids, "(S,) or (B, S)", (1, 2)))
    if cu_seqlens is not None:
        starts = _array("cu_seqlens", cu_seqlens, "(documents + 1,)", (1,))
        if starts[0] != 0:
            raise OptionError(f"cu_seqlens begins with 0, got {starts[0]}")
        return documents(np.diff(starts).tolist())
    if not isinstance(lengths, Sequence) or isinstance(lengths, str) or not lengths:
        raise OptionError(f"documents takes a list of the lengths of at least one document, got {lengths!r}")
    for length in lengths:
        _natural("each length", length, 1)
    *ends, total = accumulate(lengths)
    q, k = (f"bucket({x}, {', '.join(map(str, ends))})" for x in "qk")
    return Pattern(_pattern(f"{q} == {k}").expr if ends else TRUE, total)


def _documents_of(ids: Array) -> Pattern:
    """Contiguous documents, equal in all rows, have a closed form; others become a table."""
    rows = np.atleast_2d(ids)
    edges = np.flatnonzero(np.diff(rows[0])) + 1
    if (rows == rows[0]).all():
        if len(np.unique(rows[0])) == len(edges) + 1:
            return documents(np.diff([0, *edges, rows.shape[1]]).tolist())
        rows = rows[:1]
    values, lead = (rows[0], ()) if len(rows) == 1 else (rows, (B,))
    q, k = (table(values, *lead, at) for at in (Q, K))
    return Pattern(call("eq", q, k), rows.shape[1])


def blocks(listed: Values, size: int) -> Pattern:
    """The pairs in the listed blocks of `size` x `size` tokens: `listed[.., q // size, k // size]`.

    >>> pattern = blocks([[True, False], [True, True]], size=4)
    >>> pattern(q=3, k=4), pattern(q=4, k=0)
    (False, True)

    `listed`: bools of shape (Nq, Nk); or (H, Nq, Nk), a list for each query head; or (B, H, Nq, Nk).
    Raises OptionError for an array of another shape or dtype.
    """
    _natural("size", size, 1)
    array = _array("listed", listed, "(Nq, Nk), (H, Nq, Nk) or (B, H, Nq, Nk)", (2, 3, 4), bool)
    lead = [Const(0) if n == 1 else i for n, i in zip(array.shape[:-2], (B, H)[4 - array.ndim :], strict=True)]
    at = [call("floordiv", x, Const(size)) if size > 1 else x for x in (Q, K)]
    return Pattern(simplify(table(array, *lead, *at)))


def random_blocks(tokens: int, size: int, count: int, seed: int = 0, heads: int = 1) -> Pattern:
    """Each block of `size` queries sees `count` blocks of keys, drawn without replacement (BigBird).

    >>> pattern = random_blocks(tokens=16, size=4, count=2)
    >>> sum(pattern(q=0, k=k) for k in range(16))
    8

    For a sequence of `tokens` tokens.  Equal on every rank and machine for equal `seed`.  `heads` above 1: drawn
    separately for each query head.  Raises OptionError if there are fewer than `count` blocks.
    """
    wide = -(-_natural("tokens", tokens, 1) // _natural("size", size, 1))
    if wide > MOST_BLOCKS:
        raise OptionError(
            f"random_blocks draws for each pair of at most {MOST_BLOCKS} blocks, got {wide}: make them larger"
        )
    if not 1 <= _natural("count", count, 1) <= wide:
        raise OptionError(f"count must be at most the {wide} blocks that there are, got {count}")
    generator = torch.Generator().manual_seed(_natural("seed", seed))
    drawn = torch.rand(_natural("heads", heads, 1), wide, wide, generator=generator, dtype=torch.float64)
    listed = torch.zeros(drawn.shape, dtype=torch.bool).scatter(-1, drawn.argsort(-1)[..., :count], True)
    return Pattern(blocks(listed, size).expr, tokens)


def _array(name: str, values: Values, shapes: str, dims: tuple[int, ...], dtype: type = int) -> Array:
    try:
        found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, sparse, without data, or of a dtype of torch alone
        raise OptionError(f"{name} must be {dtype.__name__}s of shape {shapes}, got {values!r}: {error}") from error
    kinds = "b" if dtype is bool else "iu"
    if found.ndim not in dims or found.dtype.kind not in kinds or not found.size:
        raise OptionError(f"{name} must be {dtype.__name__}s of shape {shapes}, got {found.dtype} {list(found.shape)}")
    return found


def grid_window(sizes: Sequence[int], radius: int, skip: int = 0) -> Pattern:
    """Tokens of an (H, W) or (T, H, W) grid, in row-major order, that are at most `radius` apart in every direction.

    >>> [k for k in range(12) if grid_window((3, 4), radius=1)(q=0, k=k)]
    [0, 1, 4, 5]

    `sizes`: of the grid, in tokens.  The first `skip` tokens are not on the grid: they see all and are seen by all.
    Raises OptionError unless the grid has one to three sizes of at least 1.
    """
    if not isinstance(sizes, Sequence) or not 1 <= len(sizes) <= 3:
        raise OptionError(f"a grid has one to three sizes, got {sizes!r}")
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
    """The pattern of a function `allowed(b, h, q, k)`, as FlexAttention takes it for a mask_mod.

    >>> print(from_function(lambda b, h, q, k: (k <= q) & (q - k < 16)))
    k <= q & q - k < 16

    The function consists of comparisons and arithmetic on its four indices, and may read tensors of bools or integers
    that it captures, at these indices: `ids[q] == ids[k]`.
    Raises OptionError if it takes other arguments, branches on them, is not elementwise, or does not return a bool.
    """
    from ringpass.masks.from_function import scalar_function

    try:
        signature = inspect.signature(allowed)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"from_function takes a Python function of (b, h, q, k), such as lambda b, h, q, k: k <= q, got {allowed!r}"
        ) from error
    try:
        signature.bind(0, 0, 0, 0)
    except TypeError as error:
        raise OptionError(f"a mask function takes (b, h, q, k), this one takes {signature}") from error
    return Pattern(simplify(scalar_function(allowed)))
