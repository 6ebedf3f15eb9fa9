"""The layers of the package: the table of docs/architecture.md as data, the lowest first."""

from __future__ import annotations

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "nodes", "precision"),
    ("masks", "kernels"),
    ("layouts", "patterns"),
    ("schedule", "comm"),
    ("config", "ops", "reference"),
    ("lazy", "passes.capture", "passes.detect", "passes.propagate"),
    ("passes.op_rules",),
    ("passes.plan",),
    ("passes.partition", "passes.dump", "shards"),
    ("passes.lower", "passes.verify"),
    ("passes.pipeline", "compiled"),
    ("backend",),
)
