"""Training Keras models: recipes as runs, and a `fit` that survives a kill (room: keras_tools; chapter 5).

`train` finds or makes the run of a recipe; `fit` and `predict` take any compiled model, as chapter 6 shows.
Writes below the working folder that `fit` is given; features and runs lie where `data` and `runs` put them.
"""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
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
from ..errors import TrainingError
from ..profiles import Profile
from ..recipes import Recipe, Stage
from . import backbones, models

to_numpy: Any = keras.ops.convert_to_numpy

# --- Recipes as runs ----------------------------------------------------------------------------------


def train(
    name: str, recipe: Recipe, split: pd.DataFrame, profile: Profile, weights="", root=None, record=False
) -> runs.Run:
    """Find the finished run of a recipe on these data, or train it now as chapter 5 shows.

    What stands above a frozen trunk is trained on features or maps that are computed once, a whole network on
    images; random weights are calibrated first (`backbones.calibrate`). The saved model is the whole network
    in any case. Early stopping watches the dev set's kappa, the plateau its loss (KL 1.5.1). The predictions
    are of the dev and test images.

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
        By default ("") what `backbones.find_weights` says.
    root, record
        As `runs.fit_or_load`.

    Raises
    ------
    TrainingError
        A recipe of several stages, or a loss that is no number.
    MuraError
        What `weights.file` and `runs.fit_or_load` raise.
    """
    stage = recipe.stages[0]
    others = (stage.target != "label", stage.steps, stage.fraction, stage.schedule, recipe.parts)
    if len(recipe.stages) > 1 or any(others):
        raise TrainingError("Keras trains one stage, in epochs, on the label of all parts, unscheduled.")
    start = weights or backbones.find_weights(recipe.backbone, profile)

    def make(workdir: Path) -> tuple[keras.Model, pd.DataFrame, pd.DataFrame]:
        return _train(recipe, split, profile, start, workdir)

    return runs.fit_or_load(name, recipe.config(), make, split, profile, start, root, record=record)


def _train(recipe: Recipe, split: pd.DataFrame, profile: Profile, weights: str, workdir: Path):
    """Train: the network, its history, its predictions on dev and test."""
    stage, films = recipe.stages[0], data.sample_patients(split, recipe.fraction, recipe.seed)
    store = data.PixelStore.open_or_build(films, recipe.size, workers=profile.workers)
    options = {"batch_size": recipe.batch_size, "seed": recipe.seed, "workers": profile.workers}
    sets = data.kl_datasets(films, store, scale="0..255", **options)
    train, dev, test = (sets[name] for name in ("train original", "validation", "test"))
    train.augment, is_random = data.AUGMENTS[recipe.augment], weights == "random"
    keras.utils.set_random_seed(recipe.seed)
    with contextlib.nullcontext() if stage.frozen else on_devices(profile):
        extractor = backbones.extractor(recipe.backbone, recipe.size, weights, not stage.frozen)
        if is_random:
            backbones.calibrate(extractor, train)
        keras.utils.set_random_seed(recipe.seed)  # the head does not depend on how the backbone was made
        head = models.transfer_head(extractor.output_shape[1], stage.head or (), recipe.dropout)
        trunk, model = extractor, head if stage.frozen else models.with_head(extractor, head)
        if isinstance(stage.frozen, str):
            trunk, top = backbones.divide(extractor, stage.frozen, batchnorm=is_random)
            model = keras.Model(top.input, head(top.output))
        compiled(model, stage, profile.run_eagerly and not stage.frozen)
    if stage.frozen:
        known = backbones.KerasExtractor(trunk)
        train, dev, test = (extract(known, batches, stage.views) for batches in (train, dev, test))
    history = fit(model, train, dev, stage.epochs or 0, workdir, stopping(stage))
    found = pd.concat([predict(model, dev), predict(model, test)])
    # Joined anew: the whole network, without the optimiser's state.
    return models.with_head(extractor, head), history, found


def compiled(model: keras.Model, stage: Stage, run_eagerly: bool = False) -> keras.Model:
    """Compile a model as the report: Adam (or AdamW), binary cross-entropy, the metrics of its figures."""
    # With a weight decay, Keras's Adam is AdamW.
    adam = keras.optimizers.Adam(stage.learning_rate, weight_decay=stage.weight_decay or None)
    # XLA needs minutes for networks of this depth and, on a CPU, is slower afterwards.
    options: Any = {"run_eagerly": run_eagerly, "jit_compile": False}
    model.compile(adam, "binary_crossentropy", metrics=models.abnormality_metrics(), **options)
    return model


def stopping(stage: Stage) -> list[keras.callbacks.Callback]:
    """Stop early by dev's kappa; halve the learning rate on a plateau of its loss (KL 1.5.1)."""
    options = {"mode": "max", "patience": stage.patience, "restore_best_weights": True}
    stop: Any = keras.callbacks.EarlyStopping("val_kappa", **options)
    halve: Any = keras.callbacks.ReduceLROnPlateau("val_loss", 0.5, stage.plateau)  # pyright: ignore
    return [callback for callback in (stop, halve) if callback.patience is not None]


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
    gpus = tf.config.list_physical_devices("GPU")
    with contextlib.ExitStack() as stack:
        if gpus and profile.mixed_precision:
            stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
            keras.config.set_dtype_policy("mixed_float16")
        if names or (profile.all_gpus and len(gpus) > 1):
            stack.enter_context(tf.distribute.MirroredStrategy(names or None).scope())
        yield


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
        Order and augmentation depend on the epoch alone. Several targets are a dict, and so must the model's
        outputs be.
    epochs : int
        At most.
    workdir : Path, optional
        After every epoch a checkpoint goes there. The next call with this folder goes on after the last
        finished epoch, with the history so far, the best weights, and what EarlyStopping and
        ReduceLROnPlateau have counted; a damaged checkpoint, or another model's, is named and the training
        starts anew. None: nothing is kept.
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
        A loss that is no number after an epoch.
    DataError
        Batches on the wrong scale.
    DiskError
        No room for a checkpoint.
    """
    for batches in (train, dev):
        data.check_scale(getattr(model, "expected_scale", None), batches)
    on, watched = train.keras(), dev.keras()
    checkpoint = Checkpoint(model, workdir, callbacks, on)
    first = checkpoint.restore(epochs)
    with tqdm(total=len(on) * epochs, initial=len(on) * first, leave=False) as bar:
        progress = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: bar.update())
        options: Any = {"validation_data": watched, "epochs": epochs, "initial_epoch": first, "verbose": 0}
        # `Batches` shuffles; Keras cannot, and would warn.
        model.fit(on, shuffle=False, callbacks=[*callbacks, checkpoint, progress], **options)
    return pd.DataFrame(checkpoint.history)


def predict(model: keras.Model, batches: data.Batches) -> pd.DataFrame:
    """Return the rows of the index behind `batches`, in their order, with `probability`, float64.

    A model with the outputs "label" and "body_part" (a dict) also gives a column for each of
    `data.BODY_PARTS`.
    """
    data.check_scale(getattr(model, "expected_scale", None), batches)
    size = min(batches.batch_size, len(batches.index))
    said = [backbones.forward(model, x, size) for x, _ in batches.some(range(len(batches)))]
    found: Any = keras.tree.map_structure(lambda *ones: np.concatenate(ones).astype(float), *said)
    label = (found.pop("label") if isinstance(found, dict) else found).reshape(-1)
    rows = batches.index.iloc[batches.order[: len(label)]].assign(probability=label)
    parts = zip(data.BODY_PARTS, found["body_part"].T, strict=True) if isinstance(found, dict) else ()
    return rows.assign(**dict(parts))


COUNTED = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")  # by Keras's callbacks


class Checkpoint(keras.callbacks.Callback):
    """After each epoch, a file with all that a training needs to go on; what `fit` does in each epoch.

    ``checkpoint.npz`` holds all weights, the optimiser's variables, EarlyStopping's best weights and, as
    JSON, the history and what the other callbacks have counted. It is whole or absent.

    Parameters
    ----------
    network : keras.Model
        Compiled.
    workdir : Path or None
        Where the file goes; None: nowhere.
    others : sequence of keras.callbacks.Callback
        The callbacks that run before this one.
    train : tf.data.Dataset
        Of `Batches.keras`; its `set_epoch` is called before each epoch.

    Notes
    -----
    Keras's BackupAndRestore forgets the history and what callbacks have counted, and a kill while it writes
    leaves a damaged file.
    """

    def __init__(self, network: Any, workdir: Path | None, others: Sequence[Any], train: Any) -> None:
        super().__init__()
        self.network, self.others, self.train = network, others, train
        self.file = workdir / "checkpoint.npz" if workdir else None
        self.history, self.counted, self.best = [], [], None

    def restore(self, epochs: int) -> int:
        """Put back what the file holds; return how many epochs are done, all `epochs` of a stopped training.

        With nothing left to train, Keras only ends the training: best weights are put back.
        """
        if self.file is None or not self.file.exists():
            return 0
        try:
            with np.load(self.file) as stored:  # compares each array with its CRC-32
                state, *values = (stored[name] for name in stored.files)
            state = json.loads(state.item())
            with self.network.distribute_strategy.scope():
                self.network.optimizer.build(self.network.trainable_variables)
                variables = self._variables()
                if [v.shape for v in values[: len(variables)]] != [tuple(v.shape) for v in variables]:
                    raise ValueError("another model or optimiser")
                for variable, value in zip(variables, values, strict=False):
                    variable.assign(value)
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            print(f"{self.file} cannot be used ({error}): the training starts anew.")
            return 0
        self.history, self.counted = state["history"], state["counted"]
        self.best = values[len(variables) :] or None
        print(f"Going on after epoch {len(self.history)}.")
        return epochs if state["stopped"] else len(self.history)

    def _variables(self) -> list[Any]:
        """List all that training changes, dropout's seeds too, in an order that stays."""
        return [*self.network.variables, *self.network.optimizer.variables]

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Put back what the other callbacks had counted: they have just begun anew."""
        for callback, counted in zip(self.others, self.counted, strict=False):
            vars(callback).update(counted, best_weights=self.best)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Go to the epoch's order and augmentation."""
        self.train.set_epoch(epoch)
        self.since = time.perf_counter()
        self.learning_rate = float(to_numpy(self.network.optimizer.learning_rate))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Add to the history, and keep a checkpoint; stop at a loss that is no number."""
        row = {"epoch": epoch + 1} | {name: float(value) for name, value in (logs or {}).items()}
        row |= {"learning_rate": self.learning_rate, "seconds": round(time.perf_counter() - self.since, 3)}
        if not np.isfinite(row["loss"]):
            raise TrainingError(f"Loss {row['loss']} in epoch {epoch + 1}: lower the learning rate.")
        self.history.append(row)
        if self.file is None:
            return
        counted = [{key: vars(c)[key] for key in COUNTED if key in vars(c)} for c in self.others]
        best = [w for c in self.others if hasattr(c, "restore_best_weights") for w in c.best_weights or ()]
        state = {"history": self.history, "counted": counted, "stopped": bool(self.network.stop_training)}
        with disk.atomic(self.file, runs.VARIABLE) as beside, beside.open("wb") as content:
            arrays = [*map(to_numpy, self._variables()), *best]
            np.savez(content, *arrays, state=json.dumps(state, default=float))
