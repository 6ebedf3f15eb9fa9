"""Fused ops, decomposed: equal to the op, in one layer after the other and in products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ringpass.passes.capture.decompose import encoder_layer
from tests.support.pipeline_stages import captured_graph

B, S, WIDTH, HEADS = 2, 7, 16, 4
FUTURE = torch.ones(S, S, dtype=torch.bool).triu(1)
LEFT_OUT = torch.arange(S) >= torch.tensor([[5], [7]])


@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("gelu", (True, False))
@pytest.mark.parametrize(
    ("mask", "kind"), [(None, None), (FUTURE, 0), (LEFT_OUT, 1), (FUTURE.expand(B, HEADS, S, S), 2)]
)
def test_an_encoder_layer(mask: Tensor | None, kind: int | None, gelu: bool, first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, batch_first=True).double().eval()
    attention, x = layer.self_attn, torch.randn(B, S, WIDTH, dtype=torch.float64)
    args: list[Any] = [
        x, WIDTH, HEADS, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
        attention.out_proj.bias, gelu, first, 1e-5, layer.norm1.weight, layer.norm1.bias, layer.norm2.weight,
        layer.norm2.bias, layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        mask, kind,
    ]  # fmt: skip
    with torch.no_grad():
        fused = torch._transformer_encoder_layer_fwd(*args)
        assert torch.allclose(encoder_layer(*args), fused, rtol=0, atol=1e-13)


PRODUCTS = {  # equation -> whether it becomes a matmul
    "bqhd,bkhd->bhqk": True, "bhqk,bkhd->bqhd": True, "b h i d, b h j d -> b h i j": True, "ij,kj->ki": True,
    "bi,j->bij": False, "bij,bjk->bi": False, "...i,ji->...j": False,
}  # fmt: skip
SIZES = dict(zip("bhqkdij", (2, 3, 4, 5, 6, 7, 8), strict=True))


@pytest.mark.parametrize("equation", PRODUCTS)
def test_a_product(equation: str) -> None:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    shapes = [[SIZES[c] for c in term.replace("...", "b")] for term in terms]
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    found: list[tuple[set[str], Tensor]] = []

    def backend(gm: GraphModule, inputs: list[Tensor]) -> Any:
        graph = captured_graph(gm, inputs).gm
        found.append(({str(n.target) for n in graph.graph.nodes}, graph(*inputs)[0]))
        return gm

    torch._dynamo.reset()
    torch.compile(lambda a, b: torch.einsum(equation, a, b), backend=backend)(a, b)
    ((ops, value),) = found
    assert torch.allclose(value, torch.einsum(equation, a, b), rtol=0, atol=1e-12)
    assert ("aten.einsum.default" not in ops) == PRODUCTS[equation]
