"""failures: an analysis that fails on one op is not the end of a compilation.

    with failures.of("propagate", node):      # on an exception: a warning that names the op, and on we go
        dims = rule.dims(sweep, node, note)

A rule that raises is a fault of ringpass.  The op then runs as the model wrote it, on all tokens, which is right for
every op; a warning names it and asks for a report, and `strict` refuses it.  What the user did wrong still raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.fx import Node

from ringpass.errors import RingpassError, UnsupportedError
from ringpass.nodes import op_name, source_line

log = logging.getLogger("ringpass")


class CannotWriteError(Exception):
    """The record of a node's op failed on local tokens: the node must run replicated."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass
class Failures:
    """The ops on which an analysis failed, in one compilation.

    `strict`: the first one raises UnsupportedError.  `tell`: is given the text of each; None: it is logged.
    """

    strict: bool = False
    nodes: list[Node] = field(default_factory=list)
    tell: Callable[[str], None] | None = None

    @contextmanager
    def of(self, stage: str, node: Node) -> Iterator[None]:
        """Turns an exception of the `stage` on `node` into a warning; errors of ringpass pass.

        Raises UnsupportedError under `strict`.
        """
        try:
            yield
        except RingpassError:
            raise
        except Exception as error:
            self.note(stage, node, error)

    def note(self, stage: str, node: Node, error: BaseException | None) -> None:
        """Notes that the `stage` failed on `node`.  Raises UnsupportedError under `strict`."""
        where = source_line(node)
        text = (
            f"ringpass failed to analyse {op_name(node)}{f' at {where}' if where else ''} ({stage}: "
            f"{type(error).__name__}: {error}). This is a fault of ringpass: please report it with this text and "
            f"{node.format_node()}"
        )
        if self.strict:
            raise UnsupportedError(f"{text}. strict=True refuses to run the op on all tokens of every rank") from error
        self.nodes.append(node)
        text = f"{text}. The op runs on all tokens on every rank: same numbers, more memory"
        if self.tell is not None:
            self.tell(text)
        else:
            log.warning("%s", text, exc_info=error)
