"""What lies on a film beside the patient: rings, pins, electrodes, casts, rulers, dust, a masked name.

None of it says anything about the label: what a study wears comes from a stream of its own, what lies on a
film from the film's settings, each with a fixed probability per body part.  Nothing here is tagged as a
finding.  Explained in the appendix `a_demo_radiographs`.  Lengths in mm, masses in mm^3 of cortical bone.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw

from .anatomy import Scene
from .bones import METACARPALS, PROXIMAL
from .projection import MARGIN, SUPERSAMPLE, Projector, Settings, to_film

STEP = 0.4  # mm between the points of a worn object
GOLD, STEEL, FOIL = 16.0, 9.0, 3.0  # how much they stop, as multiples of cortical bone
LEAD = 40.0  # mm of cortical bone: nothing gets through

HANDS, LONG, CHEST = ("FINGER", "HAND", "WRIST"), ("FOREARM", "ELBOW", "HUMERUS"), ("HUMERUS", "SHOULDER")


def _odds(default: float, **parts: float) -> dict[str, float]:
    every = (*HANDS, *LONG, "SHOULDER")
    return dict.fromkeys(every, default) | parts


# Probability that a study (WORN, CAST) or a film (the others) shows it, by body part.
WORN_ODDS = {
    "ring": _odds(0, HAND=0.08, FINGER=0.07, WRIST=0.03, FOREARM=0.03),
    "bracelet": _odds(0, WRIST=0.04, FOREARM=0.05, HAND=0.03),
    "watch": _odds(0, WRIST=0.02, FOREARM=0.04, HAND=0.02),
    "pin": _odds(0.03),
    "snaps": _odds(0, SHOULDER=0.06, HUMERUS=0.04, ELBOW=0.02),
    "electrode": _odds(0, SHOULDER=0.08, HUMERUS=0.06),
}
CAST_ODDS = _odds(0.04, SHOULDER=0.0, HUMERUS=0.0, FINGER=0.02, WRIST=0.05)
BEAM_ODDS = {
    "ruler": _odds(0.02),
    "marker": _odds(0.02),
    "other_hand": _odds(0, HAND=0.03, FINGER=0.03, WRIST=0.02),
}
FILM_ODDS = {
    "seam": _odds(0, FOREARM=0.06, HUMERUS=0.06),
    "grid_lines": _odds(0.03),
    "dust": _odds(0.05),
    "scratches": _odds(0.02),
    "masked_name": _odds(0.05),
}


# ------------------------------------------------------------------------------------- worn by the patient
def wear(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Put on what the patient wears. It goes into the scene's metal, without a tag.

    Parameters
    ----------
    scene : Scene
        Its bones before the finding say where things sit.
    rng : numpy.random.Generator
        Of the study and for this purpose alone.

    Returns
    -------
    list of str
        The kinds, keys of `WORN_ODDS`.
    """
    worn = []
    for kind, odds in WORN_ODDS.items():
        drawn, own = rng.random(), np.random.default_rng(rng.integers(2**63))  # one kind never moves another
        if drawn < odds[scene.part]:
            WORN[kind](scene, own)
            worn.append(kind)
    return worn


def _add(scene: Scene, bone: str, points: np.ndarray, mass: np.ndarray) -> None:
    scene.metal.append((scene.body(bone), points.astype(np.float32), mass.astype(np.float32)))


def _site(scene: Scene, bone: str, at: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre (3,) of a long bone and its direction (3,) at a fraction of its length from the lower end."""
    points = scene.healthy[bone].points[::4]
    level = np.quantile(points[:, 1], at)
    slab = points[np.abs(points[:, 1] - level) < 4]
    axis = np.linalg.eigh(np.cov((points - points.mean(0)).T))[1][:, -1]
    return slab.mean(0), axis * np.sign(axis[1])


def _frame(axis: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frame (3, 3) whose second column is `axis`, turned about it at random."""
    x = np.cross(axis, rng.standard_normal(3))
    x /= np.linalg.norm(x)
    return np.stack([x, axis, np.cross(x, axis)], axis=1)


def _hoop(
    radius: float, wide: float, thick: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) and volumes (N,) of a flat band around the y axis."""
    counts = [max(2, int(np.ceil(n / STEP))) for n in (2 * np.pi * radius, wide, 2 * thick)]
    grid = np.indices(counts).reshape(3, -1).T
    angle, y, out = ((grid + rng.random(grid.shape)) / counts).T
    angle, r = 2 * np.pi * angle, radius + thick * (out - 0.5)
    points = np.stack([r * np.cos(angle), wide * (y - 0.5), r * np.sin(angle)], axis=1)
    return points, np.full(len(points), 2 * np.pi * radius * wide * thick / np.prod(counts))


def _wire(line: np.ndarray, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) and volumes (N,) of a wire along a polyline (M, 3)."""
    lengths = np.linalg.norm(np.diff(line, axis=0), axis=1)
    along = np.concatenate([[0], np.cumsum(lengths)])
    count = max(8, int(along[-1] * max(1, 2 * radius / STEP) ** 2 / STEP))
    where = (np.arange(count) + rng.random(count)) * along[-1] / count
    points = np.stack([np.interp(where, along, line[:, k]) for k in range(3)], axis=1)
    away = rng.standard_normal((count, 3))
    away *= radius * np.cbrt(rng.random((count, 1))) / np.linalg.norm(away, axis=1, keepdims=True)
    return points + away, np.full(count, np.pi * radius**2 * along[-1] / count)


def _ring(scene: Scene, rng: np.random.Generator) -> None:
    finger = str(rng.choice(["2proxph", "3proxph", "4proxph"], p=[0.2, 0.3, 0.5]))
    centre, axis = _site(scene, finger, rng.uniform(0.25, 0.5))
    frame = _frame(axis + 0.12 * rng.standard_normal(3), rng)
    points, volume = _hoop(rng.uniform(9, 11), rng.uniform(1.8, 6), rng.uniform(0.9, 1.6), rng)
    _add(scene, finger, points @ frame.T + centre, volume * GOLD * rng.uniform(0.5, 1))
    if rng.random() < 0.3:  # a stone in its setting
        points, volume = _hoop(rng.uniform(1.2, 2.5), 2.0, 1.2, rng)
        _add(scene, finger, points @ frame.T + centre + frame[:, 0] * 12, volume * STEEL)


def _at_wrist(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centre, axis = _site(scene, "radius", rng.uniform(0.1, 0.25))
    return centre + [-2.0, 0, -9.0], _frame(axis + 0.15 * rng.standard_normal(3), rng)


def _bracelet(scene: Scene, rng: np.random.Generator) -> None:
    centre, frame = _at_wrist(scene, rng)
    points, volume = _hoop(rng.uniform(29, 34), rng.uniform(2, 7), rng.uniform(0.8, 1.8), rng)
    if rng.random() < 0.5:  # a chain
        links = rng.integers(24, 50)
        volume *= 1 + 0.9 * np.cos(links * np.arctan2(points[:, 2], points[:, 0]))
    points *= [1.0, 1.0, 0.8]
    _add(scene, "radius", points @ frame.T + centre, volume * rng.uniform(4, GOLD))


def _watch(scene: Scene, rng: np.random.Generator) -> None:
    centre, frame = _at_wrist(scene, rng)
    points, volume = _hoop(31, 16, 1.6, rng)
    _add(scene, "radius", points @ frame.T + centre, volume * rng.choice([0.15, 3.0]))  # leather or steel
    for radius, wide in ((rng.uniform(8, 9), 15.0), (5.0, 2.0), (2.0, 2.0)):  # case and works
        points, volume = _hoop(radius, wide / 3, 4.0, rng)
        _add(scene, "radius", points[:, [1, 0, 2]] @ frame.T + centre + frame[:, 0] * 32, volume * 4)


def _beside(scene: Scene, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Choose a place some way off a bone that the film shows."""
    at_hand = [*METACARPALS[1:], *PROXIMAL[1:]]
    bones = {"SHOULDER": ["scapula", "clavicle"], "HUMERUS": ["humerus"], "ELBOW": ["radius", "humerus"]}
    bone = str(rng.choice(bones.get(scene.part, at_hand if scene.part in HANDS else ["radius", "ulna"])))
    points = scene.healthy[bone].points
    angle = rng.uniform(0, 2 * np.pi)
    away = rng.uniform(8, 16) if scene.part in HANDS else rng.uniform(20, 40)
    return bone, points[rng.integers(len(points))] + away * np.array([np.cos(angle), 0, np.sin(angle)])


def _pin(scene: Scene, rng: np.random.Generator) -> None:
    bone, centre = _beside(scene, rng)
    long, gap = rng.uniform(26, 42), rng.uniform(4, 6)
    turn = np.linspace(0, 1.5 * np.pi, 12)
    coil = np.stack([-long / 2 - 2 * np.sin(turn), gap / 2 - 1 - 2 * np.cos(turn) + 1, 0 * turn], axis=1)
    line = np.array([[long / 2, gap / 2, 0], *coil, [-long / 2, -gap / 2, 0], [long / 2, -gap / 2, 0]])
    clasp = np.array([[long / 2, -gap / 2, 0], [long / 2, gap / 2, 0]])
    frame = _frame(rng.standard_normal(3) / 1.7, rng)
    frame, _ = np.linalg.qr(frame)
    for part, radius in ((line, rng.uniform(0.4, 0.6)), (clasp, 1.8)):
        points, volume = _wire(part, radius, rng)
        _add(scene, bone, points @ frame.T + centre, volume * STEEL)


def _snaps(scene: Scene, rng: np.random.Generator) -> None:
    bone, first = _beside(scene, rng)
    step = np.array([0, -rng.uniform(35, 60), rng.normal(0, 12)])
    for k in range(rng.integers(1, 4)):
        for radius in (rng.uniform(3.6, 4.0), 2.0):
            points, volume = _hoop(radius, 1.0, 2.4, rng)
            _add(scene, bone, points[:, [1, 0, 2]] + first + k * step, volume * STEEL * 0.7)


def _electrode(scene: Scene, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 3)):
        bone, centre = _beside(scene, rng)
        points, volume = _hoop(2.2, 1.5, 3.6, rng)
        _add(scene, bone, points[:, [1, 0, 2]] + centre, volume * FOIL * 1.5)
        points, volume = _hoop(5, 0.6, 8, rng)
        _add(scene, bone, points[:, [1, 0, 2]] + centre, volume * 0.4)
        t = np.linspace(0, 1, 60)[:, None]
        course = np.array([0, -1.0, 0]) + 0.8 * rng.standard_normal(3)
        sway = np.sin(t * rng.uniform(3, 8) + rng.uniform(0, 6)) * rng.standard_normal(3) * 18
        line = centre + 280 * t * course / np.linalg.norm(course) + sway - sway[0]
        points, volume = _wire(line, 0.9, rng)
        _add(scene, bone, points, volume * FOIL)


WORN = {
    "ring": _ring,
    "bracelet": _bracelet,
    "watch": _watch,
    "pin": _pin,
    "snaps": _snaps,
    "electrode": _electrode,
}


# --------------------------------------------------------------------------------------------- in the beam
def in_beam(
    bone: np.ndarray, metal: np.ndarray, soft: np.ndarray, scene: Scene, projector: Projector
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay things between patient and film: a cast (the same in all films of a study), ruler, other fingers.

    Parameters
    ----------
    bone, metal, soft : ndarray (H, W) float32
        Thickness in mm.
    scene : Scene
    projector : Projector

    Returns
    -------
    bone, metal, soft : ndarray (H, W) float32
    """
    settings, layers = projector.settings, {"bone": bone, "metal": metal, "soft": soft}
    visit = np.random.default_rng([settings.text_seed, 5])
    if visit.random() < CAST_ODDS[scene.part]:
        layers["soft"] = soft + cast(soft, scene, projector, visit)
    rng = np.random.default_rng([settings.noise_seed, 5])
    for kind, odds in BEAM_ODDS.items():
        drawn, own = rng.random(), np.random.default_rng(rng.integers(2**63))
        if drawn < odds[scene.part]:
            for name, layer in IN_BEAM[kind](scene, projector, own).items():
                layers[name] = layers[name] + layer
    return layers["bone"], layers["metal"], layers["soft"]


def cast(soft: np.ndarray, scene: Scene, projector: Projector, rng: np.random.Generator) -> np.ndarray:
    """Wrap a limb in plaster: a shell around the soft tissue, woven, with a fuzzy edge across the limb.

    Parameters
    ----------
    soft : ndarray (H, W) float32
        Thickness of the soft tissue, mm.
    scene : Scene
    projector : Projector
    rng : numpy.random.Generator
        Of the study.

    Returns
    -------
    ndarray (H, W) float32
        In mm of soft tissue.
    """
    thick, padding, density = rng.uniform(3, 5.5), rng.uniform(2, 5), rng.uniform(1.0, 1.9)
    mm = projector.settings.field_mm / max(soft.shape)
    outside = cv2.distanceTransform((soft < 1).astype(np.uint8), cv2.DIST_L2, 5) * mm
    inside = cv2.distanceTransform((soft >= 1).astype(np.uint8), cv2.DIST_L2, 5) * mm
    depth = np.clip(inside - outside + padding + thick, 0, None)  # below the outer face of the shell
    radius = max(8.0, float(np.quantile(depth, 0.98)))

    def chord(d: np.ndarray, r: float) -> np.ndarray:
        """Length of the ray through a round limb of radius `r`, `d` below its edge."""
        return 2 * np.sqrt(np.clip(r**2 - np.clip(r - np.clip(d, 0, r), 0, None) ** 2, 0, None))

    shell = np.minimum(chord(depth, radius) - chord(depth - thick, radius - thick), 5 * thick)
    shell *= _weave(soft.shape, mm, rng)
    for bone, level, sign in _ends_of_cast(scene, rng):
        shell *= _edge_of_cast(bone, level, sign, scene, projector, rng)
    return shell * np.float32(density)


def _waves(count: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Make smooth noise of about unit variance, with `count` waves along each side."""
    coarse = rng.standard_normal((count, count), np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _weave(shape: tuple[int, ...], mm: float, rng: np.random.Generator) -> np.ndarray:
    """Weave a bandage of warp and weft, none quite straight, and of uneven thickness: about 1."""
    y, x = np.indices(shape, np.float32)
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(1.2, 2.2) / mm
    woven = 1 + 0.08 * _waves(9, shape, rng)
    for angle in (turn, turn + np.pi / 2):
        along = (x * np.cos(angle) + y * np.sin(angle)) / pitch + 0.6 * _waves(14, shape, rng)
        woven *= 1 + 0.03 * np.sin(2 * np.pi * along)
    return woven


def _edge_of_cast(
    bone: str, level: float, sign: int, scene: Scene, projector: Projector, rng: np.random.Generator
) -> np.ndarray:
    """Cut a cast off across a limb: 0 beyond the level, 1 within, with a frayed, bowed edge between."""
    shape = projector.settings.shape
    at, on = (
        np.stack(projector(scene.body(bone), np.array([[0, level + d, 0]], np.float32)))[:, 0]
        for d in (0.0, 20.0)
    )
    edge, along = (at - MARGIN) / SUPERSAMPLE, (on - at) / SUPERSAMPLE
    scale, mm = np.linalg.norm(along), projector.settings.field_mm / max(shape)
    frayed = 1.6 * _waves(40, shape, rng) + 3 * _waves(9, shape, rng)
    if scale * mm < 6:  # the limb points at the film
        return np.ones(shape, np.float32)
    y, x = np.indices(shape, np.float32) - edge[::-1, None, None]
    beyond = sign * (x * along[0] + y * along[1]) / scale * mm
    bow = ((x * along[1] - y * along[0]) / scale * mm / 45) ** 2 * rng.normal(
        0, 8
    )  # a round edge, seen askew
    return 1 / (1 + np.exp(np.clip((beyond + bow + frayed) / 1.6, -30, 30)))


def _ends_of_cast(scene: Scene, rng: np.random.Generator) -> list[tuple[str, float, int]]:
    """Where a cast ends: bone, level along its local y (mm), 1 if the cast lies below the level."""
    u = rng.uniform
    levels = {
        "ELBOW": [("radius", u(-150, -90), -1)],
        "FOREARM": [("radius", u(-90, -20), 1)],
        "WRIST": [("radius", u(-215, -190), 1)] if rng.random() < 0.3 else [],
        "HAND": [("3mc", u(-15, 20), -1)],
        "FINGER": [(f"{scene.digit}proxph" if scene.digit > 1 else "thumbprox", u(-12, 8), -1)],
    }
    return [end for end in levels[scene.part] if end[0] in scene.bones]


def _pixel(point: np.ndarray) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def _ruler(scene: Scene, projector: Projector, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a ruler with ticks of lead along an edge, a centimetre each, halves shorter."""
    shape = projector.settings.shape
    mm = projector.settings.field_mm / max(shape)
    sheet = Image.new("L", (shape[1], shape[0]))
    draw = ImageDraw.Draw(sheet)
    across, first = rng.uniform(2, 10) / mm, rng.uniform(0, 10) / mm
    side = rng.random() < 0.5
    for k in range(int(shape[0] * mm / 5) + 1):
        y, long = first + k * 5 / mm, (7 if k % 10 == 0 else 5 if k % 2 == 0 else 3) / mm
        x = across if side else shape[1] - across
        draw.line((x, y, x + (long if side else -long), y), fill=255, width=max(1, round(0.7 / mm)))
    ticks = np.asarray(sheet, np.float32) / 255
    turn = cv2.getRotationMatrix2D((shape[1] / 2, shape[0] / 2), rng.normal(0, 3), 1)
    ticks = cv2.warpAffine(ticks, turn, shape[::-1])
    return {"metal": ticks * np.float32(rng.uniform(0.2, 1) * LEAD)}


def _marker(scene: Scene, projector: Projector, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Put a ball or an arrow of lead on the skin, where it hurts."""
    height, width = shape = projector.settings.shape
    mm = projector.settings.field_mm / max(shape)
    x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.1, 0.9) * height
    r = rng.uniform(1.0, 2.2) / mm
    fine = np.zeros((4 * height, 4 * width), np.uint8)
    if rng.random() < 0.5:
        cv2.circle(fine, (int(4 * x), int(4 * y)), int(4 * r), 255, -1)
    else:
        a = rng.uniform(0, 2 * np.pi)
        tip = np.array([np.cos(a), np.sin(a)]) * rng.uniform(0.05, 0.09) * max(shape)
        start, end = np.array([4 * x, 4 * y]), np.array([4 * x, 4 * y]) + 4 * tip
        cv2.arrowedLine(fine, _pixel(start), _pixel(end), 255, 6, tipLength=0.4)
    drawn = cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return {"metal": drawn * np.float32(rng.uniform(15, LEAD))}


def _other_hand(scene: Scene, projector: Projector, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Let a finger of somebody else reach into the film from an edge."""
    number = int(rng.integers(2, 6))
    names = [f"{number}proxph", f"{number}midph", f"{number}distph"]
    names = [n for n in names if n in scene.healthy]
    placed = [
        (*projector(scene.body(n), scene.healthy[n].points[::2]), 2 * scene.healthy[n].mass[::2])
        for n in names
    ]
    x, y, mass = (np.concatenate(column) for column in zip(*placed, strict=True))
    points = np.stack([x, y], axis=1)
    axis = np.linalg.eigh(np.cov((points - points.mean(0))[::50].T))[1][:, -1]
    low = points[-len(placed[-1][0]) :].mean(0) if len(placed) > 1 else points[np.argmin(y)]
    axis = axis * np.sign((low - points.mean(0)) @ axis or 1)  # towards the finger's tip
    height, width = projector.size
    edge = rng.integers(4)
    inward = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])[edge] + rng.normal(0, 0.35, 2)
    inward /= np.linalg.norm(inward)
    turn = np.array([[inward[0], -inward[1]], [inward[1], inward[0]]]) @ np.array(
        [[axis[0], axis[1]], [-axis[1], axis[0]]]
    )
    points = (points - points.mean(0)) @ turn.T.astype(np.float32)
    along = rng.uniform(0.15, 0.85)
    start = np.array([(0, along), (1, along), (along, 0), (along, 1)][edge]) * (width, height)
    reach = rng.uniform(12, 30) * projector.scale
    start = start + inward * (MARGIN + reach - (points @ inward).max())
    x, y = (points + start).T
    bone = projector.splat(x, y, mass)
    mm = 4 / projector.scale
    small = cv2.resize(bone, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    away = cv2.distanceTransform((small < 0.3).astype(np.uint8), cv2.DIST_L2, 5) * mm
    flesh = cv2.GaussianBlur(np.sqrt(np.clip(1 - (away / 6) ** 2, 0, None)) * 15, (0, 0), 1.5)
    flesh = cv2.resize(flesh, projector.size[::-1], interpolation=cv2.INTER_LINEAR)
    grain = 0.6 * scene.healthy[names[0]].pitch * projector.scale
    return {
        "bone": to_film(cv2.GaussianBlur(bone, (0, 0), max(0.5, grain))),
        "soft": to_film(flesh),
    }


IN_BEAM = {"ruler": _ruler, "marker": _marker, "other_hand": _other_hand}


# ----------------------------------------------------------------------------------------- on the film
def on_film(grey: np.ndarray, settings: Settings, part: str) -> np.ndarray:
    """Leave traces of handling on a film: seam of two plates, grid lines, dust, scratches, a masked name.

    Parameters
    ----------
    grey : ndarray (H, W) float32
        0 (black) to 1 (white).
    settings : Settings
    part : str
        A key of `anatomy.PARTS`.

    Returns
    -------
    ndarray (H, W) float32
    """
    rng = np.random.default_rng([settings.noise_seed, 6])
    for kind, odds in FILM_ODDS.items():
        drawn, own = rng.random(), np.random.default_rng(rng.integers(2**63))
        if drawn < odds[part]:
            grey = ON_FILM[kind](grey, own)
    return np.clip(grey, 0, 1)


def _seam(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Join two plates: the one is a little brighter, and a line stays between them."""
    grey, cut = grey.copy(), int(rng.uniform(0.3, 0.7) * max(grey.shape))
    lower = grey[cut:] if grey.shape[0] >= grey.shape[1] else grey[:, cut:]
    lower *= rng.uniform(0.88, 1.12)
    line = lower[:2] if grey.shape[0] >= grey.shape[1] else lower[:, :2]
    line[:] = 0.5 * line + 0.5 * rng.choice([0.0, 0.8])
    return grey


def _grid_lines(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Show the lines of a grid against scatter that did not move."""
    n = grey.shape[1] if rng.random() < 0.7 else grey.shape[0]
    wave = 1 + rng.uniform(0.01, 0.03) * np.sin(
        2 * np.pi * np.arange(n, dtype=np.float32) / rng.uniform(2.3, 6)
    )
    return grey * (wave if n == grey.shape[1] else wave[:, None]).astype(np.float32)


def _dust(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scatter bright specks and a hair or two."""
    fine = np.zeros(grey.shape, np.uint8)
    size = (grey.shape[1], grey.shape[0])
    for _ in range(rng.integers(3, 25)):
        x, y = (rng.random(2) * size).astype(int)
        cv2.circle(fine, (int(x), int(y)), int(rng.random() < 0.15), int(rng.uniform(60, 255)), -1)
    for _ in range(rng.integers(0, 3)):
        t = np.linspace(0, 1, 12)[:, None]
        bow = np.sin(t * rng.uniform(1, 4)) * rng.normal(0, 8, 2)
        hair = rng.random(2) * size + t * rng.normal(0, 0.06 * max(size), 2) + bow
        cv2.polylines(fine, [hair.astype(np.int32)], False, int(rng.uniform(40, 120)), 1, cv2.LINE_AA)
    return np.maximum(grey, cv2.GaussianBlur(fine, (0, 0), 0.5).astype(np.float32) / 255)


def _scratches(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scratch the film with thin straight lines, bright or dark."""
    fine = np.zeros(grey.shape, np.uint8)
    size = (grey.shape[1], grey.shape[0])
    for _ in range(rng.integers(1, 5)):
        start = rng.random(2) * size
        end = start + rng.normal(0, 0.13 * max(size), 2)
        cv2.line(fine, _pixel(start), _pixel(end), int(rng.uniform(60, 200)), 1, cv2.LINE_AA)
    return grey + rng.choice([-0.25, 0.4, 0.7]) * fine.astype(np.float32) / 255


def _masked_name(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hide the patient's name under a black box, close to the upper or lower edge."""
    grey, (height, width) = grey.copy(), grey.shape
    tall, wide = int(rng.uniform(0.04, 0.08) * height), int(rng.uniform(0.18, 0.42) * width)
    x = int(rng.choice([0.0, 0.01, 0.99]) * (width - wide))
    y = int(rng.choice([0.0, 0.01, 0.99]) * (height - tall))
    grey[y : y + tall, x : x + wide] = 0
    return grey


ON_FILM = {
    "seam": _seam,
    "grid_lines": _grid_lines,
    "dust": _dust,
    "scratches": _scratches,
    "masked_name": _masked_name,
}
