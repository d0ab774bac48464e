"""What is trained, from which start, how long: `Recipe` and `Stage`, plain values for both frameworks.

A recipe is the config of a run (`runs.fit_or_load`), so a change of any value is another run. Imports no
framework and writes nothing. Chapter 5 shows recipes of one stage, chapter 8 recipes of two.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import TrainingError, one_of
from .profiles import Profile

TARGETS = ("label", "body_part", "both")
KNOWN = {"target": TARGETS, "optimizer": ("adam", "adamw"), "schedule": (None, "one_cycle")}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a training: what is learned, by which part of the network, how long.

    Parameters
    ----------
    learning_rate : float
        The optimizer's, of the head; with a schedule, the highest.
    epochs, steps : int, optional
        How long at most: one of the two. Steps are rounded up to whole epochs.
    target : {"label", "body_part", "both"}
        What is learned; "both" is the label with the body part as a side task, the sum of both losses.
    head : tuple of int, optional
        Widths of the hidden layers of a new head; () for one linear layer; None keeps the head of the stage
        before.
    frozen : bool or str
        Whether the backbone is, or the last block that is (torch: one of the backbone's `blocks`; Keras: the
        name of a layer). What the frozen part makes of the images is computed once; what stands above it is
        trained on that.
    patience : int, optional
        Epochs without a better score on dev after which the stage stops; None: it runs to its end.
    plateau : int, optional
        Epochs without a lower dev loss after which the learning rate is halved; None: never.
    views : int
        Augmented views of each training image whose features or maps are cached (frozen stages).
    layer_decay : float
        Each block of the backbone learns at the rate of the block above it times this (unfrozen stages).
    fraction : float, optional
        Fraction of the train patients; None: the recipe's.
    optimizer : {"adam", "adamw"}
        AdamW takes a weight decay.
    weight_decay : float
        AdamW's.
    schedule : {None, "one_cycle"}
        The learning rate rises to its maximum and falls to almost 0, batch by batch (torch only); None: it is
        constant.
    """

    learning_rate: float
    epochs: int | None = None
    steps: int | None = None
    target: str = "label"
    head: tuple[int, ...] | None = ()
    frozen: bool | str = True
    patience: int | None = None
    plateau: int | None = None
    views: int = 1
    layer_decay: float = 1.0
    fraction: float | None = None
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str | None = None

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            one_of(f"a stage's {name}", getattr(self, name), known, TrainingError)
        if self.weight_decay and self.optimizer == "adam":
            raise TrainingError("Adam's weight decay would depend on the framework: take optimizer='adamw'.")
        if self.layer_decay != 1 and self.frozen:
            raise TrainingError("A layer decay needs an unfrozen backbone: set frozen=False.")
        if (self.epochs is None) == (self.steps is None):
            raise TrainingError("A stage lasts either some epochs or some steps: give one of the two.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that changes the result of a training, besides data, initial weights and profile.

    Parameters
    ----------
    backbone : str
        Name of a backbone of `keras_tools.backbones` or `torch_tools.models`.
    size : int
        Side of the square images in pixels.
    stages : tuple of Stage
        Trained one after the other; the first needs a head, the last must learn the label.
    batch_size, seed : int
        Images in a batch; the seed of initial weights, order and augmentation.
    fraction : float
        Fraction of the train patients that are used; dev and test are always whole.
    parts : tuple of str, optional
        Body parts to train and test on; None: all.
    dropout : float
        Fraction of values dropped before each layer of a head (Keras only).
    augment : {"none", "KL", "KN", "flip15"}
        Augmentation of the training images, a key of `data.AUGMENTS`.
    """

    backbone: str
    size: int
    stages: tuple[Stage, ...]
    batch_size: int = 64
    fraction: float = 1.0
    parts: tuple[str, ...] | None = None
    dropout: float = 0.0
    augment: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].head is None:
            raise TrainingError("A recipe has one stage or more, and the first one needs a head.")
        if self.stages[-1].target == "body_part":
            raise TrainingError("The last stage must learn the label: predictions say how abnormal.")

    def config(self) -> dict[str, Any]:
        """Return the recipe as plain values, for `runs.fit_or_load`."""
        return dataclasses.asdict(self)


def whole_network(profile: Profile, backbone: str = "EfficientNetLite0", seed: int = 0) -> Recipe:
    """Describe how the book trains all weights of a network at once, on label and body part (chapter 7).

    Parameters
    ----------
    profile : Profile
        Sizes, epochs and the learning rate, the highest of one cycle of AdamW.
    backbone : str
        A key of `torch_tools.models.BACKBONES`.
    seed : int

    Returns
    -------
    Recipe
        For `torch_tools.training.train`; films are flipped and turned by up to 15 degrees.
    """
    cycle: Any = {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "one_cycle"}
    rate, epochs = profile.whole_learning_rate, profile.whole_epochs
    stage = Stage(frozen=False, target="both", learning_rate=rate, epochs=epochs, **cycle)
    size = profile.image_size_resnet18 if backbone == "ResNet18" else profile.image_size_whole
    options: Any = {"batch_size": profile.torch_batch_size, "fraction": profile.finetune_fraction}
    return Recipe(backbone=backbone, size=size, stages=(stage,), augment="flip15", seed=seed, **options)
