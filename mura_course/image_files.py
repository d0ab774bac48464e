"""Opens image files and says which are broken, remembering those that it opened. Used by `integrity.check`.

Judges a file by itself, not by what a data set says of it; writes only its record of opened files.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm  # not tqdm.auto: it warns where ipywidgets are missing

from . import data
from .errors import DataNotFoundError

RECORD_FORMAT = 1  # raise it when `judge` changes: every file is then opened again
SIDES = (32, 4096)  # px; the shortest side seen in MURA is 89, the longest is mostly 512
MAX_BYTES = 64 << 20  # a film has some 100 kB; a larger file is not read into memory

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MODES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with transparency", 6: "RGBA"}
_OTHERS = {b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP", b"version https://git-lfs": "Git LFS"}


def judge(content: bytes) -> tuple[str, str]:
    """What is wrong with an image file of these bytes: (problem, detail), or ("", "") for a sound film.

    First the length and checksum of every chunk (PNG specification, section 5.3), then the pixels are
    decoded: chunks can be sound around pixels that are not, and decoders let some damage pass (Pillow 13
    a missing last chunk, libpng wrong checksums of chunks that hold no pixels).
    """
    if not content:
        return "empty file", ""
    if not content.startswith(_SIGNATURE) and b"IHDR" not in content[:20]:
        if _SIGNATURE.startswith(content):
            return "truncated", f"ends after {len(content)} bytes"
        kind = next((name for start, name in _OTHERS.items() if content.startswith(start)), None)
        return "not a PNG", kind or f"begins with {content[:4].hex(' ')}"
    if broken := _broken_chunk(content):
        return broken
    width, height, depth, mode = struct.unpack_from(">IIBB", content, 16)
    if min(width, height) < SIDES[0] or max(width, height) > SIDES[1]:
        return "unusual size", f"{width:,} x {height:,} px"  # not decoded: it might fill the memory
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        return "damaged", "its pixels cannot be decoded"
    if mode not in (0, 2) or depth != 8:
        return "unusual mode", f"{_MODES[mode]}, {depth} bit"
    return "", ""


def _broken_chunk(content: bytes) -> tuple[str, str] | None:
    """The first chunk of a PNG that is cut short or fails its checksum, in the words of `judge`."""
    if not content.startswith(_SIGNATURE):
        return "damaged", "its first 8 bytes"
    view, start, name = memoryview(content), len(_SIGNATURE), b""
    while name != b"IEND":
        name, stop = content[start + 4 : start + 8], start + 8 + int.from_bytes(content[start : start + 4])
        if stop + 4 > len(content):
            if content[-8:-4] == b"IEND":  # nothing was cut off the file: the length itself is wrong
                return "damaged", f"length of the chunk at byte {start:,}"
            return "truncated", f"ends after {len(content):,} bytes"
        if zlib.crc32(view[start + 4 : stop]) != int.from_bytes(view[stop : stop + 4]):
            return "damaged", f"checksum of the chunk at byte {start:,}"
        if start == len(_SIGNATURE) and (name, stop) != (b"IHDR", start + 21):
            return "damaged", "it does not begin with its size and mode"
        start = stop + 4
    return None


class Verdict(NamedTuple):
    """What `judge` said of a file, with the size (bytes) and time (ns) by which a change is noticed."""

    path: str
    size: int
    time: int
    problem: str
    detail: str
    sha256: str | None


def open_all(
    root: Path,
    paths: list[str],
    *,
    hashed: bool,
    workers: int | None = None,
    progress: bool = True,
    again: bool = False,
) -> tuple[list[Verdict], int]:
    """A verdict on each of `paths` below `root`, and how many files were opened for them.

    A file that an earlier call opened, killed or not, is not opened if it kept its size and time, but for
    damaged ones: mended, they may keep both. hashed: with SHA-256. workers: threads (decoding frees Python's
    lock), by default one a core. again: open all. Raises DataNotFoundError where the record, below
    ``<cache folder>/integrity/``, cannot be written.
    """
    key = hashlib.sha256(os.fsencode(f"{RECORD_FORMAT} {root}")).hexdigest()[:12]
    record = data.cache_dir() / "integrity" / f"{root.name}-{key}.jsonl"
    lock, opened = threading.Lock(), 0
    try:
        record.parent.mkdir(exist_ok=True)
        known = {} if again else _remembered(record)
        with (
            open(record, "w" if again else "a", buffering=1, encoding="utf-8") as lines,  # a line, a write
            ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
            tqdm(total=len(paths), desc="Opening images", unit="image", disable=not progress) as bar,
        ):
            lines.write("\n")  # a kill may have left half a line

            def work(path: str) -> Verdict:
                nonlocal opened
                verdict = _open(str(root), path, hashed, old := known.get(path))
                with lock:
                    if verdict is not old:
                        opened += 1
                        if verdict.problem not in ("damaged", "unreadable"):
                            lines.write(json.dumps(verdict) + "\n")
                    bar.update()
                return verdict

            return list(pool.map(work, paths)), opened
    except OSError as error:
        raise DataNotFoundError(
            f"The record of opened files {record} cannot be written ({error.strerror or error}). Make room, "
            "or set the environment variable MURA_CACHE to another folder."
        ) from error


def _remembered(record: Path) -> dict[str, Verdict]:
    known = {}
    text = record.read_text(encoding="utf-8", errors="replace") if record.is_file() else ""
    for line in text.splitlines():
        try:
            verdict = Verdict(*json.loads(line))
        except (ValueError, TypeError):  # half a line: its file is opened again
            continue
        known[verdict.path] = verdict
    return known


def _open(root: str, path: str, hashed: bool, known: Verdict | None) -> Verdict:
    """Judge one file, or return what is `known` of it if it has not changed."""
    file = os.path.join(root, path)
    try:
        info = os.stat(file)
        stamp = (path, info.st_size, info.st_mtime_ns)
        if known and known[:3] == stamp and (known.sha256 or not hashed):
            return known
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            return Verdict(*stamp, "unreadable", "no ordinary file", None)
        if info.st_size > MAX_BYTES:
            return Verdict(*stamp, "unusual size", f"{info.st_size:,} bytes", None)
        with open(file, "rb") as opened:
            content = opened.read()
    except OSError as error:
        return Verdict(path, 0, 0, "unreadable", error.strerror or str(error), None)
    return Verdict(*stamp, *judge(content), hashlib.sha256(content).hexdigest() if hashed else None)
