"""Every operator's body on fake CUDA tensors: devices, dtypes and strides that would not fit on a GPU show without one.

The loop of ring attention runs forward and backward with the bodies of all its operators (`tests.support.fake_cuda`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import ringpass.ops.gradient_sums  # noqa: F401  (registers the operators)
from ringpass.kernels import table as kernels
from ringpass.layouts.layout import Layout
from ringpass.ops.library import BODIES
from ringpass.schedule.dilation import Dilation
from ringpass.schedule.site import register
from tests.support.fake_cuda import bodies_on_fake_cuda, fake_cuda_process, run_there
from tests.support.sites import site

TOKENS, TILE = 512, 128
BF16, F32 = torch.bfloat16, torch.float32
Leaf = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Case:
    """One attention: `about` are fields of its site, `leaves` (shape, dtype) of the tensors that its texts read."""

    mask: str = "k <= q"
    tokens: int = TOKENS
    leaves: tuple[Leaf, ...] = ()
    heads: tuple[int, int] = (4, 4)
    widths: tuple[int, int] = (64, 64)  # of Q and K, of V
    seed: str = ""  # the device of the seed
    about: dict[str, Any] = field(default_factory=dict)


CASES = {
    "causal": Case(),
    "window": Case("k <= q & q - k < 100"),
    "padding": Case("k <= q & bool(x0[b, k])", leaves=(((2, TOKENS), torch.bool),)),
    "documents": Case("k <= q & x0[b, q] == x0[b, k]", leaves=(((2, TOKENS), torch.int64),)),
    "bias": Case(leaves=(((4, TOKENS, TOKENS), F32),), about={"bias": "x0[h, q, k]"}),
    "learned bias": Case(leaves=(((4, TOKENS, TOKENS), F32),), about={"bias": "x0[h, q, k]", "learned": (0,)}),
    "sink": Case(leaves=(((4,), F32),), about={"sink": "x0[h]", "learned": (0,)}),
    "grouped heads": Case(heads=(4, 2)),
    "grouped heads, padding": Case("k <= q & bool(x0[b, k])", leaves=(((2, TOKENS), torch.bool),), heads=(4, 2)),
    "odd length": Case(tokens=517),
    "odd length, padding": Case("k <= q & bool(x0[b, k])", tokens=517, leaves=(((2, 517), torch.bool),)),
    "dropout": Case(seed="cuda", about={"dropout": 0.1}),
    "dilation": Case(about={"dilation": Dilation((64, 128), (1, 2)), "heads": 4}),
    "dilation, sink": Case(
        leaves=(((4,), F32),),
        about={"dilation": Dilation((64, 128), (1, 2)), "heads": 4, "sink": "x0[h]", "learned": (0,)},
    ),
    "all-gather": Case(about={"comm": "allgather"}),
    "width 20": Case(widths=(20, 20)),
    "wider values": Case(widths=(64, 96)),
    "score function": Case(leaves=(((4,), F32),), about={"score": "score * x0[h]", "learned": (0,)}),
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with fake_cuda_process() as pool:
        yield pool


def attention_step(case: Case, world: int, dtype: torch.dtype) -> Counter[str]:
    """One forward and backward on the last rank; which operators were checked."""
    here = site(case.mask, case.tokens, "zigzag", world - 1, world, TILE, scale=0.1, stream=1, **case.about)
    rows = Layout("zigzag", world).length(world - 1, case.tokens)
    with bodies_on_fake_cuda() as checked:
        shapes = [(2, case.heads[0], rows, case.widths[0])]
        shapes += [(2, case.heads[1], rows, width) for width in case.widths]
        q, k, v = (torch.empty(n, h, length, w, dtype=dtype, device="cuda") for n, h, length, w in shapes)
        leaves = [torch.empty(shape, dtype=kind, device="cuda") for shape, kind in case.leaves]
        seed = torch.zeros((), dtype=torch.int64, device=case.seed) if case.seed else None
        about = leaves, seed, register(here), case.tokens, case.tokens, 0, "g"
        out, lse = torch.ops.ringpass.ring_attention(q, k, v, *about)
        torch.ops.ringpass.ring_attention_backward(torch.empty_like(out), q, k, v, out, lse, *about)
    return checked


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_attention(process: ProcessPoolExecutor, name: str, world: int, dtype: torch.dtype) -> None:
    checked = run_there(process, attention_step, CASES[name], world, dtype)
    kinds = ("scored_tile",) if "score" in CASES[name].about else ("attention_tile", "attention_step")
    assert any({kind, f"{kind}_backward"} <= set(checked) for kind in kinds)
    assert {"ring_attention", "ring_attention_backward"} <= set(checked)
    if dtype == BF16 and "x0" in CASES[name].mask:
        assert {"block_lists", "attention_step", "attention_step_backward"} <= set(checked)


def test_a_seed_on_the_cpu_is_noticed(process: ProcessPoolExecutor) -> None:
    with pytest.raises(AssertionError, match="found .* devices"):
        run_there(process, attention_step, Case(seed="cpu", about={"dropout": 0.1}), 2, BF16)


def step_with_bad_tile(device: str, dtype: torch.dtype) -> None:
    """A causal step whose tiles return their lse on `device` in `dtype`."""
    good = kernels.forward

    def bad(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = good(*args)
        return out, lse.to(device, dtype)

    with patch.object(kernels, "forward", bad):
        attention_step(Case(), 2, BF16)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", F32), ("cuda", BF16)])
def test_a_result_that_is_not_as_its_fake_says_is_noticed(
    process: ProcessPoolExecutor, device: str, dtype: torch.dtype
) -> None:
    with pytest.raises(AssertionError, match="the body of attention_tile returned"):
        run_there(process, step_with_bad_tile, device, dtype)


# --- the other operators ----------------------------------------------------------------------------------------------

RANK, WORLD, LAYOUT = 1, 2, "zigzag"
SHARD = 1, 1, 23, LAYOUT, WORLD, RANK  # dim, outer, tokens, layout, world, rank
LOCAL = Layout(LAYOUT, WORLD).length(RANK, 23)
POOLING = "0 1|1 2 1", 23, LAYOUT, WORLD, RANK  # heads of each member, tokens, layout, P, rank
BLOCKS = [0, 1, 1, 2], [0, 8, 1, 4, 12, 2], [2, 3, 2, 3]  # heads, rows, sizes of two parts


def cuda(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """An empty tensor on the device."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def integers(*shape: int) -> Tensor:
    """The same of int64."""
    return cuda(*shape, dtype=torch.int64)


def lse() -> Tensor:
    """One of 2 batches, 3 heads and 8 rows."""
    return cuda(2, 3, 8, dtype=F32)


OPERATORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "shard": lambda: (cuda(2, 23, 5), *SHARD, "g"),
    "gather": lambda: (cuda(2, LOCAL, 5), *SHARD, "g"),
    "reduce_scatter": lambda: (cuda(2, 23, 5), *SHARD, "g"),
    "redistribute": lambda: (cuda(2, LOCAL, 5), 1, 1, 23, LAYOUT, "contiguous", WORLD, RANK, "g"),
    "all_to_all": lambda: (cuda(2, LOCAL, 5), 1, 1, 23, LAYOUT, 2, 1, 5, "contiguous", WORLD, RANK, "g"),
    "merge_ranks": lambda: (cuda(2, 3, 8, 4, dtype=F32), lse(), WORLD, RANK, "g"),
    "start_gather": lambda: ([cuda(12)], WORLD, [], "", "g"),
    "pool_tokens": lambda: ([cuda(2, 3, LOCAL, 4), cuda(2, 3, LOCAL, 6)], *POOLING, "", "g"),
    "return_tokens": lambda: ([cuda(2, 3, 23, 4)], 3, *POOLING, "", "g"),
    "pack_heads": lambda: ([cuda(2, 3, 23, 4)], True, *POOLING),
    "start_all_to_all": lambda: ([cuda(12)], [5, 6], [4, 8], "", "g"),
    "unpack_heads": lambda: (cuda(2 * 2 * 23 * 10), 2, [4, 6], BF16, 0, False, *POOLING),
    "begin_states": lambda: ([cuda(2, 3), cuda(4)],),
    "send_states": lambda: ([cuda(1, dtype=F32), cuda(2, 3)], 0, "g"),
    "receive_states": lambda: (cuda(1, dtype=F32), [2, 3], BF16, 0, "g"),
    "end_states": lambda: (cuda(2, 3), cuda(1, dtype=F32)),
    "permute": lambda: (cuda(2, 16, 5), 1, 1, 16, "hilbert 4x4", False),
    "reduce": lambda: (cuda(3, 5), "g"),
    "extremum": lambda: (cuda(2, LOCAL, 5), [1], False, True, WORLD, RANK, "g"),
    "first_extremum": lambda: (cuda(2, LOCAL, 5), True, *SHARD, 23, "g"),
    "reduce_list": lambda: ([cuda(3), cuda(2, 2, dtype=F32)], 1, 1, "g"),
    "replicate": lambda: ([cuda(3), cuda(2, 2)], 1, 1, "g"),
    "start_sum": lambda: ([cuda(3), cuda(2, 2)], [1], F32, "g"),
    "wait_sum": lambda: (torch.ops.ringpass.start_sum([cuda(3), cuda(2, 2)], [1], F32, "g"), "g"),
    "unpack_gradients": lambda: (cuda(7, dtype=F32), [3, 4], ["bfloat16", "float32"]),
    "halo": lambda: (cuda(2, LOCAL, 5), *SHARD, 2, 1, 0, "g"),
    "halo_backward": lambda: (cuda(2, LOCAL + 2, 5), *SHARD, 1, 1, 0, "g"),
    "interior_rows": lambda: (cuda(2, LOCAL, 5), *SHARD, 1, 1, 0),
    "keep": lambda: (integers(), [2, LOCAL, 5], 0.1, 3, *SHARD),
    "locate": lambda: (integers(2, 5), 23, LAYOUT, WORLD, RANK),
    "block_means": lambda: (cuda(2, 3, LOCAL, 5), 4, 2, 1, 23, LAYOUT, WORLD, RANK, "g"),
    "choose_blocks": lambda: (cuda(2, 4, 6, 8), cuda(2, 2, 6, 8), 0.1, "k <= q", 23, 23, 4, 0.5, None),
    "pack": lambda: ([cuda(2, 3, 8, 4), cuda(2, 3, 8, 6)], [0, 2, 5, 8]),
    "merge": lambda: (cuda(2, 3, 8, 4, dtype=F32), lse(), cuda(2, 3, 8, 4), lse()),
    "mask_tile": lambda: ([integers(2, 9)], cuda(2, 3, 4, 8), "k <= q & x0[b, k] == 1", 2, 3, [2, 6], [0, 9]),
    "mask_tile_backward": lambda: (
        cuda(1, 3, 4, 9, dtype=F32), [cuda(3, 9)], [0], cuda(2, 3, 4, 8), "x0[h, q - k]", 2, 3, [4, 8], [0, 9],
    ),
    "keep_tile": lambda: (integers(), 3, 0.1, "h; q; k", 2, 3, [2, 6], [0, 5, 7, 9]),
    "take_rows": lambda: (cuda(2, 3, 16, 4), [0, 2], [0, 8, 1, 9, 16, 3]),
    "pack_rows": lambda: ([cuda(2, 3, 16, 4), cuda(2, 3, 16, 6)], *BLOCKS),
    "add_rows": lambda: ([cuda(2, 2, 8, 4, dtype=F32), cuda(2, 2, 4, 4, dtype=F32)], *BLOCKS, 3, 16),
    "merge_rows": lambda: (
        [cuda(2, 2, 8, 4, dtype=F32), cuda(2, 2, 4, 4, dtype=F32)],
        [cuda(2, 2, 8, dtype=F32), cuda(2, 2, 4, dtype=F32)], *BLOCKS, 1, 3, 16,
    ),
}  # fmt: skip
"""Arguments for one call of each operator."""


def one_call(name: str) -> Counter[str]:
    """Calls an operator once; which were checked."""
    with bodies_on_fake_cuda() as checked:
        getattr(torch.ops.ringpass, name)(*OPERATORS[name]())
    return checked


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(process: ProcessPoolExecutor, name: str) -> None:
    assert run_there(process, one_call, name)[name] == 1


def test_every_operator_is_covered() -> None:
    """Tiles, steps, exchanges and waits run as parts of an attention; dropout is arithmetic on `keep`."""
    parts = {"exchange", "wait", "block_lists", *(f"{op}{way}" for op in ATTENTION for way in ("", "_backward"))}
    assert set(BODIES) - {"host_copy"} <= set(OPERATORS) | parts  # whose result is on the host


ATTENTION = "attention_tile", "attention_step", "scored_tile", "ring_attention"
