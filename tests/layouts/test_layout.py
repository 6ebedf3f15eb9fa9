"""Layouts give each token to one rank, in ascending order, in near-equal numbers."""

from __future__ import annotations

import doctest

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from ringpass.errors import ParseError
from ringpass.layouts import layout
from ringpass.layouts.layout import NAMES, Layout, assigned
from ringpass.layouts.ranges import Ranges, size, tokens

lengths = st.integers(0, 500)
worlds = st.integers(1, 12)


def test_docstrings() -> None:
    assert doctest.testmod(layout).failed == 0


@pytest.mark.parametrize(
    ("name", "world", "length", "expected"),
    [
        ("contiguous", 3, 7, [((0, 3),), ((3, 5),), ((5, 7),)]),
        ("contiguous", 4, 2, [((0, 1),), ((1, 2),), (), ()]),
        ("chunked", 3, 7, [((0, 3),), ((3, 6),), ((6, 7),)]),
        ("chunked", 4, 5, [((0, 2),), ((2, 4),), ((4, 5),), ()]),
        ("zigzag", 2, 8, [((0, 2), (6, 8)), ((2, 6),)]),
        ("zigzag", 3, 13, [((0, 3), (11, 13)), ((3, 5), (9, 11)), ((5, 9),)]),
        ("zigzag", 3, 4, [((0, 1),), ((1, 2),), ((2, 4),)]),
        ("zigzag", 1, 5, [((0, 5),)]),
        ("zigzag", 2, 0, [(), ()]),
        ("replicated", 2, 5, [((0, 5),), ((0, 5),)]),
    ],
)
def test_ranges(name: str, world: int, length: int, expected: list[Ranges]) -> None:
    assert [Layout(name, world).ranges(rank, length) for rank in range(world)] == expected


@given(st.sampled_from(("contiguous", "zigzag", "striped")), worlds, lengths)
def test_each_token_has_one_owner(name: str, world: int, length: int) -> None:
    by_rank = [Layout(name, world).ranges(rank, length) for rank in range(world)]
    assert sorted(t for ranges in by_rank for a, b in ranges for t in range(a, b)) == list(range(length))


@pytest.mark.parametrize("name", ("contiguous", "zigzag", "striped", "zigzag cut 2,-9", "chunks 0,1,2,2,1,0"))
@pytest.mark.parametrize("unit", (2, 7))
def test_units_are_assigned_as_tokens(name: str, unit: int, world: int = 3, units: int = 29) -> None:
    layout = Layout(name, world).in_units(unit)
    assert (layout.unit, layout.of_units, Layout(name, world).in_units(1)) == (unit, *[Layout(name, world)] * 2)
    assert layout.with_scheme("zigzag").of_units == Layout(name, world).with_scheme("zigzag")
    for rank in range(world):
        ranges = tuple((a * unit, b * unit) for a, b in Layout(name, world).ranges(rank, units))
        assert layout.ranges(rank, units * unit) == ranges and layout.length(rank, units * unit) == size(ranges)


@pytest.mark.parametrize("name", ("contiguous", "zigzag", "striped"))
@pytest.mark.parametrize(("left_out", "tokens"), [(0, 29 * 4 - 3), (3, 29 * 4 - 3), (1, 29 * 4 - 2)])
def test_slices_of_units_are_where_the_units_are(name: str, left_out: int, tokens: int, world: int = 3) -> None:
    whole, part = Layout(name, world).in_units(4), Layout(name, world).in_units(4, left_out)
    for rank in range(world):
        held = [t for a, b in whole.ranges(rank, 29 * 4) for t in range(a, b)]
        found = [t + left_out for a, b in part.ranges(rank, tokens) for t in range(a, b)]
        assert found == [t for t in held if left_out <= t < left_out + tokens]
        assert part.length(rank, tokens) == len(found)


@given(st.sampled_from(NAMES), worlds, lengths)
def test_ranges_are_normal(name: str, world: int, length: int) -> None:
    here = Layout(name, world)
    by_rank = [here.ranges(rank, length) for rank in range(world)]
    for rank, ranges in enumerate(by_rank):
        assert all(a < b for a, b in ranges)
        assert all(before < after for (_, before), (after, _) in zip(ranges, ranges[1:], strict=False))
        assert size(ranges) == here.length(rank, length)
        assert len(ranges) <= here.chunks / (1 if name == "replicated" else world)
    assert max(map(size, by_rank)) - min(map(size, by_rank)) <= (2 if name == "zigzag" else 1)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), lengths)
def test_assigned_chunks_have_one_owner(owners: list[int], length: int) -> None:
    here = Layout(assigned(owners), 5)
    by_rank = [here.ranges(rank, length) for rank in range(5)]
    assert sorted(t for ranges in by_rank for a, b in ranges for t in range(a, b)) == list(range(length))
    assert [size(r) for r in by_rank if r] == [here.length(rank, length) for rank in range(5) if by_rank[rank]]


@settings(deadline=None)
@given(st.sampled_from(NAMES), worlds, lengths)
def test_lengths_of_symbols(name: str, world: int, length: int) -> None:
    """`length` is asked with SymInts: nothing but + and // may be used."""
    symbol = sympy.Symbol("s", integer=True, nonnegative=True)
    for rank in range(world):
        formula = sympy.sympify(Layout(name, world).length(rank, symbol))
        assert formula.subs(symbol, length) == Layout(name, world).length(rank, length)


def test_only_replicated_axes_are_replicated() -> None:
    assert [Layout(name, 3).replicated for name in NAMES] == [False, False, False, True]
    assert [Layout(name, 3).chunks for name in NAMES] == [3, 6, 24, 1]
    assert Layout("zigzag", 3).owned(1) == (1, 4)
    with pytest.raises(ParseError, match="not the name of a layout: 'spiral'"):
        Layout("spiral", 2)


@given(st.sampled_from(NAMES), worlds, lengths, st.data())
def test_rows_hold_their_tokens(name: str, world: int, length: int, data: st.DataObject) -> None:
    ranges = Layout(name, world).ranges(data.draw(st.integers(0, world - 1)), length)
    flat = [t for a, b in ranges for t in range(a, b)]
    low = data.draw(st.integers(0, len(flat)))
    high = data.draw(st.integers(low, len(flat)))
    assert [t for a, b in tokens(ranges, (low, high)) for t in range(a, b)] == flat[low:high]
