"""First checks on a machine with GPUs: each a torchrun of its own under a time limit, so that a hang ends one check.

    python -m benchmarks.gpu_checks --ranks 8                          # NCCL, one GPU per rank
    python -m benchmarks.gpu_checks --ranks 2 --device cpu --tokens 64 # gloo, here

Each check compares loss and gradients of a small model on the ring with those on one device, and times its steps;
`syncs` counts the waits of the host for the device in a step, `overlap` writes a trace of one, `drift` trains for some
steps and compares the weights of all ranks. One line per check; the exit code is 0 if all passed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.device import CHOICES, start

PARITY = "causal", "rolled", "sink", "global", "documents", "padding", "grouped", "odd"
CHECKS = *PARITY, "dropout", "syncs", "overlap", "drift"
TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-3}  # of the norm of each gradient
VOCABULARY, STEPS = 512, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks one after the other, or, under torchrun, the one that is named; 1 if one failed."""
    args = _arguments(argv)
    if args.one:
        return run_check(args)
    failed = [name for name in args.checks if not _launched(name, args)]
    print(f"{len(args.checks) - len(failed)} of {len(args.checks)} checks passed", *failed, flush=True)
    return int(bool(failed))


def _launched(name: str, args: argparse.Namespace) -> bool:
    """Runs one check on its ranks; whether it passed within the limit."""
    sizes = [f"--{key}={getattr(args, key)}" for key in ("device", "dtype", "compiler", "tokens", "heads", "width")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    try:
        subprocess.run(
            [*torchrun, "-m", "benchmarks.gpu_checks", f"--one={name}", *sizes], timeout=args.limit, check=True
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: no end within {args.limit} s", flush=True)
        return False
    except subprocess.CalledProcessError as error:
        print(f"{name}: exit code {error.returncode}", flush=True)
        return False
    return True


# --- one check, on each rank ------------------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """One check on this rank; rank 0 prints its line. 1 if it failed."""
    device = start(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = args.tokens + (7 if args.one == "odd" else 0)
    model = Model(args.one, tokens, args.heads, args.width).to(device, getattr(torch, args.dtype))
    options = {"compiler": args.compiler, "layout": "zigzag", **({"unroll_limit": 0} if args.one == "rolled" else {})}
    ring = torch.compile(model, backend="ring_dilated", options=options)
    ids = torch.randint(VOCABULARY, (1, tokens)).to(device)
    check = {"syncs": count_syncs, "overlap": trace, "drift": drift}.get(args.one, compare)
    passed, text = check(args, model, lambda run=None: one_step(model, run or ring, ids))
    if dist.get_rank() == 0:
        print(
            f"{args.one} on {dist.get_world_size()} ranks, {tokens} tokens, {device.type}, {args.dtype}: {text}",
            flush=True,
        )
    dist.destroy_process_group()
    return int(not passed)


Step = Callable[..., tuple[float, list[Tensor]]]
Outcome = tuple[bool, str]


def one_step(model: nn.Module, run: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[float, list[Tensor]]:
    """(loss, gradients) of a forward and a backward."""
    model.zero_grad()
    loss = run(ids)
    loss.backward()
    return loss.item(), [x.grad.detach().clone() for x in model.parameters() if x.grad is not None]


def compare(args: argparse.Namespace, model: nn.Module, step: Step) -> Outcome:
    """Loss and gradients against one device (not with dropout, which draws other masks there), then seconds a step."""
    loss, grads = step()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    text = f"{(time.perf_counter() - began) / STEPS * 1e3:.1f} ms a step"
    if args.one == "dropout":
        return loss == loss, text
    wanted, exact = step(model)
    pairs = zip(grads, exact, strict=True)
    error = max(float((g.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)) for g, e in pairs)
    return error < TOLERANCE[args.dtype], f"loss {loss:.6f}, alone {wanted:.6f}, gradients within {error:.1e}, {text}"


def count_syncs(args: argparse.Namespace, model: nn.Module, step: Step) -> Outcome:
    """How often the host waits for the device in a step, by line; reading the loss is one."""
    step()
    if not torch.cuda.is_available() or args.device == "cpu":
        return True, "not counted: no GPU"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    lines = sorted({f"{warning.filename}:{warning.lineno}" for warning in seen})
    return True, f"{len(seen)} waits for the device in a step: {', '.join(lines)}"


def trace(args: argparse.Namespace, model: nn.Module, step: Step) -> Outcome:
    """Writes a trace of one step: are transfers under way while tiles are computed?"""
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        step()
    path = f"gpu_checks.rank{dist.get_rank()}.trace.json"
    profiler.export_chrome_trace(path)
    return True, f"see {path}"


def drift(args: argparse.Namespace, model: nn.Module, step: Step) -> Outcome:
    """The largest difference between ranks of any weight after 20 steps: 0, unless kernels differ by rank or by run."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(20):
        step()
        optimizer.step()
    worst = 0.0
    for parameter in model.parameters():
        low, high = (parameter.detach().float().clone() for _ in range(2))
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        worst = max(worst, float((high - low).max()))
    return worst == 0, f"weights differ between ranks by at most {worst:g} after 20 steps"


# --- the model --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A token table, two layers of attention and MLP under the mask of a check, and the loss of its own tokens."""

    def __init__(self, check: str, tokens: int, heads: int, width: int) -> None:
        super().__init__()
        self.check, self.tokens, hidden = check, tokens, heads * width
        groups = max(1, heads // 4) if check == "grouped" else heads
        self.table, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY)
        self.layers = nn.ModuleList(Layer(heads, groups, width, 0.1 if check == "dropout" else 0.0) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss over (1, S) ids."""
        x, mask = self.table(ids), self.mask(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), ids.flatten())

    def mask(self, ids: Tensor) -> Tensor | None:
        """(1, 1, S, S) bools; None: causal."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        q, k, near = positions[:, None], positions[None, :], self.tokens // 8
        if self.check == "sink":
            return ((k <= q) & ((q - k < near) | (k < 4)))[None, None]
        if self.check == "global":
            return (((q - k).abs() < near) | (k < 4) | (q < 4))[None, None]
        if self.check == "documents":
            return ((k <= q) & (k // (self.tokens // 3) == q // (self.tokens // 3)))[None, None]
        if self.check == "padding":
            return ((k <= q) & (k < self.tokens - near))[None, None] & (ids >= 0)[:, None, None, :]
        return None


class Layer(nn.Module):
    """Attention with grouped heads, and an MLP."""

    def __init__(self, heads: int, groups: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.dropout = heads, groups, width, dropout
        hidden = heads * width
        self.norm, self.q, self.out = nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.kv, self.up, self.down = (
            nn.Linear(hidden, 2 * groups * width), nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden),
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(1, S, hidden) of (1, S, hidden)."""
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.groups, self.width)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout, mask is None, enable_gqa=self.heads != self.groups
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return x


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=240, help="seconds for each check")
    parser.add_argument("--device", choices=CHOICES, default="auto")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--compiler", choices=["inductor", "aot_eager"], default="inductor")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
