"""Findings in joints - degenerative disease and subluxation - made in 3-D where two bones meet.

From subtle (severity 0) to plain (1).  Each edits the `Scene` that it is given, and nothing else.
Worked out with the arm at rest and kept in the frames of the bones, so it stays in every pose.
Lengths in mm.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from .anatomy import Scene
from .sites import WHOLE, locate, pick, step_down, unit
from .skeleton import rotation_about, skeleton


class Joint(NamedTuple):
    """A joint: the body that moves, the bone that it meets, its radius, and what happens to it how often."""

    body: str
    bone: str
    radius: float  # mm
    slip: float  # of a subluxation at severity 1, as a fraction of the radius
    wears: float = 1.0
    slips: float = 1.0
    way: tuple | None = None  # direction in which it slips; None: any
    swings: tuple[str, float] | None = (
        None  # long bone that swings out of the joint, and where its far end is
    )


GLENOHUMERAL = Joint("humerus_r", "scapula", 24, 1.0, 1, 2, (0.6, -0.6, -0.35), ("humerus", 0.97))
ACROMIOCLAVICULAR = Joint("scapula_r", "clavicle", 9, 1.3, way=(0, 1, 0), swings=("clavicle", 0.02))
ELBOW = Joint("ulna_r", "humerus", 21, 0.55, way=(1, -0.2, -0.3), swings=("humerus", 0.03))
RADIOCARPAL = Joint("lunate_r", "radius", 17, 0.5)
THUMB_BASE = Joint("firstmc_r", "trapezium", 8, 0.6, 2, 0.5, (0.8, 0.3, 0.3))
FINGERS = {
    i: [
        Joint(f"{i}proxph_r", f"{i}mc", 7.5, 0.9, 0.6),
        Joint(f"midph{i}_r", f"{i}proxph", 6.5, 0.9),
        Joint(f"distph{i}_r", f"{i}midph", 5, 0.8, 1.5),
    ]
    for i in range(2, 6)
}
FINGERS[1] = [
    Joint("proximal_thumb_r", "1mc", 7.5, 0.8),
    Joint("distal_thumb_r", "thumbprox", 6, 0.8),
    THUMB_BASE._replace(wears=0.5, slips=0.2),
]
JOINTS = {
    "SHOULDER": [GLENOHUMERAL, ACROMIOCLAVICULAR],
    "HUMERUS": [GLENOHUMERAL],
    "ELBOW": [ELBOW],
    "FOREARM": [RADIOCARPAL, ELBOW],
    "WRIST": [RADIOCARPAL, THUMB_BASE],
    "HAND": [THUMB_BASE, *(joint for i in range(2, 6) for joint in FINGERS[i])],
}


def joints(scene: Scene) -> list[Joint]:
    """List the joints of a scene that may wear or slip."""
    found = FINGERS[scene.digit] if scene.part == "FINGER" else JOINTS[scene.part]
    return [joint for joint in found if joint.bone in scene.bones]


def _contact(scene: Scene, body: str, parent: str, radius: float):
    """Where two bones meet at rest: frames, centre, direction to the child, its bones, half the gap."""
    frames = scene.frames({})
    inside = {body}
    for child, above in skeleton().parent.items():  # parents come before their children
        if above in inside:
            inside.add(child)
    children = [b for b in scene.bones if scene.body(b) in inside and b != parent]
    origin = frames[body][1]
    a = _near(scene, frames, parent, origin, 2.2 * radius)[0]
    b = np.concatenate([_near(scene, frames, child, origin, 2.2 * radius)[0] for child in children])
    a, b = a[:: max(1, len(a) // 1500)], b[:: max(1, len(b) // 1500)]
    distance, nearest = (np.asarray(found) for found in KDTree(a).query(b))
    closest = np.argsort(distance)[: max(30, len(distance) // 25)]
    centre = (b[closest].mean(0) + a[nearest[closest]].mean(0)) / 2
    half = float(np.median(distance[closest])) / 2
    return frames, centre, unit(b.mean(0) - a.mean(0)), children, half


def _near(scene, frames, bone, centre, radius):
    """World points of a bone within `radius` of a world point, and their indices."""
    rotation, origin = frames[scene.body(bone)]
    points = scene.bones[bone].points
    index = np.flatnonzero(((points - (centre - origin) @ rotation) ** 2).sum(1) < radius**2)
    return points[index] @ rotation.T + origin, index


def _to_local(scene, frames, bone, world):
    rotation, origin = frames[scene.body(bone)]
    return (world - origin) @ rotation


def _displace(scene, frames, body, turn, shift, pivot):
    """Move a body and all that hangs on it: a world motion at rest, kept in the frame of its parent."""
    rotation, origin = frames[skeleton().parent[body]]
    local = rotation.T @ turn @ rotation
    about = rotation.T @ (pivot - origin)
    scene.moved[body] = (local, about - local @ about + rotation.T @ shift)


def degenerative(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Wear a joint: narrowed uneven space, dense bone and cysts beside it, bony spurs at its rim.

    Parameters
    ----------
    scene : Scene
        It is edited.
    severity : float
        0 to 1: narrowing, density, number and size of the spurs grow with it.
    rng : numpy.random.Generator

    Returns
    -------
    str
        "bone/body" of the joint.
    """
    options = joints(scene)
    joint = pick(options, rng, [j.wears for j in options])
    frames, centre, u, children, half = _contact(scene, joint.body, joint.bone, joint.radius)
    lopsided = unit(np.cross(u, rng.standard_normal(3)))  # one side of a joint wears more than the other
    rims = []
    for bone in [joint.bone, *children]:
        world, near = _near(scene, frames, bone, centre, 1.2 * joint.radius)
        if len(near) < 20:
            continue
        v = world - centre
        v = (v - np.clip(v @ u, -half, half)[:, None] * u) / joint.radius  # as if there were no gap
        _harden(scene, bone, near, v, u, lopsided, severity, rng)
        if bone != joint.bone:
            narrow = min(2.5, 2 * half) * (0.2 + 0.75 * severity) * (1 + 0.5 * v @ lopsided)
            narrow *= step_down(
                (v**2).sum(1), 0.7, 0.5
            )  # the joint's side of the bone alone: nothing else moves
            move = -(u @ frames[scene.body(bone)][0]) * narrow[:, None]
            points = scene.bones[bone].points.copy()
            points[near] += move.astype(np.float32)
            scene.bones[bone] = scene.bones[bone]._replace(points=points)
        radial = np.sqrt(np.clip((v**2).sum(1) - (v @ u) ** 2, 0, None))
        skin = scene.bones[bone].depth[near] < 1.3 * scene.bones[bone].pitch
        rims += [(bone, p) for p in world[skin & (np.abs(v @ u) < 0.4) & (radial > 0.45)][::5]]
    for _ in range(round(1.5 + 6 * severity) if rims else 0):
        bone, spot = pick(rims, rng)
        _spur(scene, frames, bone, spot, centre, u, joint.radius, severity, rng)
    return f"{joint.bone}/{joint.body}"


def _harden(scene, bone, near, v, u, lopsided, severity, rng):
    """Make the bone under a joint's surface denser, with a few cysts in it, and tag it."""
    cloud = scene.bones[bone]
    axial, far = v @ u, np.linalg.norm(v, axis=1)
    dense = np.exp(-((axial / 0.3) ** 2) - (far / 0.85) ** 4) * (0.65 + 0.5 * v @ lopsided)
    mass = cloud.mass.copy()
    mass[near] += (cloud.pitch**3 * dense.clip(0) * (0.15 + 0.9 * severity)).astype(np.float32)
    spots = np.flatnonzero(np.exp(-((axial / 0.4) ** 2) - (far / 0.7) ** 4) > 0.3)
    for _ in range(rng.binomial(3, 0.45 * severity) if len(spots) else 0):
        distance = np.linalg.norm(v - v[rng.choice(spots)], axis=1) / rng.uniform(0.09, 0.17)
        mass[near] *= (1 - 0.85 * step_down(distance, 1, 0.25)).astype(np.float32)
        wall = 0.25 * cloud.pitch**3 * np.exp(-(((distance - 1.2) / 0.2) ** 2))
        mass[near] += wall.astype(np.float32)
    scene.bones[bone] = cloud._replace(mass=mass)
    scene.tags.append((scene.body(bone), cloud.points[near[(np.abs(axial) < 0.35) & (far < 0.95)]]))


def _spur(scene, frames, bone, spot, centre, u, radius, severity, rng):
    """Grow an osteophyte on a joint's rim: a lip, wide along the rim, thin and pointed outwards."""
    long = radius * rng.uniform(0.24, 0.4) * (0.4 + 0.9 * severity)
    out = unit((spot - centre) - ((spot - centre) @ u) * u)
    tip = unit(out + rng.uniform(-0.5, 0.5) * u)
    rim = np.cross(u, out)
    pitch = scene.bones[bone].pitch
    count = int(np.clip(8 * long**3 / pitch**3, 150, 6000))
    s, edge, angle = rng.random(count), np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
    thick = 0.5 * long * (1 - s) ** 0.7 * edge
    lump = (long * (1.2 * s - 0.35))[:, None] * tip
    lump += (1.7 * thick * np.cos(angle))[:, None] * rim
    lump += (0.8 * thick * np.sin(angle))[:, None] * np.cross(tip, rim)
    mass = (
        (0.25 + 0.45 * (edge > 0.8)) * np.pi * 1.36 * (0.5 * long) ** 2 * (1 - s) ** 1.4 * 1.2 * long / count
    )
    local = _to_local(scene, frames, bone, spot + lump)
    scene.added.append((scene.body(bone), local.astype(np.float32), mass.astype(np.float32)))
    scene.tags.append((scene.body(bone), local))


def subluxation(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Slip a joint sideways, with a small turn: shoulder forwards and down, collar bone up, elbow back.

    Parameters
    ----------
    scene : Scene
        It is edited.
    severity : float
        0 to 1: slip and turn grow with it.
    rng : numpy.random.Generator

    Returns
    -------
    str
        "bone/body" of the joint.
    """
    options = joints(scene)
    joint = pick(options, rng, [j.slips for j in options])
    radius = joint.radius
    frames, centre, u, children, _ = _contact(scene, joint.body, joint.bone, radius)
    parts = [(b, _near(scene, frames, b, centre, 1.1 * radius)[1]) for b in [joint.bone, *children]]
    slip = radius * joint.slip * (0.4 + 1.2 * severity) * rng.uniform(0.85, 1)
    wish = rng.standard_normal(3) if joint.way is None else np.asarray(joint.way, float)
    way = wish + 0.2 * rng.standard_normal(3)
    way = unit(way - 0.8 * (way @ u) * u)
    if joint.swings:
        _swing(scene, *joint.swings, way * slip)
    else:
        turn = rotation_about(rng.standard_normal(3), np.deg2rad(1 + 3 * severity))
        _displace(scene, frames, joint.body, turn, way * slip + u * 0.06 * radius, centre)
    for bone, near in parts:
        if len(near):
            scene.tags.append((scene.body(bone), scene.bones[bone].points[near]))
    return f"{joint.bone}/{joint.body}"


def _swing(scene: Scene, bone: str, far: float, shift: np.ndarray) -> None:
    """Turn a long bone about its far end, so that its near end is shifted and nothing beyond it moves."""
    cloud = scene.bones[bone]
    pivot, near = (locate(scene, bone, at).centre for at in (far, 1 - far))
    if bone in WHOLE:  # the film may hold one end only
        axis, low, high = WHOLE[bone]
        pivot = pivot + axis * (low + far * (high - low) - pivot @ axis)
    arm = near - pivot
    turn = rotation_about(np.cross(arm, shift), float(np.linalg.norm(shift) / np.linalg.norm(arm)))
    points = ((cloud.points - pivot) @ turn.T + pivot).astype(np.float32)
    scene.bones[bone] = cloud._replace(points=points)
