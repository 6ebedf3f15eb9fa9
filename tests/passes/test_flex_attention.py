"""FlexAttention: a model's own score_mod, mask_mod and BlockMask on the ring, against dense formulas on one device.

torch refuses gradients of flex_attention on a CPU where it is called.  The ring computes them by its own tiles, so the
jobs lift that check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, create_block_mask, flex_attention

from ringpass.masks.expr import parse
from ringpass.passes.detect.detect import detect
from ringpass.passes.detect.flex import block_table
from ringpass.passes.detect.site import AttentionSite
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.pipeline_stages import captured_graph
from tests.support.process_ranks import Workers

B, H, S, D = 2, 4, 23, 4
INFINITY = float("inf")


class Attention(nn.Module):
    """FlexAttention between two projections, with `groups` key/value heads and a learned table of positions."""

    ids: Tensor

    def __init__(self, groups: int = H) -> None:
        super().__init__()
        self.groups = groups
        self.project, self.out = nn.Linear(8, (H + 2 * groups) * D), nn.Linear(H * D, 8)
        self.table = nn.Parameter(torch.randn(H, 2 * S))
        self.register_buffer("ids", torch.tensor([0] * 9 + [1] * 3 + [2] * 11))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        states = self.project(x).unflatten(-1, (-1, D)).transpose(1, 2)
        return states.split([H, self.groups, self.groups], dim=1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, case: Case, block_mask: BlockMask | None) -> Tensor:
        score_mod = case.score(self) if case.score else None
        block_mask = case.blocks(self) if case.blocks and case.inside else block_mask
        q, k, v = self.heads(x)
        out = flex_attention(q, k, v, score_mod, block_mask, case.scale, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def dense(self, x: Tensor, case: Case) -> Tensor:
        """The same by the formula, all scores at once."""
        q, k, v = self.heads(x)
        k, v = (y.repeat_interleave(H // self.groups, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) * (D**-0.5 if case.scale is None else case.scale)
        at = torch.arange(S)
        scores = case.dense(self, scores, torch.arange(H).view(H, 1, 1), at.view(S, 1), at)
        dead = (scores == -INFINITY).all(-1, keepdim=True)
        weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


Mod = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One call: its functions as FlexAttention takes them, and `dense(model, scores, h, q, k)` of full tensors."""

    dense: Callable[[Attention, Tensor, Tensor, Tensor, Tensor], Tensor]
    score: Callable[[Attention], Mod] | None = None
    blocks: Callable[[Attention], BlockMask] | None = None
    scale: float | None = None
    groups: int = H
    inside: bool = False  # the block mask is made in the compiled function


def masked(mod: Callable[[Attention], Mod], block: int = 8, **sizes: Any) -> Callable[[Attention], BlockMask]:
    """A block mask made as users make it."""

    def build(model: Attention) -> BlockMask:
        heads = {"B": None, "H": None, **sizes}
        return create_block_mask(mod(model), Q_LEN=S, KV_LEN=S, device="cpu", BLOCK_SIZE=block, **heads)

    return build


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q - k < 5


def in_document(model: Attention) -> Mod:
    return lambda b, h, q, k: (model.ids[q] == model.ids[k]) & (k <= q)


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 3 * h


def block_list(model: Attention) -> BlockMask:
    """Blocks per head: even keys of the first block (heads 0, 1) or the query's (2, 3), and all of the last."""
    rows = torch.arange(3, dtype=torch.int32).view(3, 1).expand(3, 3)
    columns = torch.stack([torch.zeros_like(rows)] * 2 + [rows] * 2)[None].contiguous()
    ones, last = torch.ones(1, H, 3, dtype=torch.int32), torch.full((1, H, 3, 3), 2, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        ones, columns, ones, last, BLOCK_SIZE=8, mask_mod=lambda b, h, q, k: k % 2 == 0, seq_lengths=(S, S)
    )


def seen(blocks: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda model, s, h, q, k: s.masked_fill(~blocks(h, q, k), -INFINITY)


def alibi(model: Attention) -> Mod:
    return lambda s, b, h, q, k: s + torch.exp2(-(h + 1) * 8.0 / H) * (k - q)


def relative_bias(model: Attention) -> Mod:
    return lambda s, b, h, q, k: s + model.table[h, q - k + S]


def soft_cap(model: Attention) -> Mod:
    return lambda s, b, h, q, k: 0.7 * torch.tanh(s / 0.7)


def learned_soft_cap(model: Attention) -> Mod:
    """Everything at once: a bound per head that is learned, on scores with a learned bias, before the mask."""

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        bound = 1 + model.table[h, 0].abs()
        return torch.where(q >= k, bound * torch.tanh((s + model.table[h, q - k]) / bound), -INFINITY)

    return mod


def dense_learned_soft_cap(model: Attention, s: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    bound = 1 + model.table[:, 0].abs().view(H, 1, 1)
    capped = bound * torch.tanh((s + model.table[h, q - k]) / bound)
    return capped.masked_fill(k > q, -INFINITY)


def clamped(model: Attention) -> Mod:
    return lambda s, b, h, q, k: s.clamp(-0.3, 0.4) * torch.sigmoid(s) ** 2 - torch.relu(s) / (1 + h)


def positive(model: Attention) -> Mod:
    """What is seen depends on the score."""
    return lambda s, b, h, q, k: torch.where(s > 0.1, s, -INFINITY)


def gamma(model: Attention) -> Mod:
    """Has no closed form: the call is replicated."""
    return lambda s, b, h, q, k: s + torch.lgamma(1 + s.abs())


def closed(model: Attention) -> Mod:
    """Rows 3 and 4 see nothing."""
    return lambda s, b, h, q, k: torch.where((q < 3) | (q > 4), s, -INFINITY)


def filled(model: Attention) -> Mod:
    """Rows of document 1 see no key: they see all keys alike."""
    least = torch.finfo(torch.float64).min
    return lambda s, b, h, q, k: torch.where((model.ids[q] != 1) & (k <= q), s, least)


def filled_learned(model: Attention) -> Mod:
    """A learned bias, whose gradient goes through rows of fills too."""
    return lambda s, b, h, q, k: s + model.table[h, q - k + S] + torch.where(model.ids[k] == 0, -1e9, 0.0)


def dense_filled(model: Attention, s: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s.masked_fill(~((model.ids.view(S, 1) != 1) & (k <= q)), torch.finfo(torch.float64).min)


def dense_filled_learned(model: Attention, s: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    scores = s + model.table[h, q - k + S] + torch.where(model.ids == 0, -1e9, 0.0)
    return scores.masked_fill(k > q, -INFINITY)


CASES = {
    "no block mask": Case(lambda model, s, h, q, k: s),
    "causal": Case(seen(lambda h, q, k: k <= q), blocks=masked(lambda model: causal)),
    "one block": Case(seen(lambda h, q, k: k <= q), blocks=masked(lambda model: causal, block=32), scale=0.3),
    "made inside": Case(seen(lambda h, q, k: k <= q), blocks=masked(lambda model: causal), inside=True),
    "window": Case(seen(lambda h, q, k: (k <= q) & (q - k < 5)), blocks=masked(lambda model: and_masks(causal, near))),
    "documents": Case(
        lambda model, s, h, q, k: s.masked_fill((model.ids[q] != model.ids[k]) | (k > q), -INFINITY),
        blocks=masked(in_document),
    ),
    "by head": Case(seen(lambda h, q, k: (q - k).abs() <= 3 * h), blocks=masked(lambda model: by_head, H=H)),
    "block list": Case(
        seen(lambda h, q, k: (k % 2 == 0) & (k // 8 == torch.where(h < 2, 0, q // 8)) | (k >= 16)),
        blocks=block_list,
    ),
    "alibi": Case(
        lambda model, s, h, q, k: (s + 2.0 ** (-2.0 * (h + 1)) * (k - q)).masked_fill(k > q, -INFINITY),
        score=alibi, blocks=masked(lambda model: causal), groups=1,
    ),
    "relative bias": Case(lambda model, s, h, q, k: s + model.table[h, q - k + S], score=relative_bias),
    "soft cap": Case(
        lambda model, s, h, q, k: (0.7 * torch.tanh(s / 0.7)).masked_fill(k > q, -INFINITY),
        score=soft_cap, blocks=masked(lambda model: causal), groups=2,
    ),
    "learned soft cap": Case(dense_learned_soft_cap, score=learned_soft_cap, groups=2),
    "clamped": Case(
        lambda model, s, h, q, k: s.clamp(-0.3, 0.4) * torch.sigmoid(s).square() - s.relu() / (1 + h), score=clamped
    ),
    "positive": Case(lambda model, s, h, q, k: s.masked_fill(s <= 0.1, -INFINITY), score=positive),
    "not read": Case(lambda model, s, h, q, k: s + torch.lgamma(1 + s.abs()), score=gamma),
    "filled": Case(dense_filled, score=filled, groups=2),
    "filled, learned": Case(dense_filled_learned, score=filled_learned, blocks=masked(lambda model: causal)),
    "closed rows": Case(seen(lambda h, q, k: (q < 3) | (q > 4)), score=closed),
}  # fmt: skip


def errors(group: dist.ProcessGroup, name: str, **options: Any) -> dict[str, float]:
    """Errors of the output, the gradient of the input, and that of each parameter."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    case = CASES[name]
    model = Attention(case.groups).double()
    x = torch.randn(B, S, 8, dtype=torch.float64)
    blocks = case.blocks(model) if case.blocks and not case.inside else None
    with mock.patch.object(flex, "_validate_device", lambda *tensors: None):
        run = compiled(model, group, **{"tile": 8, "unroll_limit": 0, **options})
        got = step(model, lambda y: run(y, case, blocks), x)
    want = step(model, lambda y: model.dense(y, case), x)
    assert got.keys() == want.keys(), (got.keys(), want.keys())
    return {key: relative(got[key], want[key]) for key in want}


def step(model: Attention, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    (out * torch.linspace(-1, 1, S, dtype=out.dtype).view(1, S, 1)).square().sum().backward()
    assert x.grad is not None
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


def all_errors(group: dist.ProcessGroup, names: tuple[str, ...], **options: Any) -> dict[str, dict[str, float]]:
    return {name: errors(group, name, **options) for name in names}


def check(workers: Workers, ranks: int, names: tuple[str, ...], **options: Any) -> None:
    for found in workers.run(all_errors, ranks, names, **options):
        for name, each in found.items():
            assert max(each.values()) < 1e-10, (name, each)


ON_RANKS = {
    1: ("causal", "soft cap"),
    2: ("no block mask", "one block", "made inside", "clamped", "positive", "not read", "closed rows"),
    3: ("documents", "block list", "relative bias", "learned soft cap", "filled", "filled, learned"),
    5: ("window", "by head", "alibi"),
}
assert CASES.keys() == {name for names in ON_RANKS.values() for name in names}


@pytest.mark.parametrize("ranks", (slow(1), slow(2), 3, slow(5)))
def test_parity_with_the_dense_formula(workers: Workers, ranks: int) -> None:
    check(workers, ranks, ON_RANKS[ranks])


class Gated(nn.Module):
    """Keys fade by gates of their own tokens: what score_mod captures is an activation, which ranks hold in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.gate = nn.Linear(8, H * D), nn.Linear(8, H)

    def forward(self, x: Tensor, dense: bool = False) -> Tensor:
        q = self.project(x).unflatten(-1, (H, D)).transpose(1, 2)
        gates = torch.sigmoid(self.gate(x)).transpose(1, 2)
        if dense:
            at = torch.arange(S)
            scores = q @ q.transpose(-1, -2) * D**-0.5 + gates[:, :, None] * (at - at[:, None])
            out: Tensor = scores.masked_fill(at > at[:, None], -INFINITY).softmax(-1) @ q
            return out
        return flex_attention(
            q, q, q, lambda s, b, h, q, k: torch.where(k <= q, s + gates[b, h, k] * (k - q), -INFINITY)
        )


def gated(group: dist.ProcessGroup) -> list[float]:
    """Errors of the output and of each gradient of a gated model."""
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(B, S, 8, dtype=torch.float64)
    with mock.patch.object(flex, "_validate_device", lambda *tensors: None):
        outs = [compiled(model, group, unroll_limit=0)(x), model(x, dense=True)]
    got, want = ([out, *torch.autograd.grad(out.square().sum(), [*model.parameters()])] for out in outs)
    return [relative(a, b) for a, b in zip(got, want, strict=True)]


def test_parity_of_a_score_mod_that_captures_an_activation(workers: Workers) -> None:
    for found in workers.run(gated, 3):
        assert max(found) < 1e-10, found


@pytest.mark.slow
def test_parity_when_compiled_by_inductor(workers: Workers) -> None:
    check(workers, 2, ("learned soft cap",), compiler="inductor", unroll_limit=128)


# --- what detect reads ------------------------------------------------------------------------------------------------

BLOCK = "0, 0, q // 8, k // 8"
READ = {
    "no block mask": ("True", None, None),
    "causal": (f"k <= q & x0[{BLOCK}] | x1[{BLOCK}]", None, None),
    "one block": ("k <= q", None, None),
    "documents": (f"k <= q & x1[{BLOCK}] & x0[q] == x0[k] | x2[{BLOCK}]", None, None),
    "by head": ("x0[0, h, q // 8, k // 8] & abs(q - k) <= 3 * h | x1[0, h, q // 8, k // 8]", None, None),
    "relative bias": ("True", "x0[h, q - k + 23]", None),
    "learned soft cap": (
        "k <= q", None, "(abs(x0[h, 0]) + 1) * tanh((score + x0[h, q - k]) / (abs(x0[h, 0]) + 1))",
    ),
    "closed rows": ("q < 3 | q >= 5", None, None),
}  # fmt: skip


def sites(f: Callable[..., Any], *args: Any) -> tuple[AttentionSite, ...]:
    found: list[AttentionSite] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(detect(captured_graph(gm, example_inputs).gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, fullgraph=True)(*args)
    return tuple(found)


def site_of(name: str, dtype: torch.dtype = torch.float64) -> AttentionSite:
    case = CASES[name]
    model = Attention(case.groups).to(dtype)
    (site,) = sites(model, torch.randn(B, S, 8, dtype=dtype), case, case.blocks(model) if case.blocks else None)
    return site


@pytest.mark.parametrize("name", READ)
def test_what_a_call_does_to_its_scores(name: str) -> None:
    site = site_of(name)
    found = (site.mask, site.bias, site.score)
    assert tuple(x and str(x) for x in found) == READ[name] and not site.unsupported
    assert all(parse(str(x)) == x for x in found if x is not None)


def test_kernels_that_would_round_a_bias_do_not_get_it() -> None:
    site = site_of("relative bias", torch.bfloat16)
    assert site.bias is None and str(site.score) == "score + x0[h, q - k + 23]"


def test_a_call_that_is_not_read_says_why() -> None:
    assert "not elementwise, or uses ops that are not known: aten.lgamma.default" in site_of("not read").unsupported
    q = torch.randn(B, H, S, D)
    (site,) = sites(lambda q: flex_attention(q, q, q, return_aux=AuxRequest(lse=True)), q)
    assert site.unsupported == "its log-sum-exp is read"


def test_autocast_casts_what_a_call_attends_with() -> None:
    q = torch.randn(B, H, S, D)
    with torch.autocast("cpu", torch.bfloat16):
        (site,) = sites(lambda q: flex_attention(q, q, q), q)
    assert site.q.meta["val"].dtype == site.node.meta["val"].dtype == torch.bfloat16


def test_block_table() -> None:
    counts, columns = torch.tensor([[[1, 2, 0]]]), torch.tensor([[[[2, 0, 1], [1, 0, 2], [0, 1, 2]]]])
    wanted = [[False, False, True], [True, True, False], [False, False, False]]
    assert block_table(counts, columns, 3).tolist() == [[wanted]]
