"""Imports run downwards: each package imports only packages of lower layers, and no two modules import each other.

`LAYERS` (tests/support/package_layers.py) is the table of docs/architecture.md as data.  Packages of one layer may not
import each other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from tests.support.package_layers import LAYERS, modules
from tests.support.repository import ROOT

LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


def imports(path: Path, names: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ringpass":
            base = (node.module or "").removeprefix("ringpass").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                if inner in names or base in names:
                    yield inner if inner in names else base


def package_of(module: str) -> str:
    """The package that a module is in, a stage's package for the stages in `passes`."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "passes" else 1])


def graph() -> nx.DiGraph[str]:
    """An edge from each module to each module that it imports."""
    found, out = modules(), nx.DiGraph()
    for module, path in found.items():
        out.add_edges_from((module, other) for other in imports(path, set(found)))
    return out


def test_every_module_is_in_a_layer() -> None:
    assert {package_of(module) for module in modules()} == set(LAYER_OF)


def test_imports_run_downwards() -> None:
    across = [(a, b) for a, b in graph().edges if package_of(a) != package_of(b)]
    wrong = [f"{a} imports {b}" for a, b in across if LAYER_OF[package_of(a)] <= LAYER_OF[package_of(b)]]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other() -> None:
    assert not list(nx.simple_cycles(graph()))


def test_files_are_short() -> None:
    long = {str(path): n for path in modules().values() if (n := len(path.read_text().splitlines())) > 500}
    assert not long


def test_test_modules_do_not_import_each_other() -> None:
    """What they share is in tests/support."""
    shared = re.compile(r"^\s*(from|import) tests\.(\w+\.)*test_", re.MULTILINE)
    assert not [str(path) for path in (ROOT / "tests").rglob("*.py") if shared.search(path.read_text())]
