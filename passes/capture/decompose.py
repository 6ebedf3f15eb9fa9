"""decompose: ops that fuse an attention with what is around it, as the ops that the other passes know.

    _transformer_encoder_layer_fwd(x, ..)        the layer: norms, linears, scaled_dot_product_attention
    einsum("bqhd,bkhd->bhqk", a, b)              permute(matmul(permute(a), permute(b)))
    conv2d(x, w, stride=16)                      a linear layer of patches of 16 x 16
    narrow(x, 1, 0, 77)                          a slice
    split(x, [77, 256], 1)                       a slice for each part, where it is not channels that are split
    x.view(B, 4, S // 4, D).unbind(1)            a slice for each of the four
    roll(x, 1, 1)                                cat([x[:, -1:], x[:, :-1]], 1)
    select_scatter(x, y, 1, 0)                   slice_scatter(x, y.unsqueeze(1), 1, 0, 1)
    masked_scatter(x, mask, y), x[mask] = y      where(mask, y[cumsum(mask) - 1], x), for a mask of whole rows
    x[:, [2, 5]] = y                             index_copy(x, 1, [2, 5], y)
    x.unfold(1, 4, 1)                            stack([x[:, :-3], x[:, 1:-2], x[:, 2:-1], x[:, 3:]], -1)
    permute_copy(x, ..)                          permute(x, ..)
    swapaxes(x, 1, 2), concat([a, b], 1)         transpose(x, 1, 2), cat([a, b], 1): what torch itself writes them as
    conv1d(x, w, padding="same")                 conv1d(pad(x, ..), w), as where it makes more tokens than it reads
    any other op without a rule                  what torch itself writes it as, if all of that has rules

Contract: equal values and gradients.  An einsum that is no batched product of two tensors stays as it is.  Which ops
the other passes know is `has_rule`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ringpass.nodes import KEPT_META, args_of, bound_of, insert_before, mutates, tags_of, tensors_of, traced
from ringpass.passes.capture.capture import Captured
from ringpass.passes.capture.functionalize import Functionaliser
from ringpass.passes.capture.splits import SPLITS, erase_unused, selected_part, sliced, unbound
from ringpass.passes.failures import Failures

aten = torch.ops.aten
HasRule = Callable[[Node], bool]


def decompose(captured: Captured, has_rule: HasRule, failures: Failures | None = None) -> Captured:
    """Rewrites the graph of `captured` in place, and returns `captured`.

    `has_rule`: whether the dims of a node's op are understood.  A node whose rewriting fails stays as it is.
    """
    gm, failures = captured.gm, failures or Failures()
    for node in list(gm.graph.nodes):
        with failures.of("decompose", node):
            _rewrite(node, has_rule)
    gm.graph.lint()
    gm.recompile()
    return captured


def _rewrite(node: Node, has_rule: HasRule) -> None:
    """One node: its own rewriting, or torch's decomposition where nothing is known of its op."""
    rewrite = REWRITES.get(node.target)
    rewritten = (rewrite is not None and rewrite(node)) or _as_view(node)
    if not rewritten and not has_rule(node) and _is_plain(node):
        _inline(node, has_rule)


def _replace(node: Node, function: Callable[..., Tensor], args: dict[str, Any]) -> Node:
    """`function` of `args` in the place of `node`."""
    nodes = {name: value for name, value in args.items() if isinstance(value, Node)}
    rest = {name: value for name, value in args.items() if name not in nodes}

    def run(*tensors: Tensor) -> Tensor:
        return function(**dict(zip(nodes, tensors, strict=True)), **rest)

    given = list(nodes.values())
    out = _put(node, traced(run, given, pre_dispatch=True), given)
    assert isinstance(out, Node)
    return out


def _put(node: Node, graph: Graph, given: Sequence[Node]) -> Any:
    """`graph` of the values `given` in the place of `node`, or of the nodes that pick its results."""
    for inner in graph.nodes:
        inner.meta.update({k: node.meta[k] for k in KEPT_META if k in node.meta})
    out = insert_before(node, graph, given)
    if isinstance(out, Node):
        node.replace_all_uses_with(out)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(out[args_of(user)[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
    return out


def _is_plain(node: Node) -> bool:
    """Whether a node calls one of torch's ops on tensors alone, some floating-point, without random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    tensors = all(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
    if not tensors or torch.Tag.nondeterministic_seeded in tags_of(node) or mutates(node):
        return False
    values = [x for n in (node, *node.all_input_nodes) for x in tensors_of(n)]
    return bool(node.all_input_nodes) and any(x.is_floating_point() or x.is_complex() for x in values)


def _inline(node: Node, has_rule: HasRule) -> None:
    """What torch itself writes an op as: below pre-dispatch, or by its decomposition; the first that has all rules."""
    target: Any = node.target
    given = list(node.all_input_nodes)
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    for function in filter(None, (target if composite else None, decomposition_table.get(target))):
        try:
            graph = _traced_call(function, node, given)
        except Exception:  # torch's own writing does not take these arguments, or needs their values
            continue
        calls = [n for n in graph.nodes if n.op == "call_function"]
        if all(has_rule(n) and n.target is not aten.copy.default for n in calls):  # which has no derivative
            _put(node, graph, given)
            return


def _traced_call(function: Callable[..., Any], node: Node, given: list[Node]) -> Graph:
    """The functional graph of `function` with the arguments of `node`.  Raises where it has none."""

    def run(*tensors: Tensor) -> Any:
        values = dict(zip(given, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        return function(*args, **kwargs)

    graph = traced(run, given)
    if any(map(mutates, graph.nodes)):
        Functionaliser(GraphModule(torch.nn.Module(), graph), given[0].meta["val"].fake_mode).run()
    return graph


# --- the inference op of nn.TransformerEncoderLayer -------------------------------------------------------------------


def _layer(node: Node) -> bool:
    _replace(node, encoder_layer, bound_of(node))
    return True


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """One layer of nn.TransformerEncoder on `src` (B, S, embed_dim), with the arguments of the fused op."""

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


# --- narrows ---------------------------------------------------------------------------------------------------------


def _narrowed(node: Node) -> bool:
    """A narrow as the slice that it is, where it starts at a known token."""
    x, dim, start, length = args_of(node)
    if all(isinstance(n, int) for n in (start, length)) and start >= 0:
        node.target, node.args = aten.slice.Tensor, (x, dim, start, start + length)
    return True


# --- convolutions of patches ------------------------------------------------------------------------------------------

FLATTENING = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)


def _patched(node: Node) -> bool:
    """A convolution of patches as a linear layer of each."""
    if _of_patches(node):
        _flattened(_replace(node, patches, dict(zip(("x", "weight", "bias"), node.args, strict=False))))
        return True
    return False


def _of_patches(node: Node) -> bool:
    """Whether a convolution takes patches side by side, of a batch of known sizes."""
    bound = bound_of(node)
    shape, kernel = bound["input"].meta["val"].shape, list(bound["weight"].meta["val"].shape[2:])
    stride, padding, dilation = (
        _each(bound.get(name, default), kernel) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    plain = stride == kernel and not any(padding) and set(dilation) <= {1} and bound.get("groups", 1) == 1
    return plain and len(shape) == len(kernel) + 2 and all(isinstance(n, int) for n in (*shape[1:], *kernel))


def _each(value: Any, kernel: list[int]) -> list[int]:
    listed = list(value) if isinstance(value, list | tuple) else [value]
    return listed * len(kernel) if len(listed) == 1 else listed


def patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution whose stride is its kernel (k1, ..), as a linear layer of each patch.

    (B, C, n1 * k1 + rest, ..) -> (B, D, n1, ..); `weight` is (D, C, k1, ..), `bias` (D,).
    """
    kernel, dims = weight.shape[2:], range(weight.ndim - 2)
    counts = [n // k for n, k in zip(x.shape[2:], kernel, strict=True)]
    for d in dims:
        if x.shape[2 + d] % kernel[d]:
            x = x.narrow(2 + d, 0, counts[d] * kernel[d])
    split = [n for pair in zip(counts, kernel, strict=True) for n in pair]
    x = x.reshape(-1, x.shape[1], *split).permute(0, *(2 + 2 * d for d in dims), 1, *(3 + 2 * d for d in dims))
    y = F.linear(x.reshape(-1, math.prod(counts), weight[0].numel()), weight.reshape(weight.shape[0], -1), bias)
    return y.transpose(1, 2).reshape(-1, weight.shape[0], *counts)


def _flattened(grid: Node) -> None:
    """A view of a grid of patches is one of their row."""
    for user in list(grid.users):
        if user.target in FLATTENING:
            with user.graph.inserting_before(user):
                row = user.graph.call_function(aten.reshape.default, (grid.args[0], list(user.meta["val"].shape)))
            row.meta.update(user.meta)
            user.replace_all_uses_with(row)
            user.graph.erase_node(user)
    erase_unused(grid)


# --- convolutions that pad, rolls -------------------------------------------------------------------------------------


def _padded(node: Node) -> bool:
    """A conv1d that makes more tokens than it reads, or names its padding by a word, as a pad and a conv1d."""
    sides = _sides(node)
    if sides is not None:
        _replace(node, padded, {**bound_of(node), "padding": sides})
    return sides is not None


def _sides(node: Node) -> tuple[int, int] | None:
    """How much a conv1d of stride 1 pads on either side; None where it need not be written out."""
    bound = bound_of(node)
    (kernel,) = bound["weight"].meta["val"].shape[2:]
    (stride,), (dilation,) = (_each(bound.get(name, 1), [kernel]) for name in ("stride", "dilation"))
    more, given = dilation * (kernel - 1), bound.get("padding", 0 if node.target is aten.conv1d.default else "valid")
    if stride != 1 and given != "valid":
        return None
    if isinstance(given, str):
        return (more // 2, more - more // 2) if given == "same" else (0, 0)
    (both,) = _each(given, [kernel])
    unbatched = bound["input"].meta["val"].ndim == 2
    return (both, both) if 2 * both > more or unbatched else None


def padded(input: Tensor, weight: Tensor, padding: tuple[int, int], bias: Tensor | None = None, **how: Any) -> Tensor:
    """A conv1d of (B, C, S), or of (C, S), with `padding` tokens of zeros before and after.

    The padding is an op of its own, unless it is the same on both sides and adds no tokens.
    """
    if input.ndim == 2:
        return padded(input.unsqueeze(0), weight, padding, bias, **how).squeeze(0)
    low, high = padding
    extent = _each(how.get("dilation", 1), [0])[0] * (weight.shape[-1] - 1)
    if low == high and 2 * low <= extent:
        return F.conv1d(input, weight, bias, padding=low, **how)
    return F.conv1d(F.pad(input, padding), weight, bias, **how)


def _rolled(node: Node) -> bool:
    """A roll of some dims as concatenations; one of all elements, without dims, stays."""
    bound = bound_of(node)
    if bound.get("dims"):
        _replace(node, rolled, {"x": bound["self"], "shifts": bound["shifts"], "dims": bound["dims"]})
    return bool(bound.get("dims"))


def rolled(x: Tensor, shifts: Sequence[int], dims: Sequence[int]) -> Tensor:
    """`torch.roll` along `dims` by `shifts` elements, as a concatenation of two slices for each dim."""
    for by, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        by = by if abs(by) < size else by % max(size, 1)
        x = torch.cat([aten.slice(x, dim, -by, size), aten.slice(x, dim, 0, -by)], dim) if by else x.clone()
    return x


# --- copies of views, written entries ---------------------------------------------------------------------------------


def _as_view(node: Node) -> bool:
    """A copy of a view, such as `permute_copy`, as the view: no value is changed in place here."""
    packet, _, overload = str(node.target).removeprefix("aten.").rpartition(".")
    view = getattr(aten, packet.removesuffix("_copy"), None) if packet.endswith("_copy") else None
    if view is None or overload not in view.overloads():
        return False
    node.target = getattr(view, overload)
    return True


def _selected(node: Node) -> bool:
    """An entry that is written, as a slice of one: where its position is known."""
    x, src, dim, index = args_of(node)
    size = x.meta["val"].shape[dim]
    if not isinstance(index, int) or (index < 0 and not isinstance(size, int)):
        return False
    at, dim = index % size if index < 0 else index, dim % x.meta["val"].ndim
    _replace(node, entry_written, {"x": x, "src": src, "dim": dim, "at": at})
    return True


def entry_written(x: Tensor, src: Tensor, dim: int, at: int) -> Tensor:
    """`x` with its entry number `at` along `dim` replaced by `src`, which lacks the dim."""
    written: Tensor = aten.slice_scatter(x, src.unsqueeze(dim), dim, at, at + 1)
    return written


def _masked(node: Node) -> bool:
    """masked_scatter as rows of the source, looked up by how many elements of the mask come before each."""
    x, mask, source = args_of(node)
    base = args_of(mask)[0] if mask.target is aten.expand.default else mask
    full = list(x.meta["val"].shape)
    of_rows = list(base.meta["val"].shape) == [*full[:-1], 1] and all(isinstance(n, int) for n in full)
    if of_rows:
        _replace(node, rows_written, {"x": x, "mask": base, "source": source})
    return of_rows


def rows_written(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`x` (.., D) with the rows at which `mask` (.., 1) is true replaced by those of `source` (n, D), in order."""
    width = x.shape[-1]
    rows = source.reshape(-1)[: source.numel() // width * width].view(-1, width)
    if not statically_known_true(rows.shape[0] > 0):
        rows = F.pad(rows, (0, 0, 0, 1))  # a row to look up where nothing is written
    at = mask.reshape(-1).to(torch.int64).cumsum(0).view(mask.shape[:-1]) - 1
    found: Tensor = torch.where(mask, rows[at.clamp(min=0)], x)
    return found


def _put_masked(node: Node) -> bool:
    """x[mask] = values, as a choice between x and the values, or the rows that they are."""
    x, picks, values, *accumulate = args_of(node)
    mask = picks[0]
    plain = len(picks) == 1 and mask is not None and mask.meta["val"].dtype == torch.bool and not any(accumulate)
    if not plain:
        return False
    shape, many = x.meta["val"].shape, values.meta["val"].shape
    if values.meta["val"].numel() == 1:
        _replace(node, filled, {"x": x, "mask": mask, "value": values})
    elif mask.meta["val"].ndim == len(shape) - 1 and len(many) == 2 and all(isinstance(n, int) for n in shape):
        _replace(node, rows_put, {"x": x, "mask": mask, "values": values})
    else:
        return False
    return True


def _put_along(node: Node) -> bool:
    """x[:, positions] = values, of one list of positions, as an index_copy, or an index_add where they are added."""
    x, picks, values, *accumulate = args_of(node)
    at = [dim for dim, pick in enumerate(picks) if pick is not None]
    index = picks[at[0]].meta["val"]
    listed = len(at) == 1 and index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
    if not listed or not x.meta["val"].is_floating_point():  # numbers of tokens are a routing's to put
        return False
    given = {"x": x, "dim": at[0], "positions": picks[at[0]], "values": values, "add": any(accumulate)}
    _replace(node, put_along, given)
    return True


def put_along(x: Tensor, dim: int, positions: Tensor, values: Tensor, add: bool) -> Tensor:
    """`x` with `values` at `positions` (n,) of `dim`; negative ones count from the end."""
    at = torch.where(positions < 0, positions + x.shape[dim], positions).to(torch.int64)
    rows = values.expand([*x.shape[:dim], positions.shape[0], *x.shape[dim + 1 :]])
    return x.index_add(dim, at, rows) if add else x.index_copy(dim, at, rows)


def filled(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """`x` with `value`, of one element, where `mask` (its first dims) is true."""
    return torch.where(mask.view([*mask.shape, *[1] * (x.ndim - mask.ndim)]), value.reshape([]).to(x.dtype), x)


def rows_put(x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """`x` (.., D) with `values` (n, D) in the rows at which `mask` (..) is true, in order."""
    return rows_written(x, mask.unsqueeze(-1), values)


# --- windows ----------------------------------------------------------------------------------------------------------

WIDEST_WINDOW = 16
"""Elements of a window above which a slice for each would be many."""


def _windowed(node: Node) -> bool:
    """A window around each element, as a slice for each place in it."""
    x, dim, size, step = args_of(node)
    shape = x.meta["val"].shape
    if step != 1 or not 1 < size <= WIDEST_WINDOW or not shape or not isinstance(shape[dim], int):
        return False
    _replace(node, windows, {"x": x, "dim": dim % len(shape), "size": size})
    return True


def windows(x: Tensor, dim: int, size: int) -> Tensor:
    """`x.unfold(dim, size, 1)`."""
    count = x.shape[dim] - size + 1
    return torch.stack([aten.slice(x, dim, i, i + count) for i in range(size)], -1)


# --- einsum -----------------------------------------------------------------------------------------------------------


def _multiplied(node: Node) -> bool:
    """An einsum of two tensors as a batched product, if it is one."""
    equation, operands = args_of(node)[:2]
    product = _product(equation, operands)
    if product is not None:
        _replace(node, product, dict(zip("ab", operands, strict=True)))
    return product is not None


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


REWRITES: dict[Any, Callable[[Node], bool]] = {
    aten._transformer_encoder_layer_fwd.default: _layer,
    aten.einsum.default: _multiplied,
    **dict.fromkeys(SPLITS, sliced),
    aten.unbind.int: unbound,
    aten.select.int: selected_part,
    aten.narrow.default: _narrowed,
    aten.conv1d.default: lambda node: _patched(node) or _padded(node),
    aten.conv1d.padding: _padded,
    **dict.fromkeys((aten.conv2d.default, aten.conv3d.default), _patched),
    aten.roll.default: _rolled,
    aten.select_scatter.default: _selected,
    aten.masked_scatter.default: _masked,
    aten.index_put.default: lambda node: _put_masked(node) or _put_along(node),
    aten.unfold.default: _windowed,
}
"""By op: rewrites a node; False where it leaves the node to torch's own decomposition, if that is understood."""
