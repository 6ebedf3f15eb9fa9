"""Progress of a command on stderr: a bar where rich is installed, else a line for each step.

with progress(3) as advance:
    advance("kernel call")      # begins a step
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, hidden: bool = False) -> Iterator[Callable[[str], None]]:
    """Gives the function that begins a step of `total`, which the text names; `hidden`: nothing is shown."""
    if hidden:
        yield lambda text: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda text: print(f"ringpass: {text} ..", file=sys.stderr, flush=True)
        return
    columns = TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, begun = bar.add_task("start", total=total), 0

        def advance(text: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=text)
            begun += 1

        yield advance
        bar.update(task, description="done", completed=total)
