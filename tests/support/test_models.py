"""The test models themselves: seeded, double precision, and the loss reaches every parameter."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import MODELS, batch_for, loss_of, padding_mask, tensors_of

LENGTH = 23
PADDED = [name for name, case in MODELS.items() if case.padded]


@pytest.mark.parametrize("name, padding", [(n, False) for n in MODELS] + [(n, True) for n in PADDED])
def test_the_loss_is_repeatable_and_reaches_every_parameter(name: str, padding: bool) -> None:
    losses = []
    for _ in range(2):
        model = MODELS[name].make()
        outputs = model(**batch_for(name, LENGTH, padding=padding))
        loss_of(outputs).backward()
        losses.append(loss_of(outputs).item())
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        assert all(t.dtype == torch.float64 and t.isfinite().all() for t in tensors_of(outputs).values())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", MODELS)
def test_without_labels_there_is_no_loss(name: str) -> None:
    with pytest.raises(ValueError, match="labels=True"):
        loss_of(MODELS[name].make()(**batch_for(name, LENGTH, labels=False)))


def test_padding_differs_between_rows() -> None:
    assert padding_mask(2, 8).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]


def test_padding_is_refused_where_the_model_takes_none() -> None:
    with pytest.raises(ValueError, match="padding mask"):
        batch_for("cross", LENGTH, padding=True)
