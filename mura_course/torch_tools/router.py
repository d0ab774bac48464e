"""A router and a specialist for each body part as one module (room: torch_tools).

Writes nothing. Chapter 9 trains the router and the specialists, puts them together and explains them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import data, runs
from ..errors import ModelError
from . import models
from .models import ImageClassifier


class Routed(nn.Module):
    """A router says which body part it sees, and that part's specialist says whether it is abnormal.

    (n, 3, side, side) -> logits (n, 1). An image passes through the frozen backbone once.

    Parameters
    ----------
    router : ImageClassifier
        With seven outputs, in the order of `data.BODY_PARTS`. Its backbone becomes the specialists', too.
    specialists : dict
        For each body part an ImageClassifier with one output.

    Raises
    ------
    ModelError
        A body part without its specialist, or an unknown one; other numbers of outputs; backbones that are
        not frozen or have different weights.
    """

    def __init__(self, router: ImageClassifier, specialists: dict[str, ImageClassifier]) -> None:
        super().__init__()
        outputs = {part: model.architecture["outputs"] for part, model in specialists.items()}
        fits = router.architecture["outputs"] == len(outputs) and outputs == dict.fromkeys(data.BODY_PARTS, 1)
        if not fits or not all(_same_backbone(router, other) for other in specialists.values()):
            raise ModelError(
                f"A routed system is a router with {len(data.BODY_PARTS)} outputs and, for each of "
                f"{', '.join(data.BODY_PARTS)}, a specialist with 1, all on one frozen backbone."
            )
        self.router = router
        self.heads = nn.ModuleDict({part: specialists[part].head for part in data.BODY_PARTS})
        self.expected_scale = router.expected_scale
        alike = {part: specialists[part].architecture for part in data.BODY_PARTS}
        self.architecture = {"router": router.architecture, "specialists": alike}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the logits of the specialists that the router picks."""
        features = self.router.backbone(x.contiguous(memory_format=torch.channels_last))  # once
        picked = self.router.head(features).argmax(dim=1)  # which body part?
        logits = torch.stack([head(features) for head in self.heads.values()])  # (7, n, 1)
        return logits[picked, torch.arange(len(x), device=x.device)]


def _same_backbone(a: ImageClassifier, b: ImageClassifier) -> bool:
    """Whether two classifiers have equal, frozen backbones."""
    if not (a.frozen and b.frozen and a.name == b.name):
        return False
    ours, theirs = a.backbone.state_dict(), b.backbone.state_dict()
    return a.backbone is b.backbone or all(torch.equal(ours[name], theirs[name]) for name in ours)


def build_like(architecture: dict[str, Any]) -> Routed:
    """Build a routed system of this `architecture`, with random weights; KeyError where it is of none."""
    router = models.build_like(architecture["router"])
    specialists = {part: models.build_like(one) for part, one in architecture["specialists"].items()}
    for specialist in specialists.values():
        specialist.backbone = router.backbone
    return Routed(router, specialists)


def load(run: runs.Run) -> Routed:
    """Load the routed system of a run; errors as `models.load`."""
    return models.load(run, like=build_like)
