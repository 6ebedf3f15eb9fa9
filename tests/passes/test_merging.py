"""Neighbouring tokens that are merged to one between attentions, and split again: ranks hold whole units of them.

Calls with attentions run on thread ranks, and two models from end to end under `strict`; both must give the numbers of
one device, and gather nothing but what is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.marks import slow
from tests.support.models import WIDTH, Block
from tests.support.process_ranks import Workers
from tests.support.sharded_ops import B, Case, D, check_attentions
from tests.support.zoo_parity import strict_error

H, W = 20, 6  # rows and columns of a grid
S = H * W
TOKENS, SQUARE = (B, S, D), (D, D)


def attend(x: Tensor, w: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of two heads to `memory`, or to x itself, and a norm."""
    y = x if memory is None else memory
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x @ w * 0.3, y, y @ w.mT * 0.3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + out.transpose(1, 2).flatten(2)
    return F.rms_norm(x, (D,), eps=1.0)


def grid(x: Tensor, rows: int = H) -> Tensor:
    """Tokens (B, S, C) as an image (B, C, rows, columns)."""
    return x.transpose(1, 2).reshape(B, x.shape[2], rows, x.shape[1] // rows)


def line(image: Tensor) -> Tensor:
    """An image as tokens."""
    return image.flatten(2).transpose(1, 2)


# --- tokens in a line -------------------------------------------------------------------------------------------------


def reshaped(x: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """Three tokens merged by a view, then two of these; split again in the other order; a token picked of each."""
    x = attend(x, w, causal=True)
    y = attend(x.reshape(B, S // 3, 3 * D) @ m, w, causal=True)
    z = attend(y.reshape(B, S // 6, 2 * D) @ m[: 2 * D], w)
    y = attend(y + (z @ m[: 2 * D].mT).reshape(y.shape), w)
    x = attend(x + (y @ m.mT).reshape(x.shape), w, causal=True)
    return x, x[:, 0] + y[:, -1], z[:, 1:3] * 2


def strided(x: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """Every third token beside the two after it."""
    x = attend(x, w)
    y = attend(torch.cat([x[:, i::3] for i in range(3)], -1) @ m, w, x)
    return y, x + torch.stack([y, y.sin(), y.cos()], 2).flatten(1, 2)


def pooled(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Means by a view, means and maxima by pools, which attend to the tokens they are made of, and are repeated."""
    x = attend(x, w)
    y = attend(x.view(B, S // 2, 2, D).mean(2), w, x)
    z = attend(F.max_pool1d(F.avg_pool1d(x.mT, 2), 3).mT, w, y, causal=False)
    x = attend(x + y.repeat_interleave(2, 1), w, z)
    return x + F.interpolate(z.mT, scale_factor=6).mT, z[:, None].expand(-1, 2, -1, -1).sum(1)


def convolved(x: Tensor, w: Tensor, c: Tensor, t: Tensor) -> Tensor:
    """Convolutions of two steps, side by side and overlapping, and the transposed one."""
    x = attend(x, w, causal=True)
    y = attend(F.conv1d(x.mT, c[..., :2], stride=2).mT, w, causal=True)
    z = attend(F.conv1d(y.mT, c, stride=2, padding=1).mT, w)
    y = y + F.conv_transpose1d(z.mT, t, stride=2).mT
    return attend(x + F.conv_transpose1d(y.mT, t, stride=2).mT, w, y)


def unfolded(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    x = attend(x, w)
    return attend(x.unfold(1, 3, 3).flatten(2) @ m, w, x)


# --- slices of such tokens --------------------------------------------------------------------------------------------


def compared(x: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """Tokens beside those before them; slices that begin and end inside of the units."""
    x = reshaped(x, w, m)[0]
    return x[:, 1:] - x[:, :-1], x[:, 2:].sin()[:, :-2].cos(), x[:, 1:-3] * 2


def next_token(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """The loss of a model of bytes, whose last token has no label; the slice is there before the units are."""
    first = (x @ w)[:, :-1]
    x = reshaped(x, w, m)[0]
    labels = torch.arange(B * (S - 1)).view(B, -1) % D
    return F.cross_entropy((x[:, :-1] + first).reshape(-1, D), labels.reshape(-1))


def classed(x: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """A class token before the merged ones."""
    x = attend(x, w)
    y = x.reshape(B, S // 3, 3 * D) @ m
    y = attend(torch.cat([y[:, :1] * 0 + 1, y], 1), w)
    return y[:, 0], attend(x + (y[:, 1:] @ m.mT).reshape(x.shape), w)


def joined(x: Tensor, w: Tensor, text: Tensor) -> Tensor:
    """Pairs of sounds after a text, in one sequence."""
    y = F.avg_pool1d(attend(x, w).mT, 2).mT
    return attend(attend(torch.cat([text @ w, y], 1), w, causal=True), w, causal=True)[:, 17:] * 2


# --- grids ------------------------------------------------------------------------------------------------------------


def swin(x: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """2x2 patches merged as Swin does."""
    x = attend(x, w)
    g = x.view(B, H, W, D)
    g = torch.cat([g[:, 0::2, 0::2], g[:, 1::2, 0::2], g[:, 0::2, 1::2], g[:, 1::2, 1::2]], -1)
    return attend(g.reshape(B, -1, 4 * D) @ m, w), x


def patches(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """2x2 patches merged by views, and split."""
    x = attend(x, w)
    g = x.view(B, H // 2, 2, W // 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(B, S // 4, 4 * D)
    y = attend(g @ m, w)
    y = (y @ m.mT).view(B, H // 2, W // 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(B, S, D)
    return attend(y + x, w)


def reduced(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Keys by a strided convolution of the grid, as in PVT; then a stage on 2x2 patches that overlap."""
    x = attend(x, w, line(F.conv2d(grid(x @ w), c[..., 1:, 1:], stride=2)))
    y = line(F.conv2d(grid(x), c, stride=2, padding=1))
    return attend(y, w), x.mean(1)


def mixed(x: Tensor, w: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Keys by a strided convolution, and depthwise convolutions of both grids, as in Segformer."""
    keys = line(F.conv2d(grid(x @ w), c, stride=2, padding=1))
    x = attend(x, w, keys)
    x = x + line(F.conv2d(grid(x), d, padding=1, groups=D))
    keys = keys + line(F.conv2d(grid(keys, H // 2), d, padding=2, dilation=2, groups=D)).sin()
    return attend(x, w, keys * 0.1), keys


def pooled_grid(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Pools of a grid, and its nearest neighbours."""
    x = attend(x, w)
    y = attend(line(F.avg_pool2d(grid(x), 2)), w)
    z = attend(line(F.adaptive_avg_pool2d(grid(x), (H // 2, 2))), w, y)
    x = attend(x, w, line(F.max_pool2d(grid(x), (2, 3))))
    return x + line(F.interpolate(grid(y, H // 2), size=(H, W))), z


def pixels(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    x = attend(x, w)
    y = attend(line(F.pixel_unshuffle(grid(x), 2)) @ m, w)
    return attend(x + line(F.pixel_shuffle(grid(y @ m.mT, H // 2), 2)), w)


def connector(x: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """The pixel shuffle of InternVL's connector, by views."""
    x = attend(x, w)
    g = x.view(B, H, W // 2, 2 * D).permute(0, 2, 1, 3).reshape(B, W // 2, H // 2, 4 * D).permute(0, 2, 1, 3)
    return attend(g.reshape(B, S // 4, 4 * D) @ m, w), x


def folded(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    x = attend(x, w)
    y = attend(F.unfold(grid(x), 2, stride=2).mT @ m, w)
    return attend(x + line(F.fold((y @ m.mT).mT, (H, W), 2, stride=2)), w)


CALLS: dict[Callable[..., Any], tuple[tuple[int, ...], ...]] = {
    reshaped: ((3 * D, D),),
    strided: ((3 * D, D),),
    pooled: (),
    convolved: ((D, D, 3), (D, D, 2)),
    unfolded: ((3 * D, D),),
    compared: ((3 * D, D),),
    next_token: ((3 * D, D),),
    classed: ((3 * D, D),),
    joined: ((B, 17, D),),
    swin: ((4 * D, D),),
    patches: ((4 * D, D),),
    reduced: ((D, D, 3, 3),),
    mixed: ((D, D, 3, 3), (D, 1, 3, 3)),
    pooled_grid: (),
    pixels: ((4 * D, D),),
    connector: ((4 * D, D),),
    folded: ((4 * D, D),),
}
RANKS = [(3, "zigzag"), (2, "contiguous"), (5, "zigzag"), (5, "contiguous"), (3, "contiguous"), (2, "zigzag")]


@pytest.mark.parametrize(
    ("call", "ranks", "layout"),
    [
        *((call, *RANKS[i % len(RANKS)]) for i, call in enumerate(CALLS)),
        *(slow(call, *how) for i, call in enumerate(CALLS) for how in RANKS if how != RANKS[i % len(RANKS)]),
    ],
)
def test_merging_gathers_nothing(call: Callable[..., Any], ranks: int, layout: str) -> None:
    assert check_attentions(Case("", call, (TOKENS, SQUARE, *CALLS[call])), layout, ranks) == []


def cut(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """The last tokens do not make a unit."""
    x = attend(x, w)
    return attend(x[:, : S // 7 * 7].reshape(B, S // 7, 7 * D) @ m, w)


def filled(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """The last unit is padded."""
    x = attend(x, w)
    return attend(F.pad(x, (0, 0, 0, 6)).view(B, S // 7 + 1, 7 * D) @ m, w)


def overlapping(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    x = attend(x, w)
    return attend(F.avg_pool1d(x.mT, 3, 2, 1).mT, w, x) + m.sum()


def few(x: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """Too few units for 5 ranks."""
    x = attend(x, w)
    return attend(x.reshape(B, 8, -1)[..., : 7 * D] @ m, w)


@pytest.mark.parametrize("call", [cut, filled, overlapping, few])
def test_other_ways_of_merging_are_exact(call: Callable[..., Any]) -> None:
    """They are gathered, or divided along another dim."""
    check_attentions(Case("", call, (TOKENS, SQUARE, (7 * D, D))), "zigzag", 5)


def across(x: Tensor, w: Tensor) -> Tensor:
    """Attention along rows, columns and both: the factors of a grid are no units."""
    x = attend(x, w)
    rows = attend(x.view(B * 12, 10, D), w).view(B, 12, 10, D)
    columns = attend(rows.transpose(1, 2).reshape(B * 10, 12, D), w).view(B, 10, 12, D)
    return columns.transpose(1, 2).reshape(x.shape)


def windows(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Attention to all tokens, in windows of 12, and of units of 3: each window is several of these."""
    x = attend(x, w)
    near = attend(x.reshape(B * 10, 12, D), w).reshape(B, S, D)
    return attend(near.view(B, 40, 3, D).mean(2), w), near


@pytest.mark.parametrize("call", [across, windows])
def test_attention_along_parts_of_a_sequence_is_exact(call: Callable[..., Any]) -> None:
    check_attentions(Case("", call, (TOKENS, SQUARE)), "contiguous", 2)


# --- models -----------------------------------------------------------------------------------------------------------


class Hourglass(nn.Module):
    """Merges 3 tokens, then 2 of these, and splits them in the other order; each level adds what it had before."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.into, self.middle = nn.Linear(4, WIDTH), Block(causal)
        self.down = nn.ModuleList(nn.Linear(n * WIDTH, WIDTH) for n in (3, 2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for n in (3, 2))
        self.before, self.after = (nn.ModuleList(Block(causal) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, kept = self.into(x), []
        for block, down, n in zip(self.before, self.down, (3, 2), strict=True):
            x = block(x)
            kept.append(x)
            x = down(x.reshape(x.shape[0], x.shape[1] // n, n * WIDTH))
        x = self.middle(x)
        first = x[:, 0] + kept[0][:, -1]
        for block, up, y in reversed([*zip(self.after, self.up, kept, strict=True)]):
            x = block(y + up(x).reshape(y.shape))
        return x, first


class Pyramid(nn.Module):
    """Stages on grids of patches that overlap, each of whose keys are reduced, as in Segformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleList([nn.Conv2d(3, WIDTH, 5, 2, 2), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1)])
        self.reduce = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, n, n) for n in (4, 2))
        self.near = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) for _ in range(2))
        self.blocks: Any = nn.ModuleList(Block(causal=False) for _ in range(2))
        self.head = nn.Conv2d(2 * WIDTH, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stages: list[Tensor] = []
        for embed, reduce, near, block in zip(self.patches, self.reduce, self.near, self.blocks, strict=True):
            x = embed(x)
            tokens, grid = x.flatten(2).transpose(1, 2), x.shape
            keys = reduce(tokens.transpose(1, 2).reshape(grid)).flatten(2).transpose(1, 2)
            tokens = tokens + block.attention(block.attention_norm(tokens), block.attention_norm(keys))
            x = tokens.transpose(1, 2).reshape(grid)
            x = x + F.gelu(near(x))
            stages.append(x)
        x = torch.cat([stages[0], F.interpolate(stages[1], size=stages[0].shape[2:])], 1)
        return self.head(x), stages[1].mean((2, 3))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "hourglass": (Hourglass, {"x": floats(B, 66, 4)}),
    "pyramid": (Pyramid, {"x": floats(B, 3, 88, 16)}),
}


def errors(group: dist.ProcessGroup, name: str, **options: Any) -> float:
    return strict_error(group, *MODELS[name], **options)


QUICK = [("hourglass", 3, "zigzag"), ("pyramid", 2, "contiguous")]


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [*QUICK, *(slow(name, ranks, layout) for name in MODELS for ranks in (2, 3, 5)
               for layout in ("contiguous", "zigzag", "auto") if (name, ranks, layout) not in QUICK)],
)  # fmt: skip
def test_models(workers: Workers, name: str, ranks: int, layout: str) -> None:
    assert max(workers.run(errors, ranks, name, layout=layout)) < 1e-10
