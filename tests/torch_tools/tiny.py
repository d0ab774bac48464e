"""What the tests of the PyTorch half share: forty small films, and a backbone as small as can be."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from mura_course import data


def make(root: Path, parts: tuple[str, ...] = ("HAND", "WRIST"), patients: int = 20) -> pd.DataFrame:
    """Films of 32 px, two a patient, of some body parts by turns; a bright square makes them abnormal."""
    rng, rows = np.random.default_rng(0), []
    for i in range(2 * patients):
        image = rng.integers(0, 120, (32, 32)).astype(np.uint8)
        label, part = int(i // 2 % 2), parts[i // 4 % len(parts)]
        image[4:12, 4:12] += np.uint8(120 * label)
        where = data.BODY_PARTS.index(part)
        image[20:28, 4 * where : 4 * where + 4] = 250
        root.mkdir(exist_ok=True, parents=True)
        cv2.imwrite(str(root / f"{i}.png"), image)
        split = "train" if i < 1.2 * patients else "dev" if i < 1.6 * patients else "test"
        rows.append((f"{i}.png", split, part, i // 2, f"{part}/{i // 2}/study1", 1 + i % 2, label))
    index = pd.DataFrame(rows, columns=["path", "split", "body_part", "patient", "study", "view", "label"])
    index["body_part"] = pd.Categorical(index["body_part"], data.BODY_PARTS)
    index.attrs = {"root": str(root), "name": "MURA-demo", "is_demo": True}
    return index


class Tiny(torch.nn.Module):
    """(n, 3, side, side) -> (n, 6), with a BatchNorm layer, in place of ResNet18."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = torch.nn.Conv2d(3, 6, 3, 2), torch.nn.BatchNorm2d(6)

    def forward(self, x):
        return self.layer2(self.layer1(x)).relu().amax(dim=(2, 3))


class TinyWithoutBatchNorm(Tiny):
    """Whose result does not depend on the rest of its batch."""

    def __init__(self):
        super().__init__()
        self.layer2 = torch.nn.Identity()


def put_in_place_of_resnet18(kind=Tiny) -> None:
    from mura_course import torch_models

    torch_models.BACKBONES["ResNet18"] = torch_models.Backbone(
        build=kind, fill=lambda module: None, dim=6, scale="imagenet", stages=("layer1", "layer2")
    )
