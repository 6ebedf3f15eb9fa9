"""Accumulates partial results over blocks of rows, in place while the loop runs and functionally while it is traced."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ringpass.kernels.blocks import empty_rows, join_rows, row_slice
from ringpass.kernels.merge import merge_in_place
from ringpass.layouts.ranges import Ranges
from ringpass.ops import primitives

LABEL = "ringpass_label"
Combine = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


@contextmanager
def label(text: str) -> Iterator[None]:
    """While the loop is traced, nodes that are created inside carry `text`: the lowered graph names them by it."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    graph = mode.tracer.graph
    last = next(iter(reversed(graph.nodes)), None)
    yield
    for node in reversed(graph.nodes):
        if node is last:
            break
        node.meta.setdefault(LABEL, text)


class RowAccumulator:
    """Accumulates values over a block of `length` rows, in one dtype.

    A value is a tuple of tensors with the rows in dim 2.
    """

    def fold(self, span: tuple[int, int], new: tuple[Tensor, ...], combine: Combine, text: str) -> list[Tensor]:
        """Combines `new`, the value of rows `span`, with the value of these rows so far; `text` labels the nodes.

        While the loop is traced, returns tensors that exist once this is done: what was combined, else `new`.
        """
        raise NotImplementedError

    def join(self, missing: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The value of all rows; `missing(n)` gives that of n rows that nothing was folded into."""
        raise NotImplementedError


def row_accumulator(length: int, dtype: torch.dtype, spans: Callable[[], Iterable[tuple[int, int]]]) -> RowAccumulator:
    """An accumulator over `length` rows; `spans()`, those it will be given, is only called when the loop is traced."""
    return _InPlace(length, dtype) if get_proxy_mode() is None else _Traced(length, dtype, spans())


class _InPlace(RowAccumulator):
    """While the loop runs: one tensor of all rows, written in place."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype = length, dtype
        self.values: tuple[Tensor, ...] = ()
        self.edges: list[int] = []  # start, stop, start, stop, .. of the ranges of rows that hold a value

    def fold(self, span: tuple[int, int], new: tuple[Tensor, ...], combine: Combine, text: str) -> list[Tensor]:
        start, stop = span
        if not self.values and span == (0, self.length):
            self.values = tuple(x.to(self.dtype) for x in new)
        else:
            self.values = self.values or tuple(empty_rows(x, self.length, dtype=self.dtype) for x in new)
            first, last = bisect_right(self.edges, start), bisect_left(self.edges, stop)
            for i, piece in enumerate(pairwise([start, *self.edges[first:last], stop]), first):
                part = tuple(row_slice(x, (piece[0] - start, piece[1] - start)) for x in new)
                old = tuple(row_slice(x, piece) for x in self.values)
                if i % 2:
                    combine(old, part)
                else:
                    _copy(old, part)
        low, high = bisect_left(self.edges, start), bisect_right(self.edges, stop)
        self.edges[low:high] = [start] * (low % 2 == 0) + [stop] * (high % 2 == 0)
        return []

    def join(self, missing: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if not self.values:
            return missing(self.length)
        for start, stop in zip([0, *self.edges[1::2]], [*self.edges[::2], self.length], strict=True):
            if start < stop:
                _copy(tuple(row_slice(x, (start, stop)) for x in self.values), missing(stop - start))
        return self.values


def _copy(into: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for old, new in zip(into, values, strict=True):
        old.copy_(new)


class _Traced(RowAccumulator):
    """While the loop is traced: one tensor for each part between edges of spans, none written in place."""

    def __init__(self, length: int, dtype: torch.dtype, spans: Iterable[tuple[int, int]]) -> None:
        self.dtype = dtype
        edges = sorted({0, length, *(edge for span in spans for edge in span)})
        self.starts, self.parts = edges[:-1], list(pairwise(edges))
        self.values: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def fold(self, span: tuple[int, int], new: tuple[Tensor, ...], combine: Combine, text: str) -> list[Tensor]:
        inside = self.parts[bisect_left(self.starts, span[0]) : bisect_left(self.starts, span[1])]
        combined: list[Tensor] = []
        for piece in inside:
            with label(text if len(inside) == 1 else f"{text}_rows{piece[0]}to{piece[1]}"):
                part = tuple(row_slice(x, (piece[0] - span[0], piece[1] - span[0])) for x in new)
                if piece in self.values:
                    self.values[piece] = combine(self.values[piece], part)
                    combined += self.values[piece]
                else:
                    self.values[piece] = tuple(x.to(self.dtype) for x in part)
        return combined or list(new)

    def join(self, missing: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if not self.parts:
            return missing(0)
        parts = [self.values[p] if p in self.values else missing(p[1] - p[0]) for p in self.parts]
        return tuple(xs[0] if len(xs) == 1 else join_rows(xs) for xs in zip(*parts, strict=True))


def merge(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Combines (out, lse) of the same rows by their log-sum-exp; `old` may be overwritten while the loop runs."""
    if get_proxy_mode() is None:
        merge_in_place(*old, *new)
        return old
    return tuple(primitives.merge(*old, *new))


def add(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Combines gradients of the same rows by their sums; `old` may be overwritten while the loop runs."""
    if get_proxy_mode() is None:
        return tuple(a.add_(b) for a, b in zip(old, new, strict=True))
    return tuple(a + b for a, b in zip(old, new, strict=True))


def fold_ranges(into: RowAccumulator, ranges: Ranges, grads: tuple[Tensor, ...], text: str) -> list[Tensor]:
    """Adds gradients, (B, G, n, D) each, whose rows are the concatenated `ranges` of rows of `into`.

    Returns what `RowAccumulator.fold` does.
    """
    offset, combined = 0, list[Tensor]()
    for start, stop in ranges:
        part = tuple(row_slice(x, (offset, offset + stop - start)) for x in grads)
        combined += into.fold((start, stop), part, add, text)
        offset += stop - start
    return combined
