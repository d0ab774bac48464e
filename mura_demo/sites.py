"""Places on bones: where along a bone a finding sits, how wide the bone is there, and small geometry.

Writes nothing.  Lengths in mm, in the local frame of the bone (see `bones.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from .anatomy import Scene
from .bones import CARPALS, DISTAL, METACARPALS, MIDDLE, PROXIMAL, Cloud

Item = TypeVar("Item")

# Bones of which a film may hold one end only: their direction (distal), and where both ends lie along it.
WHOLE = {
    "humerus": (np.array([0, -1.0, 0]), -24.0, 302.0),
    "radius": (np.array([0, -1.0, 0]), -3.0, 242.0),
    "ulna": (np.array([0, -1.0, 0]), -13.0, 247.0),
    "clavicle": (np.array([0, 0, 1.0]), 0.0, 123.0),
}
# Bones with findings, and the stretch of each that the film shows: 0 the proximal end, 1 the distal one.
SHOWN: dict[str, dict[str, tuple[float, float]]] = {
    "SHOULDER": {"humerus": (0, 0.36), "clavicle": (0.36, 1)},
    "HUMERUS": {"humerus": (0, 1)},
    "ELBOW": {"humerus": (0.78, 1), "radius": (0, 0.2), "ulna": (0, 0.22)},
    "FOREARM": {"radius": (0, 1), "ulna": (0, 1)},
    "WRIST": {"radius": (0.78, 1), "ulna": (0.78, 1), **dict.fromkeys(["scaphoid", "1mc", "5mc"], (0, 1))},
    "HAND": dict.fromkeys([*METACARPALS, *PROXIMAL, *MIDDLE, *DISTAL], (0, 1)),
}


class Site(NamedTuple):
    """A place on a bone: its middle, the bone's direction there (distal), and its width and length in mm."""

    bone: str
    at: float  # 0 the proximal end, 1 the distal one
    centre: np.ndarray
    axis: np.ndarray
    width: float
    length: float


def shown(scene: Scene) -> dict[str, tuple[float, float]]:
    """List the bones of a scene that may have a finding, with the stretch that the film shows."""
    if scene.part != "FINGER":
        return SHOWN[scene.part]
    d = scene.digit
    names = ["1mc", "thumbprox", "thumbdist"] if d == 1 else [f"{d}proxph", f"{d}midph", f"{d}distph"]
    return dict.fromkeys(names, (0, 1))


def extent(bone: str, cloud: Cloud) -> tuple[np.ndarray, float, float]:
    """Find the direction of a bone, proximal to distal, and its two ends along it in mm."""
    if bone in WHOLE:
        return WHOLE[bone]
    points = cloud.points[:: max(1, len(cloud.points) // 4000)]
    axis = np.linalg.eigh(np.cov((points - points.mean(0)).T))[1][:, -1]
    axis = axis * -np.sign(axis[1])
    low, high = np.quantile(points @ axis, [0.003, 0.997])
    return axis, float(low), float(high)


def locate(scene: Scene, bone: str, at: float) -> Site:
    """Find a place on a bone.

    Parameters
    ----------
    scene : Scene
    bone : str
    at : float
        0 (proximal end) to 1 (distal end).

    Returns
    -------
    Site
    """
    cloud = scene.bones[bone]
    direction, low, high = extent(bone, cloud)
    along = cloud.points @ direction.astype(np.float32)

    def middle(fraction: float) -> np.ndarray:
        place = np.clip(low + fraction * (high - low), along.min() + 1, along.max() - 1)
        return cloud.points[np.abs(along - place) < 0.015 * (high - low) + cloud.pitch].mean(0)

    seen = (along.min() - low) / (high - low), (along.max() - low) / (high - low)
    straight = np.clip(at, max(0.22, seen[0] + 0.1), min(0.78, seen[1] - 0.1))  # its ends flare to one side
    axis = direction if bone in CARPALS else unit(middle(straight + 0.08) - middle(straight - 0.08))
    centre = middle(at)
    slab = cloud.points[np.abs((cloud.points - centre) @ axis) < max(2.5, 1.5 * cloud.pitch)] - centre
    across = slab - np.outer(slab @ axis, axis)
    width = 2.3 * np.sqrt((across**2).sum(1).mean())
    return Site(bone, at, centre.astype(float), axis.astype(float), float(width), high - low)


def across(site: Site, towards: Sequence[float] | np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Make a unit vector across the bone, roughly `towards` a direction, or any where that is None."""
    wish = rng.standard_normal(3) * (1 if towards is None else 0.2)
    wish = wish if towards is None else wish + np.asarray(towards, float)
    return unit(wish - (wish @ site.axis) * site.axis)


def pick(options: Sequence[Item], rng: np.random.Generator, weights: Sequence[float] | None = None) -> Item:
    """Draw one of a list, without NumPy turning it into an array."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    return options[int(rng.choice(len(options), p=np.asarray(weights, float) / np.sum(weights)))]


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to length 1."""
    return vector / np.linalg.norm(vector)


def step_down(value: np.ndarray, edge: float, soft: float) -> np.ndarray:
    """Fall smoothly from 1 (below `edge`) to 0 (above it) within about `soft` on either side."""
    return 1 / (1 + np.exp(np.clip((value - edge) / (0.4 * soft), -30, 30)))
