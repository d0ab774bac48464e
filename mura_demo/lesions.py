"""Lesions in bones - lytic, sclerotic, exostosis - made in 3-D, from subtle (severity 0) to plain (1).

Explained in the appendix `a_demo_radiographs`.  Lengths in mm, masses in mm^3 of cortical bone.
"""

from __future__ import annotations

import numpy as np

from .anatomy import Scene
from .bones import TISSUE, Cloud
from .sites import Site, across, locate, pick, shown, step_down, unit

ODDS = {"lytic": 0.5, "sclerotic": 0.3, "exostosis": 0.2}
ENDS = ((0.06, 0.3), (0.7, 0.93))  # most lesions sit where bone is spongy: near an end
NEAR_END = 0.75
SIDES = [(1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)]  # of a bone: most views show one of them in profile


def lesion(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Dissolve (lytic) or thicken (sclerotic) the medulla of a bone, or let an exostosis grow from it.

    Parameters
    ----------
    scene : Scene
        It is edited.
    severity : float
        0 to 1: size and contrast grow with it.
    rng : numpy.random.Generator

    Returns
    -------
    str
        "kind:bone".
    """
    bones = list(shown(scene))
    bone = pick(bones, rng, [len(scene.bones[b].points) ** 0.5 for b in bones])  # rarely the smallest
    low, high = shown(scene)[bone]
    ends = [(max(low, a), min(high, b)) for a, b in ENDS if max(low, a) < min(high, b)]
    stretch = pick(ends, rng) if ends and rng.random() < NEAR_END else (max(low, 0.06), min(high, 0.93))
    site = locate(scene, bone, rng.uniform(*stretch))
    kind = pick(list(ODDS), rng, list(ODDS.values()))
    KINDS[kind](scene, site, severity, rng)
    return f"{kind}:{bone}"


def _egg(scene: Scene, site: Site, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Measure how far points lie from the middle of an uneven egg along the bone: (N,), 1 on its surface."""
    x = across(site, None, rng)
    frame = np.stack([x, site.axis, np.cross(x, site.axis)], axis=1)
    middle = site.centre + 0.1 * site.width * rng.standard_normal(3)
    sizes = radius * rng.uniform([0.8, 1.0, 0.8], [1.0, 1.7, 1.0])
    r = (scene.bones[site.bone].points - middle) @ frame / sizes
    waves = rng.uniform(0, 6, 3)
    return np.linalg.norm(r, axis=1) + 0.09 * np.sin(3.3 * r + waves).sum(1)


def medulla(bone: str, cloud: Cloud) -> np.ndarray:
    """Tell the medulla (1) from the outer part of the cortex (0): (N,)."""
    cortex = 0.45 * TISSUE[bone].cortex
    return 1 - step_down(cloud.depth, cortex, 0.5 * cortex)


def _lytic(scene, site, severity, rng):
    """Dissolve the medulla and scallop the cortex from within; a sclerotic rim, or moth-eaten edges."""
    cloud = scene.bones[site.bone]
    shape = _egg(scene, site, site.width * rng.uniform(0.6, 0.8) * (0.6 + severity), rng)
    core = medulla(site.bone, cloud)
    style = pick(["geographic", "rim", "moth-eaten"], rng, [0.3, 0.4, 0.3])
    hole = step_down(shape, 1, 0.3 if style == "geographic" else 0.12)
    if style == "moth-eaten":
        holes = cloud.points[rng.choice(np.argsort(shape)[: max(12, int((shape < 1.05).sum()))], 12)]
        near = np.flatnonzero(shape < 1.4)
        distance = np.linalg.norm(cloud.points[near, None] - holes, axis=2)
        eaten = step_down(distance / (site.width * rng.uniform(0.07, 0.2, 12)), 1, 0.3).max(1)
        hole[near] = np.maximum(eaten, 0.75 * hole[near])
    cortex = 0.2 + 0.7 * severity  # how much of the cortex goes, where the hole reaches it
    mass = cloud.mass * (1 - hole * (0.55 + 0.4 * severity) * (cortex + (1 - cortex) * core))
    if style == "rim":
        rim = np.exp(-(((shape - 1.08) / 0.09) ** 2)) * core
        mass = mass + cloud.pitch**3 * rim * (0.1 + 0.15 * severity)
    _put(scene, site, mass, shape < 1.15)


def _sclerotic(scene, site, severity, rng):
    """Thicken the medulla by a tenth to a third, without a sharp edge."""
    cloud = scene.bones[site.bone]
    shape = _egg(scene, site, site.width * rng.uniform(0.55, 0.75) * (0.6 + severity), rng)
    cloudy = step_down(shape, 0.9, rng.uniform(0.3, 0.7)) * medulla(site.bone, cloud)
    _put(scene, site, cloud.mass + cloud.pitch**3 * cloudy * (0.15 + severity), shape < 1.2)


def _exostosis(scene, site, severity, rng):
    """Grow a stalk with a cap out of the cortex, leaning away from the nearer joint."""
    cloud = scene.bones[site.bone]
    out = across(site, pick(SIDES, rng), rng)
    r = cloud.points - site.centre
    on = (cloud.depth < 2 * cloud.pitch) & ((r**2).sum(1) - (r @ out) ** 2 < (0.12 * site.width) ** 2)
    foot = site.centre + out * (r[on] @ out).max(initial=0.35 * site.width)
    lean = site.axis * (1 if site.at < 0.5 else -1)
    tip = unit(out + rng.uniform(0.2, 0.6) * lean)
    long = np.clip(site.width * rng.uniform(0.7, 1.0), 5, 30) * (0.35 + 0.85 * severity)
    count = int(np.clip(14 * long**3 / cloud.pitch**3, 300, 20_000))
    s, angle, edge = rng.random(count), rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.random(count))
    radius = long * (0.6 - 0.42 * s + 0.95 * np.clip(s - 0.45, 0, 1) * np.sqrt(np.clip(1.08 - s, 0, 1)))
    radius *= 1 + 0.15 * np.sin(3 * angle + 5 * s + rng.uniform(0, 6))
    aside = unit(np.cross(tip, site.axis + 0.3 * out))
    other = np.cross(tip, aside)
    points = foot + (long * (1.15 * s - 0.15))[:, None] * tip
    points += (radius * edge)[:, None] * (np.cos(angle)[:, None] * aside + np.sin(angle)[:, None] * other)
    density = 0.32 + 0.5 * ((edge > 0.8) | (s > 0.93))
    mass = density * np.pi * radius**2 * 1.15 * long / count
    body = scene.body(site.bone)
    scene.added.append((body, points.astype(np.float32), mass.astype(np.float32)))
    scene.tags.append((body, points))


def _put(scene, site, mass, tagged):
    cloud = scene.bones[site.bone]
    scene.bones[site.bone] = cloud._replace(mass=mass.astype(np.float32))
    scene.tags.append((scene.body(site.bone), cloud.points[tagged]))


KINDS = {"lytic": _lytic, "sclerotic": _sclerotic, "exostosis": _exostosis}
