"""Proves that tokens which change ranks arrive: the redistributions of all ranks together.

    >>> from ringpass.layouts.redistribution import redistribution
    >>> held, wanted = [[0, 1, 2], [3, 4]], [[0, 1, 2, 3], [2, 3, 4]]
    >>> check_redistribution(held, wanted, [redistribution(held, wanted, rank) for rank in range(2)])

Halos are redistributions too: ranks want the tokens next to theirs.

Contract: `check_redistribution` returns only if the moves have all of these properties, and raises ScheduleError, with
the ranks and the token, for the first that they lack.

    idle      all ranks say alike whether anything is exchanged, and nothing is sent where they say no
    held      what a rank sends are rows that it has
    matched   a rank expects from another as many rows as that one sends
    whole     the local rows and those received give each rank the tokens that it wants, in its order
    thrift    a token goes to a rank once, and not to one that holds it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringpass.errors import ScheduleError
from ringpass.layouts.redistribution import Redistribution
from ringpass.masks.constants import Array


def check_redistribution(
    held: Sequence[Array | Sequence[int]], wanted: Sequence[Array | Sequence[int]], moves: Sequence[Redistribution]
) -> None:
    """Proves the moves of ranks 0, 1, .., which hold and want these tokens.  Raises ScheduleError if they are wrong."""
    ranks = range(len(moves))
    has, wants = ([np.asarray(x, dtype=np.int64) for x in side] for side in (held, wanted))
    sent: list[list[Array]] = []
    for rank, move in enumerate(moves):
        if move.idle != moves[0].idle:
            raise ScheduleError(f"rank {rank}: idle is {move.idle}, and {moves[0].idle} on rank 0: one waits in vain")
        if move.idle and any((*move.sent, *move.received)):
            raise ScheduleError(f"rank {rank}: sends {move.sent}, receives {move.received}, and says it is idle")
        if move.held != len(has[rank]) or len(move.sent) != len(moves) or len(move.received) != len(moves):
            raise ScheduleError(f"rank {rank}: holds {len(has[rank])} rows of {len(moves)} ranks, its move differs")
        if len(move.rows) != sum(move.sent) or ((move.rows < 0) | (move.rows >= move.held)).any():
            raise ScheduleError(f"rank {rank}: sends rows {move.rows.tolist()}, {move.sent} to ranks, of {move.held}")
        sent.append(np.split(has[rank][move.rows], np.cumsum(move.sent)[:-1]))
    for src in ranks:
        for dst in ranks:
            _check_pair(src, dst, sent[src][dst], moves[dst].received[src], has[dst])
    for rank, move in enumerate(moves):
        reach = np.concatenate([has[rank], *(sent[src][rank] for src in ranks)])
        if ((move.found < 0) | (move.found >= len(reach))).any() or len(move.found) != len(wants[rank]):
            raise ScheduleError(
                f"rank {rank}: finds {len(move.found)} rows among {len(reach)}, wants {len(wants[rank])}"
            )
        for i in np.flatnonzero(reach[move.found] != wants[rank])[:1].tolist():
            got, token = int(reach[move.found[i]]), int(wants[rank][i])
            ends = np.cumsum([move.held, *(len(sent[src][rank]) for src in ranks)])
            source = int(np.searchsorted(ends, move.found[i], side="right")) - 1
            where = f"of rank {source}" if source >= 0 else "of its own"
            raise ScheduleError(f"rank {rank}: wants token {token} at row {i}, and gets token {got} {where}")


def _check_pair(src: int, dst: int, tokens: Array, expected: int, held: Array) -> None:
    text = f"rank {src} sends rank {dst} {len(tokens)} rows"
    if len(tokens) != expected:
        raise ScheduleError(f"{text}, and that one expects {expected}")
    for token in tokens[np.isin(tokens, held)][:1].tolist():
        raise ScheduleError(f"{text}, among them token {token}, which that one holds")
    if len(np.unique(tokens)) != len(tokens):
        once, times = np.unique(tokens, return_counts=True)
        raise ScheduleError(f"{text}, among them token {int(once[times > 1][0])} more than once")
