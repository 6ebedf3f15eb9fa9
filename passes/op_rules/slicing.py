"""run_rules: what slices, cats, pads and convolutions along a dim do to its tokens.

    x[:, 1:], x.split([77, 256], 1)     a run of the tokens of x
    cat([cls, x], 1), pad(x, (0, 3))    x is a run of what they make
    pad(x, (1, -1)), conv1d(x, w)       each token reads those around it
    conv1d(pad(x, (2, 0)), w)           the run of what is padded that x is, or another one

Contract: as for all rules (`rules`).  A run is made only of values that are worked on and by a slice that keeps half of
them or more; tables, inputs, and the few tokens that a head reads are none.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ringpass.nodes import args_of, bound_of, first_of, hint_of, is_empty, op_name, operands_of, size_of, slice_of
from ringpass.passes.propagate.alignment import same
from ringpass.passes.propagate.factors import CONV1D, Dims, Factors, Note, Sweep, product


def same_or_whole(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Dims whose size the op leaves alone pass through; the others are needed whole.

    For repeat, and slice, pad and cat of what holds no tokens.
    """
    rank = node.meta["val"].ndim
    changed = _padded_dims(node, rank)
    operands = [sweep.dims(n) for n in operands_of(node) if n.meta["val"].shape != (0,)]  # cat skips empty 1-D tensors
    operands = [((),) * (rank - len(d)) + d for d in operands]
    out = []
    for position, n in enumerate(node.meta["val"].shape):
        columns = [d[position] for d in operands]
        if position not in changed and all(product(f) == size_of(n) for f in columns):
            out.append(sweep.broadcast([(f,) for f in columns], note)[0])
        else:
            note.whole += [f for column in columns for f in column]
            out.append(sweep.new(n))
    return tuple(out)


def sliced(sweep: Sweep, node: Node, note: Note) -> Dims:
    """A run of tokens, if it is most of them or known from elsewhere, and something works on it."""
    dims, (dim, start, _, step) = list(sweep.dims(first_of(node))), slice_of(node)
    old, size = product(dims[dim]), size_of(node.meta["val"].shape[dim])
    returned = all(user.op == "output" for user in node.users)
    if old == size or not dims[dim] or size == 1 or step != 1 or first_of(node) not in sweep.worked or returned:
        return same_or_whole(sweep, node, note)
    many, kept = (hint_of(n.meta["val"].shape[dim]) for n in (first_of(node), node))
    begin = size_of(start.meta["val"] if isinstance(start, Node) else start or 0)
    if begin.is_negative:
        begin = old + begin if many + int(begin) >= 0 else size_of(0)
    found = sweep.run_of(dims[dim], begin, size, new=2 * kept >= many)
    if found is None:
        return same_or_whole(sweep, node, note)
    sweep.runs[node] = dim
    dims[dim] = found
    return tuple(dims)


def concatenated(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Runs of tokens put together, if any of them is worked on."""
    operands = [n for n in operands_of(node) if not is_empty(n)]
    rank = node.meta["val"].ndim
    listed = [n for n in args_of(node)[0] if n in operands]
    if len(listed) == 1:
        return sweep.dims(listed[0])
    dim = bound_of(node).get("dim", 0) % rank
    parts = [(sweep.dims(n)[dim], size_of(n.meta["val"].shape[dim])) for n in listed]
    if sweep.worked.isdisjoint(operands) or len(parts) < 2 or not any(f for f, _ in parts):
        return same_or_whole(sweep, node, note)
    others = [tuple(() if d == dim else f for d, f in enumerate(sweep.dims(n))) for n in operands]
    out = list(sweep.broadcast(others, note))
    out[dim] = sweep.joined(parts, note)
    sweep.runs[node] = dim
    return tuple(out)


def padded(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Tokens put before and after one run of them, if it is worked on."""
    rank, source = node.meta["val"].ndim, first_of(node)
    changed = _padded_dims(node, rank)
    amounts: Any = node.args[1]
    (dim,) = changed if len(changed) == 1 else (None,)
    low, high = amounts[2 * (rank - 1 - dim) :][:2] if dim is not None else (0, 0)
    works = source in sweep.worked or any(op_name(user) == CONV1D for user in node.users)
    fixed = all(isinstance(n, int) and n >= 0 for n in (low, high))
    if shift_of(node):
        sweep.halos[node] = min(changed)
        return sweep.dims(source)
    if dim is None or not (fixed and works) or _fill(node) is None or not sweep.dims(source)[dim]:
        return same_or_whole(sweep, node, note)
    dims = list(sweep.dims(source))
    size = size_of(source.meta["val"].shape[dim])
    dims[dim] = sweep.joined([((), size_of(low)), (dims[dim], size), ((), size_of(high))], note)
    sweep.runs[node] = dim
    return tuple(dims)


def convolved(sweep: Sweep, node: Node, note: Note) -> Dims:
    """Rows pass; of a conv1d so does the sequence, if each step makes one token, or if it makes a run of the tokens."""
    dims, shape = sweep.dims(first_of(node)), node.meta["val"].shape
    weights = sweep.dims(bound_of(node)["weight"])
    if len(dims) != len(weights):  # no batch: the first dim is that of channels
        return sweep.unknown(node, note)  # type: ignore[no-any-return]
    note.whole += [f for d in (dims[1], *weights) for f in d]
    step = halo_of(node)[2] if op_name(node) == CONV1D else 0
    old, size = (size_of(x.meta["val"].shape[-1]) for x in (first_of(node), node))
    if step and dims[2] and old == step * size:
        split = sweep.reshape((dims[2],), (shape[2], step), note)
        if any(halo_of(node)[:2]):
            sweep.halos[node] = 2
        return dims[0], sweep.new(shape[1]), split[0]
    if step == 1 and dims[2] and (run := _inner_run(sweep, node, dims[2])):
        sweep.runs[node] = 2
        return dims[0], sweep.new(shape[1]), run
    note.whole += [f for d in dims[2:] for f in d]
    return (dims[0], *sweep.fresh(shape[1:]))


def _inner_run(sweep: Sweep, node: Node, tokens: Factors) -> Factors | None:
    """A conv1d makes a run of the tokens that it reads, of fewer: one that is known, or the last that it can be."""
    old, size = (size_of(x.meta["val"].shape[2]) for x in (first_of(node), node))
    fewer = old - size
    if not fewer.is_Integer or fewer < 0:
        return None
    known = (at for run, at in sweep.lines.runs(sweep.index(tokens)) if same(run.size, size) and at.is_Integer)
    offset = min((at for at in known if 0 <= at <= fewer), default=fewer)
    return sweep.run_of(tokens, offset, size, new=True)


def halo_of(node: Node, offset: int = 0) -> tuple[int, int, int]:
    """(elements before, elements after, step): what a conv1d reads around `step` elements, or a shift around one.

    `offset`: the place, on what it reads, of the first of what a conv1d makes.
    """
    if op_name(node) != CONV1D:
        low = shift_of(node)
        return max(low, 0), max(-low, 0), 1
    bound = bound_of(node)
    weight: Any = bound["weight"]
    step, padding, apart = (_single(bound.get(name, n)) for name, n in (("stride", 1), ("padding", 0), ("dilation", 1)))
    before = padding + offset
    after = max(apart * (int(weight.meta["val"].shape[2]) - 1) - before + 1 - step, 0)
    return before, after + -(before + after) % step, step


def _single(value: Any) -> int:
    return int(value[0]) if isinstance(value, list | tuple) else int(value)


def shift_of(node: Node) -> int:
    """By how many tokens a pad moves a sequence of the same length: on one side it pads, on the other it crops."""
    if op_name(node) not in ("pad.default", "constant_pad_nd.default"):
        return 0
    amounts, rank = list(args_of(node)[1]), node.meta["val"].ndim
    changed = _padded_dims(node, rank)
    if len(changed) != 1:
        return 0
    low, high = amounts[2 * (rank - 1 - min(changed)) :][:2]
    fixed = isinstance(low, int) and isinstance(high, int) and low == -high
    return low if fixed and _fill(node) == 0 else 0


def _fill(node: Node) -> Any:
    """The number that a pad puts; None where it puts what is there already."""
    bound = bound_of(node)
    return (bound.get("value") or 0) if bound.get("mode", "constant") == "constant" else None


def _padded_dims(node: Node, rank: int) -> set[int]:
    """Dims that a pad changes: also one that it pads on one side and crops on the other, to the same size."""
    if op_name(node) not in ("pad.default", "constant_pad_nd.default"):
        return set()
    amounts: Any = node.args[1]
    return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if not (isinstance(amount, int) and amount == 0)}
