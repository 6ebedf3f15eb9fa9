"""All keys gathered at once, beside the local tiles; those of other ranks are then one block.

    start gathering K and V        one message of each rank, padded to the longest
    the tiles of the local keys
    wait; the tiles of all other keys that the rank uses, those that touch in one kernel call

A rank holds K, V and their gradients at full length: less time for calls and merges than a ring, more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ringpass.kernels.blocks import row_slice
from ringpass.layouts.ranges import Ranges, clipped, rows
from ringpass.ops import boundary, primitives
from ringpass.ops.accumulate import RowAccumulator, add, fold_ranges, label, row_accumulator
from ringpass.ops.transports.base import Served, Transport, zero_block
from ringpass.precision import accumulator
from ringpass.schedule.program import Step, remote_step
from ringpass.schedule.site import Site


class AllGather(Transport):
    """Every rank gathers all keys; one reduce-scatter returns their gradients.  The tiles are those of the ring."""

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        super().__init__(site, k, v)
        layout = site.problem.key_layout
        self.where = (2, 1, site.problem.keys, layout.name, site.world, site.rank, site.group)
        self.gathers = site.world > 1 and not layout.replicated and not site.split
        self.given: list[tuple[Ranges, tuple[Tensor, ...]]] = []
        remote = remote_step(site.problem, site.rank) if self.gathers else None
        self.served = (*site.program.steps[:1], *((remote,) if remote else ()))

    def steps(self, index: int) -> tuple[Step, ...]:
        """The local keys, and all others."""
        return self.served

    @property
    def returned_rows(self) -> Ranges:
        """None: all gradients come at once, in `finish`."""
        return ()

    def blocks(self, backward: bool) -> Iterator[tuple[Served, list[Tensor]]]:
        """The local keys, while all keys are gathered; then the others."""
        arriving = [self._start()] if self.gathers else []
        yield [(0, self.served[0], (self.k, self.v))], arriving
        if arriving:
            with label("wait_keys"):
                message = primitives.wait(arriving[0])
            for step in self.served[1:]:
                with label("take_keys"):
                    block = self._taken(message, step.tokens)
                yield [(0, step, block)], []

    def _lengths(self) -> list[int]:
        layout, keys = self.site.problem.key_layout, self.site.problem.keys
        return [layout.length(rank, keys) for rank in range(self.site.world)]

    def _start(self) -> Tensor:
        """Starts to gather the keys of all ranks, in messages as long as the longest."""
        lengths, own = self._lengths(), self.k.shape[2]
        with label("pack_keys"):
            message = primitives.pack([self.k, self.v], [0, own])
            padding = (max(lengths) - own) * primitives.token_size((self.k, self.v))
            if padding:
                message = torch.cat([message, message.new_zeros(padding)])
        with label("gather_keys"):
            received: Tensor = primitives.start_gather(
                [message], self.site.world, self.merged, f"{self.name} gather_keys", self.site.group
            )[0]
        return received

    def _taken(self, message: Tensor, wanted: Ranges) -> tuple[Tensor, ...]:
        """K and V of the tokens `wanted`, ascending, from what was gathered."""
        lengths, each = self._lengths(), primitives.token_size((self.k, self.v))
        layout, keys = self.site.problem.key_layout, self.site.problem.keys
        parts: dict[int, list[Tensor]] = {}
        for rank, length in enumerate(lengths):
            start = rank * max(lengths) * each
            held = primitives.unpack(message[start : start + length * each], (self.k, self.v), length)
            owned = layout.ranges(rank, keys)
            for first, last in owned:
                for span in (part for a, b in wanted for part in clipped(((first, last),), a, b)):
                    (at,) = rows((span,), owned)
                    parts[span[0]] = [row_slice(x, at) for x in held]
        each_range = [parts[start] for start in sorted(parts)]
        return tuple(torch.cat(found, 2) if len(found) > 1 else found[0] for found in zip(*each_range, strict=True))

    def received_bytes(self, backward: bool) -> int:
        """K and V of all other ranks, each as long as the longest; in a backward again."""
        each = max(self._lengths()) * primitives.token_size((self.k, self.v)) * self.k.itemsize
        return (self.site.world - 1) * each if self.gathers else 0

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        """Keeps the gradients for `finish`."""
        self.given.append((served.pop()[1].tokens, grads[0]))

    def finish(self, local_sums: list[RowAccumulator]) -> None:
        """Reduce-scatters the gradients of all keys."""
        if not self.gathers:
            return
        dtype, spans = accumulator(self.k.dtype), [span for ranges, _ in self.given for span in ranges]
        total = row_accumulator(self.site.problem.keys, dtype, lambda: spans)
        for ranges, grads in self.given:
            fold_ranges(total, ranges, grads, "add_gradients")
        with label("reduce_scatter_gradients"):
            sums = total.join(partial(zero_block, self.k, self.v, dtype))
            home = tuple(boundary.reduce_scatter(x, *self.where) for x in sums)
        local_sums[0].fold((0, self.k.shape[2]), home, add, "add_gradients_home")
