"""Schedules of all ranks, without a process: what they say, what they cost, and that they are proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringpass.errors import ScheduleError
from ringpass.layouts.layout import NAMES, Layout
from ringpass.layouts.ranges import rows, size, tokens
from ringpass.masks.intervals import EMPTY, FULL, PARTIAL, classify
from ringpass.schedule import proof as verify
from ringpass.schedule.program import program
from ringpass.schedule.proof import check, lower_bound, prove, prove_from
from ringpass.schedule.tiles import THIN, TILE, Problem, Tile
from tests.support.marks import slow
from tests.support.programs import CAUSAL, WINDOW, changed, problem

PADDED = "k <= q & x0[b, k]"
MASKS = ("True", CAUSAL, WINDOW, "q - k < 3 & k - q < 3", PADDED, "x0[b, q] == x0[b, k]", "k < 2 | k <= q & q - k < 4")


def text(p: Problem) -> str:
    return "\n".join(f"{rank}: {step}" for rank in range(p.world) for step in program(p, rank).steps)


# --- golden text ------------------------------------------------------------------------------------------------------

GOLDEN = {
    problem(CAUSAL, 2, 8, "contiguous"): """
0: local tokens 0:4: causal q0:4 k0:4
0: send 0:4 to rank 1: no tile
1: local tokens 4:8: causal q0:4 k0:4
1: receive 0:4 from rank 0: full q0:4 k0:4""",
    problem(CAUSAL, 2, 9): """
0: local tokens 0:3+7:9: causal q0:5 k0:5
0: receive 3:7 from rank 1, send 0:3 to rank 1: full q3:5 k0:4
1: local tokens 3:7: causal q0:4 k0:4
1: receive 0:3 from rank 0, send 3:7 to rank 0: full q0:4 k0:3""",
    problem(CAUSAL, 3, 12): """
0: local tokens 0:2+10:12: causal q0:4 k0:4
0: receive 4:8 from rank 2, send 0:2 to rank 1: full q2:4 k0:4
0: receive 2:4+8:10 from rank 1, send 0:2 to rank 2: full q2:4 k0:4
1: local tokens 2:4+8:10: causal q0:4 k0:4
1: receive 0:2 from rank 0, send 2:4 to rank 2: full q0:4 k0:2
1: receive 4:8 from rank 2, send 2:4+8:10 to rank 0: full q2:4 k0:4
2: local tokens 4:8: causal q0:4 k0:4
2: receive 2:4 from rank 1, send 4:8 to rank 0: full q0:4 k0:2
2: receive 0:2 from rank 0, send 4:8 to rank 1: full q0:4 k0:2""",
    problem("True", 2, 5): """
0: local tokens 0:2+4:5: full q0:3 k0:3
0: receive 2:4 from rank 1, send 0:2+4:5 to rank 1: full q0:3 k0:2
1: local tokens 2:4: full q0:2 k0:2
1: receive 0:2+4:5 from rank 0, send 2:4 to rank 0: full q0:2 k0:3""",
    problem(WINDOW, 3, 18, "contiguous", tile=4): """
0: local tokens 0:6: causal q0:4 k0:4, mirrored q4:6 k0:2, full q4:6 k2:4, causal q4:6 k4:6
0: send 2:6 to rank 1: no tile
1: local tokens 6:12: causal q0:2 k0:2, full q2:4 k0:2, causal q2:6 k2:6, mirrored q4:6 k0:2
1: receive 2:6 from rank 0, send 8:12 to rank 2: mirrored q0:2 k0:2, full q0:2 k2:4, mirrored q2:4 k2:4
2: local tokens 12:18: causal q0:4 k0:4, mirrored q4:6 k0:2, full q4:6 k2:4, causal q4:6 k4:6
2: receive 8:12 from rank 1: mirrored q0:4 k0:4""",
    problem(WINDOW, 2, 12, tile=3): """
0: local tokens 0:3+9:12: causal q0:3 k0:3, causal q3:6 k3:6
0: receive 5:9 from rank 1, send 0:3 to rank 1: mirrored q3:6 k0:3, full q3:6 k3:4
1: local tokens 3:9: causal q0:3 k0:3, full q3:4 k0:2, full q3:6 k2:3, causal q3:6 k3:6, mirrored q4:6 k0:2
1: receive 0:3 from rank 0, send 5:9 to rank 0: full q0:1 k0:3, mirrored q1:4 k0:3""",
    problem(PADDED, 2, 8, "contiguous"): """
0: local tokens 0:4: partial q0:4 k0:4
0: send 0:4 to rank 1: no tile
1: local tokens 4:8: partial q0:4 k0:4
1: receive 0:4 from rank 0: partial q0:4 k0:4""",
}


@pytest.mark.parametrize("p", GOLDEN, ids=lambda p: f"{p.mask} {p.key_layout.name} {p.world}")
def test_text_of_small_programs(p: Problem) -> None:
    assert text(p) == GOLDEN[p].strip()


# --- proofs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_programs_of_all_sizes_are_proved(world: int, layout: str) -> None:
    for mask in MASKS:
        for queries, keys in ((2 * world, 2 * world), (19, 19), (37, 37), (40, 23), (23, 40)):
            if min(queries, keys) >= 2 * world:
                prove(problem(mask, world, queries, layout, keys))
                prove(problem(mask, world, queries, layout, keys, 5, cut_all=world % 2 == 0))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layouts", [("zigzag", "replicated"), ("replicated", "zigzag"), ("contiguous", "zigzag")])
def test_sides_may_have_different_layouts(mask: str, layouts: tuple[str, str]) -> None:
    proof = prove(Problem(mask, 29, 31, Layout(layouts[0], 4), Layout(layouts[1], 4), 4))
    assert (proof.moved == 0) == ("replicated" in layouts)  # of queries: each rank attends to its own keys alone


@pytest.mark.parametrize("length", range(8))
def test_fewer_tokens_than_chunks(length: int) -> None:
    for mask in (CAUSAL, "True", WINDOW):
        for layout in ("contiguous", "zigzag"):
            prove(problem(mask, 5, length, layout))


@pytest.mark.parametrize("world", [2, 8, slow(64)])
def test_long_sequences(world: int) -> None:
    for layout in ("contiguous", "zigzag"):
        proof = prove(problem(CAUSAL, world, 65536, layout))
        assert proof.moved == proof.lower_bound
        prove(problem(PADDED, world, 65537, layout))
    prove(problem("k <= q & q - k < 4096", world, 65535, "contiguous"))


def test_both_ways_to_check_coverage_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [problem(mask, world, 41, layout, tile=4) for mask in MASKS for world in (2, 5) for layout in NAMES]
    monkeypatch.setattr(verify, "BRUTE", 0)
    by_arithmetic = [str(prove(p)) for p in problems]
    monkeypatch.undo()
    assert [str(prove(p)) for p in problems] == by_arithmetic


def test_masks_that_mix_data_and_positions_are_proved_by_arithmetic() -> None:
    for mask in ("k <= max(q, x0[b])", "k <= q & h >= 0", "k <= min(q, x0[b]) | k < 2"):
        prove(problem(mask, 3, 30, tile=4))


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [*range(2, 20), 31, 32, 33, 63, 64])
def test_zigzag_balances_causal_attention(world: int) -> None:
    areas = [program(problem(CAUSAL, world, 200 * world + 1), rank).area for rank in range(world)]
    assert max(areas) <= 1.02 * sum(areas) / world
    assert sum(areas) == (200 * world + 1) * (200 * world + 2) // 2


def test_causal_contiguous_sends_nothing_upward() -> None:
    for rank in range(7):
        steps = program(problem(CAUSAL, 7, 40, "contiguous"), rank).steps
        assert [step.receive.src for step in steps if step.receive] == list(range(rank - 1, -1, -1))
        assert [step.send.dst for step in steps if step.send] == list(range(rank + 1, 7))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", [CAUSAL, "True", PADDED])
def test_received_tokens_are_the_lower_bound(mask: str, layout: str) -> None:
    for world in range(1, 9):
        for length in (16, 37, 64):
            p = problem(mask, world, length, layout)
            assert [program(p, rank).received for rank in range(world)] == [lower_bound(p, r) for r in range(world)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_received_tokens_exceed_the_lower_bound_by_less_than_tiles(layout: str) -> None:
    for width in (2, 5, 17, 30):
        for tile in (1, 2, 4, 8):
            p = problem(f"k <= q & q - k < {width}", 4, 160, layout, tile=tile)
            for rank in range(4):
                received, bound = program(p, rank).received, lower_bound(p, rank)
                assert bound <= received <= bound + 2 * (tile - 1) * 2  # a chunk needs one stretch before it
                assert tile > 1 or received == bound


def brute_lower_bound(p: Problem, allowed: Callable[[int, int], bool], rank: int) -> int:
    local = {t for a, b in p.key_layout.ranges(rank, p.keys) for t in range(a, b)}
    queries = [t for a, b in p.query_layout.ranges(rank, p.queries) for t in range(a, b)]
    return sum(k not in local and any(allowed(q, k) for q in queries) for k in range(p.keys))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_lower_bound_counts_what_the_mask_needs(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: dict[str, Callable[[int, int], bool]] = {
        CAUSAL: lambda q, k: k <= q,
        WINDOW: lambda q, k: k <= q and q - k < 5,
        "(q - k) % 7 == 3 & k <= q": lambda q, k: (q - k) % 7 == 3 and k <= q,
        "k == q * 2": lambda q, k: k == 2 * q,
        "not(x0[b, k]) & k > q": lambda q, k: k > q,
    }
    for mask, allowed in masks.items():
        for block in (512, 4):
            monkeypatch.setattr(verify, "ROWS", block)
            monkeypatch.setattr(verify, "COLUMNS", block)
            p = problem(mask, 3, 43, layout, 47)
            assert [lower_bound(p, r) for r in range(3)] == [brute_lower_bound(p, allowed, r) for r in range(3)]


def test_shifts_outside_a_window_are_absent() -> None:
    for rank in range(8):
        steps = program(problem("k <= q & q - k < 10", 8, 80, "contiguous", tile=4), rank).steps
        assert {step.shift for step in steps} <= {0, 1}
        wide = program(problem("k <= q & q - k < 12", 8, 80, "contiguous", tile=1), rank).steps
        assert {step.shift for step in wide} <= {0, 1, 2}


def test_full_tiles_are_split_only_on_demand() -> None:
    (tile,) = program(problem("True", 1, 64, tile=8), 0).steps[0].tiles
    assert tile == Tile((0, 64), (0, 64), FULL)
    tiles = program(problem("True", 1, 64, tile=8, cut_all=True), 0).steps[0].tiles
    assert len(tiles) == 64


@pytest.mark.parametrize("world", [1, 2])
def test_thin_full_tiles_are_split_to_length(world: int) -> None:
    p = problem("k < 64 | q < 64", world, 10_000, "contiguous")
    prove(p)
    tiles = [tile for rank in range(world) for step in program(p, rank).steps for tile in step.tiles]
    edges = [sorted((t.q[1] - t.q[0], t.k[1] - t.k[0])) for t in tiles]
    assert {tile.kind for tile in tiles} == {FULL}
    assert all(short >= THIN or long <= TILE for short, long in edges)
    assert max(long for _, long in edges) == TILE


# --- any problem ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    world = draw(st.integers(1, 7))
    layouts = [Layout(draw(st.sampled_from(NAMES)), world) for _ in range(2)]
    lengths = [draw(st.integers(0, 60)) for _ in range(2)]
    if draw(st.booleans()):
        lengths[1], layouts[1] = lengths[0], layouts[0]
    a, b = draw(st.integers(-20, 60)), draw(st.integers(1, 20))
    atoms = st.sampled_from(
        [
            "True",
            "False",
            CAUSAL,
            f"q - k < {b}",
            f"k < {a}",
            f"q % {b} == k % {b}",
            f"k // {b} <= q // {b}",
            "x0[b, k]",
        ]
        + [f"q * 2 <= k + {a}", "not(x1[h, q] == x1[h, k])", f"abs(q - k) >= {b}", f"not(k <= q | k < {b})"]
    )
    mask = " & ".join(f"({draw(atoms)} | {draw(atoms)})" for _ in range(draw(st.integers(1, 3))))
    tile, cut_all = draw(st.sampled_from([1, 2, 3, 8, 1024])), draw(st.booleans())
    return Problem(mask, lengths[0], lengths[1], layouts[0], layouts[1], tile, cut_all)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_any_problem_is_proved(p: Problem) -> None:
    proof = prove(p)
    assert proof.largest_area <= p.queries * p.keys
    assert proof.moved == sum(program(p, r).received for r in range(p.world))
    fast = prove_from(p, p.world - 1)
    assert (fast.moved, fast.largest_area, fast.mean_area) == (proof.moved, proof.largest_area, proof.mean_area)
    assert fast.lower_bound <= proof.lower_bound
    again = [program(replace(p), rank) for rank in range(p.world)]
    assert again == [program(p, rank) for rank in range(p.world)]


@settings(max_examples=20, deadline=None)
@given(problems(), st.data())
def test_any_dropped_or_doubled_tile_is_refused(p: Problem, data: st.DataObject) -> None:
    programs = [program(p, rank) for rank in range(p.world)]
    tiles_of_ranks = [
        (one.rank, i, j) for one in programs for i, s in enumerate(one.steps) for j in range(len(s.tiles))
    ]
    if tiles_of_ranks:
        rank, index, number = data.draw(st.sampled_from(tiles_of_ranks))
        tiles = programs[rank].steps[index].tiles
        with pytest.raises(ScheduleError):
            check(changed(programs, rank, index, tiles=(*tiles, tiles[number])))
        if tiles[number].kind != PARTIAL:  # a partial tile may hold nothing
            with pytest.raises(ScheduleError):
                check(changed(programs, rank, index, tiles=tiles[:number] + tiles[number + 1 :]))


def test_rows_find_tokens_in_a_block() -> None:
    owned = ((0, 3), (8, 10), (20, 30))
    assert rows(((1, 2), (8, 10), (25, 26)), owned) == ((1, 2), (3, 5), (10, 11))
    assert size(owned) == 15
    with pytest.raises(AssertionError):
        rows(((2, 4),), owned)


def test_empty_tiles_are_left_out() -> None:
    for rank in range(4):
        p = problem(WINDOW, 4, 64, tile=4)
        queries = p.query_layout.ranges(rank, 64)
        for step in program(p, rank).steps:
            for tile in step.tiles:
                q, k = _positions(queries, tile.q), _positions(step.tokens, tile.k)
                assert classify(p.expr, q, k) != EMPTY


def _positions(ranges: Sequence[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    tokens = [t for a, b in ranges for t in range(a, b)][slice(*span)]
    assert tokens == list(range(tokens[0], tokens[-1] + 1))
    return tokens[0], tokens[-1] + 1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
def test_empty_rectangles_are_what_the_tiles_leave(mask: str, layout: str) -> None:
    p = problem(mask, 3, 29, layout, tile=4)
    for rank in range(3):
        one, local = program(p, rank), p.query_layout.ranges(rank, 29)
        count = np.zeros((29, 29), dtype=int)
        for step in one.steps:
            for tile in step.tiles:
                rows = [i for span in tokens(local, tile.q) for i in range(*span)]
                count[np.ix_(rows, [j for span in tokens(step.tokens, tile.k) for j in range(*span)])] += 1
        for q, k in one.empty:
            count[slice(*q), slice(*k)] += 1
        assert (count[[i for span in local for i in range(*span)]] == 1).all()
        assert count.sum() == 29 * sum(stop - start for start, stop in local)
