"""How does one attention layer's step compare with other ways to divide its sequence?

    pip install ring-attention-pytorch ring-flash-attn yunchang      # all optional: without one, its rows say so
    python -m benchmarks.alternatives --ranks 2 --lengths 2048 8192

Forward alone, and forward with backward, one thread per rank. The layer scales q, k and v by learned weights, attends,
and takes the mean square; weight gradients and the loss are summed over the ranks. ringpass gets the module as it is
and full inputs, through torch.compile; the others get local tokens. `plain ulysses` and `yunchang` are also compared
with ringpass's own Ulysses. Alternatives:

    ringpass            backend="ring_dilated": zigzag where causal, contiguous where not
    ringpass allgather  the same with options={"comm": "allgather"}: K and V of all ranks first, then attention
    ringpass ulysses    the same with options={"ulysses_degree": P}: heads over the ranks, two all-to-alls
    plain ulysses       written by hand: torch's differentiable all-to-all before and after torch's attention
    yunchang            the package's UlyssesAttention over torch's attention
    context_parallel    torch.distributed.tensor.experimental: on CPU it has neither a causal mask nor a backward
    ring-attention-pytorch    the package's own kernels, in torch operators
    ring-flash-attn     the package's rings over the CPU kernel that ringpass uses (its own needs CUDA)
    one rank            Inductor, on rank 0 alone

Each alternative must first agree with one rank, loss and gradients; one that does not is listed with its error, not
timed.  Seen so: the gradients of ring-attention-pytorch 0.5.20 on CPU (it unpacks (received, sent) as (dK, dV)), and
those of ring-flash-attn 0.1.8 in float32 (its `buffer.to(torch.float32)` is then the buffer itself, which is used
again): `--dtype bfloat16` compares it.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.paired import Alone, Case, Step, arguments, collect, conclude, interleaved, on_ranks, screen, spread

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
WIDTH = 64
QUICK = {"lengths": [64], "masks": ["causal"], "rounds": 2, "heads": 2, "compiler": "aot_eager"}
OWN_ULYSSES = "ringpass ulysses"
ULYSSES = ("plain ulysses", "yunchang")
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables and the verdict, write the JSON."""
    args = _arguments(argv)
    contestants = 9
    total = len(args.lengths) * len(args.masks) * 2 * contestants * (args.rounds + 1)
    cases = collect(screen(), "alternatives", total, on_ranks(args.ranks, job, args))
    conclude(screen(), "alternatives", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: each length, mask and direction, all alternatives in one run."""
    for length in args.lengths:
        for causal in (mask == "causal" for mask in args.masks):
            for training in (False, True):
                torch._dynamo.reset()
                case = Case({"length": length, "causal": causal, "training": training, "ranks": args.ranks})
                found, skipped = _agreeing(candidates(length, causal, training, args), TOLERANCE[args.dtype])
                steps: dict[str, Step | Alone] = {name: step for name, step in found.items()}
                steps["one rank"] = Alone(found["one rank"])
                where = f"S = {length}, {'causal' if causal else 'full'}, {'training' if training else 'forward'}, "
                case.seconds = yield from interleaved(steps, args.rounds, where)
                for name in steps:
                    case.ratios[name] = _over(case.seconds[name], case.seconds["ringpass"])
                    if name in ULYSSES and OWN_ULYSSES in steps:
                        ratios = _over(case.seconds[name], case.seconds[OWN_ULYSSES])
                        case.ratios[f"{name} over {OWN_ULYSSES}"] = ratios
                case.facts["skipped"] = skipped
                yield case


def _over(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def _agreeing(steps: dict[str, Callable[[], Step]], tolerance: float) -> tuple[dict[str, Step], dict[str, str]]:
    """(steps that agree with one rank, why each other one does not run), alike on all ranks."""
    found: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    expected: list[Tensor] = []
    for name, make in steps.items():
        reason = ""
        try:
            step = make()
            values: Any = step()
            expected = expected or values
            worst = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, expected[: len(values)], strict=True)
            )
            if not worst <= tolerance:
                reason = f"differs from one rank by {worst:.1e}"
        except ModuleNotFoundError as error:
            reason = f"no module {error.name!r}: pip install {name}"
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split(chr(10))[:2])}"
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        if any(reasons):
            skipped[name] = next(filter(None, reasons))
        else:
            found[name] = step
    assert "one rank" in found and "ringpass" in found, skipped
    return found, skipped


# --- the layer --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One learned scale per head and channel of q, k, v; attention; mean square over `count` elements."""

    def __init__(self, heads: int, causal: bool, attend: Attend, count: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.linspace(0.5, 1.5, 3 * heads * WIDTH).view(3, 1, heads, 1, WIDTH))
        self.causal, self.attend, self.count = causal, attend, count

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scales = self.scales.to(q.dtype)
        out = self.attend(q * scales[0], k * scales[1], v * scales[2], self.causal)
        return out.float().square().sum() / self.count


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def candidates(length: int, causal: bool, training: bool, args: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    """How to make each alternative's step, which returns [loss] or [loss, gradients]; one rank first."""
    from ringpass.layouts.layout import Layout

    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(length)
    dtype = getattr(torch, args.dtype)
    full = [torch.randn(1, args.heads, length, WIDTH, generator=generator).to(dtype) for _ in range(3)]

    def local(layout: str) -> list[Tensor]:
        """This rank's tokens."""
        if layout == "striped":
            return [x[:, :, rank::world].contiguous() for x in full]
        spans = Layout(layout, world).ranges(rank, length)
        return [torch.cat([x[:, :, a:b] for a, b in spans], dim=2) for x in full]

    def compiled(**how: Any) -> Callable[[], Step]:
        return lambda: _step(torch.compile(layer(sdpa), dynamic=False, **how), full, training, summed=False)

    def layer(attend: Attend) -> Layer:
        return Layer(args.heads, causal, attend, full[0].numel())

    def eager(attend: Callable[[], Attend], layout: str) -> Callable[[], Step]:
        return lambda: _step(layer(attend()), local(layout), training, summed=True)

    options = {"layout": "zigzag" if causal else "contiguous", "compiler": args.compiler}
    return {
        "one rank": compiled(backend=args.compiler),
        "ringpass": compiled(backend="ring_dilated", options=options),
        "ringpass allgather": compiled(backend="ring_dilated", options=options | {"comm": "allgather"}),
        OWN_ULYSSES: compiled(backend="ring_dilated", options=options | {"ulysses_degree": world}),
        "plain ulysses": eager(plain_ulysses, "contiguous"),
        "yunchang": eager(yunchang, "contiguous"),
        "context_parallel": eager(context_parallel, "contiguous"),
        "ring-attention-pytorch": eager(ring_attention_pytorch, "striped" if causal else "contiguous"),
        "ring-flash-attn": eager(ring_flash_attn, "zigzag" if causal else "contiguous"),
    }


def _step(run: Any, inputs: Sequence[Tensor], training: bool, summed: bool) -> Step:
    """`summed`: loss and gradients are of this rank's tokens, and are summed here."""

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            loss = run(*inputs)
        values = [loss, *(torch.autograd.grad(loss, list(run.parameters())) if training else ())]
        values = [x.detach() for x in values]
        for x in values if summed else ():
            dist.all_reduce(x)
        return values

    return step


# --- the others -------------------------------------------------------------------------------------------------------


def context_parallel() -> Attend:
    """torch's own, around the attention alone; the tokens are divided already, so it divides a few zeros."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import experimental

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        zeros = torch.zeros(2 * dist.get_world_size())
        with experimental.context_parallel(mesh, buffers=[zeros], buffer_seq_dims=[0], no_restore_buffers={zeros}):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def plain_ulysses(group: dist.ProcessGroup | None = None) -> Attend:
    """Heads to ranks and tokens together by an all-to-all of each of q, k and v, and back for the output."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    group = group or dist.group.WORLD
    assert group is not None
    world = group.size()

    def exchanged(parts: Tensor) -> Tensor:
        """Part r of each rank to rank r."""
        found: Tensor = all_to_all_single_autograd(parts.contiguous(), [1] * world, [1] * world, group)
        return found

    def pooled(x: Tensor) -> Tensor:
        """(1, H, L, D) to (1, H / P, S, D)."""
        return exchanged(x.unflatten(1, (world, -1)).permute(1, 0, 2, 3, 4)).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def returned(x: Tensor) -> Tensor:
        return exchanged(x.unflatten(2, (world, -1)).permute(2, 0, 1, 3, 4)).permute(1, 0, 2, 3, 4).flatten(1, 2)

    return lambda q, k, v, causal: returned(sdpa(pooled(q), pooled(k), pooled(v), causal))


def yunchang() -> Attend:
    """The package's Ulysses over torch's attention: its own kernels need CUDA."""
    package: Any = importlib.import_module("yunchang")
    kernels: Any = importlib.import_module("yunchang.kernels")
    attention = package.UlyssesAttention(dist.group.WORLD, attn_type=kernels.AttnType.TORCH_MATH)

    def local(q: Tensor, k: Tensor, v: Tensor, *_: Any, causal: bool, **__: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa(q, k, v, causal).transpose(1, 2)

    attention.attn_fn = local

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out: Tensor = attention(q, k, v, causal=causal)
        return out.transpose(1, 2)

    return attend


def ring_attention_pytorch() -> Attend:
    """lucidrains' ring attention in torch operators; causal: striped order."""
    attention: Any = importlib.import_module("ring_attention_pytorch").ring_flash_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        settings = {"causal": causal, "striped_ring_attn": causal, "ring_size": dist.get_world_size()}
        out: Tensor = attention(q, k, v, ring_reduce_col=True, bucket_size=512, **settings)
        return out.transpose(1, 2)

    return attend


def ring_flash_attn() -> Attend:
    """zhuzilin's ring over torch's CPU kernel; causal: zigzag order."""
    from benchmarks.flash_attn_cpu import installed

    with installed():
        package: Any = importlib.import_module("ring_flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        attention = package.zigzag_ring_flash_attn_func if causal else package.ring_flash_attn_func
        out: Tensor = attention(q, k, v, causal=causal)
        return out.transpose(1, 2)

    return attend


# --- what is shown ----------------------------------------------------------------------------------------------------


def _what(case: Case) -> str:
    mask = "causal" if case.case["causal"] else "full"
    return f"{mask}, {'forward + backward' if case.case['training'] else 'forward'}"


def _table(cases: Sequence[Case]) -> Table:
    columns = "S", "", "alternative", "s", "time over ringpass's", "over its Ulysses's"
    table = Table(*columns, title="one attention layer, median (min-max)")
    for case in cases:
        start = str(case.case["length"]), _what(case)
        for name in case.seconds:
            own = case.ratios.get(f"{name} over {OWN_ULYSSES}")
            beside = [spread(case.ratios[name], 2), spread(own, 2) if own else ""]
            table.add_row(*start, name, spread(case.seconds[name]), *beside)
        for name, reason in case.facts["skipped"].items():
            table.add_row(*start, name, "not run", reason)
        table.add_section()
    return table


def _verdict(cases: Sequence[Case]) -> str:
    """The alternative that comes closest to ringpass, or beats it, over all cases."""
    others = [
        (statistics.median(ratio), name, case)
        for case in cases
        for name, ratio in case.ratios.items()
        if name not in ("ringpass", "one rank", OWN_ULYSSES) and OWN_ULYSSES not in name
    ]
    if not others:
        return "no alternative ran"
    closest, name, case = min(others, key=lambda found: found[0])
    word = "ahead of every alternative" if closest >= 1 else "NOT ahead of every alternative"
    where = f"{name} at S={case.case['length']}, {_what(case)}"
    return f"ringpass is {word}: the best takes {closest:.2f} times its time (bound >= 1): {where}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alternatives", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], metavar="S")
    parser.add_argument("--masks", nargs="+", default=["causal", "full"], choices=["causal", "full"])
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--heads", type=int, default=8, help="64 wide each")
    parser.add_argument(
        "--compiler", default="inductor", choices=["inductor", "aot_eager"], help="of ringpass, one rank"
    )
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
