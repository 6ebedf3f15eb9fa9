"""Handwritten attention: what is read from it, evaluated densely, equals what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import parse
from ringpass.ops.primitives import indices
from ringpass.passes.detect.detect import detect
from ringpass.passes.detect.site import AttentionSite
from tests.support.pipeline_stages import captured_graph

B, H, S, D = 2, 4, 7, 8
Attend = Callable[..., Tensor]


def site_of(f: Attend, *inputs: Tensor) -> tuple[AttentionSite, dict[str, Any], GraphModule] | None:
    """The one site of `f`, if it has one, and the values of the captured graph's inputs by name."""
    found: list[Any] = []

    def backend(gm: GraphModule, examples: list[Any]) -> Any:
        captured = captured_graph(gm, examples)
        sites = detect(captured.gm)
        names = [n.name for n in captured.gm.graph.nodes if n.op == "placeholder"]
        found.append((sites, dict(zip(names, examples, strict=True)), captured.gm))
        return gm

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True)(*inputs)
    ((sites, values, gm),) = found
    return (sites[0], values, gm) if sites else None


def values_of(gm: GraphModule, inputs: dict[str, Any], wanted: list[Any]) -> list[Tensor]:
    """The values of nodes of a graph."""
    seen: dict[Any, Any] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Watch(gm).run(*inputs.values())
    return [seen[n] for n in wanted]


def dense(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor]) -> Tensor:
    """Attention by what the site says."""
    dims = q.ndim
    q, k, v = (x[(None,) * (4 - dims)] if dims < 3 else x.unsqueeze(1) if dims == 3 else x for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    where = indices(q.device, q.shape[0], q.shape[1], [0, q.shape[2]], [0, k.shape[2]])
    scores = q @ k.transpose(-1, -2) * site.scale
    if site.score is not None:
        scores = evaluate(parse(str(site.score)), {**where, "score": scores}, leaves)
    if site.bias is not None:
        scores = scores + evaluate(parse(str(site.bias)), where, leaves)
    scores = scores.masked_fill(~evaluate(parse(str(site.mask)), where, leaves), -math.inf)
    if site.sink is not None:
        sink = evaluate(parse(str(site.sink)), where, leaves).to(scores.dtype)
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    out = torch.softmax(scores, -1)[..., : k.shape[2]] @ v
    return out if dims == 4 else out.squeeze(1)


# --- ways of writing it -----------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), dim=-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    bias = torch.zeros(S, S, dtype=q.dtype).masked_fill(future, torch.finfo(q.dtype).min)[None, None]
    return F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.3 + bias, dim=-1, dtype=torch.float64).to(q.dtype) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0
    return (scores + torch.full((S, S), -math.inf).triu(1)).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, ::2][:, :, None].expand(B, H // 2, 2, S, D).reshape(B, H, S, D) for x in (k, v))
    return masked(q, k, v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhqk,bkhd->bhqd", p, v)


def bloom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)
    alibi = (slopes[None, :, None] * torch.arange(S)[None, None]).expand(B, H, S).reshape(B * H, 1, S)
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = alibi.baddbmm(q, k.transpose(1, 2), beta=0.5, alpha=0.3).view(B, H, S, S)
    scores = scores + torch.full((S, S), -math.inf).triu(1)
    return torch.bmm(scores.softmax(-1).view(B * H, S, S), v)


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def three_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[:, 0] for x in (q, k, v))
    return torch.bmm(torch.bmm(q * 0.3, k.transpose(1, 2)).softmax(-1), v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
    sinks = torch.arange(H, dtype=q.dtype).reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    scores = torch.cat([scores, sinks], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1)[..., :-1] @ v


HANDWRITTEN = {  # mask, score function
    plain: ("True", None), masked: ("k <= q", None), least: ("k <= q", None), stable: ("k <= q", None),
    capped: ("k <= q", "tanh(score / 5.0) * 5.0"), grouped: ("k <= q", None), by_einsum: ("True", None),
    bloom: ("k <= q", None), three_dims: ("True", None),
    with_sinks: ("k <= q", None),
}  # fmt: skip


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=g, dtype=torch.float64) for _ in "qkv"]


@pytest.mark.parametrize("attend", HANDWRITTEN, ids=lambda f: f.__name__)
def test_what_is_read_equals_what_is_written(attend: Attend) -> None:
    found = site_of(attend, *inputs())
    assert found is not None
    site, values, gm = found
    assert (str(site.mask), None if site.score is None else str(site.score)) == HANDWRITTEN[attend]
    q, k, v, want = values_of(gm, values, [site.q, site.k, site.v, site.node])
    leaves = values_of(gm, values, list(site.leaves))
    assert torch.allclose(dense(site, q, k, v, leaves), want, rtol=0, atol=1e-13)
    assert (site.sink is not None) == (attend is with_sinks)
    if attend is grouped:
        assert k.shape[1] == H // 2


# --- what is left alone -----------------------------------------------------------------------------------------------


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-2) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + k @ q.mT, dim=-1) @ v


def not_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT) @ v


def scaled_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT, dim=-1) * 0.5) @ v


def subtracts_a_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.softmax(scores * scores.mean(-1, keepdim=True), dim=-1) @ v


def drops_a_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-1)[..., :-1] @ v[..., :-1, :]


def drops_the_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.ones(B, H, S, 1, dtype=q.dtype)], -1)
    return torch.softmax(scores, -1)[..., 1:] @ v


def two_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.ones(B, H, S, 2, dtype=q.dtype)], -1)
    return torch.softmax(scores, -1)[..., :-2] @ v


@pytest.mark.parametrize(
    "attend",
    (
        drops_a_key,
        drops_the_first,
        two_sinks,
        over_queries,
        two_products,
        not_normalised,
        scaled_afterwards,
        subtracts_a_row,
    ),
    ids=lambda f: f.__name__,
)
def test_what_is_no_attention_is_left_alone(attend: Attend) -> None:
    assert site_of(attend, *inputs()) is None


def test_rows_that_a_finite_mask_may_empty_are_told_apart() -> None:
    """Such a row sees all keys alike, which a mask would not give."""

    def padded(q: Tensor, k: Tensor, v: Tensor, exists: Tensor) -> Tensor:
        bias = torch.zeros(B, 1, 1, S, dtype=q.dtype).masked_fill(~exists[:, None, None, :], torch.finfo(q.dtype).min)
        return (q @ k.mT + bias).softmax(-1) @ v

    found = site_of(padded, *inputs(), torch.ones(B, S, dtype=torch.bool))
    assert found is not None
    site = found[0]
    assert "x0[b, k]" in str(site.mask) and site.bias is None
    assert site.keyless is not None and str(site.keyless.mask) == "True"
    assert str(site.keyless.score).startswith("score + where(") and "rows without a key" in str(site)
