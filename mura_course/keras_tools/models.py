"""The Keras half's networks and its kappa metric (room: keras_tools; chapters 5 and 6).

Chapter 5 explains transfer learning, chapter 6 the funnel CNNs and the metrics. Importing this module teaches
`runs` to save Keras models. Writes nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from keras import layers

from .. import runs
from ..errors import ModelError, RunError, one_of
from . import backbones

ops: Any = keras.ops


def funnel_cnn(
    direction: str,
    conv_layers: int = 4,
    dropout: float = 0.3,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    widest: int = 256,
    narrowest: int = 32,
) -> keras.Model:
    """Build the custom CNN of KL 1.6, Figures 27 ("in") and 28 ("out").

    Parameters
    ----------
    direction : {"in", "out"}
        "in": `widest` filters in the first layer, halved from layer to layer (256, 128, 64, 32). "out":
        `narrowest` first, doubled (32, 64, 128, 256).
    conv_layers : int
        The report tunes it over 4 and 5 and shows four only. A fifth goes on in the same way, which the
        report does not state: "in" ends at 16 filters, "out" at 512.
    dropout : float
        Fraction of values dropped after each block.
    input_shape : tuple
        Height, width, channels of the float32 images in 0..1, as ``model.expected_scale`` says.
    widest, narrowest : int
        Filters in the first layer, by direction.

    Returns
    -------
    keras.Model
        Its output is P(abnormal), float32 (batch, 1). At 224x224x3 with four layers it has 400,737 ("in") and
        438,593 ("out") parameters, as the figures say.

    Raises
    ------
    ModelError
        Another direction.
    """
    one_of("direction", direction, ("in", "out"), ModelError)
    filters = [widest // 2**i if direction == "in" else narrowest * 2**i for i in range(conv_layers)]
    x = inputs = keras.Input(input_shape, name="Input")
    for i, count in enumerate(filters, start=1):
        x = layers.Conv2D(count, 3, padding="same", activation="relu", name=f"Conv2D-{i}")(x)  # KL Table 4
        x = layers.MaxPool2D(2, strides=2, padding="same", name=f"MaxPool2D-{i}")(x)  # KL Table 5
        x = layers.Dropout(dropout, name=f"Dropout-{i}")(x)
    x = layers.Flatten(name="Flatten")(x)
    # float32 also under mixed precision: a float16 sigmoid saturates early.
    outputs = layers.Dense(1, activation="sigmoid", dtype="float32", name="Output")(x)
    model = keras.Model(inputs, outputs, name=f"funnel_{direction}")
    model.expected_scale = "0..1"
    return model


def transfer_model(
    backbone: str,
    trainable: bool = False,
    dense_units: Sequence[int] = (),
    size: int | None = None,
    weights: str = "imagenet",
) -> keras.Model:
    """Build a model of KL 1.5, Table 3: a pretrained backbone, max pooling, dense layers, one sigmoid.

    Parameters
    ----------
    backbone : {"DenseNet201", "ResNet50", "EfficientNetLite0"}
        The report's two, and one whose weights need no download.
    trainable : bool
        Whether its weights are trained; ImageNet's BatchNorm stays frozen in any case.
    dense_units : sequence of int
        (), or the report's (128, 128, 64).
    size : int, optional
        Side of the images in pixels; by default the report's (224; ResNet50 256).
    weights : {"imagenet", "random"}
        See `backbones.find_weights`.

    Returns
    -------
    keras.Model
        Layers Input, Scale, the backbone by its name, Head. float32 (batch, size, size, 3) in 0..255, as
        ``model.expected_scale`` says, to P(abnormal), float32 (batch, 1).

    Raises
    ------
    ModelError, WeightsError
        As `backbones.extractor`.
    """
    extractor = backbones.extractor(backbone, size, weights, trainable)
    return with_head(extractor, transfer_head(extractor.output_shape[1], dense_units))


def transfer_head(features: int, dense_units: Sequence[int] = (), dropout: float = 0.2) -> keras.Sequential:
    """Build what `transfer_model` puts on a backbone: (batch, features) -> P(abnormal), (batch, 1).

    `dropout` is the fraction of values dropped after the backbone and after each dense layer.
    """
    head = keras.Sequential([keras.Input((features,)), layers.Dropout(dropout)], name="Head")
    for units in dense_units:
        head.add(layers.Dense(units, activation="relu"))
        head.add(layers.Dropout(dropout))
    head.add(layers.Dense(1, activation="sigmoid", dtype="float32"))
    return head


def with_head(extractor: keras.Model, head: keras.Model) -> keras.Model:
    """Join a backbone (`backbones.extractor`) and a head, each with the weights it has, to one model."""
    model = keras.Model(extractor.input, head(extractor.output), name="transfer")
    model.expected_scale = extractor.expected_scale
    return model


@keras.saving.register_keras_serializable(package="mura_course")
class BinaryCohenKappa(keras.metrics.Metric):
    """Cohen's kappa of labels and probabilities above 0.5, over all batches since the last reset.

    Keras 3 has no such metric. Kappa is the agreement beyond chance: 0 for a coin or a constant answer, 1 for
    a perfect one (KL 1.5.2, chapter 6); NaN where labels and calls are all of one and the same class.

    Parameters
    ----------
    name : str
        As it appears in the history.
    **options
        Of `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "kappa", **options) -> None:
        super().__init__(name=name, **options)
        self.counts = self.add_weight(shape=(2, 2), initializer="zeros", name="counts")  # [label][called]

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        """Count a batch of labels and probabilities, (batch,) or (batch, 1); weights are not taken."""
        called = ops.convert_to_tensor(y_pred) > 0.5
        flat = [ops.reshape(ops.cast(values, "int32"), (-1,)) for values in (y_true, called)]
        rows, columns = (ops.one_hot(values, 2, dtype=self.dtype) for values in flat)
        self.counts.assign_add(ops.matmul(ops.transpose(rows), columns))

    def result(self):
        """Kappa of what was counted, a scalar."""
        fractions = self.counts / ops.sum(self.counts)
        chance = ops.sum(ops.sum(fractions, axis=0) * ops.sum(fractions, axis=1))
        return (ops.trace(fractions) - chance) / (1 - chance)


def abnormality_metrics() -> list[keras.metrics.Metric]:
    """List what both reports watch, for `model.compile`: `accuracy`, `auc` and `kappa`.

    Keras's AUC interpolates between 200 thresholds: it differs from the exact AUROC of
    `metrics.image_report` in the third decimal, and by more where nearly all probabilities are alike. It is
    there to watch a training.
    """
    return [keras.metrics.BinaryAccuracy("accuracy"), keras.metrics.AUC(name="auc"), BinaryCohenKappa()]


@runs.save_model.register(keras.Model)
def _save(model: keras.Model, folder: Path) -> str:
    """Save the model of a run."""
    model.save(folder / "model.keras")
    return "model.keras"


def load(run: runs.Run) -> keras.Model:
    """Load the trained model of a run, not compiled, with the scale that it expects (`expected_scale`).

    Raises
    ------
    RunError
        The run has no Keras model, the file is not what the run wrote, or the installed Keras cannot read it.
    """
    file = run.model_file()
    try:
        model: Any = keras.saving.load_model(file, compile=False)
    except (ValueError, TypeError, RuntimeError, AttributeError, OSError) as error:
        raise RunError(f"Keras cannot load {file}. Delete {run.folder} to train it again.") from error
    model.expected_scale = run.info["expected_scale"]
    return model
