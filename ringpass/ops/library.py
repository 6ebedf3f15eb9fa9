"""The torch.library namespace `ringpass`, and how its operators are registered."""

from __future__ import annotations

from typing import Any

import torch

LIBRARY = torch.library.Library("ringpass", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)


def define(schema: str) -> None:
    """Declares an operator."""
    LIBRARY.define(schema, tags=TAGS)


def implement(name: str, body: Any, fake: Any) -> None:
    """Gives an operator its body, and the one that only knows shapes."""
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringpass::{name}", fake, lib=LIBRARY)


def differentiate(name: str, backward: Any, setup: Any) -> None:
    """Gives an operator its autograd formula."""
    torch.library.register_autograd(f"ringpass::{name}", backward, setup_context=setup, lib=LIBRARY)
