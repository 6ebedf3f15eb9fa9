"""Sharded outputs and inputs: a rank holds its local tokens of what a model returns and is given, as on one device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DTensorShard

import ringpass
from ringpass.comm import collectives
from ringpass.comm.collectives import Shard
from ringpass.errors import InputError, MismatchError
from ringpass.layouts.layout import Layout
from ringpass.layouts.redistribution import held_by
from tests.support.errors import error_message
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.models import AttentionWithCache
from tests.support.process_ranks import Workers

LENGTH = 23


class Scores(nn.Module):
    """Causal attention, a table of positions, a head; `merged`: its output is (B * S, V)."""

    def __init__(self, merged: bool = False, length: int = LENGTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.head, self.merged = nn.Linear(8, 24), nn.Linear(8, 5), merged
        self.positions = nn.Parameter(torch.randn(length, 8))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions[: x.shape[1]]
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        scores: Tensor = self.head(x + out)
        return scores.view(-1, 5) if self.merged else scores


class Shifted(Scores):
    """Each token of the input meets the one before it, before any layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) * 0.5)


def batch(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, 5, (2, length))
    labels[0, :4] = -100
    return torch.randn(2, length, 8, dtype=torch.float64), labels


def mean_loss(scores: Tensor, labels: Tensor, count: int) -> Tensor:
    return F.cross_entropy(scores.reshape(-1, 5), labels.flatten(), reduction="sum") / count


def gradients(model: nn.Module, loss: Tensor, *others: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*model.parameters(), *others]))


def on_one_device(model: nn.Module) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, labels = batch()
    x.requires_grad_()
    scores = model(x)
    loss = mean_loss(scores, labels, int((labels >= 0).sum()))
    return scores, loss, gradients(model, loss, x)


def worst(found: list[Tensor], want: list[Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(found, want, strict=True))


# --- outputs="local" --------------------------------------------------------------------------------------------------


def local_loss(group: dist.ProcessGroup, merged: bool, options: dict[str, Any]) -> list[float]:
    """Errors of the local tokens, of the loss added up over ranks, and of the full gradients."""
    model, (x, labels) = Scores(merged), batch()
    scores, loss, grads = on_one_device(model)
    x.requires_grad_()
    got = compiled(model, group, outputs="local", **options)(x)
    dim = 0 if merged else 1
    assert type(got) is Tensor and got.shape[dim] < scores.shape[dim]
    mine = ringpass.local(labels, like=got)
    here = mean_loss(got, mine, int((labels >= 0).sum()))
    found = gradients(model, here, x)
    total = here.detach().clone()
    dist.all_reduce(total, group=group)
    want = scores.index_select(dim, ringpass.tokens_of(got))
    if merged:
        assert torch.equal(ringpass.local(labels.flatten(), like=got, dim=0), mine.flatten())
    return [relative(got, want), relative(total, loss), worst(found, grads)]


@pytest.mark.parametrize(
    ("ranks", "merged", "options"),
    [
        (2, True, {}),
        (3, False, {"layout": "zigzag"}),
        (2, False, {"hilbert": (4, 5), "hilbert_prefix": 3}),
        slow(3, True, {"layout": "striped"}),
        slow(3, True, {"hilbert": (4, 5), "hilbert_prefix": 3}),
    ],
)
def test_a_loss_over_local_tokens_has_full_gradients(
    workers: Workers, ranks: int, merged: bool, options: dict[str, Any]
) -> None:
    for errors in workers.run(local_loss, ranks, merged, options):
        assert max(errors) < 1e-12


# --- outputs="dtensor" ------------------------------------------------------------------------------------------------


def as_dtensors(group: dist.ProcessGroup, merged: bool, options: dict[str, Any], on_mesh: bool) -> list[float]:
    """Errors of the full tensor, and of gradients through it and through the shards."""
    model, (x, labels) = Scores(merged), batch()
    scores, loss, grads = on_one_device(model)
    x.requires_grad_()
    mesh = DeviceMesh.from_group(group, "cpu")
    ring: Any = mesh if on_mesh else group
    run = compiled(model, ring, outputs="dtensor", **options)
    got, dim = run(x), 0 if merged else 1
    assert isinstance(got, DTensor) and got.shape == scores.shape and got.stride() == scores.stride()
    assert got.device_mesh == mesh and got.placements[0].is_shard(dim)
    mine = scores.chunk(group.size(), dim)[group.rank()]
    assert torch.equal(ringpass.tokens_of(got), torch.arange(scores.shape[dim]).chunk(group.size())[group.rank()])
    count = int((labels >= 0).sum())
    full = got.full_tensor()
    through_full = gradients(model, mean_loss(full, labels, count), x)
    through_shards = gradients(model, run(x).pow(2).sum().full_tensor(), x)
    x_ = x.detach().requires_grad_()
    squares = gradients(model, model(x_).pow(2).sum(), x_)
    return [
        relative(got.to_local(), mine), relative(full, scores), worst(through_full, grads),
        worst(through_shards, squares),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "merged", "options", "on_mesh"),
    [
        (2, True, {"hilbert": (4, 5), "hilbert_prefix": 3}, False),
        (3, False, {"layout": "zigzag"}, True),
        slow(5, False, {}, False),
        slow(4, True, {"layout": "striped"}, True),
    ],
)
def test_dtensors_are_one_device(
    workers: Workers, ranks: int, merged: bool, options: dict[str, Any], on_mesh: bool
) -> None:
    for errors in workers.run(as_dtensors, ranks, merged, options, on_mesh):
        assert max(errors) < 1e-12


# --- parts of the sequence, and replicated outputs --------------------------------------------------------------------


def parts(group: dist.ProcessGroup, part: slice) -> list[float]:
    """Errors of an output that is a slice of the sequence, and of gradients through it, local and as a DTensor."""
    model, x, errors = AttentionWithCache(part).double(), torch.randn(2, LENGTH, 8, dtype=torch.float64), []
    keys = model(x)[1]
    want = gradients(model, keys.pow(3).sum())
    for outputs in ("local", "dtensor"):
        got = compiled(model, group, outputs=outputs, layout="zigzag")(x)[1]
        local = keys.index_select(2, ringpass.tokens_of(got))
        alone = got.to_local() if isinstance(got, DTensor) else got
        errors += [relative(alone, local), worst(gradients(model, alone.pow(3).sum()), want)]
    return errors


@pytest.mark.parametrize("part", [slice(-5, None), slow(slice(2, 9))], ids=str)
def test_a_part_of_the_sequence(workers: Workers, part: slice) -> None:
    for errors in workers.run(parts, 3, part):
        assert max(errors) < 1e-12


def few(group: dist.ProcessGroup) -> bool:
    """Whether a sequence that is too short to be divided is replicated, and its labels with it."""
    model, (x, labels) = Scores(), batch(3)
    got = compiled(model, group, outputs="local")(x)
    replicated = ringpass.local(labels, like=got) is labels and ringpass.tokens_of(got).tolist() == [0, 1, 2]
    return replicated and relative(got, model(x)) < 1e-12


def test_a_short_sequence_is_replicated(workers: Workers) -> None:
    assert workers.run(few, 2) == [True, True]
    assert few_alone()


def few_alone() -> bool:
    """The same with one process, where there is no group."""
    run = torch.compile(Scores(), backend="ring_dilated", options={"outputs": "local", "compiler": "aot_eager"})
    return ringpass.tokens_of(run(batch()[0])).tolist() == list(range(LENGTH))


# --- sharded inputs ---------------------------------------------------------------------------------------------------


@contextmanager
def gathers() -> Iterator[list[int]]:
    """The number of elements of each tensor that is gathered inside."""
    sizes: list[int] = []
    gather = collectives.gather

    def counting(x: Tensor, shard: Shard, group: str) -> Tensor:
        full = gather(x, shard, group)
        sizes.append(full.numel())
        return full

    with patch.object(collectives, "gather", counting):
        yield sizes


def local_tokens(layout: str, group: dist.ProcessGroup, length: int = LENGTH) -> Tensor:
    return torch.from_numpy(held_by(Layout(layout, group.size()), group.rank(), length))


def sharded_input(
    group: dist.ProcessGroup, layout: str, options: dict[str, Any], as_dtensor: bool = False
) -> list[float]:
    """Errors of the local tokens, and of gradients of parameters and of the input's local tokens."""
    along_curve = "hilbert" in options  # where the token before is no neighbour
    model, (x, labels), at = Scores() if along_curve else Shifted(), batch(), local_tokens(layout, group)
    scores, _, (*grads, grad) = on_one_device(model)
    mine = x[:, at].clone().requires_grad_()
    given = mine
    if as_dtensor:
        mesh = DeviceMesh.from_group(group, "cpu")
        given = DTensor.from_local(mine, mesh, [DTensorShard(1)], run_check=False, shape=x.shape, stride=x.stride())
    with gathers() as gathered:
        sharded = ringpass.sharded(given, layout=layout, group=group)
        got = compiled(model, group, outputs="local", **options)(sharded)
    assert sharded.shape == x.shape and not gathered
    loss = mean_loss(got, ringpass.local(labels, like=got), int((labels >= 0).sum()))
    *found, here = gradients(model, loss, mine)
    errors = [worst(found, grads), relative(here, grad[:, at])]
    return [relative(got, scores.index_select(1, ringpass.tokens_of(got))), *errors]


@pytest.mark.parametrize(
    ("ranks", "layout", "options", "as_dtensor"),
    [
        (2, "zigzag", {"layout": "zigzag"}, False),
        (3, "chunked", {"layout": "zigzag"}, True),
        slow(3, "contiguous", {"hilbert": (4, 5), "hilbert_prefix": 3}, False),
        slow(5, "striped", {}, False),
    ],
)
def test_a_sharded_input_is_not_gathered(
    workers: Workers, ranks: int, layout: str, options: dict[str, Any], as_dtensor: bool
) -> None:
    for errors in workers.run(sharded_input, ranks, layout, options, as_dtensor):
        assert max(errors) < 1e-12


class Layer(nn.Module):
    """Causal attention, of the width of its input."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.project, self.table = nn.Linear(8, 24), nn.Embedding(11, 8) if table else None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) if self.table else x
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def chain(group: dist.ProcessGroup, **options: Any) -> list[float]:
    """Errors of gradients through two models: as they are, at another length, with a hook between them, from ids."""
    models = nn.ModuleList([Layer(), Layer()])
    first, second = (
        compiled(m, group, layout=how, **options) for m, how in zip(models, ("zigzag", "contiguous"), strict=True)
    )
    errors, seen = [], list[Tensor]()
    for length, hooked in ((23, False), (31, False), (31, True)):
        x = torch.randn(2, length, 8, dtype=torch.float64)
        with gathers() as gathered:
            between = first(x)
            if hooked:
                between.register_hook(seen.append)
            out = second(between)
        assert bool(gathered) == hooked == (between.gathered is not None)
        want = models[1](middle := models[0](x))
        *grads, cotangent = gradients(models, want.pow(2).sum(), middle)
        errors += [relative(out, want), worst(gradients(models, out.pow(2).sum()), grads)]
    return [*errors, relative(seen[0], cotangent), *from_ids(group)]


def from_ids(group: dist.ProcessGroup) -> list[float]:
    """Errors of a model of integers, which are few and are gathered."""
    model, ids = Layer(table=True), torch.randint(0, 11, (2, LENGTH))
    given = ringpass.sharded(ids[:, local_tokens("contiguous", group)], group=group)
    found = gradients(model, compiled(model, group)(given).pow(2).sum())
    return [worst(found, gradients(model, model(ids).pow(2).sum()))]


@pytest.mark.parametrize("compiler", ["aot_eager", slow("inductor")])
def test_what_one_model_returns_is_read_where_it_is_by_the_next(workers: Workers, compiler: str) -> None:
    for errors in workers.run(chain, 2, compiler=compiler):
        assert max(errors) < 1e-12


# --- what cannot be ---------------------------------------------------------------------------------------------------


def refused(group: dist.ProcessGroup) -> list[str]:
    """What is said, on each rank, of shards that do not fit together."""
    rank, x = group.rank(), batch()[0]
    run, mine = compiled(Scores(), group), x[:, local_tokens("contiguous", group)]
    said = [
        error_message(MismatchError, lambda: ringpass.sharded(x[:, : 5 + rank], group=group)),
        error_message(MismatchError, lambda: ringpass.sharded(x[:, local_tokens("chunked", group, 22)], group=group)),
        error_message(MismatchError, lambda: ringpass.sharded(mine.float() if rank else mine, group=group)),
        error_message(InputError, lambda: ringpass.sharded(mine, layout="zigzak", group=group)),
        error_message(InputError, lambda: ringpass.tokens_of(mine + 1)),
        error_message(MismatchError, lambda: ringpass.sharded(mine, group=group) if rank else run(x)),
    ]
    shared = ringpass.sharded(mine, group=group)
    return [*said, error_message(MismatchError, lambda: run(x if rank else shared))]


def test_shards_that_do_not_fit_are_refused_on_every_rank(workers: Workers) -> None:
    for said in workers.run(refused, 3):
        for text, wanted in zip(said, REFUSED, strict=True):
            assert re.search(wanted, text), said


REFUSED = (
    "hold 5, 6, 7 tokens of 18, and in layout 'contiguous' they hold 6, 6, 6",
    "these are the lengths of layout='chunked'",
    "differ in shard: rank 0 has torch.float64",
    "got 'zigzak'",
    "outputs='local'",
    r"differ in call: rank 0 has call \d+ of a compiled model \(test_shards.py:\d+\), rank 1 has call \d+ of ringpass",
    r"\[2, 23, 8\] sharded",
)
