"""Counter-based dropout: the keep bit of an element depends on (seed, stream, global index) alone, for any P.

    >>> import torch
    >>> whole = keep(torch.tensor(7), 0, 0.25, [torch.arange(2), torch.arange(6)])
    >>> part = keep(torch.tensor(7), 0, 0.25, [torch.arange(2), torch.arange(4, 6)])
    >>> torch.equal(whole[:, 4:], part)
    True

All indices but the last are hashed to two 32-bit words per row (64 bits, so that no two of 2^20 rows share a mask), in
int64 arithmetic that never overflows; the last index is combined with them in int32, whose products wrap.  The rounds
are those of the xor-shift-multiply hashes in C. Wellons, "Prospecting for hash functions" (lowbias32, triple32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in int64; each product stays under 2^63."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x31848BAB) & WORD
    return x ^ (x >> 16)


def _signed(x: Tensor) -> Tensor:
    """32-bit words as int32 with the same bits."""
    return torch.where(x > 0x7FFFFFFF, x - (WORD + 1), x).to(torch.int32)


def _hash(seed: Tensor, salt: int, indices: Sequence[Tensor]) -> Tensor:
    word = _mix((seed & WORD) ^ (salt & WORD))
    word = _mix(word ^ ((seed >> 32) & WORD))
    for index in indices:
        word = _mix(word ^ _mix((index + 0x5BD1E995) & WORD))
    return word


def keep(seed: Tensor, stream: int, p: float, indices: Sequence[Tensor]) -> Tensor:
    """True where an element stays: a bool tensor with one dim per entry of `indices`.

    `seed` is an int64 scalar tensor, drawn once per step; `stream` identifies a dropout of the model; `indices` are
    the global indices along each dim, 1-D int64.  Each element stays with probability 1 - p, to within 2^-32.
    """
    rank = len(indices)
    shaped = [index.reshape((-1,) + (1,) * (rank - 1 - dim)) for dim, index in enumerate(indices)]
    low = _signed(_hash(seed, 2 * stream, shaped[:-1]))
    high = _signed(_hash(seed, 2 * stream + 1, shaped[:-1]))
    column = _signed(_mix((shaped[-1] + 0x3C6EF372) & WORD))
    x = (low ^ column) * 0x31848BAB
    x = (x ^ (x >> 15)) + high
    x = x * 0x7FEB352D
    x = x ^ (x >> 16)
    x = x * 0x2C1B3C6D
    limit = round(p * 2**32) - 2**31
    return x >= limit if limit < 2**31 else x != x  # no int32 is that large, and the comparison would wrap
