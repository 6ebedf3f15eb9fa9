"""Hypothesis strategies for mask expressions, and the tensors on which tests evaluate them.

The leaves: x0 bool (BATCH, KEYS), x1 int (BATCH, KEYS), x2 float (HEADS, QUERIES), x3 bool scalar.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ringpass.masks.expr import FALSE, TRUE, B, Call, Const, Expr, H, K, Load, Q, call, cast

BATCH, HEADS, QUERIES, KEYS = 2, 3, 7, 9

small = st.integers(-12, 12)
leaf_ints = st.just(Load(1, (B, K)))
leaf_bools = st.sampled_from([Load(0, (B, K)), Load(3, ())])
indices = st.sampled_from([B, H, Q, K])


def binary(ops: str, left: st.SearchStrategy[Expr], right: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """A call of one of the operators, which `ops` names."""
    return st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(ops.split()), left, right)


def integers(data: bool) -> st.SearchStrategy[Expr]:
    """Integer expressions; `data`: with loads and casts."""
    atoms: st.SearchStrategy[Expr] = indices | st.builds(Const, small)
    if data:
        atoms |= leaf_ints
    return st.recursive(
        atoms,
        lambda inner: (
            binary("add sub mul min max", inner, inner)
            | binary("floordiv mod", inner, st.builds(Const, st.integers(1, 6)))
            | st.builds(lambda a: Call("neg", (a,)), inner)
            | st.builds(lambda a: Call("abs", (a,)), inner)
            | st.builds(lambda *x: call("where", *x), binary("le eq gt", inner, inner), inner, inner)
            | st.builds(lambda c, a: Call("mul", (c, a)), binary("lt ne ge", inner, inner), inner)
        ),
        max_leaves=5,
    )


def floats(data: bool) -> st.SearchStrategy[Expr]:
    """Floating-point expressions."""
    inner = integers(data)
    number = st.builds(Const, st.sampled_from([0.1, 0.5, -0.7, 3.0, 1e-3, 1e6]))
    return (
        binary("mul add sub div mod", inner, number)
        | st.builds(lambda a: cast(a, torch.float32), inner)
        | st.builds(lambda a: Call("exp", (a,)), inner)
        | binary("floordiv mod", st.builds(lambda a, n: Call("mul", (a, n)), inner, number), number)
        | binary("add mul", binary("mul", inner, number), binary("mul", inner, number))
    )


def bools(data: bool) -> st.SearchStrategy[Expr]:
    """Boolean expressions: masks."""
    compared = binary("lt le gt ge eq ne", integers(data), integers(data))
    rounded = binary("lt le gt ge", floats(data), floats(data) | integers(data))
    added = binary("add mul", compared, compared)  # bools add up to a bool
    atoms = (
        compared
        | rounded
        | binary("eq le", added, st.builds(Const, st.integers(0, 2)))
        | st.sampled_from([TRUE, FALSE])
        | st.builds(lambda a: cast(a, torch.bool), integers(data))
    )
    if data:
        atoms |= leaf_bools
    return st.recursive(
        atoms,
        lambda inner: (
            binary("and or xor eq ne le", inner, inner)
            | st.builds(lambda a: Call("not", (a,)), inner | integers(data))
            | st.builds(lambda *x: call("where", *x), inner, inner, inner)
        ),
        max_leaves=5,
    )


def index_grid(queries: tuple[int, int] = (0, QUERIES), keys: tuple[int, int] = (0, KEYS)) -> dict[str, Tensor]:
    """The indices b, h, q and k of a tile, each along its own dim."""
    return {
        "b": torch.arange(BATCH).view(-1, 1, 1, 1),
        "h": torch.arange(HEADS).view(1, -1, 1, 1),
        "q": torch.arange(*queries).view(1, 1, -1, 1),
        "k": torch.arange(*keys).view(1, 1, 1, -1),
    }


def leaves(seed: int) -> list[Tensor]:
    """Random values of the leaves."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.rand(BATCH, KEYS, generator=g) < 0.5,
        torch.randint(-3, 10, (BATCH, KEYS), generator=g),
        torch.randn(HEADS, QUERIES, generator=g),
        torch.rand((), generator=g) < 0.5,
    ]
