"""Logging calls in models: Dynamo skips them, where it would otherwise break the graph.

Importing `ringpass.backend` or calling `ringpass.explain` tells it so
(`torch._dynamo.config.ignore_logging_functions`).
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch


class LoggingCalls(set[Any]):
    """Functions that Dynamo skips: those already named, warnings.warn, and the methods of loggers that emit a message.

    Methods that libraries add to logging.Logger later (transformers' `warning_once`) count too.
    """

    METHODS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "log", "warning_once", "info_once")

    def __contains__(self, function: object) -> bool:
        name = getattr(function, "__name__", "")
        emits = name in self.METHODS and getattr(logging.Logger, name, None) is function
        return emits or function is warnings.warn or super().__contains__(function)


def skip_logging_calls() -> None:
    """Tells Dynamo to skip logging calls, once per process."""
    config = torch._dynamo.config
    if not isinstance(config.ignore_logging_functions, LoggingCalls):
        config.ignore_logging_functions = LoggingCalls({*config.ignore_logging_functions, warnings.warn})
