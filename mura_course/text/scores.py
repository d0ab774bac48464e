"""How well text was removed, measured where the truth is known: on the demo data (chapter 2).

Renders the chosen films anew with what is known about them. A *text pixel* is one that differs between a film
and its text-free twin; a *bone pixel* one whose ray crosses more than `BONE` mm of bone inside the collimated
field, and is no text pixel; a *metal pixel* likewise. Writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from .errors import DataError
from .text_detection import Found

BONE = METAL = 0.5  # mm
KINDS = ("side letter", "side letter and more", "date", "word")


@dataclass(frozen=True, eq=False)
class KnownFilm:
    """A demo film and its truth, all (H, W): `image` and text-free `twin`, uint8; `bone`, `metal`, bool.

    texts: (text, x0, y0, x1, y1) of what is burned in. patient: for intervals over patients.
    """

    path: str
    patient: int
    image: np.ndarray
    twin: np.ndarray
    bone: np.ndarray
    metal: np.ndarray
    texts: list[tuple]

    @property
    def text(self) -> np.ndarray:
        """bool (H, W): where film and twin differ."""
        return self.image != self.twin


def known_films(root: str | Path, paths: list[str]) -> Iterator[KnownFilm]:
    """The demo films at `paths`, rendered anew with their truth, study by study, about 25 a second.

    root: a demo data folder, or a cleaned copy of one. Raises DataError where it is not demo data of this
    version of the package.
    """
    from .radiographs.dataset import recipe
    from .radiographs.studies import plan

    note = Path(root, "manifest.json")
    made = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if made.get("recipe") != recipe():
        raise DataError(f"{root} holds no demo data of this version: there is no truth to measure against.")
    studies = {study.folder: study for study in plan(made["studies"], made["seed"])}
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
        for film in _film_study(studies[folder], made["seed"], made["long_side"]):
            if film.path in paths:
                yield film


def _film_study(study, seed: int, long_side: int) -> Iterator[KnownFilm]:
    """As `radiographs.studies.film_study`, which does not hand out the bones; a test holds them together."""
    from .radiographs.dataset import bone_cache
    from .radiographs.film import shutters, take
    from .radiographs.projection import Room, Settings
    from .radiographs.studies import make_scene

    room = Room.sample(study.rng(seed, 4))
    settings = [
        Settings.sample(study.part, study.digit, view, long_side, study.rng(seed, 1, i), room)
        for i, view in enumerate(study.views)
    ]
    scene, _ = make_scene(study, seed, settings, bone_cache())
    for i, setting in enumerate(settings, start=1):
        film = take(scene, setting, steps=(steps := {}))
        image = film.image if film.image.ndim == 2 else film.image[..., 0]
        field = shutters(setting)[0] > 0.5
        bone, metal = field & (steps["bone"] > BONE), field & (steps["metal"] > METAL)
        path = f"{study.folder}/image{i}.png"
        yield KnownFilm(path, study.patient, image, steps["plain"], bone, metal, film.text_boxes)


def kind(text: str) -> str:
    """Which of `KINDS` a burned-in text is."""
    if "/" in text:
        return "date"
    side = text[:1] in ("L", "R") and text[1:2] in ("", " ")
    return ("side letter" if len(text) == 1 else "side letter and more") if side else "word"


def score(film: KnownFilm, found: Found, clean: np.ndarray) -> dict[str, float]:
    """Counts for one film, for `summary` to add up; and, where there is text, how like the twin it is.

    clean: uint8 (H, W), the film without what was `found`. A mark counts as found where more than half of its
    text pixels were repainted. left: what is left of the text, the sum of |clean - twin| over text pixels;
    contrast: that sum before. Before and after: squared error and structural similarity to the twin.
    """
    text, mask = film.text, found.mask
    counts = {"text": text.sum(), "text removed": (text & mask).sum()}
    for name in ("bone", "metal"):
        tissue = getattr(film, name) & ~text
        counts |= {name: tissue.sum(), f"{name} touched": (tissue & mask).sum()}
    counts |= {"film": mask.size, "film touched": (mask & ~text).sum()}
    for name, image in (("contrast", film.image), ("left", clean)):
        counts[name] = np.abs(image.astype(int) - film.twin)[text].sum()
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


SHARES = {
    "text removed": "text",
    "bone touched": "bone",
    "metal touched": "metal",
    "film touched": "film",
    "left": "contrast",
    **{f"{name} found": name for name in KINDS},
    **{f"ssim {when}": "films with text" for when in ("before", "after")},
    **{f"square {when}": "their pixels" for when in ("before", "after")},
}
"""What `summary` divides by what."""


def summary(scores: pd.DataFrame, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Shares over all films with their 95 % interval, a row each: columns value, low, high, n (denominator).

    scores: a row per film, from `score`. Rows: `SHARES`, pixels or marks summed over films, then divided; of
    films with text, mean SSIM, and PSNR in dB from their mean squared error. The interval is the percentile
    interval of a bootstrap over patients; NaN where nothing was there to count.
    """
    patients = scores.drop(columns="path").fillna(0.0).groupby("patient").sum()
    drawn = np.random.default_rng(seed).integers(len(patients), size=(samples, len(patients)))
    rows = {}
    for name, whole in SHARES.items():
        if not {name, whole} <= set(patients):
            continue
        top, bottom = patients[name].to_numpy(), patients[whole].to_numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
            value = top.sum() / bottom.sum()
        low, high = np.nanpercentile(resampled, [2.5, 97.5]) if bottom.any() else (np.nan, np.nan)
        numbers = np.array([value, low, high])
        if name.startswith("square"):
            with np.errstate(divide="ignore"):  # equal images: infinitely many decibels
                name, numbers = name.replace("square", "psnr"), 10 * np.log10(255**2 / numbers[[0, 2, 1]])
        rows[name] = dict(zip(("value", "low", "high"), numbers, strict=True)) | {"n": int(bottom.sum())}
    return pd.DataFrame.from_dict(rows, orient="index")
