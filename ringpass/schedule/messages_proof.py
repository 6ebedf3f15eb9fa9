"""Proves the messages that the head groups of a dilated attention share, for all ranks together.

Contract: `check_messages` returns only if the exchanges of all ranks have all of these properties, and raises
ScheduleError, with the rank, the step and the message, for the first that they lack.

    steps     an exchange serves the steps of all head groups with its shift, and the shifts ascend
    matched   what a rank sends is what the other one expects: the same parts, in the same order
    whole     a message has each (K/V head, token) that a head group transfers in that step
    thrift    it has each once, and nothing else
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ringpass.errors import ScheduleError
from ringpass.schedule.dilation import GroupProblem
from ringpass.schedule.messages import Exchange, Message, exchanges
from ringpass.schedule.order_proof import prove_order
from ringpass.schedule.program import Transfer, program

Groups = tuple[GroupProblem, ...]


def prove_messages(groups: Groups, heads: int, kv_heads: int) -> None:
    """Proves the exchanges of all ranks, and their order.  Raises ScheduleError if they are wrong.

    `heads`, `kv_heads`: the numbers of query heads and of K/V heads that the groups number.
    """
    ranks = [exchanges(groups, rank, heads, kv_heads) for rank in range(groups[0].problem.world)]
    check_messages(groups, ranks, heads, kv_heads)
    prove_order([[x.ends for x in of_rank[1:]] for of_rank in ranks])


def check_messages(groups: Groups, ranks: Sequence[Sequence[Exchange]], heads: int, kv_heads: int) -> None:
    """Proves the exchanges of ranks 0, 1, ..  Raises ScheduleError if they are wrong."""
    for rank, of_rank in enumerate(ranks):
        _check_steps(groups, rank, of_rank)
        for exchange in of_rank:
            for message, side in ((exchange.receive, "receive"), (exchange.send, "send")):
                transfers = {i: x for i, step in exchange.steps if (x := getattr(step, side)) is not None}
                _check_contents(groups, (rank, exchange.shift), message, transfers, heads, kv_heads)
    _check_matched(ranks)


def _check_steps(groups: Groups, rank: int, of_rank: Sequence[Exchange]) -> None:
    shifts = [exchange.shift for exchange in of_rank]
    if shifts != sorted({*shifts}):
        raise ScheduleError(f"rank {rank}: the shifts of its exchanges, {shifts}, do not ascend")
    served = Counter((i, step) for exchange in of_rank for i, step in exchange.steps)
    wanted = Counter((i, step) for i, group in enumerate(groups) for step in program(group.problem, rank).steps)
    odd = (served - wanted) + (wanted - served)
    for i, step in sorted(odd, key=lambda key: (key[1].shift, key[0])):
        how = "is served twice or is another one" if served[i, step] > wanted[i, step] else "is not served"
        raise ScheduleError(f"rank {rank}, step {step.shift}: head group {i}: its step {how}")
    for exchange in of_rank:
        for i, step in exchange.steps:
            if step.shift != exchange.shift:
                raise ScheduleError(f"rank {rank}, step {exchange.shift}: head group {i}: its step is {step.shift}")


def _check_contents(
    groups: Groups,
    where: tuple[int, int],
    message: Message | None,
    transfers: dict[int, Transfer],
    heads: int,
    kv_heads: int,
) -> None:
    about = f"rank {where[0]}, step {where[1]}"
    wanted = {
        (head, token)
        for i, transfer in transfers.items()
        for head in groups[i].head_group.key_heads(heads, kv_heads)
        for token in groups[i].head_group.tokens(transfer.tokens).tolist()
    }
    for transfer in transfers.values():
        ends = (message.src, message.dst) if message else None
        if ends != (transfer.src, transfer.dst):
            raise ScheduleError(f"{about}: {transfer} travels in the message of ranks {ends}")
    found = Counter(
        (head, token)
        for part in (message.parts if message else ())
        for head in part.heads
        for token in part.tokens.tolist()
    )
    text = f"{about}: the message from rank {message.src} to rank {message.dst}" if message else about
    for head, token in sorted(wanted - found.keys())[:1]:
        raise ScheduleError(f"{text} lacks token {token} of K/V head {head}")
    for head, token in sorted(found.keys() - wanted)[:1]:
        raise ScheduleError(f"{text} has token {token} of K/V head {head}, which nobody reads")
    for (head, token), times in sorted(found.items()):
        if times > 1:
            raise ScheduleError(f"{text} has token {token} of K/V head {head} {times} times")


def _check_matched(ranks: Sequence[Sequence[Exchange]]) -> None:
    sent = {(x.shift, m.src, m.dst): _layout(m) for of_rank in ranks for x in of_rank if (m := x.send)}
    received = {(x.shift, m.src, m.dst): _layout(m) for of_rank in ranks for x in of_rank if (m := x.receive)}
    for key in sorted({*sent, *received}):
        shift, src, dst = key
        if sent.get(key) != received.get(key):
            what = "is not sent" if key not in sent else "is not expected" if key not in received else "differs"
            raise ScheduleError(
                f"rank {src}, step {shift}: its message to rank {dst} {what} (there: {received.get(key)})"
            )


def _layout(message: Message) -> list[tuple[tuple[int, ...], list[int]]]:
    return [(part.heads, part.tokens.tolist()) for part in message.parts]
