"""Every size, epoch count and limit of the book, in one table of three columns: smoke, demo, full.

Touches nothing but the environment variable ``MURA_PROFILE``. No chapter holds a size of its own.
The setup chapter explains how to choose one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from .errors import ProfileError

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT_VARIABLE = "MURA_PROFILE"


def _doc(text: str):
    """A field with its docstring, kept where `table` finds it."""
    return field(metadata={"doc": text})


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One column of the table. The fields' own docstrings are what `table` shows."""

    name: str = _doc("smoke: seconds a chapter, for tests; demo: a 2-core laptop; full: MURA on a GPU")
    demo_studies: int = _doc("studies rendered where no MURA is found, train and test together")
    dev_fraction: float = _doc("share of the training images set aside for development (KL 1.3, KN 4)")
    split_seeds: int = _doc("draws of the development set in chapter 3")
    text_films: int = _doc("films on which text removal is measured in chapter 2")
    text_share: float = _doc("share of the training patients in chapter 2's experiment with markers")
    image_size: int = _doc("side in pixels of the images in the input pipelines (KL Table 1)")
    race_seconds: float = _doc("seconds that each input pipeline runs, twice, in the race of chapter 4")
    image_size_cnn: int = _doc("side in pixels of the square images that the funnel CNNs see (KL 1.6)")
    funnel_filters: int = _doc("filters in the first layer of a funnel-in CNN (KL Figure 27)")
    funnel_narrowest: int = _doc("filters in the first layer of a funnel-out CNN (KL Figure 28)")
    cnn_dropout: float = _doc("share of values that a funnel CNN drops after each block (KL 1.6.1: 0.3)")
    cnn_epochs: int = _doc("epochs of training for a funnel CNN (KL 1.6.1)")
    cnn_batch_size: int = _doc(
        "images in a batch of a funnel CNN; few, for more steps an epoch (KL 1.6.1: 64)"
    )
    tuner_trials: int = _doc("networks that the search among the funnel CNNs trains; KL 1.6 gives no number")
    tuner_initial_points: int = _doc("of these, how many are drawn at random before it searches by a model")
    tuner_epochs: int = _doc("epochs of training for each of them (KL 1.6.1)")
    tuner_image_size: int = _doc("side in pixels of the images that they see (KL 1.6)")
    tuner_dropouts: tuple = _doc("shares to drop, among which the search chooses (KL 1.6: 0.2 and 0.3)")
    image_size_densenet: int = _doc("side in pixels of DenseNet201's images (KL 1.5.1)")
    image_size_resnet: int = _doc("side in pixels of ResNet50's images (KL 1.5.1)")
    image_size_lite: int = _doc("side in pixels of EfficientNet-Lite0's images (224 in its training)")
    transfer_share: float = _doc("share of the training patients that DenseNet201 and ResNet50 learn from")
    lite_share: float = _doc("share of the training patients that EfficientNet-Lite0 learns from")
    transfer_batch_size: int = _doc("images in a batch of a pretrained network (KL Table 1)")
    frozen_epochs: int = _doc("epochs of training on a frozen backbone (KL 1.5.1)")
    frozen_rate: float = _doc("learning rate on a frozen backbone (KL 1.5.1)")
    unfrozen_epochs: int = _doc("epochs of fine-tuning (KL 1.5.1)")
    unfrozen_rate: float = _doc("learning rate of fine-tuning (KL 1.5.1)")
    image_size_resnet18: int = _doc("side in pixels of ResNet18's images (KN 2.1)")
    image_size_lite_torch: int = _doc("the same of EfficientNet-Lite0's in the chapters with PyTorch")
    image_size_specialists: int = _doc("the same in the chapter on a model for each body part (KN 2.1)")
    torch_share: float = _doc("share of the training patients for a head on a frozen network, in PyTorch")
    tuning_share: float = _doc("the same for a whole network")
    torch_batch_size: int = _doc("images in a batch of theirs; KN gives no number")
    torch_epochs: int = _doc("epochs of a head on a frozen network (KN 3.1, 3.2)")
    torch_rate: float = _doc("learning rate of a head on a frozen network (KN 3.2)")
    tuning_epochs: int = _doc("epochs of a whole network, on the label or the body part; KN 3.3: no number")
    tuning_rate: float = _doc("learning rate of a whole network; KN 3.3 gives no number")
    feature_views: int = _doc("augmented forms of an image whose features are kept; as many as epochs: all")
    specialist_steps: int = _doc("steps of a specialist's training at each of its two rates (KN 3.4)")
    batch_size: int = _doc("images in a batch (KL Table 1)")
    bootstrap_samples: int = _doc("resamplings of the patients behind a 95 % interval")
    workers: int = _doc("threads that decode and augment images")
    untraced: bool = _doc("run pretrained networks without tracing them first: faster for a few steps only")
    mixed_precision: bool = _doc("on a GPU, let Keras networks compute in float16 where that is safe")
    all_gpus: bool = _doc("train a Keras network on all GPUs of the machine at once")
    allow_random_weights: bool = _doc("go on with random weights where ImageNet's cannot be had")


_PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            demo_studies=120,
            dev_fraction=0.1,
            split_seeds=2,
            text_films=12,
            text_share=0.5,
            image_size=64,
            race_seconds=0.3,
            image_size_cnn=32,
            funnel_filters=16,
            funnel_narrowest=4,
            cnn_dropout=0.1,
            cnn_epochs=1,
            cnn_batch_size=16,
            tuner_trials=4,
            tuner_initial_points=2,
            tuner_epochs=1,
            tuner_image_size=24,
            tuner_dropouts=(0.05, 0.1),
            image_size_densenet=32,
            image_size_resnet=32,
            image_size_lite=32,
            transfer_share=0.25,
            lite_share=0.25,
            transfer_batch_size=64,
            frozen_epochs=2,
            frozen_rate=1e-3,
            unfrozen_epochs=1,
            unfrozen_rate=1e-4,
            image_size_resnet18=32,
            image_size_lite_torch=32,
            image_size_specialists=32,
            torch_share=1.0,
            tuning_share=0.5,
            torch_batch_size=16,
            torch_epochs=2,
            torch_rate=1e-3,
            tuning_epochs=1,
            tuning_rate=3e-4,
            feature_views=1,
            specialist_steps=8,
            batch_size=16,
            bootstrap_samples=100,
            workers=2,
            untraced=True,
            mixed_precision=False,
            all_gpus=False,
            allow_random_weights=True,
        ),
        Profile(
            name="demo",
            demo_studies=2000,
            dev_fraction=0.1,
            split_seeds=5,
            text_films=100,
            text_share=0.25,
            image_size=224,
            race_seconds=3.0,
            image_size_cnn=40,
            funnel_filters=48,
            funnel_narrowest=8,
            cnn_dropout=0.05,  # a narrow network has little to spare
            cnn_epochs=8,
            cnn_batch_size=16,
            tuner_trials=4,
            tuner_initial_points=2,
            tuner_epochs=2,
            tuner_image_size=24,
            tuner_dropouts=(0.05, 0.1),
            image_size_densenet=32,
            image_size_resnet=32,
            image_size_lite=96,
            transfer_share=0.06,
            lite_share=0.2,
            transfer_batch_size=64,
            frozen_epochs=10,
            frozen_rate=1e-3,
            unfrozen_epochs=2,
            unfrozen_rate=1e-4,
            image_size_resnet18=48,
            image_size_lite_torch=64,
            image_size_specialists=96,
            torch_share=0.6,
            tuning_share=0.12,
            torch_batch_size=32,
            torch_epochs=10,
            torch_rate=1e-3,
            tuning_epochs=2,
            tuning_rate=3e-4,
            feature_views=1,
            specialist_steps=120,
            batch_size=64,
            bootstrap_samples=1000,
            workers=2,
            untraced=False,
            mixed_precision=False,
            all_gpus=True,
            allow_random_weights=True,
        ),
        # The reports' own settings.
        Profile(
            name="full",
            demo_studies=2000,
            dev_fraction=0.1,
            split_seeds=10,
            text_films=500,
            text_share=1.0,
            image_size=224,
            race_seconds=5.0,
            image_size_cnn=224,
            funnel_filters=256,
            funnel_narrowest=32,
            cnn_dropout=0.3,
            cnn_epochs=8,
            cnn_batch_size=64,
            tuner_trials=8,
            tuner_initial_points=4,
            tuner_epochs=8,
            tuner_image_size=224,
            tuner_dropouts=(0.2, 0.3),
            image_size_densenet=224,
            image_size_resnet=256,
            image_size_lite=224,
            transfer_share=1.0,
            lite_share=1.0,
            transfer_batch_size=64,
            frozen_epochs=10,
            frozen_rate=1e-4,
            unfrozen_epochs=10,
            unfrozen_rate=1e-5,
            image_size_resnet18=256,
            image_size_lite_torch=224,
            image_size_specialists=256,
            torch_share=1.0,
            tuning_share=1.0,
            torch_batch_size=64,
            torch_epochs=10,
            torch_rate=1e-3,
            tuning_epochs=10,
            tuning_rate=1e-4,
            feature_views=10,
            specialist_steps=1000,
            batch_size=64,
            bootstrap_samples=1000,
            workers=4,
            untraced=False,
            mixed_precision=True,
            all_gpus=True,
            allow_random_weights=False,
        ),
    )
}

NAMES: tuple[str, ...] = tuple(_PROFILES)


def get(name: str) -> Profile:
    """The profile called `name`; raises `ProfileError`, listing the valid names, where there is none."""
    try:
        return _PROFILES[name.strip().lower()]
    except KeyError:
        raise ProfileError(
            f"There is no profile {name!r}. Set {ENVIRONMENT_VARIABLE} to one of: {', '.join(NAMES)}."
        ) from None


def current(index: pd.DataFrame | None = None) -> Profile:
    """The profile in use: what ``MURA_PROFILE`` names, else ``full`` on MURA and ``demo`` elsewhere.

    `index` is what `data.load_index` returns; only its ``attrs["is_demo"]`` is read.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if name:
        return get(name)
    is_mura = index is not None and not index.attrs.get("is_demo", True)
    return get("full" if is_mura else "demo")


def table() -> pd.DataFrame:
    """The table that the setup chapter shows: a row per setting, columns smoke, demo, full and meaning."""
    import pandas as pd

    settings = [setting for setting in fields(Profile) if setting.name != "name"]
    columns = {name: [getattr(profile, s.name) for s in settings] for name, profile in _PROFILES.items()}
    columns["meaning"] = [s.metadata["doc"] for s in settings]
    return pd.DataFrame(columns, index=pd.Index([s.name for s in settings], name="setting"), dtype=object)
