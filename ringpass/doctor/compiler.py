"""What Inductor needs to build CPU kernels: a C++ compiler, and room for what it makes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ringpass.doctor.finding import Finding, Status

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
WRITTEN = 2**20  # bytes, a little more than one compiled kernel
ROOM = 2**30  # bytes, what the kernels of a few models take
COMPILED = """
import sys, torch
added = float(sys.argv[1])
x = torch.tensor([0.0, 1.0], dtype=torch.float64)
assert torch.equal(torch.compile(lambda x: x * 2 + added, dynamic=False)(x), x * 2 + added)
"""
"""Compiled in a process of its own, so that it can be stopped, with a number that no cached kernel has."""


def compiles(seconds: float) -> Iterator[Finding]:
    """Whether torch.compile builds and runs a small CPU kernel."""
    compiler = os.environ.get("CXX", "g++")
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    env.pop("TORCH_LOGS", None)
    run = [sys.executable, "-c", COMPILED, repr(time.time())]
    out, complain = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(run, env=env, text=True, start_new_session=True, stdout=out, stderr=complain)
    try:
        _, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler too
        remedy = f"run {compiler} by hand on a small file; try again with a longer --timeout"
        yield Finding("compiler", Status.PROBLEM, f"torch.compile took more than {seconds:g} s", remedy)
        return
    if process.returncode == 0:
        yield Finding("compiler", Status.OK, f"torch.compile works with {_path_of(compiler)}")
        return
    error = next((line for line in reversed(complaints.splitlines()) if "Error" in line or "Invalid" in line), "")
    if shutil.which(compiler) is None:
        remedy = "apt-get install g++ (or gcc-c++); or set CXX to the path of a C++ compiler"
        yield Finding("compiler", Status.PROBLEM, f"there is no C++ compiler {compiler!r}: {error.strip()}", remedy)
    else:
        remedy = "torch.compile a small function with TORCH_LOGS=+inductor to see more; set CXX to another compiler"
        yield Finding(
            "compiler", Status.PROBLEM, f"torch.compile fails with {_path_of(compiler)}: {error.strip()}", remedy
        )


def _path_of(compiler: str) -> str:
    return shutil.which(compiler) or compiler


def caches() -> Iterator[Finding]:
    """Whether Inductor's cache directory and the one of temporary files can be written to, and have room."""
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        yield Finding("temporary files", Status.PROBLEM, str(error), "set TMPDIR to a directory that you can write to")
        return
    yield _room("temporary files", Path(temporary), "TMPDIR")
    yield _room("inductor cache", Path(os.environ.get(CACHE_VARIABLE) or default_cache_dir()), CACHE_VARIABLE)


def _room(name: str, folder: Path, variable: str) -> Finding:
    """Writes a file in `folder`, or where it would be made, and looks at the free space."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    remedy = f"free some space there, or set {variable} to a directory with {ROOM / 2**30:g} GiB that you can write to"
    trial = there / f"ringpass_doctor_{uuid.uuid4().hex}"
    try:
        trial.write_bytes(os.urandom(WRITTEN))
    except OSError as error:
        return Finding(name, Status.PROBLEM, f"{folder}: cannot write a file of 1 MiB: {error.strerror}", remedy)
    finally:
        trial.unlink(missing_ok=True)
    free = shutil.disk_usage(there).free
    text = f"{folder}: {free / 2**30:.1f} GiB free"
    return Finding(name, Status.OK, text) if free >= ROOM else Finding(name, Status.WARNING, text, remedy)
