"""Constant arrays, equal on all ranks when a schedule is made: document ids, block lists, padding masks of this call.

    >>> ids = ConstantArray(np.array([0, 0, 0, 1, 1]))
    >>> ids.bounds([(np.array([0, 2]), np.array([2, 3]))])        # of elements 0..2, and of elements 2..3
    (array([0., 0.]), array([0., 1.]))

`bounds` lets them prune a schedule: it gives the smallest and largest element in a box of indices, for many boxes at
once.  Bools are counted from the corners of a summed-area table (Crow 1984).  The extremes of integers are looked up
for each interval of 2**n elements of the last dim (sparse table, Bender and Farach-Colton 2000); an earlier dim counts
in full unless the box fixes its index.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property, reduce
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Array = NDArray[Any]
"""A numpy array of any dtype and number of dims; docstrings say which."""
Interval = tuple[Any, Any]
"""Smallest and largest: two numbers, or two arrays of them, one for each of many boxes."""


def outward(low: Any, high: Any) -> Interval:
    """Float bounds that enclose the integers they stand for: from 2**53 on, a float may be a rounded integer."""
    large = [np.abs(x) >= 2.0**53 for x in (low, high)]
    return np.where(large[0], np.nextafter(low, -np.inf), low), np.where(large[1], np.nextafter(high, np.inf), high)


class DeviceCopies:
    """An array that does not change, with its copies on devices: each is made at its first use there.

    >>> DeviceCopies(np.array([2, 0])).tensor(torch.zeros(3))
    tensor([2, 0])
    """

    def __init__(self, values: Array) -> None:
        self.values = values
        self._copies: dict[torch.device, Tensor] = {}

    def tensor(self, like: Tensor) -> Tensor:
        """The array as a tensor on the device of `like`; a fake one if `like` is fake."""
        if isinstance(like, FakeTensor):
            return like.new_empty(self.values.shape, dtype=torch.from_numpy(self.values[:0]).dtype)
        if like.device not in self._copies:
            with torch.inference_mode(False):  # a backward could not save a tensor of inference mode
                self._copies[like.device] = torch.from_numpy(self.values).to(like.device)
        return self._copies[like.device]


class ConstantArray(DeviceCopies):
    """A constant array of bools or integers; arrays of equal contents are equal, by digest.

    `values`: a tensor, an array or nested lists, of one dim or more.  Raises ValueError for other dtypes, for scalars
    and for empty arrays.
    """

    def __init__(self, values: object) -> None:
        found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if found.dtype.kind not in "bui" or found.ndim < 1 or not found.size:
            raise ValueError(f"expected bools or integers of at least one dim, got {found.dtype} {list(found.shape)}")
        super().__init__(np.array(found, order="C"))  # a copy: the tensor may be written to later
        about = f"{self.values.dtype}{self.values.shape}".encode()
        self.digest = hashlib.blake2b(about + self.values.tobytes(), digest_size=6).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConstantArray) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"ConstantArray({self.digest}, {self.values.dtype}{list(self.values.shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dims."""
        return self.values.shape

    def bounds(self, indices: Sequence[Interval]) -> Interval:
        """(smallest, largest) element for closed intervals of indices, one per dim, clipped to the size of the dim.

        A negative index counts from the end, so a box that may hold one is unbounded.
        """
        inside = reduce(np.logical_and, (np.asarray(low) >= 0 for low, _ in indices))
        clipped = [
            tuple(np.clip(x, 0, n - 1).astype(np.int64) for x in span)
            for span, n in zip(indices, self.shape, strict=True)
        ]
        low, high = outward(*(self._truth(clipped) if self.values.dtype == bool else self._extremes(clipped)))
        return np.where(inside, low, -np.inf), np.where(inside, high, np.inf)

    def _truth(self, spans: Sequence[Interval]) -> Interval:
        total: Any = 0
        for corner in product((0, 1), repeat=len(spans)):
            at = tuple(high + 1 if end else low for end, (low, high) in zip(corner, spans, strict=True))
            total = total + (-1) ** (len(spans) - sum(corner)) * self._sums[at]
        size = reduce(np.multiply, (high - low + 1 for low, high in spans))
        return (total == size) * 1.0, (total > 0) * 1.0

    @cached_property
    def _sums(self) -> Array:
        sums: Array = np.pad(self.values.astype(np.int64), [(1, 0)] * self.values.ndim)
        for dim in range(sums.ndim):
            np.cumsum(sums, axis=dim, out=sums)
        return sums

    def _extremes(self, spans: Sequence[Interval]) -> Interval:
        *outer, (low, high) = spans
        lead = self.shape[:-1]
        rows = math.prod(lead)
        fixed = reduce(np.logical_and, (a == b for a, b in outer), np.asarray(True))
        row = np.where(fixed, np.ravel_multi_index(tuple(a for a, _ in outer), lead) if lead else 0, rows)
        level = np.frexp(high - low + 1)[1].astype(np.int64) - 1
        last = high - (1 << level) + 1
        found = []
        for tables, choose in zip(self._range_tables, (np.minimum, np.maximum), strict=True):
            found.append(choose(tables[level, row, low], tables[level, row, last]).astype(float))
        return found[0], found[1]

    @cached_property
    def _range_tables(self) -> tuple[Array, Array]:
        """[level, row, i]: the least (greatest) of elements i to i + 2**level - 1; the last row is that of all rows."""
        flat = self.values.reshape(-1, self.shape[-1])
        flat = flat.astype(np.result_type(np.min_scalar_type(flat.min()), np.min_scalar_type(flat.max())))
        tables = []
        for choose in (np.minimum, np.maximum):
            levels = [np.concatenate([flat, choose.reduce(flat, axis=0)[None]])]
            step = 1
            while 2 * step <= flat.shape[1]:
                levels.append(levels[-1].copy())
                choose(levels[-2][:, :-step], levels[-2][:, step:], out=levels[-1][:, :-step])
                step *= 2
            tables.append(np.stack(levels))
        return tables[0], tables[1]
