"""Build the book for one profile: prepare the data, execute what changed, render, say where the time went.

What `make book` runs, in the environment that it made. Reads the repository; writes `_build/<profile>/`
and, through `mura_course`, the cache folder. Ends with exit code 1 where a cell or a page failed.

Jupyter Book keys its execution cache on a notebook's code alone. So every profile has an output folder of
its own, and the executions in it are dropped when anything else that they depend on has changed: the
package, the versions of the libraries, the data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PAGE_SOURCES = ("book", "_static", "_ext", "_config.yml", "_toc.yml", "scripts/build_book.py")
PACKAGE_SOURCES = ("mura_course", "constraints.txt")


def main(arguments: list[str] | None = None) -> int:
    """Parse `arguments`, build, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time at which `make` began")
    parser.add_argument("--install-stamp", type=Path, help="file that holds the seconds of the last install")
    options = parser.parse_args(arguments)
    profile = os.environ.setdefault("MURA_PROFILE", "demo")
    times = {"install": _install_seconds(options.install_stamp, options.started)}

    began = time.time()
    fingerprint = prepare_data()
    times["data"] = time.time() - began

    build = Build(TOP / "_build" / profile, fingerprint)
    began = time.time()
    failures = build.run()
    executed, cached = build.executions(since=began)
    times |= executed
    times["render"] = time.time() - began - sum(executed.values())
    times["total"] = time.time() - min(options.started, began)
    print_times(times, cached)
    if failures:
        print(f"\nThe book is NOT complete (profile {profile}):", *failures, sep="\n  ", file=sys.stderr)
        return 1
    print(f"\nThe book is ready (profile {profile}). Open in a browser:\n  {build.first_page}")
    return 0


def prepare_data() -> str:
    """Do what a chapter's setup cell does, rendering the demo data if need be; the data's fingerprint."""
    from mura_course import chapter, data
    from mura_course.errors import MuraError

    try:
        _, index = chapter.start()
    except MuraError as error:
        sys.exit(f"\n{error}")
    return f"{index.attrs['root']} {data.fingerprint(index)}"


class Build:
    """One output folder: what lies in it, whether that is still current, and how to make it anew."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.output = folder / "_build"  # where Jupyter Book puts everything
        self.state_file = folder / "state.json"
        self.execution_key = digest(PACKAGE_SOURCES, fingerprint, sys.version)
        self.page_key = digest(PAGE_SOURCES, self.execution_key)

    @property
    def first_page(self) -> Path:
        return self.output / "html" / "index.html"

    def run(self) -> list[str]:
        """Bring the pages up to date; a line for each failure, none for a complete book."""
        state = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        if state.get("pages") == self.page_key and self.first_page.exists():
            print("Nothing has changed since the last build.")
            return []
        stale = set(self.output.glob("*"))
        if state.get("executions") == self.execution_key:
            stale.discard(self.output / ".jupyter_cache")
        for path in stale:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write_state(executions=self.execution_key)
        failures = self._jupyter_book()
        if not failures:
            self._write_state(executions=self.execution_key, pages=self.page_key)
        return failures

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
        environment = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"}  # this environment's kernel, no other
        environment.pop("MPLBACKEND", None)  # a backend set outside would leave the pages without figures
        code = subprocess.run(command, cwd=TOP, env=environment).returncode
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

    def _write_state(self, **keys: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.state_file.with_suffix(".part")
        part.write_text(json.dumps(keys, indent=1) + "\n")
        os.replace(part, self.state_file)


def digest(sources: Iterable[str], *more: str) -> str:
    """SHA-256 of the names and contents of all files in `sources` (relative to the top), and of `more`."""
    total = hashlib.sha256("\n".join(more).encode())
    for source in sources:
        path = TOP / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(file.parts):
                total.update(f"\0{file.relative_to(TOP).as_posix()}\0".encode())
                total.update(file.read_bytes())
    return total.hexdigest()


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
