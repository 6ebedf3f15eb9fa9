"""The torch.library namespace `ringpass`, and how its operators are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

LIBRARY = torch.library.Library("ringpass", "DEF")
SHARD = "int dim, SymInt outer, SymInt tokens, str layout, int world, int rank"
"""Arguments that locate the sequence in a tensor: the fields of `collectives.Shard`."""
UNLABELLED = "ringpass"
LABELLED = f"*, str label='{UNLABELLED}'"
"""The last argument of tiles: what profilers call their ranges (`ringpass.profiling`).

Ops that talk to ranks have it before their group, which is last: there Inductor reads it.
"""
TAGS = (torch.Tag.pt2_compliant_tag,)
BODIES: dict[str, Callable[..., Any]] = {}
"""The body of each implemented operator, by name."""


class Context(Protocol):
    """The context of an autograd formula, as `save_arguments` leaves it."""

    arguments: tuple[Any, ...]


def define(schema: str) -> None:
    """Declares the operator of the given schema, `name(arguments) -> result`."""
    LIBRARY.define(schema, tags=TAGS)


def implement(name: str, body: Callable[..., object], fake: Callable[..., object]) -> None:
    """Registers an operator's body, for all devices, and its fake, which computes shapes and dtypes only."""
    BODIES[name] = body
    LIBRARY.impl(name, lambda *args, **named: _whole(body(*args, **named)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringpass::{name}", fake, lib=LIBRARY)


def _whole(found: Any) -> Any:
    """Results that are views, as tensors of their own on the same memory.

    The compiler may write its next result into one and return that, and autograd lets no caller write to a view.
    """
    if isinstance(found, Tensor):
        return found.data if found._is_view() else found
    return [_whole(x) for x in found] if isinstance(found, list | tuple) else found


def storage_key(x: Tensor) -> int:
    """What views of one storage share, for as long as it lives: by it a start finds what its wait ends."""
    return int(x.untyped_storage()._cdata)


def differentiate(name: str, backward: Callable[..., object], setup: Callable[..., None]) -> None:
    """Registers an operator's autograd formula.

    `setup(ctx, inputs, output)` saves what `backward(ctx, *grads)` needs to compute the gradients of the inputs.
    """
    torch.library.register_autograd(f"ringpass::{name}", backward, setup_context=setup, lib=LIBRARY)


def save_arguments(ctx: Context, inputs: tuple[Any, ...], output: object) -> None:
    """Saves all arguments but the first, which is a tensor, for the autograd formula."""
    ctx.arguments = inputs[1:]


def unchanged(ctx: Context) -> tuple[None, ...]:
    """The gradients of the arguments that `save_arguments` saves: None for each."""
    return (None,) * len(ctx.arguments)
