"""The command `mura-course`: make demo data, list and compare runs. Explained in the setup chapter.

Parses arguments, calls one function of the package, prints. Loads a module only for the command that needs
it.
"""

import argparse
import sys
from pathlib import Path

from .errors import MuraError


def main(arguments: list[str] | None = None) -> int:
    """Run `mura-course`; returns the exit code (0 well, 1 an error that is printed in one line)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (MuraError, OSError, ValueError) as error:
        print(f"mura-course: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mura-course", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="render a demo data set in MURA's layout")
    demo.add_argument("--out", type=Path, required=True, help="folder to put MURA-demo into")
    demo.add_argument("--studies", type=int, default=2000, help="train and test together (2000)")
    demo.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    demo.add_argument("--long-side", type=int, default=320, help="longest side of a film in pixels (320)")
    demo.add_argument("--text-free", action="store_true", help="the same films without burned-in text")
    demo.add_argument("--workers", type=int, help="processes (one a core)")
    demo.set_defaults(run=_demo)

    runs = commands.add_parser("runs", help="list finished runs, or compare two of them")
    runs.set_defaults(run=_list_runs)
    actions = runs.add_subparsers(metavar="action")
    diff = actions.add_parser("diff", help="what changed between two runs, or two folders of runs")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.set_defaults(run=_diff_runs)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from .radiographs import write_demo

    text = not options.text_free
    folder = write_demo(options.out, options.studies, options.seed, options.long_side, text, options.workers)
    print(f"{folder}\nTo use it, set MURA_DATA to this folder.")


def _list_runs(options: argparse.Namespace) -> None:
    from . import runs

    table = runs.list_runs()
    print(
        table.to_string() if len(table) else "There are no finished runs yet: they appear as chapters train."
    )


def _diff_runs(options: argparse.Namespace) -> None:
    from . import runs

    print(runs.diff(options.a, options.b).to_string())
