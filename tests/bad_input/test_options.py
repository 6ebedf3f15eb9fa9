"""Every wrong option ends in an OptionError that says what was expected, what came and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from ringpass import RingConfig
from ringpass.backend import ring_dilated
from ringpass.errors import OptionError
from tests.bad_input.options import ACCEPTED, CALLS, OPTIONS, value_of
from tests.support.models import MODELS, batch_for
from tests.support.pipeline_stages import fake_ring

LONGEST_LINE = 100


@pytest.mark.parametrize("text", OPTIONS)
def test_wrong_options(text: str) -> None:
    options = value_of(f"dict({text})")
    with pytest.raises(OptionError, match=OPTIONS[text]):
        RingConfig.from_options(options)


@pytest.mark.parametrize("text", CALLS)
def test_wrong_values(text: str) -> None:
    with pytest.raises(OptionError, match=CALLS[text]):
        value_of(text)


@pytest.mark.parametrize("text", ACCEPTED)
def test_odd_values_that_are_right(text: str) -> None:
    assert value_of(text) == value_of(ACCEPTED[text])


@pytest.mark.parametrize(
    ("mode", "said"), [("max-autotun", "did you mean 'max-autotune'"), (3, "one of 'default'.* got 3")]
)
def test_unknown_mode(mode: Any, said: str) -> None:
    with pytest.raises(OptionError, match=f"option 'mode' must be .*{said}"):
        ring_dilated(torch.fx.symbolic_trace(torch.nn.Identity()), [], mode=mode)


def compiled_with(**options: Any) -> Any:
    """A model compiled as rank 0 of 2 with these options."""
    torch._dynamo.reset()
    settings = {"compiler": "aot_eager", **options}
    with fake_ring(0, 2):
        return torch.compile(MODELS["nanogpt"].make(), backend="ring_dilated", options=settings)(
            **batch_for("nanogpt", 23)
        )


@pytest.mark.parametrize("under", ["a_file", "a_file/inside", "x" * 300])
def test_dump_that_cannot_be_made(tmp_path: Path, under: str) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(BackendCompilerFailed, match="option 'dump' .* a directory that can be made and written"):
        compiled_with(dump=tmp_path / under)


def selects_by_error(site: Any) -> bool:
    """A selector with a mistake."""
    raise KeyError("layer")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dilation": "longnet", "dilate": [selects_by_error]}, r"selects_by_error.* raised KeyError\('layer'\)"),
        ({"ulysses_degree": {selects_by_error: 2}}, r"selects_by_error.* raised KeyError\('layer'\)"),
        ({"dilation": "longnet", "dilate": [7]}, "7 matches none of the attentions 0"),
        ({"dilation": "longnet", "dilate": ["layer.*"]}, r"'layer.\*' matches none of the attentions"),
        ({"ulysses_degree": 2**70}, "does not fit attention 0"),
        ({"hilbert": (2**40, 2**40)}, "hilbert"),
        ({"hilbert": (4, 4), "hilbert_prefix": 2**70}, "hilbert"),
    ],
)
def test_options_that_fit_no_attention(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=said) as caught:
        compiled_with(**options)
    assert isinstance(caught.value.inner_exception, ValueError)
