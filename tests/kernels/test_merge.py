"""The merge in place: as one compiled kernel, and as ATen ops."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

from ringpass.kernels import merge
from ringpass.kernels.compiled import compiled
from ringpass.kernels.tile import merge_by_lse


def parts(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """(out, lse) of rows 3 to 3 + `rows` of a longer block, and (more, more_lse) of `dtype`, with rows without keys."""
    g = torch.Generator().manual_seed(rows)
    out, lse = torch.randn(2, rows + 5, 3, 8, generator=g).transpose(1, 2), torch.randn(2, 3, rows + 5, generator=g)
    more, more_lse = torch.randn(2, 3, rows, 8, generator=g).to(dtype), torch.randn(2, 3, rows, generator=g)
    lse[:, :, 3], more_lse[:, :, 1] = -torch.inf, -torch.inf
    lse[:, 0, 4], more_lse[:, 0, 1] = -torch.inf, -torch.inf
    return [out.narrow(2, 3, rows), lse.narrow(2, 3, rows), more, more_lse]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_merge_is_one_kernel(dtype: torch.dtype) -> None:
    run = compiled(merge.written_merge, dynamic=True)
    with fresh_cache():
        _, (code,) = run_and_get_code(run, *parts(7, dtype))
    assert len(re.findall(r"^ +cpp_fused\w*\(", code, re.M)) == 1
    graphs = counters["stats"]["unique_graphs"]
    for rows in (12, 30, 101):
        given = parts(rows, dtype)
        want = merge_by_lse(given[0].clone(), given[1].clone(), given[2].float(), given[3])
        run(*given)
        assert not given[0].isnan().any()
        torch.testing.assert_close(tuple(given[:2]), want)
    assert counters["stats"]["unique_graphs"] == graphs  # one kernel serves all lengths


def test_ops_write_in_place_too() -> None:
    given = parts(6, torch.bfloat16)
    want = merge_by_lse(given[0].clone(), given[1].clone(), given[2].float(), given[3])
    merge.merge_in_place(*given)
    torch.testing.assert_close(tuple(given[:2]), want)
