"""Random attentions with random Ulysses degrees: heads, masks, biases, dilation, layouts, ranks from a seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringpass import Dilation, reference
from ringpass.layouts.layout import STRIPES
from ringpass.schedule.head_shares import allowed_degrees
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers
from tests.support.sharded_ops import Case, check_attentions

B, D = 2, 4
SHOWN, ALL = 12, 1000
WORLDS = (2, 3, 4, 5, 6, 8)


def allowed(random: Random, heads: int, tokens: int) -> Tensor | None:
    """(.., S, S): which keys a query sees; None: all."""
    at, ids = torch.arange(tokens), torch.tensor([[random.randint(0, 2) for _ in range(tokens)] for _ in range(B)])
    width, causal = random.randint(1, tokens), at <= at[:, None]
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    odd = (torch.arange(heads) % 2 == 1)[:, None, None]
    return random.choice([None, causal, causal & (at[:, None] - at < width), causal & same, causal | odd])


def attention(
    q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, seen: Tensor | None, dilation: Dilation | None = None
) -> Tensor:
    """As models write it; `dilation` is left to the option."""
    grouped = q.shape[1] != k.shape[1]
    mask = seen
    if bias:
        mask = bias[0] if seen is None else bias[0].masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def dense(
    q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, seen: Tensor | None, dilation: Dilation | None = None
) -> Tensor:
    return reference.attention(q, k, v, dilation, mask=seen, bias=bias[0] if bias else None)


def drawn(seed: int) -> tuple[Case, str, int, dict[str, Any]]:
    """The case of that number, its layout, P and options."""
    random = Random(seed)
    world = random.choice(WORLDS)
    groups = random.choice((1, 2, 3, 7))
    heads = groups * random.choice((1, 1, 2, 3))
    tokens = random.randint(2 * world + 1, 60)
    torch.manual_seed(seed)
    seen = allowed(random, heads, tokens)
    dilated = random.random() < 0.3
    dilation = Dilation((random.randint(4, 20), tokens), (1, random.randint(1, 4)), random.choice(("mod", "block")))
    about: dict[str, Any] = {"seen": seen, "dilation": dilation if dilated else None}
    shapes: list[tuple[int, ...]] = [(B, heads, tokens, D), (B, groups, tokens, D), (B, groups, tokens, D)]
    shapes += [(heads, tokens, tokens)] if random.random() < 0.3 else []
    call: Callable[..., Tensor] = partial(attention, **about)
    case = Case("scaled_dot_product_attention.default", call, tuple(shapes), wanted=partial(dense, **about))
    layouts = ["contiguous", "zigzag", *(["striped"] if tokens >= STRIPES * world else [])]
    options: dict[str, Any] = {"ulysses_degree": random.choice(allowed_degrees(world, heads))}
    options |= {"dilation": dilation} if dilated else {}
    options |= {"tile": random.choice((3, 8, 1024))}
    return case, random.choice(layouts), world, options


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(SHOWN, ALL, 97))])
def test_random_attentions_are_those_of_one_device(first: int) -> None:
    for seed in range(first, SHOWN if first == 0 else min(first + 97, ALL)):
        case, layout, world, options = drawn(seed)
        try:
            assert not check_attentions(case, layout, world, **options), seed
        except Exception as error:
            raise AssertionError(f"seed {seed}: {layout}, {world} ranks, {options}, {case}") from error


class Model(nn.Module):
    """Two layers of attention with a mask of its own."""

    def __init__(self, heads: int, groups: int, seen: Tensor | None) -> None:
        super().__init__()
        self.heads, self.groups, self.seen = heads, groups, seen
        self.q = nn.ModuleList(nn.Linear(12, heads * D) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(12, 2 * groups * D) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(heads * D, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for q, kv, out in zip(self.q, self.kv, self.out, strict=True):
            queries = q(x).unflatten(-1, (self.heads, D)).transpose(1, 2)
            keys, values = kv(x).unflatten(-1, (2, self.groups, D)).permute(2, 0, 3, 1, 4)
            x = x + out(attention(queries, keys, values, seen=self.seen).transpose(1, 2).flatten(2))
        return x


def on_ranks(group: dist.ProcessGroup, seeds: list[int]) -> dict[int, float]:
    """The largest error of the output and of all gradients, of the largest of their elements, by seed.

    Where each query sees itself alone, the gradients of queries and keys are rounding of 0.
    """
    found = {}
    for seed in seeds:
        random = Random(seed)
        groups = random.choice((1, 2, 3))
        heads, tokens = groups * random.choice((1, 2, 4)), random.randint(2 * group.size() + 1, 60)
        torch.manual_seed(seed)
        model = Model(heads, groups, allowed(random, heads, tokens)).double()
        x = torch.randn(B, tokens, 12, dtype=torch.float64)
        degree = random.choice(allowed_degrees(group.size(), heads))
        run = compiled(model, group, ulysses_degree=degree, layout=random.choice(("zigzag", "contiguous")))
        values = []
        for step in (model, run):
            out = step(x) + 0.0
            values.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        largest = max(float(want.abs().max()) for want in values[0])
        found[seed] = max(float((got - want).abs().max()) for want, got in zip(*values, strict=True)) / largest
        torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    ("ranks", "seeds"),
    [(4, [0]), *(pytest.param(n, list(range(10 * n, 10 * n + 17)), marks=pytest.mark.slow) for n in (2, 3, 4))],
)
def test_random_models_on_gloo(workers: Workers, ranks: int, seeds: list[int]) -> None:
    for errors in workers.run(on_ranks, ranks, seeds):
        assert max(errors.values()) < 1e-11, errors
