"""A ring inside a larger mesh: batches over one dimension, tokens over the other, with DDP or FSDP2 around the model.

    torchrun --nproc-per-node 4 -m examples.mesh

The ring is one dimension of a DeviceMesh; the optimiser steps of each way are compared with those of one device.

    ddp           DistributedDataParallel around the compiled model, over "data"
    ddp-all       the same over all ranks: it averages gradients that are equal on a ring, which is right
    fsdp          fully_shard of the whole model over "data": one graph, tokens are local from embedding to head
    fsdp-layers   fully_shard of each layer: its hooks break the graph, and what passes between layers is gathered
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

VOCABULARY, WIDTH, HEADS = 31, 16, 2


class Layer(nn.Module):
    """Attention and a multilayer perceptron, with a residual connection each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


class Language(nn.Module):
    """A small causal language model that knows nothing of ranks."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        following = F.pad(ids[:, 1:], (0, 1), value=-100)  # -100: nothing follows the last token
        return F.cross_entropy(self.head(x).flatten(0, 1), following.flatten())


def compiled(model: nn.Module, mesh: DeviceMesh, compiler: str) -> Any:
    """The model on the ring that this rank is in."""
    options: Any = {"group": mesh["ring"], "compiler": compiler}
    return torch.compile(model, backend="ring_dilated", options=options)


def ddp(model: nn.Module, mesh: DeviceMesh, compiler: str) -> Any:
    return DistributedDataParallel(compiled(model, mesh, compiler), process_group=mesh["data"].get_group())


def ddp_all(model: nn.Module, mesh: DeviceMesh, compiler: str) -> Any:
    return DistributedDataParallel(compiled(model, mesh, compiler))


def fsdp(model: nn.Module, mesh: DeviceMesh, compiler: str) -> Any:
    fully_shard(model, mesh=mesh["data"])
    return compiled(model, mesh, compiler)


def fsdp_layers(model: Any, mesh: DeviceMesh, compiler: str) -> Any:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    return fsdp(model, mesh, compiler)


WAYS: dict[str, Callable[[nn.Module, DeviceMesh, str], Any]] = {
    "ddp": ddp, "ddp-all": ddp_all, "fsdp": fsdp, "fsdp-layers": fsdp_layers,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train in each way; rank 0 tells how far it is from one device."""
    args = _arguments(argv)
    dist.init_process_group("gloo")
    shape = (dist.get_world_size() // args.ring, args.ring)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "ring"))
    batches = torch.randint(VOCABULARY, (args.steps, 4, args.length), generator=torch.Generator().manual_seed(1))
    alone = fresh(args.length)
    wanted = train(alone, alone, list(batches))
    for way in args.ways:
        model = fresh(args.length)
        run = WAYS[way](model, mesh, args.compiler)
        mine = [batch.chunk(mesh["data"].size())[mesh["data"].get_local_rank()] for batch in batches]
        losses = train(run, model, mine)
        dist.all_reduce(losses, group=mesh["data"].get_group())
        far = float((losses / mesh["data"].size() - wanted).abs().max())
        if dist.get_rank() == 0:
            say = f"{shape[0]} x {shape[1]} ranks, {way}: {args.steps} steps from {wanted[0]:.4f} to {wanted[-1]:.4f}"
            print(f"{say}, largest difference of the loss to one device {far:.1e}", flush=True)
    dist.destroy_process_group()


def fresh(length: int) -> Language:
    """The model, the same at each call."""
    torch.manual_seed(0)
    return Language(length).double()


def train(run: Any, model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The loss of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for ids in batches:
        loss = run(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    return torch.stack(losses)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.mesh", description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--ring", type=int, default=2, help="ranks of a ring; the others are in the dimension 'data'")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=23)
    parser.add_argument("--compiler", choices=("inductor", "aot_eager"), default="inductor")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
