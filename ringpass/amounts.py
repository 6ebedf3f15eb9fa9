"""Bytes and seconds as people read them, alike in plans, reports and pages."""


def size(count: float) -> str:
    """Bytes for people, in units of 10^9, 10^6 or 10^3.

    >>> size(80 * 10**9), size(1_500_000), size(12)
    ('80 GB', '1.5 MB', '12 B')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def milliseconds(seconds: float) -> str:
    """To three digits."""
    return f"{1e3 * seconds:.3g}"
