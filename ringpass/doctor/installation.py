"""What is installed: releases, devices, what torch was built with, the name of the backend, kernels of attention."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ringpass
from ringpass.doctor.finding import Finding, Status
from ringpass.kernels.table import choose
from ringpass.kernels.tile import TileArgs
from ringpass.torch_features import TESTED_TORCH, flash_implementation

TESTED_PYTHON = (3, 11)
BACKEND = "ring_dilated"
WIDTH, EDGE = 64, 128  # of the tile whose kernel is named


def versions() -> Iterator[Finding]:
    """Python, torch and ringpass: whether these releases have been tested together."""
    python = platform.python_version()
    if sys.version_info[:2] == TESTED_PYTHON:
        yield Finding("python", Status.OK, f"{python} ({sys.executable})")
    else:
        tested = ".".join(map(str, TESTED_PYTHON))
        yield Finding(
            "python", Status.WARNING, f"{python}; tested on {tested} only", f"if something fails, try {tested}"
        )
    yield _torch(torch.__version__)
    yield Finding("ringpass", Status.OK, f"{ringpass.__version__} ({Path(ringpass.__file__).parent})")


def _torch(version: str) -> Finding:
    """Whether a release of torch is in the range that is tested.

    >>> _torch("2.10.0").status, _torch("2.12.0+cu130").status, _torch("3.0.0").status
    (<Status.PROBLEM: 'problem'>, <Status.OK: 'ok'>, <Status.WARNING: 'warning'>)
    """
    oldest, newest = TESTED_TORCH[0], TESTED_TORCH[-1]
    remedy = f"pip install 'torch>={oldest},<={newest}'"
    if _release(version) < _release(oldest):
        return Finding("torch", Status.PROBLEM, f"{version}; ringpass needs {oldest} or newer", remedy)
    if _release(version) > _release(newest):
        text = f"{version}; newer than {newest}, the newest that was tested"
        return Finding("torch", Status.WARNING, text, f"if something fails: {remedy}")
    return Finding("torch", Status.OK, f"{version}; tested: {', '.join(TESTED_TORCH)}")


def _release(version: str) -> tuple[int, int]:
    """(major, minor)"""
    major, minor, *_ = version.split("+")[0].split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def devices() -> Iterator[Finding]:
    """CPU cores, and the GPUs that torch finds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    yield Finding("cpu", Status.OK, f"{cores} cores for this process, {threads} threads in torch")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            free, total = (x / 2**30 for x in torch.cuda.mem_get_info(index))
            text = f"{about.name}, sm{about.major}{about.minor}, {free:.1f} of {total:.1f} GiB free"
            yield Finding(f"cuda:{index}", Status.OK, f"{text}, CUDA {torch.version.cuda}")
    elif torch.version.cuda:
        yield Finding(
            "cuda", Status.PROBLEM, f"torch is built for CUDA {torch.version.cuda} and finds no device",
            "compare nvidia-smi's driver and CUDA version with torch's; look at CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        text = "this host has an NVIDIA driver, and torch is built without CUDA"
        yield Finding("cuda", Status.PROBLEM, text, "install a CUDA build of torch: https://pytorch.org/get-started")
    else:
        yield Finding("cuda", Status.OK, "no GPU: ringpass runs on CPUs")


def backends() -> Iterator[Finding]:
    """What torch.distributed was built with."""
    if not dist.is_available():
        yield Finding(
            "torch.distributed", Status.PROBLEM, "not in this build of torch", "install another build of torch"
        )
        return
    if dist.is_gloo_available():
        yield Finding("gloo", Status.OK, "built in, for CPUs")
    else:
        yield Finding("gloo", Status.PROBLEM, "not in this build of torch", "install a build of torch with gloo")
    if dist.is_nccl_available():
        version: Any = torch.cuda.nccl.version()
        yield Finding("nccl", Status.OK, f"{'.'.join(map(str, version))}, for GPUs")
    else:
        status = Status.PROBLEM if torch.cuda.is_available() else Status.OK
        remedy = "on GPUs, install a CUDA build of torch for Linux: it has NCCL"
        yield Finding("nccl", status, "not in this build of torch: ranks talk by gloo alone", remedy)


def registration() -> Iterator[Finding]:
    """Whether torch.compile knows the backend by its name."""
    found = [entry for entry in entry_points(group="torch_dynamo_backends") if entry.name == BACKEND]
    if not found:
        yield Finding(
            "backend", Status.PROBLEM, f"torch.compile does not know {BACKEND!r}: no installed package names it",
            f"pip install ringpass (from a checkout: pip install .), in the environment of {sys.executable}",
        )  # fmt: skip
        return
    loaded = found[0].load()
    yield Finding("backend", Status.OK, f"{BACKEND!r} is {loaded.__module__}.{loaded.__name__}")


def attention() -> Iterator[Finding]:
    """The kernel of a causal tile on each device."""
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    kernel = choose(device, dtype, (WIDTH, WIDTH), (EDGE, EDGE), TileArgs(scale=1.0, causal=True))
    text = f"kernel {kernel!r} for a causal tile in {str(dtype).removeprefix('torch.')} on {device.type}"
    if kernel == "plain":
        remedy = "expect it to be slow: no fused kernel takes this device; use a GPU of sm80 or newer, or the CPU"
        yield Finding("attention", Status.WARNING, text, remedy)
    else:
        yield Finding("attention", Status.OK, f"{text}; flash attention: {flash_implementation()}")
