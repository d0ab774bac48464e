"""Every size, epoch count and limit of the book: `profiles.csv`, a row a setting, a column a profile.

Reads that table and the environment variable ``MURA_PROFILE``; no chapter holds a size of its own. The setup
chapter explains how to choose a profile.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ProfileError, one_of

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT_VARIABLE = "MURA_PROFILE"
NAMES = ("smoke", "demo", "full")


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))
SETTINGS = [row["setting"] for row in ROWS]
_Values: Any = dataclasses.make_dataclass("_Values", ["name", *SETTINGS], frozen=True)


class Profile(_Values):
    """One column of the table: a name and its settings, as attributes that cannot be set.

    ``vars(profile)`` is a dictionary of name and settings. `profiles.table` says what each setting means.
    """

    def replace(self, **changes: Any) -> Profile:
        """Return the same profile with other values, for an experiment; TypeError: no such setting."""
        return dataclasses.replace(self, **changes)


def get(name: str) -> Profile:
    """Return the profile called `name`; ProfileError, listing the known names, for any other."""
    key = one_of(ENVIRONMENT_VARIABLE, name.strip().lower(), NAMES, ProfileError)
    return Profile(key, **{row["setting"]: ast.literal_eval(row[key]) for row in ROWS})


def current(index: pd.DataFrame | None = None) -> Profile:
    """Choose the profile in use: what ``MURA_PROFILE`` names, else ``full`` on MURA and ``demo`` elsewhere.

    Parameters
    ----------
    index : DataFrame, optional
        What `data.load_index` returns; only its ``attrs["is_demo"]`` is read.
    """
    is_mura = index is not None and not index.attrs.get("is_demo", True)
    return get(os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or ("full" if is_mura else "demo"))


def table() -> pd.DataFrame:
    """Make the table that the setup chapter shows: a row a setting, columns smoke, demo, full and meaning."""
    import pandas as pd

    columns: dict[str, Any] = {name: vars(get(name)) for name in NAMES}
    columns["meaning"] = {row["setting"]: row["meaning"] for row in ROWS}
    table = pd.DataFrame(columns, index=SETTINGS, dtype=object)
    return table.rename_axis("setting")
