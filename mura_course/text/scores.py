"""Room text: how well text was removed, measured where the truth is known: on the demo data. Chapter 2.

Takes the films of `mura_demo.known_films`. A *text pixel* is one that differs between a film and its
text-free twin; a *bone pixel* one of the film's bone mask that is no text pixel. Reads and writes nothing.
"""

import numpy as np
import pandas as pd
from skimage.metrics import structural_similarity

from mura_demo import KnownFilm

from .boxes import Found

KINDS = ("side letter", "side letter and more", "date", "word")
# Structural similarity as Wang et al. 2004 define it.
SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}


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
        From `mura_demo.known_films`.
    found, clean : Found, ndarray
        What a detector found, and the film without it, uint8 (H, W).

    Returns
    -------
    dict
        patient, path, and counts of pixels and marks. A mark is found where more than half of its text pixels
        are repainted. Of films with text, before and after: squared error and structural similarity to it.
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
            counts[f"ssim {name}"] = structural_similarity(image, film.twin, **SSIM)
    return {"patient": film.patient, "path": film.path} | {key: float(v) for key, v in counts.items()}


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
    patients = scores.drop(columns="path").groupby("patient").sum()
    drawn = np.random.default_rng(seed).integers(len(patients), size=(samples, len(patients)))
    sums = pd.DataFrame(patients.to_numpy()[drawn].sum(axis=1), columns=patients.columns)
    rows = {}
    for name, whole in FRACTIONS.items():
        if name not in patients or not patients[whole].any():
            continue
        low, high = (sums[name] / sums[whole]).quantile([0.025, 0.975])
        numbers = np.array([patients[name].sum() / patients[whole].sum(), low, high])
        if name.startswith("square"):
            with np.errstate(divide="ignore"):  # equal images
                name, numbers = name.replace("square", "psnr"), 10 * np.log10(255**2 / numbers[[0, 2, 1]])
        rows[name] = [*numbers, int(patients[whole].sum())]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])
