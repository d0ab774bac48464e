"""Findings in joints - degenerative disease and subluxation - made in 3-D where two bones meet.

From subtle (severity 0) to plain (1).  Each edits the `Scene` that it is given, and nothing else.
Worked out with the arm at rest and kept in the frames of the bones, so it stays in every pose.
Lengths in mm.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree

from .anatomy import Scene
from .implants import pick, unit
from .skeleton import rotation_about, skeleton

# Joints that wear or slip: the body that moves and the bone that it meets; and the joint's size.
JOINTS = {
    "SHOULDER": [("humerus_r", "scapula")],
    "HUMERUS": [("humerus_r", "scapula")],
    "ELBOW": [("ulna_r", "humerus")],
    "FOREARM": [("lunate_r", "radius"), ("ulna_r", "humerus")],
    "WRIST": [("lunate_r", "radius")],
    "HAND": [("firstmc_r", "trapezium")]
    + [(f"{i}proxph_r", f"{i}mc") for i in range(2, 6)]
    + [(f"midph{i}_r", f"{i}proxph") for i in range(2, 6)],
}
JOINT_RADIUS = {
    "SHOULDER": 24,
    "HUMERUS": 24,
    "ELBOW": 22,
    "WRIST": 18,
    "FOREARM": 19,
    "HAND": 7.5,
    "FINGER": 7,
}


def joints(scene: Scene) -> list[tuple[str, str]]:
    """List the joints of a scene that may wear or slip: (body that moves, bone that it meets)."""
    if scene.part != "FINGER":
        return JOINTS[scene.part]
    d = scene.digit
    if d == 1:
        return [("proximal_thumb_r", "1mc"), ("distal_thumb_r", "thumbprox")]
    return [(f"{d}proxph_r", f"{d}mc"), (f"midph{d}_r", f"{d}proxph"), (f"distph{d}_r", f"{d}midph")]


def _contact(scene: Scene, body: str, parent: str, radius: float):
    """Where two bones meet at rest: frames, centre, direction parent -> child, child bones (world)."""
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
    return frames, centre, unit(b.mean(0) - a.mean(0)), children


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
    """Wear a joint: narrowed space, dense bone beside it, bony spurs at its rim.

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
    body, parent = pick(joints(scene), rng)
    radius = JOINT_RADIUS[scene.part]
    frames, centre, u, children = _contact(scene, body, parent, radius)
    rims = []
    for bone in [parent, *children]:
        world, near = _near(scene, frames, bone, centre, 1.2 * radius)
        if len(near) < 20:
            continue
        cloud, v = scene.bones[bone], world - centre
        axial, far = v @ u, np.sqrt((v**2).sum(1))
        dense = np.exp(-((axial / (0.35 * radius)) ** 2) - (far / (0.95 * radius)) ** 4)
        mass = cloud.mass.copy()
        mass[near] += (cloud.pitch**3 * dense * (0.22 + 0.5 * severity)).astype(np.float32)
        scene.bones[bone] = cloud._replace(mass=mass)
        scene.tags.append((scene.body(bone), cloud.points[near[dense > 0.3]]))
        rim = np.sqrt(np.clip(far**2 - axial**2, 0, None)) > 0.5 * radius
        rims += [
            (bone, p)
            for p in world[(cloud.depth[near] < 1.2 * cloud.pitch) & (np.abs(axial) < 0.45 * radius) & rim][
                ::7
            ]
        ]
    for _ in range(round(2 + 5 * severity) if rims else 0):
        bone, spot = pick(rims, rng)
        size = radius * rng.uniform(0.11, 0.2) * (0.7 + 0.6 * severity)
        count = max(80, int(5 * size**3 / scene.bones[bone].pitch ** 3))
        lump = rng.standard_normal((count, 3))
        lump *= rng.random((count, 1)) ** (1 / 3) * size / np.linalg.norm(lump, axis=1, keepdims=True)
        spur = _to_local(
            scene, frames, bone, lump * rng.uniform(0.6, 1.2, 3) + spot + unit(spot - centre) * 0.4 * size
        )
        mass = np.full(count, 0.45 * 4.19 * size**3 / count, np.float32)
        scene.added.append((scene.body(bone), spur.astype(np.float32), mass))
        scene.tags.append((scene.body(bone), spur))
    _displace(scene, frames, body, np.eye(3), -u * 0.09 * radius * (0.5 + severity), centre)
    return f"{parent}/{body}"


def subluxation(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Slip a joint sideways and turn it; the shoulder goes forward and down.

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
    body, parent = pick(joints(scene), rng)
    radius = JOINT_RADIUS[scene.part]
    frames, centre, u, children = _contact(scene, body, parent, radius)
    way = np.cross(u, rng.standard_normal(3))
    if parent == "scapula":
        way = np.array([0.6, -0.6, -0.35]) + 0.2 * rng.standard_normal(3)
    slip = radius * (0.35 + 0.7 * severity)
    turn = rotation_about(rng.standard_normal(3), np.deg2rad(5 + 13 * severity))
    for bone in [parent, *children]:
        near = _near(scene, frames, bone, centre, 1.05 * radius)[1]
        if len(near):
            scene.tags.append((scene.body(bone), scene.bones[bone].points[near]))
    _displace(scene, frames, body, turn, unit(way) * slip + u * 0.08 * radius, centre)
    return f"{parent}/{body}"
