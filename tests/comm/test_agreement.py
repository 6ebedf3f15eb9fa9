"""How the ranks compare a call: what is hashed, in what order it happens, and what is left in the store."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ringpass import compiled as calls
from ringpass.comm.headers import HostCopy, checksum, combined, header_device
from ringpass.comm.ring import Ring, ring_of
from ringpass.compiled import compare_around
from ringpass.devices import device_of
from ringpass.errors import MismatchError, PeerError
from ringpass.ops import random
from ringpass.passes.partition.writer import Writer
from tests.support.errors import error_message
from tests.support.model_parity import compiled
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.process_ranks import Workers

CPU = torch.device("cpu")

# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bool, torch.int16, torch.bfloat16, torch.float64, torch.complex64))
def test_a_checksum_sees_one_changed_element(dtype: torch.dtype) -> None:
    x = torch.ones(3, 70_000, dtype=dtype)
    for row, column in ((0, 0), (1, 3), (2, 69_999)):
        changed = x.clone()
        changed[row, column] = 0
        assert int(checksum(changed)) != int(checksum(x))
    assert int(checksum(x.clone())) == int(checksum(x))


def test_equal_tensors_anywhere_in_memory_have_one_checksum() -> None:
    for dtype in (torch.bool, torch.bfloat16, torch.int32, torch.float64):
        for n in (0, 1, 3, 70_001):
            x = (torch.arange(n + 9) % 3).to(dtype)
            assert len({int(checksum(torch.cat([x[:i], x])[i : i + n])) for i in range(9)}) == 1


def test_differences_do_not_cancel() -> None:
    """In one tensor: signs, lengths of equal sum, a negated mask; between two, changes that weigh the same."""
    lengths = torch.tensor([20, 20, 20]), torch.tensor([19, 22, 19])
    mask = torch.tensor([True, False, False, True])
    x = torch.randn(1000, dtype=torch.float64)
    for a, b in (lengths, (mask, ~mask), (x, -x), (x, x.abs())):
        assert int(checksum(a)) != int(checksum(b))
    ids, labels = torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32)
    changed, other = ids.clone(), labels.clone()
    changed[0, 0] += 3
    other[0, 0] -= 1
    pairs = [torch.stack([checksum(i), checksum(j)]) for i, j in ((ids, labels), (changed, other))]
    assert int(combined(pairs[0])) != int(combined(pairs[1]))
    masks = torch.arange(1 << 10)[:, None] >> torch.arange(10) & 1
    assert len({int(checksum(m)) for m in masks.bool()}) == 1 << 10


def test_combined_checksums_see_order_and_each_input() -> None:
    a, b, c = (checksum(torch.full((4,), i)) for i in range(3))
    several: list[list[Tensor]] = [[a, b, c], [b, a, c], [a, b], [a, b, b]]
    found = {int(combined(torch.stack(x))) for x in several} | {int(combined(torch.zeros(0, dtype=torch.int64)))}
    assert len(found) == 5


# --- the order of a call ----------------------------------------------------------------------------------------------


def events(first: bool, launch_fails: bool = False, differ: bool = False) -> tuple[list[str], str]:
    """What happens in a call, in order, and the error that it raises."""
    seen: list[str] = []

    def finish() -> None:
        seen.append("compared")
        if differ:
            raise MismatchError("the ranks differ")

    def launch() -> str:
        seen.append("launched")
        if launch_fails:
            raise PeerError("a rank is lost")
        return "results"

    try:
        assert compare_around(SimpleNamespace(finish=finish), launch, first) == "results"  # type: ignore[arg-type]
    except (MismatchError, PeerError) as error:
        return seen, str(error)
    return seen, ""


def test_the_first_calls_run_only_once_compared() -> None:
    assert events(first=True) == (["compared", "launched"], "")
    assert events(first=True, differ=True) == (["compared"], "the ranks differ")


def test_later_calls_are_compared_behind_their_work_and_never_pass_unseen() -> None:
    assert events(first=False) == (["launched", "compared"], "")
    assert events(first=False, differ=True) == (["launched", "compared"], "the ranks differ")
    assert events(first=False, launch_fails=True) == (["launched", "compared"], "a rank is lost")
    assert events(first=False, launch_fails=True, differ=True) == (["launched", "compared"], "the ranks differ")


def test_which_calls_are_compared_first() -> None:
    """All on a CPU; on a GPU the first ones of a graph, and those in which the host reads what the device computes."""

    def first(device: str, compared: int, **needs: bool) -> bool:
        program = SimpleNamespace(**{"draws": False, "reads": False, **needs})
        agreement: Any = SimpleNamespace(compared=compared)
        return calls._compares_first(program, agreement, torch.device(device))  # type: ignore[arg-type]

    assert first("cpu", 10) and first("cuda", 0) and first("cuda", 1) and not first("cuda", 2)
    assert first("cuda", 2, draws=True) and first("cuda", 2, reads=True)


def test_a_copy_is_read_when_it_is_there() -> None:
    answers = iter([False, False, True])
    assert HostCopy(torch.tensor([1, 2]), lambda: next(answers)).read(60.0) == [1, 2]
    assert next(answers, None) is None


def test_a_copy_that_never_comes_ends_at_the_limit() -> None:
    with pytest.raises(TimeoutError, match="within 0.01 s"):
        HostCopy(torch.zeros(1), lambda: False).read(0.01)


def differing_later(group: dist.ProcessGroup) -> tuple[list[str], int]:
    """What each of five calls raises where the fourth has other inputs on one rank; and how many were compared late."""
    model, late = MODELS["nanogpt"].make(), []
    run = compiled(model, group, timeout=20.0)
    compare = calls.compare_around

    def behind(comparison: Any, launch: Callable[[], Any], first: bool) -> Any:
        late.append(comparison.agreement.compared >= calls.COMPARED_FIRST)
        return compare(comparison, launch, first=not late[-1])

    said = []
    with patch.object(calls, "compare_around", behind):
        for i in range(5):
            batch = batch_for("nanogpt", 23)
            batch["idx"][0, 0] += int(i == 3 and group.rank() == 1)
            try:
                loss_of(run(**batch)).backward()
                said.append("")
            except MismatchError as error:
                said.append(str(error))
    return said, sum(late)


def test_a_difference_in_a_later_call_is_raised_in_that_call(workers: Workers) -> None:
    for said, late in workers.run(differing_later, 3):
        assert late == 3
        assert [bool(text) for text in said] == [False, False, False, True, False]
        assert "differ in values of input" in said[3] and "rank 1 has" in said[3]


# --- the store --------------------------------------------------------------------------------------------------------


def keys_left(group: dist.ProcessGroup) -> list[int]:
    """The number of keys in the store after 5 and after 50 calls with outputs that are used, and some that differ."""
    model = MODELS["nanogpt"].make()
    run, store = compiled(model, group, timeout=20.0), ring_of(group).store
    counts = []
    for i in range(50):
        batch = batch_for("nanogpt", 23)
        batch["idx"][0, 0] += int(i % 3 == 2 and group.rank() == 1)
        if i % 3 == 2:
            error_message(MismatchError, lambda batch=batch: run(**batch))
        else:
            logits, loss = run(**batch)
            logits.sum()
        dist.barrier(group)
        if i + 1 in (5, 50):
            counts.append(store.num_keys())
        dist.barrier(group)
    return counts


def test_keys_do_not_accumulate_in_the_store(workers: Workers) -> None:
    for after_5, after_50 in workers.run(keys_left, 3):
        assert after_5 == after_50


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Tensor:
    """A tensor on a GPU that is not there, and not the process's default one."""
    with FakeTensorMode():
        return torch.empty(2, device="cuda:3")


def test_the_device_is_that_of_the_inputs(gpu: Tensor) -> None:
    assert device_of([1, torch.ones(2), gpu]) == torch.device("cuda:3")
    assert device_of([1, torch.ones(2)]) == device_of([]) == CPU


def test_the_seed_and_what_is_drawn_from_it_are_on_that_device(gpu: Tensor) -> None:
    captured: Any = SimpleNamespace(captured=SimpleNamespace(inputs=[torch.ones(2), gpu]))
    where = 0, 1, 4, "zigzag", 2, 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        seed = Writer._seed(captured)
        assert seed.device == random._keep(seed, [2], 0.5, 0, *where).device == torch.device("cuda:3")


@pytest.mark.parametrize(
    ("backends", "device", "bound", "where"),
    [
        ("cpu:gloo,cuda:gloo", "cuda:3", None, "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:3", None, "cuda:3"),
        ("cpu:gloo,cuda:nccl", "cpu", None, "cpu"),
        ("cuda:nccl", "cuda:3", 1, "cuda:3"),
        ("cuda:nccl", "cpu", 1, "cuda:1"),
        ("cuda:nccl", "cpu", None, None),
    ],
)
def test_headers_go_where_the_group_can_carry_them(
    backends: str, device: str, bound: int | None, where: str | None
) -> None:
    pg: Any = SimpleNamespace(bound_device_id=None if bound is None else torch.device("cuda", bound))
    with patch.object(dist, "get_backend_config", lambda pg: backends):
        found = header_device(pg, torch.device(device))
    assert found == (None if where is None else torch.device(where))


def test_all_ranks_meet_on_a_gpu_once_before_anything_else() -> None:
    ring, met = Ring(SimpleNamespace(), 1.0), []  # type: ignore[arg-type]
    with FakeTensorMode(), patch.object(dist, "all_reduce", lambda x, group: met.append((x.device, x.numel()))):
        for device in ("cuda:3", "cpu", "cuda:3"):
            ring.warm_up(torch.device(device))
    assert met == [(torch.device("cuda:3"), 1)]


def order_of_first_call(group: dist.ProcessGroup) -> list[str]:
    """What a ring does in its first call, on ranks that take a part of the steps only."""
    seen: list[str] = []
    start = dist.batch_isend_irecv

    def exchange(ops: Any) -> Any:
        seen.append("exchange")
        return start(ops)

    model = MODELS["nanogpt"].make()
    with (
        patch.object(Ring, "warm_up", lambda self, device: seen.append(f"warm up {device}")),
        patch.object(dist, "batch_isend_irecv", exchange),
    ):
        compiled(model, group)(**batch_for("nanogpt", 23))
    return seen[:2]


def test_a_ring_is_warm_before_its_first_exchange(workers: Workers) -> None:
    assert workers.run(order_of_first_call, 2) == [["warm up cpu", "exchange"]] * 2


def test_drawing_seeds_the_generators_of_the_call_alone() -> None:
    """No other GPU's generator is seeded, and none is touched for a call on the CPU."""
    comparison: Any = SimpleNamespace(finish=lambda: [7, 8])
    touched = AssertionError("a GPU's generator was used")
    before = torch.get_rng_state()
    with patch.object(torch.cuda, "get_rng_state", side_effect=touched), calls._generator(comparison, CPU):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(before, torch.get_rng_state())
