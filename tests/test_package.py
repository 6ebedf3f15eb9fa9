"""What users install: the sdist and the wheel hold every module, and the wheel works by itself.

`ringpass/passes` is a symlink in a checkout, so a wheel is built from the checkout and one from the unpacked sdist.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.repository import ROOT

IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
REPORT = """
import importlib.metadata, json, torch
import ringpass.backend
from ringpass.passes.lower.codegen import source_files

entry_points = importlib.metadata.distribution("ringpass").entry_points
(entry,) = entry_points.select(group="torch_dynamo_backends")
(script,) = entry_points.select(group="console_scripts")
print(json.dumps({
    "sources": [str(path) for path in source_files()],
    "script": [script.name, script.load().__module__],
    "entry": [entry.name, entry.load() is ringpass.backend.ring_dilated],
    "backends": torch._dynamo.list_backends(),
}))
"""


def python(*command: str, folder: Path, path: Path | None = None) -> str:
    """What Python prints, run in `folder` with `path` to import from."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([sys.executable, "-P", *command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def build(what: str, source: Path, out: Path) -> Path:
    """The file that setuptools builds from a source tree: `build_sdist` or `build_wheel`, without a network."""
    python("-c", BUILD, what, str(out), folder=source)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, for builds leave files behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "tree", symlinks=True, ignore=IGNORED))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    archive, folder = build("build_sdist", checkout, tmp_path_factory.mktemp("built")), tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as tar:
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and newer
        tar.extractall(folder, **safely)
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from either source."""
    source: Path = request.getfixturevalue(request.param)
    archive, folder = build("build_wheel", source, tmp_path_factory.mktemp("built")), tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(archive).extractall(folder)
    return folder


def files(folder: Path, name: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(name)}


def package_modules() -> set[str]:
    """The modules of the repository's package as paths, those of ringpass/passes included."""
    found = {"ringpass": files(ROOT / "ringpass", "*.py"), "ringpass/passes": files(ROOT / "passes", "*.py")}
    return {f"{folder}/{name}" for folder, names in found.items() for name in names}


def test_sdist_holds_every_module(sdist: Path) -> None:
    """And, as setuptools adds them to any sdist, the test files at the top of tests/."""
    assert {name for name in files(sdist, "*.py") if not name.startswith("tests/")} == package_modules()
    assert files(sdist, "py.typed") == {"ringpass/py.typed"}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= files(sdist, "*")


def test_wheel_holds_every_module_and_no_tests(wheel: Path) -> None:
    assert files(wheel, "*.py") == package_modules()
    assert files(wheel, "py.typed") == {"ringpass/py.typed"}


@pytest.mark.parametrize("wheel", ["sdist"], indirect=True)
def test_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    """From a folder outside the repository: the imports, the sources in the cache key, the backend's entry point."""
    report = json.loads(python("-c", REPORT, folder=tmp_path, path=wheel))
    assert report["sources"] == sorted(str(wheel.resolve() / name) for name in package_modules())
    assert report["script"] == ["ringpass", "ringpass.__main__"]
    assert report["entry"] == ["ring_dilated", True]
    assert "ring_dilated" in report["backends"]
