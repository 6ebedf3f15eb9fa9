"""What is made for people to look at, reports and dumps: a fault in their making is no reason to end a run.

with side_product("the report of graph 0"):
    ...                                     # an error here becomes one warning: what is missing, and why

Errors of the system (a full disk, a path that cannot be written) do end it, on all ranks: files were asked for.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

log = logging.getLogger("ringpass")


@contextmanager
def side_product(what: str) -> Iterator[None]:
    """Makes `what`; an error leaves the block by a warning that says that it is missing, once for each error.

    Raises OSError as it is.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        first = (str(error).strip().splitlines() or [""])[0][:200]
        _warn_once(what, f"{type(error).__name__}: {first}{where}")
        log.debug("%s", what, exc_info=error)


@cache
def _warn_once(what: str, why: str) -> None:
    log.warning("%s is missing, or that of an earlier stage, since it cannot be made: %s. The run goes on", what, why)
