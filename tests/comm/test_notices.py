"""What ranks tell each other through the store, and what becomes of a rank whose store is gone."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from ringpass.comm import notices as notes
from ringpass.comm import store as stores
from ringpass.comm import waits
from ringpass.comm.flight_recorder import recording, switched_on
from ringpass.comm.lost import await_work, what
from ringpass.comm.notices import described, give_notice, notices, withdraw_notice
from ringpass.comm.recovery import giving_up
from ringpass.comm.ring import RINGS, Ring, Running
from ringpass.comm.store import RingStore
from ringpass.errors import PeerError


def rings(world: int = 3) -> list[Ring]:
    """The rings of several ranks, in one process, with one store."""
    shared = HashStore()
    found = []
    for rank in range(world):
        pg: Any = SimpleNamespace(
            rank=lambda rank=rank: rank, size=lambda: world, get_group_store=lambda: shared, group_name="ring"
        )
        found.append(Ring(pg, 5.0))
    return found


def raised() -> ValueError:
    """An error that was raised in this file."""
    try:
        raise ValueError("a bad file\nand more")
    except ValueError as error:
        return error


def test_the_others_read_a_notice_until_it_is_withdrawn() -> None:
    first, second, third = rings()
    with pytest.raises(ValueError), giving_up(second, Running(3, "compilation")):
        raise raised()
    give_notice(second, "and something later, which nobody needs")
    for ring in (first, third):
        (said,) = notices(ring)
        assert said.startswith("rank 1 gave up the compilation of call 3 by ValueError: a bad file, ")
    assert notices(second) == []
    withdraw_notice(second)
    assert notices(first) == notices(third) == []


def test_what_failed_on_all_ranks_is_no_news() -> None:
    """A rank that waits for another, slower one to try again does not take the old failure for a new one."""
    first, second = rings(2)
    for ring in (first, second):
        give_notice(ring, "failed to compile a graph")
    withdraw_notice(first)
    assert notices(first) == []
    withdraw_notice(second)
    give_notice(second, "gave up call 3")
    assert notices(first) == ["rank 1 gave up call 3"]


def test_an_error_is_described_by_its_first_line_and_place() -> None:
    text = described(raised())
    assert text.startswith("ValueError: a bad file, ") and "test_notices.py:" in text


def test_a_script_that_ends_by_an_exception_gives_a_notice() -> None:
    first, second = rings(2)
    seen: list[Any] = []
    notes.notice_when_python_ends.cache_clear()
    with (
        patch.object(sys, "excepthook", lambda *given: seen.append(given)),
        patch.dict(RINGS, {"r": second}, clear=True),
        patch.object(notes, "registered", lambda name: second.pg),
    ):
        notes.notice_when_python_ends()
        error = raised()
        sys.excepthook(ValueError, error, error.__traceback__)
    notes.notice_when_python_ends.cache_clear()
    assert len(seen) == 1, "the hook before ours prints the traceback"
    assert notices(first)[0].startswith("rank 1 ended after call 0 by ValueError: a bad file, ")


# --- a store that is gone ---------------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_is_an_error_in_time() -> None:
    store = RingStore(HashStore(), 2, 3)
    store._store = cast(Any, SimpleNamespace(check=lambda keys: time.sleep(2)))
    with patch.object(stores, "ANSWER", 0.2):
        begun = time.monotonic()
        with pytest.raises(PeerError, match="rank 2 lost the process group's store .no answer within 0.2 s"):
            store.get("at/0")
        assert time.monotonic() - begun < 1.5
    with pytest.raises(PeerError, match="rank 0's otherwise"):  # and from now on at once
        store.set("at/2", "1")


def test_a_broken_connection_to_the_store_is_a_peer_error() -> None:
    def broken(*_: object) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    store = RingStore(HashStore(), 2, 3)
    gone: Any = SimpleNamespace(wait=broken, set=broken)
    store._store = gone
    with pytest.raises(PeerError, match="Connection reset by peer"):
        store.wait(["here"], 1.0)
    ring = rings()[0]
    ring.__dict__["store"] = store
    assert "lost the process group's store" in notices(ring)[0]


def test_a_silent_store_ends_no_wait() -> None:
    """It may answer yet; in the message of a wait that ended, it counts."""
    ring, store = rings()[0], RingStore(HashStore(), 0, 3)
    store._store, ring.__dict__["store"] = cast(Any, SimpleNamespace(check=lambda keys: time.sleep(1))), store
    with patch.object(stores, "ANSWER", 0.1):
        assert notices(ring, waiting=True) == []
        assert "no answer within 0.1 s" in notices(ring)[0]
        time.sleep(1.5)
    assert notices(ring) == [], "it has answered meanwhile"


def test_a_ring_that_waits_for_a_key_holds_up_no_other_one() -> None:
    shared = TCPStore("127.0.0.1", 0, is_master=True)
    waiting, other = (RingStore(shared, 0, world) for world in (2, 3))
    with ThreadPoolExecutor() as pool:
        found = pool.submit(waiting.wait, ["nobody sets this"], 3.0)
        time.sleep(0.5)
        other.set("at/0", "12")
        assert other.get("at/0") == "12" and not found.done()
    assert found.result() is False


def test_a_wait_that_runs_out_is_no_error() -> None:
    assert not RingStore(HashStore(), 0, 3).wait(["nobody sets this"], 0.05)


# --- messages ---------------------------------------------------------------------------------------------------------


class Late:
    """What a collective is that completes as its wait runs out."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self, limit: Any = None) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return True


def test_what_completes_as_a_wait_runs_out_is_complete() -> None:
    work: Any = Late()
    await_work([work], rings()[0], torch.device("cpu"))
    assert work.waits == 2


def test_the_thread_that_ends_waits_survives_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    (ring, *_), seen = rings(), list[Ring]()

    def look(at: Ring) -> None:
        seen.append(at)
        raise TypeError("a group that is gone")

    monkeypatch.setattr(waits, "RINGS", {"gone": ring})
    monkeypatch.setattr(waits, "_look_at", look)
    monkeypatch.setattr(time, "sleep", lambda _: 1 / (3 - len(seen)))
    with pytest.raises(ZeroDivisionError):
        waits._look_on()
    assert len(seen) == 3


def test_labels_are_told_by_step_and_place() -> None:
    ring = Ring(None, 5.0, running=Running(12, "backward", ("", "layers.1.attn"), "model.py:31"))
    assert what("site1 receive_gradients_step2_from_rank0", ring) == (
        "exchange of gradients of step 2 of attention 1 (layers.1.attn)"
    )
    assert what("site0 gather_keys", ring) == "gather keys of attention 0"
    assert what("sum of gradients", ring) == "sum of gradients" and what("", None) == "exchange"


def test_exchanges_of_different_calls_never_match() -> None:
    runs = [Running(call, part) for call in (0, 1, 2, 511) for part in ("forward", "backward")]
    assert len({run.tags for run in runs}) == len(runs)
    assert all(0 <= run.tags < 2**31 - 2**20 for run in runs)


def test_the_flight_recorder_is_named_where_it_is_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not switched_on() and recording() == ""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "rank_"))
    if not hasattr(torch._C._distributed_c10d, "_dump_fr_trace"):
        pytest.skip("this torch has no flight recorder")
    assert str(tmp_path / "rank_0") in recording()
    assert (tmp_path / "rank_0").stat().st_size > 0
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/proc/no/such/folder/rank_")
    assert "could not be written" in recording()
