"""What `strict` accepts: sequences hardly longer than the ranks are many, and what a call leaves in an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.pipeline_stages import fake_ring
from tests.support.sharded_ops import Case, check_attentions


def next_token(x: Tensor, y: Tensor) -> Tensor:
    """A loss of each token but the last, on the one that follows it."""
    h = F.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
    return F.log_softmax(h[:, :-1], -1).mul(y[:, 1:]).sum(-1)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 2, 3])
def test_short_sequences_and_their_shifts_gather_nothing(world: int, more: int) -> None:
    tokens = 2 * world + more
    case = Case("log_softmax.int", next_token, ((2, 1, tokens, 4), (2, tokens, 4)))
    assert not check_attentions(case, "contiguous", world)


def write_cache(x: Tensor, weight: Tensor, cache: Tensor) -> Tensor:
    """A step that fills the first places of a cache which it is given."""
    k = x @ weight
    cache.index_copy_(2, torch.arange(k.shape[2]), k)
    return F.scaled_dot_product_attention(x, k, k, is_causal=True)


def test_what_a_call_leaves_in_an_input_is_an_output(tmp_path: Path) -> None:
    """It is gathered, for the caller's tensor is whole, and named as an output, not as work that ranks could share."""
    x, weight, cache = torch.randn(1, 2, 23, 4), torch.randn(4, 4), torch.zeros(1, 2, 40, 4)
    options: Any = {"compiler": "aot_eager", "strict": True, "dump": str(tmp_path)}
    with fake_ring(1, 3), torch.no_grad():
        torch.compile(write_cache, backend="ring_dilated", options=options)(x, weight, cache)
    (gathers,) = tmp_path.glob("graph*/gathers.txt")
    (line,) = gathers.read_text().splitlines()
    assert "output" in line and "index_copy" in line
