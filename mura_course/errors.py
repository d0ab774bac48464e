"""The errors that this package raises on purpose: each says what is wrong, where, and what to do.

Catch `MuraError` for all of them. Imports nothing; no other module defines an exception class.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

Value = TypeVar("Value")


def printable(text: str) -> str:
    """`text` with every control character but the line break shown as "?"; safe for a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


class MuraError(Exception):
    """Base of the package's own errors. A message may quote a file's content, so it is made printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(str(message)))

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(MuraError, ValueError):
    """The data exist, but one of their files (or an argument about them) is wrong."""


class DataNotFoundError(MuraError, FileNotFoundError):
    """A folder or file that should hold data does not exist."""


class DiskError(MuraError, OSError):
    """A file or folder cannot be read or written: no room, no permission, damaged content."""


class KernelError(MuraError, RuntimeError):
    """The notebook runs on a Python that lacks what the book needs."""


class ModelError(MuraError, ValueError):
    """An unknown backbone, head or setting of a model; the message lists the known ones."""


class PredictionsError(MuraError, ValueError):
    """Predictions that cannot be scored; the message says which rows and why."""


class ProfileError(MuraError, ValueError):
    """An unknown profile; the message lists the known ones."""


class RunError(MuraError, ValueError):
    """A run that cannot be made, read or trusted; the message names the folder and the remedy."""


class TextError(MuraError, ValueError):
    """A text detector that cannot run, an image that it cannot take, or a folder that cannot be cleaned."""


class TrainingError(MuraError, RuntimeError):
    """A training that cannot go on; the message says why and what to change."""


class WeightsError(MuraError, RuntimeError):
    """Weights that cannot be downloaded or found; the message says how to place the file by hand."""


def one_of(what: str, value: Value, valid: Collection, error: type[MuraError] = DataError) -> Value:
    """Return `value`; raise `error`, listing the `valid` values, unless it is one of them."""
    if value not in valid:
        raise error(f"{what} must be one of {', '.join(map(repr, valid))}, not {value!r}.")
    return value
