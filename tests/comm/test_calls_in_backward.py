"""A call within a backward, as a checkpoint makes it, is no failure, and a failure after it still is one."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringpass.comm.ring import ring_of
from ringpass.kernels import table as kernels
from tests.support.failure_cases import out_of_memory
from tests.support.model_parity import compiled, relative
from tests.support.models import WIDTH, Block
from tests.support.process_ranks import Workers


def checkpointed(group: dist.ProcessGroup) -> tuple[list[int], float]:
    """How often the ranks had met after failures: at first, after two steps, after one that failed; the last error."""
    model, x = Block(causal=True).double(), torch.randn(2, 23, WIDTH, dtype=torch.float64, requires_grad=True)
    run, ring = compiled(model, group), ring_of(group)

    def step(call: object) -> Tensor:
        y: Tensor = checkpoint(call, x, use_reentrant=False)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        return found

    met = [ring.epoch]
    for _ in range(2):
        step(run)
    met.append(ring.epoch)
    with patch.object(kernels, "backward", lambda *_, **__: out_of_memory()), suppress(torch.OutOfMemoryError):
        step(run)
    error = relative(step(run), step(model))
    return [*met, ring.epoch], error


def test_a_checkpoint_is_no_failure(workers: Workers) -> None:
    for (before, after, failed), error in workers.run(checkpointed, 3):
        assert before == after == failed - 1
        assert error < 1e-10
