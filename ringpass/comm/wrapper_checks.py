"""Checks DDP and FSDP2 around a compiled model for settings that conflict with its ring.

Gradients are replicated, that is, equal on all ranks of a ring, so a reduction over several of these ranks must
average.  The check is made when a graph is compiled; later changes are not seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch._dynamo.backends.distributed import SubmodCompiler
from torch.distributed._composable_state import _get_module_state, _module_state_mapping
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.nn.parallel import DistributedDataParallel

from ringpass.errors import UnsupportedError
from ringpass.torch_features import fsdp_param_groups

AVERAGING = (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook)


def concerns(pg: dist.ProcessGroup) -> Iterator[str]:
    """Yields a warning for each DDP or FSDP2 setting that is wasteful or not known to be correct.

    Raises UnsupportedError for gradients that FSDP2 does not average over the ranks of the ring `pg`.
    """
    ring = {*dist.get_process_group_ranks(pg)}
    _refuse_sums(ring)
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return
    if _in_a_bucket():
        yield (
            "Dynamo splits this graph at the gradient buckets of DistributedDataParallel, and what passes from piece "
            "to piece is gathered: wrap the compiled model, DistributedDataParallel(torch.compile(model, ..)), or set "
            "torch._dynamo.config.optimize_ddp = False"
        )
    hooks = [hook for hook, _ in wrapper._comm_hooks if hook not in AVERAGING]
    if hooks and len(ring.intersection(dist.get_process_group_ranks(wrapper.process_group))) > 1:
        yield (
            f"DistributedDataParallel reduces gradients over ranks of this ring by {_name(hooks[0])}, and they are "
            "equal there: it must average them. Give it a process_group with one rank of each ring to be sure"
        )


def _refuse_sums(ring: set[int]) -> None:
    """Raises UnsupportedError if FSDP2 sums the gradients of a running module over ranks of the ring."""
    for module in list(_module_state_mapping):
        state: Any = _get_module_state(module)
        running = isinstance(state, FSDPState) and state._training_state == TrainingState.FORWARD
        for group in fsdp_param_groups(state) if running else ():
            ranks, factor = group.mesh_info.mesh.mesh.flatten().tolist(), group.gradient_divide_factor
            if factor not in (None, len(ranks)) and len(ring.intersection(ranks)) > 1:
                raise UnsupportedError(
                    f"FSDP reduces the gradients of {type(module).__name__} over the ranks {ranks}, several of one "
                    f"ring, whose gradients are equal: it must average them, and divides by {factor:g}. Leave "
                    "set_gradient_divide_factor out, or shard over the mesh's other dimensions"
                )


def _in_a_bucket() -> bool:
    """Whether the graph being compiled is one of several into which Dynamo split a graph."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), SubmodCompiler):
            return True
        frame = frame.f_back
    return False


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", hook))
