"""What the setup cell of every chapter calls: `start` finds data and profile, fixes seeds, and says so.

Prints; reads the index; changes only the state of random number generators. Loads no deep-learning
framework. The setup chapter explains what it prints.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

from .errors import KernelError
from .paths import cores

if TYPE_CHECKING:
    import pandas as pd

    from .profiles import Profile

NEEDED = ("numpy", "pandas", "sklearn", "cv2", "matplotlib", "platformdirs")


def start(seed: int = 0) -> tuple[Profile, pd.DataFrame]:
    """Find profile and data, fix the seeds, and print a few lines on what the chapter runs with.

    Seeds Python and NumPy, and TensorFlow and torch where they are imported already. The first call without
    MURA renders the demo data.

    Parameters
    ----------
    seed : int
        Of every random number generator.

    Returns
    -------
    profile : Profile
        What `profiles.current` returns for these data.
    index : DataFrame
        What `data.load_index` returns.

    Raises
    ------
    KernelError
        This Python lacks what the book needs. Further errors as `profiles.current` and `data.load_index`.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        remedy = "Choose the book's own (Kernel > Change Kernel), or install the book's package here"
        raise KernelError(f"This kernel's Python ({sys.executable}) lacks {', '.join(missing)}. {remedy}.")
    from . import data, profiles  # after the check, so that a wrong kernel is met with a sentence

    profiles.current()  # a misspelt profile is reported before any film is rendered
    index = data.load_index(quiet=True)
    profile = profiles.current(index)
    gpus = gpu_names()
    _seed_everything(seed)
    without = "random ones, with a note" if profile.allow_random_weights else "an error that says what to do"
    choice = f"to change it, set {profiles.ENVIRONMENT_VARIABLE} to {', '.join(profiles.NAMES)}"
    _say("data", data.index.describe(index))
    _say("profile", f"{profile.name} ({choice})")
    _say("device", ", ".join(gpus) if gpus else f"CPU, {cores()} cores")
    _say("weights", f"ImageNet's; where they cannot be downloaded, {without}")
    _say("seed", str(seed))
    if profile.name == "full" and not gpus:
        _say("note", "no GPU: the full profile takes hours to days; set MURA_PROFILE=demo for a short run.")
    if index.attrs["is_demo"]:
        _say("note", "demo data: no score compares with the reports'. For MURA and GPUs: the setup chapter.")
    return profile, index


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, by ``nvidia-smi``; empty where there are none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no driver, or a broken one: no framework sees a GPU either
        return []
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listing.stdout, re.MULTILINE)


def _seed_everything(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    if tensorflow := sys.modules.get("tensorflow"):
        tensorflow.random.set_seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _say(name: str, text: str) -> None:
    """Print `text` behind `name`, wrapped to the width of the book's page."""
    layout = {"subsequent_indent": " " * 9, "break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(f"{name:<8} {text}", 78, **layout))
