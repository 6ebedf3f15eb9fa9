"""Reading the code that Inductor generates: where transfers start, what hides them, and how many are in flight.

Torch may move a start or a wait, and releases differ in how far: `check_transfers` holds what is true of any order.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ringpass.ops import primitives

TILES = (primitives.attention_tile, primitives.attention_tile_backward)
NUMEL, DST, SRC, TAG = 1, 3, 4, 5  # positions of these arguments of an exchange


@dataclass(frozen=True)
class RingCall:
    """A call of one of the package's operators in generated code.

    `op`: its name without namespace; `result`: the variable that takes what it returns, "" if none does.
    """

    op: str
    line: int
    result: str
    args: Sequence[ast.expr]


@dataclass(frozen=True)
class Transfer:
    """An exchange in generated code, by line numbers.

    `about`: (elements received, destination, source, tag); `hidden_by`: the tiles that the graph puts between start
    and wait; `read_by`: those that read what was received.
    """

    about: tuple[Any, ...]
    start: int
    wait: int
    hidden_by: tuple[int, ...]
    read_by: tuple[int, ...]

    @property
    def gradients(self) -> bool:
        """Whether it brings gradients of keys and values, not keys and values."""
        return bool(self.about[-1] % 2)


def ring_calls(code: str) -> list[RingCall]:
    """The calls of the package's operators in generated code, in order."""
    tree = ast.parse(code)
    assigned = {id(n.value): ast.unparse(n.targets[0]) for n in ast.walk(tree) if isinstance(n, ast.Assign)}
    found = []
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name.startswith("torch.ops.ringpass.") and name.endswith(".default"):
            found.append(RingCall(name.split(".")[-2], node.lineno, assigned.get(id(node), ""), node.args))
    return sorted(found, key=lambda call: call.line)


def transfers(code: str) -> list[Transfer]:
    """The exchanges in generated code, in order of their starts.  Each is waited for once."""
    firsts = {
        ast.unparse(node.value): ast.unparse(node.targets[0])
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
    }
    calls, found = ring_calls(code), []
    tiles = [call for call in calls if call.op.startswith("attention_tile")]
    for call in calls:
        if call.op == "exchange":
            received = firsts[f"{call.result}[0]"]
            (wait,) = [x.line for x in calls if x.op == "wait" and received in _names(x.args)]
            about = tuple(ast.literal_eval(call.args[i]) for i in (NUMEL, DST, SRC, TAG))
            hidden_by = tuple(x.line for x in tiles if received in _names(x.args[-1:]))
            read_by = tuple(x.line for x in tiles if received in _names(x.args[:-1]))
            found.append(Transfer(about, call.line, wait, hidden_by, read_by))
    return found


def most_in_flight(some: Sequence[Transfer]) -> int:
    """The largest number of these transfers that are started and not yet waited for."""
    return max((sum(x.start <= now.start < x.wait for x in some) for now in some), default=0)


def check_transfers(code: str, graph: GraphModule) -> None:
    """Asserts that code generated from a lowered graph overlaps as that graph does, in any order that torch prefers.

    Transfers start in the graph's order, which is global; each starts before the tiles that hide it, ends after them
    and before the tiles that read it; at most two blocks of keys and one of gradients are in flight.
    """
    found = transfers(code)
    exchanges = [n for n in graph.graph.nodes if n.target is primitives.exchange]
    assert found and [x.about for x in found] == [tuple(n.args[i] for i in (NUMEL, DST, SRC, TAG)) for n in exchanges]
    for x in found:
        assert all(x.start < tile < x.wait for tile in x.hidden_by) and all(x.wait < tile for tile in x.read_by), x
    hiding = [sum(user.target in TILES for received in n.users for user in received.users) for n in exchanges]
    assert any(hiding) and [len(x.hidden_by) for x in found] == hiding
    assert most_in_flight([x for x in found if not x.gradients]) <= 2
    assert most_in_flight([x for x in found if x.gradients]) <= 1


def _names(args: Sequence[ast.expr]) -> set[str]:
    return {node.id for arg in args for node in ast.walk(arg) if isinstance(node, ast.Name)}
