"""Normal variants that mimic findings, in normal and abnormal studies alike; they carry no tags.

`studies.make_scene` adds them before the finding, from a stream of random numbers of the study's own, so that
they say nothing about the label.  Explained in the appendix `a_demo_radiographs`.  Lengths in mm, masses in
mm^3 of cortical bone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .anatomy import Scene
from .bones import METACARPALS, MIDDLE, PROXIMAL
from .lesions import medulla
from .sites import Site, across, locate, step_down, unit


class Variant(NamedTuple):
    """A row of `VARIANTS`: what may be there, on which bone, where along it and on which side of it."""

    kind: str  # a key of `MAKERS`
    bone: str
    chance: float
    at: tuple[float, float]  # along the bone: 0 its proximal end, 1 its distal one
    size: tuple[float, float]  # mm
    towards: tuple | None = None  # direction across the bone; None: any


OUTER, INNER, FRONT, BACK = (0, 0, 1), (0, 0, -1), (1, 0, 0), (-1, 0, 0)
VARIANTS = [
    Variant("canal", "humerus", 0.5, (0.42, 0.6), (14, 26), INNER),
    Variant("canal", "radius", 0.5, (0.3, 0.45), (9, 18), INNER),
    Variant("canal", "ulna", 0.5, (0.3, 0.45), (9, 18), FRONT),
    *(Variant("canal", bone, 0.3, (0.4, 0.6), (4, 8)) for bone in METACARPALS),
    *(Variant("canal", bone, 0.3, (0.4, 0.65), (3, 6)) for bone in [*PROXIMAL, *MIDDLE]),
    Variant("island", "humerus", 0.12, (0.04, 0.12), (2, 4)),
    Variant("island", "radius", 0.10, (0.9, 0.97), (1.2, 2.5)),
    *(Variant("island", bone, 0.05, (0.3, 0.7), (0.9, 1.7)) for bone in ("scaphoid", "capitate", "lunate")),
    *(Variant("island", bone, 0.04, (0.82, 0.93), (0.9, 1.6)) for bone in [*METACARPALS, *PROXIMAL]),
    Variant("sesamoid", "1mc", 0.95, (0.9, 0.96), (1.9, 2.6), (-0.35, 0, -1)),
    Variant("sesamoid", "1mc", 0.95, (0.9, 0.96), (1.9, 2.6), (0.35, 0, -1)),
    Variant("sesamoid", "2mc", 0.4, (0.92, 0.97), (1.2, 1.8), (0.4, 0, -1)),
    Variant("sesamoid", "5mc", 0.35, (0.92, 0.97), (1.1, 1.7), (-0.4, 0, -1)),
    Variant("sesamoid", "3mc", 0.12, (0.0, 0.03), (1.8, 3.0), OUTER),  # the os styloideum
    Variant("ridge", "humerus", 0.6, (0.36, 0.44), (1.2, 3.0), (0.5, 0, 1)),  # the deltoid tuberosity
    Variant("ridge", "radius", 0.4, (0.4, 0.55), (0.7, 1.6), BACK),  # the interosseous ridge
]


def add_variants(scene: Scene, rng: np.random.Generator) -> None:
    """Add each row of `VARIANTS` to a scene with its chance.

    Parameters
    ----------
    scene : Scene
        It is edited: before any finding.
    rng : numpy.random.Generator
        Every row takes the same number of draws, whatever bones the scene holds.
    """
    for row, seed, luck in zip(
        VARIANTS, rng.integers(2**31, size=len(VARIANTS)), rng.random(len(VARIANTS)), strict=True
    ):
        if luck < row.chance and row.bone in scene.bones:
            own = np.random.default_rng(seed)
            site = locate(scene, row.bone, own.uniform(*row.at))
            MAKERS[row.kind](scene, site, row, own.uniform(*row.size), own)


def _near(scene: Scene, site: Site, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Points within `reach` of a site along its bone: their indices, and their vectors from it."""
    r = scene.bones[site.bone].points - site.centre.astype(np.float32)
    index = np.flatnonzero(np.abs(r @ site.axis.astype(np.float32)) < reach)
    return index, r[index]


def _change(scene: Scene, site: Site, index: np.ndarray, mass: np.ndarray) -> None:
    cloud = scene.bones[site.bone]
    changed = cloud.mass.copy()
    changed[index] = mass
    scene.bones[site.bone] = cloud._replace(mass=changed)


def _canal(scene, site, row, size, rng):
    """Drill a nutrient canal: a thin oblique tunnel through one cortex, mostly empty."""
    index, r = _near(scene, site, size)
    out = across(site, row.towards, rng)
    rim = max(float((r @ out).max(initial=1)), 1)
    aim = unit(site.axis * rng.choice([-1, 1]) + out * rng.uniform(0.12, 0.3))
    v = r - out * rim * 0.85
    s = v @ aim
    wide = np.clip(0.022 * site.width + 0.25, 0.3, 0.8)
    tunnel = np.exp(-(((v**2).sum(1) - s**2) / wide**2)) * (np.abs(s) < size / 2)
    _change(scene, site, index, scene.bones[site.bone].mass[index] * (1 - 0.9 * tunnel))


def _island(scene, site, row, size, rng):
    """Put a bone island into the medulla: a small dense spot with a brushed edge."""
    cloud = scene.bones[site.bone]
    index, r = _near(scene, site, 3 * size)
    middle = 0.2 * site.width * across(site, row.towards, rng)
    stretch = np.linalg.norm(r - middle, axis=1) / size * (1 + 0.15 * np.sin(2 * r).sum(1) / 3)
    core = medulla(site.bone, cloud)[index]
    dense = cloud.pitch**3 * 0.75 * step_down(stretch, 1, 0.35) * core
    _change(scene, site, index, np.maximum(cloud.mass[index], dense))


def _sesamoid(scene, site, row, size, rng):
    """Add a small round bone beside a joint: a thin shell around spongy bone."""
    out = across(site, row.towards, rng)
    _, r = _near(scene, site, 3)
    along = r @ out
    aside = (r**2).sum(1) - along**2 < (0.5 * site.width) ** 2
    rim = along[aside].max(initial=0.4 * site.width)
    count = int(np.clip(30 * size**3 / scene.bones[site.bone].pitch ** 3, 200, 4000))
    direction = rng.standard_normal((count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    depth = rng.random(count) ** (1 / 3)
    ball = direction * depth[:, None] * size * rng.uniform(0.75, 1.15, 3)
    mass = (0.35 + 0.4 * (depth > 0.82)) * 4.19 * size**3 / count
    points = site.centre + out * (rim + size * 1.2) + ball
    scene.added.append((scene.body(site.bone), points.astype(np.float32), mass.astype(np.float32)))


def _ridge(scene, site, row, size, rng):
    """Raise a smooth hump of the cortex along a muscle's attachment."""
    cloud = scene.bones[site.bone]
    long = 0.12 * site.length
    index, r = _near(scene, site, 2 * long)
    s = r @ site.axis
    out = r - np.outer(s, site.axis)
    radius = np.linalg.norm(out, axis=1) + 1e-6
    side = np.clip(out @ across(site, row.towards, rng) / radius, 0, 1) ** 3
    lift = size * np.exp(-((s / long) ** 2)) * side * np.clip(radius / (0.4 * site.width), 0, 1) ** 2
    points = cloud.points.copy()
    points[index] += (out / radius[:, None] * lift[:, None]).astype(np.float32)
    scene.bones[site.bone] = cloud._replace(points=points)


MAKERS = {"canal": _canal, "island": _island, "sesamoid": _sesamoid, "ridge": _ridge}
