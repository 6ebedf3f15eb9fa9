"""Every model of the zoo is explained on few and on many ranks, each within a minute of processor time."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

import ringpass
from ringpass.explain.report import Report
from tests.support.marks import slow
from tests.support.zoo import ZOO
from tests.support.zoo_entry import wide

LIMIT = 60.0  # seconds
LENGTH = 23  # the longest that all of them take


def report_of(name: str, world: int) -> Report:
    entry = ZOO[name]
    if entry.missing:
        pytest.skip(f"{entry.missing} is not installed")
    with wide() if entry.dtype == torch.float64 else nullcontext():
        model, batch = entry.make(entry.attentions[0], True), entry.batch(LENGTH, entry.labels, False)
        return ringpass.explain(model, world_size=world, **batch)


@pytest.mark.parametrize("world", (8, slow(1024)))
@pytest.mark.parametrize("name", ["gpt2", *(slow(name) for name in ZOO if name != "gpt2")])
def test_every_model(name: str, world: int) -> None:
    started = time.process_time()
    report = report_of(name, world)
    assert time.process_time() - started < LIMIT
    assert report.graphs and report.verdict.lines and report.verdict.peak_bytes > 0
    assert len(report.to_json()) < 2**21
