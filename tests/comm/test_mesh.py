"""A ring inside a larger mesh: DDP and FSDP2 around it equal one device; what would undo the ring is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ringpass import OptionError, RingConfig, UnsupportedError
from tests.support.marks import slow
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers
from tests.support.repository import ROOT
from tests.support.torchrun import torchrun

FOUND = re.compile(
    r"2 x 2 ranks, (\S+): 10 steps from (\S+) to (\S+), largest difference of the loss to one device (\S+)"
)


@pytest.mark.parametrize("ways", [("ddp", "fsdp"), slow(("ddp-all", "fsdp-layers"))])
def test_ten_steps_equal_one_device(ways: tuple[str, ...]) -> None:
    printed = torchrun("--nproc-per-node", "4", "-m", "examples.mesh", "--compiler", "aot_eager", "--ways", *ways)
    found = FOUND.findall(printed)
    assert [way for way, *_ in found] == list(ways), printed
    for _, first, last, far in found:
        assert float(last) < 0.95 * float(first) and float(far) < 1e-9


class Wide(nn.Module):
    """More weights than a gradient bucket holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 60_000), nn.Linear(60_000, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(F.scaled_dot_product_attention(x, x, x)))
        return y


def split(group: dist.ProcessGroup, strict: bool) -> str:
    """What is said of a graph that Dynamo cuts at the buckets."""
    model = DistributedDataParallel(Wide(), process_group=group, bucket_cap_mb=1)
    try:
        compiled(model, group, strict=strict)(torch.ones(1, 2, 6, 8))
    except BackendCompilerFailed as error:
        assert isinstance(error.inner_exception, UnsupportedError)
        return str(error.inner_exception)
    return ""


def test_a_graph_that_ddp_splits_is_refused_under_strict(workers: Workers) -> None:
    for said in workers.run(split, 2, True):
        assert "gradient buckets of DistributedDataParallel" in said and "optimize_ddp = False" in said


def added(group: dist.ProcessGroup, how: str) -> str:
    """What is said of gradients that are added up over the ring."""
    model: Any = Attending()
    if how == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        model.set_gradient_divide_factor(1.0)
        run = compiled(model, group)
    else:
        run = DistributedDataParallel(compiled(model, group, strict=True), process_group=group)
        run.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    with pytest.raises(BackendCompilerFailed) as error:
        run(torch.ones(1, 2, 6, 8))
    assert isinstance(error.value.inner_exception, UnsupportedError)
    return str(error.value.inner_exception)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.linear(x), x, x)


@pytest.mark.parametrize(
    ("how", "said"),
    [("fsdp", "must average them, and divides by 1"), ("ddp", "over ranks of this ring by added.<locals>.<lambda>")],
)
def test_gradients_added_up_over_a_ring_are_refused(workers: Workers, how: str, said: str) -> None:
    for text in workers.run(added, 2, how):
        assert said in text


def meshes(group: dist.ProcessGroup) -> str:
    mesh = DeviceMesh("cpu", torch.arange(2).view(1, 2), mesh_dim_names=("data", "ring"), _init_backend=False)
    with pytest.raises(OptionError) as error:
        RingConfig(group=mesh)
    return str(error.value)


def test_a_mesh_of_several_dimensions_is_refused(workers: Workers) -> None:
    for said in workers.run(meshes, 2):
        assert "'group' must be one dimension of a mesh, the ring's, out of data, ring" in said


def hooked(group: dist.ProcessGroup) -> tuple[Any, ...]:
    """What hooks on a lazy output see of its cotangent, when it is used and when it goes on as it is."""
    model = nn.Linear(4, 4).double()

    def attend(x: Tensor) -> Tensor:
        y = model(x)
        return F.scaled_dot_product_attention(y, y, y)

    seen: list[Tensor] = []
    x = torch.ones(1, 2, 6, 4, dtype=torch.float64)
    for through in (False, True):
        out = compiled(attend, group)(x)
        out.register_hook(seen.append)
        (Through.apply(out) if through else out).sum().backward()  # type: ignore[no-untyped-call]
    return tuple(grad.tolist() for grad in seen)


class Through(torch.autograd.Function):
    """Takes a tensor as it is, as FSDP's hooks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_hooks_on_lazy_outputs_see_the_full_cotangent(workers: Workers) -> None:
    ones = torch.ones(1, 2, 6, 4)
    for seen in workers.run(hooked, 2):
        assert seen == (ones.tolist(), (2 * ones).tolist())


def test_the_page_names_what_is_here() -> None:
    page = (ROOT / "docs" / "mesh.md").read_text()
    assert all(
        name in page for name in ("-m examples.mesh", 'options = {"group": mesh["ring"]}', "optimize_ddp = False")
    )
    assert "docs/mesh.md" in (ROOT / "README.md").read_text()
