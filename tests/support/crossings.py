"""Where a call goes from the device to the host or back: each is a stop of the host, or a copy, on a GPU.

>>> with crossings() as found:                        # on a CPU, where all of them are free
...     int(torch.tensor([1, 2]).nonzero().sum())
2
>>> found                                             # doctest: +SKIP
Counter({('aten::nonzero', ''): 1, ('__int__', 'my_file.py:my_function'): 1, ('tensor', 'my_file.py:my_function'): 1})
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

READS = ("cpu", "numpy", "tolist", "item", "__int__", "__float__", "__bool__", "__index__")
"""Methods that bring a tensor, or its value, to the host."""
WRITES = ("tensor", "from_numpy", "as_tensor")
"""Functions that make a tensor of what the host holds: a copy, where it is then used on a GPU."""
SIZED_BY_DATA = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave.Tensor")
"""Ops whose result has a size that the host must ask the device for; `aten::nonzero` is in every boolean index."""
Crossings = Counter[tuple[str, str]]
"""How often, by (what, where: file:function)."""


@contextmanager
def crossings() -> Iterator[Crossings]:
    """Counts the crossings of this thread's Python code inside, and ops sized by data of all threads."""
    found: Crossings = Counter()
    with ExitStack() as stack:
        for owner, names in ((Tensor, READS), (torch, WRITES)):
            for name in names:
                stack.enter_context(patch.object(owner, name, _counted(getattr(owner, name), name, found)))
        stack.enter_context(patch.object(Tensor, "to", _counted_to(Tensor.to, found)))
        record = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        yield found
        stack.close()
        found.update((event.name, "") for event in record.events() or () if event.name in SIZED_BY_DATA)


def _where() -> str:
    frame = sys._getframe(2)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def _counted(function: Callable[..., Any], name: str, found: Crossings) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        found[name, _where()] += 1
        return function(*args, **kwargs)

    return call


def _counted_to(function: Callable[..., Any], found: Crossings) -> Callable[..., Any]:
    """`to`, counted where it names the host."""

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = [*args[:1], kwargs.get("device")]
        if any(str(x) == "cpu" for x in named if isinstance(x, str | torch.device)):
            found["to", _where()] += 1
        return function(self, *args, **kwargs)

    return call
