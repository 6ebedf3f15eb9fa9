"""How much activation memory does a rank need? Peak memory of one training step, by the profiler's record.

    python -m benchmarks.memory --ranks 1 2 3 4 5 6 7 8 --length 8192 [--checkpoint]

The largest peak of any of P ranks, against the peak of plain Inductor on one process: a GPT-2 without dropout, forward
and backward; with ``--checkpoint``, activation checkpointing of each layer in both. The measurement itself, for other
programs:

>>> peak_bytes(lambda: model(**batch).loss.backward(), kept=lambda: [p.grad for p in model.parameters()])
123456789

Counted: what the step allocates, at the moment when most of it is alive. Not counted: whatever was alive before the
step (parameters, optimiser state, older gradients), and the tensors named by ``kept`` from their allocation on
(gradients that the step makes).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpt2 import gpt2
from benchmarks.paired import Case, against, arguments, collect, conclude, on_ranks, screen

BOUND, BOUND_RANKS = 1.15, 4  # of 1/P
MIB = 2**20
QUICK = {"ranks": [2], "length": 256, "width": 32, "layers": 1, "compiler": "aot_eager"}


class Allocation(NamedTuple):
    """One event of an allocator: ``size`` bytes taken (> 0) or given back (< 0)."""

    time: int
    address: int
    size: int


def peak_bytes(
    step: Callable[[], object],
    kept: Callable[[], Iterable[torch.Tensor | None]] = tuple,
    device: str = "cpu",
) -> int:
    """Run ``step`` once (compile it before) and return the peak of its own live allocations on ``device``."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
    events = sorted(_allocations(profiler, device))
    return _peak(events, {t.untyped_storage().data_ptr() for t in kept() if t is not None})


def _allocations(profiler: Any, device: str) -> Iterator[Allocation]:
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            record = event.extra_fields
            if record.device.type == device:
                yield Allocation(event.start_time_ns, record.ptr, record.alloc_size)


def _peak(events: list[Allocation], kept: set[int]) -> int:
    """Peak of the bytes in ``own``.

    The profiler does not see a free on a thread of someone else's (a collective's); such memory counts until its
    address is given out again. So the peak may come out too high, never too low.
    """
    last = {event.address: i for i, event in enumerate(events) if event.address in kept and event.size > 0}
    own: dict[int, int] = {}
    live = peak = 0
    for i, event in enumerate(events):
        live -= own.pop(event.address, 0)
        if event.size > 0 and last.get(event.address) != i:  # the last allocation at its address is the kept tensor
            own[event.address] = event.size
            live += event.size
        peak = max(peak, live)
    return peak


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    runs = [(1, False), *((ranks, True) for ranks in args.ranks)]
    messages = (message for ranks, ring in runs for message in on_ranks(ranks, job, args, ring))
    cases = collect(screen(), "activation memory", 1 + len(args.ranks), messages)
    one = max(cases[0].facts["bytes"])
    for case in cases:
        case.facts["of 1/P"] = max(case.facts["bytes"]) * case.case["ranks"] / one
    name = "memory_checkpoint" if args.checkpoint else "memory"
    conclude(screen(), name, args, _table(cases, one), cases, _verdict(cases[1:]))


def job(args: argparse.Namespace, ring: bool) -> Iterator[Any]:
    """On each rank: the peak of the second step, in bytes."""
    from ringpass.logging_calls import skip_logging_calls

    ranks = dist.get_world_size()
    yield f"P = {ranks}" if ring else "one process"
    skip_logging_calls()  # one graph for plain Inductor too
    model = gpt2(args.length, args.width, args.layers)
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"compiler": args.compiler}
    how: dict[str, Any] = {"backend": "ring_dilated", "options": options} if ring else {"backend": args.compiler}
    run: Any = torch.compile(model, **how)
    ids = torch.randint(0, 256, (1, args.length))

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()

    step()  # compiles, and makes the gradients
    mine = peak_bytes(step, kept=lambda: [p.grad for p in model.parameters()])
    peaks: list[int] = [0] * ranks
    dist.all_gather_object(peaks, mine)
    name = f"ring_dilated, {args.compiler}" if ring else f"plain {args.compiler}"
    yield Case({"ranks": ranks, "program": name}, facts={"bytes": peaks})


def _table(cases: Sequence[Case], one: int) -> Table:
    title = "peak activation memory of a rank"
    table = Table("P", "program", "largest, MiB", "smallest, MiB", "of one process", "of 1/P", title=title)
    for case in cases:
        peaks = case.facts["bytes"]
        sizes = f"{max(peaks) / MIB:.1f}", f"{min(peaks) / MIB:.1f}", f"{max(peaks) / one:.3f}"
        table.add_row(str(case.case["ranks"]), case.case["program"], *sizes, f"{case.facts['of 1/P']:.3f}")
    return table


def _verdict(cases: Sequence[Case]) -> str:
    found = {case.case["ranks"]: case.facts["of 1/P"] for case in cases}
    ranks = BOUND_RANKS if BOUND_RANKS in found else max(found)
    value = against(found[ranks], BOUND, at_least=False)
    return f"peak activation memory at P={ranks}, times P, over that of one process: {value}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(range(1, 9)), metavar="P")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--checkpoint", action="store_true", help="recompute the layers in the backward")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"], help="of both")
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
