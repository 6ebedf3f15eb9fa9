"""How attentions run over the ranks: what "auto" takes, with which numbers, and the bytes that the plan states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringpass import RingConfig
from ringpass.errors import OptionError
from ringpass.passes.detect.detect import detect
from ringpass.passes.divide import divide
from ringpass.passes.plan import ways as planned_ways
from ringpass.passes.plan.plan import RingPlan
from ringpass.schedule.attention_time import ALLGATHER, RING
from ringpass.schedule.machine import PRESETS, UNDESCRIBED, Dimension, Machine
from tests.support import thread_ranks
from tests.support.marks import slow
from tests.support.sharded_ops import FAILURES, Case, captured_of, check_attentions, inputs, planned_programs
from tests.support.thread_ranks import Mailboxes, Rendezvous

S, B, D = 64, 2, 4


def machine(call_seconds: float = 0.0, ranks: int | None = None) -> Machine:
    """One where messages between two ranks take long, collectives little, and nothing else costs but calls."""
    return Machine("latencies", ((1, 1e15),), 1e15, call_seconds, (Dimension(ranks, 1e15, 1.0, 1e-3),))


LIKES_ULYSSES, LIKES_GATHERING = machine(1e-2), machine()  # one call, or one collective


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def case(heads: int = 4, key_heads: int = 2, tokens: int = S, call: Callable[..., Any] = causal) -> Case:
    shapes = (B, heads, tokens, D), (B, key_heads, tokens, D), (B, key_heads, tokens, D)
    return Case("scaled_dot_product_attention.default", call, shapes)


def plan_of(one: Case, world: int, **options: Any) -> RingPlan:
    captured = captured_of(one)
    config = RingConfig.from_options(options)
    sites = detect(captured.gm, failures=FAILURES)
    return divide(lambda stage, *args: stage(*args), captured, sites, world, config, {}, FAILURES).plan


def way_of(one: Case, world: int, **options: Any) -> tuple[int, str]:
    (site,) = plan_of(one, world, **options).sites
    return site.degree, site.comm


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_without_a_machine_auto_is_a_ring() -> None:
    """The default plan is that of degree 1 and a ring, but for the line that says so."""
    for world in (2, 3, 4, 8):
        default, by_hand = (str(plan_of(case(), world, **o)) for o in ({}, {"ulysses_degree": 1, "comm": "ring"}))
        line = "no machine is described (option 'machine'), so 'auto' is ulysses degree 1 and a ring\n"
        assert default.replace(line, "") == by_hand and line in default


def test_one_rank_has_nothing_to_choose() -> None:
    assert "machine" not in str(plan_of(case(), 1, machine=LIKES_ULYSSES))


def test_each_attention_has_its_own_way() -> None:
    """Four heads are divided over four ranks, one head is gathered: no degree is left for it."""

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], is_causal=True)
        return causal(q, k, v) + one

    sites = plan_of(case(call=both), 4, machine=LIKES_ULYSSES).sites
    assert sorted((site.site.heads[0], site.degree, site.comm) for site in sites) == [
        (1, 1, ALLGATHER),
        (4, 4, RING),
    ]


def test_options_by_hand_win() -> None:
    assert way_of(case(), 4, machine=LIKES_ULYSSES, ulysses_degree=1, comm="ring") == (1, RING)
    assert way_of(case(), 4, machine=LIKES_ULYSSES, ulysses_degree={0: 2}) == (2, RING)
    assert way_of(case(), 4, machine=LIKES_ULYSSES, ulysses_degree={0: "auto"}, comm="ring") == (4, RING)
    assert way_of(case(), 4, machine=LIKES_ULYSSES, comm="allgather") == (1, ALLGATHER)
    assert way_of(case(), 4, ulysses_degree=4, comm="allgather") == (4, RING)  # of no other rank's keys


def test_all_gather_is_for_ranks_of_the_inner_dimension() -> None:
    inner = Dimension(2, 1e15, 1.0, 1e-6)
    split = Machine("two and two", ((1, 1e15),), 1e15, 0.0, (inner, replace(inner, ranks=None)))
    assert way_of(case(heads=1, key_heads=1), 2, machine=split) == (1, ALLGATHER)
    planned = plan_of(case(heads=1, key_heads=1), 4, machine=split)
    assert planned.sites[0].comm == RING
    assert "not weighed: all-gather, as the ranks are more than the 2 of the inner dimension" in str(planned)


def test_all_gather_is_bounded() -> None:
    held = 2 * S * D * 8 * B  # bytes of keys and values of one head
    for bound, comm in ((held, ALLGATHER), (held - 1, RING)):
        with patch.object(planned_ways, "GATHERED_BYTES", bound):
            assert way_of(case(heads=1, key_heads=1), 4, machine=LIKES_GATHERING) == (1, comm)


def test_a_machine_of_too_few_ranks() -> None:
    with pytest.raises(OptionError, match="describes 2 ranks, and the ring has 4"):
        plan_of(case(), 4, machine=machine(ranks=2))


def test_the_plan_lists_what_was_rejected() -> None:
    text = str(plan_of(case(), 4, machine="H100"))
    assert f"machine {PRESETS['H100']}" in text
    assert text.count("  chosen: ") == 1 and text.count("  rejected: ulysses degree ") == 3
    for part in ("compute", "calls", "exposed transfers", "all-to-alls", "ms estimated"):
        assert part in text


def test_the_device_names_a_preset() -> None:
    on_gpu = SimpleNamespace(meta={"val": SimpleNamespace(device=torch.device("cuda", 0))})
    site: Any = SimpleNamespace(q=on_gpu)
    with patch.object(torch.cuda, "is_available", lambda: True):
        for name, preset in (("NVIDIA H100 80GB HBM3", PRESETS["H100"]), ("NVIDIA L4", UNDESCRIBED)):
            with patch.object(torch.cuda, "get_device_name", lambda device, name=name: name):
                assert planned_ways.described([site], RingConfig()) == preset


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "way"), [(4, (4, RING)), (3, (2, RING)), (1, (1, ALLGATHER))])
def test_parity_of_what_auto_takes(heads: int, way: tuple[int, str]) -> None:
    one, comm = case(heads, heads, tokens=37), "ring" if heads > 1 else "auto"
    assert way_of(one, 4, machine=LIKES_ULYSSES, comm=comm) == way
    assert not check_attentions(one, "auto", 4, machine=LIKES_ULYSSES, comm=comm)


# --- bytes ------------------------------------------------------------------------------------------------------------


@contextmanager
def counted(world: int) -> Iterator[dict[str, list[int]]]:
    """Bytes that each rank receives inside, on threads: of keys and values, by all-to-alls, by gathers."""
    found = {name: [0] * world for name in ("keys", "pooled", "gathered")}
    start, run = Mailboxes.start, Rendezvous.__call__

    def counting_start(
        self: Mailboxes, sent: Tensor, dst: Any, received: Tensor, src: Any, tag: int, group: str, *rest: Any
    ) -> Any:
        found["keys"][_rank(group)] += received.nbytes if src is not None else 0
        return start(self, sent, dst, received, src, tag, group, *rest)

    def counting_run(self: Rendezvous, collective: Any, out: Tensor, *given: Any, group: str) -> None:
        rank = _rank(group)
        if collective is dist.all_to_all_single:
            found["pooled"][rank] += (sum(given[1]) - given[1][rank]) * out.itemsize
        elif given and out.numel() == world * given[0].numel():
            found["gathered"][rank] += out.nbytes - given[0].nbytes
        run(self, collective, out, *given, group=group)

    with patch.object(Mailboxes, "start", counting_start), patch.object(Rendezvous, "__call__", counting_run):
        yield found


def _rank(group: str) -> int:
    return int(group.removeprefix(thread_ranks.NAME))


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (7, 7)])
@pytest.mark.parametrize(("world", "degree"), [slow(4, 1), (4, 2), slow(4, 4), (6, 3), slow(6, 2), (5, 5)])
@pytest.mark.parametrize("layout", ["zigzag", slow("contiguous")])
def test_bytes_at_run_time_are_those_of_the_plan(
    world: int, degree: int, heads: int, key_heads: int, layout: str
) -> None:
    one = case(heads, key_heads, tokens=61)
    options: dict[str, Any] = {"layout": layout, "ulysses_degree": degree, "comm": "ring"}
    (site,) = plan_of(one, world, **options).sites
    found = forward_bytes(one, world, **options)
    assert ([*map(int, found["keys"])], found["pooled"]) == tuple(map(list, site.received_bytes()))


def test_bytes_of_all_gather_at_run_time() -> None:
    options: dict[str, Any] = {"layout": "contiguous", "comm": "allgather"}
    (site,) = plan_of(case(tokens=61), 4, **options).sites
    found = forward_bytes(case(tokens=61), 4, **options)
    assert found["gathered"] == list(site.received_bytes()[0]) and not any(found["keys"])


def forward_bytes(one: Case, world: int, layout: str, **options: Any) -> dict[str, list[int]]:
    """What each rank receives in a forward of the call."""
    made = planned_programs(one, layout, world, **options)

    def job(rank: int, group: str) -> None:
        with torch.no_grad():
            made[rank].gm(*inputs(one))

    with counted(world) as found:
        thread_ranks.run(world, job)
    return found


@pytest.mark.parametrize("degree", (1, 2, 4, 8))
def test_bytes_of_the_plan_are_the_formulas(degree: int) -> None:
    """P = 8, 32 query and 8 K/V heads, by tokens without a mask, so that a ring moves all keys."""

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    one = case(32, 8, tokens=128, call=full)
    (site,) = plan_of(one, 8, ulysses_degree=degree, layout="contiguous").sites
    share, ring, head = 128 // 8, 8 // degree, D * 8 * B  # local tokens, ranks of a ring, bytes of a token and head
    keys, pooled = site.received_bytes()
    assert set(keys) == {(ring - 1) * share * degree * 2 * (8 // degree) * head}
    assert set(pooled) == {(degree - 1) * share * 2 * (32 + 8) * head // degree}
