"""What the setup cell of every chapter calls: `start` finds data and profile, fixes seeds, and says so.

Prints; reads the index; changes only the state of random number generators. Loads no deep-learning
framework. The setup chapter explains what it prints.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

from .errors import KernelError

if TYPE_CHECKING:
    import pandas as pd

    from .profiles import Profile

PYTHON = (3, 11)
NEEDED = ("numpy", "pandas", "sklearn", "cv2", "matplotlib", "platformdirs")

_MURA_ADVICE = {
    "colab": "MURA on Colab: agree to Stanford's licence, put the archive on your Google Drive, mount the "
    "Drive, and unpack it into /content (reading single images from the Drive is slow). It is found there.",
    "kaggle": "MURA on Kaggle: agree to Stanford's licence, then Add Input and choose your (private) copy. "
    "It is found under /kaggle/input. Downloads of weights need Settings > Internet on.",
    "own machine": "MURA: agree to Stanford's licence, unpack the archive, and set MURA_DATA to its folder.",
}
_GPU_ADVICE = {
    "colab": "A GPU on Colab: Runtime > Change runtime type.",
    "kaggle": "A GPU on Kaggle: Settings > Accelerator.",
}


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
    check_kernel()
    from . import data, profiles  # after the check, so that a wrong kernel is met with a sentence

    profiles.current()  # a misspelt profile is reported before any film is rendered
    index = data.load_index(quiet=True)
    profile = profiles.current(index)
    gpus = gpu_names()
    _seed_everything(seed)
    without = "random ones, with a note" if profile.allow_random_weights else "an error that says what to do"
    choice = f"to change it, set {profiles.ENVIRONMENT_VARIABLE} to {', '.join(profiles.NAMES)}"
    _say("data", data.describe(index))
    _say("profile", f"{profile.name} ({choice})")
    _say("device", ", ".join(gpus) if gpus else f"CPU, {_cores()} cores")
    _say("weights", f"ImageNet's; where they cannot be downloaded, {without}")
    _say("seed", str(seed))
    for note in _notes(profile.name, index.attrs["is_demo"], bool(gpus)):
        _say("note", note)
    return profile, index


def platform() -> str:
    """``colab``, ``kaggle`` or ``own machine``."""
    if "google.colab" in sys.modules:
        return "colab"
    if "kaggle_secrets" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "own machine"


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, by ``nvidia-smi``; empty where there are none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):  # a broken driver: frameworks will not see the GPU either
        return []
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listing.stdout, re.MULTILINE)


def check_kernel() -> None:
    """Raise KernelError, saying which kernel to choose, where this Python lacks what the book needs."""
    if sys.version_info < PYTHON:
        raise KernelError(
            f"This kernel runs Python {sys.version.split()[0]}; the book needs 3.11 or later. Choose another "
            "kernel (Kernel > Change Kernel), or make the environment anew."
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise KernelError(
            f"This kernel's Python ({sys.executable}) lacks {', '.join(missing)}: probably not the one that "
            "the book was installed into. Choose that one (Kernel > Change Kernel), or install the book's "
            "package here, as the setup chapter shows."
        )


def _seed_everything(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    if tensorflow := sys.modules.get("tensorflow"):
        tensorflow.random.set_seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _cores() -> int:
    """Cores that this process may use, which in a container may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _notes(profile_name: str, is_demo: bool, has_gpu: bool) -> list[str]:
    notes = []
    if profile_name == "full" and is_demo:
        notes.append(
            "these are demo data: the full profile's settings are meant for MURA, and scores on synthetic "
            "films cannot be compared with the reports'."
        )
    if profile_name == "full" and not has_gpu:
        notes.append("no GPU: the full profile takes hours to days; set MURA_PROFILE=demo for a short run.")
    if is_demo:
        notes.append(_MURA_ADVICE[platform()])
    if not has_gpu and platform() in _GPU_ADVICE:
        notes.append(_GPU_ADVICE[platform()])
    return notes


def _say(name: str, text: str) -> None:
    """Print `text` behind `name`, wrapped to the width of the book's page."""
    layout = {"subsequent_indent": " " * 9, "break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(f"{name:<8} {text}", 78, **layout))
