"""Schedules of all ranks, without a process: what they say, what they cost, and that the proof refuses a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringpass.errors import ScheduleError
from ringpass.layout import NAMES, Layout, size
from ringpass.mask import EMPTY, FULL, PARTIAL, classify
from ringpass.passes import verify
from ringpass.passes.verify import check, lower_bound, prove
from ringpass.schedule import CAUSAL_TILE, Problem, Program, Step, Tile, Transfer, program, rows

CAUSAL = "k <= q"
WINDOW = "k <= q & q - k < 5"
PADDED = "k <= q & x0[b, k]"
MASKS = ("True", CAUSAL, WINDOW, "q - k < 3 & k - q < 3", PADDED, "x0[b, q] == x0[b, k]", "k < 2 | k <= q & q - k < 4")


def problem(
    mask: str, world: int, queries: int, layout: str = "zigzag", keys: int | None = None, tile: int = 1024, **more: bool
) -> Problem:
    sides = Layout(layout, world), Layout(layout, world)
    return Problem(mask, queries, queries if keys is None else keys, *sides, tile, **more)


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
0: local tokens 0:6: partial q0:3 k0:3; full q3:6 k0:3 """,
    problem(PADDED, 2, 8, "contiguous"): """
0: local tokens 0:4: partial q0:4 k0:4
0: send 0:4 to rank 1: no tile
1: local tokens 4:8: partial q0:4 k0:4
1: receive 0:4 from rank 0: partial q0:4 k0:4""",
}


@pytest.mark.parametrize("p", GOLDEN, ids=lambda p: f"{p.mask} {p.key_layout.name} {p.world}")
def test_text_of_small_programs(p: Problem) -> None:
    assert text(p) == GOLDEN[p].strip()
