"""How much longer than plain Inductor does compiling for a ring take?

    python -m benchmarks.compile_time --ranks 2 4 8 16 1024 --layers 12

A GPT-2, forward and backward, compiled with cold caches in a new process for every sample: by plain Inductor, and by
`ring_dilated` for one rank of P on a fake process group (it moves no data: what is compiled is real, what is computed
is not). A sample is the time of the first training step less that of the second, so that only compiling counts. Above
`unroll_limit` steps each attention is one node of the graph, rolled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.paired import Case, against, arguments, collect, conclude, on_ranks, screen, spread

BOUND, BOUND_RANKS = 1.4, 2
PLAIN = 0  # stands for the number of ranks of plain Inductor
QUICK = {"ranks": [2], "layers": 1, "width": 16, "length": 64, "rounds": 1, "compiler": "aot_eager"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    cases = collect(screen(), "compile time", args.rounds * (1 + len(args.ranks)), _merged(args))
    for case in cases[1:]:
        plain = cases[0].seconds["compile"]
        case.ratios["of plain"] = [a / b for a, b in zip(case.seconds["compile"], plain, strict=True)]
    conclude(screen(), "compile_time", args, _table(cases), cases, _verdict(cases[1:], args.compiler))


def _merged(args: argparse.Namespace) -> Iterator[Any]:
    """Each round compiles every program once; at the end, one case per program with the samples of all rounds."""
    programs = (PLAIN, *args.ranks)
    cases = {ranks: Case({"ranks": ranks or 1}, {"compile": [], "first step": []}) for ranks in programs}
    for i in range(args.rounds):
        for ranks in programs:
            yield f"{f'P = {ranks}' if ranks else 'plain'}, round {i + 1} of {args.rounds}"
            (found,) = on_ranks(1, job, ranks, args)
            for name, values in cases[ranks].seconds.items():
                values.append(found[name])
            cases[ranks].facts["graph"] = found["graph"]
    yield from cases.values()


def job(ranks: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """In a new process: the time of a first and of a second step."""
    from torch._inductor.utils import fresh_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import GPT2Config, GPT2LMHeadModel

    from ringpass.comm.agreement import Agreement
    from ringpass.logging_calls import skip_logging_calls
    from ringpass.ops import primitives
    from ringpass.passes.lower import codegen
    from ringpass.passes.lower import lower as passes_lower

    skip_logging_calls()  # one graph for plain Inductor too
    sizes = {"vocab_size": 256, "n_positions": args.length, "n_embd": args.width, "n_layer": args.layers}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **rates, n_head=max(1, args.width // 32), bos_token_id=0, eos_token_id=0)
    model: Any = GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 256, (1, args.length))
    graphs = set()
    lower, tiles = passes_lower.lower, (primitives.attention_tile, primitives.attention_tile_backward)

    def watched(graph: torch.fx.Graph, limit: int, whole: int) -> Any:
        done = lower(graph, limit, whole)
        graphs.add(any(node.target in tiles for node in graph.nodes))
        return done

    def step() -> float:
        start = time.perf_counter()
        run(input_ids=ids, labels=ids).loss.backward()
        return time.perf_counter() - start

    options = {"unroll_limit": args.unroll_limit, "compiler": args.compiler}
    how: dict[str, Any] = {"backend": "ring_dilated", "options": options} if ranks else {"backend": args.compiler}
    run: Any = torch.compile(model, **how)
    if ranks:
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    alone = patch.object(Agreement, "begin", _alone)
    lowers = [patch.object(module, "lower", watched) for module in (codegen, passes_lower)]
    with fresh_cache(), alone, lowers[0], lowers[1]:
        first, second = step(), step()
    kind = ("unrolled" if any(graphs) else "rolled") if ranks else "plain"
    yield {"compile": first - second, "first step": first, "graph": kind}


def _alone(agreement: Any, args: Sequence[object], mine: int, device: Any = None) -> Any:
    """In place of `Agreement.begin`: a rank without peers agrees with itself."""
    from ringpass.comm.agreement import Comparison, Said
    from ringpass.comm.headers import HostCopy

    headers = torch.full((agreement.ring.world,), mine)
    return Comparison(agreement, Said([], [], []), HostCopy(headers, lambda: True), torch.tensor(mine))


def _table(cases: Sequence[Case]) -> Table:
    columns = ("program", "compile, s", "first step, s", "of plain")
    table = Table("P", *columns, title="cold compile of forward and backward, median (min-max)")
    for case in cases:
        cells = [spread(x, 1) for x in case.seconds.values()] + [spread(x, 2) for x in case.ratios.values()]
        table.add_row(str(case.case["ranks"]), case.facts["graph"], *cells)
    return table


def _verdict(cases: Sequence[Case], compiler: str) -> str:
    found = {case.case["ranks"]: statistics.median(case.ratios["of plain"]) for case in cases}
    ranks = BOUND_RANKS if BOUND_RANKS in found else min(found)
    bounded = ranks == BOUND_RANKS and compiler == "inductor"
    value = against(found[ranks], BOUND, False) if bounded else f"{found[ranks]:.3g}"
    rest = "" if bounded else f"; the bound, {BOUND:g}, is for P={BOUND_RANKS} and Inductor"
    return f"compile time at P={ranks} over that of plain {compiler}: {value}{rest}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 1024], metavar="P")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--length", type=int, default=4096, help="at least 2 tokens for every rank")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"], help="of both")
    parser.add_argument("--unroll-limit", type=int, default=256, help="the option of ring_dilated")
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
