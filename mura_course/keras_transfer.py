"""Transfer learning as runs: features computed once per image, and the variants of KL Table 3 (chapter 5).

A frozen backbone turns an image into the same numbers in every epoch. `FeatureStore` keeps them, so that ten
epochs of a frozen variant cost little more than one pass over the images; `variant_run` trains any variant
and returns its run. Writes below `<cache folder>/features`, and where runs lie. The models themselves stand
in `mura_course.keras_models`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from . import backbones, data, keras_models, pixels, runs
from .errors import DataError, DataNotFoundError
from .profiles import Profile

DENSE_UNITS = (128, 128, 64)
PATIENCE = 5  # the report gives it for its CNNs only (KL 1.6.1)
PLATEAU = {"factor": 0.5, "patience": 3}  # the report names the method, not its numbers
SECONDS_BETWEEN_NOTES = 10.0  # what a kill can cost of a pass over the images


# Features, once per image ------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class FeatureStore:
    """What a frozen backbone makes of the images of a PixelStore: float32 (images, dim) on disk.

    folder: holds ``features.f32`` (row i belongs to row i of the pixel store) and ``notes.npz``: which rows
    have been computed, and in how many seconds. extractor: as `backbones.extractor` returns it. The folder's
    name holds the pixel store's (the data's fingerprint, the size) and a hash of the backbone's weights:
    other weights, another folder.
    """

    folder: Path
    store: pixels.PixelStore
    extractor: keras.Model

    @classmethod
    def open_or_compute(
        cls,
        extractor: keras.Model,
        store: pixels.PixelStore,
        index: pd.DataFrame,
        batch_size: int = 64,
        workers: int = 2,
        cache: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> FeatureStore:
        """The features of the images of `index`, of which only those not known yet are computed.

        A pass that was killed goes on where it was; two processes that want the same features wait for each
        other. Raises DataError where sizes do not fit or the store lacks an image, DataNotFoundError,
        naming the folder, where there is no room.
        """
        side = extractor.input_shape[1]
        if store.size != side:
            raise DataError(
                f"The backbone takes images of {side} px, {store.folder} holds {store.size} px. Open a store "
                f"of that size: PixelStore.open_or_build(index, {side})."
            )
        name = f"{store.folder.name}-{extractor.name}-{_hash(extractor)}"
        features = cls(Path(cache or data.cache_dir()) / "features" / name, store, extractor)
        try:
            features.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(features.folder / "lock"):
                features._compute(index, batch_size, workers, progress)
        except OSError as error:
            raise DataNotFoundError(
                f"The features in {features.folder} cannot be written ({error.strerror or error}). Make room "
                "or allow writing there, or set the environment variable MURA_CACHE to another folder."
            ) from error
        return features

    @property
    def shape(self) -> tuple[int, int]:
        """(images, dim)"""
        return self.store.images, self.extractor.output_shape[1]

    @property
    def values(self) -> np.ndarray:
        """All rows, float32 (images, dim), mapped read-only; rows never asked for are zero."""
        return np.memmap(self.folder / "features.f32", np.float32, "r", shape=self.shape).view(np.ndarray)

    def batches(self, of: pixels.Batches) -> FeatureBatches:
        """`of` with features in place of images: same rows, same order in each epoch, same targets."""
        return FeatureBatches(self, of)

    def notes(self) -> tuple[np.ndarray, float]:
        """Which rows have been computed, bool (images,), and how many seconds that took in all."""
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(self.folder / "notes.npz") as notes:
                done, seconds = notes["done"], float(notes["seconds"])
            whole = (self.folder / "features.f32").stat().st_size == 4 * self.shape[0] * self.shape[1]
            if whole and done.shape == self.shape[:1] and done.dtype == bool:
                return done, seconds
        return np.zeros(self.shape[0], bool), 0.0

    def _compute(self, index: pd.DataFrame, batch_size: int, workers: int, progress: bool) -> None:
        (done, seconds), rows = self.notes(), self.store.rows(index)
        index = index[~done[rows]].drop_duplicates("path")
        if index.empty:
            return
        needed, free = len(index) * 4 * self.shape[1], shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"they need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        source = pixels.Batches(
            self.store, index, batch_size, scale=self.extractor.expected_scale, workers=workers
        )
        rows, title = self.store.rows(index), f"{self.extractor.name}, once per image"
        with (
            open(self.folder / "features.f32", "r+b" if done.any() else "w+b") as file,
            tqdm(total=len(index), desc=title, unit="image", disable=not progress) as bar,
        ):
            file.truncate(4 * self.shape[0] * self.shape[1])  # rows that nobody asks for take no room
            start = noted = time.perf_counter()
            for i, (x, _) in enumerate(source):
                members = rows[i * batch_size : i * batch_size + len(x)]
                for row, values in zip(members, self._features(x, batch_size), strict=True):
                    file.seek(4 * self.shape[1] * int(row))
                    file.write(values.tobytes())
                done[members] = True
                bar.update(len(x))
                now = time.perf_counter()
                if now - noted > SECONDS_BETWEEN_NOTES or i + 1 == len(source):
                    file.flush()
                    os.fsync(file.fileno())  # features first, then the note: no row is done that is not
                    beside = self.folder / "notes.writing"
                    with open(beside, "wb") as notes:
                        np.savez(notes, done=done, seconds=seconds + now - start)
                    os.replace(beside, self.folder / "notes.npz")
                    noted = now

    def _features(self, x: np.ndarray, batch_size: int) -> np.ndarray:
        """float32 (len(x), dim). Always batches of one size: another would be traced anew, which is slow."""
        padded = np.concatenate([x, np.zeros((batch_size - len(x), *x.shape[1:]), x.dtype)])
        return np.asarray(self.extractor.predict_on_batch(padded), np.float32)[: len(x)]


def _hash(model: keras.Model) -> str:
    digest = hashlib.sha256()
    for array in model.get_weights():
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


class FeatureBatches(keras.utils.PyDataset):
    """Batches (x, y) as those of `pixels.Batches`, but x is float32 (n, dim), the images' features.

    Raises DataError where the batches augment (a changed image has other features), or were not computed.
    """

    def __init__(self, features: FeatureStore, of: pixels.Batches):
        super().__init__(workers=1)
        if of.augment is not None:
            raise DataError(
                "These batches augment: an image that changes has no features to be kept. Use others."
            )
        if of.target != "label":
            raise DataError(f"Features are there to learn the label from, not {of.target!r}.")
        self.of, self.index, self._values = of, of.index, features.values
        self._rows, self._y = features.store.rows(of.index), of.index[of.target].to_numpy(np.float32)
        if missing := np.count_nonzero(~features.notes()[0][self._rows]):
            raise DataError(
                f"{missing:,} images have no features yet: FeatureStore.open_or_compute(...) first."
            )

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        members = self.order[i * self.of.batch_size : (i + 1) * self.of.batch_size]
        return self._values[self._rows[members]], self._y[members]

    @property
    def order(self) -> np.ndarray:
        return self.of.order

    def set_epoch(self, epoch: int) -> None:
        self.of.set_epoch(epoch)


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
        return fit(config, learning_images(split, config["share"]), profile, weights, workdir)

    return runs.fit_or_load(variant.name, config, make, split, profile, weights, root)


def learning_images(split: pd.DataFrame, share: float, seed: int = 0) -> pd.DataFrame:
    """`split` with a share of its train and dev patients, drawn at random, and all of its test images."""
    if share >= 1:
        return split
    keep = split["split"].eq("test")
    for number, part in enumerate(("train", "dev")):
        patients = np.sort(split.loc[split["split"].eq(part), "patient"].unique())
        # Sorting draws: a choice that no NumPy version may change.
        order = np.argsort(np.random.default_rng((seed, number)).random(len(patients)), kind="stable")
        chosen = patients[order[: max(2, round(share * len(patients)))]]
        keep |= split["split"].eq(part) & split["patient"].isin(chosen)
    return split[keep]


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
    features = FeatureStore.open_or_compute(extractor, store, split, workers=profile.workers)
    train, dev, test = (features.batches(sets[name]) for name in ("train original", "validation", "test"))
    keras.utils.set_random_seed(config["seed"])
    head = keras_models.transfer_head(features.shape[1], config["dense_units"], config["dropout"])
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
