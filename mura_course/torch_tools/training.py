"""A training with Lightning that survives a kill: the PyTorch half's `torch_fit`, `Task` and `predict`.

Imports torch and Lightning. Writes only below the `workdir` it is given. Loss, metrics and optimiser stand in
`Task`; chapter 7 writes the same training step out in plain PyTorch. Devices, precision and several machines
are `lightning.Trainer`'s: each process is given its share of every batch, so that their mean gradient is that
of one process (the setup chapter shows how).
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

# First, for it sees to it that torch's companions load beside TensorFlow.
from .torch_models import TorchModelError, accelerator, one_of

# isort: split
import lightning
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import classification
from torchmetrics.utilities.data import dim_zero_cat

from . import data, pixels
from .progress import Line
from .runs import duration

TARGETS = {"label": 1, "body_part": len(data.BODY_PARTS), "both": 1 + len(data.BODY_PARTS)}
"""What a model can learn -> how many outputs it needs for that; of "both", abnormal comes first."""


class Task(lightning.LightningModule):
    """A model with its loss, metrics and optimiser, as Lightning's Trainer wants them.

    target: "label" (binary cross-entropy; accuracy, AUC, Cohen's kappa), "body_part" (cross-entropy over the
    seven of `data.BODY_PARTS`; accuracy, macro F1: KN 3.3), or "both" (the sum of both losses; the label's
    metrics, and the body part's F1). rate: Adam's learning rate, or a list of (module, rate) where parts of
    the model learn at rates of their own. Batches: (x, y) as of `pixels.Batches.torch`, and what they weigh,
    where they are a share of a batch. Raises TorchModelError: another target.
    """

    def __init__(self, model: nn.Module, rate, target: str = "label"):
        super().__init__()
        self.model, self.rate, self.target = model, rate, one_of("target", target, TARGETS)
        self.watched = nn.ModuleDict({stage: task_metrics(target) for stage in ("fitting", "dev")})
        self.loss_of = nn.ModuleDict({stage: torchmetrics.MeanMetric() for stage in ("fitting", "dev")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def loss(self, logits: torch.Tensor, y) -> torch.Tensor:
        """The batch's mean loss; logits (n, outputs); y as the batches have it."""
        label, part = _both(y, self.target)
        loss = logits.new_zeros(())
        if label is not None:
            loss = loss + functional.binary_cross_entropy_with_logits(logits[:, 0], label)
        if part is not None:
            loss = loss + functional.cross_entropy(logits[:, -len(data.BODY_PARTS) :], part)
        return loss

    def training_step(self, batch, _) -> torch.Tensor:
        return self._step(batch, "fitting")

    def validation_step(self, batch, _) -> None:
        self._step(batch, "dev")

    def _step(self, batch, stage: str) -> torch.Tensor:
        x, y, *weight = batch
        logits = self(x)
        loss, weight = self.loss(logits, y), float(weight[0]) if weight else 1.0
        if weight > 0:  # else these rows are another process's
            self.loss_of[stage].update(loss.detach(), len(x))
            label, part = _both(y, self.target)
            if label is not None:
                self.watched[stage]["label"].update(logits[:, 0].detach().sigmoid(), label.int())
            if part is not None:
                self.watched[stage]["body_part"].update(logits[:, -len(data.BODY_PARTS) :].detach(), part)
        return loss * weight

    def on_train_epoch_end(self) -> None:
        self._log_epoch("fitting", "")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("dev", "val_")

    def _log_epoch(self, stage: str, prefix: str) -> None:
        values = {"loss": self.loss_of[stage].compute()}
        for collection in self.watched[stage].values():
            values |= {name: value for name, value in collection.compute().items() if name not in values}
            collection.reset()
        self.loss_of[stage].reset()
        self.log_dict({prefix + name: float(value) for name, value in values.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if isinstance(self.rate, (int, float)):
            wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            return torch.optim.Adam(wanted, lr=self.rate)
        groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in self.rate]
        return torch.optim.Adam(groups)


def _both(y, target: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(label, body part) of a batch's y; None for what the target does not ask for."""
    if target == "both":
        return y["label"], y["body_part"]
    return (y, None) if target == "label" else (None, y)


class BinaryAUROC(classification.BinaryAUROC):
    """TorchMetrics', but undefined (NaN), not 0, where all images are of one class."""

    def compute(self) -> torch.Tensor:
        if dim_zero_cat(self.target).unique().numel() < 2:
            return torch.tensor(float("nan"))
        return super().compute()


def task_metrics(target: str) -> nn.ModuleDict:
    """What a training watches: as both reports for the label, as KN 3.3 for the body part."""
    parts = len(data.BODY_PARTS)
    of_label = {
        "accuracy": classification.BinaryAccuracy(),
        "auc": BinaryAUROC(),
        "kappa": classification.BinaryCohenKappa(),
    }
    of_part = {
        "accuracy": classification.MulticlassAccuracy(parts, average="micro"),
        "f1": classification.MulticlassF1Score(parts, average="macro"),
    }
    chosen = {"label": of_label, "body_part": of_part}
    return nn.ModuleDict(
        {
            name: torchmetrics.MetricCollection(those)
            for name, those in chosen.items()
            if target in (name, "both")
        }
    )


def predict(model: nn.Module, batches, target: str = "label") -> pd.DataFrame:
    """The rows of the index behind the batches, in their order, with what the model says of each.

    batches: `pixels.Batches`, or `feature_store.FeatureBatches` for a head. target "label": a column
    `probability` of abnormal, float64 in [0, 1]. "body_part": a column for each of `data.BODY_PARTS` with its
    probability. "both": these and `probability`. Runs on the GPU where there is one, and leaves the model on
    the processor. Raises TorchModelError: another target; DataError where the batches deliver another scale
    than the model expects.
    """
    one_of("target", target, TARGETS)
    _check_scale(model, batches)
    rows, was_training = batches.index.iloc[batches.order], model.training
    model.eval().to(accelerator())
    with torch.inference_mode():
        logits = torch.cat([model(x.to(accelerator())).float().cpu() for x, _ in batches.torch()])
    model.train(was_training).cpu()
    if target != "label":
        shares = logits[:, -len(data.BODY_PARTS) :].double().softmax(dim=1).numpy()
        rows = rows.assign(**pd.DataFrame(shares, rows.index, list(data.BODY_PARTS)))
    if target != "body_part":
        rows = rows.assign(probability=logits[:, 0].double().sigmoid().numpy())
    return rows


def _check_scale(model: nn.Module, batches) -> None:
    if getattr(model, "expected_scale", None) is not None:
        pixels.check_scale(model.expected_scale, batches)


# Training ---------------------------------------------------------------------------------------


def torch_fit(
    task: Task,
    train,
    dev,
    epochs: int,
    workdir: str | Path,
    monitor: str | None = "val_accuracy",
    patience: int = 4,
    **trainer_options,
) -> pd.DataFrame:
    """Lightning's Trainer on `Batches`, with early stopping, resuming after a kill: the history by epoch.

    train, dev: `pixels.Batches`, or `feature_store.FeatureBatches` for a head. monitor, patience: early
    stopping on the highest of this metric (KN 4: accuracy on dev, patience 4); at the end the model has the
    weights of its epoch. None: trained to the end, as it then is; dev may be None, too. workdir: after every
    epoch Lightning keeps all state there; the next call with the same workdir goes on after the last finished
    epoch. trainer_options: of `lightning.Trainer`, e.g. devices, num_nodes, strategy, precision; by default
    one device.

    Returns columns `epoch` (from 1), the metrics, these with `val_` on dev, `learning_rate`, `seconds`.
    Raises TorchModelError: a loss that is not a number, a workdir of another model; DataError: the scale.
    """
    sets = [train] if dev is None else [train, dev]
    for batches in sets:
        _check_scale(task.model, batches)
    stopping = [EarlyStopping(monitor, mode="max", patience=patience)] if monitor else []
    keeper = _Keeper(Path(workdir), monitor, epochs)
    state, file = keeper.newest()
    if state is not None and not keeper.fits(task, file):
        raise TorchModelError(
            f"{file} was left by another model. What changes the result belongs into the run's config; to "
            f"start afresh, delete {workdir}."
        )
    if state is None or not (state["stopped"] or len(state["rows"]) >= epochs):
        if state is not None:
            print(f"Resumed after epoch {len(state['rows'])}.")
        with _quiet():
            trainer = lightning.Trainer(
                max_epochs=epochs,
                callbacks=[*stopping, keeper],
                logger=CSVLogger(workdir, name="log"),
                **DEFAULTS | trainer_options,
            )
            loaders = [_Shares(batches, trainer).loader() for batches in sets]
            trainer.fit(task, *loaders, ckpt_path=file, weights_only=False)
    else:  # killed after its last epoch, or a first stage that another run has trained, too
        print(f"Nothing left to train here: {len(state['rows'])} epochs were finished earlier.")
        keeper.rows = state["rows"]
    keeper.put_back_best(task)
    return pd.DataFrame(keeper.rows)


# Batches bring their own threads; a frozen backbone is in eval mode; every process logs the same numbers.
_EXPECTED = (
    ".*many workers.*",
    ".*__len__. defined.*",
    ".*number of training batches.*",
    ".*eval mode at the start.*",
    ".*sync_dist.*",
    ".*no .val_dataloader.*",
    ".*exists and is not empty.*",
    ".*treespec, LeafSpec.*",
)

DEFAULTS = {
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # Batches bring their own order, `_Shares` divides it
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's greetings, and its advice that does not apply."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for text in _EXPECTED:
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        logger.setLevel(level)


class _Shares(IterableDataset):
    """Of every batch the rows of one process, every n-th, and what their mean weighs in that of all.

    Of a last batch with fewer images than processes, some get an image of another's, which weighs nothing.
    """

    def __init__(self, batches, trainer: lightning.Trainer):
        self.batches, self.trainer = batches.torch().batches, trainer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        for x, y in self.batches:
            rows = slice(rank, None, world) if rank < len(x) else slice(0, 1)
            share = {name: values[rows] for name, values in y.items()} if isinstance(y, dict) else y[rows]
            mine = len(range(rank, len(x), world))
            yield x[rows], share, np.float32(mine * world / len(x))

    def loader(self) -> DataLoader:
        return DataLoader(self, batch_size=None)


class _Keeper(ModelCheckpoint):
    """Keeps all state after each epoch: ``last.ckpt``, the best epoch's ``best.ckpt``; and the history.

    Before each epoch it says to the training set which one it is: order and augmentation hang on that alone.
    """

    def __init__(self, workdir: Path, monitor: str | None, epochs: int):
        kept = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        super().__init__(workdir, "best", monitor=monitor, mode="max", **kept)
        self.workdir, self.epochs = workdir, epochs
        self.rows, self.stopped, self.since = [], False, 0.0

    def on_fit_start(self, trainer, module) -> None:
        self.line, self.start = Line(show=trainer.is_global_zero), time.perf_counter()

    def on_train_epoch_start(self, trainer, module) -> None:
        trainer.train_dataloader.dataset.batches.set_epoch(trainer.current_epoch)
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_number) -> None:
        self.line.passing(f"Epoch {len(self.rows) + 1}/{self.epochs}, batch {batch_number + 1}")

    def on_train_epoch_end(self, trainer, module) -> None:
        # Lightning calls this after the module's own, which logs, and after EarlyStopping's.
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not np.isfinite(row["loss"]):
            raise TorchModelError(
                f"The loss became {row['loss']} in epoch {len(self.rows) + 1}. Lower the learning rate, now "
                f"{_rate(trainer):g}, and look for inputs that are not numbers. A changed config starts a "
                "new run."
            )
        seconds = round(time.perf_counter() - self.since, 3)
        self.rows.append(
            {"epoch": len(self.rows) + 1} | row | {"learning_rate": _rate(trainer), "seconds": seconds}
        )
        self.stopped = trainer.should_stop
        shown = [name for name in ("loss", "val_loss", self.monitor) if name in row]
        scores = ", ".join(f"{name} {row[name]:.3f}" for name in shown)
        self.line.lasting(f"Epoch {len(self.rows)}/{self.epochs}, {scores}")
        super().on_train_epoch_end(trainer, module)
        # Its own `save_last` would save only in epochs that are the best so far.
        trainer.save_checkpoint(self.workdir / "last.ckpt")

    def on_fit_end(self, trainer, module) -> None:
        taken = duration(time.perf_counter() - self.start)
        self.line.end(f"Trained {len(self.rows)} of {self.epochs} epochs in {taken}")

    def state_dict(self) -> dict:
        return super().state_dict() | {"rows": self.rows, "stopped": self.stopped}

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.stopped = list(state["rows"]), state["stopped"]
        super().load_state_dict(state)

    def newest(self) -> tuple[dict | None, Path | None]:
        """This callback's state, and its file: of the last finished epoch, else of the best one."""
        for file in (self.workdir / "last.ckpt", self.workdir / "best.ckpt"):
            if not file.exists():
                continue
            try:
                state = _read(file)["callbacks"][self.state_key]
            except _DAMAGE as error:
                print(f"{file} is damaged ({error}): going back to an epoch before it.")
                file.unlink(missing_ok=True)
                continue
            return state, file
        return None, None

    def fits(self, task: Task, file: Path) -> bool:
        stored = {name: value.shape for name, value in _read(file)["state_dict"].items()}
        return stored == {name: value.shape for name, value in task.state_dict().items()}

    def put_back_best(self, task: Task) -> None:
        file = self.workdir / "best.ckpt"
        try:
            task.load_state_dict(_read(file)["state_dict"])
        except (*_DAMAGE, FileNotFoundError) as error:
            raise TorchModelError(
                f"{file}, with the weights of the best epoch, is missing or damaged ({error}). Delete "
                f"{self.workdir} to train again."
            ) from error


_DAMAGE = (EOFError, OSError, RuntimeError, KeyError, pickle.UnpicklingError)


def _read(file: Path) -> dict:
    # Not weights only: a callback's state holds paths. The file is one that this machine has written.
    return torch.load(file, map_location="cpu", weights_only=False)


def _rate(trainer: lightning.Trainer) -> float:
    """The learning rate of the last group, which is the head's."""
    return float(trainer.optimizers[0].param_groups[-1]["lr"])
