"""The Keras half's models, its kappa metric, and a training loop that survives a kill.

Imports Keras, so import this module only where Keras is wanted; writes only below the `workdir` it is given.
Chapter 5 explains transfer learning, chapter 6 the funnel CNNs and the metrics, the setup chapter how an
interrupted training goes on. Backbones and their weights stand in `mura_course.backbones`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import layers

from . import backbones
from .errors import MuraError
from .profiles import Profile
from .progress import Line
from .runs import duration, written

FILTERS = {"in": "halved", "out": "doubled"}
"""What happens to the number of filters from one convolution to the next, by direction of the funnel."""


class TrainingError(MuraError, RuntimeError):
    """A training that cannot go on; the message says why and what to change."""


def funnel_cnn(
    direction: str,
    conv_layers: int = 4,
    dropout: float = 0.3,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    widest: int = 256,
    narrowest: int = 32,
) -> keras.Model:
    """The custom CNN of KL 1.6, Figures 27 ("in") and 28 ("out"); chapter 6.

    Each block: 3x3 convolution, stride 1, "same", ReLU (Table 4); 2x2 max pooling, stride 2, "same"
    (Table 5); dropout. Then Flatten and one sigmoid unit: P(abnormal), float32 (batch, 1). Input: float32
    (batch, *input_shape) in 0..1; the model says so as `model.expected_scale`. At 224x224x3 with four layers
    it has 400,737 ("in") and 438,593 ("out") parameters, as the figures say.

    direction "in": `widest` filters first, halved from layer to layer (256, 128, 64, 32); `narrowest` is not
    used. "out": `narrowest` first, doubled (32, 64, 128, 256), `widest` is not used. The report tunes
    conv_layers over 4 and 5 but shows four layers only, also where it calls its best "out" model one of
    five. Here a fifth layer goes on in the same way, which the report does not state: "in" ends at 16
    filters, "out" at 512.

    Raises ValueError: an unknown direction, or filters that cannot be halved so often.
    """
    if direction not in FILTERS:
        raise ValueError(f"direction must be 'in' or 'out', not {direction!r}.")
    filters = [widest // 2**i if direction == "in" else narrowest * 2**i for i in range(conv_layers)]
    if conv_layers < 1 or filters[-1] < 1:
        raise ValueError(f"{conv_layers} layers from {widest} filters: the last has none. Use fewer layers.")
    x = inputs = keras.Input(input_shape, name="Input")
    for i, count in enumerate(filters, start=1):
        x = layers.Conv2D(count, 3, padding="same", activation="relu", name=f"Conv2D-{i}")(x)
        x = layers.MaxPool2D(2, strides=2, padding="same", name=f"MaxPool2D-{i}")(x)
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
    dropout: float = 0.2,
) -> keras.Model:
    """One of the models of KL 1.5, Table 3: a pretrained backbone, max pooling, dense layers, one sigmoid.

    backbone: "DenseNet201", "ResNet50" (the report's) or "EfficientNetLite0". trainable: whether its weights
    are trained; BatchNorm stays frozen in any case. dense_units: (), or the report's (128, 128,
    64). size: side of the images in pixels, by default the report's (224; ResNet50 256). weights: "imagenet"
    or "random", see `backbones.find_weights`. dropout: after the backbone and after each dense layer.

    Input: float32 (batch, size, size, 3) in 0..255, which the model scales as its backbone expects, and says
    so as `model.expected_scale`. Output: P(abnormal), float32 (batch, 1). Layers: Input, Scale, the backbone
    by its name, Head. Raises backbones.BackboneError and backbones.WeightsError.
    """
    extractor = backbones.extractor(backbone, size, weights, trainable)
    return with_head(extractor, transfer_head(extractor.output_shape[1], dense_units, dropout))


def transfer_head(features: int, dense_units: Sequence[int] = (), dropout: float = 0.2) -> keras.Sequential:
    """What `transfer_model` puts on a backbone: (batch, features) -> P(abnormal), float32 (batch, 1)."""
    head = keras.Sequential([keras.Input((features,)), layers.Dropout(dropout)], name="Head")
    for units in dense_units:
        head.add(layers.Dense(units, activation="relu"))
        head.add(layers.Dropout(dropout))
    head.add(layers.Dense(1, activation="sigmoid", dtype="float32"))
    return head


def with_head(extractor: keras.Model, head: keras.Model) -> keras.Model:
    """A backbone (`backbones.extractor`) and a head, each with the weights it has, as one model."""
    model = keras.Model(
        extractor.input, head(extractor.output), name=extractor.name.replace("features", "transfer")
    )
    model.expected_scale = extractor.expected_scale
    return model


@keras.saving.register_keras_serializable(package="mura_course")
class FusedAdam(keras.optimizers.Adam):
    """Keras's Adam, each variable updated by one operation of TensorFlow instead of some thirty.

    The numbers are Adam's. But before the first step every operation is traced, and DenseNet201 has 604
    variables: its updates take longer to trace than the network. On several devices, and with
    another backend than TensorFlow, Keras's own updates are used.
    """

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        fused = keras.backend.backend() == "tensorflow" and not self.amsgrad
        if not fused or self._distribution_strategy.num_replicas_in_sync > 1:
            return super()._backend_update_step(grads, trainable_variables, learning_rate)
        import tensorflow as tf

        step = tf.cast(self.iterations + 1, "float32")
        scalars = {
            "beta1_power": tf.pow(float(self.beta_1), step),
            "beta2_power": tf.pow(float(self.beta_2), step),
            "lr": tf.cast(learning_rate, "float32"),
            "beta1": tf.constant(self.beta_1, "float32"),
            "beta2": tf.constant(self.beta_2, "float32"),
            "epsilon": tf.constant(self.epsilon, "float32"),
        }
        for grad, variable in zip(grads, trainable_variables, strict=True):
            place = self._get_variable_index(variable)
            handles = [v.value.handle for v in (variable, self._momentums[place], self._velocities[place])]
            names = ("var", "m", "v")
            tf.raw_ops.ResourceApplyAdam(**dict(zip(names, handles, strict=True)), grad=grad, **scalars)


@keras.saving.register_keras_serializable(package="mura_course")
class BinaryCohenKappa(keras.metrics.Metric):
    """Cohen's kappa of labels and probabilities > threshold, over all batches since the last reset.

    Keras 3 has no such metric. Kappa is the agreement beyond chance: 0 for a coin or a constant answer, 1 for
    a perfect one (KL 1.5.2, chapter 6); NaN where labels and calls are all of one and the same class.
    """

    def __init__(self, threshold: float = 0.5, name: str = "kappa", **kwargs):
        super().__init__(name=name, **kwargs)
        self.threshold = threshold
        # Weighted counts: [label][called].
        self.counts = self.add_weight(shape=(2, 2), initializer="zeros", name="counts")

    def update_state(self, y_true, y_pred, sample_weight=None):
        label = keras.ops.reshape(keras.ops.cast(y_true, self.dtype), (-1, 1))
        called = keras.ops.convert_to_tensor(y_pred) > self.threshold
        called = keras.ops.reshape(keras.ops.cast(called, self.dtype), (-1, 1))
        rows = keras.ops.concatenate([1 - label, label], axis=1)
        if sample_weight is not None:
            rows *= keras.ops.reshape(keras.ops.cast(sample_weight, self.dtype), (-1, 1))
        columns = keras.ops.concatenate([1 - called, called], axis=1)
        self.counts.assign_add(keras.ops.matmul(keras.ops.transpose(rows), columns))

    def result(self):
        share = self.counts / keras.ops.sum(self.counts)
        agreement = share[0, 0] + share[1, 1]
        chance = keras.ops.sum(keras.ops.sum(share, axis=0) * keras.ops.sum(share, axis=1))
        return (agreement - chance) / (1 - chance)

    def get_config(self) -> dict:
        return super().get_config() | {"threshold": self.threshold}


def abnormality_metrics() -> list[keras.metrics.Metric]:
    """What both reports watch, for `model.compile`: `accuracy`, `auc` and `kappa`.

    Keras's AUC interpolates between 200 thresholds: it differs from the exact AUROC of
    `metrics.image_report` in the third decimal, and by more where nearly all probabilities are alike. It is
    there to watch a training, the report to be reported.
    """
    return [
        keras.metrics.BinaryAccuracy(name="accuracy"),
        keras.metrics.AUC(name="auc"),
        BinaryCohenKappa(name="kappa"),
    ]


@contextlib.contextmanager
def on_devices(profile: Profile, names: Sequence[str] | None = None) -> Iterator[None]:
    """Models made and compiled inside use this machine's GPUs as the profile says; without GPUs, no change.

    With `profile.all_gpus` and two GPUs or more, a model is mirrored on all of them and each batch shared out
    (tf.distribute.MirroredStrategy); `keras_fit` and `predict` may then be called inside or outside. With
    `profile.mixed_precision`, layers compute in float16 and keep float32 weights. names: devices to mirror on
    instead, e.g. ["CPU:0", "CPU:1"]. (Chapters 5 and 6.)
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    gpus = [
        device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices("GPU")
    ]
    names = names or (gpus if profile.all_gpus else [])
    scope = (
        tf.distribute.MirroredStrategy(list(names)).scope() if len(names) > 1 else contextlib.nullcontext()
    )
    policy = keras.config.dtype_policy()
    if gpus and profile.mixed_precision:
        keras.config.set_dtype_policy("mixed_float16")
    try:
        with scope:
            yield
    finally:
        keras.config.set_dtype_policy(policy)


def load(path: str | Path, expected_scale: str | None) -> keras.Model:
    """A model saved by a run, with the input scale that it expects (Keras does not save that)."""
    model = keras.saving.load_model(path)
    model.expected_scale = expected_scale
    return model


def predict(model: keras.Model, batches, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """The rows of the index behind the batches, with a column `probability`, float64 in [0, 1].

    batches: `pixels.Batches`, or a Keras PyDataset together with its `rows`, in the order of its batches.
    Raises TrainingError where there are more or fewer rows than predictions.
    """
    rows = batches.index.iloc[batches.order] if rows is None else rows
    source = _FullBatches(_as_keras(model, batches, "data to predict"))
    probability = model.predict(source, verbose=0).reshape(-1).astype(float)[: source.count]
    if len(probability) != len(rows):
        raise TrainingError(
            f"{len(probability)} predictions for {len(rows)} rows: drop no batch, pass its rows."
        )
    return rows.assign(probability=probability)


def keras_fit(
    model: keras.Model,
    train,
    dev,
    epochs: int,
    workdir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    class_weight: dict[int, float] | None = None,
) -> pd.DataFrame:
    """`model.fit` that resumes: the history, one row per epoch, of this and of earlier, killed calls.

    model: compiled, with known input shape. train, dev: `pixels.Batches` or PyDatasets; `train.set_epoch(e)`,
    where there is one, is called before each epoch, so that order and augmentation depend on e alone.
    workdir: after every epoch all state goes there: weights, optimiser, dropout seeds, history, and the
    callbacks' numbers and arrays (EarlyStopping's and ReduceLROnPlateau's best and wait). The next call
    with the same workdir goes on after the last finished epoch and, with
    `tf.config.experimental.enable_op_determinism()`, ends with the same weights and history as a call that
    nothing interrupted. None: nothing is kept.

    Returns columns `epoch` (from 1), the metrics, these with `val_` on dev, `learning_rate`, `seconds`.
    Raises TrainingError: no data, a loss that is not a number, a workdir of another model; runs.RunError: no
    room on the disk.
    """
    train, dev = _as_keras(model, train, "training set"), _as_keras(model, dev, "development set")
    if not model.built or model.optimizer is None:
        raise TrainingError("The model must have a known input shape and be compiled before it is trained.")
    keeper = _Keeper(Path(workdir) if workdir is not None else None, callbacks, train)
    keeper.restore(model)
    if not (keeper.stopped or keeper.epoch >= epochs):
        progress = _Progress(keeper, epochs)
        # shuffle=False: Keras would reorder the batches by a random state that cannot be kept.
        options: dict[str, Any] = {
            "epochs": epochs,
            "initial_epoch": keeper.epoch,
            "shuffle": False,
            "verbose": 0,
        }
        options |= {"validation_data": dev, "class_weight": class_weight}
        model.fit(train, callbacks=[*callbacks, keeper, progress], **options)
    else:  # killed after its last epoch: what remains is the callbacks' end, e.g. best weights put back
        keeper.finish(model)
    return pd.DataFrame(keeper.history)


def _as_keras(model: keras.Model, batches, what: str):
    """A PyDataset of the batches, on the scale that the model expects."""
    if len(batches) == 0:
        raise TrainingError(f"The {what} is empty: no batch to take from it. Is the split's name right?")
    expected = getattr(model, "expected_scale", None)
    if expected is not None:
        from .pixels import check_scale

        check_scale(expected, batches)
    dataset = batches.keras() if hasattr(batches, "keras") else batches
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is not None and strategy.num_replicas_in_sync > 1:
        # Keras 3.15 peeks at the data of a model on several devices; with several workers the peek takes
        # batches away from the first epoch.
        dataset.workers = 1
    return dataset


class _FullBatches(keras.utils.PyDataset):
    """Batches to predict, the last one filled up: one of another size would be traced anew, which is slow."""

    def __init__(self, dataset):
        super().__init__(workers=dataset.workers, max_queue_size=dataset.max_queue_size)
        self.dataset = dataset
        self.first, last = len(dataset[0][0]), len(dataset[len(dataset) - 1][0])
        self.count = self.first * (len(dataset) - 1) + last

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        x = self.dataset[i][0]
        return (np.concatenate([x, np.zeros((self.first - len(x), *x.shape[1:]), x.dtype)]),)


class _Keeper(keras.callbacks.Callback):
    """After each epoch, keeps model, optimiser, history and the state of the callbacks, which run before it.

    One file per epoch, `epoch-0003.npz`, written beside and renamed; the two newest stay, so that a damaged
    file costs one epoch.
    """

    def __init__(self, workdir: Path | None, callbacks: Sequence, train):
        super().__init__()
        self.workdir, self.others, self.train = workdir, callbacks, train
        self.epoch, self.stopped, self.history, self.states = 0, False, [], None

    # Saving

    def on_epoch_begin(self, epoch, logs=None):
        if hasattr(self.train, "set_epoch"):
            self.train.set_epoch(epoch)
        self.since, self.rate = time.perf_counter(), _rate(self.model)

    def on_epoch_end(self, epoch, logs=None):
        row = {key: float(value) for key, value in (logs or {}).items()}
        _check_finite(row.get("loss", 0.0), epoch, self.model)
        seconds = round(time.perf_counter() - self.since, 3)
        self.history.append({"epoch": epoch + 1} | row | {"learning_rate": self.rate, "seconds": seconds})
        self.epoch, self.stopped = epoch + 1, bool(self.model.stop_training)
        if self.workdir is not None:
            self._save()

    def _save(self):
        arrays = {f"variable/{i}": _numpy(v) for i, v in enumerate(_variables(self.model))}
        states = []
        for i, callback in enumerate(self.others):
            state, own_arrays = _split_state(callback)
            states.append([type(callback).__name__, state])
            arrays |= {f"callback/{i}/{key}": value for key, value in own_arrays.items()}
        meta = {"epoch": self.epoch, "stopped": self.stopped, "history": self.history}
        meta |= {"callbacks": states, "arrays": sorted(arrays)}
        self.workdir.mkdir(parents=True, exist_ok=True)
        with written(self._file(self.epoch)) as beside, open(beside, "wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
        for old in sorted(self.workdir.glob("epoch-*.npz"))[:-2]:
            old.unlink(missing_ok=True)

    def _file(self, epoch: int) -> Path:
        return self.workdir / f"epoch-{epoch:04d}.npz"

    # Restoring

    def restore(self, model: keras.Model):
        """Put back the newest whole state in the workdir, if any; say so where a file is damaged."""
        files = sorted(self.workdir.glob("epoch-*.npz"), reverse=True) if self.workdir is not None else []
        for file in files:
            try:
                with np.load(file, allow_pickle=False) as stored:
                    arrays = dict(stored)
                meta = json.loads(str(arrays.pop("meta")))
                if sorted(arrays) != meta["arrays"]:
                    raise ValueError("arrays are missing")
            except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, RuntimeError) as error:
                print(f"{file} is damaged ({error}): going back to the epoch before it.")
                file.unlink(missing_ok=True)
                continue
            with _scope(model):
                self._put_back(model, file, meta, arrays)
            print(f"Resumed after epoch {self.epoch}.")
            return

    def _put_back(self, model: keras.Model, file: Path, meta: dict, arrays: dict[str, np.ndarray]):
        variables = _variables(model)
        values = [arrays[f"variable/{i}"] for i in range(sum(key.startswith("variable/") for key in arrays))]
        then = [value.shape for value in values] + [name for name, _ in meta["callbacks"]]
        now = [tuple(v.shape) for v in variables] + [type(callback).__name__ for callback in self.others]
        if then != now:
            raise TrainingError(
                f"{file} was left by another model, optimiser or list of callbacks. What changes the result "
                f"belongs into the run's config; to start afresh, delete {self.workdir}."
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        self.epoch, self.stopped, self.history = meta["epoch"], meta["stopped"], meta["history"]
        self.states = [
            state | _join_arrays(arrays, f"callback/{i}/") for i, (_, state) in enumerate(meta["callbacks"])
        ]
        if hasattr(self.train, "set_epoch"):
            self.train.set_epoch(self.epoch)

    def on_train_begin(self, logs=None):
        # After the others' own on_train_begin, which resets them.
        for callback, state in zip(self.others, self.states or [], strict=False):
            vars(callback).update(state)

    def finish(self, model: keras.Model):
        for callback in self.others:
            callback.set_model(model)
            callback.on_train_begin()
        self.on_train_begin()
        for callback in self.others:
            callback.on_train_end()


def _variables(model: keras.Model) -> list:
    """Weights, optimiser and seed generators (dropout), in a fixed order, without the metrics' counts."""
    with _scope(model):
        model.optimizer.build(model.trainable_variables)
    counts = {id(variable) for variable in model.metrics_variables}
    return [v for v in model.variables if id(v) not in counts] + list(model.optimizer.variables)


def _scope(model: keras.Model):
    """Where the model's variables live: several devices, where it was made for several."""
    strategy = getattr(model, "distribute_strategy", None)  # TensorFlow's only
    return strategy.scope() if strategy is not None else contextlib.nullcontext()


def _numpy(variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def _rate(model: keras.Model) -> float:
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


def _split_state(callback) -> tuple[dict, dict[str, np.ndarray]]:
    """A callback's plain attributes, and its arrays and lists of arrays as {"name/position": array}.

    Without what it was made with: Keras turns the sign of `min_delta` in each `fit` that minimises.
    """
    plain, arrays = {}, {}
    made_with = {
        name for kind in type(callback).__mro__ for name in inspect.signature(kind.__init__).parameters
    }
    for key, value in vars(callback).items():
        if key in made_with:
            continue
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            plain[key] = value
        elif isinstance(value, list) and value and all(isinstance(item, np.ndarray) for item in value):
            arrays |= {f"{key}/{i}": item for i, item in enumerate(value)}
    return plain, arrays


def _join_arrays(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, list[np.ndarray]]:
    joined: dict[str, list[np.ndarray]] = {}
    for key, value in arrays.items():  # in the order in which they were written
        if key.startswith(prefix):
            joined.setdefault(key.removeprefix(prefix).rpartition("/")[0], []).append(value)
    return joined


def _check_finite(loss: float, epoch: int, model: keras.Model):
    if not np.isfinite(loss):
        raise TrainingError(
            f"The loss became {loss} in epoch {epoch + 1}. Lower the learning rate, now {_rate(model):g}, "
            "and look for inputs that are not numbers. A changed config starts a new run."
        )


class _Progress(keras.callbacks.Callback):
    """Says how far the training is, and stops at the first loss that is not a number."""

    def __init__(self, keeper: _Keeper, epochs: int):
        super().__init__()
        self.keeper, self.epochs = keeper, epochs

    def on_train_begin(self, logs=None):
        self.line, self.start = Line(), time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self.current = epoch

    def on_train_batch_end(self, batch, logs=None):
        _check_finite((logs or {}).get("loss", 0.0), self.current, self.model)
        place = f"Epoch {self.current + 1}/{self.epochs}, batch {batch + 1}/{self.params['steps']}"
        self.line.passing(_with_scores(place, logs))

    def on_epoch_end(self, epoch, logs=None):
        self.line.lasting(_with_scores(f"Epoch {epoch + 1}/{self.epochs}", logs))

    def on_train_end(self, logs=None):
        taken = duration(time.perf_counter() - self.start)
        ended = f"Trained {len(self.keeper.history)} of {self.epochs} epochs in {taken}"
        self.line.end(_with_scores(ended, logs))


def _with_scores(text: str, logs: dict | None) -> str:
    scores = [f"{key} {value:.3f}" for key, value in (logs or {}).items() if "loss" in key or "auc" in key]
    return ", ".join([text, *scores])
