"""Random dilated attentions: dilation, mask, tensors, ranks and layout, all drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from ringpass import Dilation
from ringpass.layouts.layout import STRIPES

BATCH, WIDTH, TOLERANCE = 2, 4, 1e-11
PADDING, DOCUMENTS = "bool(x0[b, k])", "x0[b, q] == x0[b, k]"


@dataclass(frozen=True)
class Case:
    """A dilated attention with random tensors: `inputs` are q, k, v and the gradient of out."""

    dilation: Dilation
    mask: str
    allowed: Tensor  # (B, 1, S, S): what `mask` means
    leaves: list[Tensor]
    learned: bool  # the last leaf is a bias
    inputs: list[Tensor]
    world: int
    layout: str
    tile: int

    @property
    def tokens(self) -> int:
        return self.inputs[0].shape[2]

    def __str__(self) -> str:
        heads = [x.shape[1] for x in self.inputs[:2]]
        bias = ", learned bias" if self.learned else ""
        on = f"{self.world} ranks, {self.tokens} tokens, {self.layout}, tile {self.tile}, heads {heads}"
        return f"{self.dilation}, {self.mask}{bias} on {on}"


def random_case(seed: int) -> Case:
    """The random case of that number: lengths that rates do not divide, longer ones than the sequence, equal ones."""
    random, g = Random(seed), torch.Generator().manual_seed(seed)
    world, tokens, groups = 1 + seed % 5, random.randint(1, 60), random.choice((1, 2, 3))
    heads = groups * random.choice((1, 1, 2, 3))
    shapes = [(BATCH, n, tokens, WIDTH) for n in (heads, groups, groups, heads)]
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    mask, allowed, leaves = _mask(random, tokens)
    learned = random.random() < 0.25
    leaves += [torch.randn(heads, tokens, tokens, generator=g, dtype=torch.float64)] if learned else []
    layouts = ["contiguous", "zigzag", *(["striped"] if 2 * tokens >= STRIPES * world else [])]
    layout, tile = random.choice(layouts), random.choice((3, 8, 1024))
    return Case(_dilation(random, tokens), mask, allowed, leaves, learned, inputs, world, layout, tile)


def _dilation(random: Random, tokens: int) -> Dilation:
    n = random.randint(1, 4)
    if random.random() < 0.5:
        first = random.choice((4, 8))
        lengths, rates = [first << i for i in range(n)], [1 << i for i in range(n)]
    else:
        lengths, rates = [random.randint(1, tokens + 10) for _ in range(n)], [random.randint(1, 6) for _ in range(n)]
    return Dilation(tuple(lengths), tuple(rates), random.choice(("mod", "block")))


def _mask(random: Random, tokens: int) -> tuple[str, Tensor, list[Tensor]]:
    q, k = torch.arange(tokens)[:, None], torch.arange(tokens)
    width, ids = random.randint(1, tokens), torch.tensor([[random.randint(0, 2) for _ in k] for _ in range(BATCH)])
    same_document = ids[:, None, :, None] == ids[:, None, None, :]
    kinds: dict[str, tuple[Tensor, list[Tensor]]] = {
        "True": ((k >= 0) & (q >= 0), []),
        "k <= q": (k <= q, []),
        f"k <= q & q - k < {width}": ((k <= q) & (q - k < width), []),
        PADDING: (ids[:, None, None, :].bool() & (q >= 0), [ids]),
        f"k <= q & {DOCUMENTS}": ((k <= q) & same_document, [ids]),
    }
    mask = random.choice(list(kinds))
    return mask, *kinds[mask]
