"""run: the public function `ringpass.explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ringpass.errors import OptionError
from ringpass.explain.request import Request

if TYPE_CHECKING:
    from ringpass.explain.report import Report

MOST_RANKS = 4096


def explain(
    model: Any,
    *args: Any,
    world_size: int,
    rank: int = 0,
    options: Mapping[str, Any] | None = None,
    machine: Any = None,
    device: str | int | None = None,
    train: bool | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(model, backend="ring_dilated")` makes of a call on `world_size` ranks, without running it.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    >>> report = explain(layer, torch.empty(1, 512, 32), world_size=8)
    >>> report.graphs[0].axes[0].tokens, report.graphs[0].sites[0].heads
    (512, [4, 4])

    No process group, no GPU, no memory for the model: parameters and inputs are seen as fake tensors, so they may be
    made under `torch.device("meta")`; they are then seen on the default device, or on that of `device`.

    `args`, `kwargs`: those of the call.  `world_size`: P, up to 4,096; `rank`: the one whose program and memory are
    shown.  `options`: those of `RingConfig`; `machine`: the option `machine`.  `device`: what a rank has, a name of
    `ringpass.explain.verdict.DEVICES`, an amount such as "24 GiB", or bytes: the report then says whether the peak
    fits, and the longest sequence that would.  A name also stands for its preset of a machine, if there is one.
    `train`: True or False: the mode of the model, with or without gradients; None: as they are.

    Dynamo's cache is emptied: what this process has compiled is compiled again at its next call.

    Raises OptionError and UnsupportedError as the backend would, and UnsupportedError where the model reads data
    between compiled graphs.
    """
    return explain_call(Request(model, args, kwargs, world_size, rank, dict(options or {}), machine, device, train))


def explain_call(request: Request) -> Report:
    """`explain` of a call whose arguments may have any names, those of `explain` too."""
    world, rank = request.world, request.rank
    if not isinstance(world, int) or isinstance(world, bool) or not 1 <= world <= MOST_RANKS:
        raise OptionError(f"world_size must be a number of ranks from 1 to {MOST_RANKS}, got {world!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < world:
        raise OptionError(f"rank must be from 0 to {world - 1}, one of {world} ranks, got {rank!r}")
    from ringpass.explain.making import make

    return make(request)
