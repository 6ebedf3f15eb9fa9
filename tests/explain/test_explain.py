"""`ringpass.explain` on models right and wrong: its verdict, its data, its texts; that it leaves the model alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ringpass
from ringpass.errors import InputError, OptionError, UnsupportedError
from ringpass.explain.data import ReportData
from ringpass.explain.report import Report
from ringpass.explain.tables import plain
from tests.support.page_models import Layers, explained
from tests.support.repository import ROOT

EAGER = {"compiler": "aot_eager"}  # no passes of Inductor's: faster, and the same plan


class Block(nn.Module):
    """One causal attention; `broken`: a graph break before it; `mixed`: all tokens are mixed first."""

    def __init__(self, broken: bool = False, mixed: bool = False, attends: bool = True) -> None:
        super().__init__()
        self.broken, self.mixed, self.attends = broken, mixed, attends
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        if self.mixed:
            y = y.flatten(1).cumsum(1).view(y.shape)
        q, k, v = y.view(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.broken:
            torch._dynamo.graph_break()
        if not self.attends:
            return torch.mean((q + k + v).square())
        return torch.mean(scaled_dot_product_attention(q, k, v, is_causal=True).square())


class InLoop(nn.Module):
    """A loop that breaks, so that Dynamo compiles the attentions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layers(1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            torch._dynamo.graph_break()
            total = total + layer(x)
        return total


def report_of(model: nn.Module, tokens: int = 64, world: int = 4, layout: str = "zigzag", **how: Any) -> Report:
    options = {**EAGER, "layout": layout}
    return ringpass.explain(model, torch.empty(1, tokens, 16), world_size=world, options=options, **how)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(Block())


def test_a_model_that_fits_well(report: Report) -> None:
    (graph,) = report.graphs
    (axis,), (site,) = graph.axes, graph.sites
    assert not report.verdict.problems and not graph.gathers and not report.breaks
    assert (axis.tokens, axis.layout) == (64, "zigzag") and axis.ranks is not None
    assert sorted(i for runs in axis.ranks for a, b in runs for i in range(a, b)) == list(range(64))
    assert (
        site.mask == "k <= q" and site.heads == [2, 2] and site.source is not None and "test_explain.py" in site.source
    )
    assert site.pairs is not None and sum(site.pairs) >= 2 * 64 * 65 / 2
    assert site.received_bytes == site.needed_bytes  # by tokens, nothing too many
    assert report.verdict.efficiency is None and not site.ways
    memory = graph.memory
    assert sum(memory.kinds.values()) == memory.peak <= report.verdict.peak_bytes
    assert memory.kinds["parameters"] == memory.kinds["gradients"] == 4 * (16 * 48 + 48)
    assert {moment["phase"] for moment in memory.program} == {"forward", "backward"}
    assert graph.schedules is not None and len(graph.schedules[0]["ranks"]) == 4


def test_no_layout_is_advised_that_was_rejected() -> None:
    """Where `auto` chose an uneven one, the others take longer; one that was asked for may be changed."""
    uneven = [report_of(Block(), layout=name).verdict.change or "" for name in ("auto", "contiguous")]
    assert ["layout=" in change for change in uneven] == [False, True]


def test_breaks_are_found_after_many_compilations() -> None:
    """Dynamo keeps what it tells of the last few alone."""
    while len(torch._dynamo.utils.get_compilation_metrics()) < torch._dynamo.utils.DEFAULT_COMPILATION_METRICS_LIMIT:
        torch._dynamo.reset()
        for n in range(8):
            torch.compile(lambda x, n=n: x + n, backend="eager")(torch.zeros(2))
    assert any("compiles nothing of 'forward'" in line for line in report_of(InLoop(), 64).verdict.lines)


def test_a_lazy_module_must_have_shapes() -> None:
    with pytest.raises(InputError, match="call the model once, then explain it"):
        ringpass.explain(nn.LazyLinear(4), torch.empty(1, 3), world_size=2)


def test_what_was_rejected() -> None:
    found = report_of(Block(), machine="cpu", layout="auto")
    (graph,) = found.graphs
    for weighed in (graph.layouts, graph.sites[0].ways):
        assert [one.chosen for one in weighed] == [True] + [False] * (len(weighed) - 1) and len(weighed) > 1
        assert all(one.seconds for one in weighed)
    assert found.verdict.efficiency is not None and 0 < found.verdict.efficiency <= 1
    assert graph.axes[0].layout == graph.layouts[0].name


def test_data_texts_and_differences(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data == report.to_dict() and data["version"] == 1
    for text in (str(report), plain(report), report._repr_html_()):
        assert all(word in text for word in ("attentions", "boundaries", "memory of a rank", "zigzag", "proved"))
    assert not report.diff(data) and str(report.diff(report)) == "no difference"
    more = {**data, "world": 8, "verdict": {**data["verdict"], "peak_bytes": 2 * data["verdict"]["peak_bytes"]}}
    changed = report.diff(more)
    assert "world: 4 -> 8 (2 times)" in str(changed) and "peak of a rank" in str(changed)
    assert {change["what"] for change in changed.to_dict()} == {"world", "peak of a rank"}
    with pytest.raises(InputError, match="of one version"):
        report.diff({**data, "version": 2})


def test_files(report: Report, tmp_path: Any) -> None:
    for name in ("report.json", "report.txt", "report.html"):
        report.save(tmp_path / name)
    assert (tmp_path / "report.html").read_text() == report.to_html() + "\n"
    assert set(report.texts) == {f"graph0/{name}.py" for name in ("captured", "partitioned", "forward", "backward")}
    assert {event["pid"] for event in report.trace()["traceEvents"]} == {0, 1, 2, 3}
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    with pytest.raises(InputError, match="ends in .html, .json, .txt"):
        report.save(tmp_path / "report.pdf")


@pytest.mark.parametrize(
    ("model", "tokens", "how", "said"),
    [
        (Block(attends=False), 64, {}, "no attention was found"),
        (Block(broken=True), 64, {}, "1 graph break at tests/explain/test_explain.py"),
        (Block(mixed=True), 64, {}, "cumsum.default gathers"),
        (Block(), 8, {}, "the sequence of 8 tokens is too short for 4 ranks"),
        (Block(), 1, {}, "no sequence is divided: each of the 4 ranks computes all of it"),
        (InLoop(), 64, {}, "compiles nothing of 'forward' itself"),
        (Block(), 64, {"device": 10_000}, "memory does not fit: a rank needs"),
    ],
)
def test_what_is_wrong_is_said_first(model: nn.Module, tokens: int, how: dict[str, Any], said: str) -> None:
    verdict = report_of(model, tokens, **how).verdict
    assert len(verdict.lines) <= 3 and any(said in line for line in verdict.lines)
    assert verdict.change and verdict.problems


def test_nothing_is_changed_logged_or_needed(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the model nor the log; a model on "meta" gives the same report."""
    model = Block(mixed=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING, "ringpass"):
        found = report_of(model)
    assert not caplog.records and "cumsum" in " ".join(found.graphs[0].warnings)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    with torch.device("meta"):
        bare, x = Block(mixed=True), torch.empty(1, 64, 16)
    assert not found.diff(ringpass.explain(bare, x, world_size=4, options={**EAGER, "layout": "zigzag"}))


def test_the_longest_sequence_that_fits() -> None:
    longest = report_of(Block(), device="2 MB").longest
    assert longest is not None and longest["verified"]
    assert report_of(Block(), longest["tokens"], device="2 MB").verdict.fits
    assert not report_of(Block(), 2 * longest["tokens"], device="2 MB").verdict.fits


def test_rolled_attention_receives_the_same() -> None:
    """Each of two layers, as one node for all steps."""
    unrolled, rolled = (explained(Layers(2), 64, world=4, unroll_limit=n).graphs[0].sites[0] for n in (128, 0))
    assert rolled.rank_received_bytes == unrolled.rank_received_bytes and rolled.indices == [0, 1]


def test_many_ranks() -> None:
    found = report_of(Block(), 1024, world=128, rank=127)
    (site,) = found.graphs[0].sites
    assert found.graphs[0].axes[0].ranks is None and found.graphs[0].schedules is None
    assert site.pairs is not None and len(site.pairs) == 128


def test_bad_input() -> None:
    for how, said in (({"world": 0}, "world_size"), ({"rank": 4}, "rank"), ({"device": "H1000"}, "device")):
        with pytest.raises(OptionError, match=said):
            report_of(Block(), **how)
    with pytest.raises(OptionError, match="unknown option 'layot'"):
        ringpass.explain(Block(), torch.empty(1, 64, 16), world_size=2, options={"layot": 1})

    def reads(x: Tensor) -> Tensor:
        return x.sin() if bool((x > 0).all()) else x.cos()

    with pytest.raises(UnsupportedError, match="reads the data"):
        ringpass.explain(reads, torch.empty(4), world_size=2)


class Pictures(nn.Module):
    """Blocks that read, between graphs, how many tokens each picture of `sizes` (rows, columns) has."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, sizes: Tensor, exists: Tensor) -> Tensor:
        ends = torch.cat([torch.zeros(1, dtype=torch.long), (sizes[:, 0] * sizes[:, 1]).cumsum(0)])
        ends = torch.tensor([*ends[:-1], ends[-1]]) + torch.arange(len(ends)) * 0
        parts = [self.block(x[:, a:b]).sum() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        return torch.stack(parts).sum() if bool(exists.all()) else x.sum()


def test_integers_are_read() -> None:
    """What a model reads from integers and booleans, between its graphs, is what it reads in a run; not on `meta`."""
    sizes, exists = torch.tensor([[8, 4], [16, 4]]), torch.ones(1, 96, dtype=torch.bool)
    report = ringpass.explain(Pictures(), torch.empty(1, 96, 16), sizes, exists, world_size=4)
    assert [axis.tokens for graph in report.graphs for axis in graph.axes] == [32, 64]
    assert sizes.tolist() == [[8, 4], [16, 4]]

    def writes(x: Tensor, sizes: Tensor) -> Tensor:
        sizes[:, 0] = x[0, :2, 0].long()
        return x[:, : int(sizes[0, 0])]

    with pytest.raises(UnsupportedError, match="to a tensor of integers"):
        ringpass.explain(writes, torch.empty(1, 96, 16), sizes, world_size=4)
    with pytest.raises(UnsupportedError, match="not on 'meta'"):
        ringpass.explain(Pictures(), torch.empty(1, 96, 16), sizes, exists.to("meta"), world_size=4)


# --- the documentation ------------------------------------------------------------------------------------------------


def keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a dataclass and of those in it: `graphs[].axes[].tokens`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        inner = [x for x in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(x)]
        ending = "[]" if inner and typing.get_origin(kind) is list else ""
        yield f"{prefix}{field.name}{ending}"
        yield from keys(inner[0], f"{prefix}{field.name}{ending}.") if inner else ()


def test_every_key_is_documented(report: Report) -> None:
    page = (ROOT / "docs" / "explain.md").read_text()
    assert re.findall(r"^\| `([\w.\[\]]+)` \|", page, re.MULTILINE) == list(keys(ReportData))
    assert set(report.to_dict()) == {field.name for field in dataclasses.fields(ReportData)}
