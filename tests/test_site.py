"""The documentation site builds without a warning, documents every public name, and needs no network to be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from inspect import isclass, isfunction
from pathlib import Path
from types import ModuleType

import pytest

import ringpass
from ringpass import errors, patterns, reference
from tests.support.repository import ROOT

LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a link, an anchor or a page of the navigation that leads nowhere fails the build."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_public_name_is_documented(site: Path) -> None:
    entries = {entry for page in site.glob("api/*.html") for entry in re.findall(r'id="([\w.]+)"', page.read_text())}
    names = {f"ringpass.{name}" for name in ringpass.__all__}
    for module in (errors, patterns, reference):
        names |= {f"{module.__name__}.{name}" for name in defined(module)}
    assert sorted(names - entries) == []


def defined(module: ModuleType) -> list[str]:
    """The public classes and functions that a module defines itself."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    made = {name: value for name, value in public.items() if isclass(value) or isfunction(value)}
    return [name for name, value in made.items() if value.__module__ == module.__name__]


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    assert [(page.name, url) for page in pages for url in LOADED.findall(page.read_text())] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", styles)
