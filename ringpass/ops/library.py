"""The torch.library namespace `ringpass`, and how its operators are registered."""

from __future__ import annotations

from typing import Any

import torch

LIBRARY = torch.library.Library("ringpass", "DEF")
SHARD = "int dim, SymInt outer, SymInt tokens, str layout, int world, int rank"
"""Arguments that locate the sequence in a tensor: the fields of `collectives.Shard`."""
TAGS = (torch.Tag.pt2_compliant_tag,)


def define(schema: str) -> None:
    """Declares an operator."""
    LIBRARY.define(schema, tags=TAGS)


def implement(name: str, body: Any, fake: Any) -> None:
    """Registers an operator's body and its fake, which computes shapes only."""
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringpass::{name}", fake, lib=LIBRARY)


def differentiate(name: str, backward: Any, setup: Any) -> None:
    """Registers an operator's autograd formula."""
    torch.library.register_autograd(f"ringpass::{name}", backward, setup_context=setup, lib=LIBRARY)


def save_arguments(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps all arguments but the first, a tensor, for the autograd formula."""
    ctx.arguments = inputs[1:]


def unchanged(ctx: Any) -> tuple[None, ...]:
    """The gradients of the arguments that `save_arguments` keeps: none."""
    return (None,) * len(ctx.arguments)
