"""One attention call of a captured graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node

from ringpass.masks.expr import Expr
from ringpass.masks.scores import Keyless


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a graph.

    index: its number, in graph order.
    node: its output (B, H, Sq, Dv); the batch and head dims may be missing, here and in q, k, v.
    q, k, v: queries (B, H, Sq, D), keys (B, G, Sk, D) and values (B, G, Sk, Dv) for G key/value heads.
    mask: boolean expression of (b, h, q, k); True: the query may attend to the key.
    bias: what is added to the scaled scores; None: nothing.
    leaves: the tensors from which mask, bias, score and sink load elements.
    scale: what the scores are multiplied by.
    dropout: the probability with which a weight is dropped.
    score: any other function of the scaled scores; None: none.
    unsupported: why the call must run as the model wrote it; empty: it can be partitioned.
    block_sparse: lists of blocks, which come with each call, say what is computed.
    handwritten: the model writes the softmax out.
    sink: the score of one more key, whose value is 0; None: no such key.
    keyless: the same call for the rows that see no key under `mask`; None: these rows give 0.
    uniform: of the call for such rows, how its scores are surely equal (`ringpass.masks.scores.Keyless`).
    """

    index: int
    node: Node
    q: Node
    k: Node
    v: Node
    mask: Expr
    bias: Expr | None
    leaves: tuple[Node, ...]
    scale: float
    dropout: float
    score: Expr | None = None
    unsupported: str = ""
    block_sparse: bool = False
    handwritten: bool = False
    sink: Expr | None = None
    keyless: AttentionSite | None = None
    uniform: str = ""

    def with_keyless(self, how: Keyless | None) -> AttentionSite:
        """The site whose rows without a key attend as `how` says; None: they give 0."""
        if how is None:
            return self
        return replace(self, keyless=replace(self, mask=how.mask, bias=None, score=how.score, uniform=how.uniform))

    def functions(self, change: Callable[[Expr], Expr]) -> AttentionSite:
        """The site, and that of its rows without a key, with its expressions changed."""
        bias, score, sink = (None if e is None else change(e) for e in (self.bias, self.score, self.sink))
        keyless = None if self.keyless is None else self.keyless.functions(change)
        return replace(self, mask=change(self.mask), bias=bias, score=score, sink=sink, keyless=keyless)

    @property
    def path(self) -> str:
        """The module that calls it: `layers.0.attn`; empty where the graph does not say."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        name = str(stack[-1][0]) if stack else ""
        name = re.sub(r"\._modules\['([^']+)'\]|\[(\d+)\]", r".\1\2", re.sub(r"^L\['\w+'\]", "", name))
        return name.strip(".")

    @property
    def heads(self) -> tuple[int, int]:
        """Numbers of query heads and of K/V heads."""
        q, k = (x.meta["val"] for x in (self.q, self.k))
        return (int(q.shape[1]), int(k.shape[1])) if q.ndim == 4 else (1, 1)

    def __str__(self) -> str:
        shapes = " ".join(f"{n}{list(x.meta['val'].shape)}" for n, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        leaves = ", ".join(f"x{i} = {leaf.name}{list(leaf.meta['val'].shape)}" for i, leaf in enumerate(self.leaves))
        parts = [f"site {self.index} ({self.node.name}): {shapes}"]
        parts += [f"not read: {self.unsupported}"] if self.unsupported else [f"mask {self.mask}"]
        parts += [f"bias {self.bias}"] if self.bias is not None else []
        parts += [f"score {self.score}"] if self.score is not None else []
        parts += [f"sink {self.sink}"] if self.sink is not None else []
        if self.keyless is not None:
            equal = f", all equal ({self.keyless.uniform})" if self.keyless.uniform else ""
            parts.append(f"rows without a key: mask {self.keyless.mask}, score {self.keyless.score}{equal}")
        parts += [f"leaves {leaves}"] if leaves else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        return "; ".join([*parts, f"scale {self.scale:.6g}"])
