"""Dropout on a ring: one seed gives one mask, whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.process_ranks import Workers

LENGTH = 23


def trained(group: dist.ProcessGroup, seed: int, **options: Any) -> dict[str, Tensor]:
    """Loss, logits and gradients of GPT-2 with its dropouts on; each rank's own generator is seeded differently."""
    model = MODELS["gpt2"].make(dropout=0.1)
    torch.manual_seed(seed + group.rank() * 1000)
    outputs = compiled(model, group, **options)(**batch_for("gpt2", LENGTH))
    loss_of(outputs).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach().clone(), **grads}


@pytest.fixture(scope="module")
def alone(workers: Workers) -> dict[str, Tensor]:
    """On one rank."""
    (found,) = workers.run(trained, 1, 5)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ranks", "degree"), [slow(2, 1), slow(3, 1), (4, 2)])
def test_same_masks_at_any_size(workers: Workers, alone: dict[str, Tensor], ranks: int, degree: int) -> None:
    for got in workers.run(trained, ranks, 5, ulysses_degree=degree):
        for name, want in alone.items():
            assert relative(got[name], want) < 1e-10, name


def test_other_seed_other_masks(workers: Workers, alone: dict[str, Tensor]) -> None:
    (other,) = workers.run(trained, 1, 6)
    assert relative(alone["loss"], other["loss"]) > 1e-6


class Dropped(nn.Module):
    """Returns what dropout leaves of a tensor of ones, after attention has made a sequence of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        ones = y.transpose(1, 2).flatten(2) * 0 + 1
        return F.dropout(ones, 0.25, True)


def dropped(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    run: Any = compiled(Dropped(), group)
    x = torch.randn(2, 4, 301, 32)
    return run(x).clone(), run(x).clone()


def test_no_two_tokens_share_a_mask_and_rates_are_right(workers: Workers) -> None:
    first, second = workers.run(dropped, 3)[0]
    kept = first != 0
    rows = kept.reshape(-1, kept.shape[-1])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    deviation = (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.75) < 5 * deviation
    assert (first[kept] == 1 / 0.75).all()
    assert not torch.equal(first, second)  # a new seed at every call
