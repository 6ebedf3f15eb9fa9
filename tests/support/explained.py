"""A step of a model on ranks beside its report: what each rank receives, by kind, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import ringpass
from ringpass.comm import collectives, p2p
from ringpass.explain.report import Report
from tests.support.model_parity import compiled
from tests.support.zoo import ZOO
from tests.support.zoo_entry import wide

ATTENTION, BOUNDARIES = "attention", "boundaries"


@contextmanager
def counted(rank: int) -> Iterator[Counter[str]]:
    """Bytes that this rank receives inside: of keys, values and their gradients in exchanges, and by all else.

    Of a sum over ranks, the message that is summed counts.
    """
    found: Counter[str] = Counter()
    start, run, begin = p2p.start, collectives.run_collective, collectives.start_collective

    def counting_start(sent: Tensor, dst: Any, received: Tensor, src: Any, tag: int, name: str) -> p2p.PendingExchange:
        states = sent is received
        found[BOUNDARIES if states else ATTENTION] += received.nbytes if src is not None else 0
        return start(sent, dst, received, src, tag, name)

    def note(collective: Callable[..., Any], out: Tensor, *given: Any) -> None:
        if collective is dist.all_to_all_single:
            found[BOUNDARIES] += (sum(given[1]) - given[1][rank]) * out.itemsize
        elif not given:  # a sum
            found[BOUNDARIES] += out.nbytes
        else:
            found[BOUNDARIES] += max(out.nbytes - given[0].nbytes, 0) or given[0].nbytes

    def counting_run(collective: Any, *args: Any, group: str, what: str) -> None:
        note(collective, *args)
        run(collective, *args, group=group, what=what)

    def counting_begin(collective: Any, *args: Any, group: str, what: str = "") -> dist.Work:
        note(collective, *args)
        return begin(collective, *args, group=group, what=what)

    with (
        patch.object(p2p, "start", counting_start),
        patch.object(collectives, "run_collective", counting_run),
        patch.object(collectives, "start_collective", counting_begin),
    ):
        yield found


def explained(report: Report, phase: str) -> Counter[str]:
    """The same by a report."""
    found: Counter[str] = Counter()
    for graph in report.graphs:
        for site in graph.sites:
            found[ATTENTION] += len(site.indices) * site.rank_received_bytes.get(phase, 0)
        found[BOUNDARIES] += sum(b.bytes for b in graph.boundaries if b.direction == phase and not b.on_use)
    return found


def step_and_report(
    group: dist.ProcessGroup, name: str, length: int, padding: bool = False, **options: Any
) -> dict[str, Any]:
    """By phase, what this rank received and what its report says; and what the report says of all ranks' keys."""
    entry, rank = ZOO[name], group.rank()
    settings = {"compiler": "aot_eager", **options}
    batch = entry.batch(length, entry.labels, padding)
    with wide() if entry.dtype == torch.float64 else nullcontext():
        model = entry.make(entry.attentions[0], True)
        report = ringpass.explain(model, world_size=group.size(), rank=rank, options=settings, **batch)
        run = compiled(model, group, **settings)
        with counted(rank) as forward:
            outputs = run(**batch)
        loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
        with counted(rank) as backward:
            loss.backward()
    sites = [site for graph in report.graphs for site in graph.sites]
    return {
        "counted": {"forward": +forward, "backward": +backward},
        "explained": {phase: +explained(report, phase) for phase in ("forward", "backward")},
        "planned": sum(len(s.indices) * (s.received_bytes or [0] * group.size())[rank] for s in sites),
        "split": any(site.split or site.comm == "allgather" for site in sites),
    }
