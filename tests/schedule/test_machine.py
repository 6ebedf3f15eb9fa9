"""The machine as data, and times by it: the arithmetic of a ring, of Ulysses and of hybrids, written anew here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringpass.errors import OptionError
from ringpass.layouts.layout import Layout
from ringpass.schedule.attention_time import ALLGATHER, Load, Traffic, Way, all_to_all_bytes
from ringpass.schedule.cost import choose
from ringpass.schedule.head_shares import head_shares
from ringpass.schedule.machine import PRESETS, Dimension, Machine, machine_of, preset_of_device, ranks_on_node
from ringpass.schedule.tiles import Problem, tiling

HEADS, GROUPS, WIDTH, ITEM = 32, 8, 128, 2
FLOPS, MEMORY, CALL = 550e12, 2.85e12, 1e-5
NODE, NETWORK = Dimension(8, 450e9, 8e-6, 20e-6), Dimension(None, 50e9, 15e-6, 35e-6)
CLUSTER = Machine("8 to a node", ((1, FLOPS),), MEMORY, CALL, (NODE, NETWORK))


def load(world: int, tokens: int, layout: str = "zigzag", backward: bool = True) -> Load:
    here = Layout(layout, world)
    problem = Problem("k <= q", tokens, tokens, here, here)
    return Load(problem, HEADS, GROUPS, (WIDTH, WIDTH), ITEM, backward=backward)


def times(world: int, tokens: int, *degrees: int, machine: Machine = CLUSTER) -> dict[int, float]:
    """Seconds of forward and backward, by degree."""
    traffic = Traffic(load(world, tokens), world)
    return {degree: traffic.times(Way(degree), machine).slowest for degree in degrees}


# --- against an arithmetic of its own ---------------------------------------------------------------------------------


def by_hand(world: int, tokens: int, degree: int) -> float:
    """Seconds of a causal attention in zigzag order with balanced tiles, by the mean step, forward and backward."""
    ring, share, in_node = world // degree, tokens / world, min(8, world)
    compute = 2 * tokens**2 * HEADS * WIDTH / (world * FLOPS)
    pooled, key_heads = share * degree, max(1, GROUPS / degree)
    a2a = share * (degree - 1) / degree * 2 * HEADS * WIDTH * ITEM + pooled * (1 - 1 / degree) * key_heads * 512
    total = 0.0
    for flops, more, merges, calls in ((1.0, 1, 1.0, 1), (2.5, 3, 1.5, 2)):
        total += compute * flops + CALL * ring * calls
        total += (ring - 1) * 0.75 * pooled * HEADS / degree * WIDTH * 10 / MEMORY * merges
        message, step = pooled * key_heads * 512 * more, compute * flops / ring
        near = [message / 450e9 + 8e-6] * (in_node // degree - 1 if degree < in_node else 0)
        far = [message / 50e9 + 15e-6] * (ring - 1 - len(near))
        total += sum(max(0.0, x - step) for x in near + far)
        if 1 < degree <= 8:
            total += a2a / 450e9 + 3 * 20e-6
        elif degree > 8:
            outside = (degree - 8) / (degree - 1)
            total += max(a2a * outside / 50e9, a2a * (1 - outside) / 450e9) + 3 * 35e-6
    return total


@pytest.mark.parametrize("world", (2, 4, 8, 16, 32, 64))
@pytest.mark.parametrize("tokens", (2**15, 2**16, 2**17, 2**18))
def test_times_are_those_by_hand(world: int, tokens: int) -> None:
    degrees = [u for u in (1, 2, 4, 8, 16, 32) if world % u == 0]
    for degree, found in times(world, tokens, *degrees).items():
        # by hand every step is the mean one: a rank's exact steps, some half as long, may hide a little less or more
        assert found == pytest.approx(by_hand(world, tokens, degree), rel=0.1), degree


def test_short_sequences_in_a_node_take_ulysses() -> None:
    found = times(8, 2**13, 1, 2, 4, 8)
    assert found[8] < found[4] < found[2] < found[1]


@pytest.mark.parametrize(("world", "tokens"), [(16, 2**16), (16, 2**17), (64, 2**16), (64, 2**17), (64, 2**18)])
def test_several_nodes_take_ulysses_inside_them(world: int, tokens: int) -> None:
    found = times(world, tokens, *[u for u in (1, 2, 4, 8, 16, 32) if world % u == 0])
    assert min(found, key=lambda degree: found[degree]) == 8


@pytest.mark.parametrize("machine", [CLUSTER, PRESETS["H100"]], ids=lambda m: m.name)
@pytest.mark.parametrize("world", (2, 4, 8, 16, 32, 64))
def test_what_is_chosen_is_nearly_the_fastest(world: int, machine: Machine) -> None:
    ways = [Way(u) for u in (1, 2, 4, 8, 16, 32) if world % u == 0]
    for tokens in (2**13, 2**15, 2**16, 2**17, 2**20):
        (best, *_) = choose([load(world, tokens)], world, True, machine, [ways], ["zigzag"])
        choice = best.choices[0]
        assert choice.weighed[0][0] == choice.way and len(choice.weighed) == len(ways)
        fastest = min(found.slowest for _, found in choice.weighed)
        assert choice.weighed[0][1].slowest <= 1.02 * fastest


def test_all_gather_pays_where_messages_are_slow_to_start() -> None:
    slow = replace(CLUSTER, dimensions=(replace(NODE, p2p_seconds=1e-3), NETWORK))
    ways = [Way(1), Way(1, ALLGATHER)]
    for machine, tokens, comm in ((slow, 2**16, ALLGATHER), (CLUSTER, 2**20, "ring"), (CLUSTER, 2**13, ALLGATHER)):
        assert choose([load(8, tokens)], 8, True, machine, [ways])[0].choices[0].way.comm == comm


def test_all_gather_by_hand() -> None:
    """Beside local tiles, a fraction of 1 / P of all; then two calls and one merge of what sees other ranks' keys."""
    tokens, share = 2**15, 2**12
    traffic = Traffic(load(8, tokens, "contiguous", backward=False), 8)
    found, last = traffic.times(Way(1, ALLGATHER), CLUSTER), 7  # the last rank sees all keys
    local, remote = (4 * pairs * HEADS * WIDTH / FLOPS for pairs in (share * (share + 1) / 2, share * 7 * share))
    assert found.compute[last] == pytest.approx(local + remote)
    assert found.calls[last] == pytest.approx(3 * CALL) and found.calls[0] == pytest.approx(CALL)
    assert found.merges[last] == pytest.approx(share * HEADS * WIDTH * 10 / MEMORY) and found.merges[0] == 0
    assert found.transfers[last] == pytest.approx(max(0, 7 * share * 4096 / 450e9 + 20e-6 - local))


def test_layouts_and_degrees_are_chosen_together() -> None:
    """With all tokens on each rank every layout is balanced, so the plainest one is taken."""
    ways = [Way(u) for u in (1, 2, 4, 8)]
    assert choose([load(8, 2**13)], 8, True, CLUSTER, [ways])[0].layout == "contiguous"
    assert choose([load(8, 2**13)], 8, True, CLUSTER, [ways[:1]])[0].layout == "zigzag"


def test_pooled_pairs_are_those_of_pooled_layouts() -> None:
    """What is counted from the tiles of a ring is what the schedule of a share of the heads has."""
    for mask in ("k <= q", "True"):  # under a window, tiles are cut at other places
        one = load(12, 6007)
        one = replace(one, problem=replace(one.problem, mask=mask))
        traffic = Traffic(one, 12)
        for degree in (2, 3, 4, 6, 12):
            (pairs,) = traffic.of(degree)
            tiles = tiling(head_shares(HEADS, GROUPS, degree)[0].problem(one.problem))
            np.testing.assert_array_equal((pairs.whole + pairs.partial).sum(1), tiles.areas(12)[::degree])
            keys = pairs.keys.tokens(12 // degree)
            np.fill_diagonal(keys, 0)
            np.testing.assert_array_equal(keys.sum(1), tiles.received(12)[::degree])


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", (2, 4, 8))
def test_bytes_of_all_to_alls_are_the_published_formula(degree: int) -> None:
    """(U - 1) / U x S / P x 20,480: queries and results 16,384 bytes a token, keys and values 4,096."""
    found = all_to_all_bytes(load(8, 2**15), degree, 8).sum(2)
    assert found.shape == (8 // degree, degree)
    assert (found == (degree - 1) * 2**15 // 8 * 20480 // degree).all()


def test_bytes_beyond_the_key_heads() -> None:
    """For U > 8: keys and values of one head of all tokens that others hold, 512 bytes each."""
    found = all_to_all_bytes(load(16, 2**15), 16, 16).sum(2)
    assert (found == 15 * 2**15 // 16 * (16384 // 16 + 512)).all()


# --- the description --------------------------------------------------------------------------------------------------


def test_presets_survive_json() -> None:
    for machine in (*PRESETS.values(), CLUSTER):
        assert Machine.from_json(machine.to_json()) == machine


def wrong(**changes: Any) -> str:
    return json.dumps({**json.loads(CLUSTER.to_json()), **changes})


DIMENSION = {"ranks": 8, "bandwidth": 1e9, "p2p_seconds": 0.0, "collective_seconds": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected JSON"),
        ("[1]", "expected an object with name, flops"),
        ('{"name": "x"}', r"memory_bandwidth.*got \['name'\]"),
        (wrong(extra=1), "'extra'"),
        (wrong(memory_bandwidth="fast"), "'memory_bandwidth' as a number, got 'fast'"),
        (wrong(memory_bandwidth=0), "'memory_bandwidth' must be a number above 0"),
        (wrong(call_seconds=-1.0), "'call_seconds' must be at least 0"),
        (wrong(name=3), "'name' as a text"),
        (wrong(flops=[]), "at least one"),
        (wrong(flops=[[64, 1e9], [32, 1e9]]), "ascending"),
        (wrong(flops=[[64, -1.0]]), "at edge 64 must be a number above 0"),
        (wrong(flops=[64]), "list of .edge, FLOP/s"),
        (wrong(dimensions=[]), "at least one dimension"),
        (wrong(dimensions=[{**DIMENSION, "ranks": None}, DIMENSION]), "only the last"),
        (wrong(dimensions=[{**DIMENSION, "ranks": 0}]), "at least 1"),
        (wrong(dimensions=[{**DIMENSION, "ranks": 2.5}]), "whole number or null"),
        (wrong(dimensions=[{"ranks": 8}]), "p2p_seconds"),
        (wrong(dimensions=8), "'dimensions' as a list"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=said) as error:
        Machine.from_file(str(path))
    assert str(path) in str(error.value) and "python -m ringpass measure" in str(error.value)


def test_names_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(CLUSTER.to_json())
    assert machine_of(str(path)) == (CLUSTER, False) and machine_of("h100") == (PRESETS["H100"], True)
    with pytest.raises(OptionError, match=r"'A100', 'H100'.*no such file"):
        machine_of("H1000")


@pytest.mark.parametrize(
    ("device", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 NVL", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_presets_by_device(device: str, preset: str | None) -> None:
    found = preset_of_device(device)
    assert (found and found.name) == preset


def test_ranks_of_a_ring_on_a_node() -> None:
    assert ranks_on_node(range(16), 8) == 8
    assert ranks_on_node([0, 8, 16, 24], 8) == 1  # a ring across nodes
    assert ranks_on_node([0, 1, 2, 3, 4, 5, 8, 9, 10], 8) == 3


def test_dimensions_by_rank() -> None:
    ranks = np.arange(16)
    assert CLUSTER.dimension_between(0, ranks).tolist() == [0] * 8 + [1] * 8
    with pytest.raises(OptionError, match="describes 8 ranks, and the ring has 9"):
        replace(CLUSTER, dimensions=(NODE,)).require_ranks(9)
    CLUSTER.require_ranks(4096)


def test_rates_between_points() -> None:
    machine = replace(CLUSTER, flops=((64, 1e12), (256, 3e12)))
    assert machine.rate(np.array([1, 64, 128, 256, 10**6])).tolist() == pytest.approx([1e12, 1e12, 2e12, 3e12, 3e12])
