"""splits: ops that take consecutive parts of a dim, as slices; each rewrites one node of `decompose`.

    split(x, [77, 256], 1)                   a slice for each part
    x.view(B, 4, S // 4, D).unbind(1)        a slice for each of the four

Contract: equal values.  A rewrite says whether it has replaced its node, or the node is to stay.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ringpass.nodes import args_of, bound_of, first_of

aten = torch.ops.aten

SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


def sliced(node: Node) -> bool:
    """The parts of a split as slices, each of consecutive tokens; channels, in the last of three dims or more, stay as
    they are."""
    parts, dim = node.meta["val"], bound_of(node).get("dim", 0) % node.meta["val"][0].ndim
    sizes = [part.shape[dim] for part in parts]
    channels = dim == parts[0].ndim - 1 > 1
    if channels or not all(isinstance(n, int) for n in sizes) or len(parts) == 1:
        return True
    for user in list(node.users):
        start = sum(sizes[: args_of(user)[1]])
        with node.graph.inserting_before(user):
            bounds = dim, start, start + user.meta["val"].shape[dim]
            part = node.graph.call_function(aten.slice.Tensor, (node.args[0], *bounds))
        part.meta.update(user.meta)
        user.replace_all_uses_with(part)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def unbound(node: Node) -> bool:
    """The parts of an unbind of a view that only split a dim into parts, as slices of that dim."""
    dim = bound_of(node).get("dim", 0) % first_of(node).meta["val"].ndim
    if not _parts_of_view(node, dim):
        return False
    view = first_of(node)
    for user in list(node.users):
        _put_part(user, view, dim, args_of(user)[1])
    node.graph.erase_node(node)
    erase_unused(view)
    return True


def selected_part(node: Node) -> bool:
    """A part that a select takes of such a view, as a slice."""
    dim, position = args_of(node)[1] % first_of(node).meta["val"].ndim, args_of(node)[2]
    parts = isinstance(position, int) and _parts_of_view(node, dim)
    if parts:
        view = first_of(node)
        _put_part(node, view, dim, position)
        erase_unused(view)
    return parts


def _parts_of_view(node: Node, dim: int) -> bool:
    """Whether `node` and all like it take parts along `dim` of a view that only splits a dim there, of known sizes."""
    view = first_of(node)
    if view.target not in (aten.view.default, aten.reshape.default, aten.unflatten.int):
        return False
    before, after = list(first_of(view).meta["val"].shape), list(view.meta["val"].shape)
    fixed = dim + 1 < len(after) and all(isinstance(n, int) for n in after[dim : dim + 2])
    splits = fixed and before == [*after[:dim], after[dim] * after[dim + 1], *after[dim + 2 :]]
    along = (bound_of(n).get("dim", 0) % len(after) for n in view.users if n.target is node.target)
    return splits and len(before) - dim > 1 and all(n.target is node.target for n in view.users) and {*along} == {dim}


def _put_part(node: Node, view: Node, dim: int, position: int) -> None:
    """A slice of what was viewed in the place of `node`, the part at `position`."""
    count, size = view.meta["val"].shape[dim : dim + 2]
    start = position % count * size
    with node.graph.inserting_before(node):
        part = node.graph.call_function(aten.slice.Tensor, (view.args[0], dim, start, start + size))
    part.meta.update(node.meta)
    node.replace_all_uses_with(part)
    node.graph.erase_node(node)


def erase_unused(node: Node) -> None:
    """Erases `node` if nothing reads it any more."""
    if not node.users:
        node.graph.erase_node(node)
