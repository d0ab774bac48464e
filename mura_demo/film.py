"""What happens to the X-rays behind the patient: exposure, grey levels, collimation, burned-in text.

Takes the thickness images of `projection.py` to a finished film.  Explained step by step in the appendix
`a_demo_radiographs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .anatomy import Scene
from .projection import Projector, Settings, blur, finding_box, project


@dataclass(frozen=True)
class Film:
    """A finished film: uint8 (H, W), or (H, W, 3) where `Settings.colour`, and what is known about it."""

    image: np.ndarray
    finding_box: tuple[int, int, int, int] | None  # x0, y0, x1, y1 in pixels, where it can be seen
    text_boxes: list[tuple]  # (text, x0, y0, x1, y1)


def expose(bone: np.ndarray, metal: np.ndarray, soft: np.ndarray, settings: Settings) -> np.ndarray:
    """Expose the detector: Beer and Lambert's law, heel effect, scatter and photon noise.

    Parameters
    ----------
    bone, metal, soft : ndarray (H, W) float32
        Thickness in mm.
    settings : Settings

    Returns
    -------
    ndarray (H, W) float32
        The negative logarithm of the fraction of photons that arrives.
    """
    e, rng = settings.exposure, np.random.Generator(np.random.SFC64(settings.noise_seed))
    height, width = settings.shape
    beam = np.exp(-(e["bone"] * (bone + metal) + e["soft"] * soft))
    beam = blur(beam, e["blur"])
    across, down = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    beam *= 1 + np.float32(e["heel_x"]) * across + np.float32(e["heel_y"]) * down[:, None]
    beam = (beam + np.float32(e["veil"])) * np.float32(e["photons"])
    beam += np.sqrt(beam) * rng.standard_normal(beam.shape, dtype=np.float32)
    return -np.log(np.clip(beam, 1, None) / np.float32(e["photons"]))


def window(signal: np.ndarray, bone: np.ndarray, soft: np.ndarray, settings: Settings) -> np.ndarray:
    """Map the signal to grey levels: white a little above dense bone, edges enhanced, gamma.

    Parameters
    ----------
    signal : ndarray (H, W) float32
        What `expose` returns.
    bone, soft : ndarray (H, W) float32
        Thickness in mm. They set the white point; metal never does, so implants leave the rest alone.
    settings : Settings

    Returns
    -------
    ndarray (H, W) float32
        0 (black) to 1 (white).
    """
    e = settings.exposure
    at_bone = bone[::2, ::2] > 0.5
    absorbed = e["bone"] * bone[::2, ::2] + e["soft"] * soft[::2, ::2]
    white = np.quantile(absorbed[at_bone] if at_bone.any() else absorbed, 0.97) * e["white"]
    black = -e["black"] * white
    grey = np.clip((signal - black) / (white - black), 0, 1.3)
    grey += e["sharpen"] * (grey - blur(grey, e["sharpen_sigma"]))
    return np.clip(grey, 0, 1) ** np.float32(e["gamma"])


def shutters(settings: Settings) -> tuple[np.ndarray, float]:
    """Draw the collimator's opening, a turned rectangle.

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
    turn = np.deg2rad(rng.normal(0, 3))
    x, y = x - width * (0.5 + rng.normal(0, 0.02)), y - height * (0.5 + rng.normal(0, 0.02))
    a = np.abs(x * np.cos(turn) + y * np.sin(turn)) - width * rng.uniform(0.42, 0.52)
    b = np.abs(y * np.cos(turn) - x * np.sin(turn)) - height * rng.uniform(0.42, 0.52)
    beyond = np.maximum(a, b) / rng.uniform(0.4, 1.2)
    return (1 / (1 + np.exp(np.clip(beyond, -30, 30)))).astype(np.float32), rng.uniform(0, 0.06)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def burn_in(image: Image.Image, settings: Settings, side: str, rng: np.random.Generator) -> list[tuple]:
    """Draw side marker, date and notes into a film.

    Parameters
    ----------
    image : PIL.Image.Image
        Grey; it is drawn into.
    settings : Settings
    side : str
        "L" or "R".
    rng : numpy.random.Generator
        Places; wording and style are the study's.

    Returns
    -------
    list of (text, x0, y0, x1, y1)
        In pixels.
    """
    draw, boxes, u = ImageDraw.Draw(image), [], rng.uniform
    width, height = image.size
    longest = max(image.size)

    def put(text: str, size: float, x: float, y: float, grey: float, framed: bool = False) -> None:
        font = _font(max(9, int(size * longest)))
        right, bottom = draw.textbbox((0, 0), text, font=font)[2:]
        corner = (
            int(np.clip(x, 4, max(4, width - right - 5))),
            int(np.clip(y, 4, max(4, height - bottom - 5))),
        )
        box = draw.textbbox(corner, text, font=font)
        if framed:
            box = (box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3)
            draw.rectangle(box, outline=int(grey))
        draw.text(corner, text, fill=int(grey), font=font)
        boxes.append((text, *(int(b) for b in box)))

    # Wording and style are the study's, places the film's: no draw of the one moves the other.
    style = np.random.default_rng(settings.text_seed)
    v = style.uniform
    marked, dated, noted = style.random(3) < (0.85, 0.25, 0.15)
    suffix = "" if style.random() < 0.7 else str(style.choice([f" {settings.view}", " JB", " 3", " KM"]))
    if marked:
        left = u(0.04, 0.16) if rng.random() < 0.5 else u(0.72, 0.84)
        top = u(0.03, 0.14) if rng.random() < 0.7 else u(0.78, 0.86)
        framed = bool(style.random() < 0.25)
        put(side + suffix, v(0.055, 0.11), left * width, top * height, v(170, 235), framed)
    if dated:
        date = f"{style.integers(1, 28):02d}/{style.integers(1, 13):02d}/{style.integers(2003, 2013)}"
        put(date, 0.045, 4, height - 16, v(140, 230))
    if noted:
        note = str(style.choice(["PORTABLE", "UPRIGHT", "POST", "TABLE"]))
        put(note, 0.04, u(0.3, 0.6) * width, 3, v(140, 230))
    return boxes


def take(scene: Scene, settings: Settings, text: bool = True, steps: dict | None = None) -> Film:
    """Take one film of a scene.

    Parameters
    ----------
    scene : Scene
    settings : Settings
    text : bool
        False gives the same film without burned-in text.
    steps : dict, optional
        Receives the intermediate images, (H, W) each: "bone", "metal" and "soft" in mm, "signal", "grey"
        (0 to 1) and "plain" (uint8, before the text).

    Returns
    -------
    Film
    """
    projector = Projector(scene, settings)
    rng = np.random.default_rng([settings.noise_seed, 1])
    bone, metal, soft = project(scene, projector)
    signal = expose(bone, metal, soft, settings)
    grey = window(signal, bone, soft, settings)
    opening, dark = shutters(settings)
    plain = ((grey * opening + (1 - opening) * np.float32(dark)) * 255).astype(np.uint8)
    if steps is not None:
        steps.update(bone=bone, metal=metal, soft=soft, signal=signal, grey=grey, plain=plain)
    image = Image.fromarray(plain.copy())
    boxes = burn_in(image, settings, scene.side, rng) if text else []
    pixels = np.asarray(image)
    if settings.colour:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return Film(pixels, finding_box(scene, projector, opening), boxes)
