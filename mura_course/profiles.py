"""Every size, epoch count and limit of the book: `profiles.csv`, a row a setting, a column a profile.

Reads that table and the environment variable ``MURA_PROFILE``; no chapter holds a size of its own. The setup
chapter explains how to choose a profile.
"""

from __future__ import annotations

import ast
import csv
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ProfileError

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT_VARIABLE = "MURA_PROFILE"
NAMES = ("smoke", "demo", "full")


class Profile:
    """One column of the table: a name and its settings, as attributes that cannot be set.

    ``vars(profile)`` is a dictionary of name and settings. `profiles.table` says what each setting means.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        vars(self).update(settings, name=name)

    def __getattr__(self, setting: str) -> Any:
        if setting.startswith("__"):  # a protocol of Python's, not a setting
            raise AttributeError(setting)
        raise ProfileError(f"There is no setting {setting!r} in profiles.csv. `profiles.table()` lists them.")

    def __setattr__(self, setting: str, value: object) -> None:
        raise AttributeError(f"A profile cannot be changed: use profile.replace({setting}={value!r}).")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<Profile {self.name}>"

    def replace(self, **changes: Any) -> Profile:
        """Return the same profile with other values, for an experiment; ProfileError: no such setting."""
        for setting in changes:
            getattr(self, setting)
        return Profile(**vars(self) | changes)


@cache
def _rows() -> list[dict[str, str]]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def get(name: str) -> Profile:
    """Return the profile called `name`; ProfileError, listing the known names, for any other."""
    key = name.strip().lower()
    if key not in NAMES:
        raise ProfileError(
            f"There is no profile {name!r}. Set {ENVIRONMENT_VARIABLE} to one of: {', '.join(NAMES)}."
        )
    return Profile(key, **{row["setting"]: ast.literal_eval(row[key]) for row in _rows()})


def current(index: pd.DataFrame | None = None) -> Profile:
    """Choose the profile in use: what ``MURA_PROFILE`` names, else ``full`` on MURA and ``demo`` elsewhere.

    Parameters
    ----------
    index : DataFrame, optional
        What `data.load_index` returns; only its ``attrs["is_demo"]`` is read.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if name:
        return get(name)
    is_mura = index is not None and not index.attrs.get("is_demo", True)
    return get("full" if is_mura else "demo")


def table() -> pd.DataFrame:
    """Make the table that the setup chapter shows: a row a setting, columns smoke, demo, full and meaning."""
    import pandas as pd

    profiles = {name: get(name) for name in NAMES}
    index = pd.Index([row["setting"] for row in _rows()], name="setting")
    columns: dict[str, list] = {n: [getattr(p, s) for s in index] for n, p in profiles.items()}
    columns["meaning"] = [row["meaning"] for row in _rows()]
    return pd.DataFrame(columns, index=index, dtype=object)
