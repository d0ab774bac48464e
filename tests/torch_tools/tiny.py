"""What the tests of the PyTorch half share: a backbone as small as can be."""

from collections import OrderedDict

from torch import nn

from mura_course.torch_tools import models


def tiny():
    """(n, 3, side, side) -> (n, 6), with a BatchNorm layer, in place of ResNet18."""
    parts = {"layer1": nn.Conv2d(3, 6, 3, 2), "layer2": nn.BatchNorm2d(6), "relu": nn.ReLU()}
    pool = {"pool": nn.AdaptiveMaxPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts | pool))


TINY = models.Backbone(tiny, 6, "imagenet", ("layer1", "layer2"))


def classifier(outputs=1, frozen=True):
    return models.ImageClassifier("ResNet18", tiny(), "two_linear", outputs, frozen)
