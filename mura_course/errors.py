"""The errors that this package raises on purpose: each says what is wrong, where, and what to do.

Catch `MuraError` for all of them. Imports nothing.
"""

__all__ = ["DataError", "DataNotFoundError", "KernelError", "MuraError", "ProfileError", "WeightsError"]


class MuraError(Exception):
    """Base of the package's own errors."""


class DataError(MuraError, ValueError):
    """The data are there, but a file of theirs (or an argument about them) is wrong."""


class DataNotFoundError(MuraError, FileNotFoundError):
    """A folder or file that should hold data is missing, or cannot be written."""


class ProfileError(MuraError, ValueError):
    """`MURA_PROFILE` names no profile."""


class KernelError(MuraError, RuntimeError):
    """The notebook runs on a Python that lacks what the book needs."""


class WeightsError(MuraError, RuntimeError):
    """ImageNet weights that cannot be had; the message says how to place them by hand."""
