"""What needs all tokens runs on a part of the heads or channels: recurrences, factorised attention, transforms.

Each call stands between attentions, on thread ranks, and must give the numbers of one device without a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass import ops
from ringpass.nodes import bytes_of, tensors_of
from tests.support.marks import slow
from tests.support.sharded_ops import Case, captured_of, check_attentions, planned_programs

B, S, H, D = 2, 23, 4, 3  # batch, tokens, heads, width of a head
WIDTH = H * D
TOKENS, SQUARE = (B, S, WIDTH), (WIDTH, WIDTH)
Call = Callable[..., Tensor]


def heads(x: Tensor) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D)."""
    return x.view(*x.shape[:-1], H, -1).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, S, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attend(x: Tensor, w: Tensor) -> Tensor:
    """Causal attention and a norm."""
    y = F.scaled_dot_product_attention(heads(x @ w), heads(x), heads(x @ w.mT), is_causal=True)
    out: Tensor = F.rms_norm(x + tokens(y), (WIDTH,), eps=1.0)
    return out


def between(mix: Call) -> Call:
    """Attention, `mix` with a residual, attention."""

    def call(x: Tensor, w: Tensor) -> Tensor:
        x = attend(x, w)
        return attend(x + mix(x, w), w)

    return call


# --- rows of one sequence in another ----------------------------------------------------------------------------------


def pictured(write: Call) -> Call:
    """What a vision tower makes of two pictures of 9 patches, written to the places of their tokens in a text."""
    at = torch.zeros(B, S, dtype=torch.bool)
    at[0, 2:11] = at[1, 7:16] = True

    def call(text: Tensor, pictures: Tensor, w: Tensor) -> Tensor:
        return attend(write(text @ w, at, attend(pictures, w).flatten(0, 1)), w)

    return call


PICTURED: dict[str, Call] = {
    "masked_scatter": lambda x, at, rows: x.masked_scatter(at.unsqueeze(-1).expand_as(x), rows),
    "index_put": lambda x, at, rows: x.index_put((at,), rows),
    "where": lambda x, at, rows: torch.where(
        at[..., None], rows[(at.flatten().long().cumsum(0) - 1).clamp(min=0).view(at.shape)], x
    ),
}


@pytest.mark.parametrize("world", (slow(2), 3))
@pytest.mark.parametrize("write", PICTURED)
def test_rows_of_a_divided_sequence_in_another(write: str, world: int) -> None:
    case = Case("matmul.default", pictured(PICTURED[write]), (TOKENS, (B, 9, WIDTH), SQUARE))
    assert check_attentions(case, "zigzag", world) == []


# --- recurrences over tokens ------------------------------------------------------------------------------------------


def chunked(x: Tensor, size: int) -> Tensor:
    """(B, H, S, ..) -> (B, H, chunks, size, ..), padded."""
    rest = -x.shape[2] % size
    x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, rest))
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def gated_delta(x: Tensor, w: Tensor, size: int = 8) -> Tensor:
    """The chunked gated delta rule: a state (B, H, D, D) goes from chunk to chunk; entries are written in place."""
    q, k, v = (heads(y) for y in (x @ w, x.sin(), x @ w.mT))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g, beta = (chunked(heads(y).sum(-1), size) for y in (-x.abs(), x))
    beta = beta.sigmoid().unsqueeze(-1)
    q, k, v = (chunked(y, size) for y in (q, k, v))
    g = g.cumsum(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp().tril()
    upper = torch.ones(size, size, dtype=torch.bool).triu()
    solved = -((k * beta) @ k.mT * decay).masked_fill(upper, 0)
    for i in range(1, size):
        row, above = solved[..., i, :i].clone(), solved[..., :i, :i].clone()
        solved[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    solved = solved + torch.eye(size, dtype=x.dtype)
    values, erased = solved @ (v * beta), solved @ (k * beta * g.exp().unsqueeze(-1))
    state, out = torch.zeros(B, H, D, D, dtype=x.dtype), torch.zeros_like(values)
    for i in range(q.shape[2]):
        new = values[:, :, i] - erased[:, :, i] @ state
        inner = (q[:, :, i] @ k[:, :, i].mT * decay[:, :, i]).masked_fill(upper.triu(1), 0)
        out[:, :, i] = (q[:, :, i] * g[:, :, i, :, None].exp()) @ state + inner @ new
        last = g[:, :, i, -1, None]
        kept = (k[:, :, i] * (last - g[:, :, i]).exp().unsqueeze(-1)).mT @ new
        state = state * last.unsqueeze(-1).exp() + kept
    return tokens(out.flatten(2, 3)[:, :, :S])


def state_space(x: Tensor, w: Tensor, size: int = 8) -> Tensor:
    """Mamba-2's scan over chunks: within a chunk a masked product, between chunks the decayed states."""
    step = F.softplus(heads(x).sum(-1))
    a = chunked(-step * 0.3, size)
    b, c, u = (chunked(heads(y), size) for y in (x.sin(), x.cos(), x @ w * 0.1))
    total = a.cumsum(-1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf)
    inner = torch.einsum("bhcld,bhcsd,bhcls,bhcse->bhcle", c, b, decay.exp(), u)
    states = torch.einsum("bhcsd,bhcs,bhcse->bhcde", b, (total[..., -1:] - total).exp(), u)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states], 2)
    ends = F.pad(total[..., -1], (1, 0)).cumsum(-1)
    between_chunks = (ends.unsqueeze(-1) - ends.unsqueeze(-2)).tril().exp().tril()
    states = torch.einsum("bhzc,bhcde->bhzde", between_chunks, states)[:, :, :-1]
    outer = torch.einsum("bhcld,bhcde,bhcl->bhcle", c, states, total.exp())
    return tokens((inner + outer).flatten(2, 3)[:, :, :S])


def linear_attention(x: Tensor, w: Tensor) -> Tensor:
    """Causal linear attention, by running sums of outer products."""
    q, k, v = (heads(y) for y in (F.elu(x @ w) + 1, F.elu(x) + 1, x))
    sums = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    norm = (q * k.cumsum(2)).sum(-1, True)
    return tokens((q.unsqueeze(-2) @ sums).squeeze(-2) / norm)


def token_by_token(x: Tensor, w: Tensor) -> Tensor:
    """RWKV-7 and its like, in plain torch: the state is updated token by token."""
    r, k, v = (F.normalize(heads(y), dim=-1) for y in (x @ w, x.sin(), x @ w.mT))
    decay, rate = torch.exp(-heads(x).sigmoid()), heads(x).cos().sigmoid()
    state, out = torch.zeros(B, H, D, D, dtype=x.dtype), []
    for t in range(S):
        erase = (state @ -k[:, :, t, :, None]) @ (k[:, :, t] * rate[:, :, t])[:, :, None]
        state = state * decay[:, :, t, None] + erase + v[:, :, t, :, None] * k[:, :, t, None]
        out.append((state @ r[:, :, t, :, None]).squeeze(-1))
    return tokens(torch.stack(out, 2))


# --- others -----------------------------------------------------------------------------------------------------------


def transform(x: Tensor, w: Tensor) -> Tensor:
    """A Fourier transform along the sequence, as in FNet."""
    out: Tensor = torch.fft.fft(x, dim=1).real * 0.1
    return out


def running_norm(x: Tensor, w: Tensor) -> Tensor:
    """Scans, a sort and a softmax along the sequence."""
    y = x.cumsum(1) / torch.arange(1, S + 1)[:, None]
    return y.sort(1).values.softmax(1) + x.flip(1).cummax(1).values


def left_to_decay(x: Tensor, w: Tensor) -> Tensor:
    """Each token's distance to the last one, along a sum over tokens: the last one alone moves to all ranks."""
    total = F.logsigmoid(heads(x @ w)).cumsum(2)
    return tokens(heads(x) * (total[:, :, -1:] - total).exp())


RECURRENCES = (gated_delta, state_space, linear_attention, token_by_token)


@pytest.mark.parametrize("world", (slow(2), 3, slow(5)))
@pytest.mark.parametrize("mix", (*RECURRENCES, left_to_decay, transform, running_norm))
def test_what_needs_all_tokens(mix: Call, world: int) -> None:
    assert check_attentions(Case("mul.Tensor", between(mix), (TOKENS, SQUARE)), "zigzag", world) == []


@pytest.mark.parametrize("world", (slow(2), 4))
@pytest.mark.parametrize("mix", RECURRENCES)
def test_values_of_a_recurrence_shrink_with_the_ranks(mix: Call, world: int) -> None:
    """The largest value of a rank is its part of the largest one; an all-to-all gives a part of what it is given.

    Where states pass, a rank's part is of whole chunks.
    """
    case = Case("mul.Tensor", between(mix), (TOKENS, SQUARE))
    whole = [n for n in captured_of(case).gm.graph.nodes if n.op == "call_function"]
    ours = [n for n in planned_programs(case, "contiguous", world)[0].gm.graph.nodes if n.op == "call_function"]
    passes = any(n.target in (ops.send_states, ops.receive_states) for n in ours)
    parts = ceil(S / 8) if passes and mix is gated_delta else S
    share = ceil(parts / world) / parts
    largest, ours_largest = (max(x.nbytes for n in nodes for x in tensors_of(n)) for nodes in (whole, ours))
    assert ours_largest <= share * largest
    moved = [n for n in ours if n.target is ops.all_to_all]
    assert bool(moved) != passes
    for node in moved:
        full = B * S * H * node.meta["val"].element_size() * prod(node.meta["val"].shape[3:])
        assert bytes_of(node) <= share * max(full, B * S * WIDTH * 8)


# --- factorised attention ---------------------------------------------------------------------------------------------

FRAMES, PLACES = 5, 9


def rows(x: Tensor, w: Tensor) -> Tensor:
    """Attention within each row of (N, T, D), with a residual."""
    y = F.scaled_dot_product_attention(heads(x @ w), heads(x), heads(x @ w.mT))
    return F.rms_norm(x + tokens(y), (WIDTH,), eps=1.0)


def by_views(x: Tensor, w: Tensor) -> Tensor:
    """Within frames, then across them, by views of one row of all tokens (B, T * S, D)."""
    for _ in range(2):
        x = rows(x.view(-1, PLACES, WIDTH), w).view(B, -1, WIDTH)
        y = x.view(B, FRAMES, PLACES, WIDTH).transpose(1, 2).reshape(-1, FRAMES, WIDTH)
        x = rows(y, w).view(B, PLACES, FRAMES, WIDTH).transpose(1, 2).reshape(B, -1, WIDTH)
    return x


def by_dims(x: Tensor, w: Tensor) -> Tensor:
    """The same on (B, T, S, D), across frames first."""
    x = x.view(B, FRAMES, PLACES, WIDTH)
    x = rows(x.transpose(1, 2).flatten(0, 1), w).unflatten(0, (B, PLACES)).transpose(1, 2)
    x = x + x.mean((1, 2), keepdim=True)
    return rows(x.flatten(0, 1), w).view(B, FRAMES, PLACES, WIDTH)


def masked(x: Tensor, w: Tensor) -> Tensor:
    """Causal across frames, with a mask for each row of the batch."""
    x = x.view(B, FRAMES, PLACES, WIDTH)
    x = rows(x.flatten(0, 1), w).unflatten(0, (B, FRAMES))
    y = x.transpose(1, 2).flatten(0, 1)
    bias = torch.arange(B * PLACES).view(-1, 1, 1, 1) * torch.ones(FRAMES, FRAMES, dtype=x.dtype).tril() * 0.1
    y = y + tokens(F.scaled_dot_product_attention(heads(y @ w), heads(y), heads(y), attn_mask=bias))
    return y.view(B, PLACES, FRAMES, WIDTH).transpose(1, 2)


@pytest.mark.parametrize("world", (slow(2), 3))
@pytest.mark.parametrize("call", (by_views, by_dims, masked))
def test_factorised_attention_moves_one_axis_only(call: Call, world: int) -> None:
    case = Case("mul.Tensor", call, ((B, FRAMES * PLACES, WIDTH), SQUARE))
    assert check_attentions(case, "zigzag", world) == []
    targets = [n.target for n in planned_programs(case, "zigzag", world)[0].gm.graph.nodes]
    assert ops.all_to_all not in targets
    assert ops.ring_attention in targets


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture(x: Tensor) -> Tensor:
    """Patches (B, T * S, H * D), each a column of D pixels in H channels, as pictures (B, H, T * D, S)."""
    return x.view(B, FRAMES, PLACES, H, D).permute(0, 3, 1, 4, 2).flatten(2, 3)


def scored(score: Call) -> Call:
    """Tokens scaled by what all elements of the picture that they make sum up to."""
    return lambda x, w: x * score(picture(x @ w)) / (1 + picture(x).square().sum())


SCORES: tuple[Call, ...] = (
    lambda y: F.mse_loss(y, y.detach().cos()),
    lambda y: y.mean(),
    lambda y: y.amax(),
    lambda y: y.abs().max(1).values.sum(),
    lambda y: y.std(),
    lambda y: F.cross_entropy(y, torch.zeros(B, FRAMES * D, PLACES, dtype=torch.long)) * y.norm(),
)


@pytest.mark.parametrize("world", (slow(2), 3, slow(5)))
@pytest.mark.parametrize("score", SCORES)
def test_what_sums_over_a_batch_axis_adds_the_sums_of_ranks(score: Call, world: int) -> None:
    """With more ranks than rows, and than channels, some have nothing to sum."""
    case = Case("mul.Tensor", between(scored(score)), ((B, FRAMES * PLACES, WIDTH), SQUARE))
    assert check_attentions(case, "zigzag", world) == []
