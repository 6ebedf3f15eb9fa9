"""Random chains of ops that slice, join, pad, shift, convolve and compare token ranges give one device's numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.marks import slow
from tests.support.sharded_ops import B, Case, D, check_on_shards

TOKENS, LEAST, MOST = 41, 30, 60
Step = Callable[[list[Tensor], Tensor, Tensor], Tensor]  # values so far, convolution's weight, tokens to join
KINDS = ("slice", "join", "pad", "roll", "shift", "convolve", "causal", "compare", "mix", "compute")


def step(draw: random.Random, n: int) -> tuple[Step, int]:
    """An op on the last of n tokens' values, and how many tokens it gives."""
    kind, a, b = draw.choice(KINDS), draw.randint(0, 3), draw.randint(0, 3)
    kernel, apart = draw.randint(1, 4), draw.randint(1, 2)
    convolved = n + 2 * a - apart * (kernel - 1)
    steps: dict[str, tuple[Step, int]] = {
        "slice": (lambda v, w, p: v[-1][:, a : n - b] * 1.5, n - a - b),
        "join": (lambda v, w, p: torch.cat([p[:, :a], v[-1], p[:, 3 : 3 + b]], 1), n + a + b),
        "pad": (lambda v, w, p: F.pad(v[-1], (0, 0, a, b)).cos(), n + a + b),
        "roll": (lambda v, w, p: v[-1].roll(a - 2, 1) * 0.7, n),
        "shift": (lambda v, w, p: v[-1] + F.pad(v[-1], (0, 0, a - 2, 2 - a)), n),
        "convolve": (
            lambda v, w, p: F.conv1d(v[-1].mT, w[..., :kernel], padding=a, dilation=apart).mT.sin(),
            convolved,
        ),
        "causal": (
            lambda v, w, p: F.conv1d(
                F.pad(v[-1].mT, (apart * (kernel - 1), 0)), w[..., :kernel], dilation=apart
            ).mT.sin(),
            n,
        ),
        "compare": (lambda v, w, p: v[-1][:, kernel:] - v[-1][:, :-kernel] * 0.5, n - kernel),
        "mix": (lambda v, w, p: sum((x for x in v[:-1] if x.shape == v[-1].shape), v[-1]), n),
        "compute": (lambda v, w, p: F.layer_norm(v[-1] @ w[..., 0], (D,)), n),
    }
    return steps[kind]


def chain(seed: int) -> Case:
    """Two to six ops."""
    draw, n = random.Random(seed), TOKENS
    steps: list[Step] = []
    for _ in range(draw.randint(2, 6)):
        op, after = step(draw, n)
        if LEAST <= after <= MOST:
            steps.append(op)
            n = after

    def call(x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        values = [x @ weight[..., 1]]
        for op in steps:
            values.append(op(values, weight, ends))
        return values[-1].exp().clamp(max=5), values[-1].mean(1)

    return Case("mul.Tensor", call, ((B, TOKENS, D), (D, D, 4), (B, 6, D)))


SEEDS = [(1, 3, "zigzag"), (2, 5, "contiguous"), (5, 2, "striped"), (11, 4, "zigzag")]


@pytest.mark.parametrize(
    ("seed", "world", "layout"),
    [*SEEDS, *(slow(seed, 1 + seed % 5, ("zigzag", "contiguous", "striped")[seed % 3]) for seed in range(100, 400))],
)
def test_chain(seed: int, world: int, layout: str) -> None:
    check_on_shards(chain(seed), layout, world, TOKENS)
