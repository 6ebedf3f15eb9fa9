"""A ring inside a larger mesh: DDP and FSDP2 around it equal one device; what would undo the ring is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringpass import Machine, OptionError, RingConfig, UnsupportedError
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
    mesh = DeviceMesh("cpu", torch.arange(2).view(1, 1, 2), mesh_dim_names=("a", "b", "ring"), _init_backend=False)
    with pytest.raises(OptionError) as error:
        RingConfig(group=mesh)
    return str(error.value)


def test_a_mesh_of_several_dimensions_is_refused(workers: Workers) -> None:
    for said in workers.run(meshes, 2):
        assert "'group' must be one dimension of a mesh, the ring's, or two, out of a, b, ring" in said


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


# --- a ring over a mesh of two dimensions -----------------------------------------------------------------------------

TWO_DIMENSIONS = """
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from ringpass import Dimension, Machine

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
slow = Machine("slow to start", ((1, 1e15),), 1e15, 0.0, (Dimension(None, 1e15, 1.0, 1e-3),))
options = {"group": mesh, "machine": slow, "comm": "ring", "compiler": "aot_eager", "outputs": "gathered", "dump": DUMP}
torch.manual_seed(0)
x = torch.randn(1, 4, 64, 8, dtype=torch.float64, requires_grad=True)
attend = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)
found = []
for call in (torch.compile(attend, backend="ring_dilated", options=options), attend):
    y = call(x)
    found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
print(max(float((a - b).abs().max()) for a, b in zip(*found)) < 1e-12)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_mesh_of_two_dimensions_is_one_ring(tmp_path: Path) -> None:
    """On four ranks all heads would be divided by four; the inner dimension bounds that to two."""
    script = tmp_path / "two.py"
    script.write_text(TWO_DIMENSIONS.replace("DUMP", repr(str(tmp_path / "dump"))))
    printed = torchrun("--nproc-per-node", "4", str(script))
    assert "".join(printed.split()) == 4 * "True"  # unbuffered: ranks may print into one line
    planned = (tmp_path / "dump" / "graph0" / "plan.txt").read_text()
    assert "plan for 4 ranks" in planned and "ulysses degree 2: heads over 2 neighbouring ranks, ring of 2" in planned


def test_meshes_that_are_no_ring() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "node", "gpu"))
        for given, said in (
            (mesh, "one dimension of a mesh, the ring's, or two, out of data, node, gpu"),
            (DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("a", "b")), r"ranks ascend.*\[\[0, 2\], \[1, 3\]\]"),
            (DeviceMesh("cpu", [[0, 1], [2, 3]]), "name its dimensions"),
        ):
            with pytest.raises(OptionError, match=said):
                RingConfig(group=given)
        config = RingConfig(group=mesh["node", "gpu"])
        assert config.inner_ranks == 2 and dist.get_process_group_ranks(config.ring) == [0, 1, 2, 3]
        assert RingConfig(group=mesh["gpu"]).inner_ranks is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("local", "ranks"), [("2", 2), ("4", 4), ("", 8)])
def test_presets_have_the_nodes_of_torchrun(monkeypatch: pytest.MonkeyPatch, local: str, ranks: int) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        found = RingConfig(machine="H100").machine
        assert isinstance(found, Machine) and found.dimensions[0].ranks == ranks
    finally:
        dist.destroy_process_group()
