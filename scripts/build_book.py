"""Build the book: prepare the data, execute chapters, render pages, say where the time went, fail if one did.

Executes chapters side by side into the cache of executions, then runs `jupyter-book build`, which takes them
from there, and reads what it reports; the exit code is 1 if a cell or a page failed. Every profile has an
output folder of its own. Which earlier executions still hold is the business of `_ext/execution_cache.py`;
nothing at all is done where no source of a page has changed either.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.executors.basic import ExecutionWorkerLocalSerial, ProcessData

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "_ext"))

from execution_cache import FOLDER, digest, execution_key, finished_runs  # noqa: E402 - it lies beside, not in a package

PAGE_SOURCES = ("book", "_static", "_ext", "_config.yml", "_toc.yml", "scripts/build_book.py")
# Jupyter Book executes these while it reads the pages: chapter 4 because its subject is speed, which other
# work on the machine would disturb, and the results because they show what the chapters have trained.
ALONE = ("04_input_pipelines", "results")
TIMEOUT = 14400  # seconds a cell, as in _config.yml


def main(arguments: list[str] | None = None) -> int:
    """Parse `arguments`, build, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time at which `make` began")
    parser.add_argument("--install-stamp", type=Path, help="file that holds the seconds of the last install")
    options = parser.parse_args(arguments)
    profile = os.environ.setdefault("MURA_PROFILE", "demo")
    times = {"install": _install_seconds(options.install_stamp, options.started)}

    began = time.time()
    key = prepare_data()
    times["data"] = time.time() - began

    build = Build(TOP / "_build" / profile, key)
    began = time.time()
    failures = build.run()
    executed, cached = build.executions(since=began)
    times |= executed
    ahead = {page: seconds for page, seconds in executed.items() if Path(page).name not in build.ahead}
    times["render"] = time.time() - began - build.seconds_ahead - sum(ahead.values())
    times["total"] = time.time() - min(options.started, began)
    print_times(times, cached)
    if failures:
        print(f"\nThe book is NOT complete (profile {profile}):", *failures, sep="\n  ", file=sys.stderr)
        return 1
    print(f"\nThe book is ready (profile {profile}). Open in a browser:\n  {build.first_page}")
    return 0


def prepare_data() -> str:
    """Do what a chapter's setup cell does, rendering the demo data if need be; what results depend on."""
    from mura_course.errors import MuraError

    try:
        return execution_key()
    except (MuraError, OSError, ValueError) as error:
        sys.exit(f"\n{error}")


class Build:
    """One output folder: whether its pages are still current, and how to make them anew."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.output = folder / "_build"  # where Jupyter Book puts everything
        self.stamp = folder / "pages"
        self.key = digest([TOP / source for source in PAGE_SOURCES], key)
        self.cache = self.output / FOLDER / key  # `_ext/execution_cache.py` gives it to Jupyter Book, too
        self.ahead: list[str] = []  # names of the notebooks executed side by side
        self.seconds_ahead = 0.0

    @property
    def first_page(self) -> Path:
        return self.output / "html" / "index.html"

    def run(self) -> list[str]:
        """Bring the pages up to date; a line for each failure, none for a complete book."""
        if self.first_page.exists() and self.stamp.exists() and self.stamp.read_text() == self.state():
            print("Nothing has changed since the last build.")
            return []
        self.stamp.unlink(missing_ok=True)
        for path in set(self.output.glob("*")) - {self.output / FOLDER}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        began = time.time()
        notebooks = [path for path in sorted((TOP / "book").glob("*.ipynb")) if path.stem not in ALONE]
        self.ahead = execute_ahead(notebooks, self.cache)
        self.seconds_ahead = time.time() - began
        failures = self._jupyter_book()
        if not failures:
            self.stamp.write_text(self.state())
        return failures

    def state(self) -> str:
        """What the pages are made of: sources, what executions depend on, and the runs that are finished."""
        return digest([], self.key, *finished_runs())

    def executions(self, since: float) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of each notebook: those executed after the Unix time `since`, and those from the cache."""
        executed, cached = {}, {}
        for page, record in self._report().items():
            (executed if record["finished"] >= since else cached)[page] = record["seconds"] or 0.0
        return executed, cached

    def _jupyter_book(self) -> list[str]:
        """Run Jupyter Book, reading every page anew (executions come from its cache); what failed.

        Its incremental mode is not used: it forgets the warnings of pages that it does not read again, and
        leaves old navigation in pages that did not change.
        """
        command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(TOP)]
        command += ["--path-output", str(self.folder), "--all", "-n", "-W", "--keep-going"]
        with environment_of_kernels():
            code = subprocess.run(command, cwd=TOP, env=dict(os.environ)).returncode
        failures = [
            f"{page}: {record['error']}, see {self.output / 'html' / 'reports' / page}.err.log"
            for page, record in self._report().items()
            if not record["succeeded"]
        ]
        if code and not failures:
            failures.append(f"Jupyter Book found errors or warnings (exit code {code}), see above.")
        return failures

    def _report(self) -> dict[str, dict]:
        report = self.output / "executions.json"
        return json.loads(report.read_text()) if report.exists() else {}


def execute_ahead(notebooks: list[Path], folder: Path) -> list[str]:
    """Execute into the cache in `folder` what is not in it, two notebooks at a time; names of those done.

    A framework takes all the memory of a GPU, so with a GPU they go one after the other, as on a single core.
    One that fails is not cached: Jupyter Book executes it again, and reports it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = get_cache(str(folder))
    records: list[Any] = [cache.add_nb_to_project(str(path)) for path in notebooks]
    todo = [record for record in records if cache.get_cached_project_nb(record.uri) is None]
    cores, workers = os.cpu_count() or 1, 1
    changes = {}
    if cores > 1 and len(todo) > 1 and not has_gpu():
        workers = 2  # with threads of their own on every core, the two would wait for one another
        changes = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), str(cores // 2))

    def execute(record: Any) -> str | None:
        began, name = time.time(), Path(record.uri).stem
        code, _ = ExecutionWorkerLocalSerial(logging.getLogger(__name__))(
            ProcessData(record.pk, record.uri, cache, TIMEOUT, allow_errors=False)
        )
        print(f"{'FAILED:' if code else 'Executed'} {name}, {time.time() - began:.0f} s", flush=True)
        return None if code else name

    with environment_of_kernels(**changes), ThreadPoolExecutor(workers) as pool:
        return [name for name in pool.map(execute, todo) if name]


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


@contextmanager
def environment_of_kernels(**changes: str) -> Iterator[None]:
    """This environment's kernel, drawing into the page whatever backend is set outside; then as before."""
    before = dict(os.environ)
    os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1"} | changes
    os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def print_times(times: dict[str, float], cached: dict[str, float]) -> None:
    """A line per step, then the notebooks whose results were taken from earlier executions."""
    print("\nWhere the time went                         seconds")
    for step, seconds in times.items():
        print(f"  {step:<40}{seconds:>9.1f}")
    for page, seconds in cached.items():
        print(f"  {page:<40}{'-':>9}  executed earlier, in {seconds:.1f} s")


def _install_seconds(stamp: Path | None, started: float) -> float:
    """What the Makefile wrote into its stamp, if it did so in this run."""
    if stamp is None or not stamp.exists() or stamp.stat().st_mtime < started:
        return 0.0
    return float(stamp.read_text() or 0)


if __name__ == "__main__":
    sys.exit(main())
