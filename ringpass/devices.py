"""The device that a call runs on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def device_of(values: Iterable[object]) -> torch.device:
    """The device of the first CUDA tensor among `values`, else the CPU.

    >>> device_of([3, torch.zeros(2)])
    device(type='cpu')
    """
    devices = (x.device for x in values if isinstance(x, Tensor))
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
