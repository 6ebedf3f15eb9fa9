"""Counters and histograms of what the ring does: calls, bytes, waits, tiles, compilations, memory.

    >>> import ringpass
    >>> ringpass.metrics.enable()                      # off by default
    >>> found = ringpass.metrics.snapshot()            # train in between
    >>> found["calls"], found["compilations"], found["bytes"]
    (0, 0, {})
    >>> ringpass.metrics.disable()

Each process counts for itself: every rank that you watch enables its own.  While metrics are off, a range or a
message costs one look at a variable; `tests/metrics` prints the time.  Seconds are the host's: on a GPU, a
tile's are those of queueing its kernel, and a profiler shows the rest (docs/debugging.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ringpass.metrics import recorder
from ringpass.metrics.recorder import Measured, Recorder

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["disable", "enable", "prometheus_text", "register", "snapshot"]


def enable(callback: Measured | None = None) -> None:
    """Starts to count, from zero; metrics that are on already go on, with the callback given last, if any.

        ringpass.metrics.enable(lambda what, value, label: print(what, value, label))

    `callback(what, value, label)` is called for each measurement: `what` is a kind of range ("tile, forward", "wait,
    exchange", "call", ..) and `value` its seconds, or "bytes of ..." and bytes that arrive.  It runs in the thread
    that measures, in the middle of a step: it must be quick, must not call a compiled model, and what it raises is
    raised there.
    """
    if recorder.active is None:
        recorder.active = Recorder(callback)
    elif callback is not None:
        recorder.active.callback = callback


def disable() -> None:
    """Stops counting, and forgets what was counted."""
    recorder.active = None


def snapshot() -> dict[str, Any]:
    """What was counted since `enable`, as data:

        calls, compilations, recompilations, stalls    numbers
        seconds      by kind of range: count, total, longest, buckets {upper bound: how many took at most that}
        bytes        that arrive, by what brings them: "exchange", or the collective
        messages     how many of them
        waiting      waits that last now: [{"for": label, "seconds": ..}]
        peak bytes   resident memory of the process, and what torch allocated on the GPU

    Raises RuntimeError while metrics are off.
    """
    return _on().snapshot()


def register(registry: CollectorRegistry | None = None) -> None:
    """Adds these metrics to a registry of `prometheus_client`, its default one if None; enables them.

        ringpass.metrics.register()
        prometheus_client.start_http_server(9090 + rank)

    Raises ImportError without `prometheus_client` (pip install "ringpass[metrics]").
    """
    from ringpass.metrics.prometheus import Collector, default_registry

    enable()
    (default_registry() if registry is None else registry).register(Collector())


def prometheus_text() -> str:
    """The snapshot in Prometheus' text format.

    Raises ImportError without `prometheus_client` (pip install "ringpass[metrics]"), RuntimeError while metrics are
    off.
    """
    from ringpass.metrics.prometheus import text

    _on()
    return text()


def _on() -> Recorder:
    if recorder.active is None:
        raise RuntimeError("metrics are off: call ringpass.metrics.enable() before the steps that should be counted")
    return recorder.active
