"""Training Keras models: recipes as runs, and a `fit` that survives a kill (room: keras_tools; chapter 5).

`train` finds or makes the run of a recipe; `fit` and `predict` take any compiled model, as chapter 6 shows.
Writes below the working folder that `fit` is given; features and runs lie where `data` and `runs` put them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from .. import data, disk, runs
from ..data.features import extract
from ..errors import DiskError, TrainingError
from ..profiles import Profile
from ..recipes import Recipe, Stage
from . import backbones, models

# --- Recipes as runs ----------------------------------------------------------------------------------


def train(
    name: str,
    recipe: Recipe,
    split: pd.DataFrame,
    profile: Profile,
    weights: str | None = None,
    root: str | Path | None = None,
) -> runs.Run:
    """Find the finished run of a recipe on these data, or train it now as chapter 5 shows.

    A head on a frozen backbone is trained on features that are computed once, else the whole network on
    images. The saved model is the whole network in both cases, in float32. Early stopping watches the dev
    set's kappa, the plateau its loss (KL 1.5.1).

    Parameters
    ----------
    name : str
        The run's.
    recipe : Recipe
        Of one stage that learns the label.
    split : DataFrame
        As `data.split_dev` returns it.
    profile : Profile
        Says how to use the machine (threads, GPUs, tracing), and is part of the run's identity.
    weights : {"imagenet", "random"}, optional
        By default what `backbones.find_weights` says.
    root : path, optional
        As `runs.fit_or_load`.

    Raises
    ------
    TrainingError
        A recipe of several stages, or a loss that is no number.
    MuraError
        What `backbones.weights_file` and `runs.fit_or_load` raise.
    """
    stage = recipe.stages[0]
    others = (stage.target != "label", stage.steps, stage.fraction, recipe.parts, recipe.augment == "KN")
    if len(recipe.stages) > 1 or any(others):
        raise TrainingError(
            "Keras trains recipes of one stage, in epochs, on the label, with all body parts and KL's "
            "augmentation or none. torch_tools.training trains others."
        )
    start = weights or backbones.find_weights(recipe.backbone, profile)

    def make(workdir: Path) -> tuple[keras.Model, pd.DataFrame, pd.DataFrame]:
        return _train(recipe, split, profile, start, workdir)

    return runs.fit_or_load(name, recipe.config(), make, split, profile, start, root)


def _train(recipe: Recipe, split: pd.DataFrame, profile: Profile, weights: str, workdir: Path):
    """Train: the network, its history, its predictions on test."""
    stage, films = recipe.stages[0], data.sample_patients(split, recipe.fraction, recipe.seed)
    store = data.PixelStore.open_or_build(films, recipe.size, workers=profile.workers)
    options = {"batch_size": recipe.batch_size, "seed": recipe.seed, "workers": profile.workers}
    sets = data.kl_datasets(films, store, scale="0..255", **options)
    names = ("train original" if recipe.augment == "none" else "train augmented", "validation", "test")
    train, dev, test = (sets[name] for name in names)
    keras.utils.set_random_seed(recipe.seed)
    if stage.frozen:
        extractor = backbones.extractor(recipe.backbone, recipe.size, weights)
        known = backbones.KerasExtractor(extractor)
        train, dev, test = (extract(known, batches, stage.views) for batches in (train, dev, test))
        keras.utils.set_random_seed(recipe.seed)  # the head does not depend on whether features were known
        model = compiled(models.transfer_head(known.dim, stage.head or (), recipe.dropout), stage)
    else:
        with on_devices(profile):
            model = build(recipe, weights, profile.run_eagerly)
    history = fit(model, train, dev, stage.epochs or 0, workdir, stopping(stage))
    predictions = predict(model, test)
    if stage.frozen:
        return models.with_head(extractor, model), history, predictions
    plain = build(recipe, "random")  # without the optimiser's state, in float32, for one device
    plain.set_weights(model.get_weights())
    return plain, history, predictions


def build(recipe: Recipe, weights: str, run_eagerly: bool = False) -> keras.Model:
    """Build and compile a recipe's network (`models.transfer_model`) from "imagenet" or "random" weights."""
    stage = recipe.stages[0]
    kind = (recipe.backbone, not stage.frozen, stage.head or (), recipe.size, weights, recipe.dropout)
    return compiled(models.transfer_model(*kind), stage, run_eagerly)


def compiled(model: keras.Model, stage: Stage, run_eagerly: bool = False) -> keras.Model:
    """Compile a model as the report: Adam, binary cross-entropy, the metrics of its figures."""
    model.compile(
        optimizer=keras.optimizers.Adam(stage.learning_rate),
        loss="binary_crossentropy",
        metrics=models.abnormality_metrics(),
        run_eagerly=run_eagerly,
        # XLA needs minutes for networks of this depth and, on a CPU, is slower afterwards.
        jit_compile=False,  # pyright: ignore[reportArgumentType]
    )
    return model


def stopping(stage: Stage) -> list[keras.callbacks.Callback]:
    """Stop early by dev's kappa; halve the learning rate on a plateau of its loss (KL 1.5.1)."""
    chosen: list[keras.callbacks.Callback] = []
    if stage.patience is not None:
        options = {"mode": "max", "patience": stage.patience, "restore_best_weights": True}
        chosen.append(keras.callbacks.EarlyStopping("val_kappa", **options))
    if stage.plateau is not None:
        chosen.append(keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=stage.plateau))
    return chosen


# --- Any model ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_devices(profile: Profile, names: Sequence[str] = ()) -> Iterator[None]:
    """Make models inside for this machine's GPUs as the profile says; without GPUs, nothing changes.

    Parameters
    ----------
    profile : Profile
        `all_gpus`: with two GPUs or more, a model is mirrored on all, and each batch is divided among them.
        `mixed_precision`: layers compute in float16 and keep float32 weights.
    names : sequence of str
        Devices to mirror on instead, e.g. ("CPU:0", "CPU:1").
    """
    gpus = [gpu.name.removeprefix("/physical_device:") for gpu in tf.config.list_physical_devices("GPU")]
    devices = names or (gpus if profile.all_gpus else [])
    policy = keras.config.dtype_policy()
    if gpus and profile.mixed_precision:
        keras.config.set_dtype_policy("mixed_float16")
    try:
        with (
            tf.distribute.MirroredStrategy(devices).scope() if len(devices) > 1 else contextlib.nullcontext()
        ):
            yield
    finally:
        keras.config.set_dtype_policy(policy)


def fit(
    model: keras.Model,
    train: data.Batches,
    dev: data.Batches,
    epochs: int,
    workdir: Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> pd.DataFrame:
    """Train as ``model.fit`` does, and go on after a kill.

    Parameters
    ----------
    model : keras.Model
        Compiled. Batches on another scale than its `expected_scale` are refused.
    train, dev : Batches
        Order and augmentation depend on the epoch alone.
    epochs : int
        At most.
    workdir : Path, optional
        After every epoch a checkpoint goes there. The next call with this folder goes on after the last
        finished epoch, with the history so far, the best weights, and what EarlyStopping and
        ReduceLROnPlateau have counted. None: nothing is kept.
    callbacks : sequence of keras.callbacks.Callback
        Early stopping and the like.

    Returns
    -------
    DataFrame
        A row an epoch: `epoch` (from 1), `loss` and the metrics, the same with ``val_`` on dev,
        `learning_rate`, `seconds`.

    Raises
    ------
    TrainingError
        A loss that is no number, or a working folder of another model.
    DataError
        Batches on the wrong scale.
    DiskError
        No room for a checkpoint.
    """
    on, watched = _dataset(model, train), _dataset(model, dev)
    checkpoint = Checkpoint(model, workdir, callbacks, on)
    done, stopped = checkpoint.restore()
    with tqdm(total=len(on) * epochs, initial=len(on) * done, leave=False, file=sys.stderr) as checkpoint.bar:
        model.fit(
            on,
            validation_data=watched,
            epochs=epochs,
            # With nothing left to train, Keras only ends the training: best weights are put back.
            initial_epoch=epochs if stopped else done,
            shuffle=False,  # `Batches` shuffles; Keras would mix once more, by a state that cannot be kept
            callbacks=[*callbacks, checkpoint],
            verbose=0,  # pyright: ignore[reportArgumentType]
        )
    return pd.DataFrame(checkpoint.history)


def predict(model: keras.Model, batches: data.Batches) -> pd.DataFrame:
    """Return the rows of the index behind `batches`, in their order, with `probability`, float64."""
    _check(model, batches)
    size = min(batches.batch_size, len(batches.index))
    parts = [backbones.forward(model, x, size) for x, _ in batches.some(range(len(batches)))]
    probability = np.concatenate(parts).reshape(-1).astype(float)
    return batches.index.iloc[batches.order[: len(probability)]].assign(probability=probability)


def _check(model: keras.Model, batches: data.Batches) -> None:
    """Refuse batches on another scale than the model expects."""
    if hasattr(model, "expected_scale"):
        data.check_scale(model.expected_scale, batches)


def _dataset(model: keras.Model, batches: data.Batches) -> Any:
    """Make a PyDataset of the batches."""
    _check(model, batches)
    dataset = batches.keras()
    if model.distribute_strategy.num_replicas_in_sync > 1:
        # Keras 3.15 looks at the data of a model on several devices before it trains; with several workers
        # this takes batches away from the first epoch.
        dataset.workers = 1
    return dataset


WEIGHTS, STATE, DIGESTS = "model.weights.h5", "state.json", "digests.json"
COUNTED = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")  # by Keras's callbacks


class Checkpoint(keras.callbacks.Callback):
    """After each epoch, a folder with all that a training needs to go on; what `fit` does in each epoch.

    A folder ``epoch-0003`` holds model.weights.h5 (with the optimiser), state.json (history, what the other
    callbacks have counted) and digests.json; it is whole or absent. Those of the last two epochs, and
    of the best ones then, stay.

    Parameters
    ----------
    network : keras.Model
        Compiled.
    workdir : Path or None
        Where the folders go; None: nowhere.
    others : sequence of keras.callbacks.Callback
        The callbacks that run before this one.
    train : PyDataset
        Its `set_epoch` is called before each epoch.

    Notes
    -----
    Keras's BackupAndRestore forgets the history and what callbacks have counted, and a kill while it writes
    leaves a damaged file. Dropout's random numbers depend on the epoch here, so nothing of them is kept.
    """

    bar: tqdm  # `fit` opens and closes it

    def __init__(self, network: Any, workdir: Path | None, others: Sequence[Any], train: Any) -> None:
        super().__init__()
        self.network, self.workdir, self.others, self.train = network, workdir, others, train
        self.history, self.counted, self.best, self.best_weights = [], [], None, None

    def restore(self) -> tuple[int, bool]:
        """Put the newest whole checkpoint back: how many epochs are done, and whether it was stopped."""
        for folder in sorted(self.workdir.glob("epoch-*"), reverse=True) if self.workdir else ():
            try:
                state = _verified(folder)
                best = folder.with_name(state["best"] or folder.name)
                _verified(best)
            except DiskError as error:
                print(f"{error} Going back to the epoch before {folder.name}.")
                disk.remove(folder)
                continue
            self.history, self.counted, self.best = state["history"], state["counted"], state["best"]
            self._load(folder, best)
            print(f"Going on after epoch {len(self.history)}.")
            return len(self.history), state["stopped"]
        return 0, False

    def _load(self, folder: Path, best: Path) -> None:
        """Load verified weights: what fails here is of another model."""
        try:
            with self.network.distribute_strategy.scope():
                self.network.optimizer.build(self.network.trainable_variables)
                self.network.load_weights(best / WEIGHTS)
                self.best_weights = self.network.get_weights()
                self.network.load_weights(folder / WEIGHTS)
        except (ValueError, KeyError) as error:
            raise TrainingError(
                f"{folder} was left by another model or optimiser. What changes the result belongs into the "
                f"run's config; to start anew, delete {self.workdir}."
            ) from error

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Put back what the other callbacks had counted: they have just begun anew."""
        for callback, counted in zip(self.others, self.counted, strict=False):
            best = {"best_weights": self.best_weights} if hasattr(callback, "best_weights") else {}
            vars(callback).update(counted | best)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Go to the epoch's order, augmentation and dropout."""
        self.train.set_epoch(epoch)
        for state in self.network.non_trainable_variables:
            if "seed_generator" in state.path:  # dropout's: a seed, and how many numbers were drawn
                state.assign([_numpy(state)[0], epoch << 16])
        self.since = time.perf_counter()
        self.learning_rate = float(_numpy(self.network.optimizer.learning_rate))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Move the progress bar; stop at the first loss that is no number."""
        self.bar.update()
        if not np.isfinite(loss := (logs or {}).get("loss", 0.0)):
            raise TrainingError(
                f"The loss became {loss} in epoch {len(self.history) + 1}. Lower the learning rate, now "
                f"{self.learning_rate:g}, and look for inputs that are no numbers."
            )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Add to the history, and keep a checkpoint."""
        scores = {name: float(value) for name, value in (logs or {}).items()}
        own = {"learning_rate": self.learning_rate, "seconds": round(time.perf_counter() - self.since, 3)}
        self.history.append({"epoch": epoch + 1} | scores | own)
        self.bar.set_postfix(val_loss=scores.get("val_loss"))
        if self.workdir is not None:
            self._save(self.workdir, f"epoch-{epoch + 1:04d}", f"epoch-{epoch:04d}")

    def _save(self, workdir: Path, name: str, before: str) -> None:
        """Write the folder of an epoch, and remove those that nobody needs any more."""
        best = [c.best_epoch + 1 for c in self.others if getattr(c, "restore_best_weights", False)]
        kept = {name, before, self.best}
        self.best = f"epoch-{best[0]:04d}" if best else None
        counted = [{key: vars(c)[key] for key in COUNTED if key in vars(c)} for c in self.others]
        state = {"history": self.history, "counted": counted, "best": self.best}
        state["stopped"] = bool(self.network.stop_training)
        with disk.atomic(workdir / name, runs.VARIABLE) as folder:
            folder.mkdir()
            self.network.save_weights(folder / WEIGHTS)
            (folder / STATE).write_text(json.dumps(state, default=float))
            disk.write_json(folder / DIGESTS, {file: disk.digest(folder / file) for file in (WEIGHTS, STATE)})
        for old in workdir.glob("epoch-*"):
            if old.name not in kept | {self.best}:
                disk.remove(old)


def _numpy(variable: Any) -> Any:
    """Read the value of a variable, on one device or several."""
    return keras.ops.convert_to_numpy(variable)


def _verified(folder: Path) -> dict[str, Any]:
    """Read state.json; DiskError unless all files of the checkpoint are as they were written."""
    digests = disk.read_json(folder / DIGESTS, "")
    for name in (WEIGHTS, STATE):
        if not (folder / name).is_file() or disk.digest(folder / name) != digests.get(name):
            raise DiskError(f"{folder / name} is damaged.")
    return disk.read_json(folder / STATE, "")
