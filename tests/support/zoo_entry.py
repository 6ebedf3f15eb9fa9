"""What the zoo's files share: an entry, its dtype, batches, and sizes of transformers' models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.support.zoo_modules import HEADS, LAYERS, VOCAB, WIDTH

ROWS = 2
ONE = ("sdpa",)  # the attentions of models that have no choice
PICTURE = {"image_size": 20, "patch_size": 4, "num_channels": 3}
Batch = dict[str, Any]


class wide(TorchFunctionMode):  # noqa: N801  a context, used as a function
    """Inside, what a model writes as float32 is float64: norms, softmax, losses, rotary tables."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        func = torch.unflatten if func is Tensor.unflatten else func  # Dynamo breaks at the method in such a mode
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **named)


def nothing() -> None:
    """What most entries need besides transformers."""


@dataclass(frozen=True)
class Entry:
    """`factory(attention)` builds the model; `make_batch(length, labels, padding)` its keyword arguments.

    `labels`, `padding`: whether the model takes them.  `attentions`: the ways in which it can be told to attend.
    """

    factory: Callable[[str], nn.Module]
    make_batch: Callable[[int, bool, bool], Batch]
    labels: bool = True
    padding: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    needs: Callable[[], Any] = nothing  # imports a package that may be missing
    dtype: torch.dtype = torch.float64  # float32 where an op of the model knows nothing wider

    @property
    def missing(self) -> str:
        """The package that the entry needs and that cannot be imported, or nothing."""
        try:
            self.needs()
        except ImportError as error:
            return str(error.name)
        return ""

    def make(self, attention: str = "sdpa", train: bool = True) -> nn.Module:
        """The model in its dtype, the same on every rank; the caller's random state is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.factory(attention)
            with torch.no_grad():
                for parameter in model.parameters():  # biases and scales that start at 0 or 1 would hide faults
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        return model.to(self.dtype).train(train)

    def batch(self, length: int, labels: bool, padding: bool) -> Batch:
        """Keyword arguments for one call."""
        made = self.make_batch(length, labels, padding)
        floats = {k: v for k, v in made.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return made | {key: value.to(self.dtype) for key, value in floats.items()}


# --- batches ----------------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    """The source of a batch's random numbers."""
    return torch.Generator().manual_seed(seed)


def ids(length: int, seed: int = 0) -> Tensor:
    """A sequence of tokens for each row."""
    return torch.randint(3, VOCAB, (ROWS, length), generator=generator(seed))


def mask(length: int) -> Tensor:
    """Row 0 lacks three tokens at its end, row 1 four at its beginning."""
    found = torch.ones(ROWS, length, dtype=torch.long)
    found[0, -3:] = found[1, :4] = 0
    return found


def tokens(length: int, labels: bool, padding: bool) -> Batch:
    """Ids, and the same as labels."""
    found = ids(length)
    batch = {"input_ids": found} | ({"attention_mask": mask(length)} if padding else {})
    return batch | ({"labels": found.masked_fill(mask(length) == 0, -100) if padding else found} if labels else {})


def translated(length: int, labels: bool, padding: bool) -> Batch:
    """A source that is six tokens longer than the target."""
    batch = tokens(length + 6, False, padding)
    return batch | {"labels" if labels else "decoder_input_ids": ids(length, 1)}


def floats(length: int, seed: int = 0) -> Tensor:
    """A sequence of vectors for each row."""
    return torch.randn(ROWS, length, WIDTH, generator=generator(seed), dtype=torch.float64)


def pixels() -> Tensor:
    """A picture for each row."""
    return torch.randn(ROWS, 3, 20, 20, generator=generator(), dtype=torch.float64)


def pictures(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures of 5 x 5 patches."""
    return {"pixel_values": pixels()} | ({"labels": torch.tensor([1, 0])} if labels else {})


def diffusers() -> Any:
    """The package, imported where it is used."""
    return importlib.import_module("diffusers")


# --- Hugging Face -----------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": HEADS // 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}


def of(name: str, config: str, *drop: str, **options: Any) -> Callable[[str], nn.Module]:
    """A factory of the class `name` with the sizes above, without those named in `drop`, and `options`."""

    def factory(attention: str) -> nn.Module:
        sizes = {key: value for key, value in SIZES.items() if key not in drop} | options
        made = getattr(hf, config)(**sizes, attn_implementation=attention)
        model: nn.Module = getattr(hf, name)(made)
        return model

    return factory
