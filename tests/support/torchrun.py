"""A script under torchrun, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.repository import ROOT


def torchrun(*job: str, timeout: float = 300) -> str:
    """What `torchrun --standalone <job>` prints, started in the repository; fails with the end of what it complains.

    >>> torchrun("--nproc-per-node", "2", "-m", "examples.attention")
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *job]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
