"""The mask that `detect` finds of a function's attention, beside the mask that the function computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import parse
from ringpass.masks.intervals import classify
from ringpass.passes.detect.detect import detect
from ringpass.passes.detect.site import AttentionSite
from tests.support.pipeline_stages import captured_graph

B, H, S, K, D = 2, 3, 7, 9, 4


@dataclass(frozen=True)
class Seen:
    """A site, the values of its leaves, and that of its mask where it has one."""

    site: AttentionSite
    leaves: list[Tensor]
    mask: Tensor | None


class Recorder(fx.Interpreter):
    """Runs a captured graph and keeps the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, kept: set[fx.Node]) -> None:
        super().__init__(gm)
        self.kept, self.values = kept, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.kept:
            self.values[n] = value
        return value


def mask_node(site: AttentionSite) -> fx.Node | None:
    given = [*site.node.args, None, None, None, None][3]
    node = site.node.kwargs.get("attn_mask", given)
    return node if isinstance(node, fx.Node) else None


def watch(f: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Seen]:
    """The sites of `f`, compiled and run."""
    seen: list[Seen] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = captured_graph(gm, example_inputs).gm
        sites = detect(captured)
        kept = {n for site in sites for n in (*site.leaves, mask_node(site)) if n is not None}

        def run(*inputs: Any) -> Any:
            recorder = Recorder(captured, kept)
            out = recorder.run(*inputs)
            for site in sites:
                node = mask_node(site)
                mask = recorder.values[node] if node is not None else None
                seen.append(Seen(site, [recorder.values[leaf] for leaf in site.leaves], mask))
            return out

        return run

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True)(*args, **kwargs)
    return seen


def additive(seen: Seen, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """The tile's mask and bias as one tensor that is added to scores, (B, H, q, k)."""
    positions = {
        "b": torch.arange(B).view(-1, 1, 1, 1),
        "h": torch.arange(H).view(1, -1, 1, 1),
        "q": torch.arange(*queries).view(1, 1, -1, 1),
        "k": torch.arange(*keys).view(1, 1, 1, -1),
    }
    allowed = evaluate(parse(str(seen.site.mask)), positions, seen.leaves)
    assert allowed.dtype == torch.bool
    bias = torch.zeros((), dtype=torch.float64)
    if seen.site.bias is not None:
        bias = evaluate(parse(str(seen.site.bias)), positions, seen.leaves).double()
    out = torch.where(allowed, bias, -torch.inf)
    return out.expand(B, H, queries[1] - queries[0], keys[1] - keys[0])


TILES = [((0, S), (0, K)), ((0, 3), (0, 4)), ((2, 6), (5, 9)), ((3, 4), (1, 8)), ((6, 7), (8, 9))]


def assert_same(seen: Seen, mask: Tensor, keys: int) -> None:
    nothing = torch.zeros(mask.shape, dtype=torch.float64)
    whole = nothing.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.double()
    if str(seen.site.mask) != "True" and mask.is_floating_point():  # beside a visible key a huge number is no key
        whole = whole.masked_fill(mask < -1e8, -torch.inf)
    whole = whole.expand(B, H, S, keys)
    for q, k in TILES:
        k = min(k[0], keys - 1), min(k[1], keys)
        tile = additive(seen, q, k)  # rounded to the mask's dtype, as kernels do
        tile = tile if mask.dtype == torch.bool else tile.to(mask.dtype).double()
        assert torch.equal(tile, whole[:, :, slice(*q), slice(*k)]), (str(seen.site.mask), q, k)
        kind = classify(seen.site.mask, q, k)
        if kind != "partial" and seen.site.bias is None:
            assert (tile == (0.0 if kind == "full" else -torch.inf)).all()
