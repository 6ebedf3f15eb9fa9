"""A training that goes on after a rank dies, with the losses that it would have had.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 100 -m examples.resume --folder /tmp/run

Kill a rank at any moment (`pkill -9 -f examples.resume` kills all): torchrun starts all of them again, and they
continue from the newest checkpoint.  Stop torchrun and start it with another number of ranks or another --layout: the
losses stay the same, up to rounding.  docs/resuming.md explains each part.

A checkpoint holds weights, optimizer and learning rate, the position in the data, and the random states of Python,
numpy and torch.  The ring adds nothing to it: every rank has all weights and optimizer states, as on one device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from examples.checkpoints import Checkpoints

VOCABULARY, WIDTH, HEADS, TEXTS, LONGEST = 31, 16, 2, 8, 40


class Model(nn.Module):
    """A causal language model of one layer, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        following = F.pad(ids[:, 1:], (0, 1), value=-100)  # -100: nothing follows the last token
        return F.cross_entropy(self.head(x).flatten(0, 1), following.flatten())


class Texts:
    """Texts in an order that is drawn anew in each epoch, each cut at a random place.  `position`: in the order."""

    def __init__(self) -> None:
        self.all = torch.randint(VOCABULARY, (TEXTS, LONGEST), generator=torch.Generator().manual_seed(1))
        self.order, self.position = torch.zeros(TEXTS, dtype=torch.int64), TEXTS

    def next(self) -> Tensor:
        """(1, S): the next text."""
        if self.position == TEXTS:
            self.order, self.position = torch.from_numpy(np.random.permutation(TEXTS)), 0
        self.position += 1
        return self.all[self.order[self.position - 1], : random.randint(LONGEST // 2, LONGEST)].unsqueeze(0)


class Run:
    """All that a checkpoint holds, as one dict and back."""

    def __init__(self) -> None:
        seed_everything(0)
        self.model, self.texts = Model().double(), Texts()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 10))

    def state(self) -> dict[str, Any]:
        """By name.  The random states are equal on all ranks, as the batches are."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "texts": {"order": self.texts.order, "position": self.texts.position},
            "random": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse; random states last, since building a model or an optimizer may draw numbers."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.texts.order, self.texts.position = state["texts"]["order"], state["texts"]["position"]
        random.setstate(state["random"]["python"])
        np.random.set_state(state["random"]["numpy"])
        torch.set_rng_state(state["random"]["torch"])


def main(argv: list[str] | None = None) -> None:
    """Train from the newest checkpoint to the last step; rank 0 appends each loss to losses.jsonl."""
    args = _arguments(argv)
    dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    run, checkpoints = Run(), Checkpoints(args.folder)
    if begin := checkpoints.newest():
        state = run.state()
        checkpoints.load(state, begin)
        run.restore(state)
    options: Any = {"layout": args.layout, "compiler": args.compiler, "timeout": args.timeout}
    compiled: Any = torch.compile(run.model, backend="ring_dilated", dynamic=True, options=options)
    for step in range(begin + 1, args.steps + 1):
        loss = train_step(run, compiled)
        if dist.get_rank() == 0:
            note(args.folder, step, loss)
        if step % args.every == 0 or step == args.steps:
            checkpoints.save(run.state(), step)
    dist.destroy_process_group()


def train_step(run: Run, model: Any) -> float:
    """The loss of the next text; `model`: that of the run, compiled."""
    loss = model(run.texts.next())
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    return float(loss.detach())


def note(folder: Path, step: int, loss: float) -> None:
    """Appends one line, which is written at once: a step that is taken again after a death is there again."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    line = json.dumps({"step": step, "loss": loss, "ranks": dist.get_world_size(), "attempt": attempt})
    with open(folder / "losses.jsonl", "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def seed_everything(seed: int) -> None:
    """The same on every rank: all ranks of a ring draw the same batches and the same weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and losses; all ranks see it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps from checkpoint to checkpoint")
    parser.add_argument("--layout", default="auto", help="as the option of the backend")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that ranks wait for each other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
