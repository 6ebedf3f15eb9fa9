"""Constant arrays: the extremes of any box are those of its elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringpass.masks.constants import ConstantArray


@st.composite
def arrays_and_boxes(draw: st.DrawFn) -> tuple[NDArray[np.generic], list[tuple[int, int]]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    elements = draw(st.sampled_from([st.booleans(), st.integers(-3, 3), st.integers(0, 2**40)]))
    values = np.array(draw(st.lists(elements, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    ends = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for n in shape]
    return values.reshape(shape), [(low, high) for low, high in ends]


@given(arrays_and_boxes())
def test_bounds(drawn: tuple[NDArray[np.generic], list[tuple[int, int]]]) -> None:
    values, box = drawn
    low, high = ConstantArray(values).bounds([(np.array([float(a)]), np.array([float(b)])) for a, b in box])
    inside = values[tuple(slice(a, b + 1) for a, b in box)]
    exact = values.dtype == bool or all(a == b for a, b in box[:-1])
    if exact:
        assert (low, high) == (inside.min(), inside.max())
    else:
        everywhere = values[..., box[-1][0] : box[-1][1] + 1]
        assert (low, high) == (everywhere.min(), everywhere.max())


def test_equal_contents_are_equal() -> None:
    same = ConstantArray([0, 1, 1]), ConstantArray(torch.tensor([0, 1, 1]))
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    assert ConstantArray([0, 1, 1]) != ConstantArray([[0, 1, 1]]) and ConstantArray([0, 1]) != ConstantArray(
        [False, True]
    )


def test_indices_from_the_end_are_unknown() -> None:
    low, high = ConstantArray([3, 4]).bounds([(np.array([-1.0]), np.array([0.0]))])
    assert (low, high) == (-np.inf, np.inf)


@pytest.mark.parametrize("values", [[0.5], [], 3, ["a"]])
def test_other_arrays_are_refused(values: object) -> None:
    with pytest.raises(ValueError, match="expected bools or integers"):
        ConstantArray(values)
