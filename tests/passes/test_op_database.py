"""torch's own operators on shards, against one device: a part of them by default, all with `-m slow`."""

from __future__ import annotations

import pytest
from torch.testing._internal.opinfo.core import OpInfo

from tests.op_table import row_of
from tests.support.op_database import name_of, operators

OPS = operators()
PART = OPS[::12]


@pytest.mark.parametrize("op", PART, ids=name_of)
def test_a_part_of_torchs_operators(op: OpInfo) -> None:
    row_of(op, most=1, worlds=(2,))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_all_of_torchs_operators(op: OpInfo) -> None:
    row_of(op, most=4)
