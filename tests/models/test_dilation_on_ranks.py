"""Models with dilated attention on gloo ranks: numbers of the dense reference, and the bytes that the plan names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ringpass import Dilation, OptionError, reference
from ringpass.layouts.hilbert import curve
from tests.support.dilation_cases import BATCH, TOLERANCE, WIDTH, Case, random_case
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.process_ranks import Workers
from tests.support.traffic import received_bytes

Attend = Callable[..., Tensor]
D = Dilation((8, 16), (1, 2))


class Layer(nn.Module):
    """Attention with grouped heads, as models write it, or with `attend(q, k, v, mask)` in its place."""

    def __init__(self, heads: int, groups: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.groups, self.causal, self.dropout = heads, groups, causal, dropout
        self.q, self.out = nn.Linear(16, heads * WIDTH), nn.Linear(heads * WIDTH, 16)
        self.kv = nn.Linear(16, 2 * groups * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None, attend: Attend | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, WIDTH)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.groups, WIDTH)).permute(2, 0, 3, 1, 4)
        if attend is not None:
            y = attend(q, k, v, causal=self.causal, mask=mask)
        else:
            p, grouped = self.dropout, self.heads != self.groups
            y = F.scaled_dot_product_attention(q, k, v, mask, p, self.causal, enable_gqa=grouped)
        projected: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return projected


class Model(nn.Module):
    def __init__(self, layers: int = 2, **kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**{"heads": 4, "groups": 2, "causal": True, **kind}) for _ in range(layers))
        self.double()

    def forward(self, x: Tensor, mask: Tensor | None = None, attends: Any = ()) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(x, mask, attends[i] if attends else None)
        return x


def meant(dilation: Dilation | None, order: Tensor | None = None) -> Attend:
    """The reference with that dilation."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        return reference.attention(q, k, v, dilation, order=order, **masks)

    return attend


def stepped(model: Model, out: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def error(model: Model, got: Tensor, want: Tensor) -> float:
    pairs = zip(stepped(model, got), stepped(model, want), strict=True)
    return max(relative(a, b) if b.any() else float(a.abs().max()) for a, b in pairs)


def tokens_of(length: int) -> Tensor:
    return torch.randn(BATCH, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- numbers ----------------------------------------------------------------------------------------------------------


def through_the_backend(group: dist.ProcessGroup, seeds: range) -> list[tuple[float, str]]:
    """Errors of random dilations under random masks, and what they are."""
    errors = []
    for seed in seeds:
        torch._dynamo.reset()
        c, random = random_case(seed), Random(seed)
        heads, groups = (x.shape[1] for x in c.inputs[:2])
        mask = None if c.mask in ("True", "k <= q") else c.allowed
        model = Model(1, heads=heads, groups=groups, causal=c.mask == "k <= q")
        x, how = tokens_of(c.tokens), _as_options(c, random)
        run = compiled(model, group, layout=random.choice(("auto", "zigzag")), tile=random.choice((8, None)), **how)
        errors.append((error(model, run(x, mask), model(x, mask, [meant(c.dilation)])), str(c)))
    return errors


def _as_options(c: Case, random: Random) -> dict[str, Any]:
    """The options that mean the dilation of the case."""
    lists = {"segment_lengths": list(c.dilation.segment_lengths), "dilation_rates": list(c.dilation.dilation_rates)}
    return random.choice(({"dilation": c.dilation}, {**lists, "head_offset": c.dilation.head_offset}))


@pytest.mark.filterwarnings("ignore:.*no rate is 1")
@pytest.mark.parametrize("seeds", [range(2), slow(range(2, 50))], ids=("few", "rest"))
def test_random_cases(workers: Workers, seeds: range) -> None:
    for ranks, some in ((2, seeds[::2]), (3, seeds[1::2])):
        for errors in workers.run(through_the_backend, ranks, some):
            for found, where in errors:
                assert found < TOLERANCE, where


def selected(group: dist.ProcessGroup, options: Mapping[str, Any], dilated: list[bool], folder: str) -> float:
    model, x = Model(), tokens_of(37)
    got = compiled(model, group, dump=folder, **options)(x)
    return error(model, got, model(x, None, [meant(D if yes else None) for yes in dilated]))


def second(site: Any) -> bool:
    return bool(site.index == 1)


@pytest.mark.parametrize(
    ("options", "dilated"),
    [
        ({"dilation": D, "dilate": ["layers.1"]}, [False, True]),
        ({"segment_lengths": [8, 16], "dilation_rates": [1, 2], "dilate": [0], "unroll_limit": 0}, [True, False]),
        slow({"dilate": {second: D}}, [False, True]),
        slow({"dilate": {"*.1": None, 0: D}}, [True, False]),
        slow({"dilation": D}, [True, True]),
    ],
)
@pytest.mark.parametrize("ranks", [2, slow(1), slow(4)])
def test_some_attentions_are_dilated_and_the_others_exact(
    workers: Workers, options: dict[str, Any], dilated: list[bool], ranks: int, tmp_path: Path
) -> None:
    assert all(found < TOLERANCE for found in workers.run(selected, ranks, options, dilated, str(tmp_path)))
    (plan,) = tmp_path.glob("graph*/plan.txt")
    assert plan.read_text().count(f"dilation {D}: every token of each 8; every 2nd token of each 16") == sum(dilated)


def along(group: dist.ProcessGroup, grid: tuple[int, int]) -> float:
    model, x = Model(causal=False), tokens_of(math.prod(grid))
    order = torch.from_numpy(curve(grid))
    run = compiled(model, group, hilbert=grid, hilbert_prefix=0, along_curve=True, dilation=D)
    return error(model, run(x), model(x, None, [meant(D, order)] * 2))


@pytest.mark.parametrize("ranks", [2, slow(1), slow(3)])
def test_along_a_curve(workers: Workers, ranks: int) -> None:
    assert all(found < TOLERANCE for found in workers.run(along, ranks, (5, 6)))


def dropped(group: dist.ProcessGroup) -> list[Tensor]:
    model = Model(dropout=0.3)
    torch.manual_seed(5 + 1000 * group.rank())
    return stepped(model, compiled(model, group, dilation=D)(tokens_of(37)))


def test_dropout_is_the_same_on_any_ranks(workers: Workers) -> None:
    (alone,) = workers.run(dropped, 1)
    model = Model()
    assert relative(alone[0], model(tokens_of(37), None, [meant(D)] * 2)) > 1e-3
    for ranks in (2, 3):
        for results in workers.run(dropped, ranks):
            assert all(relative(got, want) < TOLERANCE for got, want in zip(results, alone, strict=True))


def trained(group: dist.ProcessGroup, steps: int) -> list[float]:
    """The loss of each step of a small causal model that learns to name each token's successor."""
    torch.manual_seed(0)
    body, embed, head = Model(1), nn.Embedding(11, 16).double(), nn.Linear(16, 11).double()

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.embed, self.head = body, embed, head

        def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
            logits = self.head(self.body(self.embed(ids)))
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    model = Language()
    run, g = compiled(model, group, dilation=D), torch.Generator().manual_seed(2)
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        ids = torch.randint(11, (BATCH, 45), generator=g)
        loss = run(ids, (3 * ids + 1) % 11)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_training_is_the_same_on_one_rank_and_on_two(workers: Workers) -> None:
    (alone,) = workers.run(trained, 1, 50)
    assert len(alone) == 50 and alone[-1] < 0.5 * alone[0]
    for losses in workers.run(trained, 2, 50):
        assert all(abs(got - want) < 1e-9 for got, want in zip(losses, alone, strict=True))


# --- bytes ------------------------------------------------------------------------------------------------------------


def measured(group: dist.ProcessGroup, folder: str, dilation: Dilation) -> tuple[int, int]:
    """Bytes of keys and values, and of their gradients, that this rank receives in a step."""
    model, x = Model(1, groups=4, causal=False), tokens_of(48)
    run = compiled(model, group, dilation=dilation, layout="contiguous", dump=folder)
    with received_bytes() as totals:
        run(x).square().sum().backward()
    return totals[0], totals[1]


@pytest.mark.filterwarnings("ignore:.*no rate is 1")
@pytest.mark.parametrize("ranks", [3, slow(2), slow(4)])
def test_bytes_are_the_formula_s_and_the_plan_s(workers: Workers, ranks: int, tmp_path: Path) -> None:
    length, rate, shard = 48, 4, 48 // ranks
    token = BATCH * 2 * WIDTH * 8
    want = 4 * (length // shard - 1) * shard // rate * token
    for keys, gradients in workers.run(measured, ranks, str(tmp_path), Dilation((length,), (rate,))):
        assert (keys, gradients) == (2 * want, want)  # keys and values travel in the forward and in the backward
    (plan,) = tmp_path.glob("graph*/plan.txt")
    assert f"receives at most {want // token} rows of K and V per rank, {want} bytes in a forward" in plan.read_text()


@pytest.mark.parametrize("ranks", [3, slow(2)])
def test_segments_within_a_shard_add_no_node(workers: Workers, ranks: int, tmp_path: Path) -> None:
    shard = 48 // ranks
    for keys, gradients in workers.run(measured, ranks, str(tmp_path), Dilation((shard // 2, shard), (1, 2))):
        assert keys == gradients == 0
    for stage in ("forward", "backward"):
        (text,) = (path.read_text() for path in tmp_path.glob(f"graph*/rank1/{stage}.py"))
        assert "attention" in text and "ringpass.exchange" not in text and "ringpass.wait.default" not in text


# --- refused ----------------------------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Attends to itself, then to a longer sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(x * self.scale, y, y)


def crossed(group: dist.ProcessGroup) -> float:
    model, g = Crossed(), torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 2, n, 4, dtype=torch.float64, generator=g) for n in (20, 30))
    got = compiled(model, group, dilation=D)(x, y)
    return relative(got, F.scaled_dot_product_attention(reference.attention(x, x, x, D), y, y))


def test_queries_and_keys_that_are_not_one_sequence_stay_exact(workers: Workers) -> None:
    assert all(found < TOLERANCE for found in workers.run(crossed, 2))


@pytest.mark.parametrize(
    ("dilate", "said"),
    [
        (["layers.7"], r"'layers.7' matches none of the attentions 0 \(layers.0\), 1 \(layers.1\)"),
        ([2], "2 matches none"),
        ([1.5], "takes indices in graph order from 0, module paths .*, got 1.5"),
    ],
)
def test_selectors_that_match_nothing_are_refused(dilate: list[Any], said: str) -> None:
    options: dict[str, Any] = {"dilation": D, "dilate": dilate}
    run = torch.compile(Model(), backend="ring_dilated", options=options)
    with pytest.raises(BackendCompilerFailed, match=said) as caught:
        run(tokens_of(20))
    assert isinstance(caught.value.inner_exception, OptionError)
