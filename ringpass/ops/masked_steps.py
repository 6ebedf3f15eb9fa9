"""Steps with a mask as one kernel call each, where the device has a kernel that takes a mask as a function.

    block_lists              which 128 x 128 squares of a step's mask are empty, mixed or full, and the tokens of its
                             rows and keys: what the kernel calls of all layers with that mask share
    attention_step           (out, lse) of all of a step's rows over all keys of its block
    attention_step_backward  (dq, dk, dv) of the same, from the rows' global out and lse

A step with a partial tile is one such call, from the first to the last row of its tiles; a step without is computed
tile by tile.  No mask is evaluated in full: `block_lists` looks at a few rows of squares at a time, and the kernel at
each pair of a mixed square.

In the unrolled graph equal `block_lists` are one node.  The rolled loop makes them in each call: it cannot tell a leaf
from another one for which the compiler has reused its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringpass.kernels import flex
from ringpass.kernels.blocks import empty_rows_first, rows_first
from ringpass.masks.constants import ConstantArray
from ringpass.masks.evaluate import evaluate, value_at
from ringpass.masks.expr import loads, parse
from ringpass.masks.intervals import PARTIAL
from ringpass.masks.rewrite import renumber, tables_as_leaves
from ringpass.ops.library import LABELLED, UNLABELLED, define, implement
from ringpass.ops.primitives import SPANS, indices
from ringpass.precision import accumulator
from ringpass.profiling import profiled
from ringpass.schedule.site import Site
from ringpass.schedule.tiles import Tile

STEP = f"Tensor[] leaves, Tensor[] lists, str mask, float scale, Tensor[] after, {LABELLED}"
define(f"block_lists(Tensor[] leaves, str mask, {SPANS}, Device device) -> Tensor[]")
define(f"attention_step(Tensor q, Tensor k, Tensor v, {STEP}) -> Tensor[]")
define(
    f"attention_step_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {STEP}) -> Tensor[]"
)
_ops = torch.ops.ringpass
block_lists = _ops.block_lists.default
attention_step, attention_step_backward = _ops.attention_step.default, _ops.attention_step_backward.default

EVALUATED = 1 << 24  # most pairs of a mask that `block_lists` evaluates at once, beyond a row of squares

# --- what the loop asks -----------------------------------------------------------------------------------------------


def runs_whole(site: Site, tiles: Sequence[Tile], q: Tensor) -> bool:
    """Whether a step of these tiles is one kernel call: one is partial, and nothing but the mask acts on its scores.

    `q`: the queries, or the keys, whose device, dtype and width are the same.
    """
    if site.depends_on_tokens or loads(parse(site.mask)) & {*site.learned}:
        return False
    return any(tile.kind == PARTIAL for tile in tiles) and flex.takes_step(q.device, q.dtype, q.shape[3])


def step_args(
    site: Site, spans: tuple[Any, ...], leaves: Sequence[Tensor], device: torch.device, after: list[Tensor]
) -> tuple[Any, ...]:
    """The arguments of `attention_step` after q, k, v; `spans`: as in `indices`, of the rows and keys of the step.

    `after`: as in the ops of tiles.
    """
    used = sorted(loads(parse(site.mask)))
    own, mask = [leaves[i] for i in used], _renumbered(site.mask, tuple(used))
    return own, block_lists(own, mask, *spans, device), mask, site.scale, after


@lru_cache(maxsize=1024)
def _renumbered(mask: str, used: tuple[int, ...]) -> str:
    return str(renumber(parse(mask), {old: new for new, old in enumerate(used)}))


# --- the operators ----------------------------------------------------------------------------------------------------


def _block_lists(leaves: list[Tensor], mask: str, *about: Any) -> list[Tensor]:
    """The eight lists of `flex.block_lists`, and the tokens of rows and keys, int64."""
    batch, heads, queries, keys, device = about
    expr, where = parse(mask), indices(device, batch, heads, queries, keys)
    rows, columns = where["q"], where["k"]
    lead = _broadcast_lead(leaves, mask, batch, heads, device)
    pairs = lead[0] * lead[1] * columns.numel() * flex.SQUARE  # in a row of squares
    parts = []
    for some in rows.split(max(1, EVALUATED // pairs) * flex.SQUARE, 2):
        value = evaluate(expr, {**where, "q": some}, leaves)
        parts.append(flex.squares(value.expand(*lead, some.numel(), columns.numel())))
    present = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
    return [*flex.block_lists(present[0], present[1]), rows.reshape(-1), columns.reshape(-1)]


def _broadcast_lead(
    leaves: Sequence[Tensor], mask: str, batch: int, heads: int, device: torch.device
) -> tuple[int, int]:
    """(B or 1, H or 1): 1 where the mask is the same for all."""
    value = evaluate(parse(mask), indices(device, batch, heads, (0, 1), (0, 1)), leaves)
    return value.shape[0], value.shape[1]


def _fake_block_lists(leaves: list[Tensor], mask: str, *about: Any) -> list[Tensor]:
    batch, heads, queries, keys, device = about
    lead = _broadcast_lead(leaves, mask, batch, heads, device)
    lengths = [sum(span[1::2]) - sum(span[::2]) for span in (queries, keys)]
    rows, columns = (-(-n // flex.SQUARE) for n in lengths)
    shapes = [x for n, m in ((rows, columns),) * 2 + ((columns, rows),) * 2 for x in ((*lead, n), (*lead, n, m))]
    lists = [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]
    return [*lists, *(torch.empty(n, dtype=torch.int64, device=device) for n in lengths)]


def _attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: list[Tensor],
    lists: list[Tensor],
    mask: str,
    scale: float,
    _: object,
    *,
    label: str = UNLABELLED,
) -> list[Tensor]:
    with profiled(label):
        out, lse = flex.flex_step(q, k, v, _step_mask(leaves, lists, mask), scale)
        return [rows_first(out.to(q.dtype)), lse.contiguous()]


def _fake_attention_step(q: Tensor, k: Tensor, v: Tensor, *args: object, **_: object) -> list[Tensor]:
    return [empty_rows_first(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))]


def _attention_step_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    leaves: list[Tensor],
    lists: list[Tensor],
    mask: str,
    scale: float,
    _: object,
    *,
    label: str = UNLABELLED,
) -> list[Tensor]:
    with profiled(label):
        grads = flex.flex_step_backward(grad, q, k, v, out, lse, _step_mask(leaves, lists, mask), scale)
        return [rows_first(g) for g in grads]


def _fake_attention_step_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: object, **_: object
) -> list[Tensor]:
    return [empty_rows_first(x, x.shape[3]) for x in (q, k, v)]


implement("block_lists", _block_lists, _fake_block_lists)
implement("attention_step", _attention_step, _fake_attention_step)
implement("attention_step_backward", _attention_step_backward, _fake_attention_step_backward)


def _step_mask(leaves: Sequence[Tensor], lists: Sequence[Tensor], mask: str) -> flex.StepMask:
    mask_mod, tables = _mask_mod(mask, len(leaves))
    *squares, rows, keys = lists
    return flex.StepMask(mask_mod, squares, (rows, keys, *leaves, *(x.tensor(rows) for x in tables)))


@lru_cache(maxsize=1024)
def _mask_mod(mask: str, count: int) -> tuple[flex.MaskMod, tuple[ConstantArray, ...]]:
    """The function of a mask that reads `count` leaves, and the arrays that it reads after them."""
    expr, tables = tables_as_leaves(parse(mask), count)

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor, rows: Tensor, keys: Tensor, *leaves: Tensor) -> Tensor:
        q, k = (torch.ops.aten.index(tokens, [at]) for tokens, at in ((rows, row), (keys, key)))
        positions = {"b": b.to(torch.int64), "h": h.to(torch.int64), "q": q, "k": k}
        return value_at(expr, positions, leaves)

    return mask_mod, tables
