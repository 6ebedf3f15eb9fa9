"""The proof refuses a wrong program, and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ringpass.errors import ScheduleError
from ringpass.masks.intervals import FULL, PARTIAL
from ringpass.schedule import proof as verify
from ringpass.schedule.program import Program, Step, Transfer, program
from ringpass.schedule.proof import check
from ringpass.schedule.tiles import CAUSAL_TILE, Tile
from tests.support.programs import CAUSAL, WINDOW, Programs, changed, problem, with_steps


def drop_tile(p: Programs) -> Programs:
    return changed(p, 1, 1, tiles=p[1].steps[1].tiles[1:])


def drop_local_tile(p: Programs) -> Programs:
    return changed(p, 2, 0, tiles=p[2].steps[0].tiles[:-1])


def duplicate_tile(p: Programs) -> Programs:
    return changed(p, 1, 1, tiles=p[1].steps[1].tiles * 2)


def shrink_tile(p: Programs) -> Programs:
    first, *rest = p[1].steps[1].tiles
    return changed(p, 1, 1, tiles=(replace(first, q=(first.q[0] + 1, first.q[1])), *rest))


def grow_tile_over_its_neighbour(p: Programs) -> Programs:
    first, *rest = p[1].steps[1].tiles
    return changed(p, 1, 1, tiles=(replace(first, q=(first.q[0], first.q[1] + 1)), *rest))


def grow_tile_past_the_block(p: Programs) -> Programs:
    *rest, last = p[0].steps[1].tiles
    return changed(p, 0, 1, tiles=(*rest, replace(last, q=(last.q[0], last.q[1] + 1))))


def partial_called_full(p: Programs) -> Programs:
    return changed(p, 0, 0, tiles=tuple(replace(t, kind=FULL) for t in p[0].steps[0].tiles))


def full_called_causal(p: Programs) -> Programs:
    return changed(p, 1, 1, tiles=tuple(replace(t, kind=CAUSAL_TILE) for t in p[1].steps[1].tiles))


def unknown_kind(p: Programs) -> Programs:
    return changed(p, 1, 1, tiles=tuple(replace(t, kind="empty") for t in p[1].steps[1].tiles))


def other_tokens_received(p: Programs) -> Programs:
    receive = p[1].steps[1].receive
    assert receive
    (start, stop), *rest = receive.tokens
    less = ((start, stop - 1), *rest)
    return changed(p, 1, 1, receive=replace(receive, tokens=less), tokens=less)


def other_tokens_on_both_sides(p: Programs) -> Programs:
    receive = p[1].steps[1].receive
    assert receive
    (start, stop), *rest = receive.tokens
    less = ((start, stop - 1), *rest)
    p = changed(p, 1, 1, receive=replace(receive, tokens=less), tokens=less)
    return changed(p, 0, 1, send=replace(receive, tokens=less))


def more_tokens_than_used(p: Programs) -> Programs:
    everything = p[0].steps[0].tokens
    transfer = Transfer(0, 1, everything)
    return changed(changed(p, 1, 1, receive=transfer, tokens=everything), 0, 1, send=transfer)


def tokens_of_another_rank(p: Programs) -> Programs:
    transfer = Transfer(0, 1, ((3, 6),))
    return changed(changed(p, 1, 1, receive=transfer, tokens=transfer.tokens), 0, 1, send=transfer)


def block_unlike_its_receive(p: Programs) -> Programs:
    return changed(p, 1, 1, tokens=p[1].steps[2].tokens)


def receive_without_send(p: Programs) -> Programs:
    return changed(p, 0, 1, send=None)


def send_without_receive(p: Programs) -> Programs:
    return changed(p, 1, 1, receive=None, tokens=(), tiles=())


def send_to_itself(p: Programs) -> Programs:
    send = p[0].steps[1].send
    assert send
    return changed(p, 0, 1, send=replace(send, dst=0))


def lost_step(p: Programs) -> Programs:
    return with_steps(p, 1, p[1].steps[:-1])


def swapped_order(p: Programs) -> Programs:
    return with_steps(p, 1, [p[1].steps[0], *reversed(p[1].steps[1:])])


def swapped_order_everywhere_but_one(p: Programs) -> Programs:
    for rank in range(1, len(p)):
        p = with_steps(p, rank, [p[rank].steps[0], *reversed(p[rank].steps[1:])])
    return p


def repeated_step(p: Programs) -> Programs:
    return with_steps(p, 1, [*p[1].steps, p[1].steps[1]])


def foreign_local_keys(p: Programs) -> Programs:
    return changed(p, 1, 0, tokens=p[0].steps[0].tokens)


def idle_step(p: Programs) -> Programs:
    return with_steps(p, 1, [*p[1].steps, Step(9, (), ())])


def programs_of_other_ranks(p: Programs) -> Programs:
    return list(reversed(p))


def no_programs_of_a_problem(p: Programs) -> Programs:
    return [p[0], replace(p[1], problem=replace(p[1].problem, queries=23)), p[2]]


REFUSED: dict[Callable[[Programs], Programs], str] = {
    drop_tile: "rank 1: no tile covers query 4, key 0",
    drop_local_tile: "rank 2: no tile covers",
    duplicate_tile: "rank 1, step 1: tile .* covers pairs of another one",
    shrink_tile: "rank 1: no tile covers",
    grow_tile_over_its_neighbour: "rank 1, step 1: tile .* covers pairs",
    grow_tile_past_the_block: "rank 0, step 1: tile .* is not in the . query rows",
    partial_called_full: "rank 0, step 0: the mask is not as the kind of tile full",
    full_called_causal: "rank 1, step 1: tile causal .* is a triangle, but not square",
    unknown_kind: "rank 1, step 1: tile .* is of an unknown kind",
    other_tokens_received: "rank 1, step 1: tile|rank 0: step 1: sends",
    other_tokens_on_both_sides: "rank 1, step 1: tile .* is not in the . key rows",
    more_tokens_than_used: "rank 1.*(not used|covers|no tile|not full)",
    tokens_of_another_rank: "rank 0, step 1: .*its sender lacks",
    block_unlike_its_receive: "rank 1, step 1: has tokens",
    receive_without_send: "rank 0: step 1: sends None, rank 1 receives",
    send_without_receive: "rank 0: step 1: sends .*, rank 1 receives None",
    send_to_itself: "rank 0, step 1: .* does not go from 0 to 1",
    lost_step: "rank .: step 2: sends",
    swapped_order: "waits in a circle: rank",
    swapped_order_everywhere_but_one: "waits in a circle: rank",
    repeated_step: "rank 1, step 1: happens twice",
    foreign_local_keys: "rank 1, step 0: holds tokens",
    idle_step: "rank 1, step 9: moves nothing",
    programs_of_other_ranks: "rank 0: the program is another",
    no_programs_of_a_problem: "rank 1: the program is another",
}


@pytest.mark.parametrize("brute", [verify.BRUTE, 0])
@pytest.mark.parametrize("corrupt", REFUSED, ids=lambda f: str(f.__name__))
def test_wrong_programs_are_refused(
    corrupt: Callable[[Programs], Programs], brute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "BRUTE", brute)
    p = problem(CAUSAL, 3, 24, tile=2, cut_all=corrupt in (grow_tile_over_its_neighbour, drop_local_tile))
    programs = [program(p, rank) for rank in range(3)]
    check(programs)
    with pytest.raises(ScheduleError) as error:
        check(corrupt(programs))
    if brute:
        error.match(REFUSED[corrupt])


def test_tiles_without_use_are_refused() -> None:
    p = problem(WINDOW, 1, 24, tile=4)
    (step,) = program(p, 0).steps
    with pytest.raises(ScheduleError, match="rank 0, step 0: the mask is empty in tile"):
        check([Program(p, 0, (replace(step, tiles=(*step.tiles, Tile((0, 3), (21, 24), PARTIAL))),))])
    with pytest.raises(ScheduleError, match="rank 0, step 0: tile .* is larger than 4"):
        check([Program(p, 0, (replace(step, tiles=(Tile((0, 24), (0, 24), PARTIAL),)),))])


def test_a_zigzag_of_waits_is_a_circle() -> None:
    """Each pair's order agrees, yet three ranks wait for each other."""
    p = problem("True", 3, 9, "contiguous")
    programs = [program(p, rank) for rank in range(3)]
    with pytest.raises(ScheduleError, match="waits in a circle"):
        check(swapped_order(programs))
