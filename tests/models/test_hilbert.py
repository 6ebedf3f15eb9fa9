"""Hilbert order: masks along the curve, and models whose tokens are in it, beside the same models on one device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ringpass import OptionError, RingConfig, top_blocks
from ringpass.layouts.hilbert import Order, curve
from ringpass.layouts.layout import Layout
from ringpass.layouts.reindex import of_curve_positions
from ringpass.masks.constants import ConstantArray
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import Expr, parse, table
from ringpass.masks.intervals import EMPTY, PARTIAL, classify
from ringpass.masks.rewrite import bind
from ringpass.patterns import Pattern, causal, everything, grid_window, window
from ringpass.schedule.block_selection import open_blocks
from ringpass.schedule.proof import prove
from ringpass.schedule.tiles import Problem, tiling
from tests.support.marks import slow
from tests.support.model_parity import Errors, compiled, relative
from tests.support.process_ranks import Workers

GRID, WIDTH, HEADS = (5, 6), 16, 2
CELLS = math.prod(GRID)


# --- masks along it ---------------------------------------------------------------------------------------------------

HEADWISE = table(np.arange(2 * 32).reshape(2, 32) % 5, *parse("x0[h, q]").indices)  # type: ignore[attr-defined]
BLOCK_SPARSE = table(np.arange(2 * 4 * 4).reshape(2, 4, 4) % 3 > 0, *parse("x0[h, q // 8, k // 8]").indices)  # type: ignore[attr-defined]
MASKS = (
    "True",
    "k <= q",
    "q - k < 7 & k <= q",
    "q < 2 | k < 2 | abs((q - 2) // 6 - (k - 2) // 6) <= 1 & abs((q - 2) % 6 - (k - 2) % 6) <= 1",
    "bool(x0[b, k]) & k <= q",
    "x1[q] == x1[k]",
    f"{HEADWISE} != k % 5",
    f"{BLOCK_SPARSE} & k <= q",
    "float32(q) / 7 < float32(k) & int32(k) % 3 == 0",
    "where(q // 2 == 3, k < 5, k >= 5)",
)


def values(expr: Expr, q: Tensor, k: Tensor, leaves: list[Tensor]) -> Tensor:
    where = {"b": torch.arange(2).view(-1, 1, 1, 1), "h": torch.arange(2).view(1, -1, 1, 1)}
    where |= {"q": q.view(1, 1, -1, 1), "k": k.view(1, 1, 1, -1)}
    return evaluate(expr, where, leaves).expand(2, 2, len(q), len(k))


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_curve_positions_is_the_mask_of_the_tokens_there(mask: str) -> None:
    order, at = Order(GRID, 2), torch.arange(32)
    leaves = [torch.rand(2, 32, generator=torch.Generator().manual_seed(0)) < 0.7, torch.arange(32) // 3 % 4]
    there, expr = torch.from_numpy(order.permutation.values), parse(mask)
    for orders in ({"q": order, "k": order}, {"q": order}, {"k": order}, {}):
        q, k = (there if name in orders else at for name in "qk")
        moved = of_curve_positions(expr, orders)
        assert torch.equal(values(moved, at, at, leaves), values(expr, q, k, leaves))
        assert str(parse(str(moved))) == str(moved)
        assert orders or moved == expr


@pytest.mark.parametrize("mask", MASKS)
def test_schedules_along_the_curve_are_proved(mask: str) -> None:
    order = Order(GRID, 2)
    moved = str(of_curve_positions(parse(mask), {"q": order, "k": order}))
    for name, world in (("contiguous", 3), ("zigzag", 2)):
        prove(Problem(moved, 32, 32, Layout(name, world), Layout(name, world), 4))


def test_constants_of_a_call_prune_along_the_curve() -> None:
    """Two objects, the left and the right half of the image: along the curve each is a few ranges."""
    order = Order((8, 8))
    ids = np.arange(64) % 8 // 4
    expr = of_curve_positions(parse("x0[b, q] == x0[b, k]"), {"q": order, "k": order})
    assert classify(expr, (0, 8), (32, 40)) == PARTIAL
    with_ids = bind(expr, {0: ConstantArray(np.stack([ids, ids]))})
    there = ids[order.permutation.values]
    for q in range(0, 64, 8):
        for k in range(0, 64, 8):
            apart = not set(there[q : q + 8]) & set(there[k : k + 8])
            assert (classify(with_ids, (q, q + 8), (k, k + 8)) == EMPTY) == apart


@pytest.mark.parametrize(
    ("grid", "radius", "plain", "along"), [((64, 64), 6, 0.193, 0.118), ((48, 80), 8, 0.342, 0.227)]
)
def test_fraction_of_open_blocks(grid: tuple[int, int], radius: int, plain: float, along: float) -> None:
    expr, order = grid_window(grid, radius).expr, Order(grid)
    moved = of_curve_positions(expr, {"q": order, "k": order})
    fractions = [float(open_blocks(x, (order.tokens, order.tokens), 64).mean()) for x in (expr, moved)]
    assert fractions == pytest.approx([plain, along], abs=5e-4)


def test_blocks_and_remote_keys_of_a_window() -> None:
    """128 x 128 tokens, radius 8, blocks of 64, 8 ranks: fewer blocks, fewer keys to receive, from more ranks."""
    expr, order, ranks = grid_window((128, 128), 8).expr, Order((128, 128)), Layout("contiguous", 8)
    found = []
    for x in (expr, of_curve_positions(expr, {"q": order, "k": order})):
        tiles = tiling(Problem(str(x), order.tokens, order.tokens, ranks, ranks, 64))
        remote = tiles.dst != tiles.src
        peers = len({*zip(tiles.dst[remote].tolist(), tiles.src[remote].tolist(), strict=True)}) / 8
        received = float(tiles.received(8).sum()) / (8 * order.tokens * 7 / 8)
        found.append((float(open_blocks(x, (order.tokens, order.tokens), 64).mean()), received, peers))
    assert found[0] == pytest.approx((0.1284, 0.125, 1.75), abs=5e-5)
    assert found[1] == pytest.approx((0.0323, 0.0781, 3.75), abs=5e-5)


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block, its norms scaled and shifted by a condition where there is one."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, condition: Tensor, allowed: Tensor | None) -> Tensor:
        scale, shift, more_scale, more_shift = self.modulation(condition)[:, None].chunk(4, -1)
        split = self.qkv(self.norms[0](x) * (1 + scale) + shift).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=self.dropout)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout)
        x = x + self.mlp(self.norms[1](x) * (1 + more_scale) + more_shift)
        return x


class Vision(nn.Module):
    """A tiny ViT: patches by a convolution, a CLS token, a position table; the features of all tokens, the logits.

    `near`: its attention has a mask of its own, made in the graph from the patches' rows, and a learned bias.
    """

    def __init__(self, near: bool = False, layers: int = 1) -> None:
        super().__init__()
        self.near = near
        self.patches, self.cls = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, CELLS + 1, WIDTH))
        self.bias = nn.Parameter(torch.randn(2 * GRID[0] + 1, HEADS))
        self.blocks = nn.ModuleList(Block(0.0) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, images: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        if self.near:
            allowed = self.nearby(torch.arange(CELLS + 1, device=x.device))
        for block in self.blocks:
            x = block(x, x.new_zeros(x.shape[0], WIDTH), allowed)
        x = self.norm(x)
        return x, self.head(x[:, 0])

    def nearby(self, at: Tensor) -> Tensor:
        """Patches at most one row away, and CLS: 0 + a bias of the rows between, else -inf."""
        row = torch.where(at > 0, (at - 1) // GRID[1], -1)
        apart = row[:, None] - row[None]
        allowed = (apart.abs() <= 1) | (at[:, None] == 0) | (at[None] == 0)
        bias = self.bias[apart + GRID[0]].permute(2, 0, 1)[None]
        return bias.masked_fill(~allowed, -torch.inf)


class Diffusion(nn.Module):
    """A tiny DiT: text tokens stand before the patches; a vector modulates every block; the patches come back."""

    TEXT = 3

    def __init__(self, dropout: float = 0.0, layers: int = 1) -> None:
        super().__init__()
        self.embed, self.text = nn.Linear(4, WIDTH), nn.Linear(5, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, latents: Tensor, text: Tensor, time: Tensor, allowed: Tensor | None = None) -> Tensor:
        x, condition = torch.cat([self.text(text), self.embed(latents)], 1), self.time(time)
        for block in self.blocks:
            x = block(x, condition, allowed)
        patches: Tensor = self.out(x[:, self.TEXT :])
        return patches


def case(name: str, **about: Any) -> tuple[nn.Module, tuple[Tensor, ...], int]:
    """(model, inputs, prefix tokens)."""
    torch.manual_seed(0)
    if name == "vision":
        return Vision(**about).double(), (torch.randn(2, 3, 2 * GRID[0], 2 * GRID[1]).double(),), 1
    inputs = torch.randn(2, CELLS, 4), torch.randn(2, Diffusion.TEXT, 5), torch.randn(2, WIDTH)
    return Diffusion(**about).double(), tuple(x.double() for x in inputs), Diffusion.TEXT


def step(model: nn.Module, run: Any, *inputs: Tensor) -> dict[str, Tensor]:
    """Each output, and the gradient of each parameter and input."""
    model.zero_grad()
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = run(*given)
    named = {f"output {i}": x for i, x in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    sum((x.pow(2).mean() + x.sin().sum() for x in named.values()), torch.zeros(())).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    grads |= {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    return {**{n: x.detach().clone() for n, x in named.items()}, **grads}


def dense(pattern: Pattern, prefix: int, along: bool) -> Tensor | None:
    """The mask of all pairs of tokens; `along`: the pattern counts curve positions."""
    if pattern == everything():
        return None
    at = torch.arange(CELLS + prefix)
    at = torch.from_numpy(Order(GRID, prefix).inverse.values) if along else at
    return values(pattern.expr, at, at, [])[0, 0]


def parity(group: dist.ProcessGroup, name: str, cases: list[dict[str, Any]], **about: Any) -> list[float]:
    """The largest relative error of each case, of options."""
    model, inputs, prefix = case(name, **about)
    found = []
    for options in cases:
        mask = dense(options.get("mask", everything()), prefix, options.get("along_curve", False))
        want = step(model, (lambda *xs, mask=mask: model(*xs, allowed=mask)) if mask is not None else model, *inputs)
        torch._dynamo.reset()
        got = step(model, compiled(model, group, hilbert=GRID, **options), *inputs)
        assert got.keys() == want.keys()
        found.append(max(relative(got[key], want[key]) for key in want))
    return found


NEAR = {"vision": grid_window(GRID, 1, skip=1), "diffusion": grid_window(GRID, 1, skip=Diffusion.TEXT)}


def options_for(name: str) -> list[dict[str, Any]]:
    near = NEAR[name]
    return [
        {"layout": "zigzag"},
        {"layout": "contiguous", "mask": near, "tile": 8},
        {"mask": window(5, 5), "along_curve": True, "tile": 8},
        {"layout": "zigzag", "mask": near, "tile": 4, "unroll_limit": 0, "outputs": "gathered"},
        {"mask": near, "tile": 4, "comm": "allgather"},
        {"mask": causal() & window(7), "along_curve": True, "layout": "striped"},
    ]


@pytest.mark.parametrize(("name", "cases"), [("vision", slice(0, 2)), ("diffusion", slice(1, 3))])
def test_outputs_and_gradients(workers: Workers, name: str, cases: slice) -> None:
    for found in workers.run(parity, 2, name, options_for(name)[cases]):
        assert max(found) < 1e-12, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision", "diffusion"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_outputs_and_gradients_of_all_kinds(workers: Workers, name: str, world: int) -> None:
    for found in workers.run(parity, world, name, options_for(name), layers=2, timeout=900.0):
        assert max(found) < 1e-12, found


@pytest.mark.parametrize("world", [2, slow(1), slow(3)])
def test_the_model_s_own_mask_and_learned_bias(workers: Workers, world: int) -> None:
    for found in workers.run(parity, world, "vision", [{"layout": "zigzag", "tile": 8}], near=True):
        assert max(found) < 1e-12, found


@pytest.mark.slow
def test_inductor(workers: Workers) -> None:
    options = {"compiler": "inductor", "mask": NEAR["diffusion"]}
    for found in workers.run(parity, 2, "diffusion", [options]):
        assert max(found) < 1e-12, found


def between(group: dist.ProcessGroup, name: str, first: dict[str, Any], second: dict[str, Any], **about: Any) -> Errors:
    """Relative errors of one compiled model against the other, from the same seeds."""
    model, inputs, _ = case(name, **about)
    results = []
    for options in (first, second):
        torch._dynamo.reset()
        torch.manual_seed(7)
        results.append(step(model, compiled(model, group, **options), *inputs))
    return {key: relative(results[0][key], results[1][key]) for key in results[1]}


@pytest.mark.parametrize("world", [2, slow(1)])
def test_dropout_is_that_of_the_tokens(workers: Workers, world: int) -> None:
    """An element's keep bit does not depend on its curve position."""
    for errors in workers.run(between, world, "diffusion", {"hilbert": GRID, "layout": "zigzag"}, {}, dropout=0.3):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("world", [2, slow(1)])
def test_chosen_blocks_are_of_tokens(workers: Workers, world: int) -> None:
    how = {"approximate": top_blocks(4, density=0.4)}
    for errors in workers.run(between, world, "vision", {"hilbert": GRID, **how}, how):
        assert max(errors.values()) < 1e-12, errors


class Tokens(nn.Module):
    """One attention over tokens that come in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def chosen_along(group: dist.ProcessGroup) -> float:
    """Blocks along the curve are blocks of tokens that are given in its order."""
    torch.manual_seed(0)
    model, x, how = Tokens().double(), torch.randn(2, CELLS, 8).double(), top_blocks(4, density=0.4)
    there = torch.from_numpy(curve(GRID))
    got = step(model, compiled(model, group, hilbert=GRID, approximate=how, along_curve=True), x)
    torch._dynamo.reset()
    want = step(model, compiled(model, group, approximate=how), x[:, there])
    errors = [relative(got[key][:, there], want[key]) for key in ("output 0", "input 0")]
    return max(*errors, relative(got["qkv.weight"], want["qkv.weight"]))


@pytest.mark.parametrize("world", [2, slow(1)])
def test_chosen_blocks_along_the_curve(workers: Workers, world: int) -> None:
    assert max(workers.run(chosen_along, world)) < 1e-12


def dumped(group: dist.ProcessGroup, directory: str) -> None:
    model, inputs, _ = case("vision", layers=2)
    options = {"hilbert": GRID, "layout": "zigzag", "outputs": "gathered", "dump": directory}
    step(model, compiled(model, group, **options), *inputs)


def test_the_dump_names_the_curve(workers: Workers, tmp_path: Path) -> None:
    """Permuted where patches and the position table are sharded, and where tokens are gathered: not in each layer.

    The CLS token stands before the curve: one rank holds it, and it is looked up by its position for the head.
    """
    workers.run(dumped, 2, str(tmp_path))
    graph = tmp_path / "graph0"
    planned = (graph / "plan.txt").read_text()
    assert "axis 0: 31 tokens, zigzag cut 1 along hilbert 5x6 after 1" in planned
    assert "axis 1: 30 tokens, zigzag along hilbert 5x6\n" in planned
    forward, backward = ((graph / "rank1" / f"{name}.py").read_text() for name in ("forward", "backward"))
    assert forward.count("restore_hilbert_5x6_prefix1:") == 1
    assert forward.count("permute_hilbert_5x6_prefix1:") == forward.count("permute_hilbert_5x6:") == 1
    assert forward.count("ringpass.permute.default(") == 3
    assert forward.count("'hilbert 5x6 after 1', ") == 2 and forward.count("'hilbert 5x6', ") == 1
    assert forward.index("ringpass.permute.default(") < forward.index("ringpass.shard.default(")
    where = "'zigzag cut 1 along hilbert 5x6 after 1', 2, 1)"
    assert forward.count("ringpass.locate.default(") == forward.count(where) == 1
    assert backward.count("ringpass.permute.default(") == 3


# --- which sequences, and bad input -----------------------------------------------------------------------------------


def refusal(model: nn.Module, *inputs: Tensor, **options: Any) -> str:
    torch._dynamo.reset()
    run: Any = torch.compile(model, backend="ring_dilated", options={"compiler": "aot_eager", **options})
    with pytest.raises(BackendCompilerFailed) as error:
        run(*inputs)
    assert isinstance(error.value.inner_exception, OptionError)
    return str(error.value.inner_exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hilbert": 196}, "one dimension.*drop the option"),
        ({"hilbert": (196,)}, "one dimension"),
        ({"hilbert": (2, 3, 4, 5)}, "a grid"),
        ({"hilbert": (14, 0)}, "at least 1"),
        ({"hilbert": (14, 14.0)}, "at least 1"),
        ({"hilbert": "14x14"}, "a grid"),
        ({"hilbert": (14, 14), "hilbert_prefix": -1}, "at least 0"),
        ({"hilbert_prefix": 1}, "'hilbert', which is not given"),
        ({"along_curve": True, "mask": causal()}, "'hilbert', which is not given"),
        ({"hilbert": (14, 14), "along_curve": True}, "add one of 'mask', 'approximate'"),
        ({"hilbert": (14, 14), "along_curve": 1}, "True or False"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        RingConfig.from_options(options)


def test_a_grid_that_does_not_match() -> None:
    model, inputs = Tokens(), (torch.randn(2, CELLS + 1, 8),)
    for sizes in ((6, 6), (3, 4)):
        said = refusal(model, *inputs, hilbert=sizes)
        assert f"hilbert={sizes}" in said and "have 31 tokens" in said and "'hilbert_prefix'" in said
    assert "hilbert_prefix=2" in refusal(model, *inputs, hilbert=GRID, hilbert_prefix=2)


class TwoLengths(nn.Module):
    """Attention over the patches alone, then with a register token."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        x = torch.cat([x[:, :1], x], 1)
        return F.scaled_dot_product_attention(x, x, x)


def test_two_sequences_that_could_be_meant() -> None:
    x = torch.randn(2, CELLS, 8)
    said = refusal(TwoLengths(), x, hilbert=GRID)
    assert "have 30, 31 tokens" in said and "'hilbert_prefix'" in said
    for prefix in (0, 1):
        torch._dynamo.reset()
        options: dict[str, Any] = {"compiler": "aot_eager", "hilbert": GRID, "hilbert_prefix": prefix}
        run: Any = torch.compile(TwoLengths(), backend="ring_dilated", options=options)
        assert torch.allclose(run(x), TwoLengths()(x), atol=1e-6)


class Joined(nn.Module):
    """Text tokens, many of them, joined to the patches."""

    def forward(self, text: Tensor, x: Tensor) -> Tensor:
        x = torch.cat([text, x], 1)
        return F.scaled_dot_product_attention(x, x, x)


def test_a_text_stream_is_inferred_from_the_cat(tmp_path: Path) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"compiler": "aot_eager", "hilbert": GRID, "dump": str(tmp_path)}
    run: Any = torch.compile(Joined(), backend="ring_dilated", options=options)
    text, x = torch.randn(2, 77, 8), torch.randn(2, CELLS, 8)
    assert torch.allclose(run(text, x), Joined()(text, x), atol=1e-6)
    (plan,) = tmp_path.glob("graph*/plan.txt")
    assert "along hilbert 5x6 after 77" in plan.read_text()
    assert "matches no sequence" in refusal(Tokens(), torch.randn(1, 77 + CELLS, 8), hilbert=GRID)
