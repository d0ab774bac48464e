"""What the tests of the PyTorch half share: a backbone as small as can be."""

import torch

from mura_course.torch_tools import models


class Tiny(torch.nn.Module):
    """(n, 3, side, side) -> (n, 6), with a BatchNorm layer, in place of ResNet18."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = torch.nn.Conv2d(3, 6, 3, 2), torch.nn.BatchNorm2d(6)

    def forward(self, x):
        return self.layer2(self.layer1(x)).relu().amax(dim=(2, 3))


TINY = models.Backbone(Tiny, 6, "imagenet", ("layer1", "layer2"))


def classifier(outputs=1, frozen=True):
    return models.ImageClassifier("ResNet18", Tiny(), "two_linear", outputs, frozen)
