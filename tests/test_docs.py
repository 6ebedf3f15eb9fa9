"""What the documentation says runs: docstrings' examples, the README's script, its option table."""

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

import pytest
from rich.console import Console

import ringpass
from benchmarks import bytes_received
from benchmarks.paired import RESULTS, Case
from examples import simulate
from ringpass import RingConfig, patterns
from ringpass.schedule.dilation import AUTO, PRESETS
from tests.support.torchrun import ROOT, torchrun

README = (ROOT / "README.md").read_text()
PACKAGES = pkgutil.walk_packages(ringpass.__path__, "ringpass.")
MODULES = [m.name for m in PACKAGES if ">>>" in (inspect.getsource(importlib.import_module(m.name)))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    found = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL, extraglobs=vars(module)
    )
    assert found.attempted and not found.failed


def test_readme_names_every_option() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == {f.name for f in fields(RingConfig)}


def test_readme_script(tmp_path: Path) -> None:
    script, patterns = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(patterns, {})
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
    """Its snippets run, its patterns exist, and its table is the one that was written last."""
    page = (ROOT / "docs" / "masks.md").read_text()
    for snippet in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(snippet, {})
    named = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    made = {name for name, value in vars(patterns).items() if isfunction(value) and _makes_a_pattern(value)}
    assert named == made - {"everything", "nothing"}
    found = json.loads((RESULTS / "bytes_received.json").read_text())["cases"]
    cases = [Case(entry.pop("case"), facts=entry) for entry in found]
    for row in (bytes_received.COLUMNS, *bytes_received.rows(cases)):
        assert f"| {' | '.join(row)} |" in page


def test_the_page_on_hilbert_order() -> None:
    """Its snippets run; what it says of shares is tested in test_hilbert.py."""
    page = (ROOT / "docs" / "hilbert.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})


def test_the_page_on_shares() -> None:
    """Its snippets run one after the other, and its table names every value of the option."""
    page = (ROOT / "docs" / "shares.md").read_text()
    names: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(snippet, names)
    for value in re.findall(r'^\| `"(\w+)"` \|', page, re.MULTILINE):
        assert RingConfig(outputs=value).outputs == value
    assert "docs/shares.md" in README


def test_the_page_on_dilation(capsys: pytest.CaptureFixture[str]) -> None:
    """Its snippets run, its names are the presets, its options exist, and it shows what the simulation prints."""
    page = (ROOT / "docs" / "dilation.md").read_text()
    for snippet in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(snippet, {})
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
    page = (ROOT / "docs" / "lowered_graph.md").read_text()
    blocks = re.findall(r"^```(?:python)?\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    command = re.search(r"^    torchrun (.*) --dump dump$", page, flags=re.MULTILINE)
    assert command and blocks[0] in (ROOT / "examples" / "attention.py").read_text()
    torchrun(*command.group(1).split(), f"--dump={tmp_path}")
    graph = tmp_path / "rank1" / "graph0"
    for name, block in zip(("schedule.txt", "forward.py", "backward.py"), blocks[1:], strict=True):
        assert block.strip() == (graph / name).read_text().strip(), f"{name} differs from docs/lowered_graph.md"
