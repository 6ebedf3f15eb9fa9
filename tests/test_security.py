"""Nothing that is read is run: the names that unpickle or evaluate stay out of the package."""

from __future__ import annotations

import ast

import pytest

from tests.support.package_layers import modules

REFUSED = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "eval", "exec", "literal_eval",
    "parse_expr", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
"""Names of modules and functions."""
READ_BY_TORCH = {("torch", "load")}
STRICT = "sympify"  # of sympy: evaluates texts, unless strict=True


def found(text: str) -> set[str]:
    """The refused names that a module uses."""
    out = set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            out |= {part for alias in node.names for part in alias.name.split(".")} & REFUSED
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            out |= {*names} & REFUSED
        elif isinstance(node, ast.Name):
            out |= {node.id} & REFUSED
        elif isinstance(node, ast.Attribute):
            out |= {node.attr} & REFUSED if node.attr != "eval" else set()  # Module.eval sets a mode
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in READ_BY_TORCH:
                out.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and STRICT in ast.unparse(node.func):
            strict = any(k.arg == "strict" and ast.unparse(k.value) == "True" for k in node.keywords)
            out |= set() if strict else {STRICT}
    return out


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_is_unpickled_or_evaluated(name: str) -> None:
    assert not found(modules()[name].read_text())


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load('x')",
        "dist.all_gather_object(a, b)",
        "sympy.sympify(text)",
        "import yaml",
        "ast.literal_eval(x)",
    ],
)
def test_the_check_finds_what_it_should(text: str) -> None:
    assert found(text)
