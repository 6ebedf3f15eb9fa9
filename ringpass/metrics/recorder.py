"""What is counted and timed while metrics are on, and the names under which it is found.

A range that `ringpass.profiling` opens has a label, such as "wait for site0 receive_step1_from_rank0".  `kind_of`
says what kind of work that is, and a Recorder keeps one histogram of seconds per kind.  Messages are counted in bytes
that arrive.

Seconds are the host's: on a CPU those of the work itself, on a GPU those of queueing it.
"""

from __future__ import annotations

import bisect
import re
import resource
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch

BOUNDS = tuple(10.0**e * m for e in range(-5, 3) for m in (1, 3))
"""Upper bounds of a histogram's buckets: 10 us, 30 us, .., 300 s.  A last bucket, without a bound, has the rest."""

CALL, AGREEMENT, COMPILATION = "call", "agreement", "compilation"
KINDS = {
    CALL: r"call of a compiled model",
    AGREEMENT: r"compare the ranks",
    COMPILATION: r"compile a graph",
    "tile, forward": r"site\d+ attention_(?!backward)",
    "tile, backward": r"site\d+ attention_backward",
    "wait, exchange": r"wait for site\d+ receive",
    "wait, gather of keys": r"wait for site\d+ gather",
    "wait, all-to-all": r"wait for site\d+",
    "wait, sum of gradients": r"wait for a sum",
    "wait, collective": r"collective ",
    "wait, output": r"gather an output",
    "start of a transfer": r"site\d+ ",
}
"""What the labels of a kind of range begin with; the first that fits counts."""
OTHER = "other"
WAITS = AGREEMENT, "wait, "
"""How the kinds begin in which a rank waits for others."""
Measured = Callable[[str, float, str], None]
"""A callback: what was measured (a kind of range, or "bytes of ..."), its seconds or bytes, and the label."""


@lru_cache(maxsize=4096)
def kind_of(label: str) -> str:
    """The kind of a range.

    >>> kind_of("wait for site0 receive_gradients_step1_from_rank0"), kind_of("site3 attention_step1_q0to16_k0to8")
    ('wait, exchange', 'tile, forward')
    """
    return next((kind for kind, start in KINDS.items() if re.match(start, label)), OTHER)


@dataclass
class Histogram:
    """How often something took how long.  `counts`: by bucket, the one without a bound last."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one more."""
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    def as_dict(self) -> dict[str, Any]:
        """{"count", "total", "longest", "buckets": {bound: how many took at most that}}."""
        buckets, below = {}, 0
        for bound, count in zip((*BOUNDS, float("inf")), self.counts, strict=True):
            buckets[bound] = below = below + count
        return {"count": below, "total": self.total, "longest": self.longest, "buckets": buckets}


class Recorder:
    """Counters and histograms of this process.  Safe for threads: a backward runs in threads of its own."""

    def __init__(self, callback: Measured | None = None) -> None:
        self.callback = callback
        self.seconds: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.recompilations = 0
        self.stalls = 0
        self.open: dict[int, tuple[str, float]] = {}  # by thread: the label of the wait that it is in, and since when
        self.lock = threading.Lock()

    def took(self, label: str, seconds: float) -> None:
        """Notes how long a range took."""
        kind = kind_of(label)
        with self.lock:
            self.seconds[kind].add(seconds)
        if self.callback:
            self.callback(kind, seconds, label)

    def moved(self, what: str, size: int) -> None:
        """Notes a message of `size` bytes that arrives; `what`: an exchange, or the collective."""
        with self.lock:
            self.bytes[what] += size
            self.messages[what] += 1
        if self.callback:
            self.callback(f"bytes of {what}", size, what)

    def snapshot(self) -> dict[str, Any]:
        """As `ringpass.metrics.snapshot` says."""
        with self.lock:
            seconds = {kind: histogram.as_dict() for kind, histogram in sorted(self.seconds.items())}
            now, waits = time.monotonic(), list(self.open.values())
            return {
                "calls": seconds[CALL]["count"] if CALL in seconds else 0,
                "compilations": seconds[COMPILATION]["count"] if COMPILATION in seconds else 0,
                "recompilations": self.recompilations,
                "seconds": seconds,
                "bytes": dict(self.bytes),
                "messages": dict(self.messages),
                "stalls": self.stalls,
                "waiting": [{"for": label, "seconds": now - since} for label, since in waits],
                "peak bytes": peak_bytes(),
            }


def peak_bytes() -> dict[str, int]:
    """The most memory so far: resident in this process, and allocated by torch on the current GPU, if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


class Timed:
    """The context of a range that is timed, and shown to a profiler as well."""

    def __init__(self, recorder: Recorder, label: str) -> None:
        self.recorder, self.label = recorder, label
        self.shown = torch._C._profiler._RecordFunctionFast(label)
        self.waits = kind_of(label).startswith(WAITS)

    def __enter__(self) -> None:
        self.shown.__enter__()
        self.since = time.monotonic()
        if self.waits:
            self.recorder.open[threading.get_ident()] = self.label, self.since

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.waits:
            self.recorder.open.pop(threading.get_ident(), None)
        self.shown.__exit__(kind, error, trace)
        self.recorder.took(self.label, time.monotonic() - self.since)


active: Recorder | None = None
"""The switch: None while metrics are off.  Each range and each message reads it once."""


def moved(what: str, size: int) -> None:
    """Notes that `size` bytes arrive, if metrics are on; `what`: an exchange, or the collective that brings them."""
    if active is not None:
        active.moved(what, size)
