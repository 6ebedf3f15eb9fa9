"""A call stops the host once, to compare the ranks, and nothing inside its graph does: counted where each would happen.

On a CPU all tensors are on the host, so each read of a value, each tensor made of host data and each op whose size
depends on data is counted where it is written, whatever the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringpass import Dilation
from ringpass.comm import agreement
from tests.support.crossings import Crossings, crossings
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers

S, RANKS = 46, 2
HEADER = {("tolist", "headers.py:read"): 1}
"""The one read of a call: the headers of all ranks."""
KNOWN = {("tensor", "agreement.py:_header"): 1}
"""What the host tells the device: this rank's header, from pinned memory."""
DRAWN = {("__int__", "compiled.py:in_order"): 1}
"""The seed that is drawn on the host: a tensor of the host, on a GPU too."""


class Model(nn.Module):
    """Attention as `attend` has it, between layers that read each token alone."""

    def __init__(self, attend: Callable[..., Tensor], convolve: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.project, self.attend = nn.Linear(8, 24), attend
        self.convolve = nn.Conv1d(8, 8, 3, padding=1) if convolve else None
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, *data: Tensor) -> Tensor:
        for _ in range(2):
            if self.convolve is not None:
                x = self.convolve(x.mT).mT
            q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            x = x + self.drop(self.attend(q, k, v, *data)).transpose(1, 2).flatten(2)
        return x.square().mean()


def sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(*args, **kwargs)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, dropout_p=0.5)


def padded(q: Tensor, k: Tensor, v: Tensor, exists: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=exists[:, None, None, :])


def packed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=ids[:, None, :, None] == ids[:, None, None, :])


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys of a shifted slice, so that tokens move from one layout to another."""
    return torch.cat([causal(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]), v[:, :, :1]], 2)


EXISTS = torch.arange(S) < torch.tensor([[S], [S - 7]])
IDS = (torch.arange(S) // 11).expand(2, S).contiguous()
CASES: dict[str, tuple[Model, tuple[Tensor, ...], dict[str, Any], dict[tuple[str, str], int]]] = {
    "causal": (Model(causal), (), {}, {}),
    "rolled": (Model(causal), (), {"unroll_limit": 0}, {}),
    "padding": (Model(padded), (EXISTS,), {}, {}),
    "packed documents": (Model(packed), (IDS,), {}, {}),
    "dropout": (Model(dropping, drop=0.5), (), {}, DRAWN),
    "dilation": (Model(causal), (), {"dilation": Dilation((8, 46), (1, 3), "mod")}, {}),
    "halo": (Model(causal, convolve=True), (), {}, {}),
    "slices": (Model(sliced), (), {}, {}),
    "all keys gathered": (Model(causal), (), {"comm": "allgather"}, {}),
    # one read of the ids for two attentions, forward and backward, and one look at the copy
    "pruned by data": (
        Model(packed), (IDS,), {"runtime_pruning": True},
        {("to", "attention.py:_host_copy"): 1, **{(x, "constants.py:__init__"): 1 for x in ("cpu", "numpy")}},
    ),
}  # fmt: skip


def steady(group: dist.ProcessGroup, name: str) -> Crossings:
    """The crossings of a training step after two others."""
    model, data, options, _ = CASES[name]
    run, x = compiled(model, group, **options), torch.randn(2, S, 8, requires_grad=True)
    as_on_nccl = patch.object(agreement, "as_messages", lambda *_: False)
    with torch.autograd.set_multithreading_enabled(False), as_on_nccl:
        for _ in range(2):
            run(x, *data).backward()
        with crossings() as found:
            run(x, *data).backward()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_call_reads_the_headers_and_nothing_else(workers: Workers, name: str) -> None:
    expected = Counter({**HEADER, **KNOWN, **CASES[name][3]})
    for found in workers.run(steady, RANKS, name):
        assert found == expected


def test_crossings_are_seen() -> None:
    """What the code did before, and what a careless op would do."""
    x = torch.arange(6)
    with crossings() as found:
        x[x > 2], x.to("cpu"), x.to(torch.float32), x.tolist(), x.sum().item(), bool(x[0]), torch.from_numpy(x.numpy())
    where = "test_syncs.py:test_crossings_are_seen"
    methods = ("to", "tolist", "item", "__bool__", "from_numpy", "numpy")
    assert found == Counter({("aten::nonzero", ""): 1, **{(name, where): 1 for name in methods}})
