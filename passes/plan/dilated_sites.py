"""dilated_sites: which attentions of a graph are dilated, and how.  An analysis.

    {"dilation": "longnet"}                           every attention
    {"dilation": "longnet", "dilate": [0, "layers.1*.attn"]}      those alone
    {"dilate": {0: "auto", "layers.1*.attn": Dilation((64, 128), (1, 2)), big: None}}     each its own; others are exact

A selector is an index in graph order, a path of the module that calls attention (`fnmatch` patterns), or a function of
the site.  The first that matches counts.  An attention whose queries and keys are not one sequence stays exact.

Contract: depends on the graph, the options and the functions given alone.  A selector that matches nothing is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

from ringpass.config import RingConfig
from ringpass.errors import OptionError
from ringpass.nodes import hint_of
from ringpass.passes.detect.site import AttentionSite
from ringpass.schedule.dilation import Dilation


def dilations(sites: Sequence[AttentionSite], config: RingConfig, remarks: list[str]) -> tuple[Dilation | None, ...]:
    """The dilation of each site; None: exact.  What is not dilated though asked for is added to `remarks`.

    Raises OptionError for a selector that matches nothing, or a function that raises.
    """
    if not config.dilated:
        return (None,) * len(sites)
    refuse_idle("dilate", sites, config.dilate or ())
    found = tuple(_dilation(site, config, remarks) for site in sites)
    for dilation in dict.fromkeys(found):
        if dilation and 1 not in dilation.dilation_rates:
            remarks.append(
                f"{dilation}: no rate is 1, and a query that no pattern covers attends to nothing: it gives 0"
            )
            warnings.warn(remarks[-1], stacklevel=2)
    return found


def _dilation(site: AttentionSite, config: RingConfig, remarks: list[str]) -> Dilation | None:
    chosen = [selector for selector in config.dilate or () if selects(selector, site)]
    if config.dilate is not None and not chosen:
        return None
    lengths = [hint_of(x.meta["val"].shape[-2]) for x in (site.q, site.k)]
    if lengths[0] != lengths[1]:
        remarks.append(f"{site.node.name}: {lengths[0]} queries, {lengths[1]} keys: not one sequence, not dilated")
        return None
    wanted = config.dilate[chosen[0]] if isinstance(config.dilate, dict) else config.dilation
    if wanted is None and isinstance(config.dilate, dict):
        return None
    if isinstance(wanted, str):  # its patterns are those of one length: `int` lets another one compile anew
        return config.dilation_of(wanted, int(site.q.meta["val"].shape[-2]))
    return config.dilation_of(wanted, lengths[0])


def selects(selector: int | str | Callable[[AttentionSite], bool], site: AttentionSite) -> bool:
    """Whether a selector of an option means this site."""
    if isinstance(selector, int):
        return selector == site.index
    if isinstance(selector, str):
        return fnmatch(site.path, selector)
    try:
        return bool(selector(site))
    except Exception as error:
        raise OptionError(
            f"the function {selector!r}, which selects attentions for the option 'dilate' or 'ulysses_degree', raised "
            f"{error!r} for attention {site.index} ({site.path or site.node.name}): it takes an AttentionSite, and "
            "says True or False"
        ) from error


def refuse_idle(option: str, sites: Sequence[AttentionSite], selectors: Iterable[Any]) -> None:
    """Raises OptionError for a selector that matches nothing."""
    for selector in selectors:
        if sites and not any(selects(selector, site) for site in sites):
            known = ", ".join(f"{site.index} ({site.path or site.node.name})" for site in sites)
            raise OptionError(f"option {option!r}: {selector!r} matches none of the attentions {known}")
