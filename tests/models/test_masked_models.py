"""Masks that real models build, on the ring: their numbers, their bytes, and no S x S tensor in any rank's graphs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule
from transformers import DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaModel

from ringpass import RingConfig
from ringpass.passes.detect.detect import detect
from ringpass.passes.op_rules.table import rule_for
from ringpass.passes.plan.plan import RingPlan, plan
from ringpass.passes.propagate.factors import propagate
from ringpass.schedule.tiles import tiling
from tests.support.marks import slow
from tests.support.model_parity import compiled, outputs_and_gradients, parity, relative, worst
from tests.support.models import HEADS, LAYERS, MODELS, ROWS, WIDTH, WINDOW, batch_for
from tests.support.pipeline_stages import captured_graph, compile_step, fake_ring
from tests.support.process_ranks import Workers
from tests.support.traffic import received_bytes, remote_keys_needed

EXACT = 1e-10
PADDED = (slow("gpt2"), slow("llama"), slow("mistral"), slow("gemma3"), "bert", slow("modernbert"), slow("t5"))


@pytest.mark.parametrize("name", (slow("gemma3"), "bert", slow("modernbert"), slow("t5")))
def test_numbers_with_padding(workers: Workers, name: str) -> None:
    """Every output, the loss and every gradient, T5's table of distances among them."""
    results = workers.run(parity, 2, name, 37, True, True, tile=8)
    if name == "bert":  # a key's bias moves all scores of a row alike: its gradient is 0, and what is left is rounding
        results = [{k: e for k, e in errors.items() if not k.endswith("key.bias")} for errors in results]
    error, where = worst(results)
    assert error < EXACT, where


# --- rows that see no key ---------------------------------------------------------------------------------------------


def deberta() -> torch.nn.Module:
    """Its eager attention masks queries too, by the least number."""
    sizes: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = DebertaV2Config(intermediate_size=24, pad_token_id=0, attn_implementation="eager", **sizes, **rates)
    model: torch.nn.Module = DebertaV2Model(config)
    return model


def left_padded() -> torch.nn.Module:
    """Llama's eager attention adds the least number.  Its softmax in float32 would make that of float64 -inf."""
    sizes: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(intermediate_size=24, num_key_value_heads=2, attn_implementation="eager", **sizes)
    model: torch.nn.Module = LlamaModel(config)
    return model


EAGER: dict[str, tuple[Callable[[], torch.nn.Module], torch.dtype, float]] = {
    "deberta": (deberta, torch.float64, EXACT),
    "left-padded llama": (left_padded, torch.float32, 1e-4),
}


def padded_rows(group: dist.ProcessGroup, name: str) -> tuple[dict[str, float], list[str]]:
    """Errors of all hidden states, those of padding included, and of gradients; and what was warned of."""
    torch.manual_seed(0)
    make, dtype, _ = EAGER[name]
    model = make().to(dtype)
    ids, exists = torch.randint(1, 41, (3, 29)), torch.ones(3, 29, dtype=torch.int64)
    exists[0, 20:], exists[1, :7] = 0, 0
    weights = torch.randn(16, dtype=dtype)

    def step(run: Any) -> dict[str, Tensor]:
        model.zero_grad()
        states = run(input_ids=ids, attention_mask=exists).last_hidden_state
        (states * weights).sin().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"states": states.detach().clone(), **grads}

    want = step(model)
    with warnings.catch_warnings(record=True) as caught:
        got = step(compiled(model, group, tile=8))
    errors = {key: relative(got[key], want[key]) for key in want if not want[key].norm() < 1e-12}
    return errors, [str(x.message) for x in caught]


@pytest.mark.parametrize("name", EAGER)
def test_padding_without_a_key(workers: Workers, name: str) -> None:
    for errors, warned in workers.run(padded_rows, 3, name):
        assert max(errors.values()) < EAGER[name][2], errors
        assert not [text for text in warned if "as the model wrote it" in text]


# --- Mistral's window -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a step: the largest error; bytes of keys and values received; its dump, by file."""

    error: float
    received: int
    dump: dict[str, str]


def windowed(group: dist.ProcessGroup, length: int, padding: bool, directory: str) -> Seen:
    """A training step of Mistral, as it is."""
    model, batch = MODELS["mistral"].make(), batch_for("mistral", length, True, padding)
    want = outputs_and_gradients(model, model, batch)
    with received_bytes() as totals:
        got = outputs_and_gradients(model, compiled(model, group, dump=directory), batch)
    errors = [relative(got[name], want[name]) for name in want]
    files = [x for x in Path(directory).glob("graph0/*") if x.is_file()]
    files += Path(directory).glob(f"graph0/rank{group.rank()}/*")
    return Seen(max(errors), totals[0], {path.name: path.read_text() for path in files})


@pytest.mark.parametrize("padding", (slow(False), True))
def test_mistral_receives_its_window(workers: Workers, tmp_path: Path, padding: bool) -> None:
    ranks, length = 3, 97
    token = 2 * ROWS * HEADS // 2 * WIDTH // HEADS * 8  # keys and values of the heads that the model has, in float64
    closed = f"mask k <= q & q - k < {WINDOW}{' & bool(x0[b, k])' if padding else ''};"
    wanted = [
        2 * LAYERS * token * n for n in remote_keys_needed(ranks, length, WINDOW, "contiguous")
    ]  # forward and backward
    assert wanted[0] == 0 and wanted[1] == wanted[2] > 0
    steps = workers.run(windowed, ranks, length, padding, str(tmp_path))
    for rank, (seen, least) in enumerate(zip(steps, wanted, strict=True)):
        assert seen.error < EXACT
        assert least <= seen.received <= 1.05 * least
        assert "axis 0: 97 tokens, contiguous" in seen.dump["plan.txt"]
        assert seen.dump["plan.txt"].count(closed) == LAYERS
        for stage in ("forward.py", "backward.py"):
            hops = re.findall(r"step(\d)_(?:from|to)_(rank\d)", seen.dump[stage])
            shifts, peers = ({hop[side] for hop in hops} for side in (0, 1))
            assert shifts == {"1"} and peers <= {f"rank{rank - 1}", f"rank{rank + 1}"}, "a hop outside the window"
        assert seen.dump["gathers.txt"].strip() == "nothing is gathered"


# --- Gemma-3's layers in turn -----------------------------------------------------------------------------------------


def plans(name: str, length: int, worlds: Sequence[int], **options: Any) -> list[RingPlan]:
    """What is planned for a model on each number of ranks; nothing is computed."""
    found: list[RingPlan] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = captured_graph(gm, example_inputs).gm
        sites, sweep = detect(captured), propagate(captured, rule_for)
        found.extend(plan(sites, sweep, world, RingConfig()) for world in worlds)
        return gm.forward

    torch._dynamo.reset()
    with torch.device("meta"):
        model = MODELS[name].factory(**options)
        run: Any = torch.compile(model, backend=backend, fullgraph=True)
        run(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    return found


def test_gemma3_is_balanced_over_both_kinds_of_layers() -> None:
    worlds = range(2, 9)
    for world, planned in zip(worlds, plans("gemma3", 16384 + 3, worlds, window=1024), strict=True):
        problems = [site.problem for site in planned.sites if site.problem]
        assert [p.mask for p in problems] == ["k <= q & q - k < 1024", "k <= q"]
        areas = np.sum([tiling(p).areas(world) for p in problems], axis=0)
        assert areas.max() <= 1.05 * areas.mean(), planned


# --- no S x S tensor --------------------------------------------------------------------------------------------------


def squares(gm: GraphModule, length: int) -> list[str]:
    """Values with two dims of at least `length`, or with one of its square."""
    found = []
    for node in gm.graph.nodes:
        value = node.meta.get("val") if "gradients_bucket" not in node.name else ()  # of parameters
        for tensor in value if isinstance(value, list | tuple) else [value]:
            *_, second, largest = sorted((1, 1, *(tensor.shape if isinstance(tensor, Tensor) else ())))
            if second >= length or largest >= length**2:
                found.append(f"{node.name}{list(tensor.shape)}")
    return found


@pytest.mark.parametrize("name", PADDED)
def test_no_square_in_any_graph(name: str) -> None:
    """Tiles are far smaller than the sequence, and every tile is a node."""
    length = 157
    longest: dict[str, Any] = {"longest": 256} if name == "bert" else {}
    with fake_ring(1, 3):
        seen = compile_step(name, length, True, unroll_limit=10**6, tile=16, **longest)
    assert squares(seen["captured"][0], length)  # the walk does find them
    for stage in ("partitioned", "forward", "backward"):
        for gm in seen[stage]:
            assert squares(gm, length) == [], stage
    assert any(n.name.startswith("mask_step") for n in seen["forward"][0].graph.nodes)
