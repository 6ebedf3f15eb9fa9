"""The options of the backend: validated when a model is compiled; none is ignored.

>>> RingConfig.from_options({"layout": "zigzag"}).layout
'zigzag'
>>> RingConfig.from_options({"layot": "zigzag"})
Traceback (most recent call last):
ringpass.errors.OptionError: unknown option 'layot' (did you mean 'layout'?). Known options: ...
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringpass.comm.ring import group_of
from ringpass.errors import OptionError, did_you_mean
from ringpass.layouts import layout as layouts
from ringpass.ops.transports.table import TRANSPORTS
from ringpass.option_checks import (
    LONGEST_WAIT,
    one_of,
    path_of,
    require,
    require_inductor,
    require_number,
    require_selectors,
)
from ringpass.patterns import MOST, Pattern, everything
from ringpass.schedule.block_selection import TopBlocks
from ringpass.schedule.dilation import AUTO, BUDGET, OFFSETS, PRESETS, Dilation, preset
from ringpass.schedule.machine import Machine, machine_of, on_nodes_of, ranks_on_node
from ringpass.schedule.run_time_proof import ALL, SAMPLE
from ringpass.shards import OUTPUTS

DUMP_VARIABLE = "RINGPASS_DUMP"
NOT_ASKED = ("group", "explain", "inductor", "timeout", "compare_weights")
"""The options that change nothing of what is computed, or are Inductor's."""
MACHINES = "a Machine, the path of a JSON file or the name of a preset, or None"


@dataclass(frozen=True)
class RingConfig:
    """Options of `torch.compile(model, backend="ring_dilated", options={...})`.

    >>> RingConfig(comm="allgather", tile=512).asked
    True

    Raises OptionError for an invalid value, or for options that contradict each other.

    layout: token -> rank map: "auto" (the one with the smallest estimated time), "contiguous", "zigzag" or "striped".
    mask: a `ringpass.patterns.Pattern`, ANDed with each attention's own mask: which keys a query may attend to.
    approximate: `ringpass.top_blocks(..)`: attend only to the most promising blocks of keys, chosen in each call.
        None: attend to all.  The only option whose result depends on an estimate.
    hilbert: (H, W) or (T, H, W): the tokens of this grid are sharded and tiled in the order of a Hilbert curve, so that
        tokens that are near on the grid are near in the sequence.  The results are the same; masks that are windows on
        the grid fall into fewer tiles.
    hilbert_prefix: number of tokens (CLS, registers, text) before the grid, which stay in front; None: inferred.
    along_curve: True: `mask`, dilation and the blocks of `approximate` count positions along the curve, not tokens;
        the model's own mask still counts tokens.  This changes the result.
    segment_lengths, dilation_rates: LongNet's dilated attention: for each of its patterns, the length of a segment in
        tokens and the rate r: in each segment, every r-th query attends to every r-th key.  This changes the result of
        attentions whose queries and keys are one sequence, and of no others.  See `ringpass.schedule.dilation`.
    dilation: both lists by name: "longnet", "longvit" or "gigapath", the published ones for the length of the sequence;
        "auto", lists in which lengths and rates double; or a `ringpass.Dilation`.
    dilation_budget: the largest fraction of all (query, key) pairs that "auto" may compute, above 0 and at most 1.
    head_offset: the token of each segment at which a head begins.  "mod": head number mod r; "block": the heads form r
        groups of neighbours, and group i begins at token i.
    dilate: which attentions are dilated.  None: all; a list of indices in graph order, of module paths such as
        "layers.*.attn", or of functions of a `ringpass.passes.detect.site.AttentionSite`; or a dict from these to a
        `ringpass.Dilation`, a name, or None.
    runtime_pruning: True: padding masks and document ids that come with a call and are replicated prune the tiles and
        transfers of that call.  Such attentions stay one node each, and what prunes them is copied to the host, once in
        a call.
    prove: which schedules that are made in a call (`runtime_pruning`, `approximate`, block lists, symbolic lengths) are
        proved before it sends anything: "sample" (default), those of an attention's first 4 calls and of each 256th
        after; "all".  Schedules that are made when the graph is compiled are always proved.
    ulysses_degree: how many neighbouring ranks divide the heads of an attention among them, each with the tokens of all
        of them; between such groups K and V go round a ring.  1: a ring over all ranks; P: no ring.  It divides P and
        is at most the number of heads.  "auto" (default): the one of least estimated time for each attention where a
        machine is described, by `machine` or since the device has a preset; else 1.  A number or "auto" for all
        attentions, or a dict from selectors, as those of `dilate`, to these; others are rings.  See
        `ringpass.schedule.head_shares`.
    comm: "ring": K and V go from rank to rank while tiles are computed; "allgather": every rank gathers all of them
        beside its local tiles (O(S) memory); "auto" (default): the one of less estimated time for each attention where
        a machine is described, all-gather only among ranks of its inner dimension and up to 500 MB of K and V; else
        a ring.
    machine: what computing and transfers cost: a `ringpass.Machine`, the path of a JSON file that
        `python -m ringpass measure` wrote, or the name of a preset ("H100", "cpu", ..); None: the preset of the CUDA
        device, if it has one.  See `ringpass.schedule.machine`.
    compiler: "inductor" (default), or "aot_eager": the partitioned graphs run without code generation.
    strict: True: raise UnsupportedError, with the line of the model, for anything but an output that would be gathered;
        False: gather it with a warning.
    outputs: "lazy" (default): outputs of global shape that gather on first use; "gathered": gathered in the graph;
        "local": plain tensors of this rank's tokens (`ringpass.tokens_of`); "dtensor": DTensors over the ring's mesh.
    tile: edge in tokens, at least 1, of the tiles on which a mask is evaluated; None: chosen for each attention, 1024,
        or less if its mask is narrow.
    unroll_limit: each send, receive, wait, tile and merge is a node of the compiled graph if all attentions together
        have at most this many steps (an attention counts the larger of P and its number of tiles); otherwise, and for
        symbolic lengths, each attention is one node that runs the same code.  0: always one node.
    timeout: seconds, from 0.001 to a year, that ranks wait for each other at the checks before a call and when outputs
        are gathered.  Differences in compile time count.
    compare_weights: ranks compare all weights in a graph's first call, and from then on each weight in one of this many
        calls, by turns, so that weights that drift apart are found within so many; 0: in the first call alone.
    explain: path of a file that ends in .html, .json or .txt, to which rank 0 writes a report of the compiled graphs
        (`ringpass.explain`); each graph writes it anew, with those before.
    dump: directory, a text or `os.PathLike`, for the graphs, sites, plan and schedule of each rank; else the
        environment variable RINGPASS_DUMP.
    group: the ring's process group, or a dimension of a DeviceMesh such as mesh["ring"], or a mesh of two dimensions
        with all their ranks as one ring, of which the inner one bounds the degree that `ulysses_degree="auto"` takes;
        the default group if None.
    inductor: options passed on to Inductor as they are.
    """

    layout: str = "auto"
    mask: Pattern = field(default_factory=everything)
    approximate: TopBlocks | None = None
    hilbert: tuple[int, ...] | None = None
    hilbert_prefix: int | None = None
    along_curve: bool = False
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    dilation: str | Dilation | None = None
    dilation_budget: float = BUDGET
    head_offset: str = "mod"
    dilate: Any = None
    runtime_pruning: bool = False
    prove: str = SAMPLE
    ulysses_degree: Any = AUTO
    comm: str = AUTO
    machine: Machine | str | os.PathLike[str] | None = None
    compiler: str = "inductor"
    strict: bool = False
    outputs: str = "lazy"
    tile: int | None = None
    unroll_limit: int = 256
    timeout: float = 300.0
    compare_weights: int = 100
    explain: Any = None
    dump: Any = None
    group: Any = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("auto", *layouts.OPTIONS))
        require("mask", self.mask, isinstance(self.mask, Pattern), "a Pattern of ringpass.patterns, such as causal()")
        chosen = self.approximate is None or isinstance(self.approximate, TopBlocks)
        require("approximate", self.approximate, chosen, "ringpass.top_blocks(..) or None")
        one_of("comm", self.comm, (AUTO, *TRANSPORTS))
        self._check_dilation()
        self._check_degree()
        self._check_curve()
        require("runtime_pruning", self.runtime_pruning, isinstance(self.runtime_pruning, bool), "True or False")
        one_of("prove", self.prove, (SAMPLE, ALL))
        one_of("compiler", self.compiler, ("inductor", "aot_eager"))
        one_of("outputs", self.outputs, tuple(OUTPUTS))
        require("strict", self.strict, isinstance(self.strict, bool), "True or False")
        edge = self.tile is None or (type(self.tile) is int and 1 <= self.tile < MOST)
        require("tile", self.tile, edge, "an int of at least 1 and below 2**40, or None")
        for name in ("unroll_limit", "compare_weights"):
            natural = type(getattr(self, name)) is int and getattr(self, name) >= 0
            require(name, getattr(self, name), natural, "an int of at least 0")
        limits = f"a number of seconds above 0, from 0.001 to {LONGEST_WAIT}, a year"
        require_number("timeout", self.timeout, 0.001, LONGEST_WAIT, limits)
        for name, what in (("explain", "the path of a file, or None"), ("dump", "the path of a directory, or None")):
            object.__setattr__(self, name, path_of(name, getattr(self, name), what))
        group_of(self.group)
        self._check_machine()
        require("inductor", self.inductor, isinstance(self.inductor, Mapping), "a dict of Inductor's options")
        if self.compiler == "aot_eager" and self.inductor:
            raise OptionError(
                "the option 'inductor' says how to generate code, and compiler='aot_eager' generates none: drop one"
            )
        require_inductor(self.inductor)

    def _check_degree(self) -> None:
        wanted, what = self.ulysses_degree, f"{AUTO!r}, an int of at least 1, or a dict from attentions to these"
        if isinstance(wanted, dict):
            require("ulysses_degree", wanted, bool(wanted), f"{what}; an empty one acts on nothing")
            require_selectors("ulysses_degree", wanted)
        for degree in wanted.values() if isinstance(wanted, dict) else (wanted,):
            fits = degree == AUTO if isinstance(degree, str) else type(degree) is int and degree >= 1
            require("ulysses_degree", wanted, fits, what)

    def _check_machine(self) -> None:
        given = self.machine if isinstance(self.machine, Machine) else path_of("machine", self.machine, MACHINES)
        if isinstance(given, str):
            found, is_preset = machine_of(given)
            object.__setattr__(self, "machine", self.on_nodes(found) if is_preset else found)

    def on_nodes(self, preset: Machine) -> Machine:
        """A preset whose nodes hold as many neighbouring ranks of the ring as torchrun says (LOCAL_WORLD_SIZE)."""
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not local.isdecimal() or not dist.is_initialized():
            return preset
        return on_nodes_of(preset, ranks_on_node(dist.get_process_group_ranks(self.ring), int(local)))

    @property
    def inner_ranks(self) -> int | None:
        """The ranks of the inner dimension, if `group` is a mesh of two."""
        return self.group.size(1) if isinstance(self.group, DeviceMesh) and self.group.ndim == 2 else None

    def _check_dilation(self) -> None:
        lists = {name: getattr(self, name) for name in ("segment_lengths", "dilation_rates")}
        for name, value in lists.items():
            require(name, value, value is None or isinstance(value, tuple | list), "a list of ints of at least 1")
            object.__setattr__(self, name, None if value is None else tuple(value))
        one_of("head_offset", self.head_offset, OFFSETS)
        what = "a list of attentions, or a dict from attentions to dilations"
        require("dilate", self.dilate, self.dilate is None or isinstance(self.dilate, list | tuple | dict), what)
        given = [name for name, value in lists.items() if value is not None]
        if len(given) == 1:
            missing = next(name for name in lists if name not in given)
            raise OptionError(f"option {given[0]!r} needs {missing!r} beside it: each pattern has one of both")
        if given and self.dilation is not None:
            raise OptionError("options 'dilation' and 'segment_lengths' both say how to dilate: drop one")
        require_number("dilation_budget", self.dilation_budget, 5e-324, 1, "a number above 0, at most 1")
        known = f"one of {', '.join(map(repr, [*PRESETS, AUTO]))}, or a Dilation"
        for name, wanted in (("dilation", self.dilation), *(("dilate", x) for x in self._by_site.values())):
            require(name, wanted, wanted is None or isinstance(wanted, str | Dilation), known)
            self.dilation_of(wanted, tokens=2**20)
        self._check_dilated()
        dilates = self.comm == AUTO or TRANSPORTS[self.comm].dilated is not None
        for name, fits in (("approximate", self.approximate is None), ("comm", dilates)):
            if self.dilated and not fits:
                raise OptionError(f"dilation does not go with the option {name!r} ({getattr(self, name)}): drop one")
        if self.dilated and self.hilbert is not None and not self.along_curve:
            raise OptionError(
                "hilbert puts tokens in another order, and segments would be scattered over it: set along_curve=True "
                "to dilate along the curve, or drop one of both"
            )

    @property
    def _by_site(self) -> dict[Any, str | Dilation | None]:
        """What `dilate` says of each attention, if it is a dict."""
        return self.dilate if isinstance(self.dilate, dict) else {}

    def _check_dilated(self) -> None:
        """Refuses options about dilation that would act on nothing."""
        require_selectors("dilate", self.dilate or ())
        if self.dilate is not None and not self.dilate:
            raise OptionError(f"option 'dilate' {self.dilate!r} lists no attention to dilate: list some, or drop it")
        if self.dilate is not None and not self.dilated:
            raise OptionError("option 'dilate' lists attentions, and no option says how to dilate them: add 'dilation'")
        if self._by_site and (self.dilation is not None or self.segment_lengths is not None):
            raise OptionError(
                "option 'dilate' is a dict that says how to dilate each attention, and the others are exact, so that "
                "'dilation' or 'segment_lengths' beside it would act on nothing: drop one, or make 'dilate' a list"
            )
        names = [x for x in (self.dilation, *self._by_site.values()) if isinstance(x, str)]
        if self.dilation_budget != BUDGET and AUTO not in names:
            raise OptionError("option 'dilation_budget' is about dilation='auto' alone, which is not given: drop one")
        if self.head_offset != OFFSETS[0] and not names and self.segment_lengths is None:
            raise OptionError(
                "option 'head_offset' is about dilations by name or by 'segment_lengths', and none is given; a "
                "ringpass.Dilation has its own: Dilation(.., head_offset='block')"
            )

    def dilation_of(self, wanted: str | Dilation | None, tokens: int) -> Dilation | None:
        """The dilation that a value of an option stands for, for a sequence of `tokens` tokens.

        `wanted` None: that of `segment_lengths` and `dilation_rates`; None if they are not given.
        Raises OptionError for an unknown name, or if "auto" cannot meet `dilation_budget`.
        """
        if isinstance(wanted, str):
            return preset(wanted, tokens, self.head_offset, self.dilation_budget)
        if wanted is None and self.segment_lengths is not None and self.dilation_rates is not None:
            return Dilation(self.segment_lengths, self.dilation_rates, self.head_offset)
        return wanted

    @property
    def dilated(self) -> bool:
        """Whether some option dilates some attention."""
        by_site = any(value is not None for value in self._by_site.values())
        return self.segment_lengths is not None or self.dilation is not None or by_site

    def _check_curve(self) -> None:
        grid, prefix = self.hilbert, self.hilbert_prefix
        sizes = grid if isinstance(grid, tuple | list) else (grid,)
        if grid is not None and all(type(n) is int for n in sizes) and len(sizes) == 1:
            raise OptionError(
                f"option 'hilbert' must be a grid (H, W) or (T, H, W), got {grid!r}: in a sequence of one dimension no "
                "neighbours are far apart, and folded into a square it measures worse, not better: drop the option"
            )
        fits = grid is None or (len(sizes) in (2, 3) and all(type(n) is int and n >= 1 for n in sizes))
        require("hilbert", grid, fits, "a grid (H, W) or (T, H, W) of ints of at least 1, or None")
        if grid is not None:
            object.__setattr__(self, "hilbert", tuple(sizes))
        natural = prefix is None or (type(prefix) is int and prefix >= 0)
        require("hilbert_prefix", prefix, natural, "an int of at least 0, or None")
        require("along_curve", self.along_curve, isinstance(self.along_curve, bool), "True or False")
        for name in ("hilbert_prefix", "along_curve"):
            if grid is None and getattr(self, name) not in (None, False):
                raise OptionError(f"the option {name!r} is about the curve of the option 'hilbert', which is not given")
        if self.along_curve and not self.altering:
            raise OptionError(
                "along_curve=True says how the patterns of other options count positions, and none is given: add one "
                f"of {', '.join(map(repr, self._altering()))}, or drop it"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> RingConfig:
        """The config of a dict of options, as torch.compile passes it; None: the defaults.

        Raises OptionError for an unknown name, with the nearest known one, or an invalid value.
        """
        options = options or {}
        if not isinstance(options, Mapping):
            raise OptionError(f"options must be a dict of ring_dilated's options, got {type(options).__name__}")
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{_hint(name, known)}. Known options: {', '.join(known)}.")
        return cls(**options)

    @property
    def ring(self) -> dist.ProcessGroup | None:
        """The process group of the ring; None: the default one."""
        return group_of(self.group)

    @property
    def asked(self) -> bool:
        """Whether any option but those of NOT_ASKED differs from its default."""
        return any(
            getattr(self, f.name) != (f.default if f.default_factory is MISSING else f.default_factory())
            for f in fields(self)
            if f.name not in NOT_ASKED
        )

    @property
    def altering(self) -> dict[str, object]:
        """The options, with their values, that are set and change what attention computes."""
        return {name: value for name, value in self._altering().items() if value not in (everything(), None)}

    def _altering(self) -> dict[str, object]:
        dilation = self.dilation or self.segment_lengths or self.dilate
        return {"mask": self.mask, "approximate": self.approximate, "dilation": dilation if self.dilated else None}

    @property
    def gathered(self) -> bool:
        """Whether outputs are gathered in the compiled graph."""
        return OUTPUTS[self.outputs] is None

    @property
    def dump_directory(self) -> str | None:
        """Where a run writes its dump: the option `dump`, or else what RINGPASS_DUMP names."""
        return self.dump or os.environ.get(DUMP_VARIABLE) or None

    def fingerprint(self) -> str:
        """The options that all ranks must share, as text."""
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name
            not in ("group", "dump", "explain", "timeout", "dilate", "ulysses_degree")  # selectors: see the plan
        )


def _hint(name: object, known: list[str]) -> str:
    """Where an unknown option belongs, or the nearest one that there is."""
    import torch._inductor

    if name in torch._inductor.list_options():
        return f": it is Inductor's, pass it as options={{'inductor': {{{name!r}: ..}}}}"
    return did_you_mean(name, known, cutoff=0.4)
