"""What Inductor makes of the loop: its order, its calls, and what is alive; first, that the readers work."""

from __future__ import annotations

import pytest
import torch

from tests.support.described_gpu import compile_attention, generated_code, missing
from tests.support.generated_code import ring_calls
from tests.support.live_buffers import (
    IN_FLIGHT,
    UNFINISHED,
    CodeStep,
    check_exchanges,
    counts,
    most_alive,
    read,
)
from tests.support.pipeline_stages import fake_ring

BF16, F32 = torch.bfloat16, torch.float32
RESULTS = {"attention_tile": (BF16, F32), "attention_tile_backward": (F32, F32, F32)}
START = "buf{0} = torch.ops.ringpass.exchange.default([{1}], 8, torch.bfloat16, 1, 1, {2}, [], '0')"
TILE = "buf3 = torch.ops.ringpass.attention_tile.default(q, k, v, None, [buf2])"
WAIT = "torch.ops.ringpass.wait.default(buf2)"
GOOD = [
    "packed = torch.ops.ringpass.pack.default([k, v], [0, 4])",
    "assert_size_stride(packed, (8, ), (1, ), 'op')",
    START.format(1, "reinterpret_tensor(packed, (8, ), (1, ), 0)", 2),
    "buf2 = buf1[0]",
    "del buf1",
    TILE,
    "buf4 = buf3[0]",
    "assert_size_stride(buf4, (2, 4), (4, 1), 'op')",
    "buf5 = buf3[1]",
    "assert_size_stride(buf5, (2, ), (1, ), 'op')",
    "del buf3",
    WAIT,
    "buf6 = empty_strided_cpu((2, 4), (4, 1), torch.float32)",
    "cpp_fused_0(buf4, buf5, buf2, buf6)",
    "del buf2",
    "buf7 = buf4; del buf4  # reuse",
    "cpp_fused_1(buf7, buf5)",
]


def steps_of(lines: list[str]) -> list[CodeStep]:
    body = "\n        ".join(["q, k, v = args", "with torch.cuda._DeviceGuard(0):", *(f"    {x}" for x in lines)])
    return read(f"class Runner:\n    def call(self, args):\n        {body}\n", RESULTS)


def test_sizes_and_what_is_alive() -> None:
    steps = steps_of(GOOD)
    assert [step.op for step in steps] == ["pack", "exchange", "attention_tile", "wait", "cpp_fused_0", "cpp_fused_1"]
    assert [sum(v for k, v in step.alive.items() if k in UNFINISHED) for step in steps] == [0, 16, 40, 24, 24, 8]
    assert most_alive(steps, UNFINISHED) == 16 + 2 * 4 * 2 + 2 * 4  # in flight, out, lse
    assert counts(steps)["attention_tile"] == 1
    check_exchanges(steps)


def moved(line: str, to: int, lines: list[str] = GOOD) -> list[str]:
    rest = [x for x in lines if x != line]
    return [*rest[:to], line, *rest[to:]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (moved("del buf2", GOOD.index(WAIT)), "freed before their wait"),
        (moved("buf9 = packed; del packed  # reuse", GOOD.index(TILE)), "freed before their wait"),
        (moved(WAIT, GOOD.index(TILE)), "no tile hides"),
        ([x for x in GOOD if x not in (WAIT, "del buf2")], "never waited for"),
        (moved(START.format(9, "packed", 0), GOOD.index(WAIT) + 1), "start in the order"),
        (moved(START.format(9, "packed", 4), 4, moved(START.format(8, "packed", 3), 5)), "3 exchanges are in flight"),
    ],
)
def test_faults_are_noticed(lines: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_exchanges(steps_of(lines))


# --- one causal attention at P = 8 ------------------------------------------------------------------------------------

WORLD, RANK, HEADS, WIDTH = 8, 3, 8, 64
BOUND = 2  # blocks: the bytes of K and V of one shard
GRADIENTS = 3  # blocks: dq, dk and dv of one launch, which a CPU computes in float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(bool(missing()), reason=missing()))]


@pytest.fixture(scope="module", params=DEVICES)
def codes(request: pytest.FixtureRequest) -> dict[int, list[str]]:
    """(forward, backward) by length."""
    found = {}
    for tokens in (8192, 131072):
        with fake_ring(RANK, WORLD), generated_code(request.param) as made:
            compile_attention(request.param, tokens, HEADS, WIDTH)
        found[tokens] = made
    return found


def blocks(code: str, tokens: int, kinds: frozenset[str]) -> float:
    block = 2 * HEADS * tokens // WORLD * WIDTH * BF16.itemsize
    return most_alive(read(code, RESULTS), kinds) / block


@pytest.mark.parametrize("stage", [0, 1], ids=["forward", "backward"])
def test_order_of_generated_code(codes: dict[int, list[str]], stage: int) -> None:
    for code in (made[stage] for made in codes.values()):
        check_exchanges(read(code, RESULTS))
        order = [call.op for call in ring_calls(code)]
        assert order.count("exchange") == order.count("wait") == (WORLD - 1) * (1 + stage)


@pytest.mark.parametrize("stage", [0, 1], ids=["forward", "backward"])
def test_blocks_do_not_grow_with_the_length(codes: dict[int, list[str]], stage: int) -> None:
    for kinds in (UNFINISHED, frozenset({IN_FLIGHT})):
        short, long = (blocks(made[stage], tokens, kinds) for tokens, made in codes.items())
        assert short == long
    assert long <= BOUND


@pytest.mark.parametrize("stage", [0, 1], ids=["forward", "backward"])
def test_messages_and_unmerged_results_are_bounded(codes: dict[int, list[str]], stage: int) -> None:
    """In the backward, two messages in flight and, beside them, what one launch gave."""
    bound = BOUND + stage * GRADIENTS
    assert all(blocks(made[stage], tokens, UNFINISHED) <= bound for tokens, made in codes.items())
