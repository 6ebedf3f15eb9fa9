"""Public models on gloo ranks give the numbers of one device, and nothing is gathered between embedding and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.marks import slow
from tests.support.process_ranks import Workers
from tests.support.zoo import ZOO
from tests.support.zoo_parity import local_fraction, zoo_parity

EXACT, SINGLE = 1e-9, 1e-4
KINDS = [  # labels, padding, training
    (True, False, True), (False, False, True), (True, True, True), (False, True, False),
]  # fmt: skip
LOCAL = 0.99  # the least fraction of the FLOPs on local tokens
GATHERED = {  # why an entry gathers something
    "nn_attention_maps": "attention maps are returned",
    "qwen2_5_vl": "layers after windows of several lengths, which are cut at lengths that become symbolic",
}
REPLICATED = {  # why an entry computes more than 1 - LOCAL on every rank
    "dit": "layers of one vector for a whole picture, beside 25 patches",
    "sd3": "layers of one vector for a whole picture, beside 25 patches",
    "cogvideox": "patches, cut out of each frame before the frames are one sequence",
    "sam2": "patches that overlap, and the layers before the first windows are sequences",
    "moonshine": "the strided convolutions that make tokens of the wave",
}
ONE_HEAD = {  # why heads cannot be divided over ranks
    "bloom": "heads are merged into the batch",
    "nn_attention_weights": "heads are merged into the batch where weights are returned",
    "nn_attention_maps": "heads are merged into the batch where weights are returned",
}
ON_FOUR_RANKS = {  # what is not on local tokens, on four ranks only
    "sam2": "windows of 2 x 2 patches, fewer than 2 for each rank, and queries pooled to as few",
    "gemma3_vision": "patches, cut out of 6 rows, which 4 ranks do not divide",
}
NOT_FOUR_HEADS = {"sam2": "the first stage has 2 heads"}
BY_DEFAULT = {  # one of each kind; (attention, labels, padding, training)
    "gemma2": ("eager", True, False, True),
    "mixtral": ("sdpa", True, True, True),
    "bloom": ("eager", True, True, True),
    "dit": ("eager", True, False, True),
    "nn_encoder": ("sdpa", False, True, False),
    "nn_attention_weights": ("sdpa", True, True, True),
    "nanogpt_manual": ("sdpa", True, False, True),
}
CASES = [
    slow(name, attention, *kind, ranks)
    for name, entry in ZOO.items()
    for attention in entry.attentions
    for kind in KINDS
    for ranks in (2, 3)
    if (entry.padding or not kind[1]) and (entry.labels or not kind[0])
]


def check(
    workers: Workers, name: str, attention: str, labels: bool, padding: bool, train: bool, ranks: int, **options: Any
) -> None:
    entry = ZOO[name]
    if entry.missing:
        pytest.skip(f"{entry.missing} is not installed")
    reports = workers.run(zoo_parity, ranks, name, attention, labels, padding, train, **options)
    worst = max(reports, key=lambda report: report.error)
    assert worst.error < (EXACT if entry.dtype == torch.float64 else SINGLE), worst.where
    assert worst.sites or name in GATHERED
    few = ON_FOUR_RANKS if ranks == 4 else {}
    assert bool(worst.gathers) <= (name in {**GATHERED, **few}), [str(g) for g in worst.gathers]
    last_token = name.startswith("nanogpt") and not labels  # the head of nanoGPT then reads one token, on every rank
    assert local_fraction(reports) >= LOCAL or name in {**GATHERED, **REPLICATED, **few} or last_token


@pytest.mark.parametrize(("name", "kind"), BY_DEFAULT.items())
def test_one_of_each_kind(workers: Workers, name: str, kind: tuple[str, bool, bool, bool]) -> None:
    check(workers, name, *kind, 2)


@pytest.mark.parametrize(("name", "attention", "labels", "padding", "train", "ranks"), CASES)
def test_every_model(
    workers: Workers, name: str, attention: str, labels: bool, padding: bool, train: bool, ranks: int
) -> None:
    check(workers, name, attention, labels, padding, train, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_with_inductor(workers: Workers, name: str) -> None:
    check(workers, name, ZOO[name].attentions[0], True, False, True, 2, compiler="inductor", timeout=900.0)


@pytest.mark.parametrize("degree", (2, slow(4)))
@pytest.mark.parametrize("name", ["llama", *(slow(name) for name in ZOO if name not in ("llama", *ONE_HEAD))])
def test_every_model_with_heads_over_neighbours(workers: Workers, name: str, degree: int) -> None:
    entry = ZOO[name]
    if degree == 4 and name in NOT_FOUR_HEADS:
        pytest.skip(NOT_FOUR_HEADS[name])
    check(workers, name, entry.attentions[0], entry.labels, False, True, 4, ulysses_degree=degree)
