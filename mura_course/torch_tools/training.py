"""Training with Lightning: a model, its batches and a `Stage`; whole recipes as runs (room: torch_tools).

Writes below the working folder that it is given; first stages that several recipes share lie below
``<cache folder>/stages``. Chapter 7 writes the same training step out in plain PyTorch, chapter 8
trains in stages.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryCohenKappa, MulticlassF1Score
from torchmetrics.utilities.data import dim_zero_cat
from tqdm import tqdm

from .. import data, disk, paths, runs
from ..data import Batches, features
from ..errors import TrainingError
from ..profiles import Profile
from ..recipes import Recipe, Stage
from . import models

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # without its greetings

PARTS = len(data.BODY_PARTS)
OUTPUTS = {"label": 1, "body_part": PARTS, "both": 1 + PARTS}
"""What a model can learn -> how many outputs it needs for that; of "both", abnormal comes first."""


class AUROC(BinaryAUROC):
    """TorchMetrics', but undefined (NaN), not 0, where all images are of one class."""

    def compute(self) -> torch.Tensor:
        """Return the area under the ROC curve, a scalar."""
        one_class = dim_zero_cat(self.target).unique().numel() < 2
        return torch.tensor(float("nan")) if one_class else super().compute()


def task_metrics() -> nn.ModuleDict:
    """Make what a training watches: of the label as both reports, of the body part as KN 3.3."""
    label = {"accuracy": BinaryAccuracy(), "auc": AUROC(), "kappa": BinaryCohenKappa()}
    part = {"f1": MulticlassF1Score(PARTS, average="macro")}
    return nn.ModuleDict({"label": nn.ModuleDict(label), "body_part": nn.ModuleDict(part)})


def parameter_groups(model: Any, learning_rate: float, layer_decay: float) -> list[dict[str, Any]]:
    """Divide the weights: the head learns at `learning_rate`, each block at that of the block above x decay.

    The stem, before the first block, learns at the first block's rate times `layer_decay`. With a decay of 1
    there is one group, and the model need not be an `ImageClassifier`.
    """
    if layer_decay == 1:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": learning_rate}]
    blocks = models.BACKBONES[model.name].blocks
    stem = nn.ModuleList(module for name, module in model.backbone.named_children() if name not in blocks)
    parts = [model.head, *(getattr(model.backbone, name) for name in reversed(blocks)), stem]
    arrays = [list(part.parameters()) for part in parts]
    return [{"params": of, "lr": learning_rate * layer_decay**i} for i, of in enumerate(arrays)]


class Task(lightning.LightningModule):
    """A model and a stage as Lightning's Trainer wants them: loss, metrics, optimiser and history.

    The label's loss is binary cross-entropy, the body part's cross-entropy; of both, the sum. The history is
    kept in the checkpoints.

    Parameters
    ----------
    model : nn.Module
        x -> logits (n, outputs), as many as `OUTPUTS` says for the stage's target.
    stage : Stage
        Its target, learning rate, layer decay, optimizer, weight decay and schedule.
    """

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage, self.rows = model, stage, []
        self.watched = nn.ModuleDict({"fitting": task_metrics(), "dev": task_metrics()})

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Return the loss of a training batch."""
        return self._step(batch, self.watched["fitting"], "")

    def validation_step(self, batch: Any, _: int) -> None:
        """Watch a dev batch."""
        self._step(batch, self.watched["dev"], "val_")

    def _step(self, batch: Any, watched: Any, prefix: str) -> torch.Tensor:
        """Return the loss of a batch; loss and metrics are logged by epoch."""
        x, y = batch
        y = y if isinstance(y, dict) else {self.stage.target: y}
        logits, losses = self.model(x), []
        options: Any = {"on_step": False, "on_epoch": True, "batch_size": len(x)}
        for target, truth in y.items():
            if target == "label":
                said = logits[:, 0]
                losses.append(nn.functional.binary_cross_entropy_with_logits(said, truth))
                said = said.float().sigmoid()
            else:
                said = logits[:, -PARTS:]
                losses.append(nn.functional.cross_entropy(said, truth))
            for name, metric in watched[target].items():
                metric.update(said.detach(), truth.long())
                self.log(prefix + name, metric, **options)
        loss = torch.stack(losses).sum()
        self.log(f"{prefix}loss", loss.detach(), sync_dist=True, **options)
        return loss

    def configure_optimizers(self) -> Any:
        """Make AdamW (Adam, without a weight decay), with a learning rate a block by the layer decay."""
        groups = parameter_groups(self.model, self.stage.learning_rate, self.stage.layer_decay)
        optimizer = torch.optim.AdamW(groups, weight_decay=self.stage.weight_decay)
        if self.stage.schedule is None:
            return optimizer
        highest, steps = [group["lr"] for group in groups], int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history."""
        checkpoint["rows"] = self.rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the history."""
        self.rows = checkpoint["rows"]

    def on_train_epoch_start(self) -> None:
        """Tell the batches, whose order and augmentation depend on the epoch alone; begin a progress line."""
        loader: Any = self.trainer.train_dataloader
        loader.set_epoch(self.current_epoch)
        title, hidden = f"Epoch {self.current_epoch + 1}", not self.trainer.is_global_zero
        self.line = tqdm(desc=title, total=len(loader), unit="batch", leave=False, disable=hidden)
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the progress line."""
        self.line.update()

    def on_train_epoch_end(self) -> None:
        """Write the epoch's row; TrainingError where the loss is not a number."""
        self.line.close()
        scores = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        rate, loss = self.trainer.optimizers[0].param_groups[0]["lr"], scores["loss"]
        if not np.isfinite(loss):
            raise TrainingError(f"The loss became {loss}. Lower the learning rate, now {rate:g}.")
        own = {"learning_rate": rate, "seconds": round(time.perf_counter() - self.began, 3)}
        self.rows.append({"epoch": len(self.rows) + 1} | scores | own)


# What survives a kill ---------------------------------------------------------------------------


class Checkpoints(TorchCheckpointIO):
    """Lightning's checkpoints: whole, headed by their SHA-256, and never unpickled."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with disk.atomic(Path(path)) as beside:
            beside.write_bytes(hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the checkpoint at `path`; errors as `read`."""
        return read(Path(path))


def read(file: Path, task: Task | None = None) -> dict[str, Any]:
    """Return the checkpoint in `file`, and fill `task` with it.

    TrainingError where it was changed, holds more than plain values, or is of another model.
    """
    try:
        content = file.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise OSError("its content has changed since it was written")
        checkpoint = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
        if task is not None:
            task.load_state_dict(checkpoint["state_dict"])
        return checkpoint
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{file} is damaged or of another model. Delete {file.parent}.") from error


# Training ---------------------------------------------------------------------------------------

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(
    model: nn.Module, train: Batches, dev: Batches | None, stage: Stage, workdir: str | Path, **options: Any
) -> pd.DataFrame:
    """Train `model` by Lightning's Trainer as `stage` says, with early stopping; goes on after a kill.

    Parameters
    ----------
    model : nn.Module
        On pixels an `ImageClassifier`; on features (`data.features.extract`) its head. At the end it has the
        weights of the best epoch on dev, or, without patience, of the last one.
    train, dev : Batches
        Their target is the stage's; "both" is ("label", "body_part"). Early stopping needs dev.
    stage : Stage
        Its head and whether it is frozen are the model's matter; all else counts here.
    workdir : path
        Where the state is kept after every epoch; the next call with the same folder goes on from there.
    **options
        Of `lightning.Trainer`, e.g. ``devices=2, strategy="ddp_notebook"`` ("ddp_spawn" in a script). Each
        device then takes other batches, so that one step is made of as many batches as there are devices.

    Returns
    -------
    DataFrame
        `epoch` from 1, `loss`, the metrics, the same with ``val_`` on dev, `learning_rate` (the head's, at
        the epoch's end), `seconds`.

    Raises
    ------
    TrainingError
        A loss that is not a number; patience without dev; a damaged checkpoint, or one of another model.
    DiskError
        No room or no permission to write.
    DataError
        The batches have another scale than the model expects.
    """
    if stage.patience is not None and dev is None:
        raise TrainingError("There is no dev image to stop by. Take more patients, or set patience=None.")
    loaders = [_loader(model, batches) for batches in (train, dev) if batches is not None]
    task, last = Task(model, stage), Path(workdir) / "last.ckpt"
    epochs = stage.epochs or -(-(stage.steps or 0) // len(train))  # steps make whole epochs, rounded up
    state = read(last, task) if last.exists() else {"rows": [], "callbacks": {}}
    stopped = any(callback.get("stopped_epoch") for callback in state["callbacks"].values())
    if len(state["rows"]) < epochs and not stopped:
        always: Any = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        callbacks: list[Any] = [ModelCheckpoint(last.parent, "last", **always)]  # knows the others' state
        if stage.patience is not None:
            by: Any = {"monitor": "val_f1" if stage.target == "body_part" else "val_accuracy", "mode": "max"}
            best = ModelCheckpoint(last.parent, "best", **by, **always)
            callbacks = [EarlyStopping(patience=stage.patience, **by), best, *callbacks]
        options = {"devices": 1, "num_sanity_val_steps": 0, "max_epochs": epochs} | QUIET | options
        with warnings.catch_warnings(action="ignore"):  # advice about loaders that does not apply to ours
            trainer = lightning.Trainer(callbacks=callbacks, plugins=[Checkpoints()], **options)
            trainer.fit(task, *loaders, ckpt_path=last if last.exists() else None, weights_only=True)
        state = read(last, task)
    if stage.patience is not None:
        read(last.with_name("best.ckpt"), task)
    return pd.DataFrame(state["rows"])


def _loader(model: nn.Module, batches: Batches) -> Any:
    """Make a DataLoader of batches on the scale that the model expects; a head on features expects none."""
    data.check_scale(vars(model).get("expected_scale"), batches)
    return batches.torch()


def predict(model: nn.Module, batches: Batches) -> pd.DataFrame:
    """Ask a model about images (or a head about features).

    Parameters
    ----------
    model : nn.Module
        Runs on the GPU where there is one, and is left on the processor.
    batches : Batches

    Returns
    -------
    DataFrame
        The rows of `batches.index` in their order. Where the model has 1 output, `probability` of abnormal,
        float64 in [0, 1]; where it has 7, a column with the probability of each of `data.BODY_PARTS`; where
        it has 8, all of these.

    Raises
    ------
    DataError
        The batches have another scale than the model expects.
    """
    loader = _loader(model, batches)
    rows, device, was_training = batches.index.iloc[batches.order], models.accelerator(), model.training
    model.eval().to(device)
    with torch.inference_mode():
        logits = torch.cat([model(x.to(device)).cpu() for x, _ in loader]).double()
    model.train(was_training).cpu()
    if logits.shape[1] > 1:
        said = logits[:, -PARTS:].softmax(dim=1).numpy()
        rows = rows.assign(**dict(zip(data.BODY_PARTS, said.T, strict=True)))
    return rows if logits.shape[1] == PARTS else rows.assign(probability=logits[:, 0].sigmoid().numpy())


# Recipes ----------------------------------------------------------------------------------------


def train_stages(
    recipe: Recipe, split: pd.DataFrame, profile: Profile, weights: str, workdir: Path, **trainer_options: Any
) -> tuple[models.ImageClassifier, pd.DataFrame, pd.DataFrame]:
    """Train a recipe's stages one after the other: (model, history, predictions on dev and test)."""
    store = data.PixelStore.open_or_build(split, recipe.size, profile.workers)
    options: Any = {"batch_size": recipe.batch_size, "seed": recipe.seed, "workers": profile.workers}
    torch.manual_seed(recipe.seed)
    model, histories, sets = models.classifier(recipe.backbone, weights=weights), [], {}
    if weights == "random":  # on all films: recipes of different body parts begin with the same backbone
        everything = data.kn_datasets(split, store, scale=model.expected_scale, **options)
        models.calibrate(model.backbone, everything["train"])
    for number, stage in enumerate(recipe.stages, start=1):
        torch.manual_seed(recipe.seed)  # a new head does not depend on what came before
        if stage.head is not None:
            model.put_head(stage.head, OUTPUTS[stage.target])
        model.freeze(stage.frozen)
        films: Any = data.sample_patients(split, stage.fraction or recipe.fraction)
        films = films[films["body_part"].isin(recipe.parts or data.BODY_PARTS)]
        y = ("label", "body_part") if stage.target == "both" else stage.target
        sets = data.kn_datasets(films, store, scale=model.expected_scale, target=y, **options)
        sets["train"].augment = data.AUGMENTS[recipe.augment]
        learner, train, dev = model, sets["train"], sets.get("validation")
        if stage.frozen:  # features or maps once, then what stands above them alone
            trunk, top = model.parts
            extractor = models.TorchExtractor(recipe.backbone, trunk, recipe.size)
            learner, train = nn.Sequential(top, model.head), features.extract(extractor, train, stage.views)
            dev = features.extract(extractor, dev) if dev else None
        folder = _folder(recipe, number, films, weights, workdir)
        histories.append(fit(learner, train, dev, stage, folder, **trainer_options).assign(stage=number))
    history = pd.concat(histories, ignore_index=True)
    found = pd.concat([predict(model, sets[name]) for name in ("validation", "test") if name in sets])
    return model, history.assign(epoch=range(1, len(history) + 1)), found


def _folder(recipe: Recipe, number: int, films: pd.DataFrame, weights: str, workdir: Path) -> Path:
    """Choose a stage's folder: the last has `workdir`, others are found by recipes that begin alike."""
    if number == len(recipe.stages):
        return workdir
    begun = recipe.config() | {"stages": recipe.config()["stages"][:number]}
    key = json.dumps([weights, begun, data.fingerprint(films), torch.__version__], sort_keys=True)
    return disk.workdir(paths.cache_dir() / "stages" / hashlib.sha256(key.encode()).hexdigest()[:16])


def train(
    name: str, recipe: Recipe, split: pd.DataFrame, profile: Profile, weights: str, record=False, **options
) -> runs.Run:
    """Find the finished run of this recipe on these data, or train it now, stage by stage.

    Parameters
    ----------
    name : str
        Of the run.
    recipe : Recipe
        What stands above a frozen trunk is trained on features or maps that are computed once, a whole
        network on pixels. Random weights are calibrated first (`models.calibrate`).
    split : DataFrame
        As `data.split_dev` returns it.
    profile : Profile
        Threads, precision, and the run's place.
    weights : {"imagenet", "random"}
        What the backbone starts from, e.g. what `models.find_weights` says.
    record : {False, "scores", "model"}
        As `runs.fit_or_load` takes it.
    **options
        As in `fit`.

    Returns
    -------
    Run
        Its history has a row an epoch of all stages, and the column `stage` (from 1). Its predictions are of
        the dev and test images; where the last stage learns both targets, they have a column for each body
        part, too.

    Raises
    ------
    TrainingError
        As `fit`; a recipe with dropout or a plateau.
    DataError
        No train or no test images of the recipe's body parts.
    """
    if recipe.dropout or any(stage.plateau for stage in recipe.stages):
        raise TrainingError("torch_tools has neither dropout nor a plateau; keras_tools has both.")
    precision = "16-mixed" if profile.mixed_precision and torch.cuda.is_available() else "32-true"
    make = partial(train_stages, recipe, split, profile, weights, **{"precision": precision} | options)
    return runs.fit_or_load(name, recipe.config(), make, split, profile, weights, record=record)
