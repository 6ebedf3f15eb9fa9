"""How much faster is a step on P ranks than on one?

    python -m benchmarks.step_time --ranks 2 --lengths 1024 2048 4096 8192 16384

Forward and backward, causal, zigzag, one thread per rank: of ring attention alone (the operator on local tokens,
against SDPA), and of a GPT-2 of 2 layers (`backend="ring_dilated"` against Inductor). Each round takes three:
the one-rank step on rank 0 alone, the one-rank step on all ranks at the same time and independently, and the ring. The
second says how far this machine scales without any communication:

    scaling = alone / independent                 1 on an ideal machine
    efficiency = alone / (P * ring)
    of independent = efficiency / scaling         the figure with a bound
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.gpt2 import gpt2
from benchmarks.paired import (
    Alone,
    Case,
    Step,
    against,
    arguments,
    collect,
    conclude,
    interleaved,
    on_ranks,
    screen,
    spread,
)

BOUND, BOUND_LENGTH = 0.92, 8192
QUICK = {"lengths": [128], "rounds": 2, "heads": 2, "width": 32, "compiler": "aot_eager"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    total = len(args.what) * len(args.lengths) * 3 * (args.rounds + 1)
    cases = collect(console, "step time", total, on_ranks(args.ranks, job, args))
    conclude(console, "step_time", args, _table(cases, args.ranks), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: every kind of step at every length."""
    prepare = {"attention": attention_steps, "model": model_steps}
    for what in args.what:
        for length in args.lengths:
            alone, ring = prepare[what](length, args)
            steps: dict[str, Step | Alone] = {"alone": Alone(alone), "independent": alone, "ring": ring}
            seconds = yield from interleaved(steps, args.rounds, f"{what}, S = {length}, ")
            case = Case({"what": what, "length": length, "ranks": args.ranks}, seconds)
            case.add_ratio("scaling", lambda alone, independent, ring: alone / independent)
            case.add_ratio("efficiency", lambda alone, independent, ring: alone / (args.ranks * ring))
            case.add_ratio("of independent", lambda alone, independent, ring: independent / (args.ranks * ring))
            yield case


def attention_steps(length: int, args: argparse.Namespace) -> tuple[Step, Step]:
    """Attention alone: (all tokens on this rank, this rank's tokens in the ring)."""
    from ringpass import ops
    from ringpass.layouts.layout import Layout
    from ringpass.schedule.site import Site, register
    from ringpass.schedule.tiles import Problem

    rank, world = dist.get_rank(), dist.get_world_size()
    group, layout = dist.group.WORLD, Layout("zigzag", world)
    assert group is not None
    problem = Problem("k <= q", length, length, layout, layout, tile=1024)
    key = register(Site(problem, rank, group.group_name, scale=64**-0.5))
    local = layout.length(rank, length)

    def inputs(tokens: int) -> list[Tensor]:
        return [torch.randn(1, args.heads, tokens, 64) for _ in range(4)]

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ops.ring_attention(q, k, v, [], None, key, length, length, 0, group.group_name)[0]
        return out

    return _training(alone, inputs(length)), _training(ring, inputs(local))


def _training(attend: Any, inputs: Sequence[Tensor]) -> Step:
    *qkv, grad = inputs
    leaves = [x.requires_grad_() for x in qkv]

    def step() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    return step


def model_steps(length: int, args: argparse.Namespace) -> tuple[Step, Step]:
    """A training step of a small GPT-2 without dropout: (plain Inductor, the ring)."""
    from ringpass.logging_calls import skip_logging_calls

    skip_logging_calls()  # one graph for plain Inductor too
    torch._dynamo.reset()
    ring = {"backend": "ring_dilated", "options": {"compiler": args.compiler}}
    return model_step(length, args.width, backend=args.compiler), model_step(length, args.width, **ring)


def model_step(length: int, width: int, **how: Any) -> Callable[[], None]:
    """A training step of a GPT-2 of two layers and 256 words, compiled by `how`."""
    torch.manual_seed(0)
    run: Any = torch.compile(gpt2(length, width), dynamic=False, **how)
    ids = torch.randint(0, 256, (1, length))

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()

    return step


def _table(cases: Sequence[Case], ranks: int) -> Table:
    columns = ("alone, s", "independent, s", f"ring of {ranks}, s", "scaling", "efficiency", "of independent")
    table = Table("", "S", *columns, title=f"a step on {ranks} ranks against one, median (min-max)")
    for case in cases:
        cells = [*(spread(x) for x in case.seconds.values()), *(spread(x, 2) for x in case.ratios.values())]
        table.add_row(case.case["what"], str(case.case["length"]), *cells)
    return table


def _verdict(cases: Sequence[Case]) -> str:
    """At the length of the bound; where it was not measured, at the longest, which has no bound."""
    lengths = {case.case["length"] for case in cases}
    length = BOUND_LENGTH if BOUND_LENGTH in lengths else max(lengths)
    found = [(c.case["what"], c.as_json()["ratios"]["of independent"]["median"]) for c in cases]
    found = [pair for pair, case in zip(found, cases, strict=True) if case.case["length"] == length]
    bounded = length == BOUND_LENGTH
    figures = [f"{what} {against(x, BOUND, True) if bounded else f'{x:.3g}'}" for what, x in found]
    rest = "" if bounded else f"; the bound, {BOUND:g}, is for S={BOUND_LENGTH}"
    return f"efficiency at S={length}, of what independent processes reach: {', '.join(figures)}{rest}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], metavar="S")
    parser.add_argument("--what", nargs="+", default=["attention", "model"], choices=["attention", "model"])
    parser.add_argument("--heads", type=int, default=8, help="of attention alone, 64 wide each")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"], help="of the model")
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
