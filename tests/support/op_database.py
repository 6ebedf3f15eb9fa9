"""torch's own database of operators, as cases: every sample of an op, each of its dims in turn the sequence.

>>> [op.name for op in operators() if op.name == "softmax"]
['softmax', 'softmax']

A case is partitioned over simulated ranks as if an attention had the sequence in that dim, and compared with the op on
one device: values and gradients.  What its program does with tokens is its `Outcome`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from ringpass import ops
from ringpass.passes.capture.capture import Captured
from ringpass.passes.op_rules import table as rules
from ringpass.passes.partition.partitioned import Partitioned
from ringpass.passes.propagate.factors import propagate
from ringpass.passes.verify import verify
from tests.support import thread_ranks
from tests.support.pipeline_stages import captured_graph
from tests.support.sharded_ops import FAILURES, local_shard, programs_along

SAMPLES = 6
"""Samples of an op that are tried, of different shapes of the operands first."""
DATA_DEPENDENT = (
    DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)  # fmt: skip
RANDOM = ("nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d", "nn.functional.rrelu")
MOVING = (ops.halo, ops.redistribute)


class Outcome(IntEnum):
    """What an op does with tokens of other ranks, from the least to the most."""

    LOCAL = 0
    FEW = 1  # halos, single tokens
    REDUCED = 2
    MOVED = 3  # all-to-all: all tokens of a part of another dim
    GATHERED = 4


class Untraceable(Exception):
    """The op has no graph: it returns no tensor, or its result depends on data."""


@dataclass(frozen=True)
class Sample:
    """One call of an op: its tensors, which the graph has as inputs, and what calls it with them."""

    op: OpInfo
    tensors: tuple[Tensor, ...]
    spec: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, op: OpInfo, given: SampleInput) -> Sample:
        leaves, spec = pytree.tree_flatten((given.input, given.args, given.kwargs))
        tensors = tuple(x.detach() for x in leaves if isinstance(x, Tensor))
        return cls(op, tensors, spec, tuple(leaves))

    def call(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the op returns, its operands computed rather than given."""
        new = iter(x * 1.0 if differentiable(x) else x for x in tensors)
        leaves = [next(new) if isinstance(x, Tensor) else x for x in self.leaves]
        first, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        found = pytree.tree_leaves(self.op.op(first, *args, **kwargs))
        return tuple(x * 1.0 if differentiable(x) else x for x in found if isinstance(x, Tensor))

    def given(self) -> list[Tensor]:
        """The tensors, of which those that may have gradients need them."""
        return [x.clone().requires_grad_(differentiable(x)) for x in self.tensors]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of the tensors."""
        return tuple(x.shape for x in self.tensors)

    def captured(self) -> Captured:
        """The graph.  Raises Untraceable."""
        try:
            if any(y.layout is not torch.strided for y in self.call(*self.given())):
                raise TypeError("a sparse result")
            gm = make_fx(lambda *xs: self.call(*xs), pre_dispatch=True)(*self.given())
        except Exception as error:
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        if all(n.op != "call_function" for n in gm.graph.nodes):
            raise Untraceable("no node")
        try:
            return captured_graph(gm, self.given())
        except DATA_DEPENDENT as error:
            raise Untraceable(f"{type(error).__name__}") from error
        except RuntimeError as error:
            if "data is not allocated" not in str(error):  # the op reads a fake tensor's values
                raise
            raise Untraceable("its result depends on values") from error


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def operators() -> list[OpInfo]:
    """All entries of the database."""
    return list(op_db)


def name_of(op: OpInfo) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def samples(op: OpInfo, most: int = SAMPLES) -> list[Sample]:
    """Some samples of an op on CPU, in float64 or the widest type that it takes."""
    types = (torch.float64, torch.float32, torch.complex128, torch.int64, torch.bool)
    dtype = next((t for t in types if t in op.supported_dtypes("cpu")), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    found: dict[Any, Sample] = {}
    for given in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 64):
        sample = Sample.of(op, given)
        if sample.tensors:
            found.setdefault((sample.shapes, str(sample.spec)), sample)
    return list(found.values())[:most]


def sequence_dims(sample: Sample, world: int) -> Iterator[tuple[int, int]]:
    """(operand, dim) of each dim that has a token for each rank."""
    for i, x in enumerate(sample.tensors):
        if differentiable(x) or not any(map(differentiable, sample.tensors)):
            yield from ((i, dim) for dim, n in enumerate(x.shape) if n >= world)


def programs(sample: Sample, operand: int, dim: int, layout: str, world: int) -> list[Partitioned]:
    """Each rank's program with the sequence in that dim."""
    captured = sample.captured()
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    products = [user for n in placeholders if differentiable(n.meta["val"]) for user in n.users]
    sweep = propagate(captured.gm, rules.rule_for, products, FAILURES)
    verify("propagate", sweep)
    factors = sweep.dims(placeholders[operand])[dim]
    factor = factors[0] if len(factors) == 1 else sweep.fuse(factors)
    return programs_along(captured, sweep, factor, sample.tensors[operand].shape[dim], layout, world)


def outcome(program: Partitioned) -> Outcome:
    """What a program does with tokens of other ranks."""
    targets = {node.target for node in program.gm.graph.nodes}
    if any(g.reason != "output" for g in program.gathers):
        return Outcome.GATHERED
    if ops.all_to_all in targets:
        return Outcome.MOVED
    if not targets.isdisjoint(MOVING) or targets >= {ops.locate, ops.reduce}:
        return Outcome.FEW
    return Outcome.REDUCED if not targets.isdisjoint((ops.reduce, ops.extremum, ops.first_extremum)) else Outcome.LOCAL


def check(sample: Sample, operand: int, dim: int, layout: str, world: int) -> Outcome:
    """Asserts that the ranks give the numbers of one device, except where they are random."""
    made = programs(sample, operand, dim, layout, world)
    if draws(sample):
        return outcome(made[0])
    want, grads_of = _on_one_device(sample)

    def job(rank: int, group: str) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        xs, local = sample.given(), made[rank]
        given = [*xs, torch.tensor(0)] if local.seeded else xs
        got = list(local.gm(*given)[: len(want)])
        return got, grads_of(xs, got, lambda i, x: local_shard(x, local.outputs[i], rank, world))

    want_grads = grads_of(None, None, lambda i, x: x)
    for rank, (got, grads) in enumerate(thread_ranks.run(world, job)):
        for y, full, spec in zip(got, want, made[rank].outputs, strict=True):
            if spec is None or spec.part is None:
                assert_same(y.detach(), local_shard(full, spec, rank, world), full)
        for g, full in zip(grads or [None] * len(want_grads), want_grads, strict=True):
            assert (g is None) == (full is None) or not (g if full is None else full).any()
            if g is not None and full is not None:
                assert_same(g, full, full)
    return outcome(made[0])


def _on_one_device(sample: Sample) -> Any:
    xs = sample.given()
    want = list(sample.call(*xs))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in want]

    def grads_of(given: Any, got: Any, local: Any) -> tuple[Tensor | None, ...]:
        given, got = (xs, want) if given is None else (given, got)
        chosen = [i for i, y in enumerate(want) if y.requires_grad]
        wanted = [x for x in given if x.requires_grad]
        chosen = [i for i in chosen if got[i].requires_grad]
        if not chosen or not wanted:
            return ()
        given_grads = [local(i, cotangents[i]) for i in chosen]
        return torch.autograd.grad([got[i] for i in chosen], wanted, given_grads, allow_unused=True)

    try:
        grads_of(None, None, lambda i, x: x)
    except (NotImplementedError, RuntimeError):  # the op has no derivative
        return [y.detach() for y in want], lambda *args: ()
    want = list(sample.call(*xs))

    return [y.detach() for y in want], grads_of


def draws(sample: Sample) -> bool:
    """Whether the op draws random numbers, or leaves memory as it is: its values are not to be compared."""
    targets = [n.target for n in sample.captured().gm.graph.nodes if n.op == "call_function"]
    random = any(torch.Tag.nondeterministic_seeded in getattr(t, "tags", ()) for t in targets)
    return random or any("empty" in str(t) or "random" in str(t) for t in targets) or sample.op.name in RANDOM


def assert_same(got: Tensor, want: Tensor, full: Tensor) -> None:
    """To 1e-10 of the largest element, relative to 1 at least."""
    finite = full[full.isfinite()] if full.numel() else full
    most = float(finite.abs().max()) if finite.numel() and full.dtype != torch.bool else 0.0
    tolerance = 1e-10 if full.dtype in (torch.float64, torch.complex128) else 1e-4
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(most, 1.0), equal_nan=True)


def separable(sample: Sample, operand: int, dim: int) -> bool:
    """Whether each token of the result depends on its own token of that operand alone: the op needs no neighbours.

    Tried by changing one token at a time.
    """
    xs = [x.clone() for x in sample.tensors]
    base = sample.call(*xs)
    size = xs[operand].shape[dim]
    candidates = [[e for e, n in enumerate(y.shape) if n == size] for y in base]
    if not all(candidates) or not all(y.numel() for y in base):
        return False
    for i in range(size):
        changed = [x.clone() for x in xs]
        token = changed[operand].select(dim, i)
        if differentiable(token):
            token.mul_(0.75)
        elif token.dtype == torch.bool:
            token.logical_not_()
        else:
            token.add_(1)
        for n, (y, z) in enumerate(zip(base, sample.call(*changed), strict=True)):
            differs = ~torch.isclose(y, z, rtol=0, atol=0, equal_nan=True) if y.dtype != torch.bool else y != z
            candidates[n] = [
                e for e in candidates[n] if not bool(differs.movedim(e, 0)[[j for j in range(size) if j != i]].any())
            ]
    return all(candidates)
