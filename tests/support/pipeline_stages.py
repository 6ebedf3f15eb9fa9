"""The stages of the pipeline, as tests need them: one by one, or all graphs of a rank without peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringpass.comm.agreement import CPU, Agreement, Comparison, Said
from ringpass.comm.headers import HostCopy
from ringpass.comm.ring import RINGS
from ringpass.passes.capture.capture import Captured, capture
from ringpass.passes.capture.decompose import decompose
from ringpass.passes.failures import Failures
from ringpass.passes.op_rules.table import has_rule
from ringpass.passes.pipeline import Pipeline
from ringpass.passes.verify import verify
from tests.support.models import MODELS, batch_for, loss_of


def captured_graph(gm: GraphModule, inputs: Sequence[Any]) -> Captured:
    """Dynamo's graph as `detect` reads it, checked against the contract of its stage."""
    captured = decompose(capture(gm, inputs), has_rule, Failures(strict=True))
    verify("decompose", captured)
    return captured


def unanimous(agreement: Agreement, args: Sequence[object], mine: int, device: torch.device = CPU) -> Comparison:
    """A call in which every rank says what this one says."""
    headers = torch.full((agreement.ring.world,), mine)
    seed = torch.tensor(mine, device=device)
    return Comparison(agreement, Said([], [], []), HostCopy(headers, lambda: True), seed)


@contextmanager
def fake_ring(rank: int, world: int) -> Iterator[None]:
    """One rank of a ring without peers: good for compiling and reading graphs, its numbers mean nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    torch._dynamo.reset()
    try:
        with patch.object(Agreement, "begin", unanimous):
            yield
    finally:
        dist.destroy_process_group()
        RINGS.clear()


@contextmanager
def stages() -> Iterator[dict[str, list[GraphModule]]]:
    """Every graph that a compilation hands on: captured, partitioned, forward, backward."""
    seen: dict[str, list[GraphModule]] = {}
    names = {"decompose": "captured", "partition": "partitioned"}
    run, lowered = Pipeline.run, Pipeline.lowered

    def record(self: Pipeline, stage: Callable[..., Any], *args: Any) -> Any:
        result = run(self, stage, *args)
        if stage.__name__ in names:
            seen.setdefault(names[stage.__name__], []).append(result.gm)
        return result

    def record_lowered(self: Pipeline, name: str, gm: GraphModule) -> None:
        lowered(self, name, gm)
        seen.setdefault(name, []).append(gm)

    with patch.object(Pipeline, "run", record), patch.object(Pipeline, "lowered", record_lowered):
        yield seen


def compile_step(
    name: str,
    length: int,
    padding: bool,
    dynamic: bool | None = None,
    unroll_limit: int = 128,
    tile: int | None = None,
    **options: Any,
) -> dict[str, list[GraphModule]]:
    """The graphs of a training step of a model on the current (fake) rank."""
    torch.manual_seed(0)
    model: Any = MODELS[name].factory(**options).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 64:
            module.weight.data = torch.randn(256, module.embedding_dim, dtype=torch.float64)
    if hasattr(model, "config"):
        model.config.n_positions = model.config.max_position_embeddings = 256
    chosen: Any = {"compiler": "aot_eager", "layout": "zigzag", "unroll_limit": unroll_limit, "tile": tile}
    run: Any = torch.compile(model, backend="ring_dilated", options=chosen, dynamic=dynamic)
    with stages() as seen:
        loss_of(run(**batch_for(name, length, True, padding))).backward()
    return seen
