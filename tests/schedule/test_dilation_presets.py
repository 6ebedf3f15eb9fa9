"""Dilations by name: the published lists, and what the compiler says of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ringpass.reference import attention
from ringpass.schedule.dilation import PRESETS, Dilation, preset

RATES = (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    "tokens, lengths",
    [
        (32**2, (64, 128, 256, 512, 1024)),
        (128**2, (1024, 2048, 4096, 8192, 16384)),
        (256**2, (1024, 4096, 8192, 16384, 65536)),
        (512**2, (1024, 4096, 16384, 65536, 262144)),
        (1024**2, (1024, 4096, 32768, 262144, 1048576)),
        (1024**2 + 1, (1024, 4096, 32768, 262144, 1048576)),
    ],
)
def test_longvit_has_a_list_for_each_image_size(tokens: int, lengths: tuple[int, ...]) -> None:
    assert PRESETS["longvit"](tokens) == (lengths, RATES)


def test_gigapath_spaces_its_lengths_evenly() -> None:
    """The list that its notebook prints, also with the CLS token; another one for shorter sequences."""
    assert PRESETS["gigapath"](2**20 + 1) == ((1024, 5792, 32768, 185363, 1048576), RATES)
    assert PRESETS["gigapath"](5_000) == ((1024, 1448, 2048, 2896, 4096), RATES)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("tokens", [1, 64, 3000, 40_000, 3_000_000])
def test_every_length_has_patterns_that_cover_every_token(name: str, tokens: int) -> None:
    dilation = preset(name, tokens)
    assert dilation.dilation_rates[0] == 1 and dilation.share(tokens) > 0
    assert list(dilation.segment_lengths) == sorted(dilation.segment_lengths)
    assert all(w < tokens for w in dilation.segment_lengths[:-1])


class Twice(nn.Module):
    """Two attentions, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = scaled_dot_product_attention(x, x, x, is_causal=True)
        return x


def test_the_compiler_says_what_a_preset_attends_to(caplog: pytest.LogCaptureFixture) -> None:
    """One line for all attentions that are dilated alike, and one for those that are not."""
    torch._dynamo.reset()
    caplog.set_level(logging.WARNING, logger="ringpass")
    options: dict[str, Any] = {"dilate": {0: "longvit", 1: Dilation((96,), (1,))}, "compiler": "aot_eager"}
    torch.compile(Twice(), backend="ring_dilated", options=options)(torch.randn(1, 2, 96, 4))
    assert [record.message for record in caplog.records if record.name == "ringpass"] == [
        "attention 0 (scaled_dot_product_attention) dilated by 64/1+128/2 mod: every token of each 64; every 2nd token "
        "of each 128; head offsets by mod; about 0.9167 of all pairs of 96 tokens",
        "attention 1 (scaled_dot_product_attention_1) dilated by 96/1 mod: every token of each 96; head offsets by "
        "mod; about 1 of all pairs of 96 tokens",
    ]
    torch._dynamo.reset()
    caplog.clear()
    alike: dict[str, Any] = {"dilation": "longnet", "compiler": "aot_eager"}
    torch.compile(Twice(), backend="ring_dilated", options=alike)(torch.randn(1, 2, 96, 4))
    said = [record.message for record in caplog.records if record.name == "ringpass"]
    assert len(said) == 1
    assert said[0].startswith(
        "attention 0 (scaled_dot_product_attention), 1 (scaled_dot_product_attention_1) dilated by"
    )


def test_another_length_has_patterns_of_its_own() -> None:
    """Also where Dynamo compiles for any length."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"dilation": "auto", "compiler": "aot_eager"}
    run: Any = torch.compile(Twice(), backend="ring_dilated", options=options, dynamic=True)
    for tokens in (24, 40, 96):
        x = torch.randn(1, 2, tokens, 4, dtype=torch.float64)
        wanted = x
        for _ in range(2):
            wanted = attention(wanted, wanted, wanted, preset("auto", tokens), causal=True)
        torch.testing.assert_close(run(x), wanted, rtol=0, atol=1e-12)
