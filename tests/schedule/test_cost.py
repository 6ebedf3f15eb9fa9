"""Layouts: ranks do equal work over all layers together, with as few bytes as that allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringpass.layouts.layout import ASSIGNED, Layout
from ringpass.patterns import Pattern, block_causal, causal, documents, prefix, window
from ringpass.schedule.attention_time import Load
from ringpass.schedule.cost import Estimate, choose, estimate, refine
from ringpass.schedule.tiles import Problem
from tests.support.marks import slow
from tests.support.model_parity import worst
from tests.support.process_ranks import Workers

CAUSAL, SLIDING = causal(), causal() & window(1023)


def load(pattern: Pattern | str, world: int, tokens: int) -> Load:
    here = Layout("contiguous", world)
    problem = Problem(str(pattern), tokens, tokens, here, here)
    return Load(replace(problem, tile=refine([problem], "cpu")), heads=8, key_heads=2, widths=(64, 64), itemsize=4)


def best(patterns: list[Pattern | str], world: int, tokens: int, fixed: bool = True) -> Estimate:
    return choose([load(p, world, tokens) for p in patterns], world, fixed)[0]


@pytest.mark.parametrize("world", range(2, 65))
def test_causal_is_balanced_by_zigzag(world: int) -> None:
    found = best([CAUSAL], world, 2048 * world + 1)
    assert found.layout == "zigzag" and found.imbalance <= 1.02


@pytest.mark.parametrize("world", (2, 4, 8))
def test_a_window_moves_least_when_contiguous(world: int) -> None:
    assert best([SLIDING], world, 8192 * world).layout == "contiguous"
    assert best(["True"], world, 8192 * world).layout == "contiguous"


@pytest.mark.parametrize("world", (2, 4, 5, 8))
def test_alternating_layers_are_balanced_together(world: int) -> None:
    """Five sliding layers to a full one, as in Gemma-3."""
    assert best([*[SLIDING] * 5, CAUSAL], world, 4096 * world + 7).imbalance <= 1.05


@pytest.mark.parametrize("world", (2, 3, 5, 8))
@pytest.mark.parametrize(
    "pattern",
    [
        prefix(3000),
        block_causal(700),
        causal() & ~(Pattern(prefix(0).expr) & window(200)),
        "k <= q & (q < 9000 | q - k < 500)",  # a long document, then short context
        "k < 2000 & q >= 2000 | k <= q & q < 2000",
    ],
    ids=str,
)
def test_other_masks_are_balanced(pattern: Pattern | str, world: int) -> None:
    assert best([pattern], world, 16384 + 3).imbalance <= 1.10


@pytest.mark.parametrize("world", (2, 3, 4, 8, 16))
@pytest.mark.parametrize("seed", range(5))
def test_documents_of_random_lengths_are_balanced(world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(100, 6000, (8 * world,), generator=generator).tolist()
    assert best([causal() & documents(lengths)], world, sum(lengths)).imbalance <= 1.10


def test_a_map_by_hand_needs_lengths_that_stay() -> None:
    odd: Any = "k <= q & (q < 9000 | q - k < 500)"
    assert not best([odd], 5, 16387, fixed=False).layout.startswith(ASSIGNED)
    assert not best([odd], 5, 79).layout.startswith(ASSIGNED)


def test_estimates_count_all_sites() -> None:
    one, two = (estimate([load(CAUSAL, 4, 4096)] * n, "zigzag", 4) for n in (1, 2))
    assert (two.flops, two.bytes) == (2 * one.flops, 2 * one.bytes)


def test_tiles_are_as_fine_as_the_mask_is_narrow() -> None:
    here = Layout("contiguous", 4)
    masks = CAUSAL, SLIDING, causal() & window(255), "k <= q & x0[b, k]"
    edges = [refine([Problem(str(p), 32768, 32768, here, here)], "cpu") for p in masks]
    assert edges[0] == edges[3] == 1024 and edges[1] >= edges[2] and 1024 > edges[2] >= 128


@pytest.mark.parametrize(("layout", "ranks"), [("auto", 3), slow("auto", 2), slow("striped", 2), slow("striped", 3)])
def test_parity_in_other_layouts(workers: Workers, layout: str, ranks: int) -> None:
    odd = Pattern(block_causal(40).expr) & (window(20) | ~causal())
    error, where = worst(workers.run(job, ranks, layout, odd))
    assert error < 1e-10, where


def job(group: dist.ProcessGroup, layout: str, pattern: Pattern) -> dict[str, float]:
    """Errors of an attention under `pattern` in `layout` against its dense_mask mask."""
    from tests.support.model_parity import compiled, relative
    from tests.support.pattern_models import SelfAttention, dense_mask

    model, x = SelfAttention(False).double(), torch.randn(2, 149, 8, dtype=torch.float64)
    found = []
    for out in (compiled(model, group, layout=layout, mask=pattern, tile=4)(x), model(x, dense_mask(pattern, 149))):
        found.append((out, *torch.autograd.grad(out.square().sum(), model.project.weight)))
    names = ("out", "gradient")
    return {name: relative(got, want) for name, got, want in zip(names, *found, strict=True)}
