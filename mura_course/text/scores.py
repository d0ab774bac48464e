"""Room text: how well text was removed, measured where the truth is known: on the demo data. Chapter 2.

Renders the chosen films anew with what is known about them. A *text pixel* is one that differs between a film
and its text-free twin; a *bone pixel* one whose ray crosses more than `BONE` mm of bone inside the collimated
field, and is no text pixel. Writes nothing but the renderer's bones, in the cache folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

import mura_demo
from mura_demo import film as films
from mura_demo import studies

from ..errors import DataError
from ..paths import cache_dir
from .boxes import Found

BONE = 0.5  # mm
KINDS = ("side letter", "side letter and more", "date", "word")


@dataclass(frozen=True, eq=False)
class KnownFilm:
    """A demo film and its truth.

    Attributes
    ----------
    path, patient : str, int
        As in the index; intervals are over patients.
    image, twin : ndarray
        uint8 (H, W): the film, and the same without text.
    bone : ndarray
        bool (H, W).
    texts : list of tuple
        (text, x0, y0, x1, y1) of what is burned in, in pixels.
    """

    path: str
    patient: int
    image: np.ndarray
    twin: np.ndarray
    bone: np.ndarray
    texts: list[tuple]

    @property
    def text(self) -> np.ndarray:
        """Where film and twin differ, bool (H, W)."""
        return self.image != self.twin


def known_films(root: str | Path, paths: list[str]) -> Iterator[KnownFilm]:
    """Render demo films anew with their truth, study by study, about 25 a second.

    Parameters
    ----------
    root : path
        A demo data folder, or a cleaned copy of one.
    paths : list of str
        Films, as the index names them.

    Raises
    ------
    DataError
        The folder holds no demo data of this version of the renderer.
    """
    try:
        made = mura_demo.read_manifest(Path(root))
    except ValueError as error:
        raise DataError(str(error)) from error
    planned = {study.folder: study for study in studies.plan(made["studies"], made["seed"])}
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
        study, bones = planned[folder], cache_dir() / "bones"
        scene, settings, _ = studies.set_up(study, made["seed"], made["long_side"], bones)
        for i, setting in enumerate(settings, start=1):
            if (path := f"{folder}/image{i}.png") in paths:
                film = films.take(scene, setting, steps=(steps := {}))
                image = film.image if film.image.ndim == 2 else film.image[..., 0]
                bone = (films.shutters(setting)[0] > 0.5) & (steps["bone"] > BONE)
                yield KnownFilm(path, study.patient, image, steps["plain"], bone, film.text_boxes)


def kind(text: str) -> str:
    """Tell which of `KINDS` a burned-in text is."""
    if "/" in text:
        return "date"
    side = text[:1] in ("L", "R") and text[1:2] in ("", " ")
    return ("side letter" if len(text) == 1 else "side letter and more") if side else "word"


def score(film: KnownFilm, found: Found, clean: np.ndarray) -> dict[str, float | str]:
    """Count for one film what `summary` adds up.

    Parameters
    ----------
    film : KnownFilm
        From `known_films`.
    found, clean : Found, ndarray
        What a detector found, and the film without it, uint8 (H, W).

    Returns
    -------
    dict
        patient, path, and counts of pixels and marks. A mark is found where more than half of its text pixels
        are repainted. Of films with text, before and after: squared error and `ssim` to the twin.
    """
    text, bone, mask = film.text, film.bone & ~film.text, found.mask
    counts = {"text": text.sum(), "text removed": (text & mask).sum()}
    counts |= {"bone": bone.sum(), "bone touched": (bone & mask).sum()}
    counts |= {"film": mask.size, "film touched": (mask & ~text).sum()}
    for word, x0, y0, x1, y1 in film.texts:
        place = np.s_[max(0, y0) : y1 + 1, max(0, x0) : x1 + 1]
        if marked := text[place].sum():
            hit = (text & mask)[place].sum() > marked / 2
            for key, value in ((kind(word), 1), (f"{kind(word)} found", hit)):
                counts[key] = counts.get(key, 0) + value
    if text.any():
        counts |= {"films with text": 1, "their pixels": mask.size}
        for name, image in (("before", film.image), ("after", clean)):
            counts[f"square {name}"] = ((image.astype(float) - film.twin) ** 2).sum()
            counts[f"ssim {name}"] = ssim(image, film.twin)
    return {"patient": film.patient, "path": film.path} | {key: float(v) for key, v in counts.items()}


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 images (H, W), 1 where equal (Wang et al. 2004)."""
    a, b = a.astype(float), b.astype(float)

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    mean_a, mean_b, c1, c2 = blur(a), blur(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = (2 * mean_a * mean_b + c1) * (2 * (blur(a * b) - mean_a * mean_b) + c2)
    map_ = both / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(map_[5:-5, 5:-5].mean())


# What `summary` divides by what.
FRACTIONS = {
    "text removed": "text",
    **{f"{name} touched": name for name in ("bone", "film")},
    **{f"{name} found": name for name in KINDS},
    **{f"ssim {when}": "films with text" for when in ("before", "after")},
    **{f"square {when}": "their pixels" for when in ("before", "after")},
}


def summary(scores: pd.DataFrame, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Fractions over all films with their intervals.

    Parameters
    ----------
    scores : DataFrame
        A row a film, from `score`.
    samples, seed : int
        Of the bootstrap over patients.

    Returns
    -------
    DataFrame
        A row for each of `FRACTIONS` that can be counted: value, low, high (95 % percentile interval) and n
        (what was divided by). Pixels or marks are summed over films, then divided. Of films with text, the
        mean SSIM, and the PSNR in decibels from their mean squared error.
    """
    names, number = np.unique(scores["patient"], return_inverse=True)
    counts = scores.drop(columns=["path", "patient"]).fillna(0.0)
    patients = {key: np.bincount(number, counts[key]) for key in counts}
    drawn = np.random.default_rng(seed).integers(len(names), size=(samples, len(names)))
    rows = {}
    for name, whole in FRACTIONS.items():
        if name not in patients or not patients[whole].any():
            continue
        top, bottom = patients[name], patients[whole]
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without the thing; equal images' PSNR
            resampled = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
            low, high = np.nanpercentile(resampled, [2.5, 97.5])
            numbers = np.array([top.sum() / bottom.sum(), low, high])
            if name.startswith("square"):
                name, numbers = name.replace("square", "psnr"), 10 * np.log10(255**2 / numbers[[0, 2, 1]])
        rows[name] = dict(zip(("value", "low", "high"), numbers, strict=True)) | {"n": int(bottom.sum())}
    return pd.DataFrame.from_dict(rows, orient="index")
