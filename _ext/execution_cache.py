"""Sphinx extension: a page never shows results of another profile, package or data set.

Jupyter Book looks for a notebook's earlier execution by the notebook's code alone. Here every build, whoever
calls it, takes a cache folder named by everything else that the results depend on: profile, package,
libraries, data, recorded runs. A changed folder makes Sphinx read all pages anew. Renders demo data where
there are none. The page of results depends on the reader's finished runs, too. It takes seconds, so it is
read and executed (`execution_mode` in its metadata) in every build, after the chapters, which sort first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from sphinx.errors import ExtensionError

PACKAGES = ("mura_course", "mura_demo")
EXTRAS = ("", "keras", "torch", "text", "keras-ocr")  # those whose libraries chapters run on
KEPT = 4  # caches of as many profiles, data sets or versions of the package stay
FOLDER = ".jupyter_cache"
RESULTS = "book/results"


def setup(app) -> dict[str, Any]:
    """Register the handler. Sphinx compares the settings with those of the last build after this event."""
    app.connect("config-inited", choose_cache)
    app.connect("env-get-outdated", lambda *_: [RESULTS])  # to be read anew, if the book has it
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def choose_cache(app, config) -> None:
    """Point myst-nb at this build's cache; remove all but the latest few; ExtensionError without data."""
    from mura_course.errors import MuraError

    caches = Path(config.nb_execution_cache_path or Path(app.outdir).parent / FOLDER).resolve()
    try:
        cache = caches / execution_key()
    except (MuraError, OSError, ValueError) as error:
        raise ExtensionError(str(error)) from error
    cache.mkdir(parents=True, exist_ok=True)
    os.utime(cache)
    others = sorted(path for path in caches.iterdir() if path.is_dir() and path != cache)
    for old in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(old)
    config.nb_execution_cache_path = str(cache)


def execution_key() -> str:
    """Name, in 16 hexadecimal digits, everything but a notebook's code that its results depend on."""
    from mura_course import chapter, data, paths

    profile, index = chapter.start()
    folders = [Path(spec.origin).parent for name in PACKAGES if (spec := find_spec(name)) and spec.origin]
    values = [
        profile.name,
        index.attrs["root"],
        data.fingerprint(index),
        sys.version,
        *versions_of_libraries(),
    ]
    values.append(f"recorded runs ignored: {os.environ.get('MURA_RUNS') == 'new'}")
    recorded = sorted(paths.recorded_runs().glob(f"*/{profile.name}/[!.]*/run.json"))
    return digest([*folders, *recorded], *values)[:16]


def finished_runs() -> list[str]:
    """Name the finished runs, the reader's own and the recorded ones."""
    from mura_course import runs

    table = runs.list_runs()
    finished = table[table["state"].eq("finished")]  # an interrupted run has no such time
    return sorted(finished["run"] + finished["finished"])


def versions_of_libraries() -> list[str]:
    """Name and version of each library that the package asks for, or "absent" instead of the version."""
    found = set()
    for requirement in map(Requirement, requires("mura-course") or []):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            continue
        try:
            found.add(f"{requirement.name} {version(requirement.name)}")
        except PackageNotFoundError:
            found.add(f"{requirement.name} absent")
    return sorted(found)


def digest(paths: list[Path], *more: str) -> str:
    """SHA-256 of the names and contents of all files in or at `paths`, and of `more`; dates do not count."""
    total = hashlib.sha256("\n".join(more).encode())
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(file.parts):
                total.update(f"\0{file.relative_to(path.parent).as_posix()}\0".encode())
                total.update(file.read_bytes())
    return total.hexdigest()
