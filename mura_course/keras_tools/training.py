"""Transfer learning as runs: features computed once per image, and the variants of KL Table 3 (chapter 5).

A frozen backbone turns an image into the same numbers in every epoch. `FeatureStore` keeps them, so that ten
epochs of a frozen variant cost little more than one pass over the images; `variant_run` trains any variant
and returns its run. Writes below `<cache folder>/features`, and where runs lie. The models themselves stand
in `mura_course.keras_models`, what a store of features is in `mura_course.feature_store`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from . import backbones, data, feature_store, keras_models, pixels, runs
from .profiles import Profile

DENSE_UNITS = (128, 128, 64)
PATIENCE = 5  # the report gives it for its CNNs only (KL 1.6.1)
PLATEAU = {"factor": 0.5, "patience": 3}  # the report names the method, not its numbers


# Features, once per image ------------------------------------------------------------------------


class KerasExtractor:
    """A model of `backbones.extractor`, as `feature_store.FeatureStore` wants one."""

    layout = "nhwc"

    def __init__(self, model: keras.Model):
        self.model, self.name, self.scale = model, model.name, model.expected_scale
        self.size, self.dim = model.input_shape[1], model.output_shape[1]
        self.digest = feature_store.digest_of(model.get_weights())

    def __call__(self, x: np.ndarray, batch_size: int) -> np.ndarray:
        """float32 (len(x), dim). Always batches of one size: another would be traced anew, which is slow."""
        padded = np.concatenate([x, np.zeros((batch_size - len(x), *x.shape[1:]), x.dtype)])
        return np.asarray(self.model.predict_on_batch(padded), np.float32)[: len(x)]


class FeatureStore(feature_store.FeatureStore):
    """`feature_store.FeatureStore` for a Keras model, as `backbones.extractor` returns it."""

    @classmethod
    def open_or_compute(cls, extractor: keras.Model, *args, **options) -> FeatureStore:
        return super().open_or_compute(KerasExtractor(extractor), *args, **options)


# The variants of KL Table 3, as runs --------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A row of KL Table 3: a backbone of `backbones.BACKBONES`, trainable or not, and dense layers on it."""

    backbone: str
    trainable: bool = False
    dense_units: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The run's name, e.g. "densenet201_frozen" or "resnet50_unfrozen_dense"."""
        parts = [self.backbone.lower(), "unfrozen" if self.trainable else "frozen"]
        return "_".join(parts + ["dense"] * bool(self.dense_units))


KL_VARIANTS = tuple(
    Variant(backbone, trainable, dense_units)
    for backbone in ("DenseNet201", "ResNet50")
    for dense_units in ((), DENSE_UNITS)
    for trainable in (False, True)
)
"""The eight variants, in the order of Table 3."""


def settings(variant: Variant, profile: Profile) -> dict:
    """All that changes a variant's result, in this profile: the config of its run (KL 1.5.1)."""
    sizes = {
        "DenseNet201": profile.image_size_densenet,
        "ResNet50": profile.image_size_resnet,
        "EfficientNetLite0": profile.image_size_lite,
    }
    backbones.backbone(variant.backbone)  # an unknown one gets its own error
    is_lite, tuned = variant.backbone == "EfficientNetLite0", variant.trainable
    return {
        "backbone": variant.backbone,
        "trainable": tuned,
        "dense_units": list(variant.dense_units),
        "size": sizes[variant.backbone],
        "share": profile.lite_share if is_lite else profile.transfer_share,
        "dropout": 0.2,
        "batch_size": profile.transfer_batch_size,
        "epochs": profile.unfrozen_epochs if tuned else profile.frozen_epochs,
        "learning_rate": profile.unfrozen_rate if tuned else profile.frozen_rate,
        "patience": PATIENCE,
        "plateau": PLATEAU if tuned else None,
        "seed": 0,
    }


def variant_run(
    variant: Variant,
    split: pd.DataFrame,
    profile: Profile,
    weights: str | None = None,
    root: str | os.PathLike | None = None,
) -> runs.Run:
    """The finished run of a variant on these data: found, or trained now as chapter 5 shows.

    split: as `data.split_dev` returns it. weights: "imagenet" or "random"; by default what
    `backbones.find_weights` says, which prints a note where it is "random". Frozen variants train a head on
    features (`FeatureStore`), unfrozen ones the whole network; the saved model is the whole network in both
    cases, in float32. Early stopping on the dev set's kappa; for unfrozen ones ReduceLROnPlateau on its loss.
    Raises what `backbones.weights_file`, `runs.fit_or_load` and `keras_models.keras_fit` raise.
    """
    config = settings(variant, profile)
    weights = weights or backbones.find_weights(variant.backbone, profile)
    fit = _fit_unfrozen if variant.trainable else _fit_frozen

    def make(workdir: Path):
        return fit(config, data.learning_images(split, config["share"]), profile, weights, workdir)

    return runs.fit_or_load(variant.name, config, make, split, profile, weights, root)


def compile_variant(model: keras.Model, learning_rate: float, eager: bool = False) -> None:
    """As the report: Adam; binary cross-entropy; the metrics of its figures. eager: do not trace it first."""
    model.compile(
        optimizer=keras_models.FusedAdam(learning_rate),
        loss="binary_crossentropy",
        metrics=keras_models.abnormality_metrics(),
        run_eagerly=eager,
        jit_compile=False,  # XLA needs minutes for networks of this depth and, on a CPU, is slower afterwards
    )


def callbacks(config: dict) -> list[keras.callbacks.Callback]:
    """Early stopping on the dev set's kappa; where the config says so, ReduceLROnPlateau (KL 1.5.1)."""
    stop = {"mode": "max", "patience": config["patience"], "restore_best_weights": True}
    chosen = [keras.callbacks.EarlyStopping("val_kappa", **stop)]
    if config["plateau"]:
        chosen.append(keras.callbacks.ReduceLROnPlateau("val_loss", **config["plateau"]))
    return chosen


def _datasets(config: dict, split: pd.DataFrame, profile: Profile) -> tuple[pixels.PixelStore, dict]:
    store = pixels.PixelStore.open_or_build(split, config["size"])
    options = {"batch_size": config["batch_size"], "workers": profile.workers, "seed": config["seed"]}
    return store, pixels.kl_datasets(split, store, scale="0..255", **options)


def _fit_frozen(config: dict, split: pd.DataFrame, profile: Profile, weights: str, workdir: Path):
    keras.utils.set_random_seed(config["seed"])
    extractor = backbones.extractor(config["backbone"], config["size"], weights)
    store, sets = _datasets(config, split, profile)
    known = FeatureStore.open_or_compute(extractor, store, split, workers=profile.workers)
    train, dev, test = (known.batches(sets[name]) for name in ("train original", "validation", "test"))
    keras.utils.set_random_seed(config["seed"])
    head = keras_models.transfer_head(known.shape[1], config["dense_units"], config["dropout"])
    compile_variant(head, config["learning_rate"])
    history = keras_models.keras_fit(head, train, dev, config["epochs"], workdir, callbacks(config))
    predictions = keras_models.predict(head, test)
    return keras_models.with_head(extractor, head), history, predictions


def _fit_unfrozen(config: dict, split: pd.DataFrame, profile: Profile, weights: str, workdir: Path):
    _, sets = _datasets(config, split, profile)
    keras.utils.set_random_seed(config["seed"])
    kind = {key: config[key] for key in ("backbone", "trainable", "dense_units", "size", "dropout")}
    with keras_models.on_devices(profile):
        model = keras_models.transfer_model(**kind, weights=weights)
        compile_variant(model, config["learning_rate"], profile.untraced)
    with _traced_quickly():
        train, dev = sets["train original"], sets["validation"]
        history = keras_models.keras_fit(model, train, dev, config["epochs"], workdir, callbacks(config))
    predictions = keras_models.predict(model, sets["test"])
    return _to_keep(model, kind), history, predictions


def _to_keep(model: keras.Model, kind: dict) -> keras.Model:
    """The model without the optimiser's state, which is twice as large, for one device and in float32."""
    mirrored = getattr(model.distribute_strategy, "num_replicas_in_sync", 1) > 1
    if mirrored or keras.config.dtype_policy().name != model.get_layer(kind["backbone"]).dtype_policy.name:
        final = keras_models.transfer_model(**kind, weights="random")
        final.set_weights(model.get_weights())
    else:
        final = keras.Model(model.input, model.output, name=model.name)
        final.expected_scale = model.expected_scale
    return final


@contextlib.contextmanager
def _traced_quickly():
    """On a CPU, no rewriting of graphs by TensorFlow: DenseNet201's takes half a minute and gains nothing."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    off = not tf.config.list_physical_devices("GPU")
    before = tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer", False)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": before or off})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": before})
