"""Masks and layouts that are text: a strict parser, with limits, that ends soon and raises one error alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringpass.errors import ParseError, RingpassError
from ringpass.layouts.layout import Layout
from ringpass.layouts.names import MOST_CHARACTERS as LONGEST_NAME
from ringpass.layouts.names import check_name
from ringpass.masks.expr import MOST_BRACKETS, MOST_CHARACTERS, MOST_DEPTH, MOST_LEAVES, MOST_NODES, parse, table
from tests.support.marks import slow
from tests.support.mask_expressions import bools
from tests.support.random_plans import random_plan

SECONDS = 2.0  # of processor time, for any text
KNOWN = str(table([[1, 2], [3, 4]], *(parse(x) for x in "bk")))
WORDS = (
    "q", "k", "b", "h", "score", "x0[b, k]", "x1[()]", KNOWN, "where", "min", "bucket", "not", "and", "or", "float",
    "float('inf')", "int64", "cast", "lambda", "import", "__class__", ".", "(", ")", "[", "]", ",", "'", "-", "+", "*",
    "**", "/", "//", "%", "&", "|", "<", "<=", "==", "!=", "=", ":=", "~", "^", "@", "0", "1", "-1", "1j", "1e999",
    "nan", "None", "True", "...", "x", "x99999999", "t0", "t", ";", ":", "\n", "\\", "#", "é", "٣", "\0", "{}", "f''",
    "if", "else",
)  # fmt: skip
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=24).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=24).map("".join),
    st.builds(str, bools(data=True)),
    st.builds(
        lambda e, i, word: (text := str(e))[: i % (len(text) + 1)] + word + text[i % (len(text) + 1) :],
        bools(data=True),
        st.integers(0, 200),
        st.sampled_from(WORDS),
    ),
)


def parsed(text: str) -> str:
    """What `parse` makes of a text; "": it refuses it.  Anything but ParseError is a failure."""
    started = time.process_time()
    try:
        found = str(parse(text))
    except ParseError:
        found = ""
    assert time.process_time() - started < SECONDS
    return found


@settings(max_examples=400, deadline=None)
@given(texts)
@example("-1j")
@example("float(1)")
@example("-'a'")
@example(f"{KNOWN.partition('[')[0]}[b]")
@example("x0[q](k)")
@example("'é' * 9")
def test_any_text_is_parsed_or_refused(text: str) -> None:
    found = parsed(text)
    assert not found or parsed(found) == found


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(texts)
def test_many_texts_are_parsed_or_refused(text: str) -> None:
    found = parsed(text)
    assert not found or parsed(found) == found


LONG = {
    "characters": "q" + " " * MOST_CHARACTERS,
    "parentheses": "(" * 50_000 + "q" + ")" * 50_000,
    "brackets": "x0[" * 20_000 + "q" + "]" * 20_000,
    "calls": "abs(" * 20_000 + "q" + ")" * 20_000,
    "signs": "-" * 100_000 + "1",
    "words": "not " * 30_000 + "q",
    "a chain": " + ".join("q" * 30_000),
    "a chain of and": " & ".join(["k <= q"] * 10_000),
    "digits": "9" * 100_000,
    "a leaf": f"x{MOST_LEAVES}[q]",
    "a power": "9**9**9**9**9",
    "open parentheses": "(" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_what_is_too_large_is_refused_soon(name: str) -> None:
    started = time.process_time()
    with pytest.raises(ParseError) as error:
        parse(LONG[name])
    assert time.process_time() - started < SECONDS and len(str(error.value)) < 500


def test_the_limits_leave_room() -> None:
    deep = "abs(" * MOST_BRACKETS + "q" + ")" * MOST_BRACKETS
    assert str(parse(deep)) == deep
    wide = " | ".join(f"k < {i}" for i in range(200))
    assert str(parse(wide)) == wide
    assert (
        MOST_NODES > 200 * 4
        and MOST_DEPTH > 200
        and issubclass(ParseError, RingpassError)
        and issubclass(ParseError, ValueError)
    )


# --- layouts ----------------------------------------------------------------------------------------------------------

NAMES = (
    "contiguous", "zigzag", "striped", "chunked", "replicated", "chunks 0,1,1,0", " cut 5", " cut 77,-1",
    " in units of 4", " from 2", " along hilbert 4x5", " after 3", " pooled 2 at 1", " every 2/1 of 4 of 10",
    " section 0:3 of 2 x 5", " ", ",", "-", "x", "9" * 20, "1", "\n", "٣", "hilbert", "cut",
)  # fmt: skip


@pytest.mark.parametrize("count", [200, slow(5000)])
def test_any_name_is_a_layout_or_refused(count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(NAMES), max_size=6).map("".join)))
    def run(name: str) -> None:
        try:
            layout = Layout(name, 4)
        except ParseError:
            return
        assert layout.unit >= 0 and layout.split_points is not None and layout.scheme  # each part can be read
        assert layout.order is None or layout.order.sizes
        assert layout.strided is None or layout.strided.tokens >= 0
        assert layout.section is None or layout.section.tokens >= 0
        assert layout.pool is None or len(layout.pool) == 2

    run()


def test_names_that_plans_write_pass() -> None:
    for seed in range(100):
        for problem in random_plan(seed).problems:
            check_name(problem.query_layout.name)
            check_name(problem.key_layout.name)


def test_a_name_that_is_too_long_is_refused_soon() -> None:
    started = time.process_time()
    for name in ("chunks " + "0," * LONGEST_NAME, "chunks " + "0," * (LONGEST_NAME // 4), "zigzag cut " + "-" * 10_000):
        with pytest.raises(ParseError, match="not the name of a layout"):
            check_name(name)
    assert time.process_time() - started < SECONDS
