"""Pruning by what each call brings: documents and padding by `runtime_pruning`, chosen blocks by `approximate`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ringpass import OptionError, ops, top_blocks
from ringpass.layouts.layout import Layout
from ringpass.masks.constants import ConstantArray
from ringpass.masks.expr import parse
from ringpass.masks.intervals import FULL, KINDS, PARTIAL, classify_all
from ringpass.masks.rewrite import bind
from ringpass.ops import attention
from ringpass.schedule.block_selection import TopBlocks, block_sums, choose, means
from ringpass.schedule.program import Program, program
from ringpass.schedule.proof import prove
from ringpass.schedule.tiles import Problem, tiling
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.pipeline_stages import fake_ring, stages
from tests.support.process_ranks import Workers

S = 45
BLOCK = 8
EXISTS = torch.arange(S) < torch.tensor([[S], [S - 5]])


class Packed(nn.Module):
    """Causal attention inside documents whose ids come with the batch, and to keys that exist."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.project, self.causal = nn.Linear(8, 32), causal

    def forward(self, x: Tensor, ids: Tensor | None = None, exists: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        allowed = (allowed.tril() if self.causal else allowed)[None, None]
        if ids is not None:
            allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
        if exists is not None:
            allowed = allowed & exists[:, None, None, :]
        return self.attend(q, k, v, allowed)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Four query heads, two key heads."""
        q, k, v = self.project(x).view(*x.shape[:2], 8, 4).transpose(1, 2).split((4, 2, 2), 1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def step(out: Tensor, model: Packed) -> tuple[Tensor, Tensor]:
    """The output and the gradient of its square."""
    return out.detach(), torch.autograd.grad(out.square().sum(), model.project.weight)[0]


def counting(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Program]:
    """What `run` returns, and the last schedule that a ring of this rank read meanwhile."""
    read: list[Program] = []

    def reading(problem: Problem, rank: int) -> Program:
        read.append(program(problem, rank))
        return read[-1]

    with patch("ringpass.schedule.site.program", reading):
        return run(), read[-1]


def packed(group: dist.ProcessGroup, compiler: str) -> list[tuple[float, int, int]]:
    """(error, key tokens received, those a document needs) of calls with different documents, compiled once."""
    model, g = Packed().double(), torch.Generator().manual_seed(0)
    run = compiled(model, group, runtime_pruning=True, layout="contiguous", tile=4, compiler=compiler)
    found = []
    for ends in ([9, 30], [15], [22, 23, 24]):
        x = torch.randn(2, S, 8, dtype=torch.float64, generator=g)
        ids = torch.bucketize(torch.arange(S), torch.tensor(ends), right=True).expand(2, S)
        got, read = counting(lambda x=x, ids=ids: step(run(x, ids, EXISTS), model))  # type: ignore[misc]
        want = step(model(x, ids, EXISTS), model)
        start = Layout("contiguous", group.size()).ranges(group.rank(), S)[0][0]
        needed = start - max([0, *(end for end in ends if end <= start)])
        found.append((max(relative(a, b) for a, b in zip(got, want, strict=True)), read.received, needed))
    return found


@pytest.mark.parametrize(
    ("ranks", "compiler"), [(1, "aot_eager"), (2, "inductor"), (3, "aot_eager"), slow(5, "aot_eager")]
)
def test_documents_of_each_call_prune_it(workers: Workers, ranks: int, compiler: str) -> None:
    for results in workers.run(packed, ranks, compiler):
        for error, received, needed in results:
            assert error < 1e-12
            assert received == needed


def rewritten(group: dist.ProcessGroup, compiler: str) -> list[tuple[float, int, int]]:
    """As `packed`, with ids that are written to the same memory, and a backward after the next forward."""
    model, g = Packed().double(), torch.Generator().manual_seed(0)
    run = compiled(model, group, runtime_pruning=True, layout="contiguous", tile=4, compiler=compiler)
    ids, found = torch.empty(2, S, dtype=torch.int64), []
    for ends in ([9, 30], [15], [22, 23, 24]):
        x = torch.randn(2, S, 8, dtype=torch.float64, generator=g)
        ids.copy_(torch.bucketize(torch.arange(S), torch.tensor(ends), right=True))
        got, read = counting(lambda x=x: step(run(x, ids, EXISTS), model))  # type: ignore[misc]
        want = step(model(x, ids, EXISTS), model)
        start = Layout("contiguous", group.size()).ranges(group.rank(), S)[0][0]
        needed = start - max([0, *(end for end in ends if end <= start)])
        found.append((max(relative(a, b) for a, b in zip(got, want, strict=True)), read.received, needed))
    return found


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_memory_that_is_written_again_prunes_by_its_new_values(workers: Workers, compiler: str) -> None:
    for results in workers.run(rewritten, 2, compiler):
        for error, received, needed in results:
            assert error < 1e-12
            assert received == needed


def test_the_array_of_a_host_copy_is_made_once_and_never_stale() -> None:
    copy = attention.host_copy(torch.tensor([0, 0, 1]))
    first = attention._array(copy)
    assert attention._array(copy) is first
    copy[2] = 5
    assert attention._array(copy).values.tolist() == [0, 0, 5] and first.values.tolist() == [0, 0, 1]


class TwoPacked(Packed):
    """Two attentions with one mask."""

    def forward(self, x: Tensor, ids: Tensor | None = None, exists: Tensor | None = None) -> Tensor:
        return super().forward(super().forward(x, ids, exists)[..., :8], ids, exists).square().mean()


def test_two_sites_share_one_host_copy_which_comes_first() -> None:
    with fake_ring(0, 2), stages() as seen:
        options: Any = {"runtime_pruning": True, "compiler": "aot_eager"}
        run: Any = torch.compile(TwoPacked(), backend="ring_dilated", options=options)
        ids = torch.zeros(2, S, dtype=torch.int64)
        run(torch.randn(2, S, 8), ids).backward()
    (partitioned,) = seen["partitioned"]
    calls = [n for n in partitioned.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    sites = [n for n in calls if n.target is ops.ring_attention]
    copies = [n for n in calls if n.target is ops.host_copy]
    assert len(sites) == 2 and len(copies) == 1 and set(copies[0].users) == {*sites}
    assert calls.index(copies[0]) <= 1 and copies[0].args[0].op == "placeholder"  # only `replicate` may come before
    (backward,) = seen["backward"]
    assert not [n for n in backward.graph.nodes if n.target is ops.host_copy]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(["contiguous", "zigzag"]), st.sampled_from([1, 4, 64]))
def test_schedules_of_any_data_are_proved(data: st.DataObject, world: int, layout: str, tile: int) -> None:
    ids = data.draw(st.lists(st.integers(0, 3), min_size=24, max_size=24))
    exists = data.draw(st.lists(st.booleans(), min_size=24, max_size=24))
    sides = Layout(layout, world)
    mask = "k <= q & x0[b, q] == x0[b, k] & x1[b, k]"
    constants = (0, ConstantArray([ids, sorted(ids)])), (1, ConstantArray([exists, exists]))
    prove(Problem(mask, 24, 24, sides, sides, tile, constants=constants))


# --- chosen blocks ----------------------------------------------------------------------------------------------------


def chosen(model: Packed, x: Tensor, how: TopBlocks) -> Tensor:
    """The mask of the chosen pairs of blocks, as a dense tensor: (B, 1, S, S)."""
    q, k, _ = model.heads(x)
    blocks = [range(i, min(i + how.block, S)) for i in range(0, S, how.block)]
    q, k = (torch.stack([y[:, :, list(b)].mean(2) for b in blocks], 2) for y in (q, k.repeat_interleave(2, 1)))
    allowed = torch.ones(len(blocks), len(blocks), dtype=torch.bool).tril()
    weight = (q @ k.mT / 2).masked_fill(~allowed, -torch.inf).softmax(-1).mean(1)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for b in range(len(x)):
        for i in range(len(blocks)):
            order = [i, *(j for j in weight[b, i].argsort(descending=True).tolist() if j < i)]
            share = 0.0
            for n, j in enumerate(order):
                if how.density is not None and n >= how.density * (i + 1) or how.mass is not None and share >= how.mass:
                    break
                keep[b, i, j], share = True, share + float(weight[b, i, j])
    at = torch.arange(S) // how.block
    return (keep[:, at][:, :, at] & torch.ones(S, S, dtype=torch.bool).tril())[:, None]


def approximate(group: dist.ProcessGroup, how: TopBlocks, options: dict[str, object]) -> tuple[float, float, int]:
    """(error against the dense mask, change of the result, pairs computed)."""
    model, g = Packed().double(), torch.Generator().manual_seed(1)
    model.project.weight.data *= 3.0
    x = torch.randn(2, S, 8, dtype=torch.float64, generator=g)
    run = compiled(model, group, approximate=how, **options)
    got, read = counting(lambda: step(run(x), model))
    want = step(model.attend(*model.heads(x), chosen(model, x, how)), model)
    exact = model(x)
    error = max(relative(a, b) for a, b in zip(got, want, strict=True))
    return error, relative(got[0], exact), read.area


@pytest.mark.parametrize("ranks", (slow(1), 2, 3, slow(5)))
@pytest.mark.parametrize("how", [top_blocks(BLOCK, density=0.3), top_blocks(BLOCK, mass=0.6)], ids=str)
def test_chosen_blocks_are_attended_and_no_others(workers: Workers, how: TopBlocks, ranks: int) -> None:
    for error, change, _ in workers.run(approximate, ranks, how, {"layout": "zigzag"}):
        assert error < 1e-12
        assert change > 1e-3


def test_chosen_blocks_under_inductor(workers: Workers) -> None:
    for error, _, _ in workers.run(approximate, 2, top_blocks(BLOCK, density=0.3), {"compiler": "inductor"}):
        assert error < 1e-12


def test_what_is_not_chosen_is_not_computed(workers: Workers) -> None:
    few, all_of_them = (
        workers.run(approximate, 1, top_blocks(BLOCK, density=share), {})[0][2] for share in (0.01, 1.0)
    )
    assert few <= S * BLOCK and all_of_them >= S * (S + 1) / 2


def test_pools_are_means_of_blocks_that_span_ranks() -> None:
    x = torch.randn(2, 3, S, 4, dtype=torch.float64)
    parts = [Layout("zigzag", 3).ranges(rank, S) for rank in range(3)]
    sums = sum(block_sums(torch.cat([x[:, :, a:b] for a, b in ranges], 2), BLOCK, ranges, S) for ranges in parts)
    assert isinstance(sums, Tensor)
    want = torch.stack([x[:, :, i : i + BLOCK].mean(2) for i in range(0, S, BLOCK)], 2)
    torch.testing.assert_close(means(sums, BLOCK, S), want)


def test_closed_blocks_are_never_chosen() -> None:
    q = torch.randn(1, 2, 6, 4)
    kept = choose(q, q, 1.0, "k <= q & q - k < 8", (S, S), top_blocks(BLOCK, mass=1.0))[0]
    assert torch.equal(kept, torch.ones(6, 6).tril().triu(-1).bool())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "one of density and mass, got 0"),
        ({"density": 0.5, "mass": 0.5}, "got 2"),
        ({"density": 0}, "above 0 and at most 1, got 0"),
        ({"mass": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"block": 0, "mass": 0.5}, "block must be an int of at least 1 and below .*, got 0"),
    ],
)
def test_wrong_selections_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        top_blocks(**wrong)  # type: ignore[arg-type]


def test_constant_leaves_bound_the_tiling() -> None:
    sides = Layout("contiguous", 2)
    one = Problem("x0[k]", 8, 8, sides, sides, 2, constants=((0, ConstantArray([True] * 3 + [False] * 5)),))
    assert program(one, 1).received == 3
    assert tiling(one).areas(2).tolist() == [16, 12]  # a tile of local keys is not trimmed


def test_wide_and_wrapping_ids_are_never_taken_for_equal() -> None:
    """Ids that float64 rounds to one number, and differences that wrap in uint8, leave a tile partial."""
    q = k = (np.array([0]), np.array([8]))
    wide = ConstantArray([2**62 + i // 4 for i in range(8)])
    narrow = ConstantArray(torch.arange(8, dtype=torch.uint8))
    for mask, values in (("x0[q] == x0[k]", wide), ("x0[q] - x0[k] <= 0", narrow), ("x0[k] - 1 >= 0", narrow)):
        assert classify_all(bind(parse(mask), {0: values}), q, k) == KINDS.index(PARTIAL), mask
    above = (np.array([0]), np.array([4])), (np.array([4]), np.array([8]))
    assert classify_all(bind(parse("x0[q] - x0[k] <= 0"), {0: narrow}), *above) == KINDS.index(PARTIAL)
    assert classify_all(bind(parse("x0[q] <= x0[k]"), {0: narrow}), *above) == KINDS.index(FULL)


def test_the_density_of_chosen_blocks_is_exact() -> None:
    for share, blocks, kept in ((0.3, 50, 15), (0.07, 100, 7), (0.25, 10, 3), (1.0, 7, 7)):
        q = torch.randn(1, 1, blocks, 4)
        chosen_pairs = choose(q, q, 1.0, "True", (blocks, blocks), top_blocks(1, density=share))
        assert (chosen_pairs.sum(-1) == kept).all()
