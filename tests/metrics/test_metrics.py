"""Metrics count what the schedule says, cost next to nothing while off, and are the same in Prometheus' text."""

from __future__ import annotations

import re
import timeit
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ringpass import metrics
from ringpass.layouts.ranges import size
from ringpass.metrics import recorder
from ringpass.metrics.recorder import BOUNDS, Histogram, kind_of
from ringpass.profiling import profiled
from ringpass.schedule.site import SITES
from tests.support.process_ranks import Workers
from tests.support.repository import ROOT

TOKENS, HEADS, WIDTH, WORLD = 48, 4, 4, 2


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    """Metrics are off before and after each test."""
    metrics.disable()
    yield
    metrics.disable()


class Model(nn.Module):
    """One causal attention, down to a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()


def counted(group: dist.ProcessGroup) -> tuple[dict[str, Any], int, int]:
    """The snapshot after three training steps, and the key tokens that the schedule has this rank receive and send."""
    SITES.clear()
    torch.manual_seed(0)
    options: Any = {"group": group, "layout": "zigzag", "compiler": "aot_eager"}
    model: Any = torch.compile(Model(), backend="ring_dilated", options=options)
    metrics.enable()
    try:
        for _ in range(3):
            model(torch.ones(1, TOKENS, 16)).backward()
        (site,) = SITES.values()
        received = sum(size(step.receive.tokens) for step in site.program.steps if step.receive)
        sent = sum(size(step.send.tokens) for step in site.program.steps if step.send)
        return metrics.snapshot(), received, sent
    finally:
        metrics.disable()


def test_what_ranks_count_is_what_the_schedule_says(workers: Workers) -> None:
    """Keys arrive in the forward and again in the backward, gradients of the keys that were sent come back."""
    for found, received, sent in workers.run(counted, WORLD):
        token = 2 * HEADS * WIDTH * 4
        assert found["bytes"]["exchange"] == 3 * token * (2 * received + sent) > 0
        assert (found["calls"], found["compilations"], found["recompilations"]) == (3, 1, 0)
        times = {kind: histogram["count"] for kind, histogram in found["seconds"].items()}
        assert times["tile, forward"] % 3 == 0 < times["tile, forward"] <= times["tile, backward"]
        assert times["wait, exchange"] == found["messages"]["exchange"] == 3 * 3  # K and V twice, gradients once
        assert times["call"] == 3 and times["agreement"] == 3 * 3  # gathered, then read, and a backward
        assert found["waiting"] == [] and found["stalls"] == 0 and found["peak bytes"]["resident"] > 1 << 20


@pytest.mark.parametrize(
    "label, kind",
    [
        ("site0 attention_step1_q0to16_k0to8", "tile, forward"),
        ("site12 attention_backward_step1_q0to16_k0to8", "tile, backward"),
        ("wait for site0 receive_step1_from_rank0", "wait, exchange"),
        ("wait for site0 gather_keys", "wait, gather of keys"),
        ("wait for site0 queries heads_all_to_all", "wait, all-to-all"),
        ("site0 receive_step1_from_rank0", "start of a transfer"),
        ("wait for a sum of gradients", "wait, sum of gradients"),
        ("collective all_reduce", "wait, collective"),
        ("ringpass", "other"),
    ],
)
def test_kinds(label: str, kind: str) -> None:
    assert kind_of(label) == kind


def test_a_histogram_counts_each_value_once() -> None:
    histogram, values = Histogram(), [0.5 * BOUNDS[0], BOUNDS[3], 1.01 * BOUNDS[3], 2 * BOUNDS[-1]]
    for value in values:
        histogram.add(value)
    found = histogram.as_dict()
    assert found["count"] == 4 and found["total"] == sum(values) and found["longest"] == values[-1]
    assert found["buckets"] == {bound: sum(v <= bound for v in values) for bound in (*BOUNDS, float("inf"))}


def test_a_callback_hears_each_measurement() -> None:
    heard: list[tuple[str, float, str]] = []
    metrics.enable(lambda *measured: heard.append(measured))
    with profiled("wait for site0 receive_step1_from_rank0"):
        assert [wait["for"] for wait in metrics.snapshot()["waiting"]] == ["wait for site0 receive_step1_from_rank0"]
    recorder.moved("exchange", 12)
    (what, seconds, label), moved = heard
    assert (what, label) == ("wait, exchange", "wait for site0 receive_step1_from_rank0") and 0 <= seconds < 10
    assert moved == ("bytes of exchange", 12, "exchange")


def test_a_range_that_raises_is_counted_and_closed() -> None:
    metrics.enable()
    with pytest.raises(ValueError, match="within"), profiled("compare the ranks"):
        raise ValueError("within")
    found = metrics.snapshot()
    assert found["waiting"] == [] and found["seconds"]["agreement"]["count"] == 1


def test_nothing_is_kept_while_metrics_are_off() -> None:
    with profiled("compare the ranks"):
        recorder.moved("exchange", 12)
    with pytest.raises(RuntimeError, match=r"call ringpass.metrics.enable\(\) before"):
        metrics.snapshot()
    metrics.enable()
    found = metrics.snapshot()
    assert found["bytes"] == {} and found["seconds"] == {}


def test_prometheus_reads_the_same_numbers() -> None:
    registry = CollectorRegistry()
    metrics.register(registry)
    assert recorder.active is not None
    for seconds in (0.002, 0.2):
        recorder.active.took("compare the ranks", seconds)
    recorder.moved("exchange", 12)
    for text in (generate_latest(registry).decode(), metrics.prometheus_text()):
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(lines['ringpass_received_bytes_total{kind="exchange"}']) == 12
        assert float(lines['ringpass_seconds_count{kind="agreement"}']) == 2
        assert float(lines['ringpass_seconds_sum{kind="agreement"}']) == pytest.approx(0.202)
        assert float(lines['ringpass_seconds_bucket{kind="agreement",le="0.003"}']) == 1
        assert float(lines["ringpass_calls_total"]) == 0 and "ringpass_longest_wait_seconds" in lines
        assert float(lines['ringpass_peak_bytes{where="resident"}']) > 1 << 20
    metrics.disable()
    assert generate_latest(registry) == b""


def test_the_page_on_monitoring_names_every_metric() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    metrics.enable()
    families = set(re.findall(r"^# TYPE (\w+) ", metrics.prometheus_text(), re.MULTILINE))
    assert families == set(re.findall(r"`(ringpass_\w+)`", page))
    assert set(recorder.KINDS) <= set(re.findall(r"`([a-z ,-]+)`", page))


def test_the_cost_of_the_switch(capsys: pytest.CaptureFixture[str]) -> None:
    """Off: under 10 us even on a busy machine; both times are printed."""

    def once() -> None:
        with profiled("site0 attention_step1_q0to8_k0to8"):
            pass

    def each() -> float:
        return min(timeit.repeat(once, number=10_000, repeat=5)) / 10_000

    off = each()
    metrics.enable()
    on = each()
    with capsys.disabled():
        print(f" {1e6 * off:.2f} us per range while metrics are off, {1e6 * on:.2f} us while on", end="")
    assert off < 1e-5 and on < 1e-4
