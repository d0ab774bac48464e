"""The command `mura-course`: demo data, checks of data, text removal, runs. See the setup chapter.

Parses arguments, calls one function of the package, prints. Loads a module only for the command that needs
it.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import __version__
from .errors import MuraError, RunError, printable


def main(arguments: list[str] | None = None) -> int:
    """Run `mura-course`; returns the exit code: 0 well, 1 an error that is printed, or data with problems."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("run")
    try:
        return command(**options) or 0
    except (MuraError, OSError, ValueError) as error:
        print(f"mura-course: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mura-course: interrupted; the same command goes on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mura-course", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"mura-course {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="render a demo data set in MURA's layout")
    demo.add_argument("--out", type=Path, required=True, help="folder to put MURA-demo into")
    demo.add_argument("--studies", type=int, default=2000, help="train and test together (2000)")
    demo.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    demo.add_argument("--long-side", type=int, default=320, help="longest side in pixels (320)")
    demo.add_argument("--workers", type=int, help="processes (one a core)")
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="compare a data set with what MURA v1.1 must hold")
    check.add_argument("data", type=Path, metavar="FOLDER_OR_ZIP", help="data, or MURA's zip as downloaded")
    check.add_argument("--out", type=Path, metavar="FOLDER", help="unpack a zip there (beside it)")
    check.set_defaults(run=_check)

    text = commands.add_parser("remove-text", help="copy a data set, without the text in its films")
    text.add_argument("data", type=Path, metavar="IN", help="data folder, which stays as it is")
    text.add_argument("out", type=Path, metavar="OUT", help="new folder; a call that was killed continues")
    text.add_argument("--detector", default="rapidocr", help="rapidocr (default), strokes or keras-ocr")
    text.set_defaults(run=_remove_text)

    runs = commands.add_parser("runs", help="list finished runs, make recorded ones anew")
    runs.set_defaults(run=_runs)
    actions = runs.add_subparsers(metavar="action")
    actions.add_parser("list", help="one's own runs and the recorded ones (also without an action)")
    diff = actions.add_parser("diff", help="what differs between two runs")
    diff.add_argument("a", type=Path, help="folder of a run")
    diff.add_argument("b", type=Path, help="folder of another")
    verify = actions.add_parser("verify", help="train the cheapest recorded runs anew, and compare")
    verify.add_argument("--name", default="", help="of one recorded run")
    verify.set_defaults(run=_verify)
    return parser


def _demo(**order: Any) -> None:
    import mura_demo

    from .paths import cache_dir

    folder = mura_demo.write_demo(**order, cache=cache_dir())
    print(f"{folder}\nTo use it, set MURA_DATA to this folder.")


def _check(data: Path, out: Path | None) -> int:
    from .data import check

    if data.is_file():
        data = check.extract(data, out)
    elif out:
        raise ValueError(f"--out says where to unpack a zip file, and {data} is none. Leave it out.")
    table = check.check(data)
    print(check.report(table))
    return 0 if table.empty else 1


def _remove_text(data: Path, out: Path, detector: str) -> None:
    from .text import clean_dataset

    record = clean_dataset(data, out, detector)
    found = f"{record['films']:,} films, text found in {record['films_with_text']:,}"
    print(f"{out}: {found}. To use it, set MURA_DATA to this folder.")


def _runs(a: Path | None = None, b: Path | None = None) -> None:
    from . import runs

    table = runs.diff(a, b) if a and b else runs.list_runs()
    print(printable(table.to_string()) if len(table) else "Nothing: no runs yet, or no difference.")


def _verify(name: str) -> int:
    """Let ``scripts/make_runs.py`` train recorded runs anew and compare; its exit code."""
    from .paths import recorded_runs

    script = recorded_runs().parents[1] / "scripts" / "make_runs.py"
    if not script.is_file():
        raise RunError("Verifying needs the book's repository: clone it, and call the command there.")
    return subprocess.run([sys.executable, script, "--verify", "--only", name]).returncode
