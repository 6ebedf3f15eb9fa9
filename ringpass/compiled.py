"""The function that Dynamo calls: checks that the ranks agree, runs the compiled program, returns outputs as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import _StopRecomputationError

from ringpass.comm.agreement import Agreement, Comparison
from ringpass.comm.collectives import Shard
from ringpass.comm.recovery import end_backward, give_up_backward, giving_up
from ringpass.comm.ring import Ring, Running
from ringpass.config import RingConfig
from ringpass.devices import device_of
from ringpass.input_kinds import plain
from ringpass.lazy import LazyOutput, Origin
from ringpass.passes.partition.partitioned import Partitioned, ShardedInput, ShardedOutput
from ringpass.profiling import in_range, profiled
from ringpass.shards import OUTPUTS, on_all_ranks

WATCHED = "_ringpass_ring"
"""Set on an autograd function whose failures are told."""
COMPARED_FIRST = 2  # calls of each graph that are compared before they run, on a GPU too


def compiled_call(
    run: Callable[..., Any], program: Partitioned, agreement: Agreement, ring: Ring, config: RingConfig
) -> Callable[..., Any]:
    """The function that Dynamo calls for a partitioned program: `run` is the program compiled, on local arguments.

    Each call checks that the ranks agree and shares one random seed, runs, and returns sharded outputs as the option
    `outputs` says.  The call raises MismatchError or PeerError on all ranks, and UnsupportedError where two threads
    call at once.
    """
    sharded = {one.position: one for one in program.sharded_inputs}

    @in_range("call of a compiled model")
    def call(*passed: Any) -> Any:
        with ring.one_thread():
            return in_order(*passed)

    def in_order(*passed: Any) -> Any:
        given = [plain(x) for x in passed]
        device = device_of(given)
        drawn = int(torch.randint(2**62, (), dtype=torch.int64)) if program.seeded or program.draws else 0
        values = [x.kind if isinstance(x, LazyOutput) else x for x in given]
        with profiled("compare the ranks"):
            comparison = agreement.begin(values, drawn, device)
        backward = agreement.running("backward")

        def launch() -> Any:
            # a checkpoint stops its recomputation once it has what it wants
            with ring.doing(agreement.running("forward")), giving_up(ring, unless=_StopRecomputationError):
                ring.warm_up(device)
                args = [_argument(x, sharded.get(i), ring) for i, x in enumerate(given)]
                with _generator(comparison, device) if program.draws else nullcontext():
                    found = run(*args, comparison.seed) if program.seeded else run(*args)
                _watch_backward(found, agreement, backward, device)
                return found

        typed = any(x is not y for x, y in zip(given, passed, strict=True))
        results = compare_around(comparison, launch, first=_compares_first(program, agreement, device))
        outputs, extras = results[: len(program.outputs)], results[len(program.outputs) :]
        handed = [
            _hand_out(o, i, spec, extras, ring, config) if spec else on_all_ranks(o)
            for i, (o, spec) in enumerate(zip(outputs, program.outputs, strict=True))
        ]
        # Dynamo gives the outputs the class of a typed input, which a lazy one cannot take
        return [x.full() if isinstance(x, LazyOutput) else x for x in handed] if typed else handed

    return call


def compare_around(comparison: Comparison, launch: Callable[[], Any], first: bool) -> Any:
    """What `launch` returns, with the ranks compared: before it if `first`, else once it has queued its work.

    Either way this raises MismatchError or PeerError if the ranks differ, also where `launch` raises because they do.
    """
    if first:
        _finish(comparison)
        return launch()
    try:
        return launch()
    finally:
        _finish(comparison)


def _finish(comparison: Comparison) -> None:
    with profiled("compare the ranks"):
        comparison.finish()


def _watch_backward(results: Sequence[Any], agreement: Agreement, running: Running, device: torch.device) -> None:
    """Lets the ring know when the backward of a call begins and when it ends, by hooks on its node of autograd."""
    ring = agreement.ring
    if ring.world == 1:
        return
    for node in (x.grad_fn for x in results if isinstance(x, torch.Tensor)):
        if node is not None and type(node).__name__.startswith("CompiledFunction"):
            _tell_of_failures(type(node)._forward_cls, ring)  # type: ignore[attr-defined]
            # compiled autograd would trace them
            node.register_prehook(torch._dynamo.disable(lambda _: agreement.begin_backward(running, device)))
            node.register_hook(torch._dynamo.disable(lambda *_: end_backward(ring)))
            return


def _tell_of_failures(function: Any, ring: Ring) -> None:
    """Makes the rank give up a backward of this autograd function, which AOTAutograd made of one graph, if it raises.

    The backward is compiled when it first runs, so what fails may be its compilation.
    """
    if getattr(function, WATCHED, None) is ring:
        return
    run = function.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        try:
            return run(ctx, *grads)
        except BaseException as error:
            give_up_backward(ring, error)
            raise

    function.backward = staticmethod(backward)
    setattr(function, WATCHED, ring)


def _compares_first(program: Partitioned, agreement: Agreement, device: torch.device) -> bool:
    """Whether a call may queue no work before the ranks are known to agree.

    On a GPU it may, unless the host needs the device's answers: a device that waits for a rank that runs something else
    must not stop the host, which reports the difference.  The first calls of each graph find graphs that differ.
    """
    host_reads = program.draws or program.reads
    return device.type != "cuda" or host_reads or agreement.compared < COMPARED_FIRST


def lone_call(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function that Dynamo calls for a graph on one rank; `run` is that graph compiled by AOTAutograd alone."""
    return lambda *args: run(*map(plain, args))


def replicated_call(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function that Dynamo calls for a graph that every rank computes in full; `run` is that graph compiled."""
    return lambda *args: [on_all_ranks(o) for o in run(*(_argument(plain(arg), None, None) for arg in args))]


def _argument(arg: Any, spec: ShardedInput | None, ring: Ring | None) -> Any:
    """An argument as the program reads it; of a lazy one, its local tokens if `spec` says so, else all, gathered."""
    if spec is None or ring is None:
        return arg.full() if isinstance(arg, LazyOutput) else arg
    assert isinstance(arg, LazyOutput), "Dynamo guards on the kinds of its inputs"
    return arg.tokens_in(spec.layout, spec.dim, ring)


@contextmanager
def _generator(comparison: Comparison, device: torch.device) -> Iterator[None]:
    """Seeds the default generators inside, of the host and of `device`, and restores them afterwards.

    Rank 0's number is the seed, so that all ranks draw the same numbers.
    """
    seed, gpus = comparison.finish()[0], [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu.index].manual_seed(seed)
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
