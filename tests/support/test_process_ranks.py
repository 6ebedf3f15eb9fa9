"""The pool of ranks: results, errors, deaths and hangs all come back to the test."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.process_ranks import RankError, Workers, spawn


def summed(group: Any, tensor: torch.Tensor, *, scale: float = 1.0) -> dict[str, Any]:
    mine = tensor * scale * (dist.get_rank(group) + 1)
    dist.all_reduce(mine, group=group)
    return {"sum": mine, "rank": dist.get_rank(group), "size": dist.get_world_size(group)}


def noise(group: Any) -> torch.Tensor:
    return torch.rand(3)


def refuse(group: Any, rank: int | None) -> int:
    if rank in (None, dist.get_rank(group)):
        raise ValueError(f"refused by {dist.get_rank(group)}")
    return 1


def leave_a_message(group: Any) -> None:
    if dist.get_rank(group) == 0:
        dist.isend(torch.ones(3), group_dst=1, group=group)
    raise ValueError("a message is left unread")


def hang(group: Any, rank: int) -> None:
    if dist.get_rank(group) == rank:
        time.sleep(1000)


def die(group: Any, rank: int) -> int:
    if dist.get_rank(group) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank(group)


def environment(group: Any, name: str) -> str | None:
    return os.environ.get(name)


def lock(group: Any) -> Any:
    import threading

    return threading.Lock()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_rank_returns_its_own_result(workers: Workers, ranks: int) -> None:
    results = workers.run(summed, ranks, torch.ones(2, dtype=torch.float64), scale=2.0)
    assert [r["rank"] for r in results] == list(range(ranks))
    assert all(r["size"] == ranks for r in results)
    expected = torch.full((2,), ranks * (ranks + 1.0), dtype=torch.float64)
    assert all(torch.equal(r["sum"], expected) for r in results)


def test_every_job_starts_from_the_same_seed(workers: Workers) -> None:
    first, second = workers.run(noise, 2), workers.run(noise, 2)
    assert torch.equal(first[0], second[1])


def test_an_error_names_its_rank_and_the_pool_lives_on(workers: Workers) -> None:
    with pytest.raises(RankError, match=r"refuse failed on rank 1 of 2[\s\S]*ValueError: refused by 1") as caught:
        workers.run(refuse, 2, 1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert list(caught.value.errors) == [1]
    assert workers.run(refuse, 2, 7) == [1, 1]


def test_errors_of_all_ranks_are_kept(workers: Workers) -> None:
    with pytest.raises(RankError) as caught:
        workers.run(refuse, 3, None)
    assert [str(e) for e in caught.value.errors.values()] == ["refused by 0", "refused by 1", "refused by 2"]


def test_a_message_left_by_a_failed_job_does_not_reach_the_next(workers: Workers) -> None:
    with pytest.raises(RankError):
        workers.run(leave_a_message, 2)
    results = workers.run(summed, 2, torch.zeros(1))
    assert all(r["sum"].item() == 0 for r in results)


def test_a_result_that_cannot_be_copied_is_an_error(workers: Workers) -> None:
    with pytest.raises(RankError, match="cannot be pickled"):
        workers.run(lock, 1)


def test_more_ranks_than_the_pool_has_are_refused(workers: Workers) -> None:
    with pytest.raises(ValueError, match="expected 1 to 5 ranks, got 6"):
        workers.run(noise, 6)


@pytest.mark.slow
def test_a_hang_and_a_death_restart_the_pool() -> None:
    with Workers(ranks=2) as pool:
        message = r"hang on 2 ranks: no reply within 1 s[\s\S]*rank 1 hangs at[\s\S]*in hang"
        with pytest.raises(TimeoutError, match=message):
            pool.run(hang, 2, 1, timeout=1)
        with pytest.raises(RankError, match=r"die failed on rank 0 of 2[\s\S]*exit code -9"):
            pool.run(die, 2, 0)
        assert pool.run(refuse, 2, 7) == [1, 1]


def test_spawn_reports_results_errors_and_deaths() -> None:
    dead, alive = spawn(die, 2, 0)
    assert (dead.exitcode, dead.result, dead.error) == (-signal.SIGKILL, None, None)
    assert (alive.exitcode, alive.result, alive.error) == (0, 1, None)
    fine, failed = spawn(refuse, 2, 1)
    assert (fine.exitcode, fine.result) == (0, 1)
    assert failed.exitcode == 1
    assert failed.error is not None and "ValueError: refused by 1" in failed.error


@pytest.mark.slow
def test_spawn_kills_what_hangs_and_sets_the_environment() -> None:
    done, hung = spawn(hang, 2, 1, timeout=20)
    assert (done.exitcode, done.timed_out) == (0, False)
    assert (hung.exitcode, hung.timed_out) == (-signal.SIGKILL, True)
    assert [o.result for o in spawn(environment, 1, "RINGPASS_PROBE", env={"RINGPASS_PROBE": "seen"})] == ["seen"]
    assert "RINGPASS_PROBE" not in os.environ
