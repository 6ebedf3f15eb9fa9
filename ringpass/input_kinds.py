"""The kinds of tensors that a compiled model takes: plain ones, Parameters, and outputs of compiled models.

A subclass of Tensor that only adds methods or `__torch_function__` holds what a plain tensor holds, and is passed on as
one: Dynamo has traced what the class does, and gives outputs its type.  A wrapper (`__torch_dispatch__` around other
tensors, as DTensor) has no rows of its own that ranks could split, compare or send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ringpass.errors import InputError
from ringpass.lazy import LazyOutput

PLAIN = Tensor, Parameter


def plain(x: Any) -> Any:
    """`x`, or the same values as a plain tensor, if its class only adds to Tensor."""
    if type(x) in PLAIN or not isinstance(x, Tensor) or isinstance(x, Parameter):
        return x
    return x.as_subclass(Tensor) if type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ else x


def refuse_wrappers(names: Sequence[str], inputs: Sequence[Any]) -> None:
    """Raises InputError if an input or a weight is a wrapper; `names`: those of the inputs of a graph."""
    for name, x in zip(names, inputs, strict=True):
        if is_traceable_wrapper_subclass(x) and not isinstance(x, LazyOutput):
            kind = type(x).__name__
            raise InputError(
                f"{name} is a {kind}, which wraps other tensors: expected a plain tensor, whose tokens ranks can "
                f"split and compare. {_instead(kind)}"
            )


def _instead(kind: str) -> str:
    if kind == "DTensor":
        return "Pass x.full_tensor(), or, if it is sharded over the ring, ringpass.sharded(x)"
    return "Unwrap it before the model, or keep the part of the model that reads it outside torch.compile"
