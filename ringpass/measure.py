"""Measure what computing, memory and transfers cost on this machine, and print it as JSON, for the option `machine`.

    python -m ringpass measure > machine.json                                     GPUs or two processes of this host
    torchrun --nnodes 2 --nproc-per-node 8 .. -m ringpass measure > machine.json  the ranks of torchrun

Rank 0 measures the kernel of a full tile at several edges, a call on a tiny tile, and a copy in memory.  Then all ranks
exchange messages with a neighbour of their host and, if there are several hosts, with a rank of the next one, and run
all-to-alls among as many.  The bandwidth of a dimension is the slower of the two.  Progress goes to stderr.

Measure with nothing else running, and with as many ranks on each host as the training has.  Processes that are started
here on CPU have one thread each.  It takes less than a minute; each time is the fastest of several.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ringpass.comm import p2p
from ringpass.errors import OptionError
from ringpass.kernels.table import forward
from ringpass.kernels.tile import TileArgs
from ringpass.local_ranks import Say, process_group, run_on_local_ranks
from ringpass.progress import progress
from ringpass.schedule.machine import Dimension, Machine

EDGES = {"cpu": (64, 128, 256, 512, 1024), "cuda": (64, 128, 256, 512, 1024, 2048, 4096, 8192)}
TINY = 8  # edge of the tile whose time is that of a call
HEADS = {"cpu": (8, 64), "cuda": (32, 128)}  # query heads, of which K and V have as many, and their width
COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes
SMALL, LARGE = 64, {"cpu": 2**23, "cuda": 2**27}  # bytes of messages
BUDGET = 0.4  # seconds of repeats of one measurement
MOST, FEWEST = 50, 10  # repeats
EXCHANGE = 60.0  # seconds, the limit of one exchange


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--ranks", type=int, default=None, metavar="N", help="processes to start; default: one per GPU, or 2 on CPU"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="what to measure; default: cuda where there is one"
    )
    parser.add_argument("--name", default=None, help="the machine's name; default: that of the GPU, or 'cpu'")


def run(args: argparse.Namespace) -> int:
    """Measures, and prints the JSON on rank 0."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no CUDA device here; leave it out, or pass --device cpu")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
        return _under_torchrun(args, device)
    ranks = (torch.cuda.device_count() if device == "cuda" else 2) if args.ranks is None else args.ranks
    if ranks < 1 or (device == "cuda" and ranks > torch.cuda.device_count()):
        most = f" to {torch.cuda.device_count()}, the number of GPUs" if device == "cuda" else " on"
        raise OptionError(f"--ranks must be from 1{most}, got {ranks}")
    with progress(_steps(ranks, ranks, device)) as advance:
        found = run_on_local_ranks(_rank, ranks, device, (device, ranks, args.name), exchange=EXCHANGE, advance=advance)
    print(found[0])
    return 0


def _under_torchrun(args: argparse.Namespace, device: str) -> int:
    ranks = int(os.environ["WORLD_SIZE"])
    if args.ranks not in (None, ranks):
        raise OptionError(f"--ranks {args.ranks}: torchrun started {ranks} ranks: leave it out")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    hidden = int(os.environ["RANK"]) != 0
    with (
        process_group(device, int(os.environ.get("LOCAL_RANK", 0)), EXCHANGE),
        progress(_steps(ranks, local, device), hidden) as advance,
    ):
        found = measured(device, local, advance, args.name)
    if found is not None:
        print(found.to_json())
    return 0


def _rank(say: Say, device: str, ranks: int, name: str | None) -> str | None:
    """What one of the processes of this host finds, as JSON on rank 0."""
    found = measured(device, ranks, say, name)
    return found.to_json() if found is not None else None


# --- measurements -----------------------------------------------------------------------------------------------------


def _steps(ranks: int, local: int, device: str) -> int:
    return len(EDGES[device]) + 2 + len(_dimensions(ranks, local))


def _dimensions(ranks: int, local: int) -> list[tuple[int, int]]:
    """(size, distance of neighbours) of each dimension of more than one rank; of a single rank, that one.

    >>> _dimensions(16, 8), _dimensions(8, 8), _dimensions(1, 1)
    ([(8, 1), (2, 8)], [(8, 1)], [(1, 1)])
    """
    both = [(local, 1), (ranks // local, local)]
    return [x for x in both if x[0] > 1] or both[:1]


def measured(device: str, local: int, advance: Say, name: str | None = None) -> Machine | None:
    """What the ranks of the default group measure, `local` of them on each host; None on all ranks but rank 0.

    Called on all ranks.  Raises OptionError if the ranks are not equally many on each host.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world % local:
        raise OptionError(f"{world} ranks are not a multiple of the {local} of each host: start as many on each")
    at = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    points: list[tuple[int, float]] = []
    call = memory = 0.0
    if rank == 0:  # the others wait in a collective, so that nothing else runs
        advance("kernel call")
        call = _seconds(_tile(at, TINY), at)
        for edge in EDGES[device]:
            advance(f"tile of {edge} x {edge}")
            points.append((edge, _flops(at, edge) / _without(_seconds(_tile(at, edge), at), call)))
        advance("memory")
        memory = 2 * COPIED[device] / _seconds(_copy(at, COPIED[device]), at)
    dist.barrier()
    dimensions = []
    for size, distance in _dimensions(world, local):
        if rank == 0:
            advance(f"transfers among {size} ranks, {distance} apart")
        dimensions.append(_transfers(at, size, distance))
    dist.barrier()
    known = torch.cuda.get_device_name(at) if device == "cuda" else "cpu"
    return Machine(name or known, tuple(points), memory, call, tuple(dimensions)) if rank == 0 else None


def _tile(at: torch.device, edge: int) -> Callable[[], object]:
    """A call of the kernel of a full tile."""
    heads, width = HEADS[at.type]
    dtype = torch.bfloat16 if at.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, heads, edge, width, device=at, dtype=dtype).unbind()
    return lambda: forward(q, k, v, TileArgs(scale=width**-0.5))


def _flops(at: torch.device, edge: int) -> float:
    heads, width = HEADS[at.type]
    return 4.0 * heads * width * edge**2


def _copy(at: torch.device, size: int) -> Callable[[], object]:
    source, target = torch.ones(size, dtype=torch.uint8, device=at), torch.empty(size, dtype=torch.uint8, device=at)
    return lambda: target.copy_(source)


def _without(seconds: float, part: float) -> float:
    """`seconds` without a `part` that was measured apart, so that noise leaves something."""
    return max(seconds - part, seconds / 10)


def _seconds(run: Callable[[], object], at: torch.device) -> float:
    """The time of the fastest call, after one that is not counted: what else runs only adds to it."""
    run()
    _finish(at)
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() - started < BUDGET):
        found.append(_timed(run, at))
    return min(found)


def _timed(run: Callable[[], object], at: torch.device) -> float:
    start = time.perf_counter()
    run()
    _finish(at)
    return time.perf_counter() - start


def _finish(at: torch.device) -> None:
    if at.type == "cuda":
        torch.cuda.synchronize(at)


def _transfers(at: torch.device, size: int, distance: int) -> Dimension:
    """A dimension of `size` ranks that are `distance` apart.  All ranks call it."""
    if size == 1:
        return Dimension(1, 1e12, 0.0, 0.0)  # nothing is ever sent
    group = _groups_of(size, distance)
    large = LARGE[at.type]
    small_p2p, large_p2p = (_slowest(at, _exchange(at, size, n, group)) for n in (SMALL, large))
    small_all, large_all = (_slowest(at, _all_to_all(at, size, n, group)) for n in (SMALL * size, large))
    rates = large / _without(large_p2p, small_p2p), large * (size - 1) / size / _without(large_all, small_all)
    return Dimension(size, min(rates), small_p2p, small_all)


def _groups_of(size: int, distance: int) -> dist.ProcessGroup:
    """This rank's group among those of `size` ranks that are `distance` apart."""
    world, span = dist.get_world_size(), size * distance
    firsts = [first for first in range(world) if first % span < distance]
    groups = [dist.new_group([first + i * distance for i in range(size)]) for first in firsts]
    rank = dist.get_rank()
    own: dist.ProcessGroup = groups[firsts.index(rank - rank % span + rank % distance)]
    return own


def _exchange(at: torch.device, size: int, n: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """A message of `n` bytes to the next rank of the group, while one comes from the rank before."""
    sent, received = torch.ones(n, dtype=torch.uint8, device=at), torch.empty(n, dtype=torch.uint8, device=at)
    rank = dist.get_rank(group)
    peers = (rank + 1) % size, (rank - 1) % size
    return lambda: p2p.start(sent, peers[0], received, peers[1], 0, group.group_name).wait()


def _all_to_all(at: torch.device, size: int, n: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """An all-to-all of `n` bytes of each rank."""
    sent = torch.ones(n // size * size, dtype=torch.uint8, device=at)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent, group=group)


def _slowest(at: torch.device, run: Callable[[], object]) -> float:
    """The time of the fastest call that all ranks make together, of the slowest rank."""
    run()
    dist.barrier()
    once = torch.tensor(_timed(run, at), dtype=torch.float64, device=at)
    dist.all_reduce(once, dist.ReduceOp.MAX)  # so that all ranks repeat alike
    repeats = max(FEWEST, min(MOST, int(BUDGET / max(float(once), 1e-6))))
    found = []
    for _ in range(repeats):
        dist.barrier()
        found.append(_timed(run, at))
    fastest = torch.tensor(min(found), dtype=torch.float64, device=at)
    dist.all_reduce(fastest, dist.ReduceOp.MAX)
    return float(fastest)
