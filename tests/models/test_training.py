"""Training and generation as people do them: checkpoints, autocast, accumulation, changing lengths, caches, Trainer."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.support.marks import slow
from tests.support.model_parity import compiled, outputs_and_gradients, relative
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.process_ranks import Workers
from tests.support.traffic import received_bytes

# --- steps ------------------------------------------------------------------------------------------------------------


def checkpointed(group: dist.ProcessGroup) -> tuple[float, list[int], list[int]]:
    """Error against one device with activation checkpoints, and bytes received in a step, without and with."""
    model: Any = MODELS["gpt2"].make()
    batch, received = batch_for("gpt2", 23, True), list[list[int]]()
    for wraps in (False, True):
        if wraps:
            model.gradient_checkpointing_enable()
        torch._dynamo.reset()
        with received_bytes() as totals:
            got = outputs_and_gradients(model.train(), compiled(model, group), batch)
        received.append(totals)
    want = outputs_and_gradients(model, model, batch)
    return max(relative(got[name], want[name]) for name in want), received[0], received[1]


def test_checkpoints_send_nothing_twice(workers: Workers) -> None:
    for error, without, with_them in workers.run(checkpointed, 2):
        assert error < 1e-9 and 0 < sum(with_them) <= sum(without)


def accumulated(group: dist.ProcessGroup) -> float:
    """Error of the gradients that two backwards add up, of batches of different lengths."""
    model, grads = MODELS["llama"].make(), []
    for run in (compiled(model, group), model):
        model.zero_grad()
        for length in (23, 17):
            loss_of(run(**batch_for("llama", length, True))).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return max(relative(got, want) for got, want in zip(*grads, strict=True))


@pytest.mark.slow
def test_gradients_accumulate(workers: Workers) -> None:
    assert all(error < 1e-9 for error in workers.run(accumulated, 2))


class Loss(nn.Module):
    """The least that has a loss: an attention and a mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).pow(2).mean()


def scaled_in_place(group: dist.ProcessGroup) -> list[bool]:
    """Whether each loss of three calls may be written to, as transformers' Trainer does, under Inductor."""
    run, views = compiled(Loss(), group, compiler="inductor"), []
    for seed in range(3):
        torch.manual_seed(seed)
        loss = run(torch.randn(1, 2, 23, 8, requires_grad=True))
        views.append(loss._is_view())
        loss *= 2
        loss.backward()
    return views


def test_a_loss_may_be_scaled_in_place(workers: Workers) -> None:
    assert workers.run(scaled_in_place, 2) == [[False] * 3] * 2


def halved(group: dist.ProcessGroup) -> tuple[float, float, bool]:
    """Of a step under autocast: the loss' error against float64, that of one device under autocast, and the dtype."""
    model = MODELS["nanogpt"].factory().float()
    batch = batch_for("nanogpt", 23)
    exact = float(loss_of(model.double()(**batch)).detach())
    model.float()
    found = []
    for run in (compiled(model, group), model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(run(**batch))
        loss.backward()
        found.append(abs(float(loss.detach()) - exact))
    grads = all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    return found[0], found[1], grads


def test_autocast(workers: Workers) -> None:
    for ours, theirs, in_float32 in workers.run(halved, 2):
        assert in_float32 and ours < max(2 * theirs, 2e-3)


# --- lengths ----------------------------------------------------------------------------------------------------------


def compilations(group: dist.ProcessGroup, lengths: list[int], dynamic: bool | None) -> tuple[list[int], float]:
    """Graphs compiled so far at each length, and the largest error of a loss."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, counts, errors = MODELS["llama"].make(), [], []
    run = compiled(model, group, dynamic=dynamic)
    for length in lengths:
        batch = batch_for("llama", length, True)
        loss = loss_of(run(**batch))
        loss.backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        errors.append(relative(loss, loss_of(model(**batch))))
    return counts, max(errors)


@pytest.mark.parametrize(("many", "dynamic"), [(3, None), slow(3, True), slow(20, None), slow(20, True)])
def test_lengths_share_a_compilation(workers: Workers, many: int, dynamic: bool | None) -> None:
    """The first is compiled for its own length, the second for any; with dynamic=True, the first for any already."""
    drawn = random.Random(0)
    lengths = [drawn.randint(6, 60) for _ in range(many)]
    for counts, error in workers.run(compilations, 2, lengths, dynamic):
        assert (
            counts == [1] + [1 if dynamic else 2] * (many - 1) and error < 1e-6
        )  # transformers computes the loss in float32


def apart(group: dist.ProcessGroup) -> float:
    """Error of an attention whose queries, keys and values are inputs, at several lengths."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch._dynamo.reset()
    run, g, errors = compiled(attend, group), torch.Generator().manual_seed(0), []
    for length in (23, 31, 18):
        q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.float64, generator=g) for _ in range(3))
        errors.append(relative(run(q, k, v), attend(q, k, v)))
    return max(errors)


def test_keys_and_values_may_come_apart(workers: Workers) -> None:
    assert all(error < 1e-12 for error in workers.run(apart, 2))


# --- generation and Trainer -------------------------------------------------------------------------------------------


def generated(group: dist.ProcessGroup, cache: str | None) -> bool:
    """Whether greedy tokens, which a prefill of 23 tokens and steps of one follow, are those of one device."""
    model: Any = MODELS["llama"].make().eval()
    ids = torch.randint(1, 30, (1, 23), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    with torch.no_grad():
        want = model.generate(ids, **how)
        model.forward = compiled(model.forward, group)
        got = model.generate(ids, **how)
    return bool(torch.equal(got, want)) and got.shape == (1, 29)


@pytest.mark.parametrize("cache", [None, slow("static")])
def test_generate(workers: Workers, cache: str | None) -> None:
    assert all(workers.run(generated, 2, cache))


def trained(group: dist.ProcessGroup, folder: str, ring: bool) -> list[float]:
    """The losses of transformers' Trainer, whose ranks read the same batches."""
    from transformers import Trainer, TrainingArguments

    model, g = MODELS["gpt2"].make().float(), torch.Generator().manual_seed(1)
    rows: list[Tensor] = [torch.randint(30, (23,), generator=g) for _ in range(12)]
    if ring:
        options: Any = {"compiler": "aot_eager", "group": group}
        nn.Module.compile(model, backend="ring_dilated", options=options)
    args = TrainingArguments(
        folder, max_steps=4, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3
    )
    trainer: Any = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    order = torch.Generator().manual_seed(5)
    trainer.get_train_dataloader = lambda: DataLoader(
        trainer.train_dataset, batch_size=2, shuffle=True, generator=order, collate_fn=trainer.data_collator
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_trainer(workers: Workers, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    (alone,) = workers.run(trained, 1, str(tmp_path), False)
    for losses in workers.run(trained, 2, str(tmp_path), True):
        assert len(losses) == 4 and losses == pytest.approx(alone, rel=1e-5)
