"""What differs between releases of torch, each difference told by the feature itself, never by a version number.

Every function takes what its callers in the package have at hand and returns the same on every supported torch.
docs/torch_versions.md lists the releases that are tested.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo import config

TESTED_TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
"""The releases that docs/torch_versions.md lists as tested, ascending."""
RECOMPILE_LIMITS = tuple(name for name in ("recompile_limit", "accumulated_recompile_limit") if hasattr(config, name))
"""Dynamo's settings of how many kinds of arguments a function may be compiled for."""


def gather_equal() -> Callable[..., Any]:
    """The collective that gathers equal parts into one tensor: out, in, group=, async_op=.

    Its name is `all_gather_into_tensor` where torch has no `all_gather_single` yet.
    """
    return _collective("all_gather_single", "all_gather_into_tensor")


def flash_implementation() -> str:
    """What runs the ATen op of flash attention: "FA2", torch's own, or the replacement that the user has activated.

    Where torch cannot be asked, nothing else can be activated.
    """
    attention: Any = torch.nn.attention
    if not hasattr(attention, "current_flash_attention_impl"):
        return "FA2"
    return attention.current_flash_attention_impl() or "FA2"


def sum_and_scatter() -> Callable[..., Any]:
    """The collective that adds (P * n,) over P ranks and leaves (n,) of the sum on each: out, in, group=.

    Its name is `reduce_scatter_tensor` where torch has no `reduce_scatter_single` yet.
    """
    return _collective("reduce_scatter_single", "reduce_scatter_tensor")


def _collective(name: str, former: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(dist, name if hasattr(dist, name) else former)
    return found


def fsdp_param_groups(state: Any) -> list[Any]:
    """The groups of parameters that a module's `FSDPState` gathers and reduces together.

    Where FSDP2 has at most one per module, the state holds it, or None, as `_fsdp_param_group`.
    """
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in (state._fsdp_param_group,) if group is not None]


def compiled_callable() -> Any:
    """What the outermost `torch.compile` that this thread is inside of was given; None where that cannot be told.

    Of a module it is a bound method.  Read from the frames of Dynamo's wrapper, whose name is no interface.
    """
    found, frame = None, sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            found = frame.f_locals.get("fn", found)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def compiling_autograd() -> bool:
    """Whether the graph that Dynamo hands a backend now is one of compiled autograd, of a backward."""
    from torch._dynamo import compiled_autograd

    return bool(getattr(compiled_autograd, "in_compiled_autograd_region", False))


def compiling_to_save() -> bool:
    """Whether `aot_compile` compiles now, which writes what a backend returns to a file."""
    from torch._functorch import config as functorch

    return bool(getattr(functorch, "bypass_autograd_cache_key", False))
