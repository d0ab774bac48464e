"""Where things lie: cache, recorded runs; how a path is shown to a reader; the cores.

Imports nothing of the package and writes nothing. The setup chapter explains `MURA_CACHE`.
"""

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """Find the folder for everything that can be made again: ``MURA_CACHE``, else the user's cache folder.

    An absolute path; who writes there makes it, and says so where that is impossible.
    """
    chosen = os.environ.get("MURA_CACHE", "").strip()
    return absolute(chosen or user_cache_dir("mura-course"))


def recorded_runs() -> Path:
    """Return the recorded runs' folder: ``book/_runs`` of a checkout, or its copy in an installed package."""
    installed = Path(__file__).with_name("_runs")
    return installed if installed.is_dir() else installed.parents[1] / "book" / "_runs"


def cores() -> int:
    """Cores that this process may use, which in a container may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def absolute(path: str | os.PathLike) -> Path:
    """`path` as an absolute path with ``~`` expanded; symbolic links are kept as they are."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - Path.resolve follows links


def short_path(path: str | os.PathLike) -> str:
    """`path` with the home folder written ``~``, for printing."""
    path, home = Path(path), Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)
