"""Process groups that come and go: one destroyed and made anew, two in one process, the default group in copies."""

from __future__ import annotations

import copy
import pickle
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringpass import RingConfig
from ringpass.comm.ring import ring_of
from ringpass.errors import MismatchError, OptionError
from tests.bad_input.block import gradients, loss_of, model, tokens
from tests.support.errors import error_message
from tests.support.model_parity import relative
from tests.support.process_ranks import spawn

OPTIONS: dict[str, Any] = {"compiler": "aot_eager", "timeout": 60.0}
SLOWEST = 300.0  # seconds for a set of new processes


def error_of(run: Any) -> float:
    """The relative error of a step's gradients against one device, over all parameters."""
    torch.manual_seed(1)
    net, x = run.module, tokens()
    found = []
    for call in (net, run):
        net.zero_grad()
        loss_of(call(x)).backward()
        found.append([g.clone() for g in gradients(net)])
    return max(relative(got, want) for want, got in zip(*found, strict=True) if want.norm() > 1e-9)


class OnRing:
    """A block, compiled for the ring of a group, or for the default group."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = model()
        self.run: Any = torch.compile(self.module, backend="ring_dilated", options={**OPTIONS, **options})

    def __call__(self, x: torch.Tensor) -> Any:
        return self.run(x)


def made_anew(rank: int, ranks: int, path: Path) -> None:
    """Destroys the default group, and makes another one of `ranks` ranks."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )


def group_of_another_time(_: Any, directory: str) -> list[Any]:
    """A step in the first group; in the second, before and after `torch._dynamo.reset()`; in a third, of one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    run = OnRing()
    found: list[Any] = [error_of(run)]
    before = ring_of(None)
    dist.barrier()
    dist.destroy_process_group()
    found.append(error_message(OptionError, lambda: run(tokens())))
    dist.init_process_group("gloo", init_method=f"file://{directory}/second", rank=rank, world_size=ranks)
    one = ring_of(None)  # as ringpass.sharded asks for it, before the model that was compiled does
    found.append(error_of(run))
    assert ring_of(None) is before is one and one.calls == 1
    torch._dynamo.reset()
    found.append(error_of(run))
    copied = OnRing()
    copied.run = pickle.loads(pickle.dumps(copy.deepcopy(run.run)))
    copied.module = copied.run._orig_mod
    found.append(error_of(copied))
    dist.barrier()
    made_anew(1 - rank, ranks, Path(directory, "third"))
    found.append(error_message(OptionError, lambda: run(tokens())))
    torch._dynamo.reset()
    found.append(error_of(run))
    return found


def test_a_group_destroyed_and_made_anew(tmp_path: Path) -> None:
    """Also with a store that holds the keys of the group before, as torchrun's does."""
    for outcome in spawn(group_of_another_time, 2, str(tmp_path), timeout=SLOWEST):
        assert outcome.error is None and not outcome.timed_out, outcome
        first, gone, second, reset, copied, other, last = outcome.result
        assert max(first, second, reset, copied, last) < 1e-10, outcome.result
        assert "'0', for whose ranks the model was compiled, was destroyed" in gone
        assert "was made anew, where this is rank" in other and "torch._dynamo.reset()" in other


def names_used_again(_: Any, directory: str) -> list[Any]:
    """A group of ranks 0 and 1, then one of all three that has its name; a rank's threads while one and none exists."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    if rank < 2:
        error_of(OnRing(group=pair))
    threads = [sum(thread.name == "ringpass store" for thread in threading.enumerate())]
    dist.barrier()
    made_anew(rank, 3, Path(directory, "second"))
    everyone = dist.new_group([0, 1, 2])
    assert everyone.group_name == pair.group_name if rank < 2 else True
    torch._dynamo.reset()
    run = OnRing(group=everyone)
    error, x = error_of(run), tokens()
    x[0, 0] += rank
    said = error_message(MismatchError, lambda: run(x))
    threads.append(sum(thread.name == "ringpass store" for thread in threading.enumerate()))
    return [error, said, threads]


@pytest.mark.slow
def test_ranks_of_different_histories_share_a_group(tmp_path: Path) -> None:
    for rank, outcome in enumerate(spawn(names_used_again, 3, str(tmp_path), timeout=SLOWEST)):
        assert outcome.error is None and not outcome.timed_out, outcome
        error, said, threads = outcome.result
        assert error < 1e-10 and "differ in values of input" in said
        assert threads == [int(rank < 2), 1], "that of a group which is gone has ended"


def two_groups(_: Any) -> list[float]:
    """Steps of two models on two rings of the same ranks, in turn."""
    runs = [OnRing(), OnRing(group=dist.new_group([0, 1]))]
    return [error_of(run) for run in (*runs, *runs)]


@pytest.mark.slow
def test_two_groups_in_one_process() -> None:
    for outcome in spawn(two_groups, 2, timeout=SLOWEST):
        assert outcome.error is None and max(outcome.result) < 1e-10, outcome


def test_a_destroyed_group_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        group = dist.new_group([0, 1])
        assert RingConfig(group=group).ring is group
        dist.destroy_process_group(group)
        with pytest.raises(OptionError, match="option 'group': the process group .* was destroyed"):
            RingConfig(group=group)
    finally:
        dist.destroy_process_group()
