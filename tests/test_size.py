"""The package stays thin: what it and its tests may grow to, in lines."""

import ast
import io
import tokenize
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
MOST_CODE = 2_500
MOST_TESTS = 5_000
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def docstring_lines(source: str) -> set[int]:
    """Numbers of the lines that a bare string takes: docstrings, and notes written like one."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def code_lines(source: str) -> int:
    """How many lines hold code: no blank one, no comment, no docstring; a long string counts whole."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(source))


def report(counts: dict[str, int]) -> str:
    return "\n".join(
        f"{count:6,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])
    )


def test_the_package_has_no_more_code_than_agreed():
    files = sorted((TOP / "mura_course").rglob("*.py"))
    counts = {file.relative_to(TOP).as_posix(): code_lines(file.read_text("utf-8")) for file in files}
    assert len(counts) > 20
    assert sum(counts.values()) <= MOST_CODE, report(counts)


def test_the_tests_of_package_and_renderer_are_no_longer_than_agreed():
    """Physical lines. Tests of the book and its build, in tests/book, are not counted."""
    files = [file for file in sorted(TOP.glob("tests/**/*.py")) if "book" not in file.parts]
    counts = {file.relative_to(TOP).as_posix(): len(file.read_text("utf-8").splitlines()) for file in files}
    assert len(counts) > 20
    assert sum(counts.values()) <= MOST_TESTS, report(counts)


def test_lines_are_counted_as_agreed():
    source = '''"""A docstring
of two lines."""

import os  # counts once


def f(x):
    """Another."""
    # a comment
    text = """a string
    of two lines"""
    return (
        x,
        text,
    )
'''
    assert code_lines(source) == 8
