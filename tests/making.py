"""Makers of test data, one for all tests: folders in MURA's layout, small films, indexes, predictions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

BODY_PARTS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")

# (folder, body part, patient, study, abnormal, views)
STUDIES = (
    ("train", "HAND", 11, 1, True, 2),
    ("train", "HAND", 11, 2, False, 1),
    ("train", "ELBOW", 11, 1, False, 3),
    ("train", "WRIST", 12, 1, True, 1),
    ("train", "ELBOW", 13, 1, True, 1),
    ("train", "WRIST", 14, 1, False, 2),
    ("valid", "SHOULDER", 21, 1, True, 2),
    ("valid", "HAND", 22, 1, False, 1),
)


def write_mura(
    root: Path,
    studies: Iterable[tuple] = STUDIES,
    *,
    header: bool = False,
    newline: str = "\n",
    bom: bool = False,
    prefix: str = "MURA-v1.1/",
    macos: bool = False,
    truth: bool = False,
) -> Path:
    """Write empty image files and four CSV files; truth: with the files that make them demo data."""
    lines: dict[str, list[str]] = {
        f"{folder}_{kind}": [] for folder in ("train", "valid") for kind in ("image_paths", "labeled_studies")
    }
    for folder, part, patient, study, positive, views in studies:
        sign = "positive" if positive else "negative"
        place = f"{folder}/XR_{part}/patient{patient:05d}/study{study}_{sign}"
        (root / place).mkdir(parents=True)
        lines[f"{folder}_labeled_studies"].append(f"{prefix}{place}/,{int(positive)}")
        for view in range(1, views + 1):
            (root / place / f"image{view}.png").touch()
            lines[f"{folder}_image_paths"].append(f"{prefix}{place}/image{view}.png")
            if macos:
                (root / place / f"._image{view}.png").touch()
                lines[f"{folder}_image_paths"].append(f"{prefix}{place}/._image{view}.png")
    for name, rows in lines.items():
        titles = ["Img_Path" if name.endswith("paths") else "path,label"] if header else []
        text = newline.join([*titles, *rows, ""])
        (root / f"{name}.csv").write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    if truth:
        (root / "truth.csv").write_text("path,finding\n")
        made = {"recipe": 2, "seed": 0, "long_side": 320, "text": True}
        (root / "manifest.json").write_text(json.dumps(made))
    return root


def make_index(
    root: Path | str = "/nowhere",
    parts: Sequence[str] = ("HAND", "WRIST"),
    patients: int = 20,
    views: int = 2,
    name: str = "MURA-demo",
) -> pd.DataFrame:
    """An index without files: patients with one study each, parts and labels by turns, 60/20/20 % split."""
    rows = []
    for patient in range(patients):
        part, label = parts[patient // 2 % len(parts)], patient % 2
        split = "train" if patient < 0.6 * patients else "dev" if patient < 0.8 * patients else "test"
        for view in range(1, views + 1):
            study = f"{part}/patient{patient:05d}/study1"
            rows.append((f"{patient}-{view}.png", split, part, patient, study, view, label))
    index = pd.DataFrame(rows, columns=["path", "split", "body_part", "patient", "study", "view", "label"])
    index["body_part"] = pd.Categorical(index["body_part"], BODY_PARTS)
    is_demo = name.startswith("MURA-demo")
    index.attrs = {"root": str(root), "name": name, "is_demo": is_demo, "content": "made for a test"}
    return index


def make_films(root: Path, sides: tuple[int, int] = (32, 32), **options) -> pd.DataFrame:
    """`make_index` with its films on disk: noise, a bright square where abnormal, a bar for the body part."""
    index, rng = make_index(root, **options), np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for path, part, label in zip(index["path"], index["body_part"], index["label"], strict=True):
        image = rng.integers(0, 120, sides).astype(np.uint8)
        image[4:12, 4:12] += np.uint8(120 * label)
        where = BODY_PARTS.index(part)
        image[20:28, 4 * where : 4 * where + 4] = 250
        cv2.imwrite(str(root / path), image)
    return index


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A film-like uint8 image: smooth, so that resampling is well conditioned."""
    coarse = np.random.default_rng(seed).random((5, 4), np.float32)
    return (cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) * 255).astype(np.uint8)


def changed(file: Path, **entries) -> None:
    """Change these entries of a JSON file, or make it; the value ... takes an entry out."""
    new = (json.loads(file.read_text()) if file.exists() else {}) | entries
    file.write_text(json.dumps({key: value for key, value in new.items() if value is not ...}))


def flip_byte(file: Path, place: int) -> None:
    """Change one byte of a file, so that nothing but its content tells."""
    info, content = file.stat(), bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def flips(content: bytes, count: int = 60) -> Iterable[bytes]:
    """`content` with one bit changed, at places spread over all of it."""
    for place in np.linspace(0, len(content) - 1, count).astype(int):
        yield content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def pair_by_pair(label: Sequence, score: Sequence, part: Sequence) -> float:
    """AUROC within parts as it is defined, one (abnormal, normal) pair after the other; NaN without any."""
    rows = list(zip(label, score, part, strict=True))
    won = [(p > q) + (p == q) / 2 for y, p, a in rows for z, q, b in rows if y > z and a == b]
    return float(np.mean(won)) if won else float("nan")


def make_predictions(index: pd.DataFrame, signal: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Rows of `index` with a `probability` that tells the label better, the larger `signal` is."""
    rng = np.random.default_rng(seed)
    logit = signal * (index["label"].to_numpy() - 0.5) + rng.normal(size=len(index))
    return index.assign(probability=1 / (1 + np.exp(-logit)))
