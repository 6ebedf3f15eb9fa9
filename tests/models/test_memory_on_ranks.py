"""Activation memory falls with the number of ranks, on the unmodified training step with everything at its default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.memory import peak_bytes
from ringpass.logging_calls import skip_logging_calls
from tests.support.process_ranks import Workers

LENGTH = 2048


def peak(group: dist.ProcessGroup | None) -> int:
    """Peak bytes within a step beyond parameters and gradients; without a group, of plain Inductor on one device."""
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # else one device holds S x S for dropout
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0)).train()
    settings: dict[str, Any] = {} if group is None else {"backend": "ring_dilated", "options": {"group": group}}
    run: Any = torch.compile(model, **settings)
    ids = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()

    step()  # compiles, and makes the gradients
    return peak_bytes(step, kept=lambda: [p.grad for p in model.parameters()])


def alone(group: dist.ProcessGroup) -> int:
    """The yardstick, in one graph too."""
    skip_logging_calls()
    return peak(None)


@pytest.mark.slow
def test_activations_fall_with_the_ranks(workers: Workers) -> None:
    (one,) = workers.run(alone, 1)
    largest = max(workers.run(peak, 4))
    assert largest <= 1.15 * one / 4, (
        f"{largest} bytes on a rank of 4, {one} on one device: {4 * largest / one:.2f} of a quarter"
    )
