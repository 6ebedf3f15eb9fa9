r"""The grammar of the names of layouts, as graphs carry them.

    >>> check_name("zigzag cut 77,-1 along hilbert 4x5 after 3")
    >>> check_name("zigzag cut 77;-1")
    Traceback (most recent call last):
    ringpass.errors.ParseError: not the name of a layout: 'zigzag cut 77;-1'

Contract: `check_name` passes what `ringpass.layouts.layout` writes, and nothing else; whatever it passes, reading the
name takes time and memory in proportion to its length.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ringpass.errors import ParseError

MOST_CHARACTERS = 1 << 20  # a layout made for a mask or a recurrence names a rank for each chunk
INT = r"[0-9]{1,13}"
PARTS = (
    rf"(?:contiguous|zigzag|striped|chunked|replicated|chunks {INT}(?:,{INT})*)",
    rf"(?: cut -?{INT}(?:,-?{INT})*)?",
    rf"(?: in units of {INT}(?: from {INT})?)?",
    rf"(?: along hilbert {INT}(?:x{INT}){{1,2}}(?: after {INT})?)?",
    rf"(?: pooled {INT} at {INT})?",
    rf"(?: every {INT}/{INT} of {INT} of {INT})?",
    rf"(?: section {INT}:{INT} of {INT} x {INT})?",
)
"""Scheme, split points, units, order, pool, strided segments, section."""
NAME = re.compile("".join(PARTS))


@lru_cache(maxsize=1024)
def check_name(name: str) -> None:
    """Raises ParseError unless `name` is the name of a layout, of at most MOST_CHARACTERS."""
    if len(name) > MOST_CHARACTERS or not NAME.fullmatch(name):
        text = repr(name) if len(name) <= 200 else f"{name[:200]!r} .. ({len(name)} characters)"
        raise ParseError(f"not the name of a layout: {text}")
