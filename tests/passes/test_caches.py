"""Warm compile caches, shared by ranks, ring sizes and options, never serve another one's graph."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.codecache import PyCodeCache

import ringpass
from ringpass import ops
from ringpass.ops import gradient_sums, pooling, primitives
from ringpass.passes.lower import codegen
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.process_ranks import Workers

Cases = tuple[tuple[int, dict[str, Any]], ...]  # ranks, options
CASES: Cases = (
    (2, {"layout": "contiguous"}),
    (3, {"layout": "zigzag", "unroll_limit": 0}),
    (2, {"layout": "zigzag"}),
)
CACHES = {"fx": ("inductor", "fxgraph_cache"), "autograd": ("aot_autograd", "autograd_cache")}


class Attention(nn.Module):
    """The least that has a graph worth caching: one projection, one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).pow(2).mean()


def cached(group: dist.ProcessGroup, directory: str, options: dict[str, Any]) -> tuple[float, dict[str, int]]:
    """Error of a compiled step's gradient against one device, and how often each cache was hit and missed."""
    model, x = Attention().double(), torch.randn(2, 23, 8, dtype=torch.float64)
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=directory):
        torch._dynamo.reset()
        PyCodeCache.cache_clear()
        counters.clear()
        got, want = (
            torch.autograd.grad(run(x), model.project.weight)[0]
            for run in (compiled(model, group, compiler="inductor", **options), model)
        )
        return relative(got, want), {
            f"{name} {what}": counters[where][f"{prefix}_{what}"]
            for name, (where, prefix) in CACHES.items()
            for what in ("hit", "miss")
        }


@pytest.mark.parametrize("cases", [CASES[:2], slow(CASES)], ids=["few", "all"])
def test_warm_caches_serve_the_right_graph(workers: Workers, tmp_path: Path, cases: Cases) -> None:
    for warm in (False, True):
        for ranks, options in cases:
            results = workers.run(cached, ranks, str(tmp_path), options)
            for error, counts in results:
                assert error < 1e-10, (warm, ranks, options)
                hits, misses = (counts[f"autograd {x}"] + counts[f"fx {x}"] for x in ("hit", "miss"))
                assert (hits > 0 and misses == 0) if warm else (hits == 0 and misses > 0), (ranks, options, counts)


def uuid(*key: Any) -> Any:
    return codegen._Lower(key, lambda stage, graph: None).uuid()


def test_what_a_lowered_graph_depends_on_is_in_its_key() -> None:
    here = (0, 2, "group", 128, 0)
    others = [(1, 2, "group", 128, 0), (0, 3, "group", 128, 0), (0, 2, "other", 128, 0), (0, 2, "group", 0, 0)]
    assert len({uuid(*key) for key in (here, *others)}) == 5
    assert uuid(*here) == uuid(*here)


def test_every_module_is_in_the_key() -> None:
    """An edit of any module of the package makes cached graphs stale."""
    modules = pkgutil.walk_packages(ringpass.__path__, "ringpass.")
    files = {Path(ringpass.__file__).resolve()}
    files |= {Path(importlib.import_module(m.name).__file__ or "").resolve() for m in modules}
    assert len(files) > 60
    assert files == set(codegen.source_files())
    here = (0, 2, "group", 128, 0)
    codegen._sources.cache_clear()
    before, read = uuid(*here), Path.read_bytes
    for changed in files:
        codegen._sources.cache_clear()
        with patch.object(Path, "read_bytes", lambda self, changed=changed: b"" if self == changed else read(self)):
            assert uuid(*here) != before or not read(changed), changed
    codegen._sources.cache_clear()


def test_every_op_that_talks_to_ranks_is_an_inductor_collective() -> None:
    """Code generation keeps these in graph order; `shard` and `replicate` only do so in their backward."""
    talking = {
        overload
        for name in torch.ops.ringpass
        for overload in (getattr(torch.ops.ringpass, name).default,)
        if any(argument.name == "group" for argument in overload._schema.arguments)
    }
    waited_for = {
        ops.shard, ops.replicate, primitives.exchange, primitives.start_gather, pooling.start_all_to_all,
        gradient_sums.start_sum, gradient_sums.wait_sum,
    }  # fmt: skip
    assert talking - waited_for <= {*codegen.COMPLETE} <= talking
