"""The runner of the stages: it times, checks, dumps and compares what each hands on, so that stages do only their work.

    stages = Pipeline(directory, rank)
    captured = stages.run(capture, gm, example_inputs)      # its files, and a line of stages.txt

`stages.txt` has a line for each stage: seconds, nodes, and the calls that the graph gained and lost since the last one.
Each line is an INFO record of the logger `ringpass.passes.pipeline`; `artifacts` has the texts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

from torch.fx import GraphModule

from ringpass.nodes import op_name
from ringpass.passes import artifacts
from ringpass.passes.dump import Dump, readable, texts
from ringpass.passes.verify import verify
from ringpass.side_products import side_product

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)
NAMED_CHANGES = 12  # calls gained or lost that a line names


class Pipeline:
    """Runs the stages of one compilation on one rank.

    Texts are written under `directory` once `open` is called; without one none is made.
    """

    def __init__(self, directory: str | None, rank: int) -> None:
        self.dump = Dump(directory, rank)
        self.lines: list[str] = []
        self.emitted: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    @property
    def dumps(self) -> bool:
        """Whether texts are written."""
        return self.dump.folder is not None

    def run(self, stage: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `stage` returns.  Raises VerificationError where that breaks the stage's contract."""
        started = time.perf_counter()
        result = stage(*args, **kwargs)
        seconds = time.perf_counter() - started
        verify(stage.__name__, result)
        self._note(stage.__name__, seconds, result)
        self.write(stage.__name__, result)
        return result

    def write(self, stage: str, result: Any) -> None:
        """Writes the files that show the `result` of a stage."""
        with self._shows(stage):
            for name, text in texts(stage, result, self.dump.rank) if self.dumps or artifacts.wanted() else ():
                if self.dumps:
                    self.dump.write(name, text)
                self._emit(name, text)

    def lowered(self, name: str, gm: GraphModule) -> None:
        """Checks and dumps the lowered `forward` or `backward` graph, when torch compiles it.

        Raises VerificationError where an exchange is not waited for once.
        """
        verify("lower", gm)
        self._note(name, None, gm)
        with self._shows(name):
            if self.dumps:
                self.dump.graph(name, gm)
            if artifacts.wanted():
                self._emit(f"{name}.py", readable(gm))

    def coded(self, name: str, code: str) -> None:
        """Dumps the code that Inductor generated for the `forward` or `backward`."""
        with self._shows(f"code of the {name}"):
            if self.dumps:
                self.dump.write(f"output_code_{name}.py", code)

    def _emit(self, name: str, text: str) -> None:
        """Gives a text to `artifacts`, unless it is the one that a stage gave before under this name."""
        if self.emitted.get(name) != text:
            self.emitted[name] = text
            artifacts.emit(name, text)

    def open(self) -> None:
        """From now on texts are written, those of the stages before too."""
        self.dump.open()

    def _note(self, name: str, seconds: float | None, result: Any) -> None:
        if not self.dumps and not log.isEnabledFor(logging.INFO):
            return
        gm = getattr(result, "gm", result)
        took = f"{seconds:.3f} s" if seconds is not None else "as torch compiles it"
        line = f"{name}: {took}"
        if isinstance(gm, GraphModule):
            calls = Counter(op_name(n) for n in gm.graph.nodes if n.op == "call_function")
            line += f", {len(gm.graph.nodes)} nodes{_changes(self.calls, calls) if self.calls else ''}"
            self.calls = calls
        log.info("%s", line)
        self.lines.append(line)
        with self._shows("list of stages"):
            self.dump.write("stages.txt", "\n".join(self.lines))

    def _shows(self, stage: str) -> AbstractContextManager[None]:
        """What is made inside shows a stage to people: the run goes on without it, except on a full disk."""
        return side_product(f"what the dump, the log or the trace shows of the {stage} on rank {self.dump.rank}")


def _changes(before: Counter[str], after: Counter[str]) -> str:
    """; +3 linear.default, -1 view.default"""
    changes = {name: after[name] - before[name] for name in sorted({*before, *after}) if after[name] != before[name]}
    shown = [f"{change:+d} {name}" for name, change in list(changes.items())[:NAMED_CHANGES]]
    more = [f"and {len(changes) - NAMED_CHANGES} more ops"] if len(changes) > NAMED_CHANGES else []
    return "; " + ", ".join([*shown, *more]) if changes else "; as before"
