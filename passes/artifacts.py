"""Texts of the stages for the tools of people who look at compilers: log records, and artifacts of torch's trace.

    if wanted():
        emit("plan.txt", text)

Each text is a DEBUG record of the logger `ringpass.passes.pipeline`, which TORCH_LOGS="+ringpass" shows, and, where
structured tracing is on (TORCH_TRACE), an artifact `ringpass_plan`, which tlparse lists beside those of torch.
"""

from __future__ import annotations

import logging
from pathlib import PurePath
from typing import Any

import torch

log = logging.getLogger("ringpass.passes.pipeline")
torch_logging: Any = torch._logging
structured_trace = logging.getLogger("torch.__trace")


def wanted() -> bool:
    """Whether anybody reads what `emit` gives."""
    return log.isEnabledFor(logging.DEBUG) or bool(structured_trace.handlers)


def emit(name: str, text: str) -> None:
    """Gives the `text` of the file `name` to the log and to the structured trace."""
    log.debug("%s\n%s", name, text)
    torch_logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"ringpass_{PurePath(name).stem}", "encoding": "string"},
        payload_fn=lambda: text,
    )
