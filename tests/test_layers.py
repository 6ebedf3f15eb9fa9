"""Imports run downwards: each room of the package imports only rooms below it, and no two modules import each other.

`LAYERS` is the picture of docs/architecture.md as data, the ground first.  Rooms of one line may not import each other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from tests.support.torchrun import ROOT

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "nodes", "precision"),
    ("masks", "kernels"),
    ("layouts", "patterns"),
    ("schedule", "comm"),
    ("ops", "reference"),
    ("lazy", "passes.capture", "passes.detect", "passes.propagate"),
    ("passes.op_rules", "shards"),
    ("config",),
    ("passes.plan",),
    ("passes.partition", "passes.dump"),
    ("passes.lower", "passes.verify"),
    ("passes.pipeline", "compiled"),
    ("backend",),
)
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """The package's modules by dotted name, without `ringpass.`; the packages themselves are left out."""
    found = {}
    for root, prefix in ((ROOT / "ringpass", ""), (ROOT / "passes", "passes.")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if "passes" not in parts and parts != ("__init__",):
                found[prefix + ".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, names: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ringpass":
            base = (node.module or "").removeprefix("ringpass").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                if inner in names or base in names:
                    yield inner if inner in names else base


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "passes" else 1])


def graph() -> nx.DiGraph[str]:
    """An edge from each module to each module that it imports."""
    found, out = modules(), nx.DiGraph()
    for module, path in found.items():
        out.add_edges_from((module, other) for other in imports(path, set(found)))
    return out


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in modules()} == set(FLOOR)


def test_imports_run_downwards() -> None:
    wrong = [f"{a} imports {b}" for a, b in graph().edges if room(a) != room(b) and FLOOR[room(a)] <= FLOOR[room(b)]]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other() -> None:
    assert not list(nx.simple_cycles(graph()))


def test_files_are_short() -> None:
    long = {str(path): n for path in modules().values() if (n := len(path.read_text().splitlines())) > 500}
    assert not long
