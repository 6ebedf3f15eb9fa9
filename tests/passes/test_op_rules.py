"""Each rule by itself: the op on shards of its operands gives shards of the op, in forward and backward.

A case calls an op of the named kind, which is partitioned over simulated ranks along the dim of S elements of its first
operand that has one.  The operands are products, so that they are sharded; `gathers` says whether the op may gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass.passes.op_rules import batched, losses, norms, pointwise, reductions, routing, scattering
from ringpass.passes.op_rules import table as rules
from tests.support.sharded_ops import B, Case, D, H, S, check_on_shards, rank_programs

aten = torch.ops.aten


def ids(n: int = 7) -> Tensor:
    """Numbers below n, one for each token."""
    return torch.arange(B * S).view(B, S) % n


def overwritten(x: Tensor) -> Tensor:
    """Numbers written over tokens, channels, and a token of one sample."""
    x = x.clone()
    x[:, 0], x[:, 3:9], x[0, 9], x[..., 2] = 1.0, -1.0, 2.0, 0.5
    return x


def seen() -> Tensor:
    return (ids(3) > 0)[..., None]


def routed(x: Tensor, w: Tensor, leak: Callable[..., Any] | None = None) -> Any:
    """Two experts for each token: pairs sorted by expert, each row times its expert's vector, the pairs put back."""
    x = x.view(-1, D)
    sizes = (x[:, :3] * 1.5).topk(2, -1)
    experts, order = sizes.indices.reshape(-1).sort()
    rows = x[order // 2] * w[experts] * sizes.values.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    y = rows[back].view(x.shape[0], 2, -1).sum(1)
    return y if leak is None else (y, leak(rows, order, back, y))


HEADS = (B, H, S, D)
FIRST = (S, B, D)  # sequence first
FLAT = (B * S, D)
SHARDED = [  # op on shards = shards of op
    Case("linear.default", F.linear, ((B, S, D), (5, D), (5,))),
    Case("linear.default", F.linear, (FIRST, (5, D))),
    Case("mm.default", torch.mm, ((S, D), (D, 5))),
    Case("addmm.default", torch.addmm, ((5,), (S, D), (D, 5))),
    Case("bmm.default", torch.bmm, ((B, S, D), (B, D, 5))),
    Case("baddbmm.default", torch.baddbmm, ((B, S, 5), (B, S, D), (B, D, 5))),
    Case("mv.default", torch.mv, ((S, D), (D,))),
    Case("outer.default", torch.outer, ((S,), (D,))),
    Case("matmul.default", torch.matmul, (HEADS, (B, H, D, 5))),
    Case("einsum.default", lambda x, w: torch.einsum("bsd,de->bse", x, w), ((B, S, D), (D, 5))),
    Case("einsum.default", lambda x: torch.einsum("bsd,bd->bs", x, x[:, 0].detach() * 0 + 1)),
    Case("embedding.default", lambda x, w: x + F.embedding(ids(), w), ((B, S, D), (7, D))),
    Case("layer_norm.default", lambda x, w, b: F.layer_norm(x, (D,), w, b), ((B, S, D), (D,), (D,))),
    Case("rms_norm.default", lambda x, w: F.rms_norm(x, (D,), w), ((B, S, D), (D,))),
    Case("softmax.int", lambda x: x.softmax(-1)),
    Case("log_softmax.int", lambda x: x.log_softmax(-1)),
    Case("_softmax.default", lambda x: aten._softmax(x, -1, False)),
    Case("_log_softmax.default", lambda x: aten._log_softmax(x, -1, False)),
    Case("cumsum.default", lambda x: x.cumsum(-1)),
    Case("cumprod.default", lambda x: x.cumprod(-1)),
    Case("logcumsumexp.default", lambda x: x.logcumsumexp(-1)),
    Case("flip.default", lambda x: x.flip(-1)),
    Case("cat.default", lambda x: x.roll(1, -1)),
    Case("tril.default", torch.tril, ((S, 3, D),)),
    Case("triu.default", torch.triu, ((S, 3, D),)),
    Case("glu.default", F.glu),
    Case("add.Tensor", torch.add, ((B, S, D), (S, D))),
    Case("add.Tensor", torch.add, ((B, S, D), (B, 1, D))),
    Case("where.self", lambda x, y: torch.where(seen(), x, y), ((B, S, D), (B, S, D))),
    Case("masked_fill.Scalar", lambda x: x.masked_fill(seen(), 0.5)),
    Case("__and__.Tensor", lambda x: x * ((x > 0) & (x < 1))),
    Case("__or__.Tensor", lambda x: x * ((x < 0) | (x > 1))),
    Case("type_as.default", lambda x, y: x.type_as(y), ((B, S, D), (D,))),
    Case("to.other", lambda x, y: aten.to.other(x, y), ((B, S, D), (D,))),
    Case("broadcast_tensors.default", lambda x, y: torch.broadcast_tensors(x, y)[1].exp(), ((B, S, D), (S, 1))),
    Case("new_zeros.default", lambda x: x + x.new_zeros(x.shape)),
    Case("new_ones.default", lambda x: x + x.new_ones(S, 1)),
    Case("new_full.default", lambda x: x + x.new_full((B, S, D), 2.0)),
    Case("zeros.default", lambda x: x + torch.zeros(S, D, dtype=x.dtype)),
    Case("ones.default", lambda x: x + torch.ones(S, D, dtype=x.dtype)),
    Case("full.default", lambda x: x + torch.full((S, D), 2.0, dtype=x.dtype)),
    Case("arange.default", lambda x: x * torch.arange(S)[:, None]),
    Case("arange.start", lambda x: x * torch.arange(1, S + 1)[:, None]),
    Case("arange.start_step", lambda x: x * torch.arange(1, 2 * S + 1, 2)[:, None]),
    Case("linspace.default", lambda x: x * torch.linspace(0, 1, S, dtype=x.dtype)[:, None]),
    Case("eye.m", lambda x: x @ torch.eye(D, 5, dtype=x.dtype)),
    Case("eye.default", lambda x: x @ torch.eye(D, dtype=x.dtype)),
    Case("scalar_tensor.default", lambda x: x * aten.scalar_tensor(3.0, dtype=x.dtype)),
    Case("new_empty.default", lambda x: x + x.new_empty(D).fill_(1)),
    Case("empty.memory_format", lambda x: x + torch.empty(D, dtype=x.dtype).fill_(1)),
    # views
    Case("view.default", lambda x: x.view(B, S, 2, 2)),
    Case("view.default", lambda x: x.view(B * S, D).exp().view(B, S, D)),
    Case("view.default", lambda x: x.view(-1, D)),
    Case("view.default", lambda x: x.view(S, B * D), (FIRST,)),
    Case("view.default", lambda x: x.view(B, S, D), (FLAT,)),
    Case("view.default", lambda x: x.view(B * H, S, D).exp().view(B, H, S, D), (HEADS,)),
    Case("view.default", lambda x: x.view(S, B * H, D).transpose(0, 1), ((S, B, H * D),)),
    Case("reshape.default", lambda x: x.transpose(1, 2).reshape(B, S, H * D), (HEADS,)),
    Case("_unsafe_view.default", lambda x: aten._unsafe_view(x, [B * S, D])),
    Case("view_as.default", lambda x, y: x.view_as(y), ((B, S, D), (B, S, 2, 2))),
    Case("reshape_as.default", lambda x, y: x.reshape_as(y), ((B, S, D), (B, S, 2, 2))),
    Case("flatten.using_ints", lambda x: x.flatten(2), ((B, S, H, D),)),
    Case("flatten.using_ints", lambda x: x.flatten(0, 1)),
    Case("unflatten.int", lambda x: x.unflatten(-1, (2, 2))),
    Case("squeeze.dim", lambda x: x.squeeze(1), ((B, 1, S, D),)),
    Case("squeeze.dims", lambda x: x.squeeze((0, 2)), ((1, S, 1, D),)),
    Case("squeeze.default", torch.squeeze, ((1, S, 1, D),)),
    Case("unsqueeze.default", lambda x: x.unsqueeze(1)),
    Case("expand.default", lambda x: x.unsqueeze(1).expand(B, H, S, D)),
    Case("expand.default", lambda x: x.expand(B, S, D), ((S, D),)),
    Case("transpose.int", lambda x: x.transpose(0, 1)),
    Case("t.default", torch.t, ((S, D),)),
    Case("numpy_T.default", lambda x: x.T, ((S, D),)),
    Case("numpy_T.default", lambda x: x.T),  # torch deprecates it
    Case("mT.default", lambda x: x.mT),
    Case("permute.default", lambda x: x.permute(2, 0, 3, 1), (HEADS,)),
    Case("view_as_complex.default", lambda x: torch.view_as_complex(x.view(B, S, 2, 2).contiguous()).abs()),
    Case("view_as_real.default", lambda x, y: torch.view_as_real(
        torch.view_as_complex(x.view(B, S, 2, 2)) * torch.polar(y.abs(), y)[:, None]).flatten(2),
         ((B, S, D), (B, 2))),
    # ops that torch decomposes into others
    Case("transpose.int", lambda x: x.swapaxes(0, 1)),
    Case("permute.default", lambda x: x.movedim(1, 0)),
    Case("mul.Tensor", lambda x: torch.multiply(torch.subtract(x, 1), torch.divide(x, 3))),
    Case("cat.default", lambda x, y: torch.concat([torch.hstack([x.mT, x.mT]).mT, y], -1), ((B, S, D), (B, S, D))),
    Case("expand.default", lambda x: x.unsqueeze(1).expand_as(torch.zeros(B, H, S, D))),
    Case("slice.Tensor", lambda x, w: (x @ w).diff(dim=1), ((B, S, D), (D, D))),
    # other dims than the sequence
    Case("slice.Tensor", lambda x: x[..., 1:3]),
    Case("slice.Tensor", lambda x: aten.slice(x, 1, 0, S) * 2),
    Case("select.int", lambda x: x[..., 1]),
    Case("pad.default", lambda x: F.pad(x, (1, 2))),
    Case("constant_pad_nd.default", lambda x: aten.constant_pad_nd(x, [1, 0])),
    Case("cat.default", lambda x, y: torch.cat([-y, x], -1), ((B, S, D), (B, S, D))),
    Case("stack.default", lambda x, y: torch.stack([x, y], -1), ((B, S, D), (B, S, D))),
    Case("repeat.default", lambda x: x.repeat(1, 1, 2)),
    Case("repeat.default", lambda x: x.repeat(2, 3, 1)),
    Case("repeat.default", lambda x, w: (x.reshape(-1, D).repeat(3, 1).view(3, -1, D) @ w).sum(0), (FIRST, (3, D, D))),
    Case("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, 1)),
    Case("scatter.src", lambda x, y: x.scatter(-1, (ids(D)[..., None] + torch.arange(2)) % D, y),
         ((B, S, D), (B, S, 2))),
    Case("scatter.value", lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0) * x),
    Case("scatter_add.default", lambda x: x.scatter_add(-1, (x > 0).long(), x * 2)),
    Case("index_add.default", lambda x: x.index_add(-1, torch.tensor([0, 0, 2]), x[..., :3] * 2)),
    Case("one_hot.default", lambda x: x[..., None] * F.one_hot(x.argmax(-1), D)[:, :, None]),
    Case("one_hot.default", lambda x: F.one_hot(x.topk(2, -1).indices, 5).sum(2) * x[..., :1]),
    Case("slice_scatter.default", lambda x: x.slice_scatter(x[..., :2] * 3, -1, 1, 3)),
    Case("slice_scatter.default", lambda x: x.select_scatter(x[..., 0] * 3, -1, 2)),
    Case("slice_scatter.default", lambda x: x.slice_scatter(x[..., ::2] * 3, -1, 0, D, 2)),
    # few tokens that every rank has, written into those of some ranks
    Case("slice_scatter.default", lambda x, y: x.slice_scatter(y, 1, 2, 4), ((B, S, D), (B, 2, D))),
    Case("slice_scatter.default", lambda x, y: x.slice_scatter(y, 1, -3, S, 2), ((B, S, D), (B, 2, D))),
    Case("slice_scatter.default", lambda x, y: x.select_scatter(y, 1, -1), ((B, S, D), (B, D))),
    Case("slice_scatter.default", overwritten),
    Case("index_copy.default", lambda x, y: aten.index_put(x, [None, torch.tensor([10, -8])], y), ((B, S, D), (2, D))),
    Case("index_copy.default", lambda x, y: aten.index_put(x, [None, None, torch.tensor([3, 1])], y),
         ((B, S, D), (B, S, 2))),
    Case("index_add.default", lambda x, y: aten.index_put(x, [None, torch.tensor([3, 9, 3])], y, True),
         ((B, S, D), (B, 3, D))),
    Case("index_add.default", lambda x, y: x.index_add(1, torch.tensor([3, 9, 3]), y, alpha=2), ((B, S, D), (B, 3, D))),
    Case("index_copy.default", lambda x, y: x.index_copy(1, torch.tensor([10, 0]), y), ((B, S, D), (B, 2, D))),
    Case("index_fill.int_Scalar", lambda x: x.index_fill(1, torch.tensor([1, 7]), 5.0)),
    Case("where.self", lambda x, y: x.masked_scatter(seen(), y), ((B, S, D), (B * S * D,))),
    Case("where.self", lambda x, y: x.masked_scatter(seen().expand(B, S, D), y), ((B, S, D), (B * S, D))),
    Case("where.self", lambda x, y: x.index_put((ids(9) == 4,), y), ((B, S, D), (2, D))),
    Case("where.self", lambda x: x.index_put((ids(9) == 4,), torch.tensor(2.0, dtype=torch.float64))),
    Case("cummax.default", lambda x: x.cummax(-1)),
    Case("upsample_nearest1d.vec", lambda x: F.interpolate(x, scale_factor=1.7), ((S, 2, 7),)),
    Case("upsample_nearest2d.vec", lambda x: F.interpolate(x, scale_factor=(2, 2.4)), ((S, 2, 3, 2),)),
    Case("max_pool2d.default", lambda x: F.max_pool2d(x, 2), ((S, 2, 4, 4),)),
    Case("diagonal.default", lambda x: x.diagonal(0, 0, 2), ((3, S, D),)),
    Case("linalg_inv.default", lambda x: torch.linalg.inv(x + 4 * torch.eye(D, dtype=x.dtype)), ((S, D, D),)),
    Case("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, 1), (HEADS,)),
    Case("split.Tensor", lambda x: x.split(2, -1)),
    Case("split_with_sizes.default", lambda x: x.split([1, 3], -1)),
    Case("chunk.default", lambda x: x.chunk(2, -1)),
    Case("unbind.int", lambda x: x.unbind(-1)),
    Case("index.Tensor", lambda x, table: x * table[ids()], ((B, S, D), (7, D))),
    Case("topk.default", lambda x: x.topk(2, -1)),
    Case("gather.default", lambda x: x.gather(-1, ids(D)[..., None])),
    Case("sort.default", lambda x: x.sort(-1).values),
    Case("sort.default", routed, ((B, S, D), (3, D))),
    Case("floor_divide.default", lambda x: x.detach().floor_divide(2) * x),
    Case("index_put.default", routed, ((B, S, D), (3, D))),
    # reductions over other dims
    Case("sum.dim_IntList", lambda x: x.sum(-1)),
    Case("mean.dim", lambda x: x.mean(-1, keepdim=True)),
    *(Case(f"{name}.default", lambda x, name=name: getattr(x, name)(-1)) for name in ("amax", "amin")),
    *(Case(f"{name}.dim", lambda x, name=name: getattr(x, name)(-1).values) for name in ("max", "min")),
    *(Case(f"{name}.default", lambda x, name=name: x * getattr(x, name)(-1, True)) for name in ("argmax", "argmin")),
    *(Case(f"{name}.dim", lambda x, name=name: x * getattr(x > 0, name)(-1, True)) for name in ("any", "all")),
    Case("var.correction", lambda x: aten.var.correction(x, [-1], correction=1)),
    Case("var.dim", lambda x: aten.var.dim(x, [-1])),
    Case("std.correction", lambda x: aten.std.correction(x, [-1], correction=1)),
    Case("logsumexp.default", lambda x: x.logsumexp(-1)),
    Case("prod.dim_int", lambda x: x.prod(-1)),
    Case("norm.ScalarOpt_dim", lambda x: aten.norm.ScalarOpt_dim(x, 2, [-1])),
    Case("linalg_vector_norm.default", lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
    Case("std.dim", lambda x: aten.std.dim(x, [-1])),
    *(Case(f"{name}.correction", lambda x, name=name: getattr(torch, name)(x, [-1], correction=1))
      for name in ("var_mean", "std_mean")),
    *(Case(f"{name}.default", lambda x, f=f: f(x, x.detach() + 1, reduction="none"))
      for name, f in (("mse_loss", F.mse_loss), ("l1_loss", F.l1_loss), ("huber_loss", F.huber_loss))),
    Case("cross_entropy_loss.default", lambda x: F.cross_entropy(x.view(-1, D), ids(D).view(-1), reduction="none")),
]  # fmt: skip
REDUCED = [  # partial sums, added up over ranks
    Case("sum.dim_IntList", lambda x: x.sum(1)),
    Case("sum.dim_IntList", lambda x: x.sum(0), (FIRST,)),
    Case("sum.default", lambda x: x.sum()),
    Case("mean.dim", lambda x: x.mean(1)),
    Case("mean.dim", lambda x: x.mean((0, 1), keepdim=True)),
    Case("mean.default", lambda x: x.mean()),
    Case("matmul.default", lambda x, y: torch.matmul(x.mT, y), ((B, S, D), (B, S, 5))),
    Case("bmm.default", lambda x, y: torch.bmm(x.mT, y), ((B, S, D), (B, S, 5))),
    Case("mm.default", lambda x, y: torch.mm(x.t(), y), ((S, D), (S, 5))),
    Case("einsum.default", lambda x, y: torch.einsum("bsd,bse,bs->bde", x, y, x[..., 0]), ((B, S, D), (B, S, 5))),
    Case("cross_entropy_loss.default", lambda x: F.cross_entropy(x.view(-1, D), ids(D).view(-1), ignore_index=2)),
    Case("mse_loss.default", F.mse_loss, ((B, S, D), (B, S, D))),
    Case("l1_loss.default", F.l1_loss, ((B, S, D), (B, S, D))),
    Case("smooth_l1_loss.default", F.smooth_l1_loss, ((B, S, D), (B, S, D))),
    Case("huber_loss.default", F.huber_loss, ((B, S, D), (B, S, D))),
    Case("soft_margin_loss.default", lambda x: F.soft_margin_loss(x, x.detach().sign())),
    Case("kl_div.default", lambda x: F.kl_div(x, x.detach().softmax(-1), reduction="sum")),
    Case("binary_cross_entropy.default", lambda x: F.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid())),
    Case("binary_cross_entropy_with_logits.default",
         lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid(), reduction="sum")),
]  # fmt: skip
SELECTED = [  # only the selected tokens move
    Case("select.int", lambda x: x[:, 0]),
    Case("select.int", lambda x: x[:, -1]),
    Case("slice.Tensor", lambda x: x[:, -3:] * 2),
    Case("slice.Tensor", lambda x: x[:, 1:9:3]),
    Case("index.Tensor", lambda x: x[torch.arange(B), 3 - 4 * torch.arange(B)]),
    Case("index.Tensor", lambda x: x[:, [-1]]),
    Case("index_select.default", lambda x: x.index_select(1, torch.tensor([3, 0]))),
    Case("gather.default", lambda x: x.gather(1, torch.tensor([[3, 10, 3], [0, 1, 2]])[..., None].expand(-1, -1, D))),
    Case("gather.default", lambda x: torch.take_along_dim(x, torch.tensor([[[9]], [[4]]]), dim=1)),
    Case("gather.default", lambda x, y: x.gather(2, y.topk(2, 2).indices), ((B, H, S, D), (B, H, 7, D))),
]
ALL_TO_ALL = [  # all tokens of a part of the channels, or rows of the batch
    *(Case(name, f) for name, f in {
        "softmax.int": lambda x: x.softmax(1), "log_softmax.int": lambda x: x.log_softmax(1),
        "cumsum.default": lambda x: x.cumsum(1), "cummin.default": lambda x: x.cummin(1),
        "flip.default": lambda x: x.flip(1), "sort.default": lambda x: x.sort(1).values,
        "pad.default": lambda x: F.pad(x, (0, 0, 1, -1), value=2.0), "unbind.int": lambda x: x.unbind(1)[2],
        "slice.Tensor": lambda x: x[:, 1:] * 2,
        "layer_norm.default": lambda x: F.layer_norm(x, (S, D)),
        "fft_rfft.default": lambda x: (torch.fft.rfft(x, dim=1) + 1).abs() * 2,
        "slice_scatter.default": lambda x: x.cumsum(1).slice_scatter(x[:, :3].cumsum(1) * 2, 1, 2, 5),
    }.items()),
    Case("softmax.int", lambda x: x.view(B, S * D).softmax(-1)),
    # a dim of two factors of 2, of which some rank of three has none
    Case("cumsum.default", lambda x, w: x.cumsum(1).view(1, S, 2, 2) * w, ((1, S, 4), (2, 1))),
]  # fmt: skip
GATHERED = [  # gathered, with the reason
    *(Case(name, f, ((B, S, D),), True) for name, f in {
        "roll.default": lambda x: x.roll(1),
    }.items()),
    *(Case("sort.default", lambda x, w, leak=leak: routed(x, w, leak), ((B, S, D), (3, D)), True) for leak in (
        lambda rows, order, back, y: rows, lambda rows, order, back, y: rows.cumsum(0),
        lambda rows, order, back, y: order * rows[:, 0], lambda rows, order, back, y: y * (order + 1)[back[::2], None],
        lambda rows, order, back, y: y * (back[::2, None] > 5),
        lambda rows, order, back, y: rows + torch.cat([y, y]),
    )),
    Case("conv2d.default", lambda x, w: F.conv2d(x, w, padding=1), ((S, 3, 3), (5, S, 3, 3)), True),
]  # fmt: skip
SLICES = [  # slices of the sequence: nothing moves
    Case("slice.Tensor", lambda x, w: F.linear(x, w)[:, 1:] * 2, ((B, S, D), (D, D))),
    Case("slice.Tensor", lambda x, w: F.linear(x, w)[:, :-1].reshape(-1, D).sin(), ((B, S, D), (D, D))),
    Case("slice.Tensor", lambda x, w: F.linear(x, w)[1:-2] * 2, (FIRST, (D, D))),
    Case("slice.Tensor", lambda x, w: F.linear(x, w)[:, 1:].mean(1), ((B, S, D), (D, D))),
    Case("slice.Tensor", lambda x, w: F.linear(x, w).unfold(1, 3, 1).sum(-1).sin(), ((B, S, D), (D, D))),
    Case("slice.Tensor", lambda x, w: F.cross_entropy(F.linear(x, w)[:, :-1].reshape(-1, D), ids(D)[:, 1:].reshape(-1)),
         ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w, y: torch.cat([y.expand(B, 1, D), F.linear(x, w)], 1).sin()[:, 1:] * 2,
         ((B, S, D), (D, D), (1, 1, D))),
    Case("cat.default", lambda x, w, y: torch.cat([y, F.linear(x, w), y[:, :1]], 1) * 2,
         ((B, S, D), (D, D), (B, 2, D))),
    Case("cat.default", lambda x, w: torch.cat([(y := F.linear(x, w))[:, :1] * 3, y[:, 1:] * 2], 1) + x,
         ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w, y: torch.cat([F.linear(y, w), F.linear(x, w)], 1)[:, 7:] + x,
         ((B, S, D), (D, D), (B, 7, D))),
    Case("pad.default", lambda x, w: F.pad(F.linear(x, w), (0, 0, 0, 3)) * 2, ((B, S, D), (D, D))),
    Case("constant_pad_nd.default",
         lambda x, w: aten.constant_pad_nd(F.linear(x, w), [0, 0, 1, 2], 5.0).sin()[:, 1:-2] * 2, ((B, S, D), (D, D))),
    Case("conv1d.default", lambda x, w, b: F.conv1d(x.mT, w, b, padding=1), ((B, S, D), (5, D, 3), (5,))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.mT, w, padding=4, dilation=2, groups=D), ((B, S, D), (D, 1, 5))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.reshape(B, S * 2, 2).mT, w, stride=2, padding=1),
         ((B, S, D), (5, 2, 3))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.reshape(B, S * 2, 2).mT, w, stride=2, padding=3),
         ((B, S, D), (5, 2, 8))),
    Case("conv1d.default", lambda x, w: F.conv1d(F.conv1d(x.reshape(B, S * 2, 2).mT, w, padding=1).sin(), w.mT.mT,
         stride=2, padding=1).mT + x[..., :2], ((B, S, D), (2, 2, 3))),
    Case("conv1d.default", lambda x, w: F.conv1d(x, w, padding=1), ((S, B, D), (5, B, 3))),
    Case("conv2d.default", lambda x, w: F.conv2d(x, w, padding=1), ((S, 2, 3, 3), (5, 2, 3, 3))),
    Case("conv3d.default", lambda x, w: F.conv3d(x, w, padding=1), ((S, 2, 3, 3, 2), (5, 2, 3, 3, 3))),
    Case("pad.default", lambda x: F.pad(x, (0, 0, 1, -1)) * x),
    Case("pad.default", lambda x: F.pad(x, (0, 0, -2, 2)) * x),
    Case("pad.default", lambda x: F.pad(x, (1, -1)) * x),
    Case("slice.Tensor", lambda x, w: F.linear(x, w)[:, -100:-1] * 2, ((B, S, D), (D, D))),
    Case("slice.Tensor", lambda x, w: F.linear(x, w).narrow(1, 2, S - 2) * 2, ((B, S, D), (D, D))),
    # two slices of one sequence against each other: tokens of other ranks move
    Case("sub.Tensor", lambda x, w: (y := F.linear(x, w))[:, 1:] - y[:, :-1], ((B, S, D), (D, D))),
    Case("mul.Tensor", lambda x, w: (y := F.linear(x, w))[:, 2:] * y[:, 1:-1] + y[:, :-2].sin(), ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w: torch.cat([(y := F.linear(x, w))[:, :1], y[:, :-1]], 1) * y, ((B, S, D), (D, D))),
    Case("bmm.default", lambda x, w: torch.bmm((y := F.linear(x, w))[:, 1:].mT, y[:, :-1]), ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w: (y := (x @ w).mT).roll(1, 2) * y, ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w: (y := x @ w).roll((1, 1), (0, 1)) * y, ((B, S, D), (D, D))),
    Case("cat.default", lambda x: (y := F.layer_norm(x, (D,))).roll(1, 1) * y),
    Case("conv1d.default", lambda x, w, c: F.conv1d((x @ w).mT, c, padding=1), ((S, D), (D, D), (D, D, 3))),
    Case("mse_loss.default", lambda x, w: F.mse_loss((y := F.linear(x, w))[:, :-3], y[:, 3:]), ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w: (y := F.linear(x, w)).roll(1, 1) * y, ((B, S, D), (D, D))),
    Case("cat.default", lambda x, w: (y := F.linear(x, w)).roll(-2, 0) * y, (FIRST, (D, D))),
    Case("conv1d.default", lambda x, w: F.conv1d(F.pad(x.mT, (2, 0)), w).mT * x.sum(-1, True), ((B, S, D), (5, D, 3))),
    Case("conv1d.default", lambda x, w: F.conv1d(F.pad(x.mT, (0, 4)), w, dilation=2), ((B, S, D), (5, D, 3))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.mT, w, padding=3, groups=D)[..., :S].sin(), ((B, S, D), (D, 1, 4))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.mT, w, padding=3).sin(), ((B, S, D), (5, D, 4))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.mT, w, padding=1).sin(), ((B, S, D), (5, D, 5))),
    Case("conv1d.default", lambda x, w, b: F.conv1d(x.mT, w, b, padding="same").mT * x.sum(-1, True),
         ((B, S, D), (5, D, 4), (5,))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.mT, w, padding="same", dilation=3), ((B, S, D), (5, D, 3))),
    Case("conv1d.default", lambda x, w: F.conv1d(x.mT, w, padding="valid"), ((B, S, D), (5, D, 3))),
]  # fmt: skip


def tokens(n: int, *rest: int, width: int = D) -> Callable[[Tensor], Tensor]:
    """A view of (B, S, 48) with n tokens, or rows of a grid, for each of S."""
    return lambda x: x.reshape(B, S * n, *rest, width).movedim(-1, 1)


LINE, GRID = tokens(6, width=8), tokens(6, 4, width=2)  # (B, 8, S * 6), (B, 2, S * 6, 4)
WIDE = ((B, S, 48),)
MERGED = [  # neighbours merged to one, and split
    *(Case("slice.Tensor", lambda x, w, a=a: ((x @ w).mT)[:, a::4] * 2, (*WIDE, (48, 48))) for a in range(2)),
    Case("slice.Tensor", lambda x, w: (y := LINE(x @ w))[..., ::2] * y[..., 1::2].sin(), (*WIDE, (48, 48))),
    Case("slice.Tensor", lambda x, w: (y := GRID(x @ w))[..., 0:-1:2, 1::2] * y[:, :, 1 :: 2, ::2], (*WIDE, (48, 48))),
    *(Case(f"{name}1d.default", lambda x, f=f: f(LINE(x)), WIDE) for name, f in {
        "avg_pool": lambda x: F.avg_pool1d(x, 3), "max_pool": lambda x: F.max_pool1d(x, 2, 2, 0, 1, True),
        "adaptive_avg_pool": lambda x: F.adaptive_avg_pool1d(x, S * 2)}.items()),
    *(Case(f"{name}2d.default", lambda x, f=f: f(GRID(x)), WIDE) for name, f in {
        "avg_pool": lambda x: F.avg_pool2d(x, (3, 2), divisor_override=5), "max_pool": lambda x: F.max_pool2d(x, 2),
        "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, (S, 3))}.items()),
    *(Case(f"{name}3d.default", lambda x, f=f: f(tokens(6, 4, 2, width=1)(x)), WIDE) for name, f in {
        "avg_pool": lambda x: F.avg_pool3d(x, (3, 3, 2), (3, 1, 2), (0, 1, 0)),
        "max_pool": lambda x: F.max_pool3d(x, (2, 4, 1)),
        "adaptive_avg_pool": lambda x: F.adaptive_avg_pool3d(x, (S * 3, 1, 2))}.items()),
    *(Case(f"{name}{n}d.vec", lambda x, f=f, mode=mode: f(x, mode), WIDE)
      for name, mode in (("upsample_nearest", "nearest"), ("_upsample_nearest_exact", "nearest-exact"))
      for n, f in {1: lambda x, mode: F.interpolate(LINE(x), scale_factor=3, mode=mode),
                   2: lambda x, mode: F.interpolate(GRID(x), (S * 12, 7), mode=mode),
                   3: lambda x, mode: F.interpolate(tokens(6, 4, 2, width=1)(x), scale_factor=2.0, mode=mode)}.items()),
    Case("conv_transpose1d.default", lambda x, w, b: F.conv_transpose1d(LINE(x), w, b, 2), (*WIDE, (8, 5, 2), (5,))),
    Case("conv_transpose2d.input", lambda x, w: F.conv_transpose2d(GRID(x), w, None, (3, 2), (0, 1), groups=2),
         (*WIDE, (2, 3, 3, 3))),
    Case("conv_transpose3d.input", lambda x, w: F.conv_transpose3d(tokens(6, 4, 2, width=1)(x), w, stride=2),
         (*WIDE, (1, 2, 2, 2, 2))),
    Case("unfold.default", lambda x: LINE(x).unfold(2, 3, 3), WIDE),
    Case("unfold.default", lambda x: x.unfold(-1, 5, 3), WIDE, True),
    Case("im2col.default", lambda x: F.unfold(GRID(x), (3, 2), stride=(3, 2)), WIDE),
    Case("col2im.default", lambda x: F.fold(F.unfold(GRID(x), 2, stride=2).sin(), (S * 6, 4), 2, stride=2), WIDE),
    Case("pixel_unshuffle.default", lambda x: F.pixel_unshuffle(GRID(x), 2), WIDE),
    Case("pixel_shuffle.default", lambda x: F.pixel_shuffle(tokens(3, 2, width=8)(x), 2), WIDE),
    Case("repeat_interleave.self_int", lambda x: x.repeat_interleave(3, 1)),
    Case("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, 1, output_size=2 * S)),
    Case("conv2d.default", lambda x, w, b: F.conv2d(GRID(x), w, b, 2, 1), (*WIDE, (5, 2, 3, 3), (5,))),
    Case("conv2d.default", lambda x, w: F.conv2d(GRID(x), w, None, 1, (2, 1), 2, groups=2), (*WIDE, (4, 1, 3, 3))),
    Case("conv2d.default", lambda x, w: F.conv2d(GRID(x), w, None, (3, 1), (2, 0)), (*WIDE, (5, 2, 7, 2))),
    Case("conv3d.default", lambda x, w: F.conv3d(tokens(6, 4, 2, width=1)(x), w, None, (2, 1, 1), 1),
         (*WIDE, (3, 1, 4, 3, 3))),
    Case("add.Tensor", lambda x, y: x.repeat_interleave(8, 1) + y.flatten(1, 3), ((B, S, D), (B, S, 2, 4, D))),
]  # fmt: skip
UNKNOWN_WINDOWS = ("unfold.default", "im2col.default", "col2im.default")
NOT_MERGED = [  # windows that overlap or leave tokens out: divided along another dim, or gathered
    *(Case(name, f, ((B, D, S),), name in UNKNOWN_WINDOWS) for name, f in {
        "avg_pool1d.default": lambda x: F.avg_pool1d(x, 3, 1, 1), "max_pool1d.default": lambda x: F.max_pool1d(x, 2),
        "adaptive_avg_pool1d.default": lambda x: F.adaptive_avg_pool1d(x, 1),
        "upsample_nearest1d.vec": lambda x: F.interpolate(x, S + 5),
        "unfold.default": lambda x: x.unfold(2, 3, 2), "slice.Tensor": lambda x: (x.cos() @ x.mT @ x)[..., ::2].sin(),
    }.items()),
    *(Case(name, f, ((B, D, S, 4),), name in UNKNOWN_WINDOWS) for name, f in {
        "im2col.default": lambda x: F.unfold(x, 2), "avg_pool2d.default": lambda x: F.avg_pool2d(x, (S, 1)),
        "col2im.default": lambda x: F.fold(x.flatten(2), (S + 1, 5), 2),
        "conv_transpose2d.input": lambda x: F.conv_transpose2d(x, x[0, :, :2, :2][:, None].detach(), stride=1),
    }.items()),
    Case("conv2d.default", lambda x, w: F.conv2d(x, w, stride=2), ((B, D, S, 5), (3, D, 3, 3))),
]  # fmt: skip
CASES = [*SHARDED, *REDUCED, *SELECTED, *SLICES, *ALL_TO_ALL, *GATHERED, *MERGED, *NOT_MERGED]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch copies what it pads there
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2")
@pytest.mark.parametrize("layout", ("zigzag",))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_on_shards_equals_shards_of_op(case: Case, layout: str, world: int = 3) -> None:
    reasons = check_on_shards(case, layout, world)
    assert bool(reasons) == case.gathers, reasons
    assert not reasons or any(case.op in reason for reason in reasons)


def test_an_op_has_one_record() -> None:
    names = [name for family in rules.FAMILIES for name in family.RULES]
    assert [name for name in dict.fromkeys(names) if names.count(name) > 1] == []


def test_every_rule_has_a_case() -> None:
    shown = {case.op for case in CASES}
    elsewhere = {  # attention and experts, shown by whole models; random ops, which draw alike; files of their own
        *batched.RULES, *scattering.RULES, *losses.RULES, *norms.RULES, *reductions.RULES,
        "scaled_dot_product_attention.default", "flex_attention", "autograd_function_apply", "getitem",
        "rand.default", "randn.default", *routing.GROUPED, "histc.default", "dropout.default",
    }  # fmt: skip
    assert rules.RULES.keys() - pointwise.NAMES - shown - elsewhere == set()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: (y := x @ w)[:, 20:] - y[:, :20],
        lambda x, w: torch.cat([(y := x @ w)[:, :20] * 2, y[:, 20:].sin()], 1),
    ],
    ids=("compared", "put together"),
)
def test_halves_of_a_sequence_are_slices(call: Callable[..., Any]) -> None:
    """As the few tokens that a head reads, they would be replicated, and so would all that follows."""
    case = Case("slice.Tensor", call, ((B, 40, D), (D, D)))
    assert check_on_shards(case, "zigzag", 3, 40) == []
    assert not [n for n in rank_programs(case, "zigzag", 3, 40)[0].gm.graph.nodes if n.name.endswith("_taken")]


def test_tokens_that_go_to_every_rank_are_reported() -> None:
    """A third of the tokens: it is more than a rank of four holds."""
    case = Case("slice.Tensor", lambda x, w: (x @ w)[:, :13].sin() @ w, ((B, 40, D), (D, D)))
    assert check_on_shards(case, "zigzag", 4, 40)
