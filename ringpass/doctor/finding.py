"""What a check finds, and how checks are run so that none can stop the others.

>>> Finding("torch", Status.OK, "2.13.0")
Finding(name='torch', status=<Status.OK: 'ok'>, found='2.13.0', remedy='')
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

R = TypeVar("R")


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # works, but not as well, or not everything
    PROBLEM = "problem"  # something will fail


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what to do about it."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def within(seconds: float, call: Callable[[], R]) -> R:
    """What `call` returns, or raises.  Raises TimeoutError if it has done neither after `seconds`: it is left behind.

    >>> within(5, lambda: 3)
    3
    """
    done: list[R] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            done.append(call())
        except BaseException as error:  # raised below, where it is waited for
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]


def bounded(name: str, check: Callable[[], Iterable[Finding]], seconds: float) -> list[Finding]:
    """What `check` finds; a problem instead, if it raises or has not returned after `seconds`.

    >>> bounded("clock", lambda: 1 / 0, 5)[0].found
    'the check itself failed: ZeroDivisionError: division by zero'
    """
    try:
        return within(seconds, lambda: list(check()))
    except TimeoutError as error:
        return [
            Finding(name, Status.PROBLEM, str(error), "try again with a longer --timeout; if it hangs too, report it")
        ]
    except BaseException as error:  # whatever a broken machine brings
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return [Finding(name, Status.PROBLEM, text, "please report it, with this line")]


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status of all.

    >>> worst([Finding("a", Status.OK, ""), Finding("b", Status.WARNING, "")])
    <Status.WARNING: 'warning'>
    """
    return max((x.status for x in findings), key=list(Status).index, default=Status.OK)
