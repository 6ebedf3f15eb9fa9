"""Ops that act on whole dims, and alike for every index of the others: matrices, planes of an image, one named dim.

    cholesky (.., n, n)                 the last two dims are needed replicated, those before pass
    max_unpool2d (.., h, w)             the same
    sort (.., n, ..) along n            the dim that an argument names is needed replicated, all others pass
    diagonal (.., n, .., n)             both named dims are, and what they make is a new last dim

Contract: dims that pass are the same index in all operands and results; a result's other dims are new.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from ringpass.nodes import bound_of, first_of, operands_of
from ringpass.passes.op_rules.along_dims import dims_of
from ringpass.passes.op_rules.spec import OpRule
from ringpass.passes.propagate.factors import Dims, Note, Results, Sweep

LAST = {
    1: (
        "max_pool1d_with_indices.default", "adaptive_max_pool1d.default", "upsample_nearest1d.default",
        "_upsample_nearest_exact1d.default", "upsample_linear1d.default", "upsample_linear1d.vec",
        "reflection_pad1d.default", "replication_pad1d.default",
    ),
    2: (
        "inverse.default", "linalg_inv.default", "linalg_inv_ex.default", "linalg_det.default", "det.default",
        "cholesky.default", "cholesky_inverse.default", "cholesky_solve.default", "linalg_cholesky_ex.default",
        "_linalg_det.default", "_linalg_slogdet.default", "_linalg_eigh.default", "_linalg_eigvals.default",
        "linalg_eigvals.default", "linalg_eig.default", "_linalg_svd.default", "linalg_qr.default", "linalg_lu.default",
        "linalg_lu_factor_ex.default", "linalg_matrix_exp.default", "matrix_exp.default",
        "linalg_pinv.atol_rtol_tensor", "geqrf.default", "linalg_solve_triangular.default", "triangular_solve.default",
        "_cdist_forward.default", "cdist.default", "linalg_pinv.atol_rtol_float", "pinverse.default",
        "linalg_ldl_factor_ex.default", "trace.default", "max_pool2d_with_indices.default",
        "adaptive_max_pool2d.default", "max_pool2d_with_indices_backward.default", "max_unpool2d.default",
        "upsample_nearest2d.default", "_upsample_nearest_exact2d.default", "upsample_bilinear2d.default",
        "upsample_bilinear2d.vec", "_upsample_bilinear2d_aa.default", "_upsample_bilinear2d_aa.vec",
        "upsample_bicubic2d.default", "upsample_bicubic2d.vec", "_upsample_bicubic2d_aa.default",
        "_upsample_bicubic2d_aa.vec", "reflection_pad2d.default", "replication_pad2d.default",
        "_adaptive_avg_pool2d.default", "linalg_lu_factor.default",
    ),
    3: (
        "max_pool3d_with_indices.default", "adaptive_max_pool3d.default", "max_unpool3d.default",
        "upsample_nearest3d.default", "_upsample_nearest_exact3d.default", "upsample_trilinear3d.default",
        "upsample_trilinear3d.vec", "reflection_pad3d.default", "replication_pad3d.default",
        "_adaptive_avg_pool3d.default",
    ),
}  # fmt: skip
"""By the number of last dims on which an op acts."""

ALONG = (
    "cummax.default", "cummin.default", "mode.default", "kthvalue.default", "median.dim", "nanmedian.dim",
    "_softmax_backward_data.default", "_log_softmax_backward_data.default", "_safe_softmax.default", "sort.stable",
    "argsort.default", "argsort.stable", "msort.default", "linalg_cross.default", "_fft_c2c.default",
    "_fft_r2c.default", "_fft_c2r.default", "unsafe_split.Tensor", "unsafe_chunk.default",
    "unsafe_split_with_sizes.default", "fft_fft.default", "fft_ifft.default", "fft_rfft.default", "fft_irfft.default",
    "fft_hfft.default", "fft_ihfft.default", "fft_fft2.default", "fft_ifft2.default", "fft_rfft2.default",
    "fft_irfft2.default", "fft_fftn.default", "fft_ifftn.default", "fft_rfftn.default", "fft_irfftn.default",
    "fft_fftshift.default", "fft_ifftshift.default", "fft_hfft2.default", "fft_hfftn.default", "fft_ihfft2.default",
    "fft_ihfftn.default",
)  # fmt: skip
"""Ops along the dims that they name (`dims_of`)."""


def _last(count: int, takes_none: bool) -> OpRule:
    """An op on the last `count` dims of each operand."""

    def dims_rule(sweep: Sweep, node: Node, note: Note) -> Results | None:
        operands = [sweep.dims(n) for n in operands_of(node)]
        if any(len(d) < count for d in operands):
            return None
        note.need_replication += [f for d in operands for one in d[len(d) - count :] for f in one]
        leading = sweep.broadcast([d[: len(d) - count] for d in operands], note)
        return _each(node, lambda x: (*leading, *sweep.fresh(x.shape[len(leading) :])))

    return OpRule(dims_rule, takes_none=takes_none)


def _each(node: Node, dims: Any) -> Results:
    """`dims` of the result, or of each result."""
    value = node.meta["val"]
    return dims(value) if isinstance(value, Tensor) else tuple(dims(x) for x in value)


def _along(sweep: Sweep, node: Node, note: Note) -> Results | None:
    """Other dims pass where operands and results have the same number of dims, or one less where it is reduced."""
    operands = [sweep.dims(n) for n in operands_of(node)]
    rank = len(operands[0])
    if any(len(d) != rank for d in operands):
        return None
    acted = dims_of(node)
    note.need_replication += [f for d in operands for i in acted for f in d[i]]
    passing = sweep.broadcast_beside(operands, acted, note)

    def dims(x: Tensor) -> Dims:
        if x.ndim == rank:
            return tuple(
                sweep.new(n) if i in acted else d for i, (d, n) in enumerate(zip(passing, x.shape, strict=True))
            )
        return tuple(d for i, d in enumerate(passing) if i not in acted)

    return _each(node, dims)


def _diagonal(sweep: Sweep, node: Node, note: Note) -> Dims:
    """diagonal(x, offset, dim1, dim2): (.., n, .., m) -> (.., diagonal)."""
    bound, dims = bound_of(node), sweep.dims(first_of(node))
    pair = {bound.get("dim1", 0) % len(dims), bound.get("dim2", 1) % len(dims)}
    note.need_replication += [f for d in pair for f in dims[d]]
    rest = tuple(f for d, f in enumerate(dims) if d not in pair)
    return (*rest, sweep.new(node.meta["val"].shape[-1]))


def _diag_embed(sweep: Sweep, node: Node, note: Note) -> Dims:
    """diag_embed(x, offset, dim1, dim2): (.., n) -> (.., m, .., m)."""
    bound, (*rest, last) = bound_of(node), sweep.dims(first_of(node))
    shape = node.meta["val"].shape
    pair = {bound.get("dim1", -2) % len(shape), bound.get("dim2", -1) % len(shape)}
    note.need_replication += last
    passing = iter(rest)
    return tuple(sweep.new(n) if d in pair else next(passing) for d, n in enumerate(shape))


RULES = {
    **{name: _last(count, name.startswith("linalg_solve")) for count, names in LAST.items() for name in names},
    **{name: OpRule(_along, takes_none="fft" not in name) for name in ALONG},
    "diagonal.default": OpRule(_diagonal),
    "diag_embed.default": OpRule(_diag_embed),
}
