"""The package stays thin: what it and its tests may grow to, in lines."""

import ast
import io
import tokenize
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
MOST_CODE = 2843  # what it has; 3,000 with every chapter beyond the reports. It may only fall
MOST_TESTS = 5_000
SILENT = {getattr(tokenize, name) for name in ["COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"]}


def code_lines(source: str) -> int:
    """How many lines hold code: no blank one, no comment, no docstring; a long string counts whole."""
    lines, documentation = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.update(range(node.lineno, node.end_lineno + 1))
    return len(lines - documentation)


def assert_at_most(limit: int, counts: dict[str, int]) -> None:
    table = "\n".join(f"{count:6,} {name}" for name, count in counts.items())
    assert len(counts) > 20
    assert sum(counts.values()) <= limit, table


def test_the_package_has_no_more_code_than_agreed():
    files = sorted(TOP.glob("mura_course/**/*.py"))
    counts = {str(file.relative_to(TOP)): code_lines(file.read_text("utf-8")) for file in files}
    assert_at_most(MOST_CODE, counts)


def test_the_tests_of_package_and_renderer_are_no_longer_than_agreed():
    """Physical lines. Tests of the book and its build, in tests/book, are not counted."""
    files = [file for file in sorted(TOP.glob("tests/**/*.py")) if "book" not in file.parts]
    counts = {str(file.relative_to(TOP)): len(file.read_text("utf-8").splitlines()) for file in files}
    assert_at_most(MOST_TESTS, counts)


def test_lines_are_counted_as_agreed():
    source = '"""A docstring\nof two."""\n\nimport os  # once\n\ndef f(x):\n    """Another."""\n'
    source += "    # a comment\n"
    source += '    text = """a string\n    of two"""\n    return (\n        x,\n        text,\n    )\n'
    assert code_lines(source) == 8
