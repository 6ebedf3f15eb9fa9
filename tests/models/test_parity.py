"""Models on real gloo ranks give the numbers of one device: every output, the loss, every gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.marks import slow
from tests.support.model_parity import compiled, has_loss, outputs_and_gradients, parity, relative, worst
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.process_ranks import Workers

LENGTH = 23  # prime, odd: nothing divides it
RANKS = (1, 2, 3, 4, 5)
LAYOUTS = ("contiguous", "zigzag")
EXACT = 1e-10
LANGUAGE = [("nanogpt", labels, False) for labels in (True, False)] + [
    (name, labels, padding) for name in ("gpt2", "llama") for labels in (True, False) for padding in (True, False)
]


def check(workers: Workers, ranks: int, *args: Any, **options: Any) -> None:
    error, where = worst(workers.run(parity, ranks, *args, **options))
    assert error < EXACT, where


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [
        ("nanogpt", 1, "contiguous"),
        ("nanogpt", 2, "zigzag"),
        ("nanogpt", 5, "zigzag"),
        ("gpt2", 1, "contiguous"),
        slow("gpt2", 2, "contiguous"),
        ("gpt2", 3, "zigzag"),
        ("gpt2", 4, "zigzag"),
        ("llama", 2, "zigzag"),
        slow("llama", 3, "contiguous"),
    ],
)
def test_language_models(workers: Workers, name: str, ranks: int, layout: str) -> None:
    check(workers, ranks, name, LENGTH, True, name != "nanogpt", layout=layout)


@pytest.mark.parametrize(
    ("name", "labels", "padding"),
    [slow("nanogpt", False, False), ("gpt2", True, False), ("gpt2", False, True), slow("llama", False, False)],
)
def test_labels_and_padding(workers: Workers, name: str, labels: bool, padding: bool) -> None:
    check(workers, 3 if labels else 2, name, LENGTH, labels, padding, layout="zigzag" if padding else "contiguous")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "labels", "padding"), LANGUAGE)
def test_full_grid(workers: Workers, name: str, labels: bool, padding: bool, ranks: int, layout: str) -> None:
    check(workers, ranks, name, LENGTH, labels, padding, layout=layout)


@pytest.mark.parametrize("ranks", (slow(1), slow(2), 3, slow(4), slow(5)))
@pytest.mark.parametrize("name", ("conditioned", "position_table", "cross", "two_graphs"))
def test_other_models(workers: Workers, name: str, ranks: int) -> None:
    check(workers, ranks, name, LENGTH, True, False, layout="zigzag" if ranks % 2 else "contiguous")


@pytest.mark.parametrize("name", ("conditioned", slow("position_table"), slow("cross"), slow("two_graphs")))
def test_other_models_with_the_loss_outside(workers: Workers, name: str) -> None:
    check(workers, 3, name, LENGTH, False, False, layout="zigzag")


@pytest.mark.parametrize(("name", "bound"), [slow("nanogpt", EXACT), slow("gpt2", EXACT), slow("llama", 1e-6)])
def test_with_inductor(workers: Workers, name: str, bound: float) -> None:
    """Llama computes its rotary tables in float32 whatever its dtype; Inductor's cos is not eager's to the last bit."""
    error, where = worst(workers.run(parity, 2, name, LENGTH, True, name != "nanogpt", compiler="inductor"))
    assert error < bound, where


@pytest.mark.parametrize("length", (slow(2), slow(3), 7))
def test_few_tokens(workers: Workers, length: int) -> None:
    """At most two tokens per rank: the sequence stays replicated."""
    check(workers, 4, "nanogpt", length, True, False)


def accumulated(group: dist.ProcessGroup, name: str) -> dict[str, float]:
    """Gradients of two batches of different length, added up, then an optimiser step."""
    models = [MODELS[name].make() for _ in range(2)]
    runs = [models[0], compiled(models[1], group)]
    for model, run in zip(models, runs, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for length in (LENGTH, LENGTH + 6):
                loss_of(run(**batch_for(name, length))).backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    return {n: relative(got, want) for (n, want), got in pairs}


@pytest.mark.parametrize("ranks", (2, slow(3)))
def test_gradient_accumulation_and_changing_lengths(workers: Workers, ranks: int) -> None:
    error, where = worst(workers.run(accumulated, ranks, "gpt2"))
    assert error < EXACT, where


def evaluated(group: dist.ProcessGroup, name: str) -> dict[str, float]:
    """Evaluation without gradients."""
    model = MODELS[name].make().eval()
    batch = batch_for(name, LENGTH)
    with torch.no_grad():
        want, got = loss_of(model(**batch)), loss_of(compiled(model, group)(**batch))
    return {"loss": relative(got, want)}


def test_without_gradients(workers: Workers) -> None:
    assert worst(workers.run(evaluated, 3, "llama"))[0] < EXACT


def precision(group: dist.ProcessGroup, dtype: torch.dtype) -> dict[str, float]:
    """Errors against float64: of one device and of the ring, in `dtype`, over outputs and over gradients."""
    totals: dict[str, float] = {}
    low = MODELS["nanogpt"].make().to(dtype)
    ring = compiled(low, group)
    for seed in range(3):
        model = MODELS["nanogpt"].make(seed=seed)
        batch = batch_for("nanogpt", 61, seed=seed)
        assert has_loss(batch)
        exact = outputs_and_gradients(model, model, batch)
        low.load_state_dict(model.state_dict())
        for who, run in (("one device", low), ("ring", ring)):
            got = outputs_and_gradients(low, run, batch)
            for kind in ("grad", "0"):
                keys = [k for k in exact if k.startswith(kind)]
                missed = sum(float((got[k].double() - exact[k]).square().sum()) for k in keys)
                wanted = sum(float(exact[k].square().sum()) for k in keys)
                totals[f"{who} {kind}"] = totals.get(f"{who} {kind}", 0.0) + missed / wanted
    return {k: v**0.5 for k, v in totals.items()}


@pytest.mark.parametrize("ranks", (slow(2), 3, slow(5)))
@pytest.mark.parametrize("dtype", (slow(torch.float32), torch.bfloat16), ids=str)
def test_error_is_that_of_one_device_at_any_size(workers: Workers, dtype: torch.dtype, ranks: int) -> None:
    for errors in workers.run(precision, ranks, dtype):
        for kind in ("grad", "0"):
            assert errors[f"ring {kind}"] <= 1.5 * errors[f"one device {kind}"], errors
