"""lower: the forward and backward graphs that AOTAutograd derived -> the graphs that are compiled.

    replicate                 removed: it is an identity once autograd has run
    ring_attention,           unrolled: traced through `ring.forward`, so that each send, receive, wait, mask, tile and
    ring_attention_backward     merge is a node, named after its step and tile.  Rolled, one node whose body runs the
                                same code: above the unroll limit (the larger of P and the number of tiles, summed over
                                all sites), with a symbolic length, or where data of each call prunes the schedule
    reduce_list               its start, after the last gradient that it sums, and its wait (`gradient_sums`)
    pool_tokens,              their starts, after what they send, and their waits, before what reads them (`pooling`)
    return_tokens
    merge                     kept in the graph that is shown; `inline_arithmetic` then replaces it by ATen arithmetic
    block_lists               equal ones, of layers with the same mask, become one node
    shard, gather             kept, renamed permute_<layout>, restore_<layout>
    permute                   kept, renamed permute_hilbert_<grid>, its inverse restore_hilbert_<grid>

Contract: runs on the forward and on the backward graph of every compilation, nested graphs included.  No attention that
the plan partitioned may be left; no `replicate` either.  Equal calls (same shapes, same constants) are traced once.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass import ops
from ringpass.errors import UnsupportedError
from ringpass.nodes import symbolic
from ringpass.ops import masked_steps, primitives
from ringpass.ops.accumulate import LABEL
from ringpass.ops.attention import INDEX
from ringpass.passes.lower.gradient_sums import start_early
from ringpass.passes.lower.pooling import start_pooling_early
from ringpass.passes.op_rules.attention import attentions
from ringpass.profiling import site_label
from ringpass.schedule.site import SITES, lookup

ROLLED: dict[Any, Callable[..., Any]] = {
    ops.ring_attention: ops.ring_attention_body,
    ops.ring_attention_backward: ops.ring_attention_backward_body,
}
ARITHMETIC = {primitives.merge: primitives.merge_body}
"""`ROLLED`: ops whose body is the loop of a ring; `ARITHMETIC`: ops whose body the compiler should fuse."""
OF_SITE = "ringpass_site"
"""In `meta` of what an attention was unrolled to: its number in the graph."""
SITE: dict[Any, int] = {ops.ring_attention: 4, ops.ring_attention_backward: 7}  # their first argument after the leaves
REORDERING = {ops.shard: "permute", ops.gather: "restore"}
LABELLED: dict[Any, int] = {primitives.exchange: 7, primitives.start_gather: 3}  # position of what profilers call them
LAYOUT = 4  # position of the layout's name, and of the order that `permute` takes, in their arguments


def lower(graph: Graph, unroll_limit: int, left: int) -> None:
    """Rewrites `graph` in place.  `left`: how many attentions the plan leaves replicated, as the model wrote them.

    Raises UnsupportedError where more are left: an attention that was not partitioned would see local tokens only.
    """
    _refuse_leftovers(graph, left)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is ops.replicate:
            _drop_replicate(graph, node)
        elif node.op == "call_function" and node.target in REORDERING:
            node._rename(f"{REORDERING[node.target]}_{str(node.args[LAYOUT]).split()[0]}")
        elif node.op == "call_function" and node.target is ops.permute:
            curve = str(node.args[LAYOUT]).replace(" after ", "_prefix").replace(" ", "_")
            node._rename(f"{'restore' if node.args[LAYOUT + 1] else 'permute'}_{curve}")
    start_early(graph)
    start_pooling_early(graph)
    sites = [n for n in graph.nodes if n.op == "call_function" and n.target in ROLLED]
    fixed = [n for n in sites if not SITES[_key(n)[0]].pruning]
    if not any(symbolic(n) for n in sites) and sum(map(_size, fixed)) <= unroll_limit:
        traced: dict[str, GraphModule] = {}
        for node in fixed:
            _unroll(graph, node, traced)
    _share_block_lists(graph)
    graph.lint()


def inline_arithmetic(graph: Graph) -> None:
    """Replaces each `merge` by the ATen ops of its body.  In place; the last step before code generation."""
    traced: dict[str, GraphModule] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ARITHMETIC:
            _unroll(graph, node, traced)
    graph.lint()


def lower_module(gm: GraphModule, unroll_limit: int, left: int) -> GraphModule:
    """Lowers a graph module and every graph module inside it."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            lower(module.graph, unroll_limit, left)
            module.recompile()
    return gm


def _refuse_leftovers(graph: Graph, left: int) -> None:
    found = attentions(graph)
    if len(found) > left:
        names = ", ".join(f"{n.name} ({n.target})" for n in found)
        raise UnsupportedError(
            f"{len(found)} attention ops are left after partitioning where the plan has {left}: {names}. "
            "They would attend to this rank's tokens only. This is a fault of ringpass: please report it with the dump."
        )


def _drop_replicate(graph: Graph, node: Node) -> None:
    values: Any = node.args[0]
    for user in list(node.users):
        assert user.target is operator.getitem, user
        user.replace_all_uses_with(values[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _key(node: Node) -> tuple[str, Any, Any, int]:
    """(key, queries, keys, index) of a ring operator: which planned site, for how many tokens, of which attention."""
    about: Any = node.args[SITE[node.target] :]
    _, key, queries, keys, index, _ = about
    return str(key), queries, keys, int(index)


def _size(node: Node) -> int:
    """What unrolling a ring operator costs: the larger of P and its number of tiles."""
    site = lookup(*_key(node)[:3])
    return max(site.world, sum(len(step.tiles) for group in site.groups for step in group.program.steps))


def _unroll(graph: Graph, node: Node, traced: dict[str, GraphModule]) -> None:
    """Replaces an operator by the nodes of its body."""
    operands = list(dict.fromkeys(node.all_input_nodes))
    key = _text(node, operands)
    if key not in traced:
        traced[key] = _trace(node, operands)
    body, copies = traced[key], dict[Node, Any]()
    places = iter(operands)
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(places)
            elif inner.op == "output":
                results: Any = map_arg(inner.args[0], copies.__getitem__)
            else:
                copies[inner] = _copy(graph, inner, copies, node)
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        assert user.target is operator.getitem, user
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _share_block_lists(graph: Graph) -> None:
    """Makes equal `block_lists`, and equal lists of theirs, one node: none writes to the leaves that they read."""
    first: dict[str, Node] = {}
    for node in list(graph.nodes):
        lists = node.args[0] if node.target is operator.getitem else node
        if isinstance(lists, Node) and lists.target is masked_steps.block_lists:
            kept = first.setdefault(repr((node.target, node.args)), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _copy(graph: Graph, inner: Node, copies: dict[Node, Any], origin: Node) -> Node:
    assert inner.op == "call_function", f"{inner.format_node()} is no call: the ring's body must not capture tensors"
    new = graph.node_copy(inner, copies.__getitem__)
    new.meta = {**inner.meta, **{k: v for k, v in origin.meta.items() if k in ("stack_trace", "nn_module_stack")}}
    if origin.target in ROLLED:
        new.meta[OF_SITE] = _key(origin)[3]
    text = inner.meta.get(LABEL)
    if text:
        new._rename(_readable(text, inner))
        if origin.target in ROLLED:  # the trace is that of an equal site, which may be another one
            _relabel(new, f"{site_label(_key(origin)[3])} {text}")
    return new


def _relabel(node: Node, label: str) -> None:
    """Gives a node the `label` that profilers show, if its operator takes one."""
    if "label" in node.kwargs:
        node.kwargs = {**node.kwargs, "label": label}
    elif node.target in LABELLED:
        node.update_arg(LABELLED[node.target], label)


def _readable(text: str, inner: Node) -> str:
    """`attention_step1_q0to4_k0to2` for the op that a label is about, `.._op` for the arithmetic around it."""
    custom = isinstance(inner.target, torch._ops.OpOverload) and inner.target.namespace == "ringpass"
    return text if custom else f"{text}_{re.sub(r'_[0-9]+$', '', inner.name)}"


def _text(node: Node, operands: list[Node]) -> str:
    """Text that is equal for calls whose traces are equal."""
    number, args = {n: i for i, n in enumerate(operands)}, node.args
    if node.target in ROLLED:  # without the number of the attention
        args = (*args[: SITE[node.target] + INDEX], *args[SITE[node.target] + INDEX + 1 :])
    fakes = [(v.shape, v.stride(), v.dtype, v.device) for v in (n.meta["val"] for n in operands)]
    return repr((node.target, map_arg(args, lambda n: f"%{number[n]}"), fakes))


def _trace(node: Node, operands: list[Node]) -> GraphModule:
    """The graph of an operator's body on the node's own shapes."""
    body: Any = {**ROLLED, **ARITHMETIC}[node.target]
    fakes = [n.meta["val"] for n in operands]
    mode = fakes[0].fake_mode

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(operands, tensors, strict=True))
        out = body(*map_arg(node.args, given.__getitem__))
        return (out,) if isinstance(out, torch.Tensor) else tuple(out)

    with mode, torch.no_grad():
        fresh = [torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device=f.device) for f in fakes]
        return make_fx(run, decomposition_table=select_decomp_table())(*fresh)
