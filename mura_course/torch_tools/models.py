"""The PyTorch half's models: backbones, KN's heads, classifiers, heat maps; saved models (room: torch_tools).

Writes only where torch keeps downloaded weights, and where `runs` asks for a model's file. Importing it tells
`runs` how torch modules are saved. Chapter 7 explains frozen backbones and heads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import nn

from .. import runs
from .. import weights as imagenet
from ..data import Batches, features
from ..errors import ModelError, RunError, one_of

Head = str | Sequence[int]
HEADS = {"linear": (), "two_linear": (512,)}
"""KN's heads by name: the widths of their hidden layers (KN 3.1, 3.2)."""

# Backbones --------------------------------------------------------------------------------------


class Backbone(NamedTuple):
    """What the book knows of a backbone; `BACKBONES` lists them.

    Attributes
    ----------
    build : callable
        () -> nn.Sequential with random weights: images (n, 3, side, side) to features (n, dim), the averages
        of the last maps.
    dim : int
        How many features it gives.
    scale : str
        Of the pixels, as `data.SCALES` has them.
    blocks : tuple of str
        Its trained parts in order, from the image to the features; what comes before the first is the stem.
    """

    build: Callable[[], nn.Sequential]
    dim: int
    scale: str
    blocks: tuple[str, ...]


def _resnet18() -> nn.Sequential:
    whole = torchvision.models.resnet18(weights=None)
    whole.fc = nn.Flatten()  # type: ignore[assignment]
    return nn.Sequential(OrderedDict(whole.named_children()))


def _lite(name: str) -> nn.Sequential:
    """Cut EfficientNet-Lite0, 1 or 2 of the package `efficientnet-lite-pytorch` into blocks, without its top.

    Sides are multiples of 32, to which 224 sets the padding. Its drop-connect is left out. Its BatchNorm
    layers gather their statistics at PyTorch's usual pace: at the package's they would follow only after
    hundreds of steps.
    """
    from efficientnet_lite_pytorch import EfficientNet

    options = {"image_size": 224, "batch_norm_momentum": 0.9}  # which is TensorFlow's way to say 0.1
    whole: Any = EfficientNet.from_name(f"efficientnet-lite{name[-1]}", **options)
    module = nn.Sequential()
    module.stem = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6())
    # A block ends where the map is about to be halved: 1/4, 1/8, 1/16, 1/32 of the image's side.
    halving = [i for i, part in enumerate(whole._blocks) if part._depthwise_conv.stride[0] == 2]
    for i, (first, end) in enumerate(pairwise([0, *halving[1:], len(whole._blocks)]), start=1):
        module.add_module(f"layer{i}", nn.Sequential(*whole._blocks[first:end]))
    module.last = nn.Sequential(whole._conv_head, whole._bn1, nn.ReLU6())
    module.average = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return module


_LAYERS = ("layer1", "layer2", "layer3", "layer4")
BACKBONES = {"ResNet18": Backbone(_resnet18, 512, "imagenet", _LAYERS)} | {
    lite: Backbone(partial(_lite, lite), 1280, "-1..1", (*_LAYERS, "last")) for lite in imagenet.LITE
}
"""By name: the report's backbone (KN 2.2), and three whose weights need no download."""


def backbone(name: str, weights: str = "imagenet") -> nn.Sequential:
    """Build a backbone: images to features.

    Parameters
    ----------
    name : str
        One of `BACKBONES`.
    weights : {"imagenet", "random"}
        Its weights. Call `calibrate` on a random one.

    Returns
    -------
    nn.Sequential
        float32 (n, 3, side, side) on the backbone's scale -> float32 (n, dim).

    Raises
    ------
    ModelError
        Another name or other weights.
    WeightsError
        ImageNet's weights cannot be downloaded.
    """
    module = BACKBONES[one_of("the backbone", name, BACKBONES, ModelError)].build()
    if one_of("weights", weights, ("imagenet", "random"), ModelError) == "imagenet":
        stored = torch.load(imagenet.file(name), map_location="cpu", weights_only=True)
        wanted = [array for layer, array in stored.items() if "fc." not in layer]  # without its 1,000 classes
        # The same layers in the same order; the packages of EfficientNet-Lite have other names for them.
        module.load_state_dict(dict(zip(module.state_dict(), wanted, strict=True)))
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster everywhere


find_weights = imagenet.find
"""(name, profile) -> "imagenet" or "random", with a note; name is one of `BACKBONES`."""


def accelerator() -> torch.device:
    """Say where what is not trained is computed: on the GPU where torch sees one, else on the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def calibrate(module: nn.Module, batches: Batches, images: int = 256) -> None:
    """Set the BatchNorm statistics of a backbone with random weights to those of training images.

    With the initial statistics (mean 0, variance 1) the signal dies on its way through a deep random network
    in evaluation mode. Here the network sees some `images` in training mode, and its statistics become the
    average over their batches. No other weight changes.

    Parameters
    ----------
    module : nn.Module
        What `backbone(name, "random")` returned; it is left in training mode.
    batches : Batches
        Training images on the backbone's scale; the first of this epoch's order are taken.
    images : int
        How many.
    """
    norms, device = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)], accelerator()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's sign for the average over all batches
    module.train().to(device)
    for x, _ in islice(batches.torch(), max(1, images // batches.batch_size)):
        if len(x) > 1:
            module(x.to(device).contiguous(memory_format=torch.channels_last))
    for norm in norms:
        norm.momentum = 0.1
    module.cpu()


class TorchExtractor:
    """A backbone, or its lower blocks, as `data.features.extract` wants it; it takes images of any size.

    Parameters
    ----------
    name : str
        One of `BACKBONES`.
    module : nn.Module
        What `backbone(name, ...)` returned, trained further or not; or, with `size`, the frozen one of an
        `ImageClassifier`'s parts.
    size : int, optional
        The images' side, where the module gives maps: their shape (channels, height, width) follows from it.
    """

    layout: str = "nchw"

    def __init__(self, name: str, module: nn.Module, size: int | None = None) -> None:
        known = BACKBONES[one_of("the backbone", name, BACKBONES, ModelError)]
        self.name, self.scale, self.size, self.module = f"torch{name}", known.scale, size, module
        self.digest = features.digest_of(v.cpu().numpy() for v in module.state_dict().values())
        self.dim: int | tuple[int, ...] = known.dim
        if size is not None:
            first, *others = self(np.zeros((1, 3, size, size), np.float32)).shape[1:]
            self.dim = (first, *others) if others else first

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Images, float32 (n, 3, side, side) -> features, float32 (n, dim), or maps, float32 (n, *dim)."""
        device = accelerator()
        images = torch.from_numpy(x).to(device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            return self.module.eval().to(device)(images).float().cpu().numpy()


# Classifiers ------------------------------------------------------------------------------------


def make_head(head: Head, features: int, outputs: int) -> nn.Module:
    """Stack linear layers on features, as KN's heads: no activation between them.

    KN's are "linear" (KN 3.1) and "two_linear", Linear(512, 512) and Linear(512, 1) (KN 3.2). KN names no
    activation, so there is none here either (chapter 7).

    Parameters
    ----------
    head : str or sequence of int
        A name in `HEADS`, or the widths of the hidden layers.
    features, outputs : int
        (n, features) -> logits (n, outputs).

    Raises
    ------
    ModelError
        Another name.
    """
    hidden = HEADS[one_of("the head", head, HEADS, ModelError)] if isinstance(head, str) else head
    widths = (features, *hidden, outputs)
    layers = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    return nn.Sequential(*layers) if hidden else layers[0]


class ImageClassifier(nn.Module):
    """A backbone from image to features, and a head from features to logits.

    float32 (n, 3, side, side) on `expected_scale` -> logits, float32 (n, outputs). One output: abnormal.
    Seven: the body part, in the order of `data.BODY_PARTS`. Eight: abnormal, then the body part.

    Parameters
    ----------
    name : str
        One of `BACKBONES`.
    module : nn.Module
        What `backbone(name, ...)` returned.
    head : str or sequence of int
        As `make_head` takes it.
    outputs : int
        How many logits.
    frozen : bool or str
        Whether the backbone is frozen; or the last of its blocks that is. What is frozen gets no gradients
        and stays in evaluation mode, also in `train()`: its BatchNorm keeps its statistics.

    Attributes
    ----------
    parts : tuple of nn.Sequential
        The frozen trunk of the backbone, images to maps or features, and what stands above it; they share
        their weights with it.
    expected_scale : str
        Of the pixels, as `data.SCALES` has them.
    architecture : dict
        Plain values, of which `load` makes another one.
    """

    def __init__(self, name: str, module: Any, head: Head, outputs: int, frozen: bool | str) -> None:
        super().__init__()
        self.name, self.backbone = one_of("the backbone", name, BACKBONES, ModelError), module
        self.expected_scale = BACKBONES[name].scale
        self.put_head(head, outputs)
        self.freeze(frozen)

    def put_head(self, head: Head, outputs: int) -> None:
        """Put a new head, with random weights, on the backbone."""
        self.head = make_head(head, BACKBONES[self.name].dim, outputs)
        self.architecture = {"backbone": self.name, "head": head, "outputs": outputs}

    def freeze(self, frozen: bool | str) -> None:
        """Freeze the backbone, or unfreeze it, or freeze it up to and including one of its blocks."""
        cut = len(self.backbone) * (frozen is True)
        if isinstance(frozen, str):
            one_of("the last frozen block", frozen, BACKBONES[self.name].blocks, ModelError)
            cut = 1 + [name for name, _ in self.backbone.named_children()].index(frozen)
        self.parts = (self.backbone[:cut].requires_grad_(False), self.backbone[cut:].requires_grad_(True))
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageClassifier:
        """As `nn.Module.train`, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.parts[0].eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        return self.head(self.backbone(x.contiguous(memory_format=torch.channels_last)))


def classifier(
    name: str, head: Head = "linear", frozen: bool | str = True, weights: str = "imagenet", outputs: int = 1
) -> ImageClassifier:
    """Put a new head on a backbone; parameters and errors as `ImageClassifier` and `backbone`."""
    return ImageClassifier(name, backbone(name, weights), head, outputs, frozen)


resnet18 = partial(classifier, "ResNet18")
"""KN's model: ResNet18 without its top and a new head, for images of 256 x 256 px (KN 2.1, 2.2)."""


# Heat maps --------------------------------------------------------------------------------------


def grad_cam(
    top: nn.Module, maps: torch.Tensor, output: int | torch.Tensor = 0, elementwise: bool = False
) -> torch.Tensor:
    """Grad-CAM: where the maps of a layer raise an output of what stands above it (chapter 13).

    Parameters
    ----------
    top : nn.Module
        Maps to logits, in evaluation mode: ``nn.Sequential(model.parts[1], model.head)`` of an
        `ImageClassifier` that was frozen up to one of its backbone's blocks.
    maps : Tensor
        float32 (n, channels, height, width), what ``model.parts[0]`` makes of n images.
    output : int or Tensor
        Which logit; a tensor (n,) of int64 names one an image. 0 is "abnormal", also where there are eight.
    elementwise : bool
        Multiply each value of a map by its own gradient (HiResCAM), not by the channel's mean gradient.

    Returns
    -------
    Tensor
        float32 (n, height, width), 0 or more; all zero where nothing raises the output.
    """
    maps = maps.detach().clone().requires_grad_()
    with torch.enable_grad():
        chosen = top(maps)[torch.arange(len(maps)), output]
        (slope,) = torch.autograd.grad(chosen.sum(), maps)
    weight = slope if elementwise else slope.mean(dim=(2, 3), keepdim=True)
    return (weight * maps).sum(dim=1).relu().detach()


# Saved models -----------------------------------------------------------------------------------


@runs.save_model.register
def _(model: nn.Module, folder: Path) -> str:
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    return "model.safetensors"


def load(run: runs.Run, into: nn.Module | None = None) -> Any:
    """Load the trained model of a run.

    Parameters
    ----------
    run : Run
        Of an `ImageClassifier` or, with `into`, of any torch module.
    into : nn.Module, optional
        A module like the run's, which is filled and returned.

    Returns
    -------
    nn.Module
        On the processor; a classifier's backbone is frozen.

    Raises
    ------
    RunError
        The run has no model, its file was changed, or it is of another model.
    """
    file = run.model_file()
    try:
        if into is None:
            like = run.info["architecture"]
            into = classifier(like["backbone"], like["head"], weights="random", outputs=like["outputs"])
        safetensors.torch.load_model(into, file)
    except (KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(f"{file} is whole, but of another model than was asked for ({error}).") from error
    return into
