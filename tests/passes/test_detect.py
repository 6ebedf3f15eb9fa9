"""Masks as models build them: the expression that detect finds is printed, and equals the mask on every tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.support.detected import B, D, H, K, S, additive, assert_same, watch

# --- masks of small functions -----------------------------------------------------------------------------------------
# Each takes queries' hidden states (B, S, .), keys' (B, K, .), and inputs; most models have S = K.


def causal(x: Tensor, y: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], device=x.device)
    return i[None, :] <= i[:, None]


def causal_reversed(x: Tensor, y: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i.view(-1, 1) >= i.view(1, -1)


def causal_and_padding_by_index(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    """As Hugging Face composes it: the padding mask is indexed with arange grids."""
    padding = padding.to(torch.bool)
    batch, heads = torch.arange(x.shape[0])[:, None, None, None], torch.arange(1)[None, :, None, None]
    q, k = torch.arange(x.shape[1])[None, None, :, None], torch.arange(x.shape[1])[None, None, None, :]
    return (k <= q) & padding[batch, k] & (heads >= 0)


def causal_and_padding_by_expand(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    n = x.shape[1]
    keys = padding[:, None, None, :].expand(x.shape[0], 1, n, n).to(torch.bool)
    i = torch.arange(n)
    return (i[None, :] <= i[:, None])[None, None].expand(x.shape[0], 1, n, n) & keys


def both_ends_padded(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    alive = padding != 0
    return (alive[:, None, :] & alive[:, :, None]).unsqueeze(1)


def tril(x: Tensor, y: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def not_triu(x: Tensor, y: Tensor) -> Tensor:
    return ~torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), diagonal=1)


def float_tril(x: Tensor, y: Tensor) -> Tensor:
    return torch.tril(torch.ones(x.shape[1], x.shape[1])) == 1


def triu_of_infinity(x: Tensor, y: Tensor) -> Tensor:
    """nn.Transformer.generate_square_subsequent_mask."""
    return torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1)


def masked_fill(x: Tensor, y: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.zeros(n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))


def fill_in_place(x: Tensor, y: Tensor) -> Tensor:
    n = x.shape[1]
    mask = torch.full((n, n), float("-inf"))
    i = torch.arange(n)
    mask.masked_fill_(i < (i + 1).view(n, 1), 0)
    return mask[None, None]


def where_infinity(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    keys = padding[:, None, None, :].bool()
    return torch.where(keys & causal(x, y), 0.0, -math.inf)


def where_smallest(x: Tensor, y: Tensor) -> Tensor:
    smallest = torch.finfo(x.dtype).min
    return torch.where(causal(x, y), torch.tensor(0.0, dtype=x.dtype), torch.tensor(smallest, dtype=x.dtype))


def bert(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    return (1.0 - padding[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min


def sum_of_additive_masks(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    keys = torch.zeros(padding.shape).masked_fill(padding == 0, -math.inf)
    return triu_of_infinity(x, y) + keys[:, None, None, :]


def input_mask(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return mask


def packed(x: Tensor, y: Tensor, documents: Tensor) -> Tensor:
    same = documents[:, :, None] == documents[:, None, :]
    return (same & causal(x, y)).unsqueeze(1)


def packed_by_index(x: Tensor, y: Tensor, documents: Tensor) -> Tensor:
    batch = torch.arange(x.shape[0])[:, None, None, None]
    q, k = torch.arange(x.shape[1])[None, None, :, None], torch.arange(x.shape[1])[None, None, None, :]
    return (documents[batch, q] == documents[batch, k]) & (k <= q)


def window(x: Tensor, y: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < 4)


def window_both_sides(x: Tensor, y: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return (i[:, None] - i[None, :]).abs() <= 2


def window_of_views(x: Tensor, y: Tensor) -> Tensor:
    n = x.shape[1]
    keys = torch.arange(n).view(1, n, 1).permute(2, 0, 1).reshape(1, n).expand(n, n)
    queries = keys.t()
    inside = torch.logical_and(keys.le(queries), keys.gt(queries.sub(3)))
    return inside.unsqueeze(0).unsqueeze(0).transpose(2, 3).transpose(-1, -2).squeeze(0).contiguous()


def window_of_triangles(x: Tensor, y: Tensor) -> Tensor:
    ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    return torch.tril(ones) & torch.triu(ones, -2) | torch.zeros_like(ones)


def part_of_a_buffer(x: Tensor, y: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64)[:, :, :n, :n]


def late_queries(x: Tensor, y: Tensor) -> Tensor:
    """Queries stand at the end of the keys, as with a cache."""
    keys = torch.arange(y.shape[1])
    return keys[None, :] <= keys[2:, None]


def strided(x: Tensor, y: Tensor) -> Tensor:
    return torch.arange(0, 2 * x.shape[1], 2)[:, None] >= torch.arange(20)[1 : 1 + y.shape[1]][None, :]


def prefix(x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    k = torch.arange(x.shape[1])
    return causal(x, y)[None, None] | (k < lengths[:, None])[:, None, None, :]


def flattened(x: Tensor, y: Tensor) -> Tensor:
    """Through dims that are split and merged."""
    i = torch.arange(12).view(3, 4)[:, 1:].reshape(9)
    return i[None, : x.shape[1]] <= i[: x.shape[1], None]


def chunked(x: Tensor, y: Tensor) -> Tensor:
    i = torch.arange(x.shape[1]) // 3
    return i[:, None] == i[None, :]


def alibi(x: Tensor, y: Tensor, slopes: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    bias = slopes.view(1, -1, 1, 1) * (i[None, :] - i[:, None])
    return bias.masked_fill(i[None, :] > i[:, None], -math.inf)


def t5(x: Tensor, y: Tensor, table: Tensor, padding: Tensor) -> Tensor:
    """T5's bucketed relative positions, bidirectional, 16 buckets."""
    i = torch.arange(x.shape[1])
    relative = i[None, :] - i[:, None]
    buckets, exact = 8, 4
    first = (relative > 0).to(torch.long) * buckets
    relative = torch.abs(relative)
    far = exact + (torch.log(relative.float() / exact) / math.log(20 / exact) * (buckets - exact)).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    bucket = first + torch.where(relative < exact, relative, far)
    bias = F.embedding(bucket, table).permute([2, 0, 1]).unsqueeze(0)
    return bias + torch.zeros(padding.shape).masked_fill(padding == 0, -1e9)[:, None, None, :]


def swin(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    index = i[:, None] - i[None, :] + x.shape[1] - 1
    n = x.shape[1]
    return table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def unknown_op(x: Tensor, y: Tensor) -> Tensor:
    return torch.flip(causal(x, y), [0])


def one_query_row(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    return padding[:, None, None, :] > 0


def nothing_is_masked(x: Tensor, y: Tensor) -> Tensor:
    return torch.ones(x.shape[1], y.shape[1], dtype=torch.bool)


def bools_added(x: Tensor, y: Tensor) -> Tensor:
    return causal(x, y) + (torch.arange(x.shape[1]) < 2)[None, :]


def parity(x: Tensor, y: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return ((i[:, None] - i[None, :]) % 2 == 0) ^ (i[None, :] < 3)


PADDING = torch.tensor([[1] * 6 + [0], [0] * 2 + [1] * 5])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 3]])
NOISE = torch.randn(16, H, generator=torch.Generator().manual_seed(0))
FULL_MASK = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(1)) < 0.5
SLOPES = torch.tensor([0.5, 0.25, 0.125])
FINEST = -3.4028234663852886e38
FLAT = "i % 3 + 4 * (i // 3)"
FAR = "int64(log(float32(abs(k - q)) / 4) / 1.6094379124341003 * 4) + 4"
BUCKET = f"int64(k - q > 0) * 8 + where(abs(k - q) < 4, abs(k - q), min({FAR}, 7))"
T5 = f"x0[{BUCKET}, h]"
SWIN = "x0[q - k + 7 - 1, h]"


@dataclass(frozen=True)
class Case:
    build: Callable[..., Tensor]
    mask: str
    inputs: tuple[Tensor, ...] = ()
    bias: str | None = None
    leaves: int = 0
    keys: int = S

    def __str__(self) -> str:
        return f"{self.build.__name__} {self.keys}"


CASES = [
    Case(causal, "k <= q"),
    Case(causal_reversed, "k <= q"),
    Case(causal_and_padding_by_index, "k <= q & bool(x0[b, k])", (PADDING,), leaves=1),
    Case(causal_and_padding_by_expand, "k <= q & bool(x0[b, k])", (PADDING,), leaves=1),
    Case(both_ends_padded, "x0[b, k] != 0 & x0[b, q] != 0", (PADDING,), leaves=1),
    Case(tril, "k <= q"),
    Case(not_triu, "k <= q"),
    Case(float_tril, "where(k <= q, 1.0, 0.0) == 1"),
    Case(triu_of_infinity, "k <= q"),
    Case(masked_fill, "k <= q"),
    Case(fill_in_place, "k <= q"),
    Case(where_infinity, "k <= q & bool(x0[b, k])", (PADDING,), leaves=1),
    Case(where_smallest, "k <= q"),
    Case(bert, "x0[b, k] != 0", (PADDING,), f"(1.0 - float32(x0[b, k])) * {FINEST!r}", leaves=1),
    Case(sum_of_additive_masks, "k <= q & not(x0[b, k] == 0)", (PADDING,), leaves=1),
    Case(input_mask, "x0[b, 0, q, k]", (FULL_MASK,), leaves=1),
    Case(input_mask, "True", (FULL_MASK.float() * -5,), "x0[b, 0, q, k]", leaves=1),
    Case(input_mask, "x0[q, k]", (FULL_MASK[0, 0],), leaves=1),
    Case(packed, "k <= q & x0[b, q] == x0[b, k]", (DOCUMENTS,), leaves=1),
    Case(packed_by_index, "k <= q & x0[b, q] == x0[b, k]", (DOCUMENTS,), leaves=1),
    Case(window, "k <= q & q - k < 4"),
    Case(window_both_sides, "abs(q - k) < 3"),
    Case(window_of_views, "k <= q & q - k < 3"),
    Case(window_of_triangles, "k <= q & q - k < 3"),
    Case(part_of_a_buffer, "k <= q"),
    Case(late_queries, "k <= q + 2", keys=K),
    Case(strided, "k <= 2 * q - 1", keys=K),
    Case(prefix, "k <= q | k < x0[b]", (torch.tensor([3, 0]),), leaves=1),
    Case(flattened, f"{FLAT.replace('i', 'k')} <= {FLAT.replace('i', 'q')}"),
    Case(chunked, "k // 3 == q // 3"),
    Case(alibi, "k <= q", (SLOPES,), "x0[h] * (k - q)", leaves=1),
    Case(t5, "not(x1[b, k] == 0)", (NOISE, PADDING), T5, leaves=2),
    Case(swin, "True", (NOISE,), SWIN, leaves=1),
    Case(unknown_op, "x0[q, k]", leaves=1),
    Case(one_query_row, "x0[b, k] > 0", (PADDING,), leaves=1),
    Case(nothing_is_masked, "True", keys=K),
    Case(bools_added, "(k <= q) + (k < 2)"),
    Case(parity, "xor((q - k) % 2 == 0, k < 3)"),
]


def attend(build: Callable[..., Tensor], keys: int) -> Callable[..., Tensor]:
    def f(x: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        q, k = (t.view(B, -1, H, D).transpose(1, 2) for t in (x, y))
        return F.scaled_dot_product_attention(q, k, k, attn_mask=build(x, y, *inputs))

    return f


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_of_models(case: Case) -> None:
    x, y = torch.randn(B, S, H * D), torch.randn(B, case.keys, H * D)
    (seen,) = watch(attend(case.build, case.keys), x, y, *case.inputs)
    assert len(seen.leaves) == case.leaves
    assert_same(seen, case.build(x, y, *case.inputs), case.keys)
    assert str(seen.site.mask) == case.mask
    assert (None if seen.site.bias is None else str(seen.site.bias)) == case.bias


def per_head(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return mask


def logical_and_of_integers(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    return torch.logical_and(padding[:, None, None, :], causal(x, y))


def index_from_the_end(x: Tensor, y: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    turned = positions[positions - 3]
    return turned[None, :] <= positions[:, None]


def smallest_double(x: Tensor, y: Tensor) -> Tensor:
    fill = torch.finfo(torch.float64).min
    return torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64).masked_fill(~causal(x, y), fill)


def tenth_of_a_double(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64).masked_fill(~causal(x, y), -0.1)


def negative_slice(x: Tensor, y: Tensor) -> Tensor:
    return causal(x, y) & (torch.arange(2 * x.shape[1])[-x.shape[1] :] < 10)[None, :]


def repeated(x: Tensor, y: Tensor) -> Tensor:
    return causal(x, y)[None, None].repeat(x.shape[0], 1, 1, 1)


def by_double_select(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    return padding.bool()[None, 1][0][None, :] & causal(x, y)


ODD: dict[Callable[..., Tensor], tuple[Tensor, ...]] = {
    per_head: (torch.randn(H, S, S, generator=torch.Generator().manual_seed(2)),),
    logical_and_of_integers: (PADDING * 2,),
    index_from_the_end: (),
    smallest_double: (),
    tenth_of_a_double: (),
    negative_slice: (),
    repeated: (),
    by_double_select: (PADDING,),
}


@pytest.mark.parametrize("build", ODD, ids=lambda build: build.__name__)
def test_odd_masks(build: Callable[..., Tensor]) -> None:
    """What matters here is the values: how they are found is no one's concern."""
    x = torch.randn(B, S, H * D, dtype=torch.float64 if "double" in build.__name__ else torch.float32)
    (seen,) = watch(attend(build, S), x, x, *ODD[build])
    assert_same(seen, build(x, x, *ODD[build]), S)


# --- sites ------------------------------------------------------------------------------------------------------------


def test_sites_without_a_mask() -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        a = F.scaled_dot_product_attention(q, k, k)
        b = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.25)
        c = F.scaled_dot_product_attention(q, k, k, dropout_p=0.5)
        return a + b + c

    q, k = torch.randn(B, H, S, D), torch.randn(B, H, K, D)
    first, second, third = watch(f, q, k)
    shapes = f"q{[B, H, S, D]} k{[B, H, K, D]} v{[B, H, K, D]}"
    assert str(first.site) == f"site 0 (scaled_dot_product_attention): {shapes}; mask True; scale 0.5"
    assert str(second.site) == f"site 1 (scaled_dot_product_attention_1): {shapes}; mask k <= q; scale 0.25"
    assert str(third.site).endswith("mask True; dropout 0.5; scale 0.5")
    eager = F.scaled_dot_product_attention(q, k, torch.eye(K).expand(B, H, K, K), is_causal=True)
    assert torch.equal(additive(second, (0, S), (0, K)) == 0, eager > 0)  # torch's causal flag is aligned at the top


def test_text_of_a_site_names_its_leaves() -> None:
    (seen,) = watch(attend(packed, S), torch.randn(B, S, H * D), torch.randn(B, S, H * D), DOCUMENTS)
    text = str(seen.site)
    assert "mask k <= q & x0[b, q] == x0[b, k]; leaves x0 = l_inputs_0_[2, 7]; scale 0.5" in text, text


def test_learned_leaves_keep_their_gradient() -> None:
    table = NOISE.clone().requires_grad_()
    x = torch.randn(B, S, H * D)
    (seen,) = watch(attend(swin, S), x, x, table)
    assert seen.leaves[0].requires_grad
    weight = torch.randn(B, H, S, S, dtype=torch.float64)
    ours = torch.autograd.grad((additive(seen, (0, S), (0, S)) * weight).sum(), seen.leaves[0])[0]
    theirs = torch.autograd.grad((swin(x, x, table).double() * weight).sum(), table)[0]
    torch.testing.assert_close(ours, theirs)


# --- Hugging Face -----------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": H,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def llama() -> nn.Module:
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES))
    return model


def mistral() -> nn.Module:
    model: nn.Module = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    return model


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=31, n_positions=32, n_embd=12, n_layer=1, n_head=H, bos_token_id=0, eos_token_id=0)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


@pytest.mark.parametrize(
    ("factory", "padded", "text"),
    [
        (llama, False, "k <= q"),
        (llama, True, "k <= q & bool(x0[b, k])"),
        (mistral, False, "k <= q & q - k < 4"),
        (mistral, True, "k <= q & q - k < 4 & bool(x0[b, k])"),
        (gpt2, False, "k <= q"),
        (gpt2, True, "k <= q & bool(x0[b, k])"),
    ],
)
def test_hugging_face(factory: Callable[[], nn.Module], padded: bool, text: str) -> None:
    model = factory().eval()
    ids = torch.arange(B * S).view(B, S)
    mask = {"attention_mask": PADDING} if padded else {}
    (seen,) = watch(lambda **batch: model(**batch, use_cache=False).logits, input_ids=ids, **mask)
    if seen.mask is not None:
        assert_same(seen, seen.mask, S)
    assert str(seen.site.mask) == text
    assert seen.site.bias is None
    assert seen.site.dropout == 0.0
