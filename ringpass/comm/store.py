"""The part of a process group's key-value store that ringpass uses, with a limit on every answer and named errors.

The store lives in one process: the launcher's under torchrun, rank 0's under plain launchers.  When that process dies,
stops or ends, what is asked of the store raises PeerError, which says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch.distributed as dist

from ringpass.errors import PeerError

T = TypeVar("T")
ANSWER = 5.0
"""Seconds within which the process that hosts the store has to answer."""


def text_under(store: dist.distributed_c10d.Store, key: str) -> str:
    """The text under a key; an empty one if nobody has set it."""
    return store.get(key).decode() if store.check([key]) else ""


class SilentStoreError(PeerError):
    """The store does not answer, and may still do so."""


class RingStore:
    """Keys of `rank` of `world` ranks in `store`, over a connection of their own.

    What waits for an answer runs in a thread, since a store whose process is stopped keeps its caller for ever.  After
    a failure every request fails at once, until an answer comes after all.
    """

    def __init__(self, store: dist.distributed_c10d.Store, rank: int, world: int) -> None:
        self._shared = dist.distributed_c10d.PrefixStore(f"ringpass/{world}", store)
        self._rank = rank
        self._requests: SimpleQueue[Callable[[], None] | None] | None = None
        self._lost: tuple[type[PeerError], str] | None = None

    @cached_property
    def generation(self) -> int:
        """How many process groups of this name and size have used the store: it may hold the keys of earlier ones."""
        return self._answer(lambda: int(self._shared.add(f"joined/{self._rank}", 1)))

    @cached_property
    def _store(self) -> dist.distributed_c10d.Store:
        """A connection of its own: one that is shared answers nobody while another ring waits for a key."""
        keys = dist.distributed_c10d.PrefixStore(str(self.generation), self._shared)
        return self._answer(lambda: _connected(keys))

    def close(self) -> None:
        """Ends the thread and the connection; a request makes them again."""
        if self._requests is not None:
            self._requests.put(None)
        self._requests = None
        self.__dict__.pop("_store", None)

    def set(self, key: str, text: str) -> None:
        """Sets a key; waits for nobody."""
        store = self._store
        self._check()
        try:
            store.set(key, text)
        except RuntimeError as error:
            raise self._gone(error) from error

    def get(self, key: str) -> str:
        """The text under a key; an empty one if nobody has set it."""
        return self._asked(lambda store: text_under(store, key))

    def get_all(self, keys: Iterable[str]) -> list[str]:
        """The texts under several keys."""
        wanted = list(keys)
        return self._asked(lambda store: [text_under(store, key) for key in wanted])

    def add(self, key: str, number: int) -> int:
        """The number under a key, after `number` was added."""
        return self._asked(lambda store: int(store.add(key, number)))

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes keys, those that are there."""
        unwanted = list(keys)
        self._asked(lambda store: [store.delete_key(key) for key in unwanted])

    def wait(self, keys: Iterable[str], seconds: float) -> bool:
        """Whether all keys were set within so many seconds."""
        wanted = list(keys)

        def waited(store: dist.distributed_c10d.Store) -> bool:
            try:
                store.wait(wanted, timedelta(seconds=seconds))
            except dist.DistNetworkError:
                raise
            except RuntimeError:
                return bool(store.check(wanted))
            return True

        return self._asked(waited, seconds)

    def clone(self) -> dist.distributed_c10d.Store:
        """Another connection to the same keys, for another thread; it has no limits."""
        return _connected(self._store)

    def num_keys(self) -> int:
        """The number of keys in the whole store."""
        return self._asked(lambda store: int(store.num_keys()))

    def _asked(self, request: Callable[[dist.distributed_c10d.Store], T], more: float = 0.0) -> T:
        """What `request` of the connection returns, within ANSWER seconds and `more`."""
        store = self._store
        return self._answer(lambda: request(store), more)

    def _answer(self, request: Callable[[], T], more: float = 0.0) -> T:
        """What `request` returns in the thread, within ANSWER seconds and `more`."""
        self._check()
        answers: SimpleQueue[tuple[bool, T | RuntimeError]] = SimpleQueue()

        def run() -> None:
            try:
                answer = request()
                self._lost = None  # it answers, if late
                answers.put((True, answer))
            except RuntimeError as error:
                answers.put((False, error))

        if self._requests is None:
            self._requests = SimpleQueue()
            threading.Thread(target=_serve, args=(self._requests,), name="ringpass store", daemon=True).start()
        self._requests.put(run)
        try:
            fine, answer = answers.get(timeout=ANSWER + more)
        except Empty:
            raise self._gone(TimeoutError(f"no answer within {ANSWER:g} s")) from None
        if fine:
            return answer  # type: ignore[return-value]
        assert isinstance(answer, RuntimeError)
        raise self._gone(answer) from answer

    def _gone(self, error: Exception) -> PeerError:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = SilentStoreError if isinstance(error, TimeoutError) else PeerError
        text = (
            f"rank {self._rank} lost the process group's store ({first}): the process that hosts it has died, stopped "
            "or ended, the launcher's under torchrun, rank 0's otherwise: look for the first error in its output."
        )
        self._lost = kind, text
        return kind(text)

    def _check(self) -> None:
        if self._lost is not None:
            kind, text = self._lost
            raise kind(text)


def _connected(store: Any) -> dist.distributed_c10d.Store:
    """A new connection to the same keys; the store itself if it is of this process, and has no connections."""
    try:
        found: dist.distributed_c10d.Store = store.clone()
    except RuntimeError as error:
        if "pure virtual" not in str(error):
            raise
        found = store
    return found


def _serve(requests: SimpleQueue[Callable[[], None] | None]) -> None:
    """The thread that asks the store, until it reads None."""
    while (request := requests.get()) is not None:
        request()
