"""Gradients of parameters on gloo ranks: in small buckets exact, and equal on all ranks where each computes its own."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ringpass.passes.partition import writer
from tests.support.marks import slow
from tests.support.model_parity import compiled, parity, relative, worst
from tests.support.models import MODELS, VOCAB, WIDTH, Block, batch_for, loss_of
from tests.support.process_ranks import Workers

SMALL = 3_000  # bytes of a bucket


class Mixed(nn.Module):
    """Parameters that are tied, frozen, detached, unused, used replicated and sharded; one block is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(3))
        self.shared, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks[1].requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) * self.shared.weight.detach().mean()
        x = self.blocks[1](self.shared(self.blocks[0](x)))
        x = checkpoint(self.blocks[2], x, use_reentrant=False)
        pooled = self.shared(x.mean(1))
        loss: Tensor = F.linear(x, self.tokens.weight).logsumexp(-1).mean() + pooled.pow(2).mean()
        return loss


def mixed(group: dist.ProcessGroup, **options: Any) -> float:
    torch.manual_seed(0)
    model, ids = Mixed().double(), torch.randint(0, VOCAB, (2, 23))
    grads = []
    for run in (model, compiled(model, group, **options)):
        model.zero_grad()
        run(ids).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    want, got = grads
    assert got.keys() == want.keys() and len(want) < len(list(model.parameters()))
    return max(relative(got[n], want[n]) for n in want)


def in_small_buckets(group: dist.ProcessGroup, job: Any, *args: Any, **options: Any) -> Any:
    with patch.object(writer, "BUCKET_BYTES", SMALL):
        return job(group, *args, **options)


@pytest.mark.parametrize("compiler", ("aot_eager", slow("inductor")))
def test_kinds_of_parameters(workers: Workers, compiler: str) -> None:
    assert max(workers.run(in_small_buckets, 3, mixed, compiler=compiler)) < 1e-10


@pytest.mark.parametrize(("ranks", "name"), [(2, "conditioned"), (3, "gpt2"), slow(5, "mistral")])
def test_parity_in_small_buckets(workers: Workers, ranks: int, name: str) -> None:
    error, where = worst(workers.run(in_small_buckets, ranks, parity, name, 23, True, False))
    assert error < 1e-10, where


class Faulty(TorchDispatchMode):
    """Changes the last bits of each matrix product over `rows` rows: gradients of replicated linear layers."""

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.changed = rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and args[0].shape[1] == self.rows:
            self.changed += 1
            out = out * (1 + 1e-9)
        return out


def gradients_with_a_fault(group: dist.ProcessGroup) -> tuple[int, list[dict[str, Tensor]]]:
    """How many products rank 1 changed in its second step, and the gradients of both steps."""
    model, batch = MODELS["conditioned"].make(), batch_for("conditioned", 23, True)
    run = compiled(model, group)
    fault = Faulty(len(batch["x"]) if group.rank() == 1 else -1)
    steps = []
    for faulty in (False, True):
        model.zero_grad()
        loss = loss_of(run(**batch))
        if faulty:
            with fault:
                loss.backward()
        else:
            loss.backward()
        steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return fault.changed, steps


def test_gradients_that_each_rank_computes_are_equal_on_all(workers: Workers) -> None:
    results = workers.run(gradients_with_a_fault, 3)
    assert [changed > 0 for changed, _ in results] == [False, True, False]
    _, (plain, _) = results[0]
    for _, steps in results:
        for step in steps:
            assert step.keys() == plain.keys()
            assert all(torch.equal(step[n], plain[n]) for n in plain), [n for n in plain if step[n].ne(plain[n]).any()]
