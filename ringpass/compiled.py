"""The function that Dynamo calls: checks that the ranks agree, runs the compiled program, returns outputs as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ringpass.comm.agreement import Agreement, Ring
from ringpass.comm.collectives import Shard
from ringpass.config import RingConfig
from ringpass.lazy import LazyOutput, Origin
from ringpass.passes.partition.partitioned import Partitioned, ShardedInput, ShardedOutput
from ringpass.shards import OUTPUTS, on_all_ranks


def compiled_call(
    run: Callable[..., Any], program: Partitioned, agreement: Agreement, ring: Ring, config: RingConfig
) -> Callable[..., Any]:
    """The function that Dynamo calls for a partitioned program: `run` is the program compiled, on local arguments.

    Each call checks that the ranks agree and shares one random seed, then runs, and returns sharded outputs as the
    option `outputs` says.  The call raises MismatchError or PeerError on all ranks.
    """
    sharded = {one.position: one for one in program.sharded_inputs}

    def call(*given: Any) -> Any:
        draws = program.seeded or program.draws
        drawn = int(torch.randint(2**62, (), dtype=torch.int64)) if draws else 0
        seed = agreement.seed([x.kind if isinstance(x, LazyOutput) else x for x in given], drawn)
        args = [_argument(x, sharded.get(i), ring) for i, x in enumerate(given)]
        with _generator(seed) if program.draws else nullcontext():
            results = run(*args, torch.tensor(seed, dtype=torch.int64)) if program.seeded else run(*args)
        outputs, extras = results[: len(program.outputs)], results[len(program.outputs) :]
        return [
            _hand_out(o, i, spec, extras, ring, config) if spec else on_all_ranks(o)
            for i, (o, spec) in enumerate(zip(outputs, program.outputs, strict=True))
        ]

    return call


def replicated_call(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function that Dynamo calls for a graph that every rank computes in full; `run` is that graph compiled."""
    return lambda *args: [on_all_ranks(o) for o in run(*(_argument(arg, None, None) for arg in args))]


def _argument(arg: Any, spec: ShardedInput | None, ring: Ring | None) -> Any:
    """An argument as the program reads it; of a lazy one, its local tokens if `spec` says so, else all, gathered."""
    if spec is None or ring is None:
        return arg.full() if isinstance(arg, LazyOutput) else arg
    assert isinstance(arg, LazyOutput), "Dynamo guards on the kinds of its inputs"
    return arg.tokens_in(spec.layout, spec.dim, ring)


@contextmanager
def _generator(seed: int) -> Iterator[None]:
    """Seeds the default generators inside, so that all ranks draw the same numbers, and restores them afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _hand_out(
    output: torch.Tensor, position: int, spec: ShardedOutput, extras: Sequence[Any], ring: Ring, config: RingConfig
) -> torch.Tensor:
    """A local output as the option `outputs` says."""
    outer, tokens = (extras[n[1]] if isinstance(n, tuple) else n for n in (spec.outer, spec.tokens))
    shard = Shard(spec.dim, outer, tokens, spec.layout, ring.world, ring.rank)
    inner = output.shape[spec.dim] // (outer * shard.length) if shard.length else 1
    origin = Origin(spec.name, ring.calls, position, shard, ring, spec.part, inner)
    kind = OUTPUTS[config.outputs]
    assert kind is not None, "gathered outputs are not sharded"
    return kind(output, origin, config.group)
