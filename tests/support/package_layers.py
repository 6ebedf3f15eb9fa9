"""The layers of the package: the table of docs/architecture.md as data, the lowest first; and its modules."""

from __future__ import annotations

from pathlib import Path

from tests.support.repository import ROOT

LAYERS: tuple[tuple[str, ...], ...] = (
    ("amounts", "devices", "errors", "logging_calls", "metrics", "nodes", "precision", "torch_features"),
    ("files", "profiling", "side_products"),
    ("masks", "kernels", "option_checks", "passes.failures"),
    ("layouts", "patterns", "local_ranks", "progress"),
    ("schedule", "comm"),
    ("ops", "reference", "page", "stalls"),
    ("lazy", "passes.capture", "passes.detect", "passes.propagate"),
    ("passes.op_rules", "shards", "input_kinds"),
    ("config",),
    ("passes.plan",),
    ("passes.partition", "passes.dump", "passes.artifacts"),
    ("passes.lower", "passes.verify", "passes.divide"),
    ("passes.pipeline", "compiled"),
    ("rank_program",),
    ("explain",),
    ("backend", "measure", "doctor"),
    ("demo",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    """The package's modules by dotted name, without `ringpass.`; the packages themselves are left out."""
    found = {}
    for root, prefix in ((ROOT / "ringpass", ""), (ROOT / "passes", "passes.")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if "passes" not in parts and parts != ("__init__",):
                found[prefix + ".".join(parts).removesuffix(".__init__")] = path
    return found
