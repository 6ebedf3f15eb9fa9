"""Every exchange of one attention as text, tokens and heads named: what `ringpass explain` has in sums or on its page.

    python -m examples.simulate --ranks 4 --tokens 4096
    python -m examples.simulate --ranks 4 --tokens 4096 --dilation longvit
    python -m examples.simulate --ranks 8 --tokens 1048576 --mask causal --window 4095 --layout contiguous
    python -m examples.simulate --ranks 4 --tokens 64 --segment-lengths 16 64 --dilation-rates 1 4 --rank 1

The attention is described by numbers; of a model, `ringpass explain` says more.  The plan is the compiler's own, proved
for all ranks as it is before a training; nothing is sent or computed, in one process without a launcher or a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from ringpass.config import RingConfig
from ringpass.layouts.ranges import Ranges
from ringpass.passes.capture.capture import capture
from ringpass.passes.capture.decompose import decompose
from ringpass.passes.detect.detect import detect
from ringpass.passes.op_rules.table import has_rule, rule_for
from ringpass.passes.plan.plan import RingPlan, SitePlan, plan
from ringpass.passes.plan.prove import prove_all
from ringpass.passes.propagate.factors import propagate
from ringpass.patterns import everything, window
from ringpass.schedule.messages import Message, exchanges, strided_ranges
from ringpass.schedule.program import Transfer

SHOWN = 3  # ranges of tokens that a cell lists


@dataclass(frozen=True)
class Sent:
    """What goes from one rank to another in one exchange; a row is one token of one K/V head."""

    shift: int
    src: int
    dst: int
    what: str
    rows: int


def main(argv: list[str] | None = None) -> None:
    """The plan, a table of the ranks, and one of what passes between them."""
    args = _arguments(argv)
    console = Console(highlight=False)
    planned = make_plan(args)
    console.print(f"{planned}\n", markup=False, soft_wrap=True)
    site = planned.sites[0]
    if site.query_axis is None:
        raise SystemExit("every rank would compute all of it: nothing passes between ranks")
    prove_all(planned, 0)
    row = 2 * args.width * torch.empty((), dtype=getattr(torch, args.dtype)).element_size()
    sent = [x for rank in range(args.ranks) for x in sends(site, rank)]
    console.print(_ranks(site, sent, row))
    console.print(_exchanges([x for x in sent if args.rank in (None, x.src, x.dst)], row))
    pairs, rows = sum(pairs_of(site, rank) for rank in range(args.ranks)), sum(x.rows for x in sent)
    ring = max(1, (args.ranks - 1) * args.tokens * args.groups)
    console.print(
        f"in all {pairs:,} pairs in tiles, {pairs / (args.heads * args.tokens**2):.3g} of all; "
        f"{rows * row:,} bytes of K and V sent, {rows / ring:.3g} of what a ring of whole shards sends",
        soft_wrap=True,
    )


def make_plan(args: argparse.Namespace) -> RingPlan:
    """The backend's own first steps, for as many ranks as asked for, on an attention whose values are never read."""
    config = _config(args)
    found: list[RingPlan] = []

    def backend(gm: GraphModule, inputs: list[Tensor]) -> Any:
        captured = decompose(capture(gm, inputs), has_rule)
        sites = detect(captured.gm, config.mask)
        found.append(plan(sites, propagate(captured.gm, rule_for), args.ranks, config))
        return lambda *tensors: tensors[:1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=args.mask == "causal", enable_gqa=True)

    shapes = [(1, heads, args.tokens, args.width) for heads in (args.heads, args.groups, args.groups)]
    torch._dynamo.reset()
    run: Any = torch.compile(attend, backend=backend)
    run(*(torch.empty(s, dtype=getattr(torch, args.dtype)) for s in shapes))
    return found[0]


def sends(site: SitePlan, rank: int) -> Iterator[Sent]:
    """What `rank` sends in a forward, exchange by exchange; a backward sends it again, and gradients the other way."""
    share = site.share(rank)
    groups = len(share.key_heads)
    if site.dilation:
        problems, heads = site.group_problems(share), len(share.heads)
        for exchange in exchanges(problems, rank if site.sharded else 0, heads, groups):
            if exchange.send:
                yield Sent(exchange.shift, rank, exchange.send.dst, _parts(exchange.send), exchange.send.rows)
    else:
        for step in site.programs(rank)[0].steps:
            if step.send:
                yield Sent(step.shift, rank, step.send.dst, _tokens(step.send, groups), step.send.size * groups)


def pairs_of(site: SitePlan, rank: int) -> int:
    """(query, key) pairs in tiles, over all heads."""
    share = site.share(rank)
    heads = [len(group.head_group.members) for group in site.group_problems(share)] or [len(share.heads)]
    return sum(n * program.area for n, program in zip(heads, site.programs(rank), strict=True))


def _ranks(site: SitePlan, sent: list[Sent], row: int) -> Table:
    assert site.problem is not None
    table = _table("ranks", "rank", "tokens held", "pairs", "tiles", "rows", "receives", "from", "rows sent")
    for rank in range(site.problem.world):
        held = site.problem.key_layout.ranges(rank, site.problem.keys)
        tiles = sum(len(step.tiles) for program in site.programs(rank) for step in program.steps)
        got, given = [x for x in sent if x.dst == rank], [x for x in sent if x.src == rank]
        rows, sources = site.received(rank), " ".join(str(x.src) for x in got)
        numbers = f"{pairs_of(site, rank):,}", f"{tiles:,}", f"{rows:,}", f"{rows * row:,}"
        table.add_row(str(rank), _ranges(held), *numbers, sources, f"{sum(x.rows for x in given):,}")
    return table


def _exchanges(sent: list[Sent], row: int) -> Table:
    table = _table("exchanges", "step", "from", "to", "K and V of tokens", "rows", "bytes")
    for x in sorted(sent, key=lambda x: (x.shift, x.src)):
        table.add_row(str(x.shift), str(x.src), str(x.dst), x.what, f"{x.rows:,}", f"{x.rows * row:,}")
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if "tokens" in name or name == "from" else "right", overflow="fold")
    return table


def _parts(message: Message) -> str:
    """`0:64:4 of heads 0 1`, line after line: start, stop and step of tokens."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for part in message.parts:
        alike.setdefault(strided_ranges(part.tokens), []).extend(part.heads)
    return "\n".join(
        f"{_few(_spans(flat))} of heads {' '.join(map(str, sorted(heads)))}" for flat, heads in alike.items()
    )


def _spans(flat: tuple[int, ...]) -> list[str]:
    found = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
    return [f"{a}:{b}" if step == 1 else f"{a}:{b}:{step}" for a, b, step in found]


def _tokens(transfer: Transfer, groups: int) -> str:
    return f"{_ranges(transfer.tokens)} of all {groups} heads"


def _ranges(ranges: Ranges) -> str:
    return _few([f"{a}:{b}" for a, b in ranges])


def _few(spans: list[str]) -> str:
    return " ".join([*spans[:SHOWN], *([f"and {len(spans) - SHOWN} more"] if len(spans) > SHOWN else [])])


def _config(args: argparse.Namespace) -> RingConfig:
    lists = {name: getattr(args, name) for name in ("segment_lengths", "dilation_rates")}
    mask = everything() if args.window is None else window(args.window, 0 if args.mask == "causal" else args.window)
    given = {"dilation": args.dilation, "head_offset": args.head_offset, "dilation_budget": args.budget}
    return RingConfig.from_options({"layout": args.layout, "mask": mask, **given, **lists})


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--groups", type=int, help="K/V heads; as many as query heads if not given")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="bfloat16")
    parser.add_argument("--mask", choices=("causal", "full"), default="causal", help="the model's own")
    parser.add_argument("--window", type=int, help="tokens that a query sees on each side; the option mask")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--dilation", help="auto, or a preset's name")
    parser.add_argument("--budget", type=float, default=0.25, help="share of all pairs that auto may compute")
    parser.add_argument("--segment-lengths", type=int, nargs="+")
    parser.add_argument("--dilation-rates", type=int, nargs="+")
    parser.add_argument("--head-offset", default="mod")
    parser.add_argument("--rank", type=int, help="list the exchanges of this rank alone")
    args = parser.parse_args(argv)
    args.groups = args.groups or args.heads
    return args


if __name__ == "__main__":
    main()
