"""Counter-based dropout: an element's keep bit is the same in any part of the mask; bits are fair and independent."""

from __future__ import annotations

import doctest
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringpass.layouts.layout import NAMES, Layout
from ringpass.ops import counter_random as dropout
from ringpass.ops.counter_random import keep

SEED = 0x1234_5678_9ABC_DEF0


def keep_mask(*sizes: int, seed: int = SEED, stream: int = 0, p: float = 0.5) -> Tensor:
    return keep(torch.tensor(seed), stream, p, [torch.arange(n) for n in sizes])


def test_docstrings() -> None:
    assert doctest.testmod(dropout).failed == 0


# --- one keep bit per element -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.data()), min_size=1, max_size=4), st.integers(-(2**63), 2**63 - 1))
def test_any_part_equals_that_part_of_the_full_mask(dims: Sequence[tuple[int, st.DataObject]], seed: int) -> None:
    picks = [torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1))) for n, data in dims]
    full = keep_mask(*(n for n, _ in dims), seed=seed, p=0.3)
    part = keep(torch.tensor(seed), 0, 0.3, picks)
    assert torch.equal(part, full[torch.meshgrid(*picks, indexing="ij")])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_hold_parts_of_one_mask(name: str, world: int) -> None:
    full = keep_mask(2, 37, 8)
    for rank in range(world):
        spans = [torch.arange(a, b) for a, b in Layout(name, world).ranges(rank, 37)]
        part = keep(torch.tensor(SEED), 0, 0.5, [torch.arange(2), torch.cat(spans), torch.arange(8)])
        assert torch.equal(part, full[:, torch.cat(spans)])


def test_indices_may_be_large() -> None:
    far = torch.tensor([2**20, 2**31 - 1, 2**31, 2**32 - 1])
    masks = keep(torch.tensor(SEED), 0, 0.5, [far, torch.arange(512)])
    assert len({tuple(row.tolist()) for row in masks}) == 4
    columns = keep(torch.tensor(SEED), 0, 0.5, [torch.arange(512), far])
    assert len({tuple(column.tolist()) for column in columns.T}) == 4


# --- fair and independent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sizes", [(1 << 20,), (1024, 1024), (4, 8, 256, 128)])
def test_rate(p: float, sizes: tuple[int, ...]) -> None:
    mask = keep_mask(*sizes, p=p)
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * sigma
    for dim in range(mask.dim()):  # of each slice
        others = [d for d in range(mask.dim()) if d != dim]
        rates = mask.double().mean(others) if others else mask.double()
        spread = (p * (1 - p) * rates.numel() / mask.numel()) ** 0.5
        if mask.numel() // rates.numel() > 100 and 0.05 < p < 0.95:
            assert (rates - (1 - p)).abs().max() < 6 * spread


def test_rates_of_nothing_and_all() -> None:
    assert keep_mask(100, 100, p=0.0).all()
    assert not keep_mask(100, 100, p=1.0).any()


def test_a_higher_rate_drops_more_of_the_same() -> None:
    assert (keep_mask(64, 64, p=0.3) | ~keep_mask(64, 64, p=0.4)).all()


def test_no_two_rows_are_equal() -> None:
    mask = keep_mask(65536, 64)
    words = (mask.long() << torch.arange(64)).sum(1)
    assert words.unique().numel() == 65536


def chi_square(a: Tensor, b: Tensor) -> float:
    """Of the 2 x 2 table of two sets of fair keep bits; 1 degree of freedom."""
    expected = a.numel() / 4
    counts = [((a == x) & (b == y)).sum().item() for x in (False, True) for y in (False, True)]
    return sum((n - expected) ** 2 / expected for n in counts)


LIMIT = 25.0  # five sigma, 3 degrees of freedom at most: one in 65000


@pytest.mark.parametrize("shift", [1, 2, 3, 7, 64, 255, 256])
def test_neighbours_are_independent(shift: int) -> None:
    mask = keep_mask(1024, 1024)
    assert chi_square(mask[shift:], mask[:-shift]) < LIMIT
    assert chi_square(mask[:, shift:], mask[:, :-shift]) < LIMIT
    assert chi_square(mask[shift:, shift:], mask[:-shift, :-shift]) < LIMIT
    assert chi_square(mask, mask.T.contiguous().roll(shift, 0)) < LIMIT


def test_streams_and_seeds_are_independent() -> None:
    base = keep_mask(512, 512)
    for stream in (1, 2, 3, 100, 2**20):
        assert chi_square(base, keep_mask(512, 512, stream=stream)) < LIMIT
    for seed in (SEED + 1, SEED ^ (1 << 32), SEED ^ (1 << 62), -SEED, SEED >> 32, 0, 1):
        assert chi_square(base, keep_mask(512, 512, seed=seed)) < LIMIT
    assert chi_square(keep_mask(512, 512, seed=1, stream=0), keep_mask(512, 512, seed=0, stream=1)) < LIMIT


def test_pairs_of_rows_are_independent() -> None:
    """The products of keep bits of row pairs: as many agree as of independent bits."""
    signs = keep_mask(512, 4096).float() * 2 - 1
    agreement = (signs @ signs.T).fill_diagonal_(0).abs().max().item() / 4096**0.5
    assert agreement < 6.0


def test_quadruples_are_independent() -> None:
    """Row and column hashes are combined: a weak combination shows in the corners of rectangles."""
    signs = keep_mask(1024, 1024).float() * 2 - 1
    for rows, columns in ((1, 1), (2, 3), (64, 64), (128, 1)):
        corners = signs * signs.roll(rows, 0) * signs.roll(columns, 1) * signs.roll((rows, columns), (0, 1))
        assert abs(corners.mean().item()) * 1024 < 5


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_inductor_draws_the_same_keep_mask() -> None:
    torch._dynamo.reset()

    def f(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return keep(seed, 3, 0.2, [rows, columns])

    arguments = torch.tensor(-SEED), torch.arange(1000, 1040), torch.arange(333)
    assert torch.equal(torch.compile(f, fullgraph=True)(*arguments), f(*arguments))
