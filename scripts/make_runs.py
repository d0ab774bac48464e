"""Make the recorded runs in book/_runs: execute the chapters with MURA_RUNS=record, and report what exists.

A run that exists is found and one that was interrupted goes on, so the script can be stopped and started
again. With --only, other runs that are to be recorded and do not exist are left out. Where a run is left out
or a statement fails, what needs its result is skipped and the rest is executed, each chapter in a kernel of
its own. Exit code 1 where a statement failed.

With --verify (as `mura-course runs verify`), the cheapest recorded run of each framework is trained anew in a
temporary folder, nothing is recorded, and both AUROCs are compared: exit code 1 where they are too far apart.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import symtable
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from mura_course import data, paths, profiles, runs
from mura_course.recipes import Recipe, Stage

SECONDS, TOLERANCE = 90, 0.03  # of --verify: the longest training, the largest difference of AUROCs
GROWING = ("append", "extend", "add", "update")  # methods that change what they are called on
BOOK = Path(__file__).resolve().parent.parent / "book"

# Runs in the kernel before a chapter: loops and comprehensions go on after a run that is left out.
GO_ON = f"""
def _setup():
    import ast
    from IPython import get_ipython

    def is_left_out(error):
        if {runs.LEFT_OUT!r} not in str(error):
            return False
        print(error)
        return True

    def kept(make):
        try:
            return [make()]
        except Exception as error:
            if not is_left_out(error):
                raise
            return []

    class GoOn(ast.NodeTransformer):
        def visit_For(self, node):
            self.generic_visit(node)
            frame = ast.parse(
                "try: pass\\nexcept Exception as _error:\\n    if not _is_left_out(_error): raise"
            ).body[0]
            frame.body = node.body
            node.body = [frame]
            return node

        def comprehension(self, node):
            self.generic_visit(node)
            part = "value" if isinstance(node, ast.DictComp) else "elt"
            empty = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            call = ast.parse("_kept(0)", mode="eval").body
            call.args = [ast.Lambda(empty, getattr(node, part))]
            setattr(node, part, ast.Name("_value", ast.Load()))
            node.generators.append(ast.comprehension(ast.Name("_value", ast.Store()), call, [], 0))
            return node

        visit_ListComp = visit_DictComp = visit_SetComp = visit_GeneratorExp = comprehension

        def visit(self, node):
            return ast.fix_missing_locations(super().visit(node))

    shell = get_ipython()
    shell.user_ns.update(_is_left_out=is_left_out, _kept=kept)
    shell.ast_transformers.append(GoOn())

_setup()
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse `arguments`, execute, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="names or regular expressions of runs, with commas between"
    )
    parser.add_argument("--verify", action="store_true", help="train the cheapest anew, and compare")
    parser.add_argument("chapters", nargs="*", type=Path, help="notebooks (all chapters)")
    options = parser.parse_args(arguments)
    if options.verify:
        return verify(options.only.replace(",", "|"))
    os.environ |= {runs.VARIABLE: "record", runs.ONLY: options.only.replace(",", "|")}
    os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1"}  # this environment's kernel, no other
    os.environ.setdefault("MURA_PROFILE", "demo")
    os.environ.pop("MURA_DATA", None)  # scores on demo data alone are recorded

    before, failures, left_out = recorded(), [], []
    for chapter in options.chapters or sorted(BOOK.glob("*.ipynb")):
        began = time.time()
        print(f"== {chapter.name}", flush=True)
        failed, missing = execute(chapter)
        failures, left_out = failures + failed, left_out + missing
        print(f"== {chapter.name}: {time.time() - began:.0f} s", flush=True)
    report(before, failures, left_out)
    return 1 if failures else 0


def verify(only: str) -> int:
    """Train the cheapest recorded run of each framework anew; 1 where an AUROC is too far off."""
    profile = profiles.current(index := data.load_index())
    split = data.split_dev(index, profile.dev_fraction)
    same = {"profile": profile.name, "fingerprint": data.fingerprint(split)}
    cheapest = {}
    every = [runs.load(file.parent) for file in paths.recorded_runs().glob("*/*/[!.]*/run.json")]
    for run in sorted(every, key=lambda run: -run.info["seconds"]):  # the cheapest of each framework last
        info = run.info
        fits = same.items() <= info.items() and re.fullmatch(only or ".*", info["name"])
        if (
            fits
            and info["seconds"] <= SECONDS
            and info["config"].keys() == Recipe.__dataclass_fields__.keys()
        ):
            cheapest["torch" if info["architecture"] else "keras"] = run
    if not cheapest:
        sys.exit(f"No recorded run ({only or 'any'}) is of a recipe, these data and up to {SECONDS} s.")
    off = [difference(framework, run, split, profile) for framework, run in cheapest.items()]
    return int(max(off) > TOLERANCE)


def difference(framework: str, run, split, profile) -> float:
    """Train a recorded run anew in a temporary folder, print how it compares; the difference of AUROCs."""
    train = importlib.import_module(f"mura_course.{framework}_tools.training").train
    print(run.describe(), "Training it anew.", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as root:
        os.environ[runs.VARIABLE] = root
        again = train(run.info["name"], recipe(run.info["config"]), split, profile, run.info["weights"])
    old, new = (one.info["metrics"]["test"]["image"]["auroc"]["value"] for one in (run, again))
    p, q = (one.predictions.set_index("path")["probability"] for one in (run, again))
    print(f"{framework}: AUROC {old:.3f} recorded, {new:.3f} now (may differ by {TOLERANCE}); probabilities")
    print(f"differ by {(p - q).abs().mean():.4f} on average. It took {again.info['seconds']:.0f} s.")
    return abs(new - old)


def recipe(config: dict) -> Recipe:
    """The recipe whose `config` this was, before JSON made lists of its tuples."""

    def tuples(values: dict) -> dict:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    return Recipe(**tuples(config | {"stages": [Stage(**tuples(stage)) for stage in config["stages"]]}))


def recorded() -> list[str]:
    """Folders of the finished recorded runs."""
    table = runs.list_runs(paths.recorded_runs())
    return table["run"][table["state"].eq("finished")].tolist()


def execute(chapter: Path) -> tuple[list[str], list[str]]:
    """Execute a chapter in a fresh kernel: a line for each failure, and the names of runs left out."""
    notebook = nbformat.read(chapter, as_version=4)
    cells, failures, left_out, lost = list(notebook.cells), [], [], set()
    metadata = {"metadata": {"path": str(BOOK)}}
    client = Printing(notebook, timeout=None, kernel_name="python3", allow_errors=True, resources=metadata)
    try:
        with client.setup_kernel():
            if os.environ[runs.ONLY]:
                execute_statement(client, GO_ON, 0, ())
            for number, cell in enumerate(cells):
                skipped = set()
                for source in statements(cell.source) if cell.cell_type == "code" else ():
                    made, used = names(source)
                    if used & lost:
                        skipped |= used & lost
                        lost |= made
                        continue
                    tags = cell.metadata.get("tags", ())
                    missing, error = execute_statement(client, source, number, tags)
                    left_out += missing
                    lost = lost | made if missing or error else lost - made
                    if error:
                        failures.append(f"{chapter.name}, cell {number}")
                        print(error, file=sys.stderr, flush=True)
                if skipped:
                    print(f"  cell {number}: skipped what needs {', '.join(sorted(skipped))}", flush=True)
    except DeadKernelError as error:
        failures.append(f"{chapter.name}: the kernel died (out of memory?): {error}")
    return failures, left_out


class Printing(NotebookClient):
    """Prints what a cell prints at once: a training may take an hour."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            print("   ", msg["content"]["text"].strip().replace("\n", "\n    "), flush=True)
        return super().process_message(msg, cell, cell_index)


def execute_statement(client: NotebookClient, source: str, number: int, tags) -> tuple[list[str], str]:
    """Execute a statement of a cell: the runs that were left out, and the traceback if it failed."""
    before, began = recorded(), time.time()
    cell = client.execute_cell(nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}), number)
    for run in sorted(set(recorded()) - set(before)):
        print(f"  made {run}", flush=True)
    if (seconds := time.time() - began) > 10:
        print(f"  cell {number}: {seconds:.0f} s", flush=True)
    said = [output.text for output in cell.outputs if output.output_type == "stream"]
    errors = [output for output in cell.outputs if output.output_type == "error"]
    missing = re.findall(rf"Run (\S+): {runs.LEFT_OUT}", "\n".join([*said, *(e.evalue for e in errors)]))
    real = [error for error in errors if runs.LEFT_OUT not in error.evalue]
    return missing, "" if "raises-exception" in tags else "\n".join("\n".join(e.traceback) for e in real)


def statements(source: str) -> list[str]:
    """Cut a cell into its statements; a cell that is no plain Python (%magic) stays whole."""
    try:
        return [ast.unparse(node) for node in ast.parse(source).body]
    except SyntaxError:
        return [source]


def names(source: str) -> tuple[set[str], set[str]]:
    """Names that a statement makes or changes, and global names that it uses."""
    try:
        tree, table = ast.parse(source), symtable.symtable(source, "cell", "exec")
    except SyntaxError:
        return set(), set()
    made = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used, scopes = set(), [table]
    for scope in scopes:
        scopes += scope.get_children()
        inside = [s for s in scope.get_symbols() if s.is_referenced() and (scope is table or s.is_global())]
        used |= {symbol.get_name() for symbol in inside}
    for node in ast.walk(tree):
        if isinstance(node, ast.For):  # its variable is new
            used -= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
        grows = isinstance(node, ast.Attribute) and node.attr in GROWING
        if grows or (isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store)):
            while isinstance(node, ast.Subscript | ast.Attribute):
                node = node.value
            made |= {node.id} if isinstance(node, ast.Name) else set()
    return made, used


def report(before: list[str], failures: list[str], left_out: list[str]) -> None:
    """Say which runs exist, which were made, which were left out, and what failed."""
    now = recorded()
    print(f"\nRecorded runs in {paths.short_path(paths.recorded_runs())}: {len(now)}")
    for run in now:
        print(f"  {'made now' if run not in before else 'found   '}  {run}")
    for title, rows in (("Left out", dict.fromkeys(left_out)), ("FAILED", failures)):
        if rows:
            print(f"{title}:", *rows, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
