"""Proves the schedules of all ranks of one attention site together, before anything is sent.

    >>> from ringpass.layouts.layout import Layout
    >>> print(prove(Problem("k <= q", 8, 8, Layout("zigzag", 2), Layout("zigzag", 2))))
    2 ranks: 2 exchanges, 6 of 6 tokens moved, area 18 at most, 18 on average

Terms: *moved* tokens are sent between ranks; their *lower bound* counts the (rank, remote key) pairs such that a query
of the rank may attend to the key.  A pair *may* attend if the mask holds for some value of its data (leaves, batch,
head); it *must* if the mask holds for every such value.

Contract: `prove` returns only if the programs have all of these properties, and raises ScheduleError for the first that
they lack.

    owned        each query and each key token is one rank's, or every rank's
    wellformed   each step is about its rank: local queries, local rows sent, tiles inside the key block
    exchanges    each send has one receive with equal tokens, in the same order on both sides; a step is a matching
    order        no deadlock, forward and backward, with gloo's matching by tag and with NCCL's order of starts; no
                 buffer is read or freed too early (`schedule.order_proof`)
    coverage     tiles are disjoint; pairs outside of tiles may not attend; in full tiles and triangles all must
    thrift       each received token is used by a tile; no tile is provably empty or larger than necessary

Coverage is checked element by element if the mask has at most BRUTE elements, else by intervals (`cover`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ringpass.errors import ScheduleError
from ringpass.layouts.ranges import Ranges, contains, size, tokens
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import Expr
from ringpass.masks.intervals import EMPTY, EMPTY_CODE, FULL, FULL_CODE, PARTIAL, classify, classify_all, extents
from ringpass.masks.rewrite import without_data
from ringpass.schedule.coverage import cover
from ringpass.schedule.order import START, Ends, order
from ringpass.schedule.order_proof import check_buffers, prove_order
from ringpass.schedule.program import Program, Step, Transfer, program
from ringpass.schedule.tiles import CAUSAL_TILE, MIRRORED, TILE_KINDS, TRIANGLES, Problem, Tile, Tiling, tiling

BRUTE = 4_000_000  # elements of a mask that is checked one by one
ROWS, COLUMNS = 32, 512  # parts of a mask that are evaluated at once for the lower bound
Span = tuple[int, int]


@dataclass(frozen=True)
class Proof:
    """What the proof counted.

    `exchanges`: messages between two ranks, of all ranks together; `moved`, `lower_bound`: tokens, of all ranks
    together; areas: (query, key) pairs of one rank, as `Program.area` counts them.  `bound`: counts the lower bound,
    which takes longer than the proof, when it is asked for.
    """

    world: int
    exchanges: int
    moved: int
    bound: Callable[[], int] = field(repr=False, compare=False)
    largest_area: int
    mean_area: float

    @cached_property
    def lower_bound(self) -> int:
        """Tokens of all ranks together that must move."""
        return self.bound()

    def __str__(self) -> str:
        moved = f"{self.moved} of {self.lower_bound} tokens moved"
        area = f"area {self.largest_area} at most, {self.mean_area:g} on average"
        return f"{self.world} ranks: {self.exchanges} exchanges, {moved}, {area}"


def prove(problem: Problem) -> Proof:
    """Proves the programs of all ranks of `problem`.  Raises ScheduleError if one is wrong."""
    return check([program(problem, rank) for rank in range(problem.world)])


def prove_from(problem: Problem, rank: int) -> Proof:
    """Proves the tiles of all ranks as arrays, and that the program of `rank` agrees with them.

    For schedules of many tiles, where building the programs of all ranks would take minutes.  Every send has a receive,
    since both ends read one table.  There is no deadlock, since every rank's shifts ascend, and so do the keys of its
    starts (`schedule.order`): an exchange only waits for exchanges with smaller keys.  Raises ScheduleError if
    something is wrong.
    """
    return check_from(tiling(problem), program(problem, rank))


def check_from(whole: Tiling, one: Program) -> Proof:
    """Proves the tiles `whole` of all ranks, and that the program `one` of a rank agrees with them.

    Raises ScheduleError if something is wrong.
    """
    problem, rank = one.problem, one.rank
    check_owners(problem)
    for index, step in enumerate(one.steps):
        _wellformed(one, index, step)
    shifts = [step.shift for step in one.steps]
    _demand(shifts == sorted(set(shifts)), rank, None, "its shifts {} do not ascend", shifts)
    events = {backward: list(order(shifts[1:], backward)) for backward in (False, True)}
    for backward, of_rank in events.items():
        check_buffers(rank, shifts[1:], of_rank, backward)
    starts = [event.key for event in events[True] if event.action == START]
    _demand(starts == sorted(set(starts)), rank, None, "its starts {} are not in the global order", starts)
    runs, sent = whole.of(rank).used(), whole.serving(rank).used()
    for side, peers, table in (("receive", runs.src, runs), ("send", sent.dst, sent)):
        moved = [(x.src, x.dst, span) for s in one.steps if (x := getattr(s, side)) for span in x.tokens]
        ends = zip(
            table.src.tolist(), table.dst.tolist(), zip(*(x.tolist() for x in table.k), strict=True), strict=True
        )
        wanted = [end for end, remote in zip(ends, (peers != rank).tolist(), strict=True) if remote]
        for verb, odd in (("does not {}", Counter(wanted) - Counter(moved)), ("{}s", Counter(moved) - Counter(wanted))):
            for (src, dst, span), _ in sorted(odd.items())[:1]:
                text = f"{verb.format(side)} tokens {span[0]}:{span[1]} from rank {src} to rank {dst}"
                _demand(False, rank, None, "{}, unlike what the tiles use", text)
    _cover_rectangles(one)
    for other in range(problem.world):
        if other != rank:
            cover(problem, other, whole.of(other))
    remote = whole.take(whole.dst != whole.src)
    certain = remote.take(remote.kind == FULL_CODE)
    areas = whole.areas(problem.world)
    return Proof(
        world=problem.world,
        exchanges=len({*zip(remote.dst.tolist(), remote.src.tolist(), strict=True)}),
        moved=int(whole.received(problem.world).sum()),
        bound=lambda: int(certain.received(problem.world).sum()),  # what partial tiles need is not counted
        largest_area=int(areas.max()),
        mean_area=float(areas.mean()),
    )


def check(programs: Sequence[Program]) -> Proof:
    """Proves `programs`, those of ranks 0, 1, ... of one problem.  Raises ScheduleError if one is wrong."""
    problem = programs[0].problem
    for rank, one in enumerate(programs):
        _demand((one.problem, one.rank) == (problem, rank), rank, None, "the program is another rank's or problem's")
    check_owners(problem)
    for one in programs:
        for index, step in enumerate(one.steps):
            _wellformed(one, index, step)
    _exchanges(programs)
    prove_order([ends_of(one) for one in programs])
    for one in programs:
        _coverage(one)
        _thrift(one)
    areas = [one.area for one in programs]
    return Proof(
        world=problem.world,
        exchanges=sum(1 for one in programs for step in one.steps if step.receive),
        moved=sum(one.received for one in programs),
        bound=lambda: sum(lower_bound(problem, rank) for rank in range(problem.world)),
        largest_area=max(areas),
        mean_area=sum(areas) / len(areas),
    )


def check_owners(problem: Problem) -> None:
    """Proves that each query and key token is one rank's, or every rank's where all are.

    Raises ScheduleError with the first token that is nobody's or two ranks'.
    """
    for side, layout, n in (
        ("query", problem.query_layout, problem.queries),
        ("key", problem.key_layout, problem.keys),
    ):
        held = [(*span, rank) for rank in range(layout.world) for span in layout.ranges(rank, n)]
        if layout.replicated:
            for rank in range(layout.world):
                _demand(size(layout.ranges(rank, n)) == n, rank, None, "lacks some of the {} {} tokens", n, side)
            continue
        reached, before = 0, 0
        for start, stop, rank in [*sorted(held), (n, n, 0)]:
            _demand(start <= reached, rank, None, "{} token {} is no rank's", side, reached)
            _demand(start >= reached, rank, None, "{} token {} is rank {}'s too", side, start, before)
            reached, before = stop, rank


def lower_bound(problem: Problem, rank: int) -> int:
    """Number of distinct remote key tokens to which some query of `rank` may attend."""
    if problem.split:
        return 0
    local = [(0, 0), *problem.key_layout.ranges(rank, problem.keys), (problem.keys, problem.keys)]
    remote = [(stop, start) for (_, stop), (start, _) in zip(local, local[1:], strict=False)]
    parts = [(low, min(low + COLUMNS, stop)) for start, stop in remote for low in range(start, stop, COLUMNS)]
    return sum(_needed(problem, rank, part) for part in parts)


def _needed(problem: Problem, rank: int, keys: Span) -> int:
    may, found = without_data(problem.expr, True), torch.zeros(keys[1] - keys[0], dtype=torch.bool)
    for start, stop in problem.query_layout.ranges(rank, problem.queries):
        whole = classify(may, (start, stop), keys)
        for low in range(start, stop if whole != EMPTY else 0, ROWS):
            q = low, min(low + ROWS, stop)
            if whole == FULL or found.all() or (kind := classify(may, q, keys)) == FULL:
                return keys[1] - keys[0]
            found |= _values(may, [q], [keys], True).any(0) if kind == PARTIAL else False
    return int(found.sum())


def _demand(fact: bool, rank: int, step: Step | None, complaint: str, *about: object) -> None:
    if not fact:
        raise ScheduleError(f"rank {rank}{f', step {step.shift}' if step else ''}: {complaint.format(*about)}")


def _wellformed(one: Program, index: int, step: Step) -> None:
    problem, rank = one.problem, one.rank
    _demand((index == 0) == (step.shift == 0), rank, step, "is at index {}", index)
    if index == 0:
        local = problem.key_layout.ranges(rank, problem.keys)
        _demand(step.tokens == local, rank, step, "holds tokens {}, not the local tokens {}", step.tokens, local)
        _demand(step.send is None and step.receive is None, rank, step, "moves tokens, but its keys are local")
    else:
        _wellformed_transfers(one, step)
    rows_q, rows_k = size(problem.query_layout.ranges(rank, problem.queries)), size(step.tokens)
    for tile in step.tiles:
        _demand(0 <= tile.q[0] < tile.q[1] <= rows_q, rank, step, "tile {} is not in the {} query rows", tile, rows_q)
        _demand(0 <= tile.k[0] < tile.k[1] <= rows_k, rank, step, "tile {} is not in the {} key rows", tile, rows_k)
        _demand(tile.kind in (FULL, PARTIAL, *TRIANGLES), rank, step, "tile {} is of an unknown kind", tile)
        square = tile.kind not in TRIANGLES or tile.q[1] - tile.q[0] == tile.k[1] - tile.k[0]
        _demand(square, rank, step, "tile {} is a triangle, but not square", tile)


def _wellformed_transfers(one: Program, step: Step) -> None:
    rank, world, layout = one.rank, one.problem.world, one.problem.key_layout
    received = step.receive.tokens if step.receive else ()
    _demand(step.tokens == received, rank, step, "has tokens {}, but receives {}", step.tokens, received)
    _demand(bool(step.receive or step.send), rank, step, "moves nothing")
    before, after = (rank - step.shift) % world, (rank + step.shift) % world
    for transfer, ends in ((step.receive, (before, rank)), (step.send, (rank, after))):
        if transfer is not None:
            _demand((transfer.src, transfer.dst) == ends, rank, step, "{} does not go from {} to {}", transfer, *ends)
            owned, flat = layout.ranges(transfer.src, one.problem.keys), [e for span in transfer.tokens for e in span]
            _demand(bool(flat) and flat == sorted(set(flat)), rank, step, "{}: its tokens do not ascend", transfer)
            _demand(contains(owned, transfer.tokens), rank, step, "{}: its sender lacks some of the tokens", transfer)


def _exchanges(programs: Sequence[Program]) -> None:
    sent: dict[Span, list[tuple[int, Transfer]]] = defaultdict(list)
    received: dict[Span, list[tuple[int, Transfer]]] = defaultdict(list)
    for one in programs:
        seen: set[int] = set()
        for step in one.steps:
            _demand(step.shift not in seen, one.rank, step, "happens twice, so it is not a matching")
            seen.add(step.shift)
            for moves, transfer in ((sent, step.send), (received, step.receive)):
                if transfer is not None:
                    moves[transfer.src, transfer.dst].append((step.shift, transfer))
    for pair in sorted({*sent, *received}):
        for i in range(max(len(sent[pair]), len(received[pair]))):
            out, back = (moves[pair][i] if i < len(moves[pair]) else None for moves in (sent, received))
            shift = (out or back or (0,))[0]
            _demand(out == back, pair[0], None, "step {}: sends {}, rank {} receives {}", shift, out, pair[1], back)


def ends_of(one: Program) -> tuple[Ends, ...]:
    """The exchanges of a rank's program."""
    remote = one.steps[1:]
    return tuple(Ends(s.shift, s.send.dst if s.send else None, s.receive.src if s.receive else None) for s in remote)


def _coverage(one: Program) -> None:
    expr = one.problem.expr
    if one.problem.queries * one.problem.keys > BRUTE:
        return _cover_rectangles(one)
    try:
        _cover_elements(one)
    except ScheduleError:
        if without_data(expr, True) == expr:
            raise
        _cover_rectangles(one)  # proves more where data and positions mix: k <= max(q, x0[b])


def _tiles(one: Program) -> Iterator[tuple[Step, Tile, Ranges, Ranges]]:
    """(step, tile, its query tokens, its key tokens)."""
    queries = one.problem.query_layout.ranges(one.rank, one.problem.queries)
    for step in one.steps:
        for tile in step.tiles:
            q, k = tokens(queries, tile.q), tokens(step.tokens, tile.k)
            plain = tile.kind not in TRIANGLES or len(q) == len(k) == 1 or (tile.kind == CAUSAL_TILE and q == k)
            _demand(plain, one.rank, step, "tile {} is a triangle of {} and {}", tile, q, k)
            yield step, tile, q, k


def _cover_elements(one: Program) -> None:
    problem, rank = one.problem, one.rank
    queries = problem.query_layout.ranges(rank, problem.queries)
    may, must = (_values(problem.expr, queries, [(0, problem.keys)], unknown) for unknown in (True, False))
    met = torch.zeros(problem.keys, dtype=torch.bool)
    for start, stop in problem.keys_met(rank):
        met[start:stop] = True
    covered = torch.zeros_like(may)
    for step, tile, _, k in _tiles(one):
        part = slice(*tile.q), torch.cat([torch.arange(*span) for span in k])
        inside = _shape(tile)
        _demand(not bool((covered[part] & inside).any()), rank, step, "tile {} covers pairs of another one", tile)
        covered[part] = covered[part] | inside
        whole = tile.kind == PARTIAL or bool((must[part] | ~inside).all())
        _demand(whole, rank, step, "the mask is not as the kind of tile {} says", tile)
    _demand(not bool(covered[:, ~met].any()), rank, None, "a tile covers keys that the rank does not hold")
    for row, key in (may & ~covered & met).nonzero()[:1].tolist():
        ((query, _),) = tokens(queries, (row, row + 1))
        _demand(False, rank, None, "no tile covers query {}, key {}, which the mask may allow", query, key)


def _shape(tile: Tile) -> Tensor:
    """A mask of the pairs that a tile computes."""
    square = torch.ones(tile.q[1] - tile.q[0], tile.k[1] - tile.k[0], dtype=torch.bool)
    return {CAUSAL_TILE: square.tril, MIRRORED: square.triu}.get(tile.kind, square.clone)()


def _cover_rectangles(one: Program) -> None:
    parts = [part for _, tile, q, k in _tiles(one) for part in _parts(tile, q, k)]
    owner = [_owner(one, k) for _, k, _ in parts]
    columns = np.array([(*q, *k, kind) for q, k, kind in parts], dtype=np.int64).reshape(-1, 5).T
    dst, src = np.full(len(parts), one.rank), np.array(owner, dtype=np.int64)
    cover(one.problem, one.rank, Tiling(dst, src, (columns[0], columns[1]), (columns[2], columns[3]), columns[4]))


def _parts(tile: Tile, q: Ranges, k: Ranges) -> Iterator[tuple[Span, Span, int]]:
    """A tile in rows as tiles in tokens: each range of queries by each range of keys."""
    for i, queries in enumerate(q):
        for j, keys in enumerate(k):
            if tile.kind != CAUSAL_TILE or len(q) == len(k) == 1:
                yield queries, keys, TILE_KINDS.index(tile.kind)
            elif i >= j:
                yield queries, keys, TILE_KINDS.index(CAUSAL_TILE if i == j else FULL)


def _owner(one: Program, keys: Span) -> int:
    """The rank that the program gets `keys` from: itself, or the sender of the step that receives them."""
    for step in one.steps[1:]:
        if step.receive and any(a <= keys[0] < b for a, b in step.receive.tokens):
            return step.receive.src
    return one.rank


def _thrift(one: Program) -> None:
    """With this, a rank receives exactly the lower bound, at the granularity of tiles."""
    edge, found = one.problem.tile, list(_tiles(one))
    pairs = [(i, *a, *b) for i, (_, _, q, k) in enumerate(found) for a in q for b in k]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 5).T
    kinds = classify_all(one.problem.expr, (columns[1], columns[2]), (columns[3], columns[4]))
    some = {*columns[0][kinds != EMPTY_CODE].tolist()}
    for i, (step, tile, _, _) in enumerate(found):
        whole = tile.kind != PARTIAL and not one.problem.cut_all
        small = max(tile.q[1] - tile.q[0], tile.k[1] - tile.k[0]) <= edge
        _demand(whole or small, one.rank, step, "tile {} is larger than {}", tile, edge)
        _demand(i in some, one.rank, step, "the mask is empty in tile {}", tile)
    for step in one.steps[1:]:
        reached, end = 0, size(step.tokens)
        for start, stop in [*sorted(tile.k for tile in step.tiles), (end, end)]:
            _demand(start <= reached, one.rank, step, "key rows {} are received and not used", (reached, start))
            reached = max(reached, stop)


def _values(expr: Expr, queries: Sequence[Span], keys: Sequence[Span], unknown: bool) -> Tensor:
    """Where `queries` x `keys` may attend (`unknown` True) in some batch element and head, or must (False) in all."""
    q, k = (torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)]) for spans in (queries, keys))
    sizes = extents(expr)
    b, h = (torch.arange(sizes.get(name, 1)) for name in "bh")
    where = {"b": b.view(-1, 1, 1, 1), "h": h.view(1, -1, 1, 1), "q": q.view(1, 1, -1, 1), "k": k.view(1, 1, 1, -1)}
    values = evaluate(without_data(expr, unknown), where, []).to(torch.bool).expand(len(b), len(h), len(q), len(k))
    return values.any(1).any(0) if unknown else values.all(1).all(0)
