"""Does a long training stay right, and stay small?

    python -m benchmarks.soak --steps 1000 --ranks 3          # or --minutes 30

Trains a small model in float64 on steps of random lengths and masks (causal, packed documents, padding), and the same
model on one device, without the backend, from the same seeds. In the first 30 % the process group is destroyed and made
anew several times, in another layout each time; the last 70 % show whether steps leave anything behind. Of every rank:

    loss              largest difference to one device                                   <= 1e-9
    compilations      graphs compiled between two restarts, with symbolic lengths        <= 3 for each kind of mask
    resident memory   slope over the last 70 %, in MB per 1,000 steps                    <= 1, or twice its error
    descriptors, threads, keys of the store    at the end, more than before the first restart    <= 2, 2, ranks

Memory, descriptors and threads are judged from 200 measured steps on: Dynamo frees the functions that it compiled for
a group, and with them the group, only a while after the group was destroyed. The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.paired import Case, arguments, collect, conclude, on_ranks, screen
from ringpass import metrics

QUICK = {"steps": 20, "restarts": 1, "ranks": 2}
VOCABULARY, WIDTH, HEADS, SHORTEST, LONGEST = 31, 16, 2, 24, 96
KINDS = "causal", "documents", "padding"
LAYOUTS = "zigzag", "contiguous", "striped"
SETTLED = 0.3  # of the run: restarts come before, what is left behind is measured after
LOSS, COMPILATIONS, SLOPE, LEFT = 1e-9, 3 * len(KINDS), 1.0, 2
JUDGED = 200  # measured steps, from which on memory, descriptors and threads say something
PAGE = os.sysconf("SC_PAGE_SIZE")
c10d: Any = dist  # its stubs leave out the store


class Model(nn.Module):
    """A language model of one layer, whose attention may be kept within documents, and from padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, documents: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        places = torch.arange(ids.shape[1])
        mask = (places[:, None] >= places).expand(ids.shape[0], 1, -1, -1)
        if documents is not None:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
        if padding is not None:
            mask = mask & padding[:, None, None, :]
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        following = F.pad(ids[:, 1:], (0, 1), value=-100)  # -100: nothing follows the last token
        return F.cross_entropy(self.head(x).flatten(0, 1), following.flatten())


def batch(chance: random.Random) -> dict[str, Tensor]:
    """Two texts of a random length, and a mask of a random kind; the first token is always seen."""
    kind, length = chance.choice(KINDS), chance.randint(SHORTEST, LONGEST)
    draw = torch.Generator().manual_seed(chance.randrange(2**32))
    found = {"ids": torch.randint(VOCABULARY, (2, length), generator=draw)}
    if kind == "documents":
        found["documents"] = (torch.rand(2, length, generator=draw) < 0.1).cumsum(1)
    if kind == "padding":
        found["padding"] = torch.arange(length) < torch.randint(length // 2, length + 1, (2, 1), generator=draw)
    return found


@dataclass
class Trained:
    """A model with its optimizer.  `run`: the model, maybe compiled."""

    model: nn.Module = field(default_factory=lambda: Model().double())

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self, run: Any, inputs: dict[str, Tensor]) -> float:
        """The loss of one training step."""
        loss = run(**inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


@dataclass
class Held:
    """What a process holds at a step."""

    step: int
    megabytes: float
    descriptors: int
    threads: int
    keys: int

    @staticmethod
    def now(step: int) -> Held:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        threads, descriptors = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        keys: int = dist.distributed_c10d._get_default_store().num_keys()
        return Held(step, resident / 1e6, descriptors, threads, keys)


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: the whole training; rank 0 trains on one device beside it, and yields how far it is."""
    torch.manual_seed(0)
    ring, alone = Trained(), Trained()
    alone.model.load_state_dict(ring.model.state_dict())
    chance, begun, step, worst = random.Random(args.seed), time.monotonic(), 0, 0.0
    compiled, compilations, held, before = None, list[int](), list[Held](), Held.now(0)
    done = 0.0
    metrics.enable()
    while done < 1.0:
        restarts = len(compilations)
        if compiled is None or (restarts <= args.restarts and done >= SETTLED * restarts / (args.restarts + 1)):
            before = Held.now(step) if restarts == 1 else before
            _restart(args.timeout)
            compiled = _compiled(ring.model, LAYOUTS[restarts % len(LAYOUTS)], args)
            compilations.append(metrics.snapshot()["compilations"])
        inputs = batch(chance)
        loss = ring.step(compiled, inputs)
        if dist.get_rank() == 0:
            worst = max(worst, abs(loss - alone.step(alone.model, inputs)))
        step += 1
        passed = (time.monotonic() - begun) / 60
        done = _agreed(max(now / end for now, end in ((step, args.steps), (passed, args.minutes)) if end))
        if done >= SETTLED and len(compilations) > args.restarts:
            held.append(Held.now(step))
        yield f"step {step}, {100 * done:.0f} %, loss {loss:.3f}, largest difference {worst:.1e}"
    gc.collect()  # what a destroyed group held is freed with the cycles that hold it
    held.append(Held.now(step))
    counts = [b - a for a, b in zip(compilations, [*compilations[1:], metrics.snapshot()["compilations"]], strict=True)]
    figures = _figures(held, before, counts, step, time.monotonic() - begun)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, figures)
    yield Case({"ranks": dist.get_world_size(), "seed": args.seed}, facts={"loss": worst, "of ranks": everyone})


def _restart(timeout: float) -> None:
    """Destroys the process group, and makes a new one in a store of its own."""
    rank, world, limit = dist.get_rank(), dist.get_world_size(), timedelta(seconds=timeout)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = torch.tensor(free.getsockname()[1])
    dist.broadcast(port, 0)
    dist.destroy_process_group()
    torch._dynamo.reset()
    store = c10d.TCPStore("localhost", int(port), world, is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


def _compiled(model: nn.Module, layout: str, args: argparse.Namespace) -> Any:
    options: Any = {"layout": layout, "compiler": args.compiler, "timeout": args.timeout}
    return torch.compile(model, backend="ring_dilated", dynamic=True, options=options)


def _agreed(done: float) -> float:
    """Rank 0's number."""
    found = torch.tensor(done, dtype=torch.float64)
    dist.broadcast(found, 0)
    return float(found)


def _figures(held: list[Held], before: Held, compilations: list[int], steps: int, seconds: float) -> dict[str, Any]:
    """Of one rank, as data."""
    slope, error = fitted([(h.step, h.megabytes) for h in held])
    first, last = held[0], held[-1]
    left = {name: getattr(last, name) - getattr(before, name) for name in ("descriptors", "threads", "keys")}
    memory = {"slope": slope, "error": error, "first": first.megabytes, "last": last.megabytes}
    counted = metrics.snapshot()
    return {
        "steps": steps,
        "measured steps": len(held),
        "seconds": seconds,
        "compilations": compilations,
        "MB per 1000 steps": memory,
        "left behind": left,
        "at the end": {"descriptors": last.descriptors, "threads": last.threads, "keys": last.keys},
        "bytes received": counted["bytes"],
        "waits": {kind: h["total"] for kind, h in counted["seconds"].items()},
    }


def fitted(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(slope, its standard error), per 1,000 steps, of the line of least squares.

    The error takes neighbouring points as independent, which resident memory is not: it is a lower bound.
    """
    if len(points) < 3:
        return 0.0, 0.0
    x, y = np.array(points, dtype=float).T
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    rest = y - y.mean() - slope * away
    return 1e3 * slope, 1e3 * float(np.sqrt(rest @ rest / (len(points) - 2) / (away @ away)))


def broken(case: Case) -> list[str]:
    """The bounds that a run breaks, in words."""
    found = [f"loss differs by {case.facts['loss']:.1e}"] if not case.facts["loss"] <= LOSS else []
    for rank, of in enumerate(case.facts["of ranks"]):
        memory, left = of["MB per 1000 steps"], of["left behind"]
        limits = {"descriptors": LEFT, "threads": LEFT, "keys": case.case["ranks"]}
        judged = limits if of["measured steps"] >= JUDGED else ["keys"]
        found += [f"rank {rank}: {left[name]} {name} left behind" for name in judged if left[name] > limits[name]]
        if max(of["compilations"]) > COMPILATIONS:
            found.append(f"rank {rank}: {max(of['compilations'])} compilations between restarts")
        if of["measured steps"] >= JUDGED and memory["slope"] > max(SLOPE, 2 * memory["error"]):
            found.append(f"rank {rank}: memory grows by {memory['slope']:.2f} MB per 1,000 steps")
    return found


def main(argv: list[str] | None = None) -> int:
    """Train, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    (case,) = collect(console, "soak", args.steps, on_ranks(args.ranks, job, args))
    wrong, of = broken(case), case.facts["of ranks"][0]
    few = "" if of["measured steps"] >= JUDGED else f", under {JUDGED} measured: memory is not judged"
    verdict = f"{of['steps']} steps on {args.ranks} ranks{few}, loss within {case.facts['loss']:.1e} of one device: "
    conclude(console, "soak", args, _table(case), [case], verdict + ("; ".join(wrong) or "all bounds are met"))
    return int(bool(wrong))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--steps", type=int, help="end after so many steps")
    parser.add_argument("--minutes", type=float, help="end after this time")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=3, help="of the process group, in the first 30 %%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiler", default="aot_eager", choices=["inductor", "aot_eager"])
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that ranks wait for each other")
    args = arguments(parser, argv, QUICK)
    if args.restarts < 1:
        parser.error(f"expected --restarts >= 1, got {args.restarts}")
    if not args.steps and not args.minutes:
        parser.error("expected --steps or --minutes, which say when to end")
    return args


def _table(case: Case) -> Table:
    table = Table(title="what ranks hold: memory from 30 % of the run on, the rest since before the first restart")
    for name in ("rank", "compilations by restart", "MB per 1,000 steps", "MB", "descriptors", "threads", "keys"):
        table.add_column(name, justify="right")
    for rank, of in enumerate(case.facts["of ranks"]):
        memory, left, end = of["MB per 1000 steps"], of["left behind"], of["at the end"]
        cells = [f"{end[name]} ({left[name]:+d})" for name in ("descriptors", "threads", "keys")]
        slope, size = (
            f"{memory['slope']:+.2f} +- {memory['error']:.2f}",
            f"{memory['first']:.1f} -> {memory['last']:.1f}",
        )
        table.add_row(str(rank), str(of["compilations"]), slope, size, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
