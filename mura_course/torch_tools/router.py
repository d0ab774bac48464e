"""The PyTorch half's trainings as runs: one or several stages each (chapters 7 to 9).

A stage trains a head on a frozen backbone's features, or the whole network; on the label, the body part, or
both. `staged_run` trains the stages of a config one after the other and returns the run; chapter 7's models
have one stage, the intermediate task of chapter 8 and the specialists of chapter 9 have two. Writes below
`<cache folder>/features` and `<cache folder>/stages` (first stages that several runs begin with), and where
runs lie.

    python -m mura_course.torch_transfer --devices 2 [--num-nodes N] [--backbone ResNet18]

trains chapter 7's unfrozen network on several devices or machines; the chapter, run there, finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from torch import nn

from . import __version__, data, feature_store, pixels, profiles, runs, torch_models, torch_training
from .profiles import Profile
from .torch_models import ImageClassifier, Routed, TorchModelError

PATIENCE = 4  # KN 4
MONITORS = {"label": "val_accuracy", "body_part": "val_f1", "both": "val_accuracy"}  # KN 4, KN 3.3


def stage(target: str = "label", head: str | None = "linear", frozen: bool = True, **settings) -> dict:
    """A stage of a config: what is learned, on which new head (None: the one that is there), frozen or not.

    settings: `rate` (Adam's), `epochs` or `steps` (at most; steps are rounded up to whole epochs), `patience`
    (epochs without a better score on dev, default 4; None: trained to the end), `views` (frozen: augmented
    forms of each training image whose features are kept; default 1), `lower` (unfrozen: the rate of each
    stage of the backbone is that of the next one times this; default 1), `share` (of the patients; default:
    the config's). Raises TorchModelError: a target, head or setting that there is not.
    """
    known = {"rate": None, "epochs": None, "steps": None, "patience": PATIENCE}
    known |= {"views": 1, "lower": 1.0, "share": None}
    for name in settings:
        torch_models.one_of("setting of a stage", name, known)
    torch_models.one_of("target", target, torch_training.TARGETS)
    if head is not None:
        torch_models.one_of("head", head, torch_models.HEADS)
    if settings.get("rate") is None or (settings.get("epochs") is None) == (settings.get("steps") is None):
        raise TorchModelError("A stage needs a rate, and either epochs or steps.")
    return {"target": target, "head": head, "frozen": frozen} | known | settings


def config(backbone: str, stages: list[dict], profile: Profile, **changes) -> dict:
    """All that changes a staged training's result, in this profile: the config of its run (KN 2.1).

    changes: of `share` (of the train and dev patients), `parts` (body parts to train and test on; None: all),
    `size` (pixels), `batch_size`, `seed`.
    """
    torch_models.one_of("backbone", backbone, torch_models.BACKBONES)
    is_lite = backbone == "EfficientNetLite0"
    settings = {
        "size": profile.image_size_lite_torch if is_lite else profile.image_size_resnet18,
        "share": profile.torch_share,
        "parts": None,
        "batch_size": profile.torch_batch_size,
        "seed": 0,
    }
    for name in changes:
        torch_models.one_of("setting of a training", name, settings)
    return {"backbone": backbone} | settings | changes | {"stages": stages}


def staged_run(
    name: str,
    config: dict,
    split: pd.DataFrame,
    profile: Profile,
    weights: str | None = None,
    root: str | os.PathLike | None = None,
    **trainer_options,
) -> runs.Run:
    """The finished run of this name and config on these data: found, or trained now, stage by stage.

    split: as `data.split_dev` returns it. config: as `config` makes it. weights: "imagenet" or "random"; by
    default what `torch_models.find_weights` says. Its history has a row per epoch of all stages, and a column
    `stage` (from 1); its predictions are of the test images, with a column for each body part, too, where the
    last stage learns it. A last stage that learns the body part alone has no `probability`, and so is no run:
    TorchModelError; also where a body part has one class only. trainer_options: of `lightning.Trainer`.
    """
    weights = torch_models.check_weights(weights or torch_models.find_weights(config["backbone"], profile))
    for part in config["parts"] or ():
        torch_models.one_of("body part", part, data.BODY_PARTS)
    if config["stages"][-1]["target"] == "body_part":
        raise TorchModelError("The last stage must learn the label: a run's predictions say how abnormal.")

    def make(workdir: Path):
        return train_stages(config, split, profile, weights, workdir, **trainer_options)

    return runs.fit_or_load(name, config, make, split, profile, weights, root)


def train_stages(
    config: dict, split: pd.DataFrame, profile: Profile, weights: str, workdir: Path, **trainer_options
) -> tuple[ImageClassifier, pd.DataFrame, pd.DataFrame]:
    """(model, history, predictions) of a config's stages; the last one is resumed from `workdir`."""
    store = pixels.PixelStore.open_or_build(split, config["size"])
    module, model, histories = None, None, []
    for number, settings in enumerate(config["stages"], start=1):
        torch.manual_seed(config["seed"])
        if module is None:
            module = torch_models.backbone(config["backbone"], weights)
            torch.manual_seed(config["seed"])  # a head does not depend on how the backbone was filled
        if settings["head"] is not None:
            outputs = torch_training.TARGETS[settings["target"]]
            model = ImageClassifier(config["backbone"], module, settings["head"], outputs, settings["frozen"])
        elif model is None:
            raise TorchModelError("The first stage needs a head.")
        model.freeze(settings["frozen"])
        options = trainer_defaults(profile) | trainer_options
        films = learning_images(config, split, settings)
        is_last = number == len(config["stages"])
        own = contextlib.nullcontext(workdir) if is_last else _first_stages(config, number, films, weights)
        with own as folder:
            history = _train(model, settings, config, films, store, profile, folder, options)
        histories.append(history.assign(stage=number))
    history = pd.concat(histories, ignore_index=True)
    history["epoch"] = range(1, len(history) + 1)
    return model.cpu(), history, _predictions(model, config, films, store, profile)


@contextlib.contextmanager
def _first_stages(config: dict, number: int, films: pd.DataFrame, weights: str) -> Iterator[Path]:
    """The folder of a stage that is not the last: where configs begin alike, it is trained once for all."""
    begun = config | {"stages": config["stages"][:number]}
    made_by = [__version__, torch.__version__]
    key = json.dumps([begun, weights, films.attrs["name"], data.fingerprint(films), made_by], sort_keys=True)
    folder = data.cache_dir() / "stages" / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    # The other processes of one training come in together with the first.
    with FileLock(f"{folder}.lock") if runs.is_first_process() else contextlib.nullcontext():
        yield folder


def learning_images(config: dict, split: pd.DataFrame, stage: dict | None = None) -> pd.DataFrame:
    """The images of a config, or of one of its stages: its share of the patients, its body parts.

    Raises TorchModelError where nothing can be learned: one class only in train, or an empty dev for early
    stopping.
    """
    share = stage["share"] if stage is not None and stage["share"] is not None else config["share"]
    films = data.learning_images(split, share)
    if config["parts"] is not None:
        films = films[films["body_part"].isin(config["parts"])]
    which, remedy = " and ".join(config["parts"] or ["the index"]), "Take more patients, or another split."
    train, dev = films[films["split"].eq("train")], films[films["split"].eq("dev")]
    if (classes := train["label"].nunique()) < 2:
        raise TorchModelError(
            f"In train, {which} has {len(train)} images of {classes} class: from fewer than two nothing can "
            f"be learned. {remedy}"
        )
    stages = config["stages"] if stage is None else [stage]
    if dev.empty and any(one["patience"] is not None for one in stages):
        raise TorchModelError(f"In dev, {which} has no image to stop by. {remedy} Or set patience=None.")
    return films


def trainer_defaults(profile: Profile) -> dict:
    """Half precision on a GPU, where the profile wants it; the rest is `lightning.Trainer`'s own choice."""
    wanted = profile.mixed_precision and torch.cuda.is_available()
    return {"precision": "16-mixed" if wanted else "32-true"}


def _batches(config: dict, films: pd.DataFrame, store, profile: Profile, target: str) -> dict:
    y = ("label", "body_part") if target == "both" else target
    options = {"batch_size": config["batch_size"], "seed": config["seed"], "workers": profile.workers}
    scale = torch_models.BACKBONES[config["backbone"]].scale
    return pixels.kn_datasets(films, store, scale=scale, target=y, needs_dev=False, **options)


def _train(model, settings, config, films, store, profile, workdir, options) -> pd.DataFrame:
    """Train one stage, a head on features where the backbone is frozen; the model keeps the best epoch."""
    sets = _batches(config, films, store, profile, settings["target"])
    train, dev = sets["train"], sets.get("validation")
    epochs = settings["epochs"] or -(-settings["steps"] // len(train))
    chosen = dict(options, monitor=None)
    if settings["patience"] is not None:
        chosen |= {"monitor": MONITORS[settings["target"]], "patience": settings["patience"]}
    if not settings["frozen"]:
        rates = layer_rates(model, settings["rate"], settings["lower"])
        task = torch_training.Task(model, rates, settings["target"])
        return torch_training.torch_fit(task, train, dev, epochs, workdir, **chosen)
    train, dev = frozen_features(model, config["backbone"], train, dev, settings["views"])
    task = torch_training.Task(model.head, settings["rate"], settings["target"])
    return torch_training.torch_fit(task, train, dev, epochs, workdir, **chosen)


def frozen_features(model: ImageClassifier, name: str, train, dev, views: int) -> tuple:
    """(train, dev) with features in place of images: `views` of each augmented one, one of each other."""
    options = {"workers": train.workers}
    extractor = torch_models.TorchExtractor(name, model.backbone)
    train = feature_store.augmented(extractor, train, views, **options)
    if dev is None:
        return train, None
    plain = feature_store.FeatureStore.open_or_compute(extractor, dev.store, dev.index, **options)
    return train, plain.batches(dev)


def layer_rates(model: ImageClassifier, rate: float, lower: float) -> float | list[tuple[nn.Module, float]]:
    """Adam's rates: `rate` for the head, each stage of the backbone below times `lower` once more.

    One number where `lower` is 1. What comes before the first stage has the lowest rate.
    """
    if lower == 1:
        return rate
    names = torch_models.BACKBONES[model.architecture["backbone"]].stages
    children = dict(model.backbone.named_children())
    stem = [module for child, module in children.items() if child not in names]
    parts = [nn.ModuleList(stem), *(children[name] for name in names), model.head]
    rates = [rate * lower ** (len(parts) - 1 - i) for i in range(len(parts))]
    return [(part, r) for part, r in zip(parts, rates, strict=True) if any(True for _ in part.parameters())]


def _predictions(model, config, films, store, profile) -> pd.DataFrame:
    """The test images with `probability`, a column for each body part, or both, as the model has outputs."""
    test = _batches(config, films, store, profile, "label")["test"]
    target = {outputs: name for name, outputs in torch_training.TARGETS.items()}
    return torch_training.predict(model, test, target[model.architecture["outputs"]])


# Specialists and their router: chapter 9 -----------------------------------------------------------


def specialist_config(profile: Profile, backbone: str, part: str | None = None) -> dict:
    """The config of a specialist for one body part (KN 3.4), or, without a part, of one model for all.

    Two linear layers on a frozen backbone, Adam at 1e-2, then further at 1e-3, for as many steps each; the
    model for all takes the steps of all specialists together.
    """
    steps = profile.specialist_steps * (1 if part else len(data.BODY_PARTS))
    settings = {"steps": steps, "patience": None, "views": profile.feature_views}
    stages = [
        stage("label", "two_linear", rate=1e-2, **settings),
        stage("label", None, rate=1e-3, **settings),
    ]
    size, parts = profile.image_size_specialists, [part] if part else None
    return config(backbone, stages, profile, share=1.0, size=size, parts=parts)


def specialist_run(
    split: pd.DataFrame,
    profile: Profile,
    backbone: str,
    part: str | None = None,
    weights: str | None = None,
    root: str | os.PathLike | None = None,
) -> runs.Run:
    """The run of `specialist_config`, named e.g. "resnet18_humerus", or "resnet18_all_parts"."""
    name = f"{backbone.lower()}_{part.lower() if part else 'all_parts'}"
    return staged_run(name, specialist_config(profile, backbone, part), split, profile, weights, root)


def routed_run(
    split: pd.DataFrame,
    profile: Profile,
    backbone: str,
    weights: str | None = None,
    root: str | os.PathLike | None = None,
) -> runs.Run:
    """The system that KN 5 proposes, as one run: a router, trained here, and the runs of all specialists.

    Its model is a `torch_models.Routed`; its history that of the router; its predictions are end to end, the
    router's mistakes included, and bear what it says of each body part. Raises as `staged_run`.
    """
    weights = torch_models.check_weights(weights or torch_models.find_weights(backbone, profile))
    settings = {"rate": profile.torch_rate, "epochs": profile.torch_epochs, "views": profile.feature_views}
    router = config(
        backbone,
        [stage("body_part", "two_linear", **settings)],
        profile,
        share=1.0,
        size=profile.image_size_specialists,
    )
    specialists = {part: specialist_config(profile, backbone, part) for part in data.BODY_PARTS}

    def make(workdir: Path):
        models = {
            part: specialist_run(split, profile, backbone, part, weights, root).load_model()
            for part in data.BODY_PARTS
        }
        picks, history, parts = train_stages(router, split, profile, weights, workdir)
        system = Routed(picks, models)
        store = pixels.PixelStore.open_or_build(split, router["size"])
        test = _batches(router, learning_images(router, split), store, profile, "label")["test"]
        said = torch_training.predict(system, test)["probability"]
        return system, history, parts.assign(probability=said)

    both = {"router": router, "specialists": specialists}
    return runs.fit_or_load(f"{backbone.lower()}_routed", both, make, split, profile, weights, root)


# Chapter 7's models ------------------------------------------------------------------------------


def resnet18_config(profile: Profile, head: str, frozen: bool = True, backbone: str = "ResNet18") -> dict:
    """The config of one of chapter 7's trainings: KN 3.1 ("linear"), 3.2 ("two_linear"), or unfrozen."""
    settings = {"rate": profile.torch_rate, "epochs": profile.torch_epochs, "views": profile.feature_views}
    if not frozen:
        share = {"share": profile.tuning_share}
        settings = {"rate": profile.tuning_rate, "epochs": profile.tuning_epochs} | share
    return config(backbone, [stage("label", head, frozen, **settings)], profile)


def run_name(config: dict) -> str:
    """The name of such a run, e.g. "resnet18_frozen_two_linear"."""
    only = config["stages"][-1]
    return f"{config['backbone'].lower()}_{'frozen' if only['frozen'] else 'unfrozen'}_{only['head']}"


def main(arguments: list[str] | None = None) -> None:
    """Train chapter 7's unfrozen network on several devices or machines."""
    parser = argparse.ArgumentParser(prog="python -m mura_course.torch_transfer", description=main.__doc__)
    parser.add_argument("--devices", type=int, default=1, help="GPUs of each machine, or processes on a CPU")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines")
    parser.add_argument("--backbone", choices=torch_models.BACKBONES, default="ResNet18")
    options = parser.parse_args(arguments)
    index = data.load_index()
    profile = profiles.current(index)
    split = data.split_dev(index, profile.dev_fraction)
    training = resnet18_config(profile, "two_linear", False, options.backbone)
    several = options.devices * options.num_nodes > 1
    found = staged_run(
        run_name(training),
        training,
        split,
        profile,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="ddp" if several else "auto",
    )
    if runs.is_first_process():
        print(found.describe())


if __name__ == "__main__":
    main()
