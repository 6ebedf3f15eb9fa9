"""spelled: ops that fuse an attention with what is around it, written out as the ops that the other passes know.

    _transformer_encoder_layer_fwd(x, ..)        the layer: norms, linears, scaled_dot_product_attention
    einsum("bqhd,bkhd->bhqk", a, b)              permute(matmul(permute(a), permute(b)))

Contract: equal values and gradients.  An einsum that is no batched product of two tensors stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass.passes.factors import args_of

aten = torch.ops.aten
KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id")


def spell_out(gm: GraphModule) -> None:
    """Rewrites `gm` in place."""
    for node in list(gm.graph.nodes):
        if node.target is aten._transformer_encoder_layer_fwd.default:
            _replace(node, encoder_layer, _bound(node))
        elif node.target is aten.einsum.default and (product := _product(*args_of(node)[:2])) is not None:
            _replace(node, product, dict(zip("ab", args_of(node)[1], strict=True)))


def _replace(node: Node, function: Callable[..., Tensor], args: dict[str, Any]) -> None:
    """`function` of `args` in the place of `node`."""
    nodes = {name: value for name, value in args.items() if isinstance(value, Node)}
    rest = {name: value for name, value in args.items() if name not in nodes}

    def run(*tensors: Tensor) -> Tensor:
        return function(**dict(zip(nodes, tensors, strict=True)), **rest)

    fakes = [n.meta["val"] for n in nodes.values()]
    with fakes[0].fake_mode, torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    for inner in traced.graph.nodes:
        inner.meta.update({k: node.meta[k] for k in KEPT_META if k in node.meta})
    places = traced.graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        out = node.graph.graph_copy(traced.graph, dict(zip(places, nodes.values(), strict=True)))
    assert isinstance(out, Node)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)


# --- the inference op of nn.TransformerEncoderLayer -------------------------------------------------------------------


def _bound(node: Node) -> dict[str, Any]:
    schema: Any = node.target
    names = [a.name for a in schema._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """One layer of nn.TransformerEncoder."""

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = F.linear(x, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, embed_dim // num_heads)
        q, k, v = (qkv.select(2, i).transpose(1, 2) for i in range(3))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(mask, mask_type))
        return F.linear(y.transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias)

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(first(src))
        return x + feed(second(x))
    x = first(src + attend(src))
    return second(x + feed(x))


def _seen(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """The op's mask, in which what is not 0 is left out: (Sq, Sk), (B, Sk) or (B, H, Sq, Sk) for the kinds 0, 1, 2."""
    if mask is None:
        return None
    seen = mask.to(torch.bool).logical_not()
    return seen[:, None, None, :] if kind == 1 else seen


# --- einsum -----------------------------------------------------------------------------------------------------------


def _product(equation: str, operands: Sequence[Node]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The einsum as a batched product of two tensors: one index of each left, one summed; None where it is not one."""
    terms, _, result = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    if len(operands) != 2 or "." in equation or "," in right or any(len(set(t)) != len(t) for t in (left, right)):
        return None
    batch = [c for c in result if c in left and c in right]
    rows, columns = ([c for c in result if c in t and c not in batch] for t in (left, right))
    summed = [c for c in left if c in right and c not in result]
    if [len(rows), len(columns), len(summed)] != [1, 1, 1] or {*left, *right} != {*result, *summed}:
        return None
    order = [*batch, *rows, *columns]

    def product(a: Tensor, b: Tensor) -> Tensor:
        a = _permuted(a, [left.index(c) for c in (*batch, *rows, *summed)])
        b = _permuted(b, [right.index(c) for c in (*batch, *summed, *columns)])
        return _permuted(torch.matmul(a, b), [order.index(c) for c in result])

    return product


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    return x if order == sorted(order) else x.permute(order)
