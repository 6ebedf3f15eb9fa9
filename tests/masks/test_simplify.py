"""Closed forms: one spelling for each mask, and the same value everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import CAUSAL, Expr, parse
from ringpass.masks.simplify import simplify
from tests.support.mask_expressions import BATCH, HEADS, KEYS, QUERIES, bools, index_grid, leaves

SPELLINGS = {
    "k <= q": ("q >= k", "not(k > q)", "k < q + 1", "2 * k <= 2 * q + 1", "k <= q & k < q + 5", "-1 * q <= -1 * k"),
    "q - k < 4096": ("q - 4096 < k", "k > q - 4096", "not(q - k >= 4096)", "q <= k + 4095", "4096 > q - k"),
    "k <= q & q - k < 8": ("q - k < 8 & q >= k", "not(k > q | q - k > 7)", "k <= q & q - k < 8 & q - k < 9 & 0 <= k"),
    "k < 3": ("k < 5 & k < 3", "3 > k", "k <= 2 & True", "not(k >= 3) | False"),
    "True": ("q - q == 0", "k >= 0", "1 == 1", "k <= q | True", "not(0 * k > 0)"),
    "False": ("q < 0", "q - k == q - k + 1", "k <= q & 1 > 2", "2 * q == 2 * k + 1"),
    "k // 2 <= q // 2": ("k // 2 * 2 - q // 2 * 2 <= 0", "q // 2 >= k // 2"),
    "q - k < 0 & not(x0[b, k])": ("not(k <= q | x0[b, k])",),
    "k == q + 3": ("k - q == 3", "3 * k == 3 * q + 9", "q - k == -3"),
}  # fmt: skip


@pytest.mark.parametrize("form", SPELLINGS)
def test_one_form_for_each_mask(form: str) -> None:
    for text in (form, *SPELLINGS[form]):
        assert str(simplify(parse(text))) == form, text
    assert simplify(parse("q >= k")) == CAUSAL


@settings(max_examples=400, deadline=None)
@example(parse("not(not((x1[b, k] < x1[b, k]) * 1))"), 0)
@given(bools(data=True), st.integers(0, 100))
def test_the_value_is_the_same_everywhere(expr: Expr, seed: int) -> None:
    shape = BATCH, HEADS, QUERIES, KEYS
    was, now = (evaluate(e, index_grid(), leaves(seed)).to(torch.bool).expand(shape) for e in (expr, simplify(expr)))
    assert torch.equal(was, now), (str(expr), str(simplify(expr)))
    assert simplify(simplify(expr)) == simplify(expr)
    assert parse(str(simplify(expr))) == simplify(expr)
