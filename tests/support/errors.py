"""Errors that jobs on ranks end in, as text that a test can compare."""

from __future__ import annotations

from typing import Any


def error_message(kind: type[Exception], run: Any) -> str:
    """The message of the error of `kind` that `run` ends in; if it ends otherwise, what happened instead."""
    try:
        run()
    except kind as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} instead of {kind.__name__}: {error}"
    return "no error"
