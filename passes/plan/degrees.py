"""degrees: the Ulysses degrees that are open to each site, as the option says.  An analysis.

    {"ulysses_degree": "auto"}                        those that fit are weighed, where a machine is described; else 1
    {"ulysses_degree": 4}                             every attention that runs over the ranks
    {"ulysses_degree": {0: 2, "layers.1*.attn": 4}}   those alone, by selectors as those of `dilate`; others 1

Contract: depends on the graph, the options and P alone.  A degree that a site cannot have is refused, with those that
it can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringpass.config import RingConfig
from ringpass.errors import OptionError
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.plan.dilated_sites import refuse_idle, selects
from ringpass.schedule.attention_time import ALLGATHER
from ringpass.schedule.dilation import AUTO
from ringpass.schedule.head_shares import allowed_degrees


def degrees(
    sites: Sequence[AttentionSite], world: int, config: RingConfig, described: bool
) -> tuple[tuple[int, ...], ...]:
    """The degrees that are weighed for each site, ascending: one, or all that "auto" may take on a described machine.

    Raises OptionError for one that does not fit P or the heads, or a selector that matches nothing.
    """
    wanted = config.ulysses_degree
    if isinstance(wanted, dict):
        refuse_idle("ulysses_degree", sites, wanted)
    return tuple(_degrees(site, _wanted(site, config), world, config, described) for site in sites)


def _degrees(site: AttentionSite, wanted: Any, world: int, config: RingConfig, described: bool) -> tuple[int, ...]:
    gathers = config.comm == ALLGATHER
    if wanted == AUTO:
        inner = config.inner_ranks or world
        allowed = [n for n in allowed_degrees(world, site.heads[0]) if inner % n == 0]
        return tuple(allowed) if described and not gathers else (1,)
    _require_allowed(site, wanted, world)
    if gathers and 1 < wanted < world:
        raise OptionError(
            f"option 'comm': 'allgather' gathers the keys of all {world} ranks, and with 'ulysses_degree' {wanted} "
            f"a rank needs those of {world // wanted}: use a degree of 1 or {world}, or comm='ring'"
        )
    return (wanted,)


def _wanted(site: AttentionSite, config: RingConfig) -> Any:
    """What the option says of a site: a degree, or "auto"."""
    wanted = config.ulysses_degree
    if not isinstance(wanted, dict):
        return wanted
    return next((degree for selector, degree in wanted.items() if selects(selector, site)), 1)


def _require_allowed(site: AttentionSite, degree: int, world: int) -> None:
    heads = site.heads[0]
    allowed = allowed_degrees(world, heads)
    if world > 1 and degree not in allowed:
        raise OptionError(
            f"option 'ulysses_degree': {degree} does not fit attention {site.index} ({site.path or site.node.name}) of "
            f"{heads} heads over {world} ranks: a degree divides the ranks and is at most the heads, here one of "
            f"{', '.join(map(str, allowed))}; a dict such as {{{site.index}: {allowed[-1]}}} sets each attention's own"
        )
