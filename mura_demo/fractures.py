"""Fractures, made in 3-D: every bone breaks in its own ways, from subtle (severity 0) to plain (1).

The fragments turn about the break or about their own joints, so that what hangs on a bone is shifted by a few
millimetres and never swung around.  Explained in the appendix `a_demo_radiographs`.  Lengths in mm.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .anatomy import Scene
from .bones import DISTAL, METACARPALS, MIDDLE, PROXIMAL
from .sites import Site, across, locate, pick, shown, unit
from .skeleton import rotation_about, skeleton

FRONT, BACK, OUTER, INNER = (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)
DORSAL, PALMAR, RADIAL, ULNAR = OUTER, INNER, FRONT, BACK  # of the hand, thumb forwards
FINGERS, LONG_MCS = [*PROXIMAL, *MIDDLE], METACARPALS[1:]
ADULT, YOUNG, ANY = (16, 120), (0, 16), (0, 120)


class Fracture(NamedTuple):
    """A row of `FRACTURES`: where a bone breaks, along which plane, and what then moves where."""

    name: str
    bones: list[str]
    at: tuple[float, float]  # along the bone: 0 its proximal end, 1 its distal one
    oblique: tuple[float, float]  # degrees between the plane's normal and the bone's axis
    lean: tuple | None  # direction that the normal leans to; None: any
    moves: str  # a key of `MOTIONS`, or "buckle"
    tilt: float  # degrees, at severity 0.5
    towards: tuple | None  # direction that the fragment tilts and steps to; None: any
    step: float  # of the cortex, as a fraction of the bone's width, at severity 0.5
    offset: float = 0.0  # of the plane from the bone's middle towards `lean`, as a fraction of the width
    impacted: float = 0.0  # shortening as a fraction of the width, at severity 0.5
    partner: str = ""  # a bone that breaks at the same level ("ulna"), or leaves its joint ("radial head")
    ages: tuple[float, float] = ANY
    weight: float = 1.0


FRACTURES = [
    # name, bones, at, oblique, lean, moves, tilt, towards, step
    Fracture(
        "Colles", ["radius"], (0.87, 0.93), (3, 18), DORSAL, "end", 15, DORSAL, 0.28, 0, 0.14, "", ADULT, 3
    ),
    Fracture("torus", ["radius"], (0.83, 0.90), (0, 8), None, "buckle", 5, DORSAL, 0, ages=YOUNG, weight=4),
    Fracture("styloid", ["radius"], (0.93, 0.95), (48, 62), RADIAL, "chip", 8, RADIAL, 0.14, 0.2),
    Fracture("styloid", ["ulna"], (0.965, 0.98), (0, 25), None, "chip", 10, ULNAR, 0.25, weight=0.7),
    Fracture("waist", ["scaphoid"], (0.4, 0.6), (0, 22), None, "chip", 14, RADIAL, 0.25, weight=1.5),
    Fracture("boxer", ["5mc", "4mc"], (0.77, 0.84), (5, 25), PALMAR, "end", 28, PALMAR, 0.15, weight=2.5),
    Fracture("Bennett", ["1mc"], (0.13, 0.2), (40, 55), ULNAR, "base chip", 8, ULNAR, 0.16, 0.12),
    Fracture("base", ["1mc", "5mc"], (0.16, 0.24), (5, 25), None, "hinge", 14, RADIAL, 0.3, weight=0.7),
    Fracture("spiral", LONG_MCS, (0.35, 0.65), (52, 66), None, "hinge", 7, None, 0.42, weight=2),
    Fracture("transverse", LONG_MCS, (0.35, 0.7), (4, 18), None, "hinge", 14, DORSAL, 0.45, weight=1.5),
    Fracture("spiral", FINGERS, (0.35, 0.68), (50, 64), None, "hinge", 8, None, 0.4, weight=3),
    Fracture("transverse", FINGERS, (0.25, 0.7), (3, 20), None, "hinge", 15, PALMAR, 0.45, weight=2),
    Fracture("neck", FINGERS, (0.78, 0.86), (5, 25), None, "end", 14, DORSAL, 0.2),
    Fracture("mallet", DISTAL, (0.16, 0.26), (42, 58), DORSAL, "base chip", 14, DORSAL, 0.22, 0.12, weight=1),
    Fracture(
        "volar plate", MIDDLE, (0.1, 0.16), (42, 58), PALMAR, "base chip", 10, PALMAR, 0.2, 0.2, weight=0.6
    ),
    Fracture("tuft", DISTAL, (0.68, 0.82), (3, 30), None, "chip", 8, None, 0.2, weight=0.7),
    Fracture("transverse", ["radius"], (0.3, 0.75), (4, 25), None, "hinge", 6, None, 0.45),
    Fracture("nightstick", ["ulna"], (0.4, 0.82), (4, 25), None, "hinge", 5, None, 0.4),
    Fracture("both bones", ["radius"], (0.35, 0.7), (4, 25), None, "hinge", 7, None, 0.45, 0, 0, "ulna"),
    Fracture("Monteggia", ["ulna"], (0.22, 0.42), (5, 30), None, "hinge", 8, FRONT, 0.3, 0, 0, "radial head"),
    Fracture("radial head", ["radius"], (0.02, 0.035), (62, 80), None, "base chip", 6, None, 0.2, 0.1),
    Fracture("radial neck", ["radius"], (0.055, 0.075), (3, 15), OUTER, "base chip", 16, OUTER, 0.12),
    Fracture("olecranon", ["ulna"], (0.04, 0.06), (0, 25), BACK, "pulled off", 8, BACK, 0.32),
    Fracture(
        "supracondylar", ["humerus"], (0.86, 0.89), (5, 20), BACK, "end", 14, BACK, 0.15, ages=YOUNG, weight=4
    ),
    Fracture("transcondylar", ["humerus"], (0.87, 0.9), (5, 30), None, "end", 8, BACK, 0.10, ages=ADULT),
    Fracture(
        "surgical neck", ["humerus"], (0.14, 0.19), (3, 25), None, "head", 16, OUTER, 0.25, 0, 0.1, "", ANY, 2
    ),
    Fracture(
        "greater tuberosity", ["humerus"], (0.06, 0.1), (66, 78), OUTER, "base chip", 5, OUTER, 0.12, 0.36
    ),
    Fracture("spiral", ["humerus"], (0.35, 0.68), (52, 68), None, "hinge", 5, None, 0.4, weight=2),
    Fracture("transverse", ["humerus"], (0.3, 0.7), (4, 25), None, "hinge", 6, None, 0.45),
    Fracture("mid-third", ["clavicle"], (0.4, 0.66), (15, 50), None, "hinge", 9, (0, 1, 0), 0.8, weight=2),
    Fracture("lateral third", ["clavicle"], (0.78, 0.87), (5, 30), None, "hinge", 6, (0, 1, 0), 0.5),
]


def kinds(scene: Scene) -> list[tuple[Fracture, str, tuple[float, float]]]:
    """List what may break in a scene: (row of `FRACTURES`, bone, stretch of it that the film shows)."""
    stretches, found = shown(scene), []
    for row in FRACTURES:
        for bone in row.bones:
            low, high = stretches.get(bone, (1, 0))
            stretch = (max(low, row.at[0]), min(high, row.at[1]))
            if stretch[0] <= stretch[1] and row.ages[0] <= scene.patient.age < row.ages[1]:
                found.append((row, bone, stretch))
    return found


def fracture(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Break a bone in one of its own ways.

    Parameters
    ----------
    scene : Scene
        It is edited.
    severity : float
        0 to 1: gap, step, angle and number of pieces grow with it.
    rng : numpy.random.Generator

    Returns
    -------
    str
        "kind:bone", with "+callus" where it is healing.
    """
    options = kinds(scene)
    row, bone, stretch = pick(options, rng, [o[0].weight / len(o[0].bones) for o in options])
    healing = row.moves == "hinge" and rng.random() < 0.2
    site = locate(scene, bone, rng.uniform(*stretch))
    break_bone(scene, site, row, severity, rng, healing)
    if row.partner == "radial head":
        _leave_joint(scene, severity, rng)
    elif row.partner:
        other = locate(scene, row.partner, np.clip(site.at + rng.uniform(-0.08, 0.08), 0.05, 0.95))
        break_bone(scene, other, row, severity, rng, healing)
    return f"{row.name}:{bone}" + "+callus" * healing


def break_bone(
    scene: Scene, site: Site, row: Fracture, severity: float, rng: np.random.Generator, healing: bool = False
) -> None:
    """Break a bone at a site as a row of `FRACTURES` says, and tag what that changes.

    Parameters
    ----------
    scene : Scene
        It is edited.
    site : Site
    row : Fracture
    severity : float
        0 to 1.
    rng : numpy.random.Generator
    healing : bool
        With callus around the break.
    """
    cloud, body, w = scene.bones[site.bone], scene.body(site.bone), site.width
    amount = (0.1 + 2.2 * severity**1.3) * rng.uniform(0.75, 1)
    way = -1 if row.moves in ("base chip", "pulled off", "head") else 1
    lean = across(site, row.lean, rng)
    row = row if row.towards is not None or "chip" not in row.moves else row._replace(towards=lean)
    normal = unit(site.axis * way + np.tan(np.deg2rad(rng.uniform(*row.oblique))) * lean)
    old = cloud.points - (site.centre + row.offset * w * lean)
    height = jagged(old, normal, w, rng)
    if row.moves == "buckle":
        return _buckle(scene, site, old, height, amount, across(site, row.towards, rng))
    gap = (0.5 + 1.7 * severity * rng.uniform(0.7, 1)) * (0.6 + w / 20)
    mass = cloud.mass * (1 - (0.55 if healing else 0.96) * np.exp(-((height / gap) ** 4)))
    points, shift_joint = MOTIONS[row.moves](cloud.points, site, row, way, height > 0, amount, rng)
    pieces = int(severity * rng.uniform(0.6, 3.4)) if row.moves in ("hinge", "end", "head") else 0
    _shatter(points, np.flatnonzero(np.abs(height) < 0.35 * w), w, pieces, rng)
    scene.bones[site.bone] = cloud._replace(points=points.astype(np.float32), mass=mass.astype(np.float32))
    reach = ((cloud.points - site.centre) ** 2).sum(1) < (2 * w) ** 2
    moved = np.linalg.norm(points - cloud.points, axis=1) > max(1.5, 0.12 * w)
    tagged = (np.abs(height) < max(2.5, 0.3 * w)) & reach | moved & reach
    if row.moves != "hinge":
        tagged |= height > 0  # a small fragment, as a whole
    scene.tags.append((body, points[tagged]))
    if healing:
        _callus(scene, site, points[np.abs(height) < 0.9 * w], cloud.pitch, severity, rng)
    for child, parent in skeleton().parent.items():
        if parent == body and shift_joint is not None:
            place = skeleton().position[child]
            if (place - site.centre) @ normal > 0:
                scene.moved[child] = (np.eye(3), shift_joint(place))


def jagged(r: np.ndarray, normal: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """Signed distance (N,) of points (N, 3) from a fracture: a plane roughened by four waves."""
    aside = unit(np.cross(normal, [0.3, 0.5, 0.8]))
    other = np.cross(normal, aside)
    height = r @ normal
    for k in range(4):
        wave = np.cos(2.4 * k) * aside + np.sin(2.4 * k) * other
        number = rng.uniform(1.2, 4.4) * (k + 1) / width
        height = height + width * 0.07 / (k + 1) * np.sin(number * (r @ wave) + rng.uniform(0, 2 * np.pi))
    return height


# ------------------------------------------------------------------------------------------ what moves how
# Each takes (points, site, row, way, beyond, amount, rng) and returns the points moved, and how the joints
# beyond the break shift (None where nothing hangs on the fragment).
def _end(points, site, row, way, beyond, amount, rng):
    """Turn the fragment about the break; what hangs on it is shifted with its joint, not turned."""
    to = across(site, row.towards, rng)
    turn = rotation_about(np.cross(site.axis * way, to), np.deg2rad(row.tilt * amount))
    shift = site.width * amount * (row.step * to - row.impacted * way * site.axis)
    moved = points.astype(float)
    moved[beyond] = (moved[beyond] - site.centre) @ turn.T + site.centre + shift
    return moved, lambda place: turn @ (place - site.centre) + site.centre + shift - place


def _chip(points, site, row, way, beyond, amount, rng):
    """Turn and shift a small fragment alone, about its own middle and away from the bone."""
    to = across(site, row.towards, rng)
    turn = rotation_about(np.cross(site.axis * way, to), np.deg2rad(row.tilt * amount))
    moved = points.astype(float)
    middle = moved[beyond].mean(0) if beyond.any() else site.centre
    away = unit(to + (1.5 if row.moves == "pulled off" else 0.4) * way * site.axis)
    moved[beyond] = (moved[beyond] - middle) @ turn.T + middle + row.step * site.width * amount * away
    return moved, None


def _head(points, site, row, way, beyond, amount, rng):
    """Turn the fragment within its joint and press the shaft's side of the break into it."""
    to = across(site, row.towards, rng)
    joint = site.centre + way * site.axis * site.length * (site.at if way < 0 else 1 - site.at) * 0.7
    turn = rotation_about(np.cross(site.axis * way, to), np.deg2rad(row.tilt * amount))
    moved = points.astype(float)
    shift = site.width * amount * (0.35 * row.step * to - row.impacted * way * site.axis)
    moved[beyond] = (moved[beyond] - joint) @ turn.T + joint + shift
    return moved, None


def _hinge(points, site, row, way, beyond, amount, rng):
    """Bend the bone at the break: each fragment turns about its own far joint, so nothing else moves."""
    to, aside = across(site, row.towards, rng), across(site, row.towards, rng)
    lengths = site.length * np.array([site.at, 1 - site.at])
    apex = np.deg2rad(row.tilt * amount) / (1 / lengths).sum()
    moved = points.astype(float)
    for side, length, which in ((-1, lengths[0], ~beyond), (1, lengths[1], beyond)):
        joint = site.centre + side * site.axis * length
        go = apex * to - side * 0.5 * row.step * site.width * amount * aside
        turn = rotation_about(np.cross(site.centre - joint, go), np.linalg.norm(go) / length)
        moved[which] = (moved[which] - joint) @ turn.T + joint
    return moved, None


MOTIONS = {
    "end": _end,
    "chip": _chip,
    "base chip": _chip,
    "pulled off": _chip,
    "head": _head,
    "hinge": _hinge,
}


def _leave_joint(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    """Swing the radius forwards about its distal end, so that its head leaves the elbow; tag the head."""
    cloud, site = scene.bones["radius"], locate(scene, "radius", 0.03)
    far = site.centre + 0.97 * site.length * site.axis
    slip = site.width * (0.2 + 0.5 * severity) * rng.uniform(0.8, 1)
    turn = rotation_about(np.cross(site.centre - far, across(site, FRONT, rng)), slip / (0.97 * site.length))
    points = ((cloud.points - far) @ turn.T + far).astype(np.float32)
    scene.bones["radius"] = cloud._replace(points=points)
    head = ((cloud.points - site.centre) @ site.axis) < 0.6 * site.width
    scene.tags.append((scene.body("radius"), points[head]))


def _buckle(scene, site, r, height, amount, to):
    """Fold the cortex of a young bone outwards: a bulge, denser, without a gap."""
    cloud, w = scene.bones[site.bone], site.width
    out = r - np.outer(r @ site.axis, site.axis)
    length = np.linalg.norm(out, axis=1, keepdims=True) + 1e-6
    side = np.clip(0.45 + 0.55 * (out @ to)[:, None] / length, 0, 1)
    fold = np.exp(-((height / (0.11 * w)) ** 2))[:, None]
    rim = np.clip(length / (0.4 * w), 0, 1) ** 2
    points = cloud.points + 0.2 * w * amount * fold * side * rim * out / length
    mass = cloud.mass * (1 + 0.8 * amount * fold * side)[:, 0]
    scene.bones[site.bone] = cloud._replace(points=points.astype(np.float32), mass=mass.astype(np.float32))
    scene.tags.append((scene.body(site.bone), points[np.abs(height) < 0.3 * w]))


def _shatter(points, near, width, pieces, rng):
    """Knock a few chips of bone out of place (comminution), in place."""
    for _ in range(pieces if len(near) > 50 else 0):
        size = width * rng.uniform(0.14, 0.24)
        chip = near[((points[near] - points[rng.choice(near)]) ** 2).sum(1) < size**2]
        points[chip] += rng.standard_normal(3) * 0.12 * width


def _callus(scene, site, near, pitch, severity, rng):
    """Wrap the break in new bone: a fuzzy spindle, thickest at the break."""
    r = near - site.centre
    along = r @ site.axis
    out = r - np.outer(along, site.axis)
    radius = np.linalg.norm(out, axis=1)
    outer = radius > 0.36 * site.width
    spindle = np.exp(-((along[outer] / (0.55 * site.width)) ** 2))
    thick = site.width * (0.1 + 0.16 * severity) * spindle * rng.random(outer.sum())
    points = near[outer] + (out[outer] / radius[outer, None]) * thick[:, None]
    mass = (0.5 * pitch**3 * spindle).astype(np.float32)
    scene.added.append((scene.body(site.bone), points.astype(np.float32), mass))
    scene.tags.append((scene.body(site.bone), points[spindle > 0.4]))
