"""The scripts of docs/guides run, with the losses of one rank; the errors that the guides quote are the real ones."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringpass import MismatchError, RingConfig
from ringpass.comm.agreement import Agreement
from ringpass.comm.lost import lost
from ringpass.comm.ring import Ring, Running
from tests.support.errors import error_message
from tests.support.marks import slow
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers
from tests.support.repository import ROOT
from tests.support.torchrun import torchrun

GUIDES = ROOT / "docs" / "guides"
SIZES: dict[str, dict[str, Any]] = {  # the constants of each script, for a short run
    "long_sequences": {"TOKENS": 24, "STEPS": 2},
    "trainer": {"TOKENS": 24, "STEPS": 2, "FOLDER": "output"},
    "images": {"GRID": 5},
    "fsdp": {"TOKENS": 24, "STEPS": 2, "RING": 2},
}
RANKS = {"fsdp": 4}


def snippets(guide: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (GUIDES / f"{guide}.md").read_text(), re.DOTALL | re.MULTILINE)


def script(guide: str) -> str:
    """The script of a guide, with small sizes."""
    (source,) = snippets(guide)
    names, sizes = ", ".join(SIZES[guide]), ", ".join(map(repr, SIZES[guide].values()))
    small, changed = re.subn(rf"^{names} = .*$", f"{names} = {sizes}", source, flags=re.MULTILINE)
    assert changed == 1
    return small


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?:loss|evaluation:) (\d+\.\d+)", printed)]


def printed_on_ring(group: dist.ProcessGroup, source: str, folder: str) -> str:
    """What a script prints where the ring is `group`, without code generation."""

    def on_group(options: dict[str, Any] | None) -> dict[str, Any]:
        return {**(options or {}), "group": group, "compiler": "aot_eager"}

    def compile_on_group(model: Any, backend: str, options: dict[str, Any] | None = None) -> Any:
        return torch_compile(model, backend=backend, options=on_group(options))

    def compile_in_place(model: nn.Module, backend: str, options: dict[str, Any] | None = None) -> None:
        module_compile(model, backend=backend, options=on_group(options))

    torch_compile, module_compile, page = torch.compile, nn.Module.compile, io.StringIO()
    with (
        patch.object(dist, "init_process_group"),
        patch.object(torch, "compile", compile_on_group),
        patch.object(nn.Module, "compile", compile_in_place),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(page),
    ):
        exec(source, {"__name__": "__main__"})
    return page.getvalue()


@pytest.mark.parametrize("guide", ["long_sequences", slow("trainer"), slow("images")])
def test_losses_are_those_of_one_rank(workers: Workers, tmp_path: Path, guide: str) -> None:
    if guide == "trainer":
        pytest.importorskip("accelerate")
    alone, ring = (losses(workers.run(printed_on_ring, ranks, script(guide), str(tmp_path))[0]) for ranks in (1, 2))
    assert alone and ring == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("guide", SIZES)
def test_scripts_run_as_they_are_started(tmp_path: Path, guide: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(script(guide).replace('"output"', repr(str(tmp_path))).replace("model.pt", f"{tmp_path}/model.pt"))
    ranks = RANKS.get(guide, 2)
    assert f"torchrun --nproc-per-node {ranks} " in script(guide).splitlines()[0]
    assert losses(torchrun("--nproc-per-node", str(ranks), str(path), timeout=900))


def test_meshes_of_many_nodes() -> None:
    """Their options are valid, on rank 0 of a fake world of their size."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    try:
        sizes = []
        for snippet in snippets("nodes"):
            names: dict[str, Any] = {}
            exec(snippet, names)
            ring = RingConfig.from_options(names["options"]).ring
            assert ring is not None
            sizes.append(ring.size())
        assert sizes == [8, 16]
    finally:
        dist.destroy_process_group()


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)[:, None]
        return scaled_dot_product_attention(x, x, x)


def other_batch(group: dist.ProcessGroup) -> str:
    ids = torch.full((1, 12), group.rank())
    return error_message(MismatchError, lambda: compiled(Embedded(), group)(ids))


def test_the_errors_of_a_hang(workers: Workers) -> None:
    """Those that the guide quotes, apart from numbers, are what ranks say."""
    page = (GUIDES / "hang.md").read_text()
    quoted = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    differ, absent = (" ".join(quote.split()) for quote in quoted)
    for said in workers.run(other_batch, 2):
        assert re.sub(r"-?\d{2,}", "N", differ) in re.sub(r"-?\d{2,}", "N", said)
    ring: Any = SimpleNamespace(pg=None, rank=0, calls=12, timeout=300.0, absent=lambda: [1])
    assert absent in str(Agreement(ring, (), ()).lost(RuntimeError("")))
    broke = (
        "exchange of step 2 of attention 3 (layers.3.attn) with rank 1 broke in the backward of call 12 (model.py:31)"
    )
    running = Running(12, "backward", ("", "", "", "layers.3.attn"), "model.py:31")
    here = Ring(None, 300.0, running=running)
    assert f"`{broke}`" in page
    assert str(lost((1, None), RuntimeError(""), here, "site3 receive_step2_from_rank1")).startswith(broke)
