"""Findings in bones - fracture, hardware, lesion - made in 3-D in the local frame of the bone.

From subtle (severity 0) to plain (1).  Each edits the `Scene` that it is given, and nothing else, so every
view of the study shows it.  The implants stand in `implants.py`, the findings of joints in `joints.py`.
Explained in the appendix `a_demo_radiographs`.  Lengths in mm, masses in mm^3 of cortical bone.
"""

from __future__ import annotations

import numpy as np

from .anatomy import Scene
from .bones import METACARPALS, PROXIMAL
from .implants import IMPLANTS, axes_along, pick, unit
from .joints import degenerative, subluxation
from .skeleton import rotation_about, skeleton

# Bones that break, carry implants or lesions, and the stretch of the bone that the film shows:
# (local axis, from, to) in mm, or None for the middle 70 % of the bone.
SITES: dict[str, dict[str, tuple[int, float, float] | None]] = {
    "SHOULDER": {"humerus": (1, -95, 12), "clavicle": (2, 45, 115)},
    "HUMERUS": {"humerus": None},
    "ELBOW": {"humerus": (1, -282, -228), "radius": (1, -42, -8), "ulna": (1, -42, -2)},
    "FOREARM": {"radius": None, "ulna": None},
    "WRIST": {
        "radius": (1, -232, -190),
        "ulna": (1, -235, -190),
        "scaphoid": None,
        "1mc": (1, -22, -3),
        "5mc": (1, -15, 12),
    },
    "HAND": dict.fromkeys([*METACARPALS, *PROXIMAL[1:]]),
}


def sites(scene: Scene) -> dict:
    """List the bones of a scene that may break or carry metal, with the stretch that the film shows."""
    if scene.part != "FINGER":
        return SITES[scene.part]
    d = scene.digit
    return dict.fromkeys(
        ["thumbprox", "thumbdist", "1mc"] if d == 1 else [f"{d}proxph", f"{d}midph", f"{d}distph"]
    )


def shaft(points: np.ndarray, stretch, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Choose a site on a bone.

    Parameters
    ----------
    points : ndarray (N, 3)
        Of the bone, mm.
    stretch : tuple or None
        A value of `SITES`.
    rng : numpy.random.Generator

    Returns
    -------
    centre : ndarray (3,)
        Of the site, mm.
    axis : ndarray (3,)
        Of the bone there, pointing distally, of length 1.
    width : float
        Of the bone there, mm.
    """
    axis = np.linalg.eigh(np.cov((points - points.mean(0))[:: max(1, len(points) // 4000)].T))[1][:, -1]
    along, low, high = stretch or (1, *np.quantile(points[:, 1], [0.15, 0.85]))
    axis = axis * (1 if along == 2 else -1) * np.sign(axis[along])
    at = rng.uniform(low, high)
    slab = points[np.abs(points[:, along] - at) < 3]
    if len(slab) < 30:
        slab = points
    centre = slab.mean(0)
    across = (slab - centre) - np.outer((slab - centre) @ axis, axis)
    return centre, axis, 2 * np.sqrt((across**2).sum(1).mean()) * 1.15


def fracture(scene: Scene, severity: float, rng: np.random.Generator, bone=None, site=None) -> str:
    """Break a bone along a jagged oblique plane; everything beyond the break moves with the fragment.

    Parameters
    ----------
    scene : Scene
        It is edited.
    severity : float
        0 to 1: gap, shift and angle of the fragment grow with it.
    rng : numpy.random.Generator
    bone, site : optional
        Where; by default one of `sites`, anywhere along it. `site` is what `shaft` returns.

    Returns
    -------
    str
        The bone's name.
    """
    bone = bone or pick(list(sites(scene)), rng)
    cloud, body = scene.bones[bone], scene.body(bone)
    centre, axis, width = site or shaft(cloud.points, sites(scene)[bone], rng)
    normal = unit(
        axis + np.tan(np.deg2rad(rng.uniform(5, 40))) * unit(np.cross(axis, rng.standard_normal(3)))
    )
    height = _jagged_height(cloud.points - centre, normal, width, rng)
    gap = (0.5 + 1.3 * severity * rng.uniform(0.6, 1)) * (0.5 + width / 18)
    mass = cloud.mass * (1 - 0.97 * np.exp(-((height / gap) ** 4)))
    turn = rotation_about(
        np.cross(axis, rng.standard_normal(3)), np.deg2rad(4 + 30 * severity * rng.uniform(0.5, 1))
    )
    sideways = unit(np.cross(axis, rng.standard_normal(3)))
    slip = (0.10 + 0.75 * severity * rng.uniform(0.6, 1)) * width
    shift = sideways * slip - axis * slip * rng.uniform(-0.2, 0.5)
    beyond = height > 0
    points = cloud.points.copy()
    points[beyond] = (points[beyond] - centre) @ turn.T + centre + shift
    if severity > 0.5:
        _shatter(points, np.flatnonzero(np.abs(height) < 0.4 * width), width, rng)
    scene.bones[bone] = cloud._replace(points=points.astype(np.float32), mass=mass.astype(np.float32))
    scene.tags.append((body, points[np.abs(height) < max(2.5, 0.3 * width)]))
    for child, parent in skeleton().parent.items():
        if parent == body and (skeleton().position[child] - centre) @ normal > 0:
            scene.moved[child] = (turn, centre + shift - turn @ centre)
    return bone


def _jagged_height(r: np.ndarray, normal: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """Signed distance from the fracture surface: a plane roughened by four waves."""
    across = unit(np.cross(normal, [0.3, 0.5, 0.8]))
    other = np.cross(normal, across)
    height = r @ normal
    for k in range(4):
        wave = np.cos(2.4 * k) * across + np.sin(2.4 * k) * other
        number = rng.uniform(1.2, 4.4) * (k + 1) / width
        height = height + width * 0.10 / (k + 1) * np.sin(number * (r @ wave) + rng.uniform(0, 2 * np.pi))
    return height


def _shatter(points: np.ndarray, near: np.ndarray, width: float, rng: np.random.Generator) -> None:
    """Knock a few chips of bone out of place (comminution), in place."""
    if len(near) < 50:
        return
    for _ in range(rng.integers(1, 4)):
        chip = near[((points[near] - points[rng.choice(near)]) ** 2).sum(1) < (0.2 * width) ** 2]
        points[chip] += rng.standard_normal(3) * 0.25 * width


def hardware(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Screw a plate, wires, screws or a nail to a bone; half of the plates bridge a healing fracture.

    Parameters
    ----------
    scene : Scene
        It is edited.
    severity : float
        0 to 1: plates get longer with it.
    rng : numpy.random.Generator

    Returns
    -------
    str
        "kind:bone", with "+fracture" where one goes with it.
    """
    stretches = {b: s for b, s in sites(scene).items() if b != "scaphoid"}
    bone = pick(list(stretches), rng)
    if scene.part in ("HUMERUS", "FOREARM"):  # the whole shaft is on the film
        odds = dict(plate=0.5, wires=0.15, screws=0.15, nail=0.2)
    elif bone in ("humerus", "radius", "ulna", "clavicle"):
        odds = dict(plate=0.6, wires=0.2, screws=0.2)
    else:
        odds = dict(plate=0.35, wires=0.4, screws=0.25)
    kind = str(rng.choice(list(odds), p=list(odds.values())))
    detail = f"{kind}:{bone}"
    site = shaft(scene.bones[bone].points, stretches[bone], rng)
    if kind in ("plate", "nail") and rng.random() < 0.5:
        fracture(scene, 0.2 * severity, rng, bone, site)  # reduced and held, so hardly out of place
        detail += "+fracture"
    centre, axis, width = site
    length = np.ptp(scene.bones[bone].points @ axis)
    step = min(0.55 * min(c.pitch for c in scene.bones.values()), 0.12 * width)
    parts = IMPLANTS[kind](centre, axis, width, length, severity, step, rng)
    density = rng.uniform(8, 13)  # steel and titanium stop far more than bone
    for points, volume in parts:
        scene.metal.append(
            (scene.body(bone), points.astype(np.float32), (volume * density).astype(np.float32))
        )
        scene.tags.append((scene.body(bone), points))
    return detail


def lesion(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Dissolve (lytic) or thicken (sclerotic) an egg-shaped region of a bone.

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
    bone = pick(list(sites(scene)), rng)
    cloud = scene.bones[bone]
    centre, _, width = shaft(cloud.points, sites(scene)[bone], rng)
    radius = width * rng.uniform(0.42, 0.6) * (0.75 + 0.55 * severity)
    frame = axes_along(rng.standard_normal(3), rng)
    r = (
        (cloud.points - centre - 0.12 * width * rng.standard_normal(3))
        @ frame
        / (radius * rng.uniform([0.8, 1, 0.8], [1.1, 1.7, 1.1]))
    )
    shape = (
        np.sqrt((r**2).sum(1))
        + 0.1 * np.sin(3 * r[:, 0] + rng.uniform(0, 6))
        + 0.1 * np.sin(4 * r[:, 1] + rng.uniform(0, 6))
    )
    inside = 1 / (1 + np.exp(np.clip((shape - 1) / rng.uniform(0.04, 0.14), -30, 30)))
    if rng.random() < 0.6:
        kind, factor = "lytic", 1 - inside * (0.72 + 0.26 * severity)
        if rng.random() < 0.6:
            factor = factor + np.exp(-(((shape - 1.12) / 0.1) ** 2))  # a sclerotic rim: slow, benign growth
        mass = cloud.mass * factor
    else:
        kind, mass = "sclerotic", cloud.mass + cloud.pitch**3 * inside * (0.6 + 0.7 * severity)
    scene.bones[bone] = cloud._replace(mass=mass.astype(np.float32))
    scene.tags.append((scene.body(bone), cloud.points[shape < 1.05]))
    return f"{kind}:{bone}"


FINDINGS = {
    "fracture": fracture,
    "hardware": hardware,
    "lesion": lesion,
    "degenerative": degenerative,
    "subluxation": subluxation,
}
