"""The process group with which ranks go on after a call that failed on all of them."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist

from ringpass.comm.recovery import give_up, settle
from ringpass.comm.ring import Ring
from tests.support.process_ranks import Workers


def replaced(group: dist.ProcessGroup) -> tuple[bool, bool]:
    """Whether the new group splits the connections of the default one, which is bound to a GPU; whether it works."""
    default, ring, split = dist.group.WORLD, Ring(group, 30.0), list[object]()
    assert default is not None
    with patch.object(dist.distributed_c10d, "_get_split_source", split.append):
        default.bound_device_id = torch.device("cuda", 0)
        try:
            give_up(ring, torch.OutOfMemoryError("a tile needs 12 GiB"))
            settle(ring)
            assert default.bound_device_id == torch.device("cuda", 0)
        finally:
            default.bound_device_id = None
    x = torch.ones(1)
    dist.all_reduce(x, group=ring.carrier)
    return bool(split), float(x) == group.size() and ring.carrier is not group


def test_a_new_group_does_not_split_the_default_one(workers: Workers) -> None:
    """Those of its ranks that are in no ring would have to take part."""
    assert workers.run(replaced, 2) == [(False, True)] * 2
