"""Build the book: prepare the data, execute chapters, render pages, say where the time went, fail if one did.

Runs `jupyter-book build` and reads what it reports; the exit code is 1 if a cell or a page failed. Every
profile has an output folder of its own. Which earlier executions still hold is the business of
`_ext/execution_cache.py`; nothing at all is done where no source of a page has changed either.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "_ext"))

from execution_cache import FOLDER, digest, execution_key  # noqa: E402 - it lies beside, not in a package

PAGE_SOURCES = ("book", "_static", "_ext", "_config.yml", "_toc.yml", "scripts/build_book.py")


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
    times["render"] = time.time() - began - sum(executed.values())
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

    @property
    def first_page(self) -> Path:
        return self.output / "html" / "index.html"

    def run(self) -> list[str]:
        """Bring the pages up to date; a line for each failure, none for a complete book."""
        if self.first_page.exists() and self.stamp.exists() and self.stamp.read_text() == self.key:
            print("Nothing has changed since the last build.")
            return []
        self.stamp.unlink(missing_ok=True)
        for path in set(self.output.glob("*")) - {self.output / FOLDER}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        failures = self._jupyter_book()
        if not failures:
            self.stamp.write_text(self.key)
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
