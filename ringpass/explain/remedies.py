"""remedies: for an op that gathers, the rewrite that avoids it."""

from __future__ import annotations

OUTPUT = "drop the output that nobody uses, or pass options={'outputs': 'local'} and take it as a shard"
UNKNOWN = (
    "write the op as ones with a rule (docs/operators.md lists them), or add its rule (docs/architecture.md says where)"
)
BY_OP = {
    ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"): (
        "add up inside a dim that is not the sequence; where positions are counted, pass them to the model as an input"
    ),
    ("sort", "argsort", "topk", "kthvalue", "median", "unique"): (
        "sort or select along another dim, such as the experts of each token, not over the tokens"
    ),
    ("softmax", "log_softmax", "_softmax", "_log_softmax"): (
        "take the softmax over a dim other than the tokens; attention written out as a product, softmax and product of "
        "(B, H, S, S) scores is read as attention: keep its mask and scale between the two products"
    ),
    ("flip", "roll", "repeat_interleave"): "reorder the batch before the model, or use an index that is an input",
    ("view", "reshape", "_unsafe_view", "flatten", "unflatten"): (
        "keep the sequence the outer dim of what is merged with it: (B, S, ..) to (B * S, ..), not it inside"
    ),
    ("index", "gather", "take_along_dim", "index_select", "embedding"): (
        "pick tokens by slices, or by few positions; look up per token instead of across tokens"
    ),
    ("mm", "bmm", "matmul", "einsum", "linear", "baddbmm", "addmm"): (
        "mix tokens by attention (scaled_dot_product_attention), or by a convolution over few neighbours"
    ),
    ("native_group_norm", "group_norm", "batch_norm", "_native_batch_norm_legit"): (
        "use a norm over the features of each token (LayerNorm, RMSNorm)"
    ),
    ("_fft_r2c", "_fft_c2c", "_fft_c2r", "fft_fft", "fft_rfft"): (
        "transform along a dim that is not the sequence, or give the value another dim that ranks can divide"
    ),
    ("scaled_dot_product_attention", "_scaled_dot_product_attention"): (
        "call scaled_dot_product_attention with K and V of the batch and heads of Q (or heads that divide them), and a "
        "mask that is made in the model from positions, or passed in whole"
    ),
}  # fmt: skip
OTHERWISE = "rewrite that line token by token, or move it before or after the model, where tokens are together"


def remedy_for(op: str, reason: str) -> str:
    """The rewrite that avoids a gather of `op` for this `reason`.

    >>> remedy_for("cumsum.default", "cumsum.default needs all tokens")[:30]
    'add up inside a dim that is no'
    """
    if reason == "output":
        return OUTPUT
    if reason.startswith("no rule"):
        return UNKNOWN
    name = op.split(".")[0]
    return next((text for names, text in BY_OP.items() if name in names), OTHERWISE)
