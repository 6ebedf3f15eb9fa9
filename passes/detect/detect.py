"""detect: captured graph -> attention sites, each with its mask as a scalar function of (b, h, q, k).

A *site* is the output of one attention call, in one of the idioms of `IDIOMS`, each of which has a file of its own:

    sdpa       a node of `aten.scaled_dot_product_attention`
    flex       the first result of the operator `flex_attention`
    softmax    the last product of an attention that the model writes out

Contract: the expressions equal mask, bias and score function for every element.  A call that cannot be read stays as
the model wrote it, and runs replicated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ringpass.masks.expr import call
from ringpass.masks.simplify import simplify
from ringpass.passes.detect import flex, sdpa, softmax
from ringpass.passes.detect.grouped_heads import unrepeated
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.failures import Failures
from ringpass.patterns import Pattern, everything

Idiom = Callable[[int, Node], AttentionSite | None]
IDIOMS: tuple[Idiom, ...] = (sdpa.read, flex.read, softmax.read)
"""(index, node) -> the site with that index whose output is `node`, or None; at most one of them reads a node."""
EVERYTHING = everything()


def detect(
    gm: GraphModule, pattern: Pattern = EVERYTHING, failures: Failures | None = None
) -> tuple[AttentionSite, ...]:
    """The sites of `gm`, in graph order; `pattern` is ANDed with the mask of each.

    A call on which reading fails is no site, and runs as the model wrote it.  Raises UnsupportedError for an attention
    call that cannot be read, OptionError for a pattern of another length.
    """
    sites: list[AttentionSite] = []
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            with (failures or Failures()).of("detect", node):
                site = _read(len(sites), node)
                sites += [_grouped(_one_sequence(site))] if site is not None else []
    return tuple(narrowed(site, pattern) for site in sites)


def _read(index: int, node: Node) -> AttentionSite | None:
    return next((site for idiom in IDIOMS if (site := idiom(index, node)) is not None), None)


def narrowed(site: AttentionSite, pattern: Pattern) -> AttentionSite:
    """`site` with its mask ANDed with `pattern`.  Raises OptionError for a pattern of another length."""
    if pattern != EVERYTHING:
        shape, keys = site.q.meta["val"].shape, site.k.meta["val"].shape[-2]
        batch, heads = {4: shape[:2], 3: (shape[0], 1)}.get(len(shape), (1, 1))
        pattern.check(batch, heads, shape[-2], keys)
    keyless = None if site.keyless is None else narrowed(site.keyless, pattern)
    return replace(site, mask=simplify(call("and", site.mask, pattern.expr)), keyless=keyless)


def _one_sequence(site: AttentionSite) -> AttentionSite:
    """The site, after telling the shape environment that keys and values are equally many."""
    torch._check(site.k.meta["val"].shape[-2] == site.v.meta["val"].shape[-2])
    return site


def _grouped(site: AttentionSite) -> AttentionSite:
    """The site with the keys and values that the model computed before it repeated their heads."""
    k, v = unrepeated(site.k, site.v)
    keyless = None if site.keyless is None else replace(site.keyless, k=k, v=v)
    return replace(site, k=k, v=v, keyless=keyless)
