"""Patterns: each is what its definition says, on one device and on the ring; wrong ones are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringpass import OptionError, RingConfig
from ringpass.layouts.layout import Layout
from ringpass.masks.evaluate import evaluate
from ringpass.patterns import (
    Pattern,
    block_causal,
    blocks,
    causal,
    dilated_window,
    documents,
    everything,
    fixed,
    from_function,
    global_tokens,
    grid_window,
    nothing,
    prefix,
    random_blocks,
    sink,
    strided,
    window,
)  # fmt: skip
from ringpass.schedule.program import program
from ringpass.schedule.proof import prove
from ringpass.schedule.tiles import Problem
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.pattern_models import TOKENS, SelfAttention, dense_mask, out_and_grad
from tests.support.process_ranks import Workers

S = TOKENS
IDS = torch.arange(S) % 5
RANDOM = random_blocks(S, 4, count=2, seed=3)


def drawn() -> Tensor:
    """The blocks that seed 3 draws: of six random numbers in a row, the two smallest."""
    numbers = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return numbers <= numbers.kthvalue(2, dim=-1, keepdim=True).values


DEFINED: dict[str, tuple[Pattern, Callable[[int, int], bool]]] = {
    "causal": (causal(), lambda q, k: k <= q),
    "everything": (everything(), lambda q, k: True),
    "nothing": (nothing(), lambda q, k: False),
    "window": (window(3, 2), lambda q, k: -2 <= q - k <= 3),
    "causal window": (causal() & window(3), lambda q, k: 0 <= q - k <= 3),
    "dilated window": (dilated_window(2, 3), lambda q, k: q - k in (-6, -3, 0, 3, 6)),
    "sink": (causal() & (sink(2) | window(4)), lambda q, k: k <= q and (k < 2 or q - k <= 4)),
    "global": (global_tokens(2) | window(1, 1), lambda q, k: q < 2 or k < 2 or abs(q - k) <= 1),
    "prefix": (prefix(5), lambda q, k: k <= q or k < 5),
    "no prefix": (prefix(0), lambda q, k: k <= q),
    "block causal": (block_causal(5), lambda q, k: k // 5 <= q // 5),
    "strided": (strided(5), lambda q, k: k <= q and (q - k < 5 or (q - k) % 5 == 0)),
    "fixed": (fixed(6, 2), lambda q, k: k <= q and (q // 6 == k // 6 or k % 6 >= 4)),
    "grid": (grid_window((4, 6), 1), lambda q, k: abs(q // 6 - k // 6) <= 1 and abs(q % 6 - k % 6) <= 1),
    "box": (
        grid_window((2, 3, 4), 1),
        lambda q, k: all(abs(q // s % n - k // s % n) <= 1 for s, n in ((12, 2), (4, 3), (1, 4))),
    ),
    "grid after a prefix": (
        grid_window((2, 11), 2, skip=2),
        lambda q, k: min(q, k) < 2 or abs((q - 2) // 11 - (k - 2) // 11) <= 2 and abs((q - 2) % 11 - (k - 2) % 11) <= 2,
    ),
    "documents": (
        causal() & documents([7, 1, 9, 7]),
        lambda q, k: k <= q and sum(e <= q for e in (7, 8, 17)) == sum(e <= k for e in (7, 8, 17)),
    ),
    "one document": (documents([24]), lambda q, k: True),
    "boundaries": (documents(cu_seqlens=torch.tensor([0, 5, 24])), lambda q, k: (q < 5) == (k < 5)),
    "ids in order": (documents(ids=torch.arange(24) // 7), lambda q, k: q // 7 == k // 7),
    "ids in turn": (causal() & documents(ids=torch.arange(24) % 3), lambda q, k: k <= q and q % 3 == k % 3),
    "blocks": (
        blocks([[q // 2 <= k for k in range(5)] for q in range(6)], 5) & window(24, 24),
        lambda q, k: q // 5 // 2 <= k // 5,
    ),
    "random blocks": (RANDOM, lambda q, k: bool(drawn()[q // 4, k // 4])),
    "captured": (
        from_function(lambda b, h, q, k: (IDS[q] == IDS[k]) & (k <= q)),
        lambda q, k: k <= q and q % 5 == k % 5,
    ),
    "not": (~causal(), lambda q, k: k > q),
    "function": (from_function(lambda b, h, q, k: (q - k).abs() * 2 < 9), lambda q, k: abs(q - k) * 2 < 9),
}


@pytest.mark.parametrize("name", DEFINED)
def test_patterns_are_what_they_say(name: str) -> None:
    pattern, defined = DEFINED[name]
    wanted = torch.tensor([[defined(q, k) for k in range(S)] for q in range(S)])
    assert torch.equal(dense_mask(pattern), wanted)
    assert pattern(q=7, k=3) == defined(7, 3)


SOME = st.sampled_from([pattern for pattern, _ in DEFINED.values()])


@st.composite
def compositions(draw: st.DrawFn) -> Pattern:
    pattern = draw(SOME)
    for _ in range(draw(st.integers(0, 3))):
        other = draw(SOME)
        pattern = draw(st.sampled_from([pattern & other, pattern | other, ~pattern]))
    return pattern


@settings(max_examples=150, deadline=None)
@given(SOME, SOME)
def test_combinations(a: Pattern, b: Pattern) -> None:
    assert torch.equal(dense_mask(a & b), dense_mask(a) & dense_mask(b))
    assert torch.equal(dense_mask(a | b), dense_mask(a) | dense_mask(b))
    assert torch.equal(dense_mask(~a), ~dense_mask(a))


@settings(max_examples=150, deadline=None)
@given(compositions(), st.integers(1, 5), st.sampled_from(["contiguous", "zigzag"]), st.sampled_from([1, 4, 64]))
def test_any_composition_is_scheduled_and_proved(pattern: Pattern, world: int, layout: str, tile: int) -> None:
    sides = Layout(layout, world)
    prove(Problem(str(pattern), S, S, sides, sides, tile))


def test_what_is_empty_is_neither_computed_nor_sent() -> None:
    sides = Layout("contiguous", 8)
    site = Problem(str(causal() & window(63)), 1024, 1024, sides, sides, 16)
    for rank in range(8):
        one = program(site, rank)
        assert one.received <= 64 and len(one.steps) <= 3
        assert one.area <= 128 * (64 + 2 * 16)


# --- on the ring ------------------------------------------------------------------------------------------------------


def with_pattern(group: dist.ProcessGroup, cases: tuple[tuple[str, bool], ...], length: int) -> list[float]:
    """Errors of output and gradient under each (pattern, causal model), against its dense mask on one device."""
    errors = []
    for name, is_causal in cases:
        torch._dynamo.reset()
        pattern, model = DEFINED[name][0], SelfAttention(is_causal).double()
        x = torch.randn(2, length, 8, dtype=torch.float64)
        allowed = dense_mask(pattern & causal() if is_causal else pattern, length)
        run = compiled(model, group, mask=pattern, tile=4)
        for got, want in zip(out_and_grad(run(x), model), out_and_grad(model(x, allowed), model), strict=True):
            errors.append(relative(got, want) if want.any() else float(got.abs().max()))
    return errors


@pytest.mark.parametrize("ranks", (slow(1), slow(2), 3, slow(5)))
def test_parity_with_the_dense_mask(workers: Workers, ranks: int) -> None:
    names = ("causal window", True), ("dilated window", False), ("documents", True), ("grid", False), ("captured", True)
    for errors in workers.run(with_pattern, ranks, names, S):
        assert max(errors) < 1e-10, errors


# --- bad input --------------------------------------------------------------------------------------------------------

FLOATS = torch.zeros(S)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "negative": (lambda: window(-1), "before must be an int of at least 0 and below .*, got -1"),
    "fraction": (lambda: sink(1.5), "tokens must be an int of at least 1 and .*, got 1.5"),  # type: ignore[arg-type]
    "summary": (lambda: fixed(4, 5), "summary must be at most the block, got 5 of 4"),
    "no tokens": (lambda: documents([3, 0, 2]), "each length must be an int of at least 1 and .*, got 0"),
    "huge": (lambda: window(10**20), "below 2"),
    "no grid": (lambda: grid_window([], 1), "a grid has one to three sizes"),
    "no documents": (lambda: documents([]), "at least one document"),
    "other": (lambda: causal() & True, "a pattern combines with a pattern, not with bool"),  # type: ignore[operator]
    "text": (lambda: RingConfig(mask="k <= q"), "option 'mask' must be a Pattern"),  # type: ignore[arg-type]
    "arity": (lambda: from_function(lambda q, k: k <= q), r"takes \(b, h, q, k\), this one takes \(q, k\)"),
    "capture": (lambda: from_function(lambda b, h, q, k: torch.randn(9)[k] > 0), "an op that has no closed form"),
    "captured floats": (lambda: from_function(lambda b, h, q, k: FLOATS[k] > 0), "it may read bools and integers"),
    "two lengths": (lambda: documents([3, 4]) & documents([3, 5]), "for 7 and for 8 tokens contradict each other"),
    "two forms": (lambda: documents([3], ids=[0, 0, 0]), "one of lengths, cu_seqlens and ids, got 2"),
    "float ids": (lambda: documents(ids=torch.ones(4)), r"ids must be ints of shape \(S,\) or \(B, S\), got float32"),
    "ids of 3 dims": (lambda: documents(ids=torch.ones(2, 3, 4, dtype=torch.int64)), r"got int64 \[2, 3, 4\]"),
    "boundaries": (lambda: documents(cu_seqlens=[1, 4]), "begins with 0, got 1"),
    "block list": (lambda: blocks([[0, 1]], 4), "listed must be bools of shape"),
    "too many blocks": (lambda: random_blocks(24, 4, count=7), "at most the 6 blocks that there are, got 7"),
    "branch": (lambda: from_function(lambda b, h, q, k: k if k > q else q), "cannot be traced"),
    "number": (lambda: from_function(lambda b, h, q, k: q - k), "must return a boolean"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_patterns_are_refused(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(OptionError, match=message):
        build()


def test_documents_of_random_lengths_are_classified_and_pruned() -> None:
    """Each rank receives what its first document needs, to the token, at the default tile."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(200, 9000, (40,), generator=generator).tolist()
    pattern, total, world = causal() & documents(lengths), sum(lengths), 8
    sides = Layout("contiguous", world)
    site = Problem(str(pattern), total, total, sides, sides)
    ends = torch.tensor(lengths).cumsum(0)
    for rank in range(world):
        ((start, _),) = sides.ranges(rank, total)
        first = int(torch.searchsorted(ends, start, right=True))
        needed = start - (int(ends[first - 1]) if first else 0)  # the part of the document that is cut
        assert program(site, rank).received == needed


UNFIT = {
    "documents": (causal() & documents([7, 8]), "is for 15 tokens, and the attention has 24 queries"),
    "ids": (documents(ids=torch.arange(23) % 2), "is for 23 tokens"),
    "rows": (documents(ids=IDS.view(1, -1) % torch.tensor([[2], [3], [4]])), r"shape \[3, 24\] .* at b from 0 to 1"),
    "few blocks": (blocks(torch.eye(5, dtype=torch.bool), 4), r"shape \[5, 5\] that is read at q // 4 from 0 to 5"),
    "heads": (random_blocks(24, 4, 2, heads=3), r"shape \[3, 6, 6\] that is read at h from 0 to 1"),
    "contradiction": (sink(4) & ~sink(8), "contradict each other: no query sees any key"),
    "against the model": (~causal(), "contradict each other"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_patterns_that_do_not_fit_a_model_are_refused(name: str) -> None:
    pattern, message = UNFIT[name]
    run = torch.compile(SelfAttention(True), backend="ring_dilated", options={"mask": pattern, "compiler": "aot_eager"})
    with pytest.raises(Exception, match=message):
        run(torch.randn(2, S, 8))


def per_element(group: dist.ProcessGroup) -> list[float]:
    """Errors under block lists that differ from head to head, and documents that differ from row to row."""
    model, x = SelfAttention(True).double(), torch.randn(2, S, 8, dtype=torch.float64)
    ids = torch.stack([torch.arange(S) % 2, torch.arange(S) // 9])
    errors = []
    for pattern in (random_blocks(S, 4, 3, heads=2), documents(ids=ids)):
        torch._dynamo.reset()
        at = {"b": torch.arange(2).view(2, 1, 1, 1), "h": torch.arange(2).view(1, 2, 1, 1)}
        row = torch.arange(S)
        allowed = evaluate(
            (causal() & pattern).expr, {**at, "q": row.view(1, 1, -1, 1), "k": row.view(1, 1, 1, -1)}, []
        )
        got, want = (
            out_and_grad(out, model) for out in (compiled(model, group, mask=pattern, tile=4)(x), model(x, allowed))
        )
        errors += [relative(a, b) for a, b in zip(got, want, strict=True)]
    return errors


@pytest.mark.parametrize("ranks", (1, 3))
def test_parity_where_heads_and_rows_differ(workers: Workers, ranks: int) -> None:
    for errors in workers.run(per_element, ranks):
        assert max(errors) < 1e-12, errors


def short(group: dist.ProcessGroup, length: int) -> list[float]:
    """Errors of a call that is too short to be divided, under a pattern: every rank computes all of it."""
    model, x = SelfAttention(True).double(), torch.randn(2, length, 8, dtype=torch.float64)
    got = out_and_grad(compiled(model, group, mask=window(1))(x), model)
    want = out_and_grad(model(x, dense_mask(causal() & window(1), length)), model)
    return [relative(a, b) for a, b in zip(got, want, strict=True)]


def test_patterns_on_short_sequences(workers: Workers) -> None:
    for errors in workers.run(short, 2, 3):
        assert max(errors) < 1e-12, errors


def test_one_process_without_a_group() -> None:
    """Patterns apply to training on one device too."""
    model, x = SelfAttention(True).double(), torch.randn(2, S, 8, dtype=torch.float64)
    run = torch.compile(model, backend="ring_dilated", options={"mask": window(3), "compiler": "aot_eager"})
    for got, want in zip(
        out_and_grad(run(x), model),
        out_and_grad(model(x, dense_mask(causal() & window(3))), model),
        strict=True,
    ):
        assert relative(got, want) < 1e-12
