"""Running values of blocks of rows, and the names of the nodes that the loop writes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ringpass import kernels, primitives
from ringpass.layout import Ranges
from ringpass.library import empty_rows, join_rows

LABEL = "ringpass_label"
Combine = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


@contextmanager
def label(text: str) -> Iterator[None]:
    """While the loop is traced: the nodes written inside carry `text`, after which the lowered graph names them."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    graph = mode.tracer.graph
    last = next(reversed(graph.nodes), None)
    yield
    for node in reversed(graph.nodes):
        if node is last:
            break
        node.meta.setdefault(LABEL, text)


class Rows:
    """Running values of a block of rows, cut where tiles begin and end, so that each tile touches whole pieces.

    A value is a tuple of tensors with the rows in dim 2.  Run, pieces are views of one tensor of all rows, written in
    place; traced, they are tensors of their own and never written.
    """

    def __init__(self, length: int, spans: Sequence[tuple[int, int]]) -> None:
        cuts = sorted({0, length, *(edge for span in spans for edge in span)})
        self.length, self.starts, self.pieces = length, cuts[:-1], list(pairwise(cuts))
        self.values: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.whole: tuple[Tensor, ...] = ()  # run: what the pieces are views of

    def fold(self, span: tuple[int, int], new: tuple[Tensor, ...], combine: Combine, text: str) -> None:
        """Combines `new`, the values of rows `span`, with what these rows hold; `text` labels the nodes."""
        inside = self.pieces[bisect_left(self.starts, span[0]) : bisect_left(self.starts, span[1])]
        for piece in inside:
            with label(text if len(inside) == 1 else f"{text}_rows{piece[0]}to{piece[1]}"):
                part = tuple(cut(x, (piece[0] - span[0], piece[1] - span[0])) for x in new)
                self.values[piece] = (
                    combine(self.values[piece], part) if piece in self.values else self._kept(piece, part)
                )

    def _kept(self, piece: tuple[int, int], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first values of a piece, which may be written in place from then on."""
        if piece == (0, self.length) or get_proxy_mode() is not None:
            return part
        if not self.whole:
            self.whole = tuple(empty_rows(x, self.length) for x in part)
        views = tuple(cut(x, piece) for x in self.whole)
        for view, x in zip(views, part, strict=True):
            view.copy_(x)
        return views

    def join(self, missing: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """All rows in order; `missing(n)` stands in for n rows that no tile touched."""
        if not self.pieces:
            return missing(0)
        for p in self.pieces:
            if p not in self.values:
                self.values[p] = self._kept(p, missing(p[1] - p[0]))
        if self.whole:
            return self.whole
        parts = [self.values[p] for p in self.pieces]
        return tuple(xs[0] if len(xs) == 1 else join_rows(xs) for xs in zip(*parts, strict=True))


def merge(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if get_proxy_mode() is None:
        (out, lse), (more, more_lse) = old, new
        return kernels.merge(out, lse, more, more_lse, in_place=True)
    return tuple(primitives.merge(*old, *new))


def add(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if get_proxy_mode() is None:
        return tuple(a.add_(b) for a, b in zip(old, new, strict=True))
    return tuple(a + b for a, b in zip(old, new, strict=True))


def fold_runs(into: Rows, runs: Ranges, grads: tuple[Tensor, ...], text: str) -> None:
    """Adds `grads`, whose rows are those `runs` of `into` one after the other."""
    offset = 0
    for start, stop in runs:
        into.fold((start, stop), tuple(cut(x, (offset, offset + stop - start)) for x in grads), add, text)
        offset += stop - start


def cut(x: Tensor, span: tuple[int, int]) -> Tensor:
    """Rows `span` (dim 2) of `x`."""
    return x if span == (0, x.shape[2]) else x.narrow(2, span[0], span[1] - span[0])
