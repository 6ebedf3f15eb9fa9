"""NCCL's order of batched point-to-point exchanges, simulated: what a schedule does on ranks that buffer nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ringpass.schedule.order import GRADIENTS, KEYS, START, WAIT, Ends, Event


@dataclass
class Stream:
    """One rank: its program of starts and waits, and the exchanges that it has handed to NCCL, in order."""

    program: list[Event]
    at: int = 0
    queue: list[tuple[str, int]] = field(default_factory=list)
    done: set[tuple[str, int]] = field(default_factory=set)
    met: set[int] = field(default_factory=set)  # peers that the exchange at the head of the queue has met

    def advance(self) -> bool:
        """Runs the program up to a wait that is not over; whether anything happened."""
        before = self.at
        while self.at < len(self.program):
            event = self.program[self.at]
            exchange = event.what, event.shift
            if event.action == START:
                self.queue.append(exchange)
            elif event.action == WAIT and exchange not in self.done:
                break
            self.at += 1
        return self.at > before


def completes(ranks: Sequence[Sequence[Ends]], programs: Sequence[Iterable[Event]]) -> bool:
    """Whether all exchanges end: each rank's run one after the other, and both ends of one must be at it together."""
    peers = [{ends.shift: ends.peers - {rank} for ends in of_rank} for rank, of_rank in enumerate(ranks)]
    streams = [Stream(list(program)) for program in programs]
    moved = True
    while moved:
        moved = False
        for stream in streams:
            moved |= stream.advance()
        for rank, stream in enumerate(streams):
            if not stream.queue:
                continue
            head = stream.queue[0]
            stream.met |= {p for p in peers[rank][head[1]] if streams[p].queue and streams[p].queue[0] == head}
        for rank, stream in enumerate(streams):
            if stream.queue and stream.met == peers[rank][stream.queue[0][1]]:
                stream.done.add(stream.queue.pop(0))
                stream.met = set()
                moved = True
    return all(stream.at == len(stream.program) and not stream.queue for stream in streams)


def keys_first(shifts: Sequence[int], backward: bool) -> Iterator[Event]:
    """The order that ringpass had first: keys of the next step always before the gradients of this one."""
    pending: int | None = None
    for shift, following in zip([0, *shifts], [*shifts, None], strict=True):
        if shift:
            yield Event(WAIT, KEYS, shift)
        if following is not None:
            yield Event(START, KEYS, following)
        if backward and shift:
            yield Event(START, GRADIENTS, shift)
            if pending is not None:
                yield Event(WAIT, GRADIENTS, pending)
            pending = shift
    if pending is not None:
        yield Event(WAIT, GRADIENTS, pending)
