"""The PyTorch half's models: ResNet18 with KN's heads, and a router with a specialist for each body part.

Imports torch and torchvision, so import this module only where they are wanted. Writes only where torch
keeps downloaded weights. Training stands
in `mura_course.torch_training`; chapter 7 explains the heads, chapter 9 the router.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if "tensorflow" in sys.modules and "triton" not in sys.modules:
    # torch's compiler for GPUs, which nothing here uses: loaded after TensorFlow it crashes the process.
    sys.modules["triton"] = None

import torch
import torchvision
from torch import nn

from . import data, feature_store, pretrained
from .errors import MuraError, WeightsError
from .profiles import Profile

HEADS = ("linear", "two_linear")
RESNET18 = torchvision.models.ResNet18_Weights.IMAGENET1K_V1


class TorchModelError(MuraError, ValueError):
    """A backbone, head, target or training that there is not; the message names what there is."""


# Backbones --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What the book knows of a backbone. `BACKBONES` lists them.

    build() -> module with random weights, images (n, 3, side, side) -> features (n, dim), averaged over the
    last map. stages: names of its parts in order, from the image to the features; what comes before the first
    is the stem. scale: as of `pixels.SCALES`. fill(module): puts ImageNet's weights into it.
    """

    build: Callable[[], nn.Module]
    fill: Callable[[nn.Module], None]
    dim: int
    scale: str
    stages: tuple[str, ...]


def _resnet18() -> nn.Module:
    module = torchvision.models.resnet18(weights=None)
    module.fc = nn.Identity()
    return module


def _fill_resnet18(module: nn.Module) -> None:
    stored = torch.load(weights_file("ResNet18"), map_location="cpu", weights_only=True)
    module.load_state_dict({name: array for name, array in stored.items() if not name.startswith("fc.")})


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 of the package `efficientnet-lite-pytorch`, cut into stages, without its top.

    Its drop-connect is left out, whose random numbers no checkpoint would keep; and its BatchNorm layers
    gather their statistics at PyTorch's usual pace, for at the package's, hundreds of steps go by before they
    follow. (float32 (n, 3, side, side) in -1..1, side a multiple of 32) -> (n, 1280).
    """

    def __init__(self):
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        whole = EfficientNet.from_name("efficientnet-lite0")
        blocks = list(whole._blocks)
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6())
        # A stage ends where the map is about to be halved: 1/4, 1/8, 1/16, 1/32 of the image's side.
        for i, (start, end) in enumerate(((0, 3), (3, 5), (5, 11), (11, 16)), start=1):
            setattr(self, f"layer{i}", nn.Sequential(*blocks[start:end]))
        self.last = nn.Sequential(whole._conv_head, whole._bn1, nn.ReLU6())
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.last(x).mean(dim=(2, 3))


def _fill_lite0(module: nn.Module) -> None:
    stored = torch.load(weights_file("EfficientNetLite0"), map_location="cpu", weights_only=True)
    wanted = [array for name, array in stored.items() if not name.startswith("_fc.")]
    own = module.state_dict()  # the same layers in the same order, by other names
    module.load_state_dict(dict(zip(own, wanted, strict=True)))


_STAGES = ("layer1", "layer2", "layer3", "layer4")
BACKBONES = {
    "ResNet18": Backbone(build=_resnet18, fill=_fill_resnet18, dim=512, scale="imagenet", stages=_STAGES),
    "EfficientNetLite0": Backbone(
        build=EfficientNetLite0, fill=_fill_lite0, dim=1280, scale="-1..1", stages=(*_STAGES, "last")
    ),
}
"""By name: the report's backbone (KN 2.2), and the one whose weights need no download."""


def backbone(name: str, weights: str = "imagenet") -> nn.Module:
    """A backbone of `BACKBONES` as a module, images -> features; weights: "imagenet" or "random".

    Raises TorchModelError: another name or weights; WeightsError as `weights_file`.
    """
    known = one_of("backbone", name, BACKBONES)
    check_weights(weights)
    module = BACKBONES[known].build()
    if weights == "imagenet":
        BACKBONES[known].fill(module)
    return module.to(memory_format=torch.channels_last)  # faster, on CPUs as on GPUs


def check_weights(weights: str) -> str:
    """`weights`; TorchModelError unless they are "imagenet" or "random"."""
    if weights not in ("imagenet", "random"):
        raise TorchModelError(f"weights must be 'imagenet' or 'random', not {weights!r}.")
    return weights


def find_weights(name: str, profile: Profile) -> str:
    """ "imagenet" or "random": as `pretrained.imagenet_or_random`, of a backbone of `BACKBONES`."""
    one_of("backbone", name, BACKBONES)
    return pretrained.imagenet_or_random(name, profile, weights_file)


_impossible: dict[str, str] = {}  # by file: why it could not be had; asked once per process


def weights_file(name: str) -> Path:
    """The file with a backbone's ImageNet weights: found where torch or a package keeps it, or downloaded.

    Raises WeightsError, naming file, URL, folder and hash, where that is impossible.
    """
    if name == "EfficientNetLite0":
        return pretrained.lite0_file()
    file = Path(torch.hub.get_dir()) / "checkpoints" / RESNET18.url.rpartition("/")[2]
    start = file.stem.rpartition("-")[2]  # torchvision's files bear the beginning of their SHA-256
    if file.is_file() and pretrained.digest(file, "sha256").startswith(start):
        return file
    if str(file) not in _impossible:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with pretrained.patience():
                torch.hub.download_url_to_file(RESNET18.url, str(file), hash_prefix=start, progress=False)
            return file
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            _impossible[str(file)] = " ".join(str(error).split()) or type(error).__name__
    raise WeightsError(
        f"the ImageNet weights of ResNet18 could not be downloaded ({_impossible[str(file)]}). By hand: "
        f"download {RESNET18.url} where there is a connection, and put the file {file.name} (its SHA-256 "
        f"begins with {start}) into {file.parent}."
    )


class TorchExtractor:
    """A backbone of `backbone(name, ...)`, as `feature_store.FeatureStore` wants one: any size of image."""

    size, layout = None, "nchw"

    def __init__(self, name: str, module: nn.Module):
        known = BACKBONES[one_of("backbone", name, BACKBONES)]
        self.name, self.scale, self.dim, self.module = f"torch{name}", known.scale, known.dim, module
        self.digest = feature_store.digest_of(v.cpu().numpy() for v in module.state_dict().values())

    def __call__(self, x: np.ndarray, batch_size: int) -> np.ndarray:
        self.module.eval().to(accelerator())
        x = torch.from_numpy(x).to(accelerator()).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            return self.module(x).float().cpu().numpy()


# Classifiers ------------------------------------------------------------------------------------


class ImageClassifier(nn.Module):
    """A backbone from image to features, and a head from features to logits.

    Input: float32 (n, 3, side, side) on `expected_scale`. Output: logits, float32 (n, outputs); the meaning
    of outputs: 1, abnormal; 7, the body part; 8, both, in this order. A `frozen` backbone gets no gradients
    and stays in inference mode: its BatchNorm keeps its statistics, also in `train()`. `architecture` is
    what `build` makes the like of.
    """

    def __init__(self, name: str, module: nn.Module, head: str, outputs: int, frozen: bool):
        super().__init__()
        known = BACKBONES[one_of("backbone", name, BACKBONES)]
        self.backbone, self.head = module, make_head(head, known.dim, outputs)
        self.expected_scale = known.scale
        self.architecture = {"backbone": name, "head": head, "outputs": outputs}
        self.freeze(frozen)

    def freeze(self, frozen: bool) -> None:
        """Freeze or unfreeze the backbone."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x.contiguous(memory_format=torch.channels_last)))


def make_head(head: str, features: int, outputs: int) -> nn.Module:
    """KN's heads: "linear" (KN 3.1), or "two_linear", Linear(512, 512) + Linear(512, 1) (KN 3.2).

    KN names no activation between its two linear layers, so there is none here, either (chapter 7); the width
    between them is 512 for any backbone. (n, features) -> logits (n, outputs). Raises TorchModelError.
    """
    one_of("head", head, HEADS)
    if head == "linear":
        return nn.Linear(features, outputs)
    return nn.Sequential(nn.Linear(features, 512), nn.Linear(512, outputs))


def classifier(
    name: str, head: str = "linear", frozen: bool = True, weights: str = "imagenet", outputs: int = 1
) -> ImageClassifier:
    """A backbone of `BACKBONES` with a new head of `HEADS`. Raises as `backbone` and `make_head`."""
    one_of("head", head, HEADS)  # an unknown head is refused before anything is downloaded
    return ImageClassifier(name, backbone(name, weights), head, outputs, frozen)


def resnet18(
    head: str = "linear", frozen: bool = True, weights: str = "imagenet", outputs: int = 1
) -> ImageClassifier:
    """KN's model: ResNet18 without its top (512 features, averaged over the map), and a new head.

    head: "linear" (KN 3.1) or "two_linear" (KN 3.2). frozen: whether the backbone is. weights: "imagenet" or
    "random". outputs: 1 for the abnormality, 7 for the body part. Input as `ImageClassifier`, on the scale
    "imagenet"; KN: 256 x 256. Raises TorchModelError; WeightsError as `weights_file`.
    """
    return classifier("ResNet18", head, frozen, weights, outputs)


class Routed(nn.Module):
    """A router that says which body part it sees, and for each part a specialist that says whether abnormal.

    (n, 3, side, side) -> logits (n, 1) of abnormal: of each image, those of the specialist for the part that
    the router holds most likely. `route(x)` gives its logits, (n, 7), in the order of `data.BODY_PARTS`.
    Frozen backbones with equal weights become one, which sees an image once. Raises TorchModelError: a part
    without its specialist, or one that there is not; models of other scales or outputs (KN 5, chapter 9).
    """

    def __init__(self, router: ImageClassifier, specialists: dict[str, ImageClassifier]):
        super().__init__()
        wrong = sorted(set(data.BODY_PARTS) ^ set(specialists))
        if wrong:
            raise TorchModelError(
                f"A routed system has one specialist for each of {', '.join(data.BODY_PARTS)}. Missing, or "
                f"none of these: {', '.join(wrong)}."
            )
        scales = {model.expected_scale for model in (router, *specialists.values())}
        outputs = [model.architecture["outputs"] for model in (router, *specialists.values())]
        if len(scales) > 1 or outputs != [len(data.BODY_PARTS)] + [1] * len(specialists):
            raise TorchModelError(
                f"A router gives {len(data.BODY_PARTS)} logits, a specialist 1, all on one scale; these give "
                f"{outputs}, on {', '.join(sorted(scales))}."
            )
        self.router = router
        self.specialists = nn.ModuleDict({part: specialists[part] for part in data.BODY_PARTS})
        self.expected_scale = router.expected_scale
        self.shares = all(_same(router, other) for other in specialists.values())
        if self.shares:
            for other in specialists.values():
                other.backbone = router.backbone
        self.architecture = {
            "router": router.architecture,
            "specialists": {part: model.architecture for part, model in self.specialists.items()},
            "shares": self.shares,
        }

    def route(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shares:
            x = self.router.backbone(x.contiguous(memory_format=torch.channels_last))
        routed = (self.router.head(x) if self.shares else self.route(x)).argmax(dim=1)
        logits = x.new_zeros(len(x), 1)
        for number, specialist in enumerate(self.specialists.values()):
            rows = torch.nonzero(routed == number)[:, 0]
            if len(rows):
                answer = specialist.head if self.shares else specialist
                logits[rows] = answer(x[rows]).to(logits.dtype)
        return logits


def _same(a: ImageClassifier, b: ImageClassifier) -> bool:
    """Whether two classifiers have equal, frozen backbones."""
    if not (a.frozen and b.frozen and a.architecture["backbone"] == b.architecture["backbone"]):
        return False
    ours, theirs = a.backbone.state_dict(), b.backbone.state_dict()
    return a.backbone is b.backbone or all(torch.equal(ours[name], theirs[name]) for name in ours)


def build(architecture: dict) -> nn.Module:
    """A model like the one whose `architecture` this is, with random weights, backbones frozen.

    `runs.Run.load_model` fills it with the run's. Raises TorchModelError: no architecture of this module.
    """
    try:
        if "router" not in architecture:
            name = architecture["backbone"]
            return ImageClassifier(
                name, backbone(name, "random"), architecture["head"], architecture["outputs"], True
            )
        models = {part: build(one) for part, one in architecture["specialists"].items()}
        router = build(architecture["router"])
        if architecture["shares"]:
            for model in models.values():
                model.backbone = router.backbone
        return Routed(router, models)
    except (KeyError, TypeError) as error:
        raise TorchModelError(
            f"This is no architecture of a model of this book: {architecture!r}."
        ) from error


def accelerator() -> torch.device:
    """The GPU where torch sees one, else the processor: where whatever is not trained is computed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def one_of(what: str, value: str, known) -> str:
    if value not in known:
        raise TorchModelError(f"There is no {what} {value!r}. Choose one of {', '.join(known)}.")
    return value
