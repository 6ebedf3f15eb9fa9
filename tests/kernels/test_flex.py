"""FlexAttention for whole steps, on its dense CPU form: block lists, numbers, gradients from a global out and lse.

The code that Inductor writes for CUDA is for tests/kernels/test_gpu.py; that the calls can be traced for it is here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention import flex_attention as torch_flex

from ringpass.kernels import compiled as compilation
from ringpass.kernels import flex
from ringpass.kernels.compiled import compiled
from ringpass.kernels.plain import plain, plain_backward
from ringpass.kernels.tile import TileArgs, merge_by_lse

F64, SCALE = torch.float64, 0.3


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def patchy(*shape: int) -> Tensor:
    """A mask with empty and full squares, mixed ones, and a row that sees nothing."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[:, :, :128, :128] = True
    mask[:, :, 128:, :128] = False
    mask[..., 2, :] = False
    return mask


def looked_up(b: Tensor, h: Tensor, row: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """The `mask_mod` of an evaluated mask, for all batch elements and heads if it has one."""
    lead = [at.long() if n > 1 else torch.zeros_like(at).long() for at, n in zip((b, h), mask.shape, strict=False)]
    seen: Tensor = torch.ops.aten.index(mask, [*lead, row, key])
    return seen


def step_mask(mask: Tensor) -> flex.StepMask:
    return flex.StepMask(looked_up, flex.block_lists(*flex.squares(mask)), (mask,))


# --- block lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 256, 384), (1, 3, 150, 270), (1, 1, 5, 7)])
def test_block_lists_are_those_of_torch(shape: tuple[int, int, int, int]) -> None:
    mask = patchy(*shape)
    mask[..., 128:256, 128:256] = True
    batch, heads, rows, keys = shape
    theirs = torch_flex.create_block_mask(
        lambda b, h, i, j: mask[b, h, i, j], batch, heads, rows, keys, device="cpu", BLOCK_SIZE=flex.SQUARE
    )
    kinds = ("kv", "full_kv", "q", "full_q")
    names = [name for kind in kinds for name in (f"{kind}_num_blocks", f"{kind}_indices")]
    ours = dict(zip(names, flex.block_lists(*flex.squares(mask)), strict=True))
    for counts, indices in zip(names[::2], names[1::2], strict=True):
        assert torch.equal(ours[counts], getattr(theirs, counts)), counts
        listed = torch.arange(ours[indices].shape[-1]) < ours[counts].unsqueeze(-1)
        assert torch.equal(ours[indices][listed], getattr(theirs, indices)[listed]), indices
        assert ours[counts].dtype == ours[indices].dtype == torch.int32


# --- numbers ----------------------------------------------------------------------------------------------------------

CASES = {  # heads (H, G), lengths, widths (Q, V), the mask's batch and heads
    "batches": ((4, 2), (150, 150), (16, 16), (2, 1)),
    "heads": ((3, 3), (150, 270), (16, 24), (1, 3)),
    "one mask": ((4, 1), (300, 37), (16, 16), (1, 1)),
    "narrow values": ((2, 2), (20, 130), (16, 8), (2, 2)),
}


@pytest.fixture(params=["dense", "traced"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls as a CPU runs them, and as CUDA's compilation traces them, up to the code that Inductor would write."""
    if request.param == "traced":
        torch._dynamo.reset()
        monkeypatch.setattr(flex, "compiled", partial(compiled, backend="aot_eager"))
        made = cache(partial(flex._runner.__wrapped__, device_type="cuda"))
        monkeypatch.setattr(flex, "_runner", lambda function, mask_mod, _: made(function, mask_mod))


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize("name", CASES)
def test_a_step_from_global_rows(name: str) -> None:
    (heads, groups), (rows, keys), (width, value_width), lead = CASES[name]
    q, k = noise(2, heads, rows, width), noise(2, groups, keys, width, seed=1)
    v, more_v = (noise(2, groups, keys, value_width, seed=s) for s in (2, 4))
    mask = patchy(*lead, rows, keys)
    args, elsewhere = TileArgs(SCALE, mask=mask), TileArgs(SCALE, mask=(torch.arange(rows) % 3 == 0).view(1, 1, -1, 1))
    out, lse = flex.flex_step(q, k, v, step_mask(mask), SCALE)
    torch.testing.assert_close((out, lse), plain(q, k, v, args))
    whole, whole_lse = merge_by_lse(out, lse, *plain(q, noise(*k.shape, seed=3), more_v, elsewhere))
    assert (whole_lse == -torch.inf).any()  # a row that nothing serves
    whole_lse = whole_lse.masked_fill(whole_lse == -torch.inf, torch.inf)
    given = noise(*out.shape, seed=5), q, k, v, whole, whole_lse
    got = flex.flex_step_backward(*given, step_mask(mask), SCALE)
    torch.testing.assert_close(got, plain_backward(*given, args)[:3])


# --- which steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "taken"),
    [
        ("cuda", torch.bfloat16, 64, (9, 0), True),
        ("cuda", torch.float16, 16, (8, 0), True),
        ("cuda", torch.float16, 256, (8, 0), True),
        ("cuda", torch.float16, 8, (9, 0), False),
        ("cuda", torch.float16, 264, (9, 0), False),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.float16, 64, (7, 5), False),
        ("cuda", torch.float16, 64, (0, 0), False),  # ROCm
        ("cpu", torch.bfloat16, 64, (9, 0), False),
    ],
)
def test_taken_steps(
    device: str, dtype: torch.dtype, width: int, capability: tuple[int, int], taken: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flex, "capability", lambda device: capability)
    assert flex.takes_step(torch.device(device), dtype, width) == taken


# --- compilation ------------------------------------------------------------------------------------------------------

KINDS = 20


def counting(seen: list[GraphModule]) -> Callable[..., Any]:
    """A Dynamo backend that compiles nothing and counts how often it is asked."""

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        seen.append(gm)
        return gm.forward

    return backend


def attend_kinds(monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of `KINDS` lengths, each twice; how many were compiled."""
    torch._dynamo.reset()
    seen: list[GraphModule] = []
    monkeypatch.setattr(flex, "compiled", partial(compiled, backend=counting(seen)))
    run = flex._runner.__wrapped__(flex._forward, looked_up, "cuda")
    for length in [*range(1, KINDS + 1)] * 2:
        given = step_mask(torch.ones(1, 1, length, 7, dtype=torch.bool))
        q, k = noise(1, 2, length, 16), noise(1, 2, 7, 16)
        run(q, k, k, *given.lists, *given.buffers, SCALE)
    return len(seen)


def test_any_number_of_kinds_is_compiled_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attend_kinds(monkeypatch) == KINDS


def test_the_raised_limits_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "LIMITS", {})
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        attend_kinds(monkeypatch)
