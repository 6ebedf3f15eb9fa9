"""Bad input ends in a clear error on every rank within a bounded time, and nothing hangs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ringpass import RingConfig, backend
from ringpass.comm.ring import ring_of
from ringpass.errors import MismatchError, OptionError, UnsupportedError
from tests.support.errors import error_message
from tests.support.model_parity import compiled
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.pipeline_stages import fake_ring
from tests.support.process_ranks import Workers

BOUND = 120.0  # seconds for a whole run of a few processes, start included


def step(group: dist.ProcessGroup, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    run = compiled(model, group, **{"timeout": 10.0, **options})
    outputs = run(**batch)
    loss_of(outputs).backward()
    return outputs


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layot": "zigzag"}, "did you mean 'layout'"),
        ({"layout": "zigzak"}, "did you mean 'zigzag'"),
        ({"compiler": "gcc"}, "'inductor', 'aot_eager'"),
        ({"outputs": "locl"}, "did you mean 'local'"),
        ({"tile": 0}, "at least 1"),
        ({"tile": True}, "at least 1"),
        ({"timeout": -1}, "seconds above 0"),
        ({"strict": "yes"}, "True or False"),
        ({"group": "ring"}, "ProcessGroup"),
        ({"comm": "rign"}, "did you mean 'ring'"),
        ({"ulysses_degree": 0}, "'auto', an int of at least 1"),
        ({"ulysses_degree": "most"}, "'auto', an int of at least 1"),
        ({"ulysses_degree": {0: 2.0}}, "a dict from attentions to these"),
        ({"machine": 3}, "a Machine, the path of a JSON file or the name of a preset"),
        ({"machine": "H1000"}, "one of 'A100', 'H100', .*no such file; python -m ringpass measure"),
        ({"machine": __file__}, "test_bad_input.py describes no machine: expected JSON"),
        ({"compiler": "aot_eager", "inductor": {"max_autotune": True}}, "drop one"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        RingConfig.from_options(options)


def test_bad_option_reaches_the_user() -> None:
    model = torch.compile(MODELS["nanogpt"].make(), backend="ring_dilated", options={"layot": "zigzag"})
    with pytest.raises(BackendCompilerFailed, match="did you mean 'layout'"):
        model(**batch_for("nanogpt", 8))


def test_mode_without_inductor() -> None:
    from ringpass.backend import ring_dilated

    with pytest.raises(OptionError, match="drop one"):
        ring_dilated(torch.fx.symbolic_trace(nn.Identity()), [], options={"compiler": "aot_eager"}, mode="max-autotune")


@pytest.mark.parametrize(
    ("mode", "inductor", "said"),
    [
        ("reduce-overhead", {}, "mode='reduce-overhead' .*: leave the mode out"),
        ("max-autotune", {}, "mode='max-autotune' .*: use mode='max-autotune-no-cudagraphs'"),
        (None, {"triton.cudagraphs": True}, "option 'triton.cudagraphs' .*: set it to False"),
    ],
)
def test_cuda_graphs_are_refused_for_a_partitioned_program(
    mode: str | None, inductor: dict[str, Any], said: str
) -> None:
    options: Any = {"inductor": inductor} if inductor else None
    with fake_ring(0, 2), pytest.raises(BackendCompilerFailed, match=said):
        run = torch.compile(MODELS["nanogpt"].make(), backend="ring_dilated", mode=mode, options=options)
        run(**batch_for("nanogpt", 23))


def test_one_rank_may_use_cuda_graphs() -> None:
    """It runs plain Inductor, which leaves them out on a CPU."""
    model, batch = MODELS["nanogpt"].make(), batch_for("nanogpt", 23)
    torch._dynamo.reset()
    run = torch.compile(model, backend="ring_dilated", mode="reduce-overhead")
    torch.testing.assert_close(loss_of(run(**batch)), loss_of(model(**batch)))


# --- ranks that disagree ----------------------------------------------------------------------------------------------


def other_length(group: dist.ProcessGroup) -> str:
    model, batch = MODELS["nanogpt"].make(), batch_for("nanogpt", 23 + group.rank())
    return error_message(MismatchError, lambda: step(group, model, batch))


def other_values(group: dist.ProcessGroup) -> str:
    """The first step agrees; then rank 1 passes another batch of the same shape."""
    model = MODELS["nanogpt"].make()
    run = compiled(model, group, timeout=10.0)
    loss_of(run(**batch_for("nanogpt", 23))).backward()
    return error_message(MismatchError, lambda: run(**batch_for("nanogpt", 23, seed=int(group.rank() == 1))))


def other_weights(group: dist.ProcessGroup) -> str:
    model = MODELS["nanogpt"].make(seed=group.rank())
    return error_message(MismatchError, lambda: step(group, model, batch_for("nanogpt", 23)))


def other_learning_rate(group: dist.ProcessGroup) -> str:
    """Each weight is compared in one of 3 calls: the difference shows within 3 steps of the first update."""
    model, batch = MODELS["nanogpt"].make(), batch_for("nanogpt", 23)
    run = compiled(model, group, timeout=10.0, compare_weights=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + (group.rank() == 1)))
    for step in range(5):
        try:
            loss_of(run(**batch)).backward()
        except MismatchError as error:
            return f"step {step}: {error}"
        optimizer.step()
        optimizer.zero_grad()
    return "no error"


def unequal_weights_found_once(group: dist.ProcessGroup) -> str:
    """compare_weights=0: what changes after the first call is not looked at."""
    model, batch = MODELS["nanogpt"].make(), batch_for("nanogpt", 23)
    run = compiled(model, group, timeout=10.0, compare_weights=0)
    for _ in range(3):
        loss_of(run(**batch)).backward()
        with torch.no_grad():
            next(model.parameters()).add_(group.rank())
    return "no error"


def other_model(group: dist.ProcessGroup) -> str:
    name = "llama" if group.rank() == 1 else "gpt2"
    return error_message(MismatchError, lambda: step(group, MODELS[name].make(), batch_for(name, 23)))


def other_options(group: dist.ProcessGroup) -> str:
    layout = "contiguous" if group.rank() == 1 else "zigzag"
    model, batch = MODELS["nanogpt"].make(), batch_for("nanogpt", 23)
    return error_message(MismatchError, lambda: step(group, model, batch, layout=layout))


def other_machine(group: dist.ProcessGroup) -> str:
    machine = "A100" if group.rank() == 1 else "H100"
    model, batch = MODELS["nanogpt"].make(), batch_for("nanogpt", 23)
    return error_message(MismatchError, lambda: step(group, model, batch, machine=machine))


def other_gradients(group: dist.ProcessGroup) -> str:
    """One rank freezes a parameter, so that its backward would send less."""
    model = MODELS["nanogpt"].make()
    next(model.parameters()).requires_grad_(group.rank() == 1)
    return error_message(MismatchError, lambda: step(group, model, batch_for("nanogpt", 23)))


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (other_gradients, ("differ in inputs", "needs a gradient", "the same inputs and parameters need gradients")),
        (other_length, ("differ in inputs", "[2, 23]", "[2, 24]", "the whole sequence")),
        (other_values, ("differ in values of input l_idx_", "DistributedSampler")),
        (other_weights, ("differ in weights", "same weights", "torch.manual_seed")),
        (other_learning_rate, ("step 1", "differ in updated weights", "learning rates")),
        (unequal_weights_found_once, ("no error",)),
        (other_model, ("differ in inputs",)),
        (other_options, ("differ in options", "'zigzag'", "'contiguous'")),
        (other_machine, ("differ in options", "'H100'", "'A100'")),
    ],
)
def test_ranks_disagree(workers: Workers, job: Any, said: tuple[str, ...]) -> None:
    messages = workers.run(job, 3)
    for rank, message in enumerate(messages):
        assert all(text in message for text in said), (rank, message)
    assert len(set(messages)) == 1  # the same verdict on every rank


def autotuned(group: dist.ProcessGroup) -> list[str]:
    """What a rank says when two of three compilations choose kernels by their times."""
    said: list[str] = []
    backend._warn_once_of_autotuning.cache_clear()
    ring = ring_of(group, None)
    with patch.object(backend.log, "warning", lambda *text: said.append(text[0])):
        for options in ({"max_autotune": True}, {}, {"max_autotune": True}):
            backend._warn_of_autotuning(ring, options)
    return said


def test_autotuning_is_warned_of_once(workers: Workers) -> None:
    first, *others = workers.run(autotuned, 2)
    assert len(first) == 1 and "max_autotune" in first[0] and others == [[]]


# --- what cannot be partitioned ---------------------------------------------------------------------------------------


@torch.library.custom_op("ringpass_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    """An op that no rule knows: each token minus the mean of all tokens."""
    return x - x.mean(1, keepdim=True)


odd.register_fake(torch.empty_like)
odd.register_autograd(lambda ctx, grad: grad - grad.mean(1, keepdim=True))


class Odd(nn.Module):
    """The unknown op between two attention blocks."""

    def __init__(self) -> None:
        super().__init__()
        table: Any = MODELS["position_table"].make(length=23)
        self.blocks = table.blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = odd(x)
        y: Tensor = self.blocks[1](x)
        return y


def gathers(group: dist.ProcessGroup, strict: bool, directory: str | None = None) -> Any:
    torch.manual_seed(0)
    model, batch = Odd(), batch_for("position_table", 23, labels=False)
    run = compiled(model, group, strict=strict, dump=directory)
    if strict:
        return error_message(BackendCompilerFailed, lambda: run(**batch))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringpass").addHandler(handler)
    found = []
    for call in (run, model):
        model.zero_grad()
        out = call(**batch)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    logging.getLogger("ringpass").removeHandler(handler)
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)), records


def test_unknown_op_is_gathered_and_named(workers: Any, tmp_path: Path) -> None:
    results = workers.run(gathers, 2, False, str(tmp_path))
    assert all(error < 1e-11 for error, _ in results)
    report, work = results[0][1]
    (dumped,) = tmp_path.glob("graph*/gathers.txt")
    assert dumped.read_text().splitlines() == [report, work]
    assert work == "on every rank ringpass_tests.odd.default: 1 call on all tokens, 1472 FLOPs"
    assert "no rule for ringpass_tests.odd.default" in report and "11776 bytes" in report and "x = odd(x)" in report


def test_strict_refuses_an_unknown_op(workers: Any) -> None:
    for message in workers.run(gathers, 2, True):
        assert "UnsupportedError" in message and "no rule for ringpass_tests.odd.default" in message
        assert "x = odd(x)" in message and "drop strict" in message
    assert issubclass(UnsupportedError, ValueError)


def plain_model(group: dist.ProcessGroup) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(3, 4)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringpass").addHandler(handler)
    options: dict[str, Any] = {"compiler": "aot_eager", "group": group}
    run: Any = torch.compile(model, backend="ring_dilated", options=options)
    equal = torch.equal(run(x), model(x))
    logging.getLogger("ringpass").removeHandler(handler)
    return equal, records


def test_no_attention(workers: Any) -> None:
    (equal, records), _ = workers.run(plain_model, 2)
    assert equal and len(records) == 1 and "no attention in this graph" in records[0]
