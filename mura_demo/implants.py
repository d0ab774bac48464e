"""Plates, nails, wires and screws as clouds of metal, and the small geometry that they need.

Knows nothing of scenes; `findings.hardware` places what is made here.  Lengths in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def pick(options: Sequence[Item], rng: np.random.Generator) -> Item:
    """Draw one of a list, without NumPy turning it into an array."""
    return options[int(rng.integers(len(options)))]


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to length 1."""
    return vector / np.linalg.norm(vector)


def axes_along(direction: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make a frame (3, 3) whose second column is `direction`, turned at random about it."""
    y = unit(direction)
    x = unit(np.cross(y, rng.standard_normal(3)))
    return np.stack([x, y, np.cross(x, y)], axis=1)


def block(kind: str, size: tuple, step: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Fill a block with points.

    Parameters
    ----------
    kind : str
        "box" or "rod".
    size : tuple
        In mm: (x, y, z) of a box; (radius, length along y) of a rod.
    step : float
        Largest distance of the points, mm.
    rng : numpy.random.Generator

    Returns
    -------
    points : ndarray (N, 3)
        About the origin, mm.
    volume : ndarray (N,)
        Of each, mm^3.
    """
    extent = np.array(size if kind == "box" else (2 * size[0], size[1], 2 * size[0]), float)
    count = np.maximum(2, np.ceil(extent / step)).astype(int)
    grid = np.indices(tuple(count)).reshape(3, -1).T
    points = (grid + rng.random(grid.shape)) * (extent / count) - extent / 2
    if kind == "rod":
        points = points[points[:, 0] ** 2 + points[:, 2] ** 2 < size[0] ** 2]
    return points, np.full(len(points), np.prod(extent / count))


def _plate(centre, axis, width, length, severity, step, rng):
    frame = axes_along(axis, rng)
    long = np.clip(length * rng.uniform(0.25, 0.5) * (0.6 + 0.5 * severity), 2.2 * width, 0.7 * length)
    thick, wide = np.clip(0.18 * width, 1.0, 3.4), np.clip(0.6 * width, 2.6, 12)
    seat = centre + frame[:, 0] * (0.5 * width + thick / 2)
    holes = int(np.clip(long / (1.15 * wide), 2, 9))
    spots = (np.arange(holes) - (holes - 1) / 2) * long / holes
    metal, volume = block("box", (thick, long, wide), step, rng)
    solid = np.abs(metal[:, 1, None] - spots).min(1) ** 2 + metal[:, 2] ** 2 > (0.26 * wide) ** 2
    parts = [(metal[solid] @ frame.T + seat, volume[solid])]
    for spot in spots[rng.random(holes) > 0.12]:
        screw = width * rng.uniform(1.0, 1.35) + thick
        aim = axes_along(-frame[:, 0] + 0.1 * rng.standard_normal(3), rng)
        head = seat + frame[:, 1] * spot
        for (radius, rod), back in (
            ((max(0.6, 0.16 * wide), screw), screw / 2),
            ((0.3 * wide, 1.3 * thick), 0.0),
        ):
            metal, volume = block("rod", (radius, rod), step, rng)
            parts.append((metal @ aim.T + head + aim[:, 1] * back, volume))
    return parts


def _nail(centre, axis, width, length, severity, step, rng):
    frame = axes_along(axis, rng)
    long = length * rng.uniform(0.5, 0.62)
    metal, volume = block("rod", (0.17 * width, long), step, rng)
    parts = [(metal @ frame.T + centre, volume)]
    for spot in (-0.46, -0.4, 0.44):
        metal, volume = block("rod", (0.09 * width + 0.5, 1.5 * width), step, rng)
        bolt = axes_along(np.cross(axis, rng.standard_normal(3)), rng)
        parts.append((metal @ bolt.T + centre + axis * spot * long, volume))
    return parts


def _wires(centre, axis, width, length, severity, step, rng):
    parts = []
    for _ in range(rng.integers(2, 4)):
        frame = axes_along(axis + 0.35 * rng.standard_normal(3), rng)
        size = (rng.uniform(0.6, 0.95) * (0.5 + width / 22), length * rng.uniform(0.35, 0.7))
        metal, volume = block("rod", size, step, rng)
        parts.append((metal @ frame.T + centre + 0.1 * width * rng.standard_normal(3), volume))
    return parts


def _screws(centre, axis, width, length, severity, step, rng):
    parts = []
    for k in range(rng.integers(1, 4)):
        frame = axes_along(np.cross(axis, rng.standard_normal(3)) + 0.3 * axis, rng)
        radius, long = np.clip(0.13 * width, 0.8, 2.6), width * rng.uniform(1.2, 1.9)
        middle = centre + axis * (k - 1) * width * 0.7
        for (r, rod), at in (((radius, long), 0.0), ((1.9 * radius, 1.8 * radius), -long / 2)):
            metal, volume = block("rod", (r, rod), step, rng)
            parts.append((metal @ frame.T + middle + frame[:, 1] * at, volume))
    return parts


IMPLANTS = {"plate": _plate, "nail": _nail, "wires": _wires, "screws": _screws}
