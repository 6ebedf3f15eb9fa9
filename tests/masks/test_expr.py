"""Masks as text, as values and as boxes: what is printed parses to itself, and no tile is called what it is not."""

from __future__ import annotations

import gc
import itertools
import math
import operator
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import CAUSAL, FALSE, TRUE, B, Call, Const, Expr, H, Index, K, Load, Q, call, cast, parse
from ringpass.masks.intervals import EMPTY, FULL, PARTIAL, classify
from ringpass.masks.operators import DTYPES, INFIX, OPERATORS
from ringpass.masks.rewrite import renumber, without_data
from tests.support.mask_expressions import (
    BATCH,
    HEADS,
    KEYS,
    QUERIES,
    binary,
    bools,
    index_grid,
    indices,
    leaves,
)

# --- random expressions -----------------------------------------------------------------------------------------------
# Leaves: x0 bool (BATCH, KEYS), x1 int (BATCH, KEYS), x2 float (HEADS, QUERIES), x3 bool scalar.


# --- text -------------------------------------------------------------------------------------------------------------

numbers = st.booleans() | st.integers() | st.floats(allow_nan=False)
any_atom = indices | st.builds(Const, numbers) | st.builds(Load, st.integers(0, 40), st.just(()))
any_expr = st.recursive(
    any_atom,
    lambda inner: (
        binary(" ".join(INFIX), inner, inner)
        | binary("xor min max pow", inner, inner)
        | st.builds(lambda op, a: Call(op, (a,)), st.sampled_from(["not", "neg", "abs", "log", "exp"]), inner)
        | st.builds(lambda a, b, c: Call("where", (a, b, c)), inner, inner, inner)
        | st.builds(cast, inner, st.sampled_from(list(DTYPES.values())))
        | st.builds(lambda n, i: Load(n, tuple(i)), st.integers(0, 12), st.lists(inner, max_size=4))
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(any_expr)
def test_text_parses_to_itself(expr: Expr) -> None:
    assert parse(str(expr)) == expr
    assert str(parse(str(expr))) == str(expr)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("k<=q", "k <= q"),
        ("k <= q&q - k<4", "k <= q & q - k < 4"),
        ("(k <= q) | (k < 2) & x0[b,k]", "k <= q | k < 2 & x0[b, k]"),
        ("q - (k - 1)", "q - (k - 1)"),
        ("(q - k) - 1", "q - k - 1"),
        ("(k <= q) == x0[b, k]", "(k <= q) == x0[b, k]"),
        ("(not(x0[b, k])) == x1[]", None),
        ("not k <= q", "not(k <= q)"),
        ("(not(x0[b, k])) == x1[()]", "(not(x0[b, k])) == x1[()]"),
        ("not(x0[b, k]) & k <= q", "not(x0[b, k]) & k <= q"),
        ("where(k <= q, 0.0, float('-inf'))", "where(k <= q, 0.0, float('-inf'))"),
        ("x3[b, x1[b, q] // 2, k % 4]", "x3[b, x1[b, q] // 2, k % 4]"),
        ("float32(q - k) * -0.5", "float32(q - k) * -0.5"),
    ],
)
def test_text_is_canonical(text: str, canonical: str | None) -> None:
    if canonical is None:
        with pytest.raises(ValueError, match="not a mask expression"):
            parse(text)
    else:
        assert str(parse(text)) == canonical


BAD = """
q +
k <= q < 3
foo <= 3
foo(q)
q ** k
q @ k
-q
~q
+q
q, k
[q]
x0
x0[b:3]
xx[b]
y0[b]
x-1[b]
where(q, k)
min(q)
not(q, k)
cast(q, k)
add(q, k)
float(q)
float('one')
float()
float32(q, k)
min(q, k, axis=0)
'q'
None
1j
...
lambda q: q
q if k else b
q = k
k <= q &
(k <= q
q; k
__import__('os')
q.real
k in q
k is q
"""


@pytest.mark.parametrize("text", ["", " ", *BAD.strip().splitlines()])
def test_bad_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a mask expression"):
        parse(text)


def test_threads_parse_at_the_same_time() -> None:
    def give_way(*_: Any) -> None:
        time.sleep(1e-5)

    threshold = gc.get_threshold()
    gc.callbacks.append(give_way)  # another thread takes over amid `ast.parse`
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(4) as threads:
            texts = [f"q + {i} <= k & (k - q) // 7 <= {i}" for i in range(100)]
            assert [str(e) for e in threads.map(parse, texts)] == texts
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(give_way)


def test_constants_keep_their_type() -> None:
    assert Const(1) != Const(1.0) != Const(True) and Const(True) != Const(1)
    assert len({Const(1), Const(1.0), Const(True)}) == 3
    assert [type(parse(t).value) for t in ("1", "1.0", "True")] == [int, float, bool]  # type: ignore[attr-defined]


# --- identities -------------------------------------------------------------------------------------------------------


def test_identities() -> None:
    x, y = Load(0, (B, K)), Load(1, (B, K))
    assert call("and", TRUE, x) == call("and", x, TRUE) == call("or", FALSE, x) == call("and", x, x) == x
    assert call("and", x, FALSE) == call("and", FALSE, x) == FALSE and call("or", x, TRUE) == TRUE
    assert call("and", TRUE, TRUE) == TRUE and call("or", FALSE, FALSE) == FALSE
    assert call("not", TRUE) == FALSE and call("not", x) == Call("not", (x,))
    assert call("where", TRUE, x, y) == x and call("where", FALSE, x, y) == y
    assert call("add", Q, Const(0)) == call("add", Const(0), Q) == call("sub", Q, Const(0)) == Q
    assert call("mul", Q, Const(1)) == Q
    assert call("mul", Const(3), Const(-4)) == Const(-12) and call("sub", Const(3), Const(4)) == Const(-1)
    assert call("add", Const(True), Const(1)) == Call("add", (TRUE, Const(1)))
    assert call("add", Q, Const(0.0)) == Call("add", (Q, Const(0.0)))


def test_renumber_reaches_all_leaves() -> None:
    expr = parse("x4[b, x7[b, k]] & where(k <= q, x4[b, q] < x9[()], x7[b, q])")
    assert str(renumber(expr, {4: 0, 7: 1, 9: 2})) == "x0[b, x1[b, k]] & where(k <= q, x0[b, q] < x2[()], x1[b, q])"


# --- values -----------------------------------------------------------------------------------------------------------


PYTHON: dict[str, Callable[..., Any]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "sub": operator.sub, "floordiv": operator.floordiv, "mod": operator.mod, "neg": operator.neg, "abs": abs,
    "min": min, "max": max, "not": lambda a: not a, "where": lambda c, a, b: a if c else b,
    "and": lambda a, b: bool(a and b), "or": lambda a, b: bool(a or b), "xor": lambda a, b: bool(a) != bool(b),
    "add": lambda a, b: a or b if type(a) is type(b) is bool else a + b,
    "mul": lambda a, b: a and b if type(a) is type(b) is bool else a * b,
}  # fmt: skip


def scalar(e: Expr, at: dict[str, int], data: list[Tensor]) -> Any:
    """The value of one element, in Python."""
    if isinstance(e, Index):
        return at[e.name]
    if isinstance(e, Const):
        return e.value
    if isinstance(e, Load):
        return data[e.leaf][tuple(scalar(i, at, data) for i in e.indices)].item()
    assert isinstance(e, Call)
    if e.op == "cast":
        return bool(scalar(e.args[0], at, data))
    return PYTHON[e.op](*(scalar(a, at, data) for a in e.args))


def exact_bools() -> st.SearchStrategy[Expr]:
    """Boolean expressions in which nothing is rounded."""

    def rounded(e: Expr) -> bool:
        return isinstance(e, Const) and isinstance(e.value, float) or isinstance(e, Call) and (
            e.op == "exp" or (e.op == "cast" and e.args[1] != Index("bool")) or any(map(rounded, e.args))
        )  # fmt: skip

    return bools(data=True).filter(lambda e: not rounded(e))


@settings(max_examples=60, deadline=None)
@given(exact_bools(), st.integers(0, 100))
def test_values_are_those_of_python(expr: Expr, seed: int) -> None:
    data = leaves(seed)
    got = evaluate(expr, index_grid(), data)
    assert got.dim() == 4 and got.dtype == torch.bool
    whole = got.expand(BATCH, HEADS, QUERIES, KEYS)
    for b, h, q, k in itertools.product(range(BATCH), range(HEADS), range(0, QUERIES, 3), range(0, KEYS, 2)):
        assert whole[b, h, q, k].item() == scalar(expr, {"b": b, "h": h, "q": q, "k": k}, data)


@settings(max_examples=80, deadline=None)
@given(bools(data=True), st.integers(0, 100), st.integers(0, QUERIES - 1), st.integers(0, KEYS - 1))
def test_a_tile_is_a_part_of_the_whole(expr: Expr, seed: int, q: int, k: int) -> None:
    data = leaves(seed)
    whole = evaluate(expr, index_grid(), data).expand(BATCH, HEADS, QUERIES, KEYS)
    tile = evaluate(expr, index_grid((q, QUERIES), (k, KEYS)), data).expand(BATCH, HEADS, QUERIES - q, KEYS - k)
    assert torch.equal(tile, whole[:, :, q:, k:])


def test_dims_without_use_have_size_one() -> None:
    data = leaves(0)
    for text, shape in {
        "True": (1, 1, 1, 1),
        "x3[()]": (1, 1, 1, 1),
        "k <= q": (1, 1, 7, 9),
        "x0[b, k]": (2, 1, 1, 9),
        "x2[h, q] < 0": (1, 3, 7, 1),
        "x0[b, k] & k <= q": (2, 1, 7, 9),
        "x0[1, k]": (1, 1, 1, 9),
        "x0[1, 3]": (1, 1, 1, 1),
    }.items():
        assert tuple(evaluate(parse(text), index_grid(), data).shape) == shape, text


def test_operators_on_constants_and_casts() -> None:
    def value(text: str) -> Tensor:
        return evaluate(parse(text), index_grid(), leaves(0)).flatten()[-1]

    assert value("max(3, q)") == 6 and value("min(2.5, float64(q))") == 2.5 and value("abs(-3)") == 3
    assert value("int32(2.75)") == 2 and value("bool(0.5)") and value("not(0)")
    assert value("log(8.0) / log(2.0)").item() == pytest.approx(3)
    assert value("pow(q, 2)") == 36 and value("exp(0)") == 1
    for name, dtype in DTYPES.items():
        assert value(f"{name}(q)").dtype == dtype == value(f"{name}(3)").dtype


def test_gradients_reach_float_leaves() -> None:
    table = torch.randn(3, 8, requires_grad=True)
    bias = evaluate(parse("x0[h, min(abs(q - k), 7)] * 2.0"), index_grid(), [table])
    bias.sum().backward()
    counts = torch.zeros(8)
    for q, k in itertools.product(range(QUERIES), range(KEYS)):
        counts[min(abs(q - k), 7)] += 2
    torch.testing.assert_close(table.grad, counts.expand(3, 8))


# --- classification ---------------------------------------------------------------------------------------------------


@st.composite
def ranges(draw: st.DrawFn, length: int) -> tuple[int, int]:
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


@settings(max_examples=500, deadline=None)
@given(bools(data=True), ranges(QUERIES), ranges(KEYS), st.integers(0, 100))
def test_no_tile_is_called_what_it_is_not(
    expr: Expr, queries: tuple[int, int], keys: tuple[int, int], seed: int
) -> None:
    kind = classify(expr, queries, keys)
    if kind != PARTIAL:
        values = evaluate(expr, index_grid(queries, (keys[0], keys[1])), leaves(seed))
        assert values.all() if kind == FULL else not values.any(), (str(expr), kind)


EXACT: dict[str, Callable[[int, int], bool]] = {
    "k <= q": lambda q, k: k <= q,
    "q >= k": lambda q, k: k <= q,
    "not(k > q)": lambda q, k: k <= q,
    "k < q": lambda q, k: k < q,
    "k <= q + 3": lambda q, k: k <= q + 3,
    "k <= q & q - k < 4": lambda q, k: k <= q and q - k < 4,
    "q - 4 < k & k <= q": lambda q, k: k <= q and q - k < 4,
    "abs(q - k) <= 2": lambda q, k: abs(q - k) <= 2,
    "k <= q | k < 5": lambda q, k: k <= q or k < 5,
    "k < 5": lambda q, k: k < 5,
    "q // 4 == k // 4": lambda q, k: q // 4 == k // 4,
    "k <= q & (q - k < 3 | k < 2)": lambda q, k: k <= q and (q - k < 3 or k < 2),
    "float32(k) <= float32(q)": lambda q, k: k <= q,
    "where(k <= q, True, False)": lambda q, k: k <= q,
    "(k < 4) * (q < 4)": lambda q, k: k < 4 and q < 4,
}


@pytest.mark.parametrize("text", EXACT)
def test_usual_masks_are_classified_exactly(text: str) -> None:
    expr, allowed, length = parse(text), EXACT[text], 12
    spans = [(a, b) for a in range(length) for b in range(a + 1, length + 1)]
    for q, k in itertools.product(spans, spans):
        values = {allowed(i, j) for i in range(*q) for j in range(*k)}
        exact = PARTIAL if len(values) == 2 else FULL if values == {True} else EMPTY
        got = classify(expr, q, k)
        if text == "q // 4 == k // 4" or "k < 5" in text and "|" in text or "k < 2" in text:
            assert got in (exact, PARTIAL)  # parts that hold only together are not seen
            small = max(q[1] - q[0], k[1] - k[0]) == 1
            assert not small or got == exact
        else:
            assert got == exact, (text, q, k)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("x0[b, k]", PARTIAL),
        ("x0[b, k] & k > q", EMPTY),
        ("x0[b, k] | k <= q", FULL),
        ("b >= 0", FULL),
        ("b < 1", PARTIAL),
        ("h < 0", EMPTY),
        ("k <= max(q, x1[b])", FULL),
        ("x1[b] == x1[b]", PARTIAL),
        ("(k <= q) + (q < 30) == 1", FULL),  # bools add up to a bool
        ("not(0 - q)", EMPTY),
        ("q * 0.5 % 3 <= 2", PARTIAL),
        ("q * 0.1 < 0.7", PARTIAL),
        ("float16(q) <= 100", PARTIAL),
        ("int8(q) <= 100", PARTIAL),
        ("q * 65536 + k < 16 * 65536 * 65536", FULL),
        ("float32(q) * 16777217.0 < 0", PARTIAL),
        ("q % 64 >= 10", FULL),
        ("q % 16 <= 15", FULL),
        ("q / 0 <= 1", PARTIAL),
        ("k * 100000000000000037 % 7 < 3", PARTIAL),
        ("q * 6364136223846793005 < 0", PARTIAL),
        ("q * 1000000007 + k >= 0", FULL),
    ],
)
def test_boxes(text: str, kind: str) -> None:
    assert classify(parse(text), (10, 20), (0, 10)) == kind


def test_every_operator_has_an_interval() -> None:
    for name, record in OPERATORS.items():
        arity = record.bounds.__code__.co_argcount
        low, high = record.bounds(*[(0.0, 1.0)] * arity)
        assert low <= high, name
        assert math.isfinite(low) or low < 0


# --- masks without data -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(bools(data=True), st.integers(0, 100))
def test_may_and_must_enclose_the_mask(expr: Expr, seed: int) -> None:
    shape = BATCH, HEADS, QUERIES, KEYS
    positions = {name: x for name, x in index_grid().items() if name in "qk"}
    may, must = (evaluate(without_data(expr, unknown), positions, []).to(torch.bool) for unknown in (True, False))
    values = evaluate(expr, index_grid(), leaves(seed)).to(torch.bool).expand(shape)
    assert not (values & ~may).any() and not (must & ~values).any()


def test_masks_without_data_are_unchanged() -> None:
    assert without_data(CAUSAL, True) == without_data(CAUSAL, False) == CAUSAL
    assert str(without_data(parse("k <= q & (x0[b, k] | k < 2)"), False)) == "k <= q & k < 2"
    assert without_data(parse("x0[b, q] == x0[b, k]"), True) == TRUE
    assert without_data(Call("le", (K, Q)), True) == CAUSAL and without_data(Call("le", (H, Q)), False) == FALSE


def test_numbers_that_serve_as_conditions() -> None:
    """`where` between numbers is true where it is not 0: 2 as well as 1."""
    expr = Call("where", (Call("le", (Q, Q)), Q, Const(0)))
    assert without_data(expr, True) == without_data(expr, False) == expr
