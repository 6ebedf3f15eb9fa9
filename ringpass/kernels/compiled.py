"""Functions that operators call: compiled by Inductor for any number of kinds of arguments, and run as at top level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch._dynamo import config

from ringpass.torch_features import RECOMPILE_LIMITS

LIMITS: dict[str, Any] = dict.fromkeys(RECOMPILE_LIMITS, 1 << 20)
TOP_LEVEL = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
"""The dispatch keys that are included and excluded where no operator runs."""


@contextmanager
def top_level() -> Iterator[None]:
    """In an operator's body: dispatch as outside of it, without gradients.

    An operator may be called from a dispatch mode (as AOTAutograd does, to check for aliases), where torch leaves out
    the keys that tracing and vmap need.
    """
    with torch._C._ForceDispatchKeyGuard(*TOP_LEVEL), torch.no_grad():
        yield


def compiled(
    function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor", dynamic: bool = False
) -> Callable[..., Any]:
    """`function`, compiled once for each kind of arguments: shapes, strides, dtypes, and values that are no tensors.

    Dynamo's limit is 8 kinds, after which it raises; the steps of a ring come in more.  Shapes and strides are
    constants, so that a kind does not depend on those seen before; `dynamic`: they are symbolic.  Raises torch's error
    where Dynamo cannot trace the function.
    """
    run = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)

    @wraps(function)
    def call(*given: Any) -> Any:
        with top_level(), config.patch(LIMITS):
            return run(*given)

    return call
