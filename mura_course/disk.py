"""Files and folders that are whole or absent: atomic writes, locks, digests, small JSON files.

Every other room writes through this one. Imports only `errors`. Nothing here follows a symbolic link that
stands where a working file or folder is to be made.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import DiskError


@contextlib.contextmanager
def named(path: Path, variable: str = "MURA_CACHE") -> Iterator[None]:
    """Turn the disk's errors into one that names `path`, the reason and the `variable` to set ("": none)."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        remedy = f"set {variable} to another folder" if variable else "name another folder"
        what = f"{path} cannot be written ({error.strerror or error})"
        raise DiskError(f"{what}. Make room or allow writing there, or {remedy}.") from error


@contextlib.contextmanager
def atomic(path: Path, variable: str = "MURA_CACHE") -> Iterator[Path]:
    """Write a file, or make a folder, that is whole or absent.

    Parameters
    ----------
    path : Path
        Where it shall stand in the end. Its folder is made if need be.
    variable : str
        The environment variable that an error about the disk advises to set.

    Yields
    ------
    Path
        A path beside `path`, which does not exist yet: write the file there, or make the folder. When the
        block ends well it is renamed to `path` (an old file there is replaced); else it is removed.

    Raises
    ------
    DiskError
        No room, no permission, or a folder stands at `path` already.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with named(path, variable):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{path.name}.*.part"):  # left by killed processes, one of this number
            with contextlib.suppress(FileNotFoundError):  # its own process has just renamed it
                if old == beside or time.time() - old.lstat().st_mtime > 86_400:  # seconds: a day
                    remove(old)
        try:
            yield beside
            beside.replace(path)
        finally:
            remove(beside)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points at) or a folder; nothing where `path` does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def workdir(path: Path, variable: str = "MURA_CACHE") -> Path:
    """Make or find the folder `path` for work that goes on after a kill; DiskError where it is a link."""
    with named(path, variable):
        path.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise DiskError(f"{path} is a symbolic link. Remove it: work would be written where it leads.")
    return path


@contextlib.contextmanager
def lock(path: Path, variable: str = "MURA_CACHE") -> Iterator[None]:
    """Let one process at a time make `path`; others wait and say so. A killed process lets go of it."""
    with named(path, variable):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(f"Another process is making {path.name}; waiting for it.")
            held.acquire()
    try:
        yield
    finally:
        held.release()


def digest(file: Path, algorithm: str = "sha256") -> str:
    """Hash a file's content, in hexadecimal; `algorithm` as `hashlib.new` takes it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()


def read_bytes(file: Path, most: int = 64 << 20) -> bytes:
    """Read the content of an ordinary file of at most `most` bytes.

    Raises
    ------
    OSError
        The file cannot be read, is larger, or is no ordinary file (reading a pipe would wait for ever).
    """
    info = file.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError("no ordinary file")
    if info.st_size > most:
        raise OSError(f"{info.st_size:,} bytes are too many for an image")
    return file.read_bytes()


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """Read the JSON object in `file`.

    Raises
    ------
    DiskError
        The file does not exist, cannot be read or holds no JSON object; the message ends with `advice`.
    """
    try:
        content = json.loads(read_bytes(file).decode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{file} cannot be read ({reason}). {advice}") from error
    if not isinstance(content, dict):
        raise DiskError(f"{file} holds no JSON object. {advice}")
    return content


def write_json(file: Path, content: dict[str, Any], variable: str = "MURA_CACHE") -> None:
    """Write a JSON object, whole or not at all."""
    with atomic(file, variable) as beside:
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
