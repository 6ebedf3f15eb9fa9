"""Are transfers hidden behind the tiles?

    python -m benchmarks.overlap --shapes 16x8192 128x1024

Non-causal ring attention on 2 ranks, one thread each: one full tile per step, and K and V of all local tokens travel as
one message of heads x tokens x 64 x 2 floats (64 MiB by default). Each round times, forward and backward:

    ring        as it is: an exchange starts before the tile that it overlaps, and is waited for after it
    compute     the same tiles; each exchange hands back, at once, a buffer of its size that is already there
    transfer    the same exchanges and waits in the same order, and no tile
    no overlap  the ring, but each exchange is waited for where it starts

The bound is on ring / max(compute, transfer). Then one more ring is recorded, event by event: overlap.trace.json beside
the results opens in https://ui.perfetto.dev; a picture of it is printed. The time at which a message is really there is
taken by a thread that watches the last element of the buffer it arrives in.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from benchmarks.paired import Case, Step, against, arguments, collect, conclude, interleaved, on_ranks, out_path, screen
from benchmarks.paired import spread as text
from benchmarks.timeline import Event, Recording, as_trace, picture, together

BOUND = 1.10
WIDTH = 64
QUICK = {"shapes": [(2, 256)], "rounds": 2}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, the picture and the verdict, write the JSON and the trace."""
    args = _arguments(argv)
    console = screen()
    total = len(args.shapes) * 2 * 4 * (args.rounds + 1)
    cases = collect(console, "overlap", total, on_ranks(args.ranks, job, args))
    trace = out_path("overlap", args).with_suffix(".trace.json")
    trace.parent.mkdir(parents=True, exist_ok=True)
    timelines = {_name(case): [Event(*event) for event in case.facts["events"]] for case in cases}
    trace.write_text(json.dumps(as_trace(timelines)))
    for name, events in timelines.items():
        console.print(f"\n{name}: # tile, = transfer, w wait", picture(events), sep="\n")
    console.print(_waits(cases, timelines), f"timeline written to {trace}", soft_wrap=True)
    conclude(console, "overlap", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: forward and backward of every shape."""
    for heads, tokens in args.shapes:
        for direction, run in zip(("forward", "backward"), ring_steps(heads, tokens), strict=True):
            steps = {
                "ring": run,
                "compute": without_exchanges(run),
                "transfer": only_exchanges(run),
                "no overlap": waiting_at_once(run),
            }
            seconds = yield from interleaved(steps, args.rounds, f"{heads}x{tokens} {direction}, ")
            case = Case({"direction": direction, "heads": heads, "tokens": tokens, "MiB": _mib(heads, tokens)}, seconds)
            case.add_ratio("ring", lambda ring, compute, transfer, no_overlap: ring / max(compute, transfer))
            case.add_ratio(
                "no overlap", lambda ring, compute, transfer, no_overlap: no_overlap / max(compute, transfer)
            )
            with Recording() as recording:
                dist.barrier()
                run()
            case.facts["events"] = together(recording.events)
            yield case


def ring_steps(heads: int, tokens: int) -> tuple[Step, Step]:
    """Forward and backward of ring attention over `tokens` tokens per rank."""
    from ringpass.layouts.layout import Layout
    from ringpass.ops import ring
    from ringpass.schedule.site import Site
    from ringpass.schedule.tiles import Problem

    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    layouts = Layout("contiguous", world), Layout("contiguous", world)
    problem = Problem("True", world * tokens, world * tokens, *layouts, tile=tokens)
    site = Site(problem, rank, group.group_name, scale=WIDTH**-0.5)
    q, k, v, grad = (torch.randn(1, heads, tokens, WIDTH) for _ in range(4))
    out, lse = ring.forward(site, q, k, v, [], None)

    def forward() -> object:
        return ring.forward(site, q, k, v, [], None)

    def backward() -> object:
        return ring.backward(site, grad, q, k, v, out, lse, [], None)

    return forward, backward


# --- the same step, with other exchanges ------------------------------------------------------------------------------


def with_start(run: Step, start: Callable[..., Any]) -> Step:
    """`run` with `start` in the place of `ringpass.comm.p2p.start`."""
    from unittest.mock import patch

    from ringpass.comm import p2p

    def step() -> None:
        with patch.object(p2p, "start", start):
            run()

    return step


def without_exchanges(run: Step) -> Step:
    """Only what is computed: what arrives is a buffer per tag, made once, that holds what was sent then."""
    from ringpass.comm import p2p

    buffers: dict[int, Tensor] = {}

    def start(
        sent: Tensor, dst: int | None, received: Tensor, src: int | None, tag: int, group: str, label: str = ""
    ) -> p2p.PendingExchange:
        if tag not in buffers:
            buffers[tag] = sent.clone() if sent.numel() == received.numel() else torch.randn(received.numel())
        return p2p.PendingExchange(buffers[tag], sent, [], (dst, src))

    return with_start(run, start)


def waiting_at_once(run: Step) -> Step:
    """The ring as it is, without overlap."""
    from ringpass.comm import p2p

    real = p2p.start

    def start(*args: Any) -> p2p.PendingExchange:
        started = real(*args)
        started.wait()
        started.works = []
        return started

    return with_start(run, start)


def only_exchanges(run: Step) -> Step:
    """Only the exchanges and waits of `run`, in its order; runs it once, to see them."""
    from unittest.mock import patch

    from ringpass.comm import p2p

    log: list[tuple[str, Any]] = []  # ("start", arguments) or ("wait", number of the start)
    started: list[p2p.PendingExchange] = []
    real, real_wait = p2p.start, p2p.PendingExchange.wait

    def start(sent: Tensor, *args: Any) -> p2p.PendingExchange:
        log.append(("start", (sent.clone(), *args)))
        started.append(real(sent, *args))
        return started[-1]

    def wait(self: p2p.PendingExchange) -> None:
        log.append(("wait", next(i for i, exchange in enumerate(started) if exchange is self)))
        real_wait(self)

    with patch.object(p2p, "start", start), patch.object(p2p.PendingExchange, "wait", wait):
        run()
    started.clear()

    def step() -> None:
        under_way: list[p2p.PendingExchange] = []
        for kind, what in log:
            if kind == "start":
                under_way.append(real(*what))
            else:
                real_wait(under_way[what])

    return step


# --- what is shown ----------------------------------------------------------------------------------------------------


def _mib(heads: int, tokens: int) -> float:
    return heads * tokens * WIDTH * 2 * 4 / 2**20


def _name(case: Case) -> str:
    return f"{case.case['direction']}, {case.case['heads']} heads x {case.case['tokens']} tokens"


def _table(cases: Sequence[Case]) -> Table:
    columns = ("MiB", "ring, s", "compute, s", "transfer, s", "no overlap, s", "ring / max", "no overlap / max")
    table = Table("", *columns, title="what the ring costs beyond its compute or its transfers, median (min-max)")
    for case in cases:
        cells = [*(text(x) for x in case.seconds.values()), *(text(x, 3) for x in case.ratios.values())]
        table.add_row(_name(case), f"{case.case['MiB']:g}", *cells)
    return table


def _waits(cases: Sequence[Case], timelines: dict[str, list[Event]]) -> Table:
    """Of the recorded ring: each rank's time, and how much of its transfers passed while it computed."""
    from benchmarks.timeline import covered

    columns = ("rank", "whole, s", "tiles, s", "transfers, s", "of them behind tiles", "in wait, s", "of the whole")
    table = Table("recorded", *columns, title="where the time of one ring goes")
    for case in cases:
        events = timelines[_name(case)]
        for rank in sorted({event.rank for event in events}):
            mine = [event for event in events if event.rank == rank]
            lanes = {lane: [e for e in mine if e.lane == lane] for lane in ("tile", "transfer", "wait")}
            whole = max(e.stop for e in mine) - min(e.start for e in mine)
            tiles, transfers, waits = (sum(e.stop - e.start for e in lane) for lane in lanes.values())
            hidden = covered(lanes["transfer"], lanes["tile"]) / transfers if transfers else 1.0
            case.facts[f"rank {rank}"] = {
                "whole": whole, "tiles": tiles, "transfers": transfers, "hidden": hidden, "waits": waits
            }  # fmt: skip
            numbers = f"{whole:.3f}", f"{tiles:.3f}", f"{transfers:.3f}", f"{hidden:.0%}", f"{waits:.3f}"
            table.add_row(_name(case), str(rank), *numbers, f"{waits / whole:.1%}")
    return table


def _verdict(cases: Sequence[Case]) -> str:
    found = [(_name(case), statistics.median(case.ratios["ring"])) for case in cases]
    return "ring over the larger of compute and transfer: " + "; ".join(
        f"{n} {against(x, BOUND, False)}" for n, x in found
    )


def _shape(spelled: str) -> tuple[int, int]:
    heads, tokens = spelled.split("x")
    return int(heads), int(tokens)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    shapes = "heads x local tokens, heads 64 wide: the first is mostly compute, the second has more to hide"
    default = [(16, 8192), (128, 1024)]
    parser.add_argument("--shapes", type=_shape, nargs="+", default=default, metavar="HxT", help=shapes)
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
