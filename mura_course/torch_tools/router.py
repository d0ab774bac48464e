"""A router and a specialist for each body part as one module (room: torch_tools).

Writes nothing. Chapter 9 trains the router and the specialists, puts them together and explains them.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import data, runs
from . import models


class Routed(nn.Module):
    """A router says which body part it sees, and that part's specialist says whether it is abnormal.

    (n, 3, side, side) -> logits (n, 1). An image passes once through the router's frozen backbone, so the
    specialists must have been trained on one with the same weights.

    Parameters
    ----------
    router : ImageClassifier
        With seven outputs, in the order of `data.BODY_PARTS`.
    heads : dict
        The specialists' heads, one for each of `data.BODY_PARTS`, of one output, as wide as the router's.
    """

    def __init__(self, router: models.ImageClassifier, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.heads = nn.ModuleDict({part: heads[part] for part in data.BODY_PARTS})
        self.expected_scale, self.architecture = router.expected_scale, {"router": router.architecture}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the logits of the specialists that the router picks."""
        features = self.router.backbone(x.contiguous(memory_format=torch.channels_last))  # once
        picked = self.router.head(features).argmax(dim=1)  # which body part?
        logits = torch.stack([head(features) for head in self.heads.values()])  # (7, n, 1)
        return logits[picked, torch.arange(len(x), device=x.device)]


def load(run: runs.Run) -> Routed:
    """Load the routed system of a run; errors as `models.load`."""
    router = models.build_like(run.info["architecture"]["router"])
    dim, widths = models.BACKBONES[router.name].dim, router.architecture["head"]
    heads = {part: models.make_head(widths, dim, 1) for part in data.BODY_PARTS}
    return models.load(run, into=Routed(router, heads))
