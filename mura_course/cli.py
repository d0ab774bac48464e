"""The command `mura-course`: demo data, checks of data, text removal, lists of runs. See the setup chapter.

Parses arguments, calls one function of the package, prints. Loads a module only for the command that needs
it.
"""

import argparse
import sys
from pathlib import Path

from . import __version__
from .errors import MuraError, printable


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


def _number(text: str) -> int:
    """Read a whole number of 1 or more, for argparse, which prints the message."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mura-course", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"mura-course {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="render a demo data set in MURA's layout")
    demo.add_argument("--out", type=Path, required=True, help="folder to put MURA-demo into")
    demo.add_argument("--studies", type=_number, default=2000, help="train and test together (2000)")
    demo.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    demo.add_argument("--long-side", type=_number, default=320, help="longest side in pixels (320)")
    demo.add_argument(
        "--text-free", dest="text", action="store_false", help="the same films without burned-in text"
    )
    demo.add_argument("--workers", type=_number, help="processes (one a core)")
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="compare a data set with what MURA v1.1 must hold")
    check.add_argument("data", type=Path, metavar="FOLDER_OR_ZIP", help="data, or MURA's zip as downloaded")
    check.add_argument("--out", type=Path, metavar="FOLDER", help="unpack a zip there (beside it)")
    check.add_argument("--workers", type=_number, help="threads (one a core)")
    check.set_defaults(run=_check)

    text = commands.add_parser("remove-text", help="copy a data set, without the text in its films")
    text.add_argument("data", type=Path, metavar="IN", help="data folder, which stays as it is")
    text.add_argument("out", type=Path, metavar="OUT", help="new folder; a call that was killed continues")
    text.add_argument("--detector", default="rapidocr", help="rapidocr (default), strokes or keras-ocr")
    text.add_argument("--workers", type=_number, help="processes (two)")
    text.set_defaults(run=_remove_text)

    runs = commands.add_parser("runs", help="list finished runs, or compare two of them")
    runs.set_defaults(run=_list_runs)
    actions = runs.add_subparsers(metavar="action")
    diff = actions.add_parser("diff", help="what changed between two runs, or two folders of runs")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.set_defaults(run=_diff_runs)
    return parser


def _demo(out: Path, studies: int, seed: int, long_side: int, text: bool, workers: int | None) -> None:
    import mura_demo

    from .paths import cache_dir

    folder = mura_demo.write_demo(out, studies, seed, long_side, text, workers, cache=cache_dir())
    print(f"{folder}\nTo use it, set MURA_DATA to this folder.")


def _check(data: Path, out: Path | None, workers: int | None) -> int:
    from .data import check

    folder = data.expanduser()
    if folder.is_file():
        folder = check.extract(folder, out)
    elif out:
        raise ValueError(f"--out says where to unpack a zip file, and {folder} is none. Leave it out.")
    table = check.check(folder, workers=workers)
    print(check.report(table))
    return 0 if table.empty else 1


def _remove_text(data: Path, out: Path, detector: str, workers: int | None) -> None:
    from .text import clean_dataset

    record = clean_dataset(data, out, detector, workers)
    found = f"found text in {record['films_with_text']:,}, in {record['boxes']:,} boxes"
    print(f"{out}: {record['films']:,} films; the detector {detector} {found}.")
    print("To use it, set MURA_DATA to this folder.")


def _list_runs() -> None:
    from . import runs

    table = runs.list_runs()
    print(table.to_string() if len(table) else "There are no runs yet: they appear as chapters train.")


def _diff_runs(a: Path, b: Path) -> None:
    from . import runs

    print(runs.diff(a, b).to_string())
