"""A stand-in for the package `flash_attn`, on torch's CPU kernel: lets ring-flash-attn's rings run without CUDA.

>>> with installed(): import ring_flash_attn

Shapes as flash_attn has them: (B, L, H, D), lse (B, H, L).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

aten = torch.ops.aten


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse.contiguous(), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, softmax_lse.contiguous(), 0.0, causal, scale=softmax_scale
    )
    for into, value in zip((dq, dk, dv), found, strict=True):
        into.copy_(value.transpose(1, 2))


@contextmanager
def installed() -> Iterator[None]:
    """While ring_flash_attn is imported, `flash_attn` is this module; its Hugging Face adapter is left out."""
    package, interface, adapters = (
        ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface", "ring_flash_attn.adapters")
    )
    parts: dict[str, Any] = {f.__name__: f for f in (_flash_attn_forward, _flash_attn_backward)}
    vars(interface).update(parts, _flash_attn_varlen_forward=None, _flash_attn_varlen_backward=None)
    vars(adapters).update(substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    with patch.dict(sys.modules):
        sys.modules |= {module.__name__: module for module in (package, interface, adapters)}
        yield
        mine = {name: module for name, module in sys.modules.items() if name.startswith("ring_flash_attn")}
    sys.modules.update(mine)
