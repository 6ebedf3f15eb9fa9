"""The disk of one rank is full while Inductor compiles: all ranks end with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.repository import ROOT
from tests.support.small_disk import small_disk

TRAINING = """
import torch.distributed as dist
import torch
from tests.support.models import MODELS, batch_for, loss_of

dist.init_process_group("gloo")
model = torch.compile(MODELS["nanogpt"].make(), backend="ring_dilated", options={"timeout": 60.0})
loss_of(model(**batch_for("nanogpt", 23))).backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TMPDIR"])
def test_caches_on_a_full_disk(tmp_path: Path, variable: str) -> None:
    (tmp_path / "small").mkdir()
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    run |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with small_disk(tmp_path / "small") as disk:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", TRAINING],
                env={**os.environ, **run, "RANK": str(rank), **({variable: str(disk)} if rank else {})},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=500)[1] for rank in ranks]
    assert all(rank.returncode == 1 for rank in ranks), said
    assert "InductorError" in said[1]
    assert "PeerError: rank 0 came to call 1" in said[0] and "rank 1 failed to compile a graph" in said[0]
    if variable == "TORCHINDUCTOR_CACHE_DIR":  # else the C++ compiler says so, above
        assert "No space left on device" in said[0]
