"""A profile of ranks has a range for each tile, transfer, wait and all-to-all of the schedule, by site and step."""

from __future__ import annotations

import json
import re
import timeit
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from ringpass.page.profile import measured
from ringpass.page.timeline import LANES
from ringpass.profiling import profiled
from ringpass.schedule.site import SITES
from tests.support.marks import slow
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers

TOKENS, WORLD, LAYERS = 48, 2, 2


class Model(nn.Module):
    """Two equal attentions, one after the other, which share the key of their site and the trace of their loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).view(1, -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
            x = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x.square().mean()


def ranges(group: dist.ProcessGroup, options: dict[str, Any]) -> tuple[Counter[str], Any]:
    """How often each range occurs in a training step, and the schedule of this rank's site."""
    SITES.clear()
    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, TOKENS, 16)
    options = {"group": group, "layout": "zigzag", **options}
    compiled: Any = torch.compile(model, backend="ring_dilated", options=options)
    compiled(x).backward()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        compiled(x).backward()
    (site,) = SITES.values()
    steps = [
        (step.shift, len(site.launches(step.tiles, 1)), step.receive.src if step.receive else None)
        for step in site.program.steps
    ]
    return Counter(event.name for event in trace.events()), steps


def profile_of_step(group: dist.ProcessGroup, folder: str) -> None:
    """Writes the profile of a training step of this rank."""
    run, x = compiled(Model(), group, layout="zigzag"), torch.randn(1, TOKENS, 16)
    run(x).backward()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run(x).backward()
    trace.export_chrome_trace(f"{folder}/rank{dist.get_rank(group)}.json")


def matching(found: Counter[str], pattern: str) -> int:
    return sum(n for name, n in found.items() if re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    "options",
    [{"compiler": "aot_eager"}, slow({"compiler": "inductor"}), {"compiler": "aot_eager", "unroll_limit": 0}],
    ids=["unrolled", "generated", "rolled"],
)
def test_a_range_for_each_tile_and_transfer(workers: Workers, options: dict[str, Any]) -> None:
    for found, steps in workers.run(ranges, WORLD, options):
        for site in (f"site{index}" for index in range(LAYERS)):
            for shift, launches, source in steps:
                tiles = matching(found, rf"{site} attention_step{shift}_q\w+")
                assert tiles == launches > 0, (site, shift, found)
                assert matching(found, rf"{site} attention_backward_step{shift}_q\w+") >= launches
                receive = f"{site} receive_step{shift}_{'nothing' if source is None else f'from_rank{source}'}"
                times = 2 if shift else 0  # forward and backward
                assert found[receive] == found[f"wait for {receive}"] == times, receive
                returned = matching(found, rf"{site} receive_gradients_step{shift}_\w+")
                waited = matching(found, rf"wait for {site} receive_gradients_step{shift}_\w+")
                assert returned == waited == times // 2
        assert not [name for name in found if re.match(rf"site{LAYERS} ", name)]


def test_the_measured_timeline(workers: Workers, tmp_path: Path) -> None:
    """A step of two ranks: each waits for keys forward and backward, and for gradients, at the end of its transfers."""
    workers.run(profile_of_step, WORLD, str(tmp_path))
    found = measured([json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (1, 0)])
    for rank in range(WORLD):
        of = {lane: [x for x in found if (x.rank, x.lane) == (rank, lane)] for lane in LANES}
        assert len(of["tile"]) >= 2 * LAYERS * WORLD and {x.step for x in of["tile"]} == {0, 1}
        assert len(of["wait"]) == len(of["transfer"]) == 3 * LAYERS and {x.step for x in of["transfer"]} == {1}
        ends = sorted(x.stop for x in of["wait"])
        assert sorted(x.stop for x in of["transfer"]) == pytest.approx(ends, abs=1e-6)
        assert all(x.start < x.stop for x in found)


@pytest.mark.parametrize("rolled", [False, True])
def test_all_to_alls(workers: Workers, rolled: bool) -> None:
    """With a Ulysses degree there is an all-to-all for queries, for keys and for results, forward and backward."""
    options = {"compiler": "aot_eager", "ulysses_degree": WORLD, "unroll_limit": 0 if rolled else 256}
    for found, _ in workers.run(ranges, WORLD, options):
        for site in (f"site{index}" for index in range(LAYERS)):
            for what in ("queries", "keys", "results"):
                assert matching(found, rf"{site} {what} heads_\w+") == 2, (what, found)
                assert matching(found, rf"wait for {site} {what} heads_\w+") == 2


def test_all_keys_gathered(workers: Workers) -> None:
    for found, _ in workers.run(ranges, WORLD, {"compiler": "aot_eager", "comm": "allgather"}):
        for site in (f"site{index}" for index in range(LAYERS)):
            assert found[f"{site} gather_keys"] == found[f"wait for {site} gather_keys"] == 2


def test_a_range_costs_nothing_without_a_profiler(capsys: pytest.CaptureFixture[str]) -> None:
    """Under 10 us even on a busy machine; the time is printed."""

    def once() -> None:
        with profiled("site0 attention_step1_q0to8_k0to8"):
            pass

    seconds = min(timeit.repeat(once, number=10_000, repeat=5)) / 10_000
    with capsys.disabled():
        print(f" {1e6 * seconds:.2f} us per range without a profiler", end="")
    assert seconds < 1e-5
