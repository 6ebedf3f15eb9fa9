"""degrees: the Ulysses degree of each site, as the option says.  An analysis.

    {"ulysses_degree": 4}                             every attention that runs over the ranks
    {"ulysses_degree": {0: 2, "layers.1*.attn": 4}}   those alone, by selectors as those of `dilate`; others 1

Contract: depends on the graph, the options and P alone.  A degree that a site cannot have is refused, with those that
it can have.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringpass.config import RingConfig
from ringpass.errors import OptionError
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.plan.dilated_sites import refuse_idle, selects
from ringpass.schedule.head_shares import allowed_degrees


def degrees(sites: Sequence[AttentionSite], world: int, config: RingConfig) -> tuple[int, ...]:
    """The degree of each site.

    Raises OptionError for one that does not fit P or the heads, or a selector that matches nothing.
    """
    wanted = config.ulysses_degree
    if isinstance(wanted, dict):
        refuse_idle("ulysses_degree", sites, wanted)
    found = tuple(_degree(site, config) for site in sites)
    for site, degree in zip(sites, found, strict=True):
        _require_allowed(site, degree, world)
        if config.comm == "allgather" and 1 < degree < world:
            raise OptionError(
                f"option 'comm': 'allgather' gathers the keys of all {world} ranks, and with 'ulysses_degree' {degree} "
                f"a rank needs those of {world // degree}: use a degree of 1 or {world}, or comm='ring'"
            )
    return found


def _degree(site: AttentionSite, config: RingConfig) -> int:
    wanted = config.ulysses_degree
    if isinstance(wanted, dict):
        wanted = next((degree for selector, degree in wanted.items() if selects(selector, site)), 1)
    return int(wanted)


def _require_allowed(site: AttentionSite, degree: int, world: int) -> None:
    heads = site.heads[0]
    allowed = allowed_degrees(world, heads)
    if world > 1 and degree not in allowed:
        raise OptionError(
            f"option 'ulysses_degree': {degree} does not fit attention {site.index} ({site.path or site.node.name}) of "
            f"{heads} heads over {world} ranks: a degree divides the ranks and is at most the heads, here one of "
            f"{', '.join(map(str, allowed))}; a dict such as {{{site.index}: {allowed[-1]}}} sets each attention's own"
        )
