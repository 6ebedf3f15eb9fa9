"""What the documentation says runs: docstrings' examples, the pages' snippets, their tables, links and layers."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import json
import pkgutil
import re
from dataclasses import fields
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import default_data_collator

import ringpass
from benchmarks import bytes_received
from benchmarks.paired import RESULTS, Case
from examples import simulate
from ringpass import RingConfig, patterns
from ringpass.schedule.dilation import AUTO, PRESETS
from tests.support.package_layers import LAYERS
from tests.support.repository import ROOT
from tests.support.torchrun import torchrun

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
PAGES["benchmarks/README.md"] = ROOT / "benchmarks" / "README.md"
CONTINUED = {"docs/sharding.md"}  # whose snippets go on from one another
SCRIPTS = {f"docs/guides/{name}.md" for name in ("long_sequences", "trainer", "fsdp", "images", "nodes")}
# Run by tests of their own; scripts by those of tests/test_guides.py.
ELSEWHERE = SCRIPTS | {"README.md", "docs/debugging.md", "docs/lowered_graph.md", "docs/mesh.md", "docs/training.md"}
PACKAGES = pkgutil.walk_packages(ringpass.__path__, "ringpass.")
MODULES = [m.name for m in PACKAGES if ">>>" in (inspect.getsource(importlib.import_module(m.name)))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    found = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL, extraglobs=vars(module)
    )
    assert found.attempted and not found.failed


def snippets(page: str) -> list[str]:
    """The Python snippets of a page."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[page].read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and snippets(page)])
def test_snippets(page: str) -> None:
    names: dict[str, Any] = {}
    for snippet in snippets(page):
        exec(snippet, names if page in CONTINUED else {})


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths(page: str) -> None:
    """Relative links lead to files; so do the paths of code and results that a page names."""
    text = PAGES[page].read_text()
    linked = [PAGES[page].parent / link for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text)]
    named = re.findall(r"`((?:(?:ringpass|passes|tests|benchmarks)/[\w/]+|examples/\w+)(?:\.(?:py|json))?)`", text)
    assert [path for path in [*linked, *(ROOT / name for name in named)] if not path.exists()] == []


def test_the_index_lists_every_page() -> None:
    index = re.findall(r"^- \[.+?\]\(([\w/]+\.md)\)", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert sorted(index) == sorted({path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"README.md"})


def test_the_page_on_options_names_every_option() -> None:
    page = (DOCS / "options.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {f.name for f in fields(RingConfig)}


def test_the_page_on_architecture() -> None:
    """Its list of layers is the one that is checked, lowest first; its picture and the README's exist."""
    layers = LAYERS
    listed = re.findall(r"^```text\n(.*?)^```", (DOCS / "architecture.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    assert [set(line.split()) for line in listed.splitlines()] == [set(packages) for packages in layers]


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda path: path.name)
def test_pictures(picture: Path) -> None:
    """They are well formed, say in words what they show, need nothing from elsewhere, and are shown."""
    text = picture.read_text()
    tags = {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(text).iter()}
    assert {"title", "desc"} <= tags and not {"image", "script", "style"} & tags and "href" not in text
    assert any(f"{picture.name})" in path.read_text() for path in PAGES.values())


def test_readme_explains() -> None:
    """The snippet on explain, on a smaller model that two ranks share."""
    _, snippet = snippets("README.md")
    small = snippet.replace(
        "GPT2Config(n_positions=65536)", "GPT2Config(n_positions=256, n_layer=1, n_embd=64, n_head=2)"
    )
    names: dict[str, Any] = {}
    exec(small.replace("65536", "256").replace("world_size=8", "world_size=2").replace("print(", "report = ("), names)
    assert names["report"].verdict.fits


def test_readme_script(tmp_path: Path) -> None:
    script, *_ = snippets("README.md")
    assert len([line for line in script.splitlines() if line and not line.startswith("#")]) <= 10
    small = script.replace("GPT2Config()", "GPT2Config(n_layer=1, n_embd=64, n_head=2, bos_token_id=0, eos_token_id=0)")
    path = tmp_path / "train.py"
    path.write_text(small)
    printed = "".join(
        torchrun("--nproc-per-node", "2", str(path)).split()
    )  # unbuffered: both ranks may print into one line
    loss = printed[: len(printed) // 2]
    assert re.fullmatch(r"\d+\.\d+", loss) and printed == 2 * loss


def test_the_page_on_masks() -> None:
    """Its patterns exist, and its table of bytes is the one that was written last."""
    page = (DOCS / "masks.md").read_text()
    named = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    made = {name for name, value in vars(patterns).items() if isfunction(value) and _makes_a_pattern(value)}
    assert named == made - {"everything", "nothing"}
    found = json.loads((RESULTS / "bytes_received.json").read_text())["cases"]
    cases = [Case(entry.pop("case"), facts=entry) for entry in found]
    for row in (bytes_received.COLUMNS, *bytes_received.rows(cases)):
        assert f"| {' | '.join(row)} |" in page


def test_the_page_on_sharding() -> None:
    """Its table names every value of the option."""
    page = (DOCS / "sharding.md").read_text()
    for value in re.findall(r'^\| `"(\w+)"` \|', page, re.MULTILINE):
        assert RingConfig(outputs=value).outputs == value
    assert "docs/sharding.md" in README


def test_the_page_on_meshes() -> None:
    """Its snippet makes valid options, on rank 0 of a fake world of its size."""
    (snippet,) = snippets("docs/mesh.md")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        names: dict[str, Any] = {}
        exec(snippet, names)
        assert RingConfig.from_options(names["options"]).ring is names["mesh"]["ring"].get_group()
    finally:
        dist.destroy_process_group()


def test_the_page_on_training() -> None:
    """Its batches hold every row once, in one order; tests/models/test_training.py trains with a Trainer."""
    trainer = SimpleNamespace(data_collator=default_data_collator)
    (snippet,) = snippets("docs/training.md")
    imported = "from transformers import Trainer\n"
    assert imported in snippet
    rows = [{"input_ids": torch.full((4,), i)} for i in range(4)]
    args = SimpleNamespace(seed=3, per_device_train_batch_size=2, per_device_eval_batch_size=4)
    names = {"Trainer": lambda *args, **kwargs: trainer, "model": torch.nn.Linear(1, 1), "args": args}
    names |= {"dataset": rows, "held_out": rows}
    exec(snippet.replace(imported, ""), names)
    for loader, sizes in ((trainer.get_train_dataloader(), [2, 2]), (trainer.get_eval_dataloader(), [4])):
        batches = [batch["input_ids"] for batch in loader]
        assert [len(batch) for batch in batches] == sizes
        assert sorted(torch.cat(batches)[:, 0].tolist()) == [0, 1, 2, 3]


def test_the_page_on_dilation(capsys: pytest.CaptureFixture[str]) -> None:
    """Its names are the presets, its options exist, and it shows what the simulation prints."""
    page = (DOCS / "dilation.md").read_text()
    assert set(re.findall(r'^\| `"(\w+)"` \|', page, re.MULTILINE)) == {*PRESETS, AUTO}
    named = {
        name for row in re.findall(r"^\| (`\w+`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {
        f.name for f in fields(RingConfig) if "dilat" in f.name or f.name in ("segment_lengths", "head_offset")
    }
    command, shown = re.findall(r"^    \$ python -m examples.simulate (.*)\n((?:    .*\n)+)", page, re.MULTILINE)[0]
    simulate.main(command.split())
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in map(str.strip, shown.splitlines()) if line not in [*printed, "..."]] == []


def _makes_a_pattern(function: Any) -> bool:
    public = function.__module__ == patterns.__name__ and not function.__name__.startswith("_")
    return public and function.__annotations__.get("return") == "Pattern"


def test_main_job_prints_what_the_readme_promises() -> None:
    """Its verdict on losses that agree is the README's line; on others it is not, and the exit code says so."""
    from examples.train import _verdict

    promised = "ringpass: 2 ranks match 1 rank: largest loss difference <difference> <= 1e-03 over 16 steps"
    assert promised in README
    for difference, code in ((2e-6, 0), (0.1, 1), (float("nan"), 1)):
        trainings: list[Any] = [
            SimpleNamespace(name=name, losses=[3.0 + extra] * 16)
            for name, extra in (("2 ranks", 0.0), ("1 rank", difference))
        ]
        page = io.StringIO()
        assert _verdict(trainings, 16, Console(file=page, width=200)) == code
        assert (re.sub(r"\d\.\de-\d\d <=", "<difference> <=", page.getvalue().strip()) == promised) == (code == 0)


def test_the_dump_that_the_documentation_reads(tmp_path: Path) -> None:
    """docs/lowered_graph.md shows the real dump of its own command; where it differs, paste the new one."""
    page = (DOCS / "lowered_graph.md").read_text()
    blocks = re.findall(r"^```(?:python)?\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    command = re.search(r"^    torchrun (.*) --dump dump$", page, flags=re.MULTILINE)
    assert command and blocks[0] in (ROOT / "examples" / "attention.py").read_text()
    torchrun(*command.group(1).split(), f"--dump={tmp_path}")
    graph = tmp_path / "graph0" / "rank1"
    for name, block in zip(("schedule.txt", "forward.py", "backward.py"), blocks[1:], strict=True):
        assert block.strip() == (graph / name).read_text().strip(), f"{name} differs from docs/lowered_graph.md"
    shown = re.findall(r"^```text\n(.*?)^```", (DOCS / "guides" / "dumps.md").read_text(), re.DOTALL | re.MULTILINE)
    for name, block in zip(("../plan.txt", "schedule.txt"), shown, strict=True):
        assert block.strip() == (graph / name).read_text().strip(), f"{name} differs from docs/guides/dumps.md"
