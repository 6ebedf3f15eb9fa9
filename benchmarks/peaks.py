"""Does `ringpass.explain` tell the peak activation memory of a rank? Its estimate against a measured training step.

    python -m benchmarks.peaks --models gpt2 llama vit t5 --ranks 2 4 --lengths 1024 2048

Each rank compares the report made for it with the second of its own steps under Inductor, as `benchmarks.memory`
measures it: without parameters, inputs and the gradients that parameters keep. Models of two layers, float32, with the
loss in the graph. A length is that of the tokens, of T5 that of both sides, of a ViT that of its patches, which form a
square: the largest with no more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn

from benchmarks.gpt2 import gpt2
from benchmarks.memory import MIB, peak_bytes
from benchmarks.paired import Case, against, arguments, collect, conclude, on_ranks, screen

BOUND = 0.10  # of what is measured
VOCAB, CLASSES, PATCH = 256, 10, 4
QUICK = {"models": ["gpt2"], "ranks": [2], "lengths": [64], "width": 32, "compiler": "aot_eager"}
Built = tuple[nn.Module, dict[str, Any]]
"""A model, and the arguments of a call."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    messages = (message for ranks in args.ranks for message in on_ranks(ranks, job, args))
    cases = collect(screen(), "peaks", len(args.ranks) * len(args.models) * len(args.lengths), messages)
    conclude(screen(), "peaks", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: a case for each model and length."""
    ranks = dist.get_world_size()
    for name in args.models:
        for length in args.lengths:
            yield f"{name}, P = {ranks}, S = {length}"
            estimated, measured = estimate_and_measurement(name, length, args.width, args.compiler)
            found: list[Any] = [None] * ranks
            dist.all_gather_object(found, (estimated, measured))
            facts = {
                "estimated": [a for a, _ in found],
                "measured": [b for _, b in found],
                "ratio": [a / b for a, b in found],
            }
            yield Case({"model": name, "ranks": ranks, "length": length, "width": args.width}, facts=facts)


def estimate_and_measurement(name: str, length: int, width: int, compiler: str) -> tuple[int, int]:
    """Peak activations of this rank in bytes: by the report made for it, and as measured in a second step."""
    import ringpass

    torch.manual_seed(0)
    model, batch = MODELS[name](length, width)
    options: dict[str, Any] = {"compiler": compiler}
    report = ringpass.explain(model, world_size=dist.get_world_size(), rank=dist.get_rank(), options=options, **batch)
    (graph,) = report.graphs
    run: Any = torch.compile(model, backend="ring_dilated", options=options)

    def step() -> None:
        outputs = run(**batch)  # held until the backward is over, as in the report
        outputs.loss.backward()

    step()  # compiles, and makes the gradients
    return graph.memory.activations, peak_bytes(step, kept=lambda: [p.grad for p in model.parameters()])


# --- models -----------------------------------------------------------------------------------------------------------


def learned_positions(length: int, width: int) -> Built:
    """GPT-2: learned positions, GELU."""
    model, ids = gpt2(length, width), torch.randint(0, VOCAB, (1, length))
    return model, {"input_ids": ids, "labels": ids}


def llama(length: int, width: int) -> Built:
    """Rotary positions, half as many K/V heads as query heads, a gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": _heads(width), "num_key_value_heads": max(1, _heads(width) // 2)}
    sizes = {"vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=length, use_cache=False))
    ids = torch.randint(0, VOCAB, (1, length))
    return model.train(), {"input_ids": ids, "labels": ids}


def vit(length: int, width: int) -> Built:
    """Patches of a square picture and a CLS token, no mask."""
    from transformers import ViTConfig, ViTForImageClassification

    side = math.isqrt(length) * PATCH
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(
        **sizes, **rates, num_attention_heads=_heads(width), image_size=side, patch_size=PATCH, num_labels=CLASSES
    )
    batch = {"pixel_values": torch.randn(1, 3, side, side), "labels": torch.tensor([1])}
    return ViTForImageClassification(config).train(), batch


def t5(length: int, width: int) -> Built:
    """Encoder and decoder, whose biases of relative positions learn, and attention between them."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_heads": _heads(width)}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "use_cache": False}
    config = T5Config(**sizes, **layers, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    ids = torch.randint(0, VOCAB, (1, length))
    return T5ForConditionalGeneration(config).train(), {"input_ids": ids, "labels": ids}


def _heads(width: int) -> int:
    return max(1, width // 64)


MODELS: dict[str, Callable[[int, int], Built]] = {"gpt2": learned_positions, "llama": llama, "vit": vit, "t5": t5}

# --- the command ------------------------------------------------------------------------------------------------------


def _table(cases: Sequence[Case]) -> Table:
    title = "peak activation memory of the rank that is furthest off"
    table = Table("model", "P", "S", "width", "rank", "estimated, MiB", "measured, MiB", "ratio", title=title)
    for case in cases:
        of, rank = case.case, _worst_rank(case)
        sizes = (f"{case.facts[what][rank] / MIB:.1f}" for what in ("estimated", "measured"))
        ratio = f"{case.facts['ratio'][rank]:.3f}"
        table.add_row(of["model"], str(of["ranks"]), str(of["length"]), str(of["width"]), str(rank), *sizes, ratio)
    return table


def _worst_rank(case: Case) -> int:
    off = [abs(ratio - 1) for ratio in case.facts["ratio"]]
    return off.index(max(off))


def _verdict(cases: Sequence[Case]) -> str:
    """The case in which the estimate is furthest from what was measured."""
    worst = max(cases, key=lambda case: abs(case.facts["ratio"][_worst_rank(case)] - 1))
    rank = _worst_rank(worst)
    off = abs(worst.facts["ratio"][rank] - 1)
    where = f"{worst.case['model']} at P={worst.case['ranks']}, S={worst.case['length']}, rank {rank}"
    return f"estimated over measured peak, from 1: {against(off, BOUND, at_least=False)}, {where}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peaks", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="P")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], metavar="S")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
