"""Every public module, class, function, method and property of the package says what it does.

Public: no name on the way to it starts with an underscore, and it is not defined inside a function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.package_layers import modules

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PATHS = modules()


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """The dotted names of the public definitions in `body`, and in its classes, that have no docstring."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"{prefix}{node.name}:{node.lineno}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("module", sorted(PATHS))
def test_public_names_have_docstrings(module: str) -> None:
    tree = ast.parse(PATHS[module].read_text())
    assert ast.get_docstring(tree), f"{PATHS[module]} has no docstring"
    missing = list(undocumented(tree.body))
    assert not missing, f"{PATHS[module]} has public names without a docstring: {', '.join(missing)}"
