"""The machine that a schedule runs on, as data: what computing, a kernel call, memory and transfers cost.

    >>> inner, outer = Dimension(4, 450e9, 8e-6, 20e-6), Dimension(None, 50e9, 15e-6, 35e-6)
    >>> machine = Machine("two levels", ((128, 100e12), (2048, 500e12)), 2.8e12, 1e-5, (inner, outer))
    >>> machine.dimension_between(0, 3), machine.dimension_between(3, 4)
    (0, 1)
    >>> Machine.from_json(machine.to_json()) == machine
    True

It comes from the option `machine` (a `Machine`, a JSON file that `python -m ringpass measure` wrote, or the name of a
preset), or is the preset of the CUDA device.  Nothing is measured when a model is compiled: plans depend on it alone.

Published, in PRESETS of GPUs: bandwidths of memory, of NVLink, and of one network card per GPU (200 Gb/s for A100, else
400), and the dense bfloat16 peak.  Guessed: that 85 % of the memory bandwidth and 56 % of the peak are attained, how
the FLOP/s fall in small tiles, all latencies and the cost of a call.  No GPU was measured.  The preset "cpu" was
measured by `python -m ringpass measure`, three runs with two ranks on two cores, one thread each, beside other work.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from math import gcd, inf
from pathlib import Path
from typing import Any

import numpy as np

from ringpass.errors import OptionError, did_you_mean
from ringpass.files import read_text
from ringpass.masks.constants import Array

MOST_BYTES = 1 << 20  # of a file that describes a machine
MEASURE = "python -m ringpass measure > machine.json"


@dataclass(frozen=True)
class Dimension:
    """A dimension of ranks, such as the GPUs of a node.

    ranks: how many units of the next inner dimension it joins (of the innermost one: ranks); None, in the outermost
        dimension alone: as many as there are.
    bandwidth: bytes/s that a rank receives, while it sends as much.
    p2p_seconds: seconds that a message between two ranks takes beside its bytes.
    collective_seconds: seconds that a collective takes beside its bytes.
    """

    ranks: int | None
    bandwidth: float
    p2p_seconds: float
    collective_seconds: float


@dataclass(frozen=True)
class Machine:
    """What things cost.  Raises OptionError for values that describe no machine.

    name: for people.
    flops: (edge in tokens, FLOP/s) points, edges ascending: what the tile kernel attains on square tiles, without the
        cost of the call; between the points it is interpolated over the logarithm of the edge.
    memory_bandwidth: bytes/s read or written by a kernel that only moves data.
    call_seconds: seconds that a kernel call takes beside its FLOPs and bytes.
    dimensions: those of ranks, the inner one first; rank numbers run fastest over the inner one.
    """

    name: str
    flops: tuple[tuple[int, float], ...]
    memory_bandwidth: float
    call_seconds: float
    dimensions: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        _require(isinstance(self.name, str), "'name' must be a text", self.name)
        points = _pairs(self.flops)
        _require(points is not None, "'flops' must be (edge, FLOP/s) pairs of numbers", self.flops)
        object.__setattr__(self, "flops", points)
        ranks = _listed(self.dimensions)
        fits = ranks is not None and all(isinstance(x, Dimension) for x in ranks)
        _require(fits, "'dimensions' must be a list of ringpass.Dimension", self.dimensions)
        object.__setattr__(self, "dimensions", ranks)
        edges = [edge for edge, _ in self.flops]
        _require(bool(edges) and edges == sorted({*edges}), "'flops' must have ascending edges, at least one", edges)
        for what, value in (
            *((f"'flops' at edge {edge}", rate) for edge, rate in self.flops),
            ("'memory_bandwidth'", self.memory_bandwidth),
            *((f"'bandwidth' of dimension {i}", x.bandwidth) for i, x in enumerate(self.dimensions)),
        ):
            _require(_numbers([value]) and 0 < value < inf, f"{what} must be a number above 0", value)
        _require(0 < min(edges) <= max(edges) < inf, "edges of 'flops' must be above 0", edges)
        for what, value in (
            ("'call_seconds'", self.call_seconds),
            *((f"'p2p_seconds' of dimension {i}", x.p2p_seconds) for i, x in enumerate(self.dimensions)),
            *((f"'collective_seconds' of dimension {i}", x.collective_seconds) for i, x in enumerate(self.dimensions)),
        ):
            _require(_numbers([value]) and 0 <= value < inf, f"{what} must be at least 0 seconds", value)
        sizes = [x.ranks for x in self.dimensions]
        _require(bool(sizes), "'dimensions' must have at least one dimension of ranks", sizes)
        _require(all(n is not None for n in sizes[:-1]), "only the last dimension's 'ranks' may be null", sizes)
        whole = all(n is None or (type(n) is int and n >= 1) for n in sizes)
        _require(whole, "'ranks' of a dimension must be an int of at least 1, or None", sizes)

    @property
    def spans(self) -> tuple[float, ...]:
        """How many neighbouring ranks each dimension, with those inside it, joins."""
        out = [1.0]
        for dimension in self.dimensions:
            out.append(inf if dimension.ranks is None else out[-1] * dimension.ranks)
        return tuple(out[1:])

    def require_ranks(self, world: int) -> None:
        """Raises OptionError if the machine has fewer than `world` ranks."""
        if world > self.spans[-1]:
            raise OptionError(
                f"option 'machine': {self.name!r} describes {self.spans[-1]:.0f} ranks, and the ring has {world}: "
                f"measure it on as many ({MEASURE}), or give its outermost dimension more ranks"
            )

    def rate(self, edge: Array) -> Array:
        """FLOP/s that the tile kernel attains on tiles of these edges."""
        edges, rates = zip(*self.flops, strict=True)
        found: Array = np.interp(np.log2(np.maximum(edge, 1)), np.log2(edges), rates)
        return found

    def dimension_between(self, a: Any, b: Any) -> Any:
        """The innermost dimension, by number, that joins rank `a` and rank `b`; both may be arrays."""
        return sum(((a // span != b // span) * 1 for span in self.spans[:-1]), start=0 * (a + b))

    # --- text -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The description as JSON, as `from_json` reads it."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Machine:
        """The machine that `text` describes.  Raises OptionError, which names `source`, if it describes none."""
        try:
            given = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:  # no JSON, or nested or numbered beyond any limit
            raise _wrong(source, f"expected JSON, got {error}") from error
        _require_fields(cls, given, source)
        points, dimensions = given["flops"], given["dimensions"]
        if not isinstance(points, list) or not all(isinstance(p, list) and _numbers(p) and len(p) == 2 for p in points):
            raise _wrong(source, f"expected 'flops' as a list of [edge, FLOP/s], got {points!r}")
        if not isinstance(dimensions, list):
            raise _wrong(source, f"expected 'dimensions' as a list, got {dimensions!r}")
        for dimension in dimensions:
            _require_fields(Dimension, dimension, source)
        try:
            return cls(
                given["name"],
                tuple((int(edge), float(rate)) for edge, rate in points),
                given["memory_bandwidth"],
                given["call_seconds"],
                tuple(Dimension(**x) for x in dimensions),
            )
        except (OptionError, OverflowError) as error:
            raise _wrong(source, str(error)) from error

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Machine:
        """The machine that a JSON file describes.  Raises OptionError if it cannot be read or describes none."""
        try:
            text = read_text(Path(path), MOST_BYTES)
        except (OSError, TypeError, ValueError) as error:  # InputError is a ValueError
            raise _wrong(str(path), f"the file cannot be read: {error}") from error
        return cls.from_json(text, str(path))

    def __str__(self) -> str:
        sizes = " x ".join("any" if x.ranks is None else str(x.ranks) for x in self.dimensions)
        top, links = self.flops[-1][1] / 1e12, ", ".join(f"{x.bandwidth / 1e9:.4g}" for x in self.dimensions)
        return f"{self.name}: {sizes} ranks, up to {top:.4g} TFLOP/s, {links} GB/s between ranks"


def _require(holds: bool, what: str, value: object) -> None:
    if not holds:
        raise OptionError(f"a machine's {what}, got {value!r}")


def _wrong(source: str, what: str) -> OptionError:
    return OptionError(f"option 'machine': {source} describes no machine: {what}. Write it anew with {MEASURE}")


def _require_fields(of: type, given: object, source: str) -> None:
    """Raises OptionError unless `given` is a dict of exactly the fields of a dataclass, with values of their kinds."""
    expected = [f.name for f in fields(of)]
    if not isinstance(given, Mapping) or {*given} != {*expected}:
        got = sorted(given) if isinstance(given, Mapping) else given
        raise _wrong(source, f"expected an object with {', '.join(expected)}, got {got!r}")
    for name, value in given.items():
        kind = "a text" if name == "name" else "a number"
        fits = isinstance(value, str) if name == "name" else name in ("flops", "dimensions") or _numbers([value])
        if name == "ranks":
            kind, fits = "a whole number or null", value is None or type(value) is int
        if not fits:
            raise _wrong(source, f"expected {name!r} as {kind}, got {value!r}")


def _listed(values: object) -> tuple[Any, ...] | None:
    """The elements of a list or tuple; None for anything else."""
    return tuple(values) if isinstance(values, list | tuple) else None


def _pairs(values: object) -> tuple[tuple[Any, ...], ...] | None:
    """The elements of a list of pairs of numbers; None for anything else."""
    found = [_listed(x) for x in _listed(values) or ()]
    pairs = tuple(x for x in found if x is not None and len(x) == 2 and _numbers(x))
    return pairs if isinstance(values, list | tuple) and len(pairs) == len(found) else None


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)


# --- presets ----------------------------------------------------------------------------------------------------------


def _gpu(name: str, peak: float, memory: float, link: float, network: float) -> Machine:
    """peak: dense bfloat16 FLOP/s; memory, link, network: published bytes/s, links and network in one direction."""
    attained = 0.556 * peak
    points = ((64, 0.05), (128, 0.15), (256, 0.35), (512, 0.6), (1024, 0.8), (2048, 0.92), (4096, 1.0))
    node, between = Dimension(8, link, 8e-6, 20e-6), Dimension(None, network, 15e-6, 35e-6)
    flops = tuple((edge, part * attained) for edge, part in points)
    return Machine(name, flops, 0.85 * memory, 1e-5, (node, between))


PRESETS: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("A100", 312e12, 2.039e12, 300e9, 25e9),
        _gpu("H100", 989e12, 3.35e12, 450e9, 50e9),
        _gpu("H200", 989e12, 4.8e12, 450e9, 50e9),
        _gpu("B200", 2250e12, 8.0e12, 900e9, 50e9),
        Machine(
            "cpu",
            ((64, 68e9), (128, 73e9), (256, 78e9), (512, 76e9)),
            9.4e9,
            2.4e-5,
            (Dimension(None, 1.1e9, 1e-4, 9.5e-5),),
        ),
    )
}
"""Machines by name.  The GPUs are those with NVLink, eight to a node unless `on_nodes_of` says otherwise."""

UNDESCRIBED = Machine("undescribed", ((1, 1.0),), 1.0, 0.0, (Dimension(None, 1.0, 0.0, 0.0),))
"""In the place of a machine that nobody described: layouts are weighed without it, degrees and all-gather are not."""


def on_nodes_of(machine: Machine, ranks: int) -> Machine:
    """A preset of several dimensions whose nodes hold `ranks` neighbouring ranks."""
    inner, *outer = machine.dimensions
    return replace(machine, dimensions=(replace(inner, ranks=ranks), *outer)) if outer else machine


def preset_of_device(name: str) -> Machine | None:
    """The preset of a CUDA device by its name; None for others, such as cards without NVLink.

    >>> preset_of_device("NVIDIA H100 80GB HBM3").name, preset_of_device("NVIDIA H100 PCIe")
    ('H100', None)
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & {"PCIE", "NVL"}:
        return None
    return next((machine for model, machine in PRESETS.items() if model in words), None)


def ranks_on_node(ranks: Sequence[int], local: int) -> int:
    """How many neighbours of a ring surely share a node: of the global `ranks`, each `local` of which are on one.

    >>> ranks_on_node(range(16), 8), ranks_on_node(range(0, 16, 2), 8), ranks_on_node([0, 8, 16], 8)
    (8, 4, 1)
    """
    return gcd(*(len([*run]) for _, run in groupby(rank // local for rank in ranks)))


def machine_of(text: str) -> tuple[Machine, bool]:
    """The machine that a text names, and whether it is a preset; else the text is the path of a JSON file.

    Raises OptionError if it is neither.
    """
    names = {name.lower(): machine for name, machine in PRESETS.items()}
    if text.lower() in names:
        return names[text.lower()], True
    if not os.path.isfile(text):  # which is False for a path that no file can have
        raise OptionError(
            f"option 'machine' must be one of {', '.join(map(repr, PRESETS))}, the path of a JSON file, or a "
            f"ringpass.Machine, got {text!r}{did_you_mean(text.upper(), PRESETS)}: there is no such file; "
            f"{MEASURE} writes one"
        )
    return Machine.from_file(text), False
