"""Train a small model for one step on several ranks and on one, and compare: a quick proof that this machine works.

    ringpass demo
    ringpass demo --ranks 4

The model is a causal transformer of one layer over 512 tokens.  Each rank is a process of this host with one thread,
runs on the CPU with gloo, and holds 512 / N tokens; one rank means the same model without torch.compile.  It takes
less than a minute, most of it Inductor's.

Exit code: 0 if loss and gradients agree, 1 if not, 2 if it cannot run.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor, nn

from ringpass.errors import OptionError
from ringpass.local_ranks import Say, run_on_local_ranks
from ringpass.progress import progress

TOKENS, VOCABULARY, WIDTH, HEADS, LAYERS = 512, 97, 64, 4, 1
TOLERANCE = 1e-4  # of the largest gradient, in float32
MOST_RANKS = 16
EXCHANGE, LIMIT = 120.0, 300.0  # seconds for one exchange, which may wait for another rank's compiler, and for all
PLAN = "ringpass.passes.plan"  # the logger of what was decided
STEPS = "the model on one rank", "compiling for all ranks", "gradients"
NEXT = """next: RINGPASS_DUMP=/tmp/dump torchrun --nproc-per-node 2 train.py   writes what each rank does, by stage;
      docs/lowered_graph.md reads such a dump, docs/options.md lists the options, ringpass doctor checks a machine"""


class Layer(nn.Module):
    """Attention and a feed-forward layer over (1, S, WIDTH), as any model would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x + attention + feed-forward."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))
        return hidden


class Model(nn.Module):
    """A language model; returns the loss of predicting each next token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """(1, S) token numbers to a number."""
        x = self.layers(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        return nn.functional.cross_entropy(self.head(x)[0, :-1], ids[0, 1:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes to start; default: 2")


def run(args: argparse.Namespace) -> int:
    """Trains, compares, and prints what was sharded; 1 if the difference is larger than rounding."""
    if not 2 <= args.ranks <= MOST_RANKS:
        raise OptionError(f"--ranks must be from 2 to {MOST_RANKS}, got {args.ranks}")
    with progress(len(STEPS) + 1) as advance:
        advance(f"starting {args.ranks} processes")
        found = run_on_local_ranks(compare, args.ranks, "cpu", exchange=EXCHANGE, limit=LIMIT, advance=advance)
    plan, losses, loss_difference, difference = found[0]
    print(plan)
    agree = loss_difference <= TOLERANCE and difference <= TOLERANCE  # not so where one is no number
    print(f"loss: {losses[0]:.6f} on {args.ranks} ranks, {losses[1]:.6f} on 1 rank")
    print(
        f"{args.ranks} ranks {'match' if agree else 'DIFFER FROM'} 1 rank: largest difference of a gradient "
        f"{difference:.1e} of the largest gradient, of the loss {loss_difference:.1e}"
        f" ({'at most' if agree else 'expected at most'} {TOLERANCE:g})"
    )
    print(NEXT)
    return int(not agree)


def compare(say: Say) -> tuple[str, tuple[float, float], float, float]:
    """On each rank: (the plan, (loss on all ranks, on one), relative difference of the loss, of the gradients)."""
    from ringpass.backend import ring_dilated

    plans = _Texts()
    logging.getLogger(PLAN).addHandler(plans)
    logging.getLogger(PLAN).setLevel(logging.INFO)
    torch.manual_seed(0)  # the same weights and the same batch on every rank
    model, ids = Model(), torch.randint(0, VOCABULARY, (1, TOKENS))
    say(STEPS[0])
    alone, expected = _step(model, model, ids)
    say(STEPS[1])
    compiled: Any = torch.compile(model, backend=ring_dilated)
    loss, grads = _step(compiled, model, ids)
    say(STEPS[2])
    flat, other = (torch.cat([g.flatten() for g in some]) for some in (expected, grads))
    difference = (other - flat).abs().max() / flat.abs().max()
    return "\n".join(plans.texts), (loss, alone), abs(loss - alone) / abs(alone), difference.item()


def _step(run: Any, model: Model, ids: Tensor) -> tuple[float, list[Tensor]]:
    """Loss and gradients of `model`, which `run` computes."""
    model.zero_grad()
    loss = run(ids)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


class _Texts(logging.Handler):
    """Keeps the texts of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one text."""
        self.texts.append(record.getMessage())
