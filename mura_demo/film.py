"""What happens to the X-rays behind the patient: exposure, grey levels, collimation, lettering.

Takes the thickness images of `projection.py` to a finished film.  Explained step by step in the appendix
`a_demo_radiographs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import distractors
from .anatomy import Scene
from .flesh import hides_chest, soft_tissue
from .projection import Projector, Settings, blur, finding_box, project, to_film

THIN, SMALLER = 8, 4  # the white point takes every 8th point, and a film a quarter as large
SEEN = 24  # grey levels: lettering that differs less from what lies under it cannot be read


@dataclass(frozen=True)
class Film:
    """A finished film: uint8 (H, W), or (H, W, 3) where `Settings.colour`, and what is known about it."""

    image: np.ndarray
    finding_box: tuple[int, int, int, int] | None  # x0, y0, x1, y1 in pixels, where it can be seen
    text_boxes: list[tuple]  # (text, x0, y0, x1, y1), the part that can be seen


def white_point(scene: Scene, settings: Settings, soft: np.ndarray) -> float:
    """Measure what the unaltered anatomy absorbs, so that no lesion and no implant sets the grey levels.

    Parameters
    ----------
    scene : Scene
    settings : Settings
    soft : ndarray (H, W) float32
        Soft tissue of the scene, mm. It is worked out anew where a finding has moved or veiled something.

    Returns
    -------
    float
        The 97th percentile of the absorption where there is bone.

    Notes
    -----
    Bone is projected coarsely: every 8th point, on a film a quarter as large.
    """
    healthy = Scene(scene.part, scene.patient, scene.side, scene.digit, scene.healthy)
    if scene.moved or scene.veils:
        soft = to_film(soft_tissue(healthy, Projector(healthy, settings)))
    small = replace(settings, shape=tuple(max(8, side // SMALLER) for side in settings.shape))
    projector = Projector(healthy, small)
    clouds = [
        (*projector(healthy.body(name), cloud.points[::THIN]), THIN * cloud.mass[::THIN])
        for name, cloud in scene.healthy.items()
        if name != "thorax" or not hides_chest(healthy, settings.view)
    ]
    bone = to_film(projector.splat(*(np.concatenate(column) for column in zip(*clouds, strict=True))))
    bone = blur(bone * np.float32(scene.patient.density[scene.side]), 0.7)
    soft = cv2.resize(soft, bone.shape[::-1], interpolation=cv2.INTER_AREA)
    absorbed = settings.exposure["bone"] * bone + settings.exposure["soft"] * soft
    dense = absorbed[bone > 0.5]
    return float(np.quantile(dense if dense.size else absorbed, 0.97))


def automatic_exposure(bare: np.ndarray, dressed: np.ndarray, settings: Settings) -> float:
    """Expose longer behind a cast or a big implant, so that the rest gets a little darker.

    Parameters
    ----------
    bare, dressed : ndarray (H, W) float32
        What is absorbed without and with metal and distractors.
    settings : Settings

    Returns
    -------
    float
        Factor of the exposure, 1 or more.
    """
    bare, dressed = bare[::4, ::4], dressed[::4, ::4]
    body = bare > 0.05
    if not body.any():
        return 1.0
    return float(
        (np.exp(-bare[body]).mean() / np.exp(-dressed[body]).mean()) ** settings.exposure["automatic"]
    )


def expose(absorbed: np.ndarray, settings: Settings, longer: float = 1.0) -> np.ndarray:
    """Expose the detector: Beer and Lambert's law, heel effect, scatter and photon noise.

    Parameters
    ----------
    absorbed : ndarray (H, W) float32
        Attenuation times thickness, summed over bone, metal and soft tissue.
    settings : Settings
    longer : float
        Factor of the exposure. More scatter comes with it, which flattens the film.

    Returns
    -------
    ndarray (H, W) float32
        The negative logarithm of the fraction of photons that arrives.
    """
    e, rng = settings.exposure, np.random.Generator(np.random.SFC64(settings.noise_seed))
    height, width = settings.shape
    beam = blur(np.exp(-absorbed), e["blur"])
    across, down = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    beam *= 1 + np.float32(e["heel_x"]) * across + np.float32(e["heel_y"]) * down[:, None]
    beam = (beam + np.float32(e["veil"] * longer**2)) * np.float32(longer * e["photons"])
    beam += np.sqrt(beam) * quantum_noise(settings.shape, e["grain"], rng)
    return -np.log(np.clip(beam, 1, None) / np.float32(e["photons"]))


def quantum_noise(shape: tuple[int, int], grain: float, rng: np.random.Generator) -> np.ndarray:
    """Make noise of unit variance that the detector smears over `grain` pixels: float32 (H, W)."""
    kernel = cv2.getGaussianKernel(5, grain).astype(np.float32)
    kernel /= np.sqrt((kernel**2).sum())
    noise = rng.standard_normal(shape, dtype=np.float32)
    return cv2.sepFilter2D(noise, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT)


def window(signal: np.ndarray, settings: Settings, dense: float) -> np.ndarray:
    """Map the signal to grey levels: white near the densest bone, edges enhanced, gamma.

    Parameters
    ----------
    signal : ndarray (H, W) float32
        What `expose` returns.
    settings : Settings
    dense : float
        What `white_point` returns.

    Returns
    -------
    ndarray (H, W) float32
        0 (black) to 1 (white).
    """
    e = settings.exposure
    white = dense * e["white"]
    black = -e["black"] * white
    grey = characteristic((signal - black) / (white - black), e["latitude"])
    grey += e["sharpen"] * (grey - blur(grey, e["sharpen_sigma"]))
    top = 1 if e["latitude"] == 0 else 0.985  # a film's densest grey is not its base
    return np.clip(grey, 0, top) ** np.float32(e["gamma"])


def characteristic(exposure: np.ndarray, latitude: float) -> np.ndarray:
    """Apply a film's characteristic curve: a soft toe, and a shoulder that never gets quite white.

    Parameters
    ----------
    exposure : ndarray (H, W) float32
        0 at black, 1 at the white point, more behind metal.
    latitude : float
        Where the shoulder begins is 1 - latitude; 0 clips hard, as screens do.

    Returns
    -------
    ndarray (H, W) float32
    """
    if latitude == 0:
        return np.clip(exposure, 0, 1.3)
    toe = np.maximum(exposure, 0) - np.float32(0.04) * (1 - np.exp(-np.maximum(exposure, 0) / 0.04))
    above = np.maximum(toe - np.float32(1 - latitude), 0)
    return np.minimum(toe, 1 - latitude) + above / (1 + above / np.float32(latitude))


def shutters(settings: Settings) -> tuple[np.ndarray, float]:
    """Draw the collimator's opening, a turned rectangle; some films hang askew in a black frame.

    Returns
    -------
    opening : ndarray (H, W) float32
        0 (shut) to 1 (open).
    dark : float
        The grey level outside, 0 to 1.
    """
    if not settings.collimated:
        return np.ones(settings.shape, np.float32), 0.0
    height, width = settings.shape
    rng = np.random.default_rng([settings.noise_seed, 2])
    y, x = np.indices(settings.shape, np.float32)
    askew = rng.random() < 0.12
    turn = np.deg2rad(rng.normal(0, 8 if askew else 3))
    x, y = x - width * (0.5 + rng.normal(0, 0.02)), y - height * (0.5 + rng.normal(0, 0.02))
    a = np.abs(x * np.cos(turn) + y * np.sin(turn)) - width * rng.uniform(0.42, 0.52)
    b = np.abs(y * np.cos(turn) - x * np.sin(turn)) - height * rng.uniform(0.42, 0.52)
    beyond = np.maximum(a, b) / (0.3 if askew else rng.uniform(0.4, 1.2))
    return (1 / (1 + np.exp(np.clip(beyond, -30, 30)))).astype(np.float32), rng.uniform(0, 0.06)


# ----------------------------------------------------------------------------------------------- lettering
class Writing(NamedTuple):
    """What a study's films say: wording and style are the study's, the place is each film's."""

    text: str
    size: float  # of the letters, as a fraction of the longest side
    grey: float  # 0 to 1
    lead: bool  # letters of lead in the beam; else burned into the stored image
    framed: bool
    where: str  # "corner", "bottom" or "top"


def writings(settings: Settings, side: str) -> list[Writing]:
    """Draw the wording and style of a study: side marker (lead or burned in), date and note.

    Parameters
    ----------
    settings : Settings
    side : str
        "L" or "R".

    Returns
    -------
    list of Writing
    """
    style = np.random.default_rng(settings.text_seed)
    u, found = style.uniform, []
    marked, dated, noted = style.random(3) < (0.85, 0.25, 0.15)
    lead, plain, framed = style.random(3) < (0.3, 0.7, 0.25)
    suffix = "" if plain else str(style.choice([f" {settings.view}", " JB", " 3", " KM"]))
    size, grey = u(0.055, 0.11), u(0.93, 1.0) if lead else u(0.67, 0.92)
    day, month, year = style.integers((1, 1, 2003), (28, 13, 2013))
    if marked:
        text = (side + suffix).replace(" ", "") if lead else side + suffix
        found.append(Writing(text, size, min(grey, 1), bool(lead), bool(framed and not lead), "corner"))
    if dated:
        found.append(Writing(f"{day:02d}/{month:02d}/{year}", 0.045, u(0.55, 0.9), False, False, "bottom"))
    if noted:
        note = str(style.choice(["PORTABLE", "UPRIGHT", "POST", "TABLE"]))
        found.append(Writing(note, 0.04, u(0.55, 0.9), False, False, "top"))
    return found


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def stencil(writing: Writing, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Cut the letters: float32 (h, w), 1 where they are. Letters of lead are fat, touch and lie askew."""
    size = max(9, int(writing.size * longest))
    font, fat = _font(size), max(1, size // 12) if writing.lead else 0
    x0, y0, x1, y1 = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), writing.text, font=font)
    pad = (size if writing.lead else 3) + fat
    sheet = Image.new("L", (int(x1 - x0) + 2 * pad, int(y1 - y0) + 2 * pad))
    draw, x = ImageDraw.Draw(sheet), pad - x0
    for letter in writing.text if writing.lead else [writing.text]:
        draw.text((x, pad - y0), letter, fill=255, font=font, stroke_width=fat)
        x += draw.textlength(letter, font=font) + fat
    if writing.framed:
        draw.rectangle((0, 0, sheet.width - 1, sheet.height - 1), outline=255)
    if writing.lead:
        if rng.random() < 0.08:  # it lay face down
            sheet = sheet.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        turn = rng.normal(0, 9) + (rng.choice([-90, 90]) if rng.random() < 0.1 else 0)
        sheet = sheet.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    if box := sheet.getbbox():
        sheet = sheet.crop(box)
    letters = np.pad(np.asarray(sheet, np.float32) / 255, 2)
    return blur(letters, rng.uniform(0.4, 0.8)) if writing.lead else letters


def place(writing: Writing, size: tuple[int, int], shape: tuple[int, int], rng: np.random.Generator) -> tuple:
    """Choose where letters of `size` (h, w) go on a film of `shape`: row and column of their upper corner.

    Most stand in a corner; some lie over the patient; some are cut by the film's edge.
    """
    u, (h, w), (height, width) = rng.uniform, size, shape
    left, top = u(0.04, 0.16) if rng.random() < 0.5 else u(0.72, 0.84), u(0.03, 0.14)
    if rng.random() < 0.3:
        top = u(0.78, 0.86)
    if rng.random() < 0.15:  # over the patient
        left, top = u(0.2, 0.7), u(0.15, 0.8)
    at = {
        "corner": (top * height, left * width),
        "bottom": (height - h, 2),
        "top": (2, u(0.3, 0.6) * width),
    }
    row, column = (
        np.clip(a, 0, max(0, b - c)) for a, b, c in zip(at[writing.where], shape, size, strict=True)
    )
    if rng.random() < (0.2 if writing.lead else 0.06):  # beyond the edge
        beyond = u(0.15, 0.5)
        if rng.random() < 0.5:
            row = -beyond * h if row < height / 2 else height - (1 - beyond) * h
        else:
            column = -beyond * w if column < width / 2 else width - (1 - beyond) * w
    return int(row), int(column)


def letter(
    plain: np.ndarray, opening: np.ndarray, settings: Settings, side: str
) -> tuple[np.ndarray, list[tuple]]:
    """Letter a film. What the edge, the shutters or white bone hide altogether is left out.

    Parameters
    ----------
    plain : ndarray (H, W) uint8
    opening : ndarray (H, W) float32
        Of the shutters, which cast no letters of lead.
    settings : Settings
    side : str
        "L" or "R".

    Returns
    -------
    image : ndarray (H, W) uint8
        It differs from `plain` within the boxes alone.
    boxes : list of (text, x0, y0, x1, y1)
        In pixels: of what can be seen.
    """
    image, boxes = plain.copy(), []
    rng = np.random.default_rng([settings.noise_seed, 1])
    height, width = settings.shape
    for writing in writings(settings, side):
        letters = stencil(writing, max(settings.shape), rng)
        row, column = place(writing, letters.shape, settings.shape, rng)
        rows, columns = (
            slice(max(0, a), min(b, a + c))
            for a, b, c in zip((row, column), (height, width), letters.shape, strict=True)
        )
        alpha = letters[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column]
        if writing.lead:
            alpha = alpha * opening[rows, columns]
        before = image[rows, columns]
        after = before + (alpha * (255 * writing.grey - before)).round().astype(np.int16)
        change = after - before
        if (np.abs(change) > SEEN).sum() < 0.3 * (letters > 0.5).sum():
            continue
        ys, xs = np.nonzero(change)
        x0, y0 = columns.start + int(xs.min()), rows.start + int(ys.min())
        x1, y1 = columns.start + int(xs.max()) + 1, rows.start + int(ys.max()) + 1
        image[rows, columns] = after
        boxes.append((writing.text, x0, y0, x1, y1))
    return image, boxes


def take(scene: Scene, settings: Settings, text: bool = True, steps: dict | None = None) -> Film:
    """Take one film of a scene.

    Parameters
    ----------
    scene : Scene
    settings : Settings
    text : bool
        False gives the same film without lettering, burned in or of lead.
    steps : dict, optional
        Receives the intermediate images, (H, W) each: "bone", "metal" and "soft" in mm, "signal", "grey"
        (0 to 1) and "plain" (uint8, before the lettering).

    Returns
    -------
    Film
    """
    projector, e = Projector(scene, settings), settings.exposure
    layers = project(scene, projector)
    dense = white_point(scene, settings, layers[2])
    bone, metal, soft = distractors.in_beam(*layers, scene, projector)
    bare = e["bone"] * layers[0] + e["soft"] * layers[2]
    absorbed = e["bone"] * (bone + metal) + e["soft"] * soft
    signal = expose(absorbed, settings, automatic_exposure(bare, absorbed, settings))
    grey = window(signal, settings, dense)
    opening, dark = shutters(settings)
    shut = grey * opening + (1 - opening) * np.float32(dark)
    plain = (distractors.on_film(shut, settings, scene.part) * 255).astype(np.uint8)
    if steps is not None:
        steps.update(bone=bone, metal=metal, soft=soft, signal=signal, grey=grey, plain=plain)
    image, boxes = letter(plain, opening, settings, scene.side) if text else (plain, [])
    if settings.colour:
        image = np.repeat(image[..., None], 3, axis=2)
    return Film(image, finding_box(scene, projector, opening), boxes)
