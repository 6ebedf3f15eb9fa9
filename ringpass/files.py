"""Files that several jobs may write at once: whole or not at all, and never through a link.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(folder, "graph0/plan.txt", "2 ranks")
    ...     read_text(f"{folder}/graph0/plan.txt")
    '2 ranks'

Contract of `write_text`: a reader finds the old text or the new one, never a part, whatever else writes the file and
whenever the process dies.  Below the root, which the user names, no link is followed: folders and files that are links,
put there by somebody else, are refused or replaced.  The file gets the permissions of any new file.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path, PurePosixPath

from ringpass.errors import InputError

MOST_BYTES = 64 << 20
"""The longest text that `read_text` reads, unless told otherwise."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_text(root: str | Path, name: str, text: str) -> None:
    """Writes `text` to the file `name`, a relative path such as "graph0/rank1/plan.txt", below the folder `root`.

    Makes folders that are missing.  Raises InputError for a name that leads elsewhere, or through a link; OSError where
    the system refuses (no space, no permission, a file in the place of a folder).
    """
    write_bytes(root, name, text.encode())


def write_bytes(root: str | Path, name: str, data: bytes) -> None:
    """Writes `data`, as `write_text` does a text."""
    *folders, last = _parts(name)
    Path(root).mkdir(parents=True, exist_ok=True)
    with _opened(root, folders) as folder:
        temporary = f".{last}.{os.getpid()}.{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(temporary, _NEW, 0o666, dir_fd=folder), "wb") as file:
                file.write(data)
            os.replace(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def check_writable(path: str | Path) -> None:
    """Raises OSError if the file `path` cannot be written, for want of a folder, of permission or of space."""
    if Path(path).is_dir():
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    probe = f"{Path(path).name[:100]}.{os.getpid()}.{secrets.token_hex(8)}"
    write_bytes(Path(path).parent, probe, b"\n")
    (Path(path).parent / probe).unlink()


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file of at most `most` bytes.

    Raises InputError for a longer one, for one that is not text in UTF-8, and for pipes and devices, which may never
    end; OSError where the system refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path} must be a regular file, and is none: pass the path of a file")
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path} must have at most {most} bytes, and has more: it is not what ringpass writes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be text in UTF-8: {error}") from error


def _parts(name: str) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or name.endswith("/"):
        raise InputError(f"a file's name must be a relative path without '..', got {name!r}")
    return parts


@contextmanager
def _opened(root: str | Path, folders: list[str]) -> Iterator[int]:
    """The descriptor of a folder below `root`, made where it is missing; links below `root` are refused."""
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            with suppress(FileExistsError):
                os.mkdir(folder, dir_fd=here)
            if stat.S_ISLNK(os.stat(folder, dir_fd=here, follow_symlinks=False).st_mode):
                raise InputError(f"{folder!r} in {root} is a link, which ringpass does not follow: remove it")
            inner = os.open(folder, _FOLDER, dir_fd=here)
            os.close(here)
            here = inner
        yield here
    finally:
        os.close(here)
