"""Files are written whole, never through links, by several jobs at once; what is read is bounded."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from ringpass.errors import InputError
from ringpass.files import read_text, write_text

LONG = 200_000


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def test_a_text_replaces_the_one_before(tmp_path: Path) -> None:
    before = descriptors()
    for text in ("one", "two, in ümläuts"):
        write_text(tmp_path / "made", "graph0/rank1/plan.txt", text)
        assert read_text(tmp_path / "made/graph0/rank1/plan.txt") == text
    assert [path.name for path in (tmp_path / "made/graph0/rank1").iterdir()] == ["plan.txt"]
    assert descriptors() == before


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    write_text(tmp_path, "written", "")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a/", "a\0b", "."])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="relative path"):
        write_text(tmp_path, name, "")


def test_links_to_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump/graph0").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="'graph0' in .* is a link"):
        write_text(tmp_path / "dump", "graph0/plan.txt", "text")
    assert not list((tmp_path / "victim").iterdir())


def test_links_to_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "plan.txt").symlink_to(tmp_path / "victim")
    write_text(tmp_path, "plan.txt", "text")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "plan.txt").is_symlink() and read_text(tmp_path / "plan.txt") == "text"


def test_the_root_may_be_a_link_as_its_user_made_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "plan.txt", "text")
    assert read_text(tmp_path / "real/plan.txt") == "text"


def test_a_write_that_fails_leaves_the_old_text_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path, "plan.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path, "plan.txt", "new \ud800")
    assert read_text(tmp_path / "plan.txt") == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_place_of_a_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "graph0").write_text("")
    with pytest.raises(NotADirectoryError):
        write_text(tmp_path, "graph0/plan.txt", "")


def write_often(root: Path, text: str) -> None:
    for _ in range(40):
        write_text(root, "graph0/plan.txt", text)


def test_readers_see_whole_texts_while_several_jobs_write(tmp_path: Path) -> None:
    write_text(tmp_path, "graph0/plan.txt", "a" * LONG)
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=write_often, args=(tmp_path, x * LONG)) for x in "ab"]
    for job in jobs:
        job.start()
    threads = [threading.Thread(target=write_often, args=(tmp_path, x * LONG)) for x in "cd"]
    for thread in threads:
        thread.start()
    seen = 0
    while seen < 50 or any(job.is_alive() for job in jobs):
        text = read_text(tmp_path / "graph0/plan.txt")
        assert len(text) == LONG and len({*text}) == 1
        seen += 1
    for thread in threads:
        thread.join()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert [path.name for path in (tmp_path / "graph0").iterdir()] == ["plan.txt"]


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(InputError, match="at most 10 bytes"):
        read_text(tmp_path / "long", most=10)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_text(tmp_path / "binary")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="regular file"):
            read_text(path)
