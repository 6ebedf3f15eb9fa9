"""Random compositions of patterns: attention on the ring equals dense attention under the mask that they stand for.

Each family is drawn with random parameters, as a pattern and, written down independently, as the boolean tensor that it
means; both are combined by the same `&`, `|` and `~`.  Length, ranks, layout, tile, heads and padding are random too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringpass import patterns
from ringpass.layouts.layout import STRIPES, assigned
from ringpass.masks.expr import Expr, call, parse
from ringpass.masks.simplify import simplify
from ringpass.ops import ring
from ringpass.patterns import Pattern
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, check_ranks, of_rank, one_thread
from tests.support.model_parity import compiled, relative
from tests.support.pattern_models import SelfAttention, out_and_grad
from tests.support.process_ranks import Workers
from tests.support.sites import site

BATCH, WIDTH, TOLERANCE = 2, 4, 1e-11
FEW, ALL = 100, 1100  # cases of the default run, and with -m slow
ON_GLOO, FEW_ON_GLOO = 50, 6
PADDING = "bool(x0[b, k])"


@dataclass(frozen=True)
class Where:
    """Random numbers, and the indices of every element of a (B, H, S, S) mask."""

    random: Random
    tokens: int
    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor

    @staticmethod
    def of(random: Random, tokens: int, heads: int) -> Where:
        shapes = (-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)
        sizes = BATCH, heads, tokens, tokens
        indices = [torch.arange(n).view(shape) for n, shape in zip(sizes, shapes, strict=True)]
        return Where(random, tokens, *indices)

    def some(self, least: int = 0) -> int:
        """A number of tokens, from `least` to a few more than there are."""
        return self.random.randint(least, self.tokens + 2)


Meant = tuple[Pattern, Tensor]  # a pattern, and the mask that it means

# --- families ---------------------------------------------------------------------------------------------------------


def causal(x: Where) -> Meant:
    return patterns.causal(), x.k <= x.q


def window(x: Where) -> Meant:
    before, after = x.some(), x.some()
    return patterns.window(before, after), (x.q - x.k <= before) & (x.k - x.q <= after)


def causal_window(x: Where) -> Meant:
    before = x.random.randint(0, x.tokens // 2)
    return patterns.causal() & patterns.window(before), (x.k <= x.q) & (x.q - x.k <= before)


def dilated_window(x: Where) -> Meant:
    count, rate = x.random.randint(0, 5), x.random.randint(1, 6)
    apart = (x.q - x.k).abs()
    return patterns.dilated_window(count, rate), (apart % rate == 0) & (apart <= count * rate)


def sink(x: Where) -> Meant:
    tokens = x.some(1)
    return patterns.sink(tokens), (x.k < tokens) & (x.q >= 0)


def global_tokens(x: Where) -> Meant:
    tokens = x.random.randint(1, 6)
    return patterns.global_tokens(tokens), (x.k < tokens) | (x.q < tokens)


def prefix(x: Where) -> Meant:
    tokens = x.some()
    return patterns.prefix(tokens), (x.k <= x.q) | (x.k < tokens)


def block_causal(x: Where) -> Meant:
    block = x.some(1)
    return patterns.block_causal(block), x.k.div(block, rounding_mode="floor") <= x.q.div(block, rounding_mode="floor")


def strided(x: Where) -> Meant:
    stride = x.some(1)
    apart = x.q - x.k
    return patterns.strided(stride), (apart >= 0) & ((apart < stride) | (apart % stride == 0))


def fixed(x: Where) -> Meant:
    block = x.some(1)
    summary = x.random.randint(1, block)
    summarised = x.k % block >= block - summary
    same = (x.k - x.k % block) == (x.q - x.q % block)
    return patterns.fixed(block, summary), (x.k <= x.q) & (same | summarised)


def documents(x: Where) -> Meant:
    cuts = sorted(x.random.sample(range(1, x.tokens), x.random.randint(0, min(6, x.tokens - 1))))
    lengths = [stop - start for start, stop in zip([0, *cuts], [*cuts, x.tokens], strict=True)]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return patterns.documents(lengths), ids[x.q] == ids[x.k]


def grid_window(x: Where) -> Meant:
    radius, skip = x.random.randint(0, 3), x.random.choice((0, 0, 1, 3))
    sizes = [x.random.randint(1, 5) for _ in range(x.random.randint(0, 2))]
    cells = [1, *accumulate(reversed(sizes), int.__mul__)]  # a step along each size, the innermost first
    sizes = [-(-x.tokens // cells[-1]), *sizes]
    near = torch.ones(1, 1, x.tokens, x.tokens, dtype=torch.bool)
    for cell, n in zip(cells, reversed(sizes), strict=True):
        q, k = ((i - skip).div(cell, rounding_mode="floor") % n for i in (x.q, x.k))
        near &= (q - k).abs() <= radius
    return patterns.grid_window(sizes, radius, skip), near | (x.q < skip) | (x.k < skip)


def rows_from(x: Where) -> Meant:
    """Rows before `first` see nothing: whole ranks of them, in a contiguous layout."""
    first = x.random.randint(0, x.tokens)
    return patterns.from_function(lambda b, h, q, k: q >= first), (x.q >= first) & (x.k >= 0)


def keys_until(x: Where) -> Meant:
    """Keys from `last` on are seen by none."""
    last = x.random.randint(0, x.tokens)
    return patterns.from_function(lambda b, h, q, k: k < last), (x.k < last) & (x.q >= 0)


def cone(x: Where) -> Meant:
    slope, n = x.random.randint(1, 3), x.some()
    return patterns.from_function(lambda b, h, q, k: (slope * q - k).abs() < n), (slope * x.q - x.k).abs() < n


def by_head(x: Where) -> Meant:
    """Odd heads of one batch element, even ones of the next, reach `reach` tokens; the others see all."""
    reach = x.some()
    pattern = patterns.from_function(lambda b, h, q, k: ((b + h) % 2 == 0) | ((q - k).abs() <= reach))
    return pattern, ((x.b + x.h) % 2 == 0) | ((x.q - x.k).abs() <= reach)


Family = Callable[[Where], Meant]
FAMILIES: tuple[Family, ...] = (
    causal, window, causal_window, dilated_window, sink, global_tokens, prefix, block_causal, strided, fixed, documents,
    grid_window, rows_from, keys_until, cone, by_head,
)  # fmt: skip


def composition(x: Where, depth: int) -> Meant:
    """A family, or two compositions of less depth combined."""
    if depth == 0:
        return x.random.choice(FAMILIES)(x)
    operation, (pattern, meant) = x.random.choice("&|~"), composition(x, depth - 1)
    if operation == "~":
        return ~pattern, ~meant
    more, also = composition(x, x.random.randrange(depth))
    return (pattern & more, meant & also) if operation == "&" else (pattern | more, meant | also)


# --- on thread ranks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One attention on `world` ranks: q, k, v, the gradient of out, the keys that exist, and the mask in both forms."""

    mask: Expr
    allowed: Tensor
    inputs: tuple[Tensor, ...]
    exists: Tensor | None
    world: int
    layout: str
    tile: int

    @property
    def tokens(self) -> int:
        return self.inputs[0].shape[2]

    @property
    def rows(self) -> Tensor:
        """(B, H, S), the rows that see a key."""
        return self.allowed.any(-1)

    def __str__(self) -> str:
        return f"{self.mask} on {self.world} ranks, {self.tokens} tokens, {self.layout}, tile {self.tile}"


def case(seed: int) -> Case:
    """The random case of that number, the same in every process."""
    random = Random(seed)
    tokens, world = random.randint(9, 40), 1 + seed % 5
    heads, groups = random.choice(((2, 2), (4, 2), (2, 1)))
    x = Where.of(random, tokens, heads)
    pattern, allowed = composition(x, random.randint(0, 3))
    if random.random() < 0.3:  # in a contiguous layout, the first ranks have no key
        row = random.randint(tokens // 2, tokens - 1)
        pattern, allowed = Pattern(simplify(call("and", pattern.expr, parse(f"q >= {row}")))), allowed & (x.q >= row)
    mask, exists = pattern.expr, None
    if random.random() < 0.4:
        exists = torch.tensor([[random.random() < 0.7 for _ in range(tokens)] for _ in range(BATCH)])
        mask, allowed = simplify(call("and", mask, parse(PADDING))), allowed & exists[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, n, tokens, WIDTH) for n in (heads, groups, groups, heads)]
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    allowed = allowed.expand(BATCH, heads, tokens, tokens)
    layout, tile = _layout(random, world, tokens), random.choice((3, 4, 7, 8, 16, 64))
    return Case(mask, allowed, inputs, exists, world, layout, tile)


def _layout(random: Random, world: int, tokens: int) -> str:
    """A named layout, striped where most stripes have a token, or chunks given at random, at least one to each rank."""
    owners = [*range(world), *random.choices(range(world), k=random.randint(0, min(tokens, 4 * world) - world))]
    random.shuffle(owners)
    named = ("contiguous", "zigzag", *(["striped"] if 2 * tokens >= STRIPES * world else []))
    return random.choice((*named, assigned(owners)))


def on_the_ring(c: Case) -> list[list[Tensor]]:
    """[out, dq, dk, dv] of each rank."""
    mask = str(c.mask)
    parse(mask)  # once for all threads: CPython 3.11's parser is not safe in several at a time

    def job(rank: int, group: str) -> list[Tensor]:
        planned = site(mask, c.tokens, c.layout, rank, c.world, c.tile, group=group, scale=SCALE)
        q, k, v, grad = (of_rank(x, c.layout, rank, c.world) for x in c.inputs)
        leaves = [] if c.exists is None else [c.exists]
        with torch.no_grad():
            out, lse = ring.forward(planned, q, k, v, leaves, None)
            return [out, *ring.backward(planned, grad, q, k, v, out, lse, leaves, None)[:3]]

    return thread_ranks.run(c.world, job)


def dense(c: Case) -> list[Tensor]:
    """[out, dq, dk, dv] of torch's SDPA on all tokens."""
    q, k, v = (x.clone().requires_grad_() for x in c.inputs[:3])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=c.allowed, scale=SCALE, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), c.inputs[3])]


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= FEW else []) for n in range(ALL)])
def test_the_ring_equals_dense_attention(seed: int) -> None:
    with one_thread():
        c = case(seed)
        found, wanted = on_the_ring(c), dense(c)
    check_ranks(found, wanted, c.layout, TOLERANCE, str(c))
    for rank, results in enumerate(found):
        dead = ~of_rank(c.rows.unsqueeze(-1), c.layout, rank, c.world).squeeze(-1)
        assert not results[0][dead].any() and not results[1][dead].any(), f"rows without a key, rank {rank}: {c}"


def test_the_cases_meet_every_circumstance() -> None:
    """At every P > 1 of the default run: rows and whole ranks that see nothing, every layout, GQA, padding."""
    met: dict[str, set[int]] = {}
    for c in map(case, range(FEW)):
        ranks = [of_rank(c.rows.unsqueeze(-1), c.layout, rank, c.world) for rank in range(c.world)]
        circumstances = {
            "a dead row": not c.rows.all(),
            "no dead row": bool(c.rows.all()),
            "a dead rank": any(x.numel() and not x.any() for x in ranks),
            "padding": c.exists is not None,
            "GQA": c.inputs[0].shape[1] > c.inputs[1].shape[1],
            c.layout.split()[0]: True,
        }
        for name, holds in circumstances.items():
            met.setdefault(name, set()).update({c.world} if holds else set())
    assert len(met) == 9 and all(worlds >= {2, 3, 4, 5} for worlds in met.values()), met


# --- on gloo ranks ----------------------------------------------------------------------------------------------------


def through_the_backend(group: dist.ProcessGroup, seeds: range) -> list[tuple[float, str]]:
    """Errors of output and gradient under the option `mask`, and the pattern."""
    errors = []
    for seed in seeds:
        torch._dynamo.reset()
        random = Random(seed)
        tokens = random.randint(9, 40)
        pattern, allowed = composition(Where.of(random, tokens, 2), random.randint(0, 3))
        layout, tile = random.choice(("auto", "contiguous", "zigzag", "striped")), random.choice((4, 8, None))
        model, x = SelfAttention(causal=False).double(), torch.randn(BATCH, tokens, 8, dtype=torch.float64)
        run = compiled(model, group, mask=pattern, layout=layout, tile=tile)
        pairs = zip(out_and_grad(run(x), model), out_and_grad(model(x, allowed), model), strict=True)
        worst = max(relative(got, want) if want.any() else float(got.abs().max()) for got, want in pairs)
        errors.append((worst, f"{pattern} on {tokens} tokens, {layout}, tile {tile}"))
    return errors


@pytest.mark.parametrize(
    "seeds",
    [range(FEW_ON_GLOO), pytest.param(range(FEW_ON_GLOO, ON_GLOO), marks=pytest.mark.slow)],
    ids=("few", "rest"),
)
def test_on_gloo_ranks(workers: Workers, seeds: range) -> None:
    for ranks, some in ((2, seeds[::2]), (3, seeds[1::2])):
        for errors in workers.run(through_the_backend, ranks, some):
            for error, where in errors:
                assert error < TOLERANCE, where
