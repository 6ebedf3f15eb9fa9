"""Repeated key/value heads are found behind the forms in which models write them, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ringpass.passes.detect.detect import detect
from ringpass.passes.detect.site import AttentionSite
from tests.support.pipeline_stages import captured_graph

Repeat = Callable[[Tensor], Tensor]


def expanded(x: Tensor) -> Tensor:
    """As transformers' repeat_kv."""
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, 3, s, d).reshape(b, 3 * g, s, d)


def in_turn(x: Tensor) -> Tensor:
    """Query head j reads head j mod G: not what the ring's kernels do."""
    b, g, s, d = x.shape
    return x[:, None].expand(b, 3, g, s, d).reshape(b, 3 * g, s, d)


def other_shape(x: Tensor) -> Tensor:
    b, g, s, d = x.shape
    return x[:, :, None].expand(b, g, 3, s, d).reshape(b, g, 3 * s, d).repeat(1, 3, 1, 1)


def site(keys: Repeat, values: Repeat) -> AttentionSite:
    found: list[AttentionSite] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(detect(captured_graph(gm, example_inputs).gm))
        return gm.forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, keys(k), values(v))

    torch._dynamo.reset()
    q, k, v = torch.randn(2, 6, 7, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    torch.compile(attend, backend=backend, fullgraph=True)(q, k, v)
    return found[0]


@pytest.mark.parametrize(
    "repeat", [expanded, lambda x: x.repeat_interleave(3, dim=1)], ids=("expanded", "repeat_interleave")
)
def test_each_head_travels_once(repeat: Repeat) -> None:
    found = site(repeat, repeat)
    assert found.k.meta["val"].shape == found.v.meta["val"].shape == (2, 2, 7, 4)


@pytest.mark.parametrize(
    ("keys", "values"), [(in_turn, in_turn), (expanded, in_turn), (other_shape, other_shape)], ids=("turn", "one", "s")
)
def test_other_repetitions_stay(keys: Repeat, values: Repeat) -> None:
    found = site(keys, values)
    assert found.k.meta["val"].shape[1] == found.v.meta["val"].shape[1] == 6
