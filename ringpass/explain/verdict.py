"""verdict: what a reader must see first, in at most three lines; and the devices that a peak is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringpass.amounts import size
from ringpass.errors import OptionError
from ringpass.explain.data import Event, GraphReport, Verdict

GB = 10**9
DEVICES: Mapping[str, int] = {
    "A100": 80 * GB, "H100": 80 * GB, "H200": 141 * GB, "B200": 180 * GB, "V100": 32 * GB, "L4": 24 * GB,
    "L40S": 48 * GB, "A10": 24 * GB, "RTX 4090": 24 * GB,
}  # fmt: skip
"""Bytes of memory as published, in units of 10^9; what a driver and a process group take is not left out."""
UNITS = {"gb": GB, "gib": 2**30, "mb": 10**6, "mib": 2**20, "g": GB, "m": 10**6, "b": 1}
LINES = 3
UNEVEN = 1.1  # times the mean work
GIVEN = "the option 'layout'"
"""How the reason for a layout begins that was asked for."""


@dataclass(frozen=True)
class Device:
    """A device: its name, its memory in bytes (None: not known), and torch's type for it (None: the default one)."""

    name: str
    bytes: int | None
    type: str | None


def device_of_name(given: str | int | None) -> Device | None:
    """The device that the argument `device` names: a name, an amount of memory, or nothing.

    >>> device_of_name("H100").bytes, device_of_name("24 GiB").bytes, device_of_name(10**9).name
    (80000000000, 25769803776, '1 GB')

    Raises OptionError for anything else.
    """
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return Device(size(given), given, None)
    text = str(given).strip()
    for name, memory in DEVICES.items():
        if text.lower() == name.lower():
            return Device(name, memory, "cuda")
    if text in ("cpu", "cuda"):
        return Device(text, None, text)
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = UNITS.get(text[len(number) :].strip().lower() or "b")
    try:
        amount = int(float(number) * (unit or 0))
    except ValueError:
        amount = 0
    if amount <= 0:
        raise OptionError(
            f"device must be one of {', '.join(map(repr, DEVICES))}, 'cpu', 'cuda', an amount of memory such as "
            f"'24 GiB', or a number of bytes, got {given!r}"
        )
    return Device(text, amount, None)


@dataclass(frozen=True)
class Problem:
    """What is wrong: what it is, for a line of the verdict, and the one thing to change."""

    text: str
    change: str


def verdict_of(
    graphs: Sequence[GraphReport], breaks: Sequence[Event], world: int, peak: int, device: Device | None
) -> Verdict:
    """The verdict on all graphs.  `peak`: bytes of one rank."""
    limit = device.bytes if device else None
    fits = None if limit is None else peak <= limit
    problems = list(_problems(graphs, breaks, world))
    if device is not None and limit is not None and not fits:
        change = _what_saves(graphs)
        has = size(limit) if device.name == size(limit) else f"{size(limit)} ({device.name})"
        problems.insert(0, Problem(f"memory does not fit: a rank needs {size(peak)} of {has}", change))
    efficiency, why = _efficiency(graphs)
    lines = [problem.text for problem in problems[:LINES]]
    if len(problems) > LINES:
        lines[-1] += f" (and {len(problems) - LINES} more)"
    good = _good(graphs, world, peak, device, efficiency)
    lines += good[: LINES - len(lines)]
    advice = problems[0].change if problems else _improvement(graphs, efficiency)
    shown: dict[str, Any] | None = {"name": device.name, "bytes": limit} if device and limit is not None else None
    return Verdict(lines, peak, shown, fits, efficiency, advice, why, [problem.text for problem in problems])


def _problems(graphs: Sequence[GraphReport], breaks: Sequence[Event], world: int) -> list[Problem]:
    out = []
    sites = [site for graph in graphs for site in graph.sites]
    if not sites and world > 1:
        out.append(Problem(
            f"no attention was found: each of the {world} ranks computes all of it, and nothing is saved",
            "write attention as scaled_dot_product_attention, FlexAttention, or a product, a softmax and a product",
        ))  # fmt: skip
    unread = [site for site in sites if not site.partitioned and site.why.startswith("runs as the model")]
    short = [r for graph in graphs for r in graph.remarks if "not more than 2 per rank" in r]
    if short and not any(graph.axes for graph in graphs):
        tokens = short[0].split(": ")[1].split(" ")[0]
        out.append(Problem(
            f"the sequence of {tokens} tokens is too short for {world} ranks: below 2 per rank it stays replicated",
            f"use sequences of more than {2 * world} tokens, or fewer ranks",
        ))  # fmt: skip
    elif sites and world > 1 and not any(graph.axes for graph in graphs) and not unread:
        out.append(Problem(
            f"no sequence is divided: each of the {world} ranks computes all of it",
            f"use sequences of more than {2 * world} tokens, or fewer ranks, and read the remarks of the plan",
        ))  # fmt: skip
    if breaks:
        count, first = sum(event.count for event in breaks), breaks[0]
        where = f" at {first.source}" if first.source else ""
        out.append(Problem(
            f"{count} graph break{'s' * (count > 1)}{where}: {first.reason}; what crosses one is gathered",
            f"take the break{where} out of the model",
        ))  # fmt: skip
    if unread:
        where = f" at {unread[0].source}" if unread[0].source else ""
        out.append(Problem(
            f"{sum(len(s.indices) for s in unread)} attentions are not partitioned{where}: {unread[0].why}",
            "call scaled_dot_product_attention with K and V of the batch and heads of Q",
        ))  # fmt: skip
    gathers = [
        gather for graph in graphs for gather in graph.gathers if gather.bytes and gather.why != "it is returned"
    ]
    if gathers:
        worst = max(gathers, key=lambda gather: gather.bytes)
        where = f" at {worst.source}" if worst.source else ""
        out.append(Problem(
            f"{worst.op} gathers {size(worst.bytes)} on every rank{where}: {worst.why} "
            f"({len(gathers)} gather{'s' * (len(gathers) > 1)} in all)",
            worst.remedy,
        ))  # fmt: skip
    given = [graph for graph in graphs if any(axis.why.startswith(GIVEN) for axis in graph.axes)]
    uneven = max((site.balance or 1.0 for graph in given for site in graph.sites), default=1.0)
    if uneven > UNEVEN:  # `auto` has weighed the other layouts
        out.append(Problem(
            f"the busiest rank does {uneven:.2f} times the mean work of attention, in the layout that the options give",
            "leave the option 'layout' out, or try layout='zigzag' or 'striped'",
        ))  # fmt: skip
    return out


def _good(
    graphs: Sequence[GraphReport], world: int, peak: int, device: Device | None, efficiency: float | None
) -> list[str]:
    """What can be said where nothing, or little, is wrong."""
    out = []
    if device is not None and device.bytes is not None and peak <= device.bytes:
        out.append(f"fits: a rank needs {size(peak)} of {size(device.bytes)} ({device.name})")
    else:
        out.append(f"a rank needs {size(peak)} at its peak")
    sites = sum(len(site.indices) for graph in graphs for site in graph.sites if site.partitioned)
    axes = [axis for graph in graphs for axis in graph.axes]
    if axes:
        layouts = ", ".join(dict.fromkeys(f"{axis.tokens} tokens in {axis.layout} order" for axis in axes[:2]))
        out.append(f"{sites} attention{'s' * (sites != 1)} over {world} ranks: {layouts}")
    if efficiency is not None:
        out.append(f"attention is estimated at {efficiency:.0%} of what {world} ranks could do")
    return out


def _what_saves(graphs: Sequence[GraphReport]) -> str:
    """The change that saves most memory, by the largest kind at the peak."""
    kinds: dict[str, int] = {}
    for graph in graphs:
        for kind, count in graph.memory.kinds.items():
            kinds[kind] = max(kinds.get(kind, 0), count)
    largest = max(kinds, key=lambda kind: kinds[kind], default="saved")
    return {
        "saved": "use more ranks, activation checkpointing, or a shorter sequence",
        "temporary": "use more ranks, or compute the loss in chunks of tokens",
        "communication": "use comm='ring', which holds the keys of one rank at a time",
        "inputs": "pass shards of the inputs (docs/sharding.md)",
    }.get(largest, "shard the parameters with FSDP2 on the other dimension of a mesh (docs/mesh.md)")


def _improvement(graphs: Sequence[GraphReport], efficiency: float | None) -> str | None:
    """What to try where nothing is wrong."""
    if efficiency is None and any(site.balance is not None for graph in graphs for site in graph.sites):
        return "describe the machine (option 'machine'), so that ways are weighed by time"
    return None


def _efficiency(graphs: Sequence[GraphReport]) -> tuple[float | None, str]:
    """(time of the work if it were even and nothing else took time) over (estimated time of the slowest rank)."""
    ideal = taken = 0.0
    for site in (site for graph in graphs for site in graph.sites):
        chosen = next((way for way in site.ways if way.chosen), None)
        if chosen is not None:
            ideal += len(site.indices) * chosen.parts["compute"] / (site.balance or 1.0)
            taken += len(site.indices) * chosen.seconds
    if not taken:
        return None, "no estimate: no machine is described, by the option 'machine' or as the device has a preset"
    why = (
        "attention alone, forward and backward: the mean rank's compute over all that the slowest rank takes, exposed "
        "transfers, merges, calls and all-to-alls included; layers between attentions are not estimated"
    )
    return min(1.0, ideal / taken), why
