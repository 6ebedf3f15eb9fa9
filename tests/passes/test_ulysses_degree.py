"""Heads divided over neighbouring ranks, with their tokens pooled: the numbers of one device, for every degree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.alternatives import plain_ulysses
from ringpass import Dilation, ops, reference
from ringpass.errors import OptionError
from ringpass.ops import pooling
from ringpass.schedule.head_shares import allowed_degrees
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.pipeline_stages import fake_ring, stages
from tests.support.process_ranks import Workers
from tests.support.sharded_ops import Case, check_attentions

S, B, D = 37, 2, 4
HEADS = {"4": (4, 4), "7": (7, 7), "8 over 2": (8, 2), "6 over 3": (6, 3), "4 over 1": (4, 1)}


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(S)
    near = (at <= at[:, None]) & (at[:, None] - at < 9)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=q.shape[1] != k.shape[1])


def by_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A learned bias of each head."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slopes of heads, and a mask that is another one for odd heads."""
    at, heads = torch.arange(S), torch.arange(q.shape[1])[:, None, None]
    slopes = -0.1 * (heads + 1) * (at[:, None] - at).abs()
    seen = (at <= at[:, None]) | (heads % 2 == 1)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return ((q @ k.mT) * 0.5 + slopes).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def case(call: Callable[..., Any], heads: tuple[int, int], *others: tuple[int, ...]) -> Case:
    name = "scaled_dot_product_attention.default" if call is not alibi else "softmax.int"
    return Case(name, call, ((B, heads[0], S, D), (B, heads[1], S, D), (B, heads[1], S, D), *others))


WORLDS = (1, 2, 3, 4, 5, 6, 8)
DEGREES = [(world, degree) for world in WORLDS for degree in allowed_degrees(world, 8) if degree > 1 or world == 3]
BY_DEFAULT = ((2, 2), (3, 1), (4, 2), (5, 5), (6, 3))


@pytest.mark.parametrize(("world", "degree"), [x if x in BY_DEFAULT else slow(*x) for x in DEGREES])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_causal_attention(heads: tuple[int, int], world: int, degree: int) -> None:
    if degree not in allowed_degrees(world, heads[0]):
        with pytest.raises(OptionError, match=r"one of 1"):
            check_attentions(case(causal, heads), "zigzag", world, ulysses_degree=degree)
        return
    assert not check_attentions(case(causal, heads), "zigzag", world, ulysses_degree=degree)


@pytest.mark.parametrize(("world", "degree"), [(2, 2), slow(4, 2), (6, 3), slow(5, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("call", [windowed, alibi])
def test_masks_of_tokens_and_heads(call: Callable[..., Tensor], layout: str, world: int, degree: int) -> None:
    assert not check_attentions(case(call, (6, 3)), layout, world, ulysses_degree=degree)


@pytest.mark.parametrize(("world", "degree"), [(4, 2), slow(2, 2), (6, 3), slow(5, 5)])
def test_learned_bias_of_heads(world: int, degree: int) -> None:
    assert not check_attentions(case(by_head, (6, 2), (6, S, S)), "zigzag", world, ulysses_degree=degree)


@pytest.mark.parametrize("offsets", ["mod", "block"])
@pytest.mark.parametrize(("world", "degree"), [slow(2, 2), (4, 2), slow(6, 3)])
@pytest.mark.parametrize("heads", [(6, 2), (7, 7)], ids=["grouped", "7"])
def test_dilation(heads: tuple[int, int], world: int, degree: int, offsets: str) -> None:
    dilation = Dilation((16, 40), (1, 2), offsets)
    dilated = replace(case(causal, heads), wanted=partial(reference.attention, dilation=dilation, causal=True))
    options: dict[str, Any] = {"dilation": dilation, "ulysses_degree": degree}
    assert not check_attentions(dilated, "contiguous", world, **options)


@pytest.mark.parametrize(("world", "degree"), [slow(2, 2), (4, 2), slow(6, 3)])
def test_along_a_curve(world: int, degree: int) -> None:
    assert not check_attentions(case(windowed, (6, 3)), "zigzag", world, ulysses_degree=degree, hilbert=(6, 6), tile=4)


class Layer(nn.Module):
    """Queries are there before keys and values are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, D)).permute(2, 0, 3, 1, 4)
        projected: Tensor = self.out(causal(q, k, v).transpose(1, 2).flatten(2))
        return projected


@pytest.mark.parametrize("unroll_limit", [0, 256])
def test_all_to_alls_are_started_and_waited_for_in_the_lowered_graph(unroll_limit: int) -> None:
    options: Any = {"compiler": "aot_eager", "outputs": "local", "ulysses_degree": 2, "unroll_limit": unroll_limit}
    with fake_ring(1, 4), stages() as seen:
        run = torch.compile(Layer(), backend="ring_dilated", options=options)
        run(torch.randn(1, S, 8)).sum().backward()
    for stage, number in (("forward", 3), ("backward", 3)):  # q, k and v together, out; and their gradients
        nodes = list(seen[stage][0].graph.nodes)
        starts = [n for n in nodes if n.target is pooling.start_all_to_all]
        assert len(starts) == number
        assert not any(n.target in (ops.pool_tokens, ops.return_tokens) for n in nodes)
    nodes = list(seen["forward"][0].graph.nodes)
    names = [n.name for n in nodes]
    first, wait = (names.index(f"{what}_heads_2to4_of_ranks_0to2") for what in ("start", "wait"))  # rank 1: heads 2, 3
    assert "start_heads_2to4_back_to_ranks_0to2" in names
    products = [i for i, n in enumerate(nodes) if n.target in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)]
    assert any(first < i < wait for i in products)  # the projection of keys and values runs beside that of the queries


def trained(group: dist.ProcessGroup, degree: int, compiler: str) -> float:
    """The largest error of the output and of all gradients."""
    torch.manual_seed(0)
    model, x = Layer().double(), torch.randn(2, S, 8, dtype=torch.float64)
    values = []
    for run in (model, compiled(model, group, ulysses_degree=degree, compiler=compiler)):
        out = run(x) + 0.0
        values.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    return max(relative(got, want) for want, got in zip(*values, strict=True))


@pytest.mark.parametrize(("ranks", "degree"), [(2, 2), slow(4, 2), slow(3, 3), slow(4, 4)])
def test_with_inductor_on_gloo(workers: Workers, ranks: int, degree: int) -> None:
    assert max(workers.run(trained, ranks, degree, "inductor")) < 1e-12


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v)


def against_plain_ulysses(group: dist.ProcessGroup) -> list[float]:
    """The largest differences of this rank's output and of its tokens' gradients."""
    world, tokens = group.size(), 8 * group.size()
    torch.manual_seed(0)
    given = [torch.randn(B, 8, tokens, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(B, 8, tokens, D, dtype=torch.float64)
    mine = slice(group.rank() * tokens // world, (group.rank() + 1) * tokens // world)
    local = [x.detach()[:, :, mine].requires_grad_() for x in given]
    wanted = plain_ulysses(group)(local[0], local[1], local[2], True)
    want = [wanted, *torch.autograd.grad(wanted, local, weights[:, :, mine])]
    run = compiled(Causal(), group, ulysses_degree=world, layout="contiguous", outputs="local")
    out = run(*given)
    got = [out, *(x[:, :, mine] for x in torch.autograd.grad(out, given, weights[:, :, mine]))]
    return [relative(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("ranks", (2, slow(4)))
def test_the_degree_of_all_ranks_is_plain_ulysses(workers: Workers, ranks: int) -> None:
    for errors in workers.run(against_plain_ulysses, ranks):
        assert max(errors) < 1e-12, errors
