"""Unpacks MURA's zip file as downloaded: inside the target only, whole or not at all.

Knows the archive's layout, not its images: `mura_course.integrity` opens those.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm  # not tqdm.auto: it warns where ipywidgets are missing

from . import data
from .errors import DataError, DataNotFoundError, MuraError

_AGAIN = "Download it again."
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What reading a damaged member raises, besides a wrong checksum: its header and its data may be anything.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


def extract(
    archive: str | os.PathLike, out: str | os.PathLike | None = None, *, progress: bool = True
) -> Path:
    """Unpack MURA's zip file into the new folder `out`/<name of the archive>; returns the data folder in it.

    out: by default the folder that the archive lies in. Folders around the data, nested or not, are left out,
    as are hidden files and what macOS adds. Unpacked into <name>.partial, which is renamed at the end: the
    folder is whole or absent. What a killed run left is unpacked anew.

    Raises DataNotFoundError where the archive is missing or the folder cannot be written, and DataError where
    the archive is no zip file, is encrypted, holds no data in MURA's layout, or paths or links that lead
    outside, or damaged files (by their checksums), or more than there is room for, or where the
    folder exists already.
    """
    archive = Path(os.path.abspath(Path(archive).expanduser()))
    out = Path(os.path.abspath(Path(out).expanduser())) if out else archive.parent
    target = out / archive.stem
    lock = data.cache_dir() / f"unpacking-{hashlib.sha256(os.fsencode(target)).hexdigest()[:12]}.lock"
    if not archive.is_file():
        raise DataNotFoundError(f"The archive {archive} does not exist. Correct its path.")
    try:
        with FileLock(lock, timeout=0), zipfile.ZipFile(archive) as source:
            if os.path.lexists(target):
                raise DataError(f"{target} exists already. Check it, or unpack elsewhere: --out FOLDER.")
            _check_directory(archive, source)
            members = _members(archive, source)
            out.mkdir(parents=True, exist_ok=True)
            _unpack(archive, source, members, out / f"{target.name}.partial", progress)
            os.rename(out / f"{target.name}.partial", target)
    except MuraError:
        raise
    except Timeout as error:
        raise DataError(f"Another process unpacks into {target}. Wait until it has finished.") from error
    except OSError as error:
        problem = f"{archive} cannot be unpacked into {out} ({error.strerror or error})"
        raise DataNotFoundError(
            f"{problem}. Make room there, or choose another folder: --out FOLDER."
        ) from error
    except _DAMAGE as error:
        problem = f"{archive} ({archive.stat().st_size:,} bytes) is no zip file, or lacks its end ({error})"
        raise DataError(f"{problem}. {_AGAIN}") from error
    return data.find_root(target)


def _check_directory(archive: Path, source: zipfile.ZipFile) -> None:
    """DataError where a damaged directory hides files: zipfile passes over them without a word."""
    with open(archive, "rb") as file:
        file.seek(-22 - len(source.comment), os.SEEK_END)
        end = file.read(22)
    stated, listed = int.from_bytes(end[10:12], "little"), len(source.infolist())
    if end.startswith(b"PK\x05\x06") and stated not in (0xFFFF, listed & 0xFFFF):  # FFFF: said elsewhere
        raise DataError(f"{archive} lists {listed:,} of its {stated:,} files: it is damaged. {_AGAIN}")


def _members(archive: Path, source: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by where each goes in the target; DataError before anything is written."""
    members, seen = {}, set()
    for info in source.infolist():
        place = _place(archive, info)
        if place is None:
            continue
        if place.lower() in seen:  # on some systems, upper and lower case name the same file
            raise DataError(f"{archive} holds {info.filename!r} twice. {_AGAIN}")
        seen.add(place.lower())
        members[place] = info
    if not any(re.search(r"(^|/)(train|valid)(_image_paths\.csv$|/XR_)", place) for place in members):
        raise DataError(f"{archive} holds no data in MURA's layout. Name the archive that you downloaded.")
    while all("/" in place for place in members):  # a folder around the data
        tops = {place.partition("/")[0] for place in members}
        if len(tops) > 1 or tops & {*data.SPLITS}:
            break
        members = {place.partition("/")[2]: info for place, info in members.items()}
    return members


def _place(archive: Path, info: zipfile.ZipInfo) -> str | None:
    """Where a file goes; None for a folder, a hidden file, what macOS adds. DataError for an unsafe one."""
    name = info.filename.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    problem = ""
    if name.startswith("/") or ".." in parts or not all(p.isprintable() and ":" not in p for p in parts):
        problem = "leads out of the folder"
    elif stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        problem = "is a link or a device"
    elif info.flag_bits & 1:
        problem = "is encrypted"
    elif info.compress_type not in _METHODS:
        problem = "is packed in a way other than MURA's"
    if problem:
        raise DataError(f"{archive}: {info.filename!r} {problem}; nothing was unpacked. {_AGAIN}")
    if not parts or name.endswith("/") or "__MACOSX" in parts or parts[-1].startswith("."):
        return None
    return "/".join(parts)


def _unpack(archive: Path, source: zipfile.ZipFile, members: dict, partial: Path, progress: bool) -> None:
    """Unpack into the folder `partial`; it is removed where that fails."""
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    # zipfile never writes more than an entry declares, so a bomb cannot grow beyond this sum.
    needed, free = sum(info.file_size for info in members.values()), shutil.disk_usage(partial.parent).free
    if needed > free:
        problem = f"unpacks to {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free in {partial.parent}"
        raise DataError(f"{archive} {problem}. Make room, or choose another folder: --out FOLDER.")
    damaged = []
    try:
        with tqdm(total=needed, desc="Unpacking", unit="B", unit_scale=True, disable=not progress) as bar:
            for place, info in members.items():
                (partial / place).parent.mkdir(parents=True, exist_ok=True)
                with open(partial / place, "xb") as file:
                    try:
                        with source.open(info) as packed:
                            shutil.copyfileobj(packed, file, 1 << 20)
                    except _DAMAGE:
                        damaged.append(place)
                bar.update(info.file_size)
        if damaged:
            few = "".join(f"\n  {place}" for place in damaged[:5])
            raise DataError(
                f"{archive}: {len(damaged):,} of {len(members):,} files are damaged. {_AGAIN}{few}"
            )
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
