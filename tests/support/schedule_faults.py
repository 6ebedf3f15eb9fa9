"""Faults put into the programs of all ranks: each changes one thing, and says which ranks it is about.

A fault takes (random, programs) and returns the wrong programs and these ranks; None: these programs have no place for
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from ringpass.layouts.ranges import Ranges
from ringpass.masks.intervals import FULL
from ringpass.schedule.program import Program, Step, Transfer
from ringpass.schedule.tiles import CAUSAL_TILE, MIRRORED, Tile
from tests.support.programs import Programs, changed, with_steps

Wrong = tuple[Programs, set[int]]
Fault = Callable[[Random, Programs], Wrong | None]


def _places(programs: Programs, fits: Callable[[Step], bool]) -> list[tuple[int, int]]:
    """(rank, index) of the steps that fit."""
    return [(one.rank, i) for one in programs for i, step in enumerate(one.steps) if fits(step)]


Edit = Callable[[Random, Programs, int, int, Step], Wrong | None]
"""A fault of one step: (random, programs, rank, the step's number, the step)."""
TransferEdit = Callable[[Random, Programs, int, int, Transfer], Wrong]
"""The same of what a step sends or receives."""


def _at_a_step(fits: Callable[[Step], bool]) -> Callable[[Edit], Fault]:
    """Decorates an edit: the fault makes it at a random step that fits."""

    def decorate(edit: Edit) -> Fault:
        def fault(random: Random, programs: Programs) -> Wrong | None:
            places = _places(programs, fits)
            if not places:
                return None
            rank, i = random.choice(places)
            return edit(random, programs, rank, i, programs[rank].steps[i])

        return fault

    return decorate


def _at_a_transfer(side: str) -> Callable[[TransferEdit], Fault]:
    """Decorates an edit of a transfer: `side` is "send" or "receive"."""

    def decorate(edit: TransferEdit) -> Fault:
        @_at_a_step(lambda step: getattr(step, side) is not None)
        def fault(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong:
            return edit(random, programs, rank, i, getattr(step, side))

        return fault

    return decorate


# --- transfers --------------------------------------------------------------------------------------------------------


def _sender(programs: Programs, transfer: Transfer) -> tuple[int, int]:
    """(rank, index) of the step that sends it."""
    steps = programs[transfer.src].steps
    return transfer.src, next(i for i, step in enumerate(steps) if step.send == transfer)


def _on_both_sides(programs: Programs, rank: int, i: int, tokens: Ranges) -> Wrong:
    """What step `i` of `rank` receives is other tokens, on both sides."""
    old = programs[rank].steps[i].receive
    assert old is not None
    new = replace(old, tokens=tokens)
    out = changed(programs, *_sender(programs, old), send=new)
    return changed(out, rank, i, receive=new, tokens=tokens), {rank, old.src}


@_at_a_transfer("send")
def dropped_send(random: Random, programs: Programs, rank: int, i: int, sent: Transfer) -> Wrong:
    return changed(programs, rank, i, send=None), {rank, sent.dst}


@_at_a_transfer("receive")
def dropped_receive(random: Random, programs: Programs, rank: int, i: int, received: Transfer) -> Wrong:
    return changed(programs, rank, i, receive=None, tokens=(), tiles=()), {rank, received.src}


@_at_a_transfer("receive")
def dropped_on_both_sides(random: Random, programs: Programs, rank: int, i: int, received: Transfer) -> Wrong:
    out = changed(programs, *_sender(programs, received), send=None)
    return changed(out, rank, i, receive=None, tokens=(), tiles=()), {rank, received.src}


@_at_a_step(lambda step: step.shift > 0)
def doubled_step(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong:
    steps = [*programs[rank].steps]
    steps.insert(random.randint(i, len(steps)), step)
    return with_steps(programs, rank, steps), {rank, *_peers(step)}


def _peers(step: Step) -> set[int]:
    return {end for x in (step.send, step.receive) if x for end in (x.src, x.dst)}


def swapped_steps(random: Random, programs: Programs) -> Wrong | None:
    ranks = [one.rank for one in programs if len(one.steps) > 2]
    if not ranks:
        return None
    rank = random.choice(ranks)
    steps = [*programs[rank].steps]
    i, j = random.sample(range(1, len(steps)), 2)
    steps[i], steps[j] = steps[j], steps[i]
    return with_steps(programs, rank, steps), {rank, *_peers(steps[i]), *_peers(steps[j])}


def swapped_messages(random: Random, programs: Programs) -> Wrong | None:
    """A rank sends to each of two ranks what the other one needs."""
    sends = [(rank, i) for rank, i in _places(programs, lambda step: step.send is not None)]
    pairs = [(a, b) for a in sends for b in sends if a[0] == b[0] and a[1] < b[1]]
    if not pairs:
        return None
    (rank, i), (_, j) = random.choice(pairs)
    one, other = programs[rank].steps[i].send, programs[rank].steps[j].send
    assert one is not None and other is not None
    out = changed(programs, rank, i, send=replace(one, tokens=other.tokens))
    return changed(out, rank, j, send=replace(other, tokens=one.tokens)), {rank, one.dst, other.dst}


@_at_a_transfer("send")
def misdirected_send(random: Random, programs: Programs, rank: int, i: int, sent: Transfer) -> Wrong:
    dst = (sent.dst + random.randint(1, len(programs) - 1)) % len(programs)
    return changed(programs, rank, i, send=replace(sent, dst=dst)), {rank, dst, sent.dst}


@_at_a_transfer("receive")
def misdirected_receive(random: Random, programs: Programs, rank: int, i: int, received: Transfer) -> Wrong:
    src = (received.src + random.randint(1, len(programs) - 1)) % len(programs)
    return changed(programs, rank, i, receive=replace(received, src=src)), {rank, src, received.src}


@_at_a_transfer("receive")
def truncated_by_the_receiver(random: Random, programs: Programs, rank: int, i: int, received: Transfer) -> Wrong:
    less = _truncated(random, received.tokens)
    return changed(programs, rank, i, receive=replace(received, tokens=less), tokens=less), {
        rank,
        received.src,
    }


@_at_a_transfer("receive")
def truncated_on_both_sides(random: Random, programs: Programs, rank: int, i: int, received: Transfer) -> Wrong:
    return _on_both_sides(programs, rank, i, _truncated(random, received.tokens))


def _truncated(random: Random, tokens: Ranges) -> Ranges:
    """Without the first or the last token."""
    out = [list(span) for span in tokens]
    if random.random() < 0.5:
        out[0][0] += 1
    else:
        out[-1][1] -= 1
    return tuple((a, b) for a, b in out if a < b)


@_at_a_transfer("receive")
def other_rows(random: Random, programs: Programs, rank: int, i: int, received: Transfer) -> Wrong:
    """The rows next to those that are needed, on both sides."""
    by = random.choice((-2, -1, 1, 2))
    return _on_both_sides(programs, rank, i, tuple((a + by, b + by) for a, b in received.tokens))


@_at_a_transfer("send")
def rows_of_the_sender_alone(random: Random, programs: Programs, rank: int, i: int, sent: Transfer) -> Wrong:
    """The sender packs the rows next to those that are expected."""
    by = random.choice((-1, 1))
    moved = tuple((a + by, b + by) for a, b in sent.tokens)
    return changed(programs, rank, i, send=replace(sent, tokens=moved)), {rank, sent.dst}


@_at_a_step(lambda step: step.receive is not None)
def block_of_another_step(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong:
    other = random.choice(programs[rank].steps)
    return changed(programs, rank, i, tokens=other.tokens), {rank}


@_at_a_step(lambda step: step.shift > 0)
def other_shift(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong:
    return changed(programs, rank, i, shift=step.shift % (len(programs) - 1) + 1), {rank, *_peers(step)}


@_at_a_step(lambda step: step.shift > 0)
def lost_step(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong:
    steps = [x for j, x in enumerate(programs[rank].steps) if j != i]
    return with_steps(programs, rank, steps), {rank, *_peers(step)}


def foreign_local_keys(random: Random, programs: Programs) -> Wrong | None:
    rank, other = random.sample(range(len(programs)), 2)
    return changed(programs, rank, 0, tokens=programs[other].steps[0].tokens), {rank}


def program_of_another_rank(random: Random, programs: Programs) -> Wrong | None:
    rank, other = random.sample(range(len(programs)), 2)
    return [programs[other] if one.rank == rank else one for one in programs], {rank, other}


# --- tiles ------------------------------------------------------------------------------------------------------------


def _on_a_tile(change: Callable[[Random, Tile, Program], list[Tile] | None]) -> Fault:
    """A fault that puts other tiles in the place of one."""

    @_at_a_step(lambda step: bool(step.tiles))
    def fault(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong | None:
        at = random.randrange(len(step.tiles))
        new = change(random, step.tiles[at], programs[rank])
        if new is None:
            return None
        return changed(programs, rank, i, tiles=(*step.tiles[:at], *new, *step.tiles[at + 1 :])), {rank}

    return fault


def _moved(random: Random, span: tuple[int, int]) -> tuple[int, int]:
    by = random.choice((-1, 1))
    return span[0] + by, span[1] + by


def _shorter(random: Random, span: tuple[int, int]) -> tuple[int, int]:
    return (span[0] + 1, span[1]) if random.random() < 0.5 else (span[0], span[1] - 1)


def _longer(random: Random, span: tuple[int, int]) -> tuple[int, int]:
    return (span[0] - 1, span[1]) if random.random() < 0.5 else (span[0], span[1] + 1)


def _resized(how: Callable[[Random, tuple[int, int]], tuple[int, int]]) -> Fault:
    """A fault that changes the query rows or the key rows of a tile."""

    def change(random: Random, tile: Tile, one: Program) -> list[Tile]:
        if random.random() < 0.5:
            return [replace(tile, q=how(random, tile.q))]
        return [replace(tile, k=how(random, tile.k))]

    return _on_a_tile(change)


def _of_kind(*kinds: str) -> Fault:
    """A fault that changes the kind of a tile to one of `kinds`."""

    def change(random: Random, tile: Tile, one: Program) -> list[Tile] | None:
        others = [kind for kind in kinds if kind != tile.kind]
        return [replace(tile, kind=random.choice(others))] if others else None

    return _on_a_tile(change)


@_at_a_step(lambda step: bool(step.tiles))
def tile_in_another_step(random: Random, programs: Programs, rank: int, i: int, step: Step) -> Wrong | None:
    if len(programs[rank].steps) < 2:
        return None
    j = random.choice([j for j in range(len(programs[rank].steps)) if j != i])
    at = random.randrange(len(step.tiles))
    out = changed(programs, rank, i, tiles=(*step.tiles[:at], *step.tiles[at + 1 :]))
    return changed(out, rank, j, tiles=(*programs[rank].steps[j].tiles, step.tiles[at])), {rank}


FAULTS: dict[str, Fault] = {
    "dropped send": dropped_send,
    "dropped receive": dropped_receive,
    "dropped on both sides": dropped_on_both_sides,
    "doubled step": doubled_step,
    "swapped steps": swapped_steps,
    "swapped messages": swapped_messages,
    "misdirected send": misdirected_send,
    "misdirected receive": misdirected_receive,
    "truncated by the receiver": truncated_by_the_receiver,
    "truncated on both sides": truncated_on_both_sides,
    "other rows": other_rows,
    "rows of the sender alone": rows_of_the_sender_alone,
    "block of another step": block_of_another_step,
    "other shift": other_shift,
    "lost step": lost_step,
    "foreign local keys": foreign_local_keys,
    "program of another rank": program_of_another_rank,
    "missed tile": _on_a_tile(lambda random, tile, one: []),
    "doubled tile": _on_a_tile(lambda random, tile, one: [tile, tile]),
    "moved tile": _resized(_moved),
    "shrunk tile": _resized(_shorter),
    "grown tile": _resized(_longer),
    "called full": _of_kind(FULL),
    "called a triangle": _of_kind(CAUSAL_TILE, MIRRORED),
    "of an unknown kind": _of_kind("empty", "dense"),
    "tile in another step": tile_in_another_step,
}


def seeded(
    fault: str, seeds: Iterator[int], programs_of: Callable[[int], Programs]
) -> Iterator[tuple[int, Wrong, Programs]]:
    """(seed, the wrong programs and their ranks, the right ones) for each seed whose programs have a place for it."""
    for seed in seeds:
        programs = programs_of(seed)
        wrong = FAULTS[fault](Random(seed), programs) if len(programs) > 1 else None
        if wrong is not None:
            yield seed, wrong, programs
