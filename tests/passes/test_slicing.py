"""Slices of the sequence: what a model cuts off, puts in front, joins and reads from its neighbours stays on its ranks.

Each model is run under `strict`, which refuses any gather, and must give the numbers of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringpass.layouts.layout import Layout, few
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.models import HEADS, VOCAB, WIDTH, Block
from tests.support.process_ranks import Workers
from tests.support.zoo_parity import step, strict_error

ROWS, TOKENS = 2, 23


class Shifted(nn.Module):
    """A decoder whose loss is of all logits but the last, and all labels but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(2))

    def forward(self, idx: Tensor) -> tuple[Tensor]:
        x = self.tokens(idx)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return (F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), idx[:, 1:].reshape(-1)),)


class Classes(nn.Module):
    """Patches by a convolution, two tokens before them that are read apart, the mean of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 2, WIDTH))
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(2))
        self.positions, self.head = nn.Parameter(torch.randn(1, 21, WIDTH)), nn.Linear(2 * WIDTH, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            before, x = x[:, :2], x[:, 2:]
            x = block(torch.cat([before * 1.5, x.sin()], 1))
        return x, self.head(torch.cat([x[:, 0], x[:, 2:].mean(1)], -1))


class Streams(nn.Module):
    """Text and image with layers of their own, which attend to each other in one sequence, as in SD3 and Flux."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(4, WIDTH) for _ in range(2))
        self.qkv: Any = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)) for _ in range(2))
        self.out: Any = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))
        self.single, self.alone = Block(causal=False), Block(causal=False)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        streams = [into(x) for into, x in zip(self.into, (text, image), strict=True)]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            heads = [qkv[i](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4) for i, x in enumerate(streams)]
            q, k, v = (torch.cat([h[i] for h in heads], 2) for i in range(3))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            first, second = y.split([text.shape[1], image.shape[1]], 1)
            streams = [streams[0] + out[0](first), streams[1] + out[1](second)]
        streams[1] = self.alone(streams[1])
        joined = self.single(torch.cat(streams, 1))
        return joined[:, : text.shape[1]] * 2, joined[:, text.shape[1] :].sin()


class Neighbours(nn.Module):
    """Audio convolutions, one of them of two steps; then in each layer a token shift and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv1d(4, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 3, 2, padding=1)])
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(2))
        self.near = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH) for _ in range(2))
        self.mix = nn.Parameter(torch.rand(WIDTH))

    def forward(self, sound: Tensor) -> tuple[Tensor]:
        x = F.gelu(self.stem[1](F.gelu(self.stem[0](sound)))).transpose(1, 2)
        for block, near in zip(self.blocks, self.near, strict=True):
            x = block(x)
            x = x * self.mix + F.pad(x, (0, 0, 1, -1)) * (1 - self.mix)
            x = x + near(x.transpose(1, 2)).transpose(1, 2)
        return (x,)


class Before(nn.Module):
    """Causal convolutions of padded input, written in both ways; token shifts by cat and by roll; what a token adds to
    the one before it; keys and values of different tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, WIDTH, 3)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(2))
        self.near = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 4, padding=3, groups=WIDTH) for _ in range(2))
        self.mix, self.same = nn.Parameter(torch.rand(WIDTH)), nn.Conv1d(WIDTH, WIDTH, 3, padding="same")

    def forward(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(F.pad(sound, (2, 0))).transpose(1, 2)
        for block, near in zip(self.blocks, self.near, strict=True):
            x = block(x + near(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
            x = x + self.mix * (torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x)
        x = x + self.same(x.transpose(1, 2)).transpose(1, 2) + x.roll(1, 1).cos()
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (x, x[:, 1:], x[:, :-1]))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x, (x[:, 1:] - x[:, :-1]).pow(2).mean()


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def ids(length: int) -> Tensor:
    return torch.randint(VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "shifted": (Shifted, {"idx": ids(TOKENS)}),
    "classes": (Classes, {"images": floats(ROWS, 3, 7, 15)}),
    "streams": (Streams, {"text": floats(ROWS, 10, 4), "image": floats(ROWS, 13, 4)}),
    "neighbours": (Neighbours, {"sound": floats(ROWS, 4, 2 * TOKENS)}),
    "before": (Before, {"sound": floats(ROWS, 4, TOKENS)}),
}


def errors(group: dist.ProcessGroup, name: str, **options: Any) -> float:
    return strict_error(group, *MODELS[name], **options)


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [("streams", 3, "zigzag"), ("neighbours", 3, "zigzag"),
     *(slow(name, ranks, layout) for name in MODELS for ranks in (2, 3, 4, 5)
       for layout in ("contiguous", "zigzag", "striped", "auto"))],
)  # fmt: skip
def test_nothing_is_gathered(workers: Workers, name: str, ranks: int, layout: str) -> None:
    assert max(workers.run(errors, ranks, name, layout=layout)) < 1e-10


def test_along_a_curve(workers: Workers) -> None:
    options: dict[str, Any] = {"hilbert": (3, 7), "hilbert_prefix": 2, "layout": "zigzag"}
    assert max(workers.run(errors, 2, "classes", **options)) < 1e-10


class Growing(nn.Module):
    """A multiple of eight tokens inside, a token shift, a depthwise convolution: halos of sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.near = Block(causal=False), nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        length = x.shape[1]
        x = self.block(x)
        x = x + F.pad(x, (0, 0, 1, -1)) + self.near(x.mT).mT
        return (self.block(F.pad(x, (0, 0, 0, -length % 8)))[:, :length] * 2,)


GROWING: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]] = {
    "shifted": (Shifted, lambda length: {"idx": ids(length)}),
    "before": (Before, lambda length: {"sound": floats(ROWS, 4, length)}),
    "growing": (Growing, lambda length: {"x": floats(ROWS, length, WIDTH)}),
}


def lengths(group: dist.ProcessGroup, name: str) -> tuple[float, int]:
    """The largest error at lengths that change, and how often the model was compiled for them."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    make, batch_of = GROWING[name]
    model = make().double()
    counters.clear()
    run, worst = compiled(model, group, strict=make is not Growing), 0.0
    for length in (TOKENS, 31, 41, 57):
        batch = batch_of(length)
        want, got = (step(model, how, batch) for how in (model, run))
        worst = max(worst, *(relative(got[key], want[key]) for key in want))
    return worst, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", [slow("shifted"), "before", slow("growing")])
def test_lengths_that_change(workers: Workers, name: str) -> None:
    for worst, graphs in workers.run(lengths, 2, name):
        assert worst < 1e-10 and graphs <= 2


class Still(nn.Module):
    """A layer that the model uses under no_grad alone."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.frozen = Block(causal=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        with torch.no_grad():
            z = self.frozen(y)[:, 1:].sin()
        out: Tensor = y[:, 1:] * z
        return out


def without_gradient(group: dist.ProcessGroup) -> list[str]:
    """Names of the parameters that have none."""
    model = Still().double()
    compiled(model, group, strict=True)(floats(ROWS, TOKENS, WIDTH)).sum().backward()
    return [name for name, p in model.named_parameters() if p.grad is None]


def test_weights_under_no_grad_have_no_gradient(workers: Workers) -> None:
    assert workers.run(without_gradient, 2) == [["frozen.weight", "frozen.bias"]] * 2


@pytest.mark.parametrize("world", (1, 2, 3, 5))
@pytest.mark.parametrize("name", ("contiguous", "zigzag", "striped"))
@pytest.mark.parametrize("points", ("1", "-1", "1,-1", "3,-2,-1", "20", "20,-23"))
def test_slices_between_split_points_are_sharded_as_sequences(name: str, points: str, world: int) -> None:
    tokens, numbers = 61, [int(n) for n in points.split(",")]
    layout = Layout(f"{name} cut {points}", world)
    held = [[t for a, b in layout.ranges(rank, tokens) for t in range(a, b)] for rank in range(world)]
    assert sorted(sum(held, [])) == list(range(tokens))
    assert [layout.length(rank, tokens) for rank in range(world)] == list(map(len, held))
    ends = [0, *(n % tokens for n in numbers), tokens]
    for point, end in zip(numbers, ends[1:], strict=False):
        assert [layout.before(rank, tokens, point) for rank in range(world)] == [sum(t < end for t in h) for h in held]
    for start, stop in zip(ends, ends[1:], strict=False):
        if stop - start >= few(world):
            alone = Layout(name, world).ranges
            want = [[start + t for a, b in alone(rank, stop - start) for t in range(a, b)] for rank in range(world)]
            assert [[t for t in h if start <= t < stop] for h in held] == want
