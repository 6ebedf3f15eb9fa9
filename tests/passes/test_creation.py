"""Tensors made of a size, beside attentions on several sequences, on thread ranks: nothing is gathered for a dtype."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.support.sharded_ops import B, Case, D, check_attentions

TEXT, PICTURE = 11, 25  # tokens


def attend(x: Tensor) -> Tensor:
    """Attention of one head, and a norm."""
    y = F.scaled_dot_product_attention(x[:, None], x[:, None].sin(), x[:, None])[:, 0]
    return F.rms_norm(x + y, (D,), eps=1.0)


def joined(text: Tensor, picture: Tensor) -> Tensor:
    """A text and a picture, each after an attention of its own, written into zeros that are made from the picture."""
    text, picture = attend(text), attend(picture)
    both = picture.new_zeros(B, TEXT + PICTURE, D)
    both[:, :TEXT] = text
    both[:, TEXT:] = picture
    return attend(both)


@pytest.mark.parametrize("world", (2, 3))
def test_zeros_of_another_sequence(world: int) -> None:
    case = Case("new_zeros.default", joined, ((B, TEXT, D), (B, PICTURE, D)))
    assert check_attentions(case, "zigzag", world) == []
