"""What a check finds, and how checks are run so that none can stop the others.

>>> Finding("torch", Status.OK, "2.13.0")
Finding(name='torch', status=<Status.OK: 'ok'>, found='2.13.0', remedy='')
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


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


def bounded(name: str, check: Callable[[], Iterable[Finding]], seconds: float) -> list[Finding]:
    """What `check` finds; a problem instead, if it raises or has not returned after `seconds`.

    >>> bounded("clock", lambda: 1 / 0, 5)[0].found
    'the check itself failed: ZeroDivisionError: division by zero'
    """
    found: list[Finding] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            found.extend(check())
        except BaseException as error:  # whatever a broken machine brings
            failure.append(error)

    thread = threading.Thread(target=work, name=f"doctor: {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        text, remedy = (
            f"no answer within {seconds:g} s",
            "try again with a longer --timeout; if that hangs too, report it",
        )
        return [*found, Finding(name, Status.PROBLEM, text, remedy)]
    if failure:
        error = failure[0]
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return [*found, Finding(name, Status.PROBLEM, text, "please report it, with this line")]
    return found


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status of all.

    >>> worst([Finding("a", Status.OK, ""), Finding("b", Status.WARNING, "")])
    <Status.WARNING: 'warning'>
    """
    return max((x.status for x in findings), key=list(Status).index, default=Status.OK)
