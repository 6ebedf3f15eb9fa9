"""scratch: what the body of an operator allocates beside its results, found by running it on fake tensors.

Tiles of attention and of masks are calls of kernels and of eager code, which the graph shows as one node: a mask is
evaluated index by index, and a bias that learns holds all scores.  Their bodies run here as they run in a step, without
data, and each storage is counted from its first tensor to its last.

What torch's CPU flash op allocates inside is known by its blocks (`_workspace`).

Contract: what other kernels of torch's allocate inside is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ringpass.nodes import symbolic, tensors_of
from ringpass.ops import primitives
from ringpass.ops.library import BODIES
from ringpass.precision import accumulator

MEASURED = (
    primitives.attention_tile, primitives.attention_tile_backward, primitives.scored_tile,
    primitives.scored_tile_backward, primitives.mask_tile, primitives.mask_tile_backward, primitives.keep_tile,
)  # fmt: skip
"""Operators whose bodies are run."""


class _Storages(TorchDispatchMode):
    """The bytes of the storages that are made inside and still alive, and the most there were."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inside = _workspace(func, args)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        self.peak = max(self.peak, self.live + inside)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def scratch_of(node: Node, found: dict[Any, int]) -> int:
    """Bytes beside the results of a node's op while it runs; `found`: those of calls that are alike, filled here."""
    if node.target not in MEASURED or symbolic(node):
        return 0
    key = _kind(node)
    if key not in found:
        found[key] = _measured(node)
    return found[key]


def _kind(node: Node) -> Any:
    """Equal for calls that allocate the same: of tensors the shapes, of ranges of tokens how many in how many."""

    def of(x: Any) -> Any:
        if isinstance(x, Node):
            return tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors_of(x))
        if isinstance(x, list | tuple) and x and all(isinstance(n, int) for n in x):
            return len(x), sum(x[1::2]) - sum(x[::2])
        return tuple(map(of, x)) if isinstance(x, list | tuple) else str(x)

    last = len(node.args) - (1 if "tile" in str(node.target) and "mask" not in str(node.target) else 0)  # `after`
    return node.target, tuple(map(of, node.args[:last]))


def _measured(node: Node) -> int:
    body = BODIES[node.target._schema.name.rpartition("::")[2]]  # type: ignore[union-attr]
    args = pytree.tree_map_only(Node, lambda n: n.meta["val"], list(node.args))
    given = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    mode: Any = given[0].fake_mode  # type: ignore[attr-defined]
    with mode, torch.no_grad(), _Storages(given) as storages:
        results = body(*args)
    made = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in pytree.tree_leaves(results)}
    results_bytes = sum(made.values())
    return int(storages.peak - results_bytes)


# --- torch's CPU flash op ---------------------------------------------------------------------------------------------

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
KEYS = 512
"""Keys of a block of scores."""


def _workspace(func: Any, args: Any) -> int:
    """What the op holds of the scores for each thread, as in torch's `native/cpu/FlashAttentionKernel.cpp`.

    Forward: a block of scores, the maximum and the sum of its rows, and their outputs; backward: a block of scores, one
    of their gradients, and a sum for each row.  Of 16-bit dtypes a copy of the blocks beside, in their own.
    """
    if func not in (FORWARD, BACKWARD):
        return 0
    q, k = (args[1], args[2]) if func is BACKWARD else (args[0], args[1])
    rows = next(rows for least, rows in ((768, 256), (192, 64), (0, 32)) if q.shape[2] >= least)
    rows, keys = min(rows, q.shape[2]), min(KEYS, k.shape[2])
    blocks = 2 * rows * keys if func is BACKWARD else rows * keys
    beside = rows if func is BACKWARD else rows * (2 + q.shape[3])
    dtype = accumulator(q.dtype)
    copies = blocks * q.itemsize if dtype != q.dtype else 0
    return int(torch.get_num_threads() * ((blocks + beside) * dtype.itemsize + copies))
