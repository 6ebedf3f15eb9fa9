"""torch's flight recorder, which keeps the last collectives and exchanges of a process where it is switched on.

    TORCH_FR_BUFFER_SIZE=2000 torchrun ..      # TORCH_NCCL_TRACE_BUFFER_SIZE is its former name
    torchfrtrace --prefix <folder and start of the files' names>

torch writes its files where NCCL runs into its timeout; with gloo nobody would, so an error of ringpass does.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringpass.files import write_bytes

SIZES = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"
PATHS = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def switched_on() -> bool:
    """Whether the recorder keeps anything."""
    sizes = [os.environ[name] for name in SIZES if os.environ.get(name)]
    return bool(sizes) and sizes[0].isdigit() and int(sizes[0]) > 0


def recording() -> str:
    """A sentence that says where the recording of this process was written; empty where the recorder is off."""
    c10d: Any = torch._C._distributed_c10d
    if not switched_on() or not hasattr(c10d, "_dump_fr_trace"):
        return ""
    given = [os.environ[name] for name in PATHS if os.environ.get(name)]
    prefix = given[0] if given else str(Path.home() / ".cache" / "torch" / "comm_lib_trace_rank_")
    path = Path(f"{prefix}{dist.get_rank() if dist.is_initialized() else 0}")
    with suppress(OSError, RuntimeError):
        write_bytes(path.parent, path.name, c10d._dump_fr_trace())
        return f" torch's flight recorder: {path} (torchfrtrace reads the files of all ranks)."
    return f" torch's flight recorder could not be written to {path}."
