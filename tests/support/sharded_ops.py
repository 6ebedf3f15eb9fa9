"""One op, or a few around attentions, partitioned over ranks on threads, beside the same on one device.

>>> check_on_shards(Case("sum.dim_IntList", lambda x: x.sum(-1)), "zigzag", world=3)  # what was gathered, and why
[]

`check_attentions` does the same for a call with attentions, whose axes the compiler plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass.config import RingConfig
from ringpass.layouts.layout import Layout
from ringpass.nodes import op_name
from ringpass.passes.capture.capture import Captured
from ringpass.passes.detect.detect import detect
from ringpass.passes.divide import divide
from ringpass.passes.failures import Failures
from ringpass.passes.op_rules import table as rules
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.partition.partitioned import Partitioned, ShardedOutput
from ringpass.passes.partition.placement import place
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.partition.writer import partition
from ringpass.passes.plan.axes import aligned_axes
from ringpass.passes.plan.plan import RingPlan
from ringpass.passes.plan.prove import prove_all
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Sweep, propagate
from ringpass.passes.verify import verify
from tests.support import thread_ranks
from tests.support.pipeline_stages import captured_graph

B, S, H, D = 2, 11, 3, 4


FAILURES = Failures(strict=True)  # an analysis that fails is a failed test


@dataclass(frozen=True)
class Case:
    """An op's name, what calls it, the shapes of its operands, whether it gathers."""

    op: str
    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((B, S, D),)
    gathers: bool = False
    wanted: Callable[..., Any] | None = None  # what the call is to give where an option changes it

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shapes[0]))}"


def inputs(case: Case) -> list[Tensor]:
    """Random operands of the case's shapes, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
    return [x.requires_grad_() for x in made]


def outputs_of(value: Any) -> list[Tensor]:
    """The floating-point tensors that an op returns."""
    return [value] if isinstance(value, Tensor) else [x for x in value if x.is_floating_point()]


def after_product(case: Case, wanted: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The case's op, or what it is to give, on products, which are sharded where an input might be replicated."""
    call = case.wanted if wanted and case.wanted else case.call
    return lambda *xs: tuple(outputs_of(call(*(x * 1.5 for x in xs))))


def captured_of(case: Case) -> Captured:
    """The case's graph, without Dynamo, for speed."""
    given = inputs(case)
    return captured_graph(make_fx(after_product(case), pre_dispatch=True)(*given), given)


def rank_programs(case: Case, layout: str, world: int, tokens: int = S) -> list[Partitioned]:
    """Each rank's program, as if an attention had the sequence of the first operand that has one."""
    captured = captured_of(case)
    assert case.op in {op_name(n) for n in captured.gm.graph.nodes}, captured.gm.graph
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    products = [user for n in placeholders for user in n.users]
    sweep = propagate(captured.gm, rules.rule_for, products, FAILURES)
    verify("propagate", sweep)
    factors = [f for n in placeholders for d in sweep.dims(n) for f in d if f.size == tokens]
    return programs_along(captured, sweep, factors[0], tokens, layout, world)


def programs_along(
    captured: Captured, sweep: Sweep, factor: Factor, tokens: int, layout: str, world: int
) -> list[Partitioned]:
    """Each rank's program, as if an attention had the sequence of `tokens` that is `factor`."""
    axis = Axis(0, factor, tokens, Layout("contiguous", world))
    axes = [
        replace(a, layout=a.layout.with_scheme(layout)) for a in aligned_axes({factor: axis}, sweep, world).values()
    ]
    planned = RingPlan(world, tuple(axes), ())
    return _programs(captured, planned, _checked(place, captured, planned, sweep, {}, FAILURES))


def planned_programs(case: Case, layout: str, world: int, **options: Any) -> list[Partitioned]:
    """Each rank's program of a call with attentions, as the compiler plans it."""
    captured = captured_of(case)
    sites = detect(captured.gm, failures=FAILURES)
    config = RingConfig.from_options({"layout": layout, **options})
    division = divide(_checked, captured, sites, world, config, {}, FAILURES)
    prove_all(division.plan, 0)
    return _programs(captured, division.plan, division.placement)


def _checked(stage: Callable[..., Any], *args: Any) -> Any:
    """What a stage returns, once it is verified."""
    result = stage(*args)
    verify(stage.__name__, result)
    return result


def _programs(captured: Captured, plan: RingPlan, placement: PlacementPlan) -> list[Partitioned]:
    made = [
        partition(captured, placement, plan, Rank(rank, plan.world, f"{thread_ranks.NAME}{rank}"), False, False)
        for rank in range(plan.world)
    ]
    for program in made:
        verify("partition", program)
    return made


def local_shard(x: Tensor, spec: ShardedOutput | None, rank: int, world: int) -> Tensor:
    """The shard that a rank holds of an output."""
    if spec is None:
        return x
    if spec.part is not None:  # taken when it is used
        return x.new_zeros(0)
    assert isinstance(spec.outer, int) and isinstance(spec.tokens, int)
    inner = x.shape[spec.dim] // (spec.outer * spec.tokens)
    split = x.reshape(*x.shape[: spec.dim], spec.outer, spec.tokens, inner, *x.shape[spec.dim + 1 :])
    layout = Layout(spec.layout, world)
    if layout.order:  # along a curve
        split = split.index_select(spec.dim + 1, torch.as_tensor(layout.order.permutation.values.copy()))
    ranges = layout.ranges(rank, spec.tokens)
    mine = torch.cat([split.narrow(spec.dim + 1, a, b - a) for a, b in ((0, 0), *ranges)], spec.dim + 1)
    return mine.flatten(spec.dim, spec.dim + 2)


def assert_close(got: Tensor, want: Tensor, full: Tensor, tolerance: float = 1e-12) -> None:
    """To `tolerance` of the largest element of the full tensor, or of 1."""
    most = float(full.detach().abs().max()) if full.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(most, 1.0))


def check_on_shards(case: Case, layout: str, world: int, tokens: int = S) -> list[str]:
    """Asserts that each rank has its shard of outputs and full gradients; why it gathered values, outputs left out."""
    return check_programs(case, rank_programs(case, layout, world, tokens))


def check_attentions(case: Case, layout: str, world: int, tolerance: float = 1e-12, **options: Any) -> list[str]:
    """`check_on_shards` of a call with attentions, on the axes that the compiler plans."""
    return check_programs(case, planned_programs(case, layout, world, **options), tolerance)


def check_programs(case: Case, made: list[Partitioned], tolerance: float = 1e-12) -> list[str]:
    """`check_on_shards` of programs that are made already, one for each rank."""
    given, world = inputs(case), len(made)
    want = after_product(case, wanted=True)(*given)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in want]
    want_grads = torch.autograd.grad(want, given, cotangents, allow_unused=True)

    def job(rank: int, group: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        xs, local = inputs(case), made[rank]
        got = local.gm(*xs)[: len(want)]
        weights = [local_shard(c, spec, rank, world) for c, spec in zip(cotangents, local.outputs, strict=True)]
        return list(got), torch.autograd.grad(got, xs, weights, allow_unused=True)

    for rank, (got, grads) in enumerate(thread_ranks.run(world, job)):
        for y, full, spec in zip(got, want, made[rank].outputs, strict=True):
            assert_close(y, local_shard(full, spec, rank, world), full, tolerance)
        for g, full in zip(grads, want_grads, strict=True):
            assert (g is None) == (full is None)
            if g is not None:
                assert_close(g, full, full, tolerance)
    return [g.reason for g in made[0].gathers if g.reason != "output"]
