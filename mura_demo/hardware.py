"""Hardware: which implant goes with which bone, and where; `implants.py` shapes it to the bone.

Explained in the appendix `a_demo_radiographs`.  Lengths in mm, masses in mm^3 of cortical bone.
"""

from __future__ import annotations

import numpy as np

from .anatomy import Scene
from .bones import DISTAL
from .fractures import break_bone, kinds
from .implants import IMPLANTS, Seat, clip
from .sites import locate, pick, shown

SMALL = {"wires": 0.4, "plate": 0.35, "screws": 0.25}
# Implants of a bone with their odds; of the whole shaft where the film shows it (HUMERUS, FOREARM).
ODDS: dict[str, dict[str, float]] = {
    **dict.fromkeys(DISTAL, {"wires": 0.7, "screws": 0.3}),
    "scaphoid": {"headless screw": 0.8, "wires": 0.2},
    "humerus": {"plate": 0.5, "screws": 0.15, "wires": 0.15, "cerclage": 0.1, "staples": 0.1},
    "clavicle": {"plate": 0.75, "nail": 0.15, "cerclage": 0.1},
    "radius": {"plate": 0.65, "wires": 0.25, "screws": 0.1},
    "ulna": {"plate": 0.65, "wires": 0.2, "screws": 0.15},
}
ODDS_OF_PART: dict[tuple[str, str], dict[str, float]] = {
    ("SHOULDER", "humerus"): {
        **{"plate": 0.35, "anchors": 0.3, "screws": 0.1},
        **{"staples": 0.15, "wires": 0.1},
    },
    ("HUMERUS", "humerus"): {"plate": 0.5, "nail": 0.25, "cerclage": 0.15, "screws": 0.1},
    ("FOREARM", "radius"): {"plate": 0.65, "nail": 0.2, "screws": 0.15},
    ("FOREARM", "ulna"): {"plate": 0.6, "nail": 0.2, "tension band": 0.2},
    ("ELBOW", "ulna"): {"tension band": 0.55, "plate": 0.35, "screws": 0.1},
    ("ELBOW", "radius"): {"screws": 0.7, "plate": 0.3},
}
LIMIT = {"plate": 6.0}  # mm from the bone; 3 elsewhere
HELD = 0.3  # severity of a fracture that is reduced and held, as a fraction of the finding's
PLACES = {"tension band": (0.04, 0.06), "anchors": (0.05, 0.09), "headless screw": (0.45, 0.55)}


def hardware(scene: Scene, severity: float, rng: np.random.Generator) -> str:
    """Fix a bone with a plate, nail, wires or screws; half of them hold a fracture.

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
    bone = pick(list(shown(scene)), rng)
    odds = ODDS_OF_PART.get((scene.part, bone)) or ODDS.get(bone, SMALL)
    kind = pick(list(odds), rng, list(odds.values()))
    breaks = [
        (row, stretch) for row, b, stretch in kinds(scene) if b == bone and row.moves in ("end", "hinge")
    ]
    low, high = shown(scene)[bone]
    site = locate(scene, bone, rng.uniform(*PLACES.get(kind, (max(low, 0.1), min(high, 0.9)))))
    broken = bool(breaks) and kind not in ("anchors", "staples", "tension band") and rng.random() < 0.5
    if broken:
        row, stretch = pick(breaks, rng)
        site = locate(scene, bone, rng.uniform(*stretch))
        break_bone(scene, site, row, HELD * severity, rng)
    cloud = scene.bones[bone]
    reach = np.inf if kind == "nail" else max(0.5 * site.length, 2 * site.width)
    near = np.flatnonzero(np.abs((cloud.points - site.centre) @ site.axis) < reach)
    near = near[:: max(1, len(near) // 20_000)]
    step = min(0.55 * min(c.pitch for c in scene.bones.values()), 0.12 * site.width)
    parts = IMPLANTS[kind](
        Seat(site, cloud.points[near].astype(float), cloud.depth[near], step, severity, rng)
    )
    if kind not in ("nail", "anchors", "headless screw"):  # those lie inside the bone
        parts = clip(parts, cloud.points[near], LIMIT.get(kind, 3.0))
    density, body = (
        np.exp(rng.uniform(np.log(9), np.log(22))),
        scene.body(bone),
    )  # titanium to steel, of cortical bone
    for points, volume in parts:
        scene.metal.append((body, points.astype(np.float32), (volume * density).astype(np.float32)))
        scene.tags.append((body, points[::4]))
    return f"{kind}:{bone}" + "+fracture" * broken
