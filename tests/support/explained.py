"""A step of a model on ranks beside its report: what each rank receives, node by node, forward and backward.

found = step_and_report(group, "bamba", 23)          # a job for `Workers`
assert found["explained"] == found["counted"]
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import ringpass
from ringpass.comm import collectives, p2p
from ringpass.explain.report import Report
from ringpass.explain.traffic import site_number
from ringpass.passes.lower import codegen
from tests.support.model_parity import compiled
from tests.support.models import loss_of
from tests.support.traffic_models import MODELS
from tests.support.zoo import ZOO
from tests.support.zoo_entry import wide
from tests.support.zoo_parity import named_tensors

ATTENTION, OUTPUTS = "attention", "outputs"
"""Places that are no nodes: what an attention receives in all its steps, and outputs that are read in full."""
Received = Counter[tuple[int, str, str]]
"""Bytes by number of the graph, phase, and node or place: "attention 3", "halo_1"."""


class Counting:
    """Counts what this rank receives, by the node that runs; of a sum over ranks, the message that is summed."""

    def __init__(self, rank: int) -> None:
        self.rank, self.found, self.running = rank, Received(), (-1, "", OUTPUTS)
        self.phases: dict[GraphModule, tuple[int, str]] = {}
        self.numbers = itertools.count()

    def add(self, received: int) -> None:
        """Adds to what runs now."""
        self.found[self.running] += received

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Counts in what is compiled and run inside."""
        start, run, begin = p2p.start, collectives.run_collective, collectives.start_collective
        aot_eager = codegen.aot_eager

        def counting_start(sent: Tensor, dst: Any, received: Tensor, src: Any, *args: Any) -> p2p.PendingExchange:
            self.add(received.nbytes if src is not None else 0)
            return start(sent, dst, received, src, *args)

        def counting_run(collective: Any, *args: Any, **how: Any) -> None:
            self.add(self.of(collective, *args))
            run(collective, *args, **how)

        def counting_begin(collective: Any, *args: Any, **how: Any) -> dist.Work:
            self.add(self.of(collective, *args))
            return begin(collective, *args, **how)

        def numbered(gm: GraphModule, inputs: Any, unroll_limit: int, left: int, show: Any) -> Any:
            number = next(self.numbers)

            def shown(stage: str, graph: GraphModule) -> None:
                self.phases[graph] = number, stage
                show(stage, graph)

            return aot_eager(gm, inputs, unroll_limit, left, shown)

        def by_node(forward: Any) -> Any:
            return make_boxed_func(ByNode(forward.__self__, self).run)

        with (
            patch.object(p2p, "start", counting_start),
            patch.object(collectives, "run_collective", counting_run),
            patch.object(collectives, "start_collective", counting_begin),
            patch.object(codegen, "aot_eager", numbered),
            patch.object(codegen, "make_boxed_func", by_node),
        ):
            yield

    def of(self, collective: Callable[..., Any], out: Tensor, *given: Any) -> int:
        """What a collective receives, or the message of a sum."""
        if collective is dist.all_to_all_single:
            rows = int(sum(given[1]))
            return out.nbytes * int(rows - given[1][self.rank]) // max(1, rows)
        if not given:  # a sum
            return out.nbytes
        return max(out.nbytes - given[0].nbytes, 0) or int(given[0].nbytes)


class ByNode(Interpreter):
    """Runs a lowered graph, and tells which node of it runs."""

    def __init__(self, graph: GraphModule, counting: Counting) -> None:
        super().__init__(graph)
        self.counting, self.place = counting, counting.phases[graph]

    def run_node(self, n: Node) -> Any:
        """As the interpreter does."""
        site = site_number(n)
        before, name = self.counting.running, n.name if site is None else f"{ATTENTION} {site}"
        self.counting.running = *self.place, name
        try:
            return super().run_node(n)
        finally:
            self.counting.running = before


def explained(report: Report) -> Received:
    """The same by a report."""
    found = Received()
    for graph in report.graphs:
        for site in graph.sites:
            for index, (phase, received) in itertools.product(site.indices, site.rank_received_bytes.items()):
                found[graph.index, phase, f"{ATTENTION} {index}"] += received
        for boundary in graph.boundaries:
            place = (-1, "", OUTPUTS) if boundary.on_use else (graph.index, boundary.direction, boundary.name)
            found[place] += boundary.bytes
    return +found


def step_and_report(
    group: dist.ProcessGroup, name: str, length: int, padding: bool = False, **options: Any
) -> dict[str, Any]:
    """What this rank received and what its report says; what it says of keys, and what kinds."""
    rank, settings = group.rank(), {"compiler": "aot_eager", **options}
    entry: Any = MODELS.get(name) or ZOO[name]
    batch = entry.batch(length, entry.labels, padding)
    with wide() if entry.dtype == torch.float64 else nullcontext():
        model = entry.make(entry.attentions[0], True)
        report = ringpass.explain(model, world_size=group.size(), rank=rank, options=settings, **batch)
        counting = Counting(rank)
        with counting.patched():
            outputs = compiled(model, group, **settings)(**batch)
            (outputs if isinstance(outputs, Tensor) else loss_of(outputs)).backward()
            for _, output in named_tensors(outputs, ""):
                output.detach() + 0  # reads all of it
    sites = [site for graph in report.graphs for site in graph.sites]
    kinds = {b.kind for graph in report.graphs for b in graph.boundaries}
    for site in sites:
        kinds |= {s for s, there in (("split", site.split), (site.comm, True), ("degree", site.degree > 1)) if there}
    return {
        "counted": +counting.found,
        "explained": explained(report),
        "planned": sum(len(s.indices) * (s.received_bytes or [0] * group.size())[rank] for s in sites),
        "kinds": kinds,
    }
