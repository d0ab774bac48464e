"""Finding text: what the detectors find, what they leave alone, and what they refuse."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_films import film, write_on

from mura_course.errors import TextError
from mura_course.text import boxes, get_detector, rapid, remove_text
from mura_course.text.strokes import Strokes

STROKES = get_detector("strokes")
WORDS = ("L", (20, 40), 0.8), ("R", (200, 300), 0.8), ("12/04/2009", (5, 312), 0.4), ("POST", (190, 14), 0.4)


@pytest.mark.parametrize("text, at, scale", WORDS)
def test_text_on_dark_ground_is_removed_and_nothing_else_is_touched(text, at, scale):
    plain = film()
    written, where = write_on(plain, text, at, scale, thick=1 + (scale > 0.5))
    clean, found = remove_text(written, STROKES)
    assert (found.mask & where).sum() >= 0.95 * where.sum()
    assert not found.mask[~cv2.dilate(where.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)].any()
    assert np.array_equal(clean[~found.mask], written[~found.mask])
    error = [np.abs(image.astype(int) - plain)[where].mean() for image in (written, clean)]
    assert error[1] < 0.1 * error[0]
    assert len(found.boxes) == 1 and found.boxes[0].shape == (4, 2)


def test_films_without_text_stay_as_they_are():
    metal = film()  # a plate with screws
    cv2.line(metal, (120, 120), (128, 220), 255, 9)
    for y in range(125, 220, 18):
        cv2.line(metal, (110, y), (140, y + 3), 255, 3)
    odd = [np.full(shape, grey, np.uint8) for shape in ((1, 1), (2, 300), (700, 40)) for grey in (0, 255)]
    for plain in (metal, *odd, *(film(seed=seed) for seed in range(4))):
        clean, found = remove_text(plain, STROKES)
        assert not found.mask.any() and found.boxes == [] and np.array_equal(clean, plain)


@settings(max_examples=25)
@given(*[st.integers(290, 400)] * 2, st.integers(0, 999), st.sampled_from(["L", "R 3", "L AP"]))
def test_wherever_a_marker_stands_in_a_corner_it_is_found(height, width, seed, text):
    """Strokes are two pixels wide: an L of one pixel is not told from an edge."""
    size = max(height, width) / 320
    plain = film(height, width, seed) // 4  # dark: nothing competes
    at = (8 + seed % 9, int(30 * size) + seed % 12)
    written, where = write_on(plain, text, at, 0.8 * size, thick=2 if size > 0.9 else 1)
    for image, place in ((written, where), (written[:, ::-1], where[:, ::-1])):
        mask = STROKES(np.repeat(image[..., None], 3, 2)).mask
        assert (mask & place).sum() > 0.9 * place.sum()


@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="another OpenCV makes other films, and other masks")
def test_the_masks_change_only_with_the_version():
    """Films cleaned by another version are other data. Where this fails, raise Strokes.versions first."""
    films = [write_on(film(seed=seed), text, (9, 40))[0] for seed, text in enumerate(("L", "R AP", "7/11"))]
    masks = b"".join(np.packbits(STROKES(image).mask).tobytes() for image in films)
    assert (Strokes.versions["strokes"], hashlib.sha256(masks).hexdigest()[:12]) == ("1", "8aa0fabed329")


def test_what_is_no_film_is_refused_and_a_missing_package_named_with_the_command(monkeypatch):
    for image in (np.zeros((5, 5)), np.zeros((5, 5, 4), np.uint8), np.zeros(7, np.uint8)):
        with pytest.raises(TextError, match="A film is uint8"):
            STROKES(image)
    monkeypatch.setattr(rapid, "version", Mock(side_effect=PackageNotFoundError("rapidocr")))
    with pytest.raises(TextError, match=r"needs rapidocr.*pip install rapidocr"):
        get_detector("rapidocr")


def test_the_line_mask_is_the_recipes():
    """KL 1.2's recipe, on an upright box in keras-ocr's order of corners: a line along its middle."""
    box = np.array([(30, 40), (90, 40), (90, 60), (30, 60)], np.float32)
    expected = cv2.line(np.zeros((100, 150), np.uint8), (90, 50), (30, 50), 255, 20) > 0
    assert np.array_equal(boxes.line_mask([box], (100, 150)), expected)
    upright = box[:, ::-1].copy()[[0, 3, 2, 1]]
    assert np.array_equal(boxes.line_mask([upright], (150, 100)), expected.T)


def test_rapidocr_reads_what_strokes_alone_would_miss_and_no_bone():
    pytest.importorskip("rapidocr")
    detector, plain = get_detector("rapidocr"), film()
    faint, where = write_on(plain, "12/04/2009", (5, 312), 0.45, level=60, thick=1)
    marked = write_on(faint, "RJB", (85, 150), 1, 240, 7)[0]  # fat letters that touch, on the bone
    found = detector(marked)
    assert detector.versions.keys() == {"letters", "strokes", "opencv", "rapidocr", "onnxruntime"}
    assert any(cv2.pointPolygonTest(box, (60, 307), False) > 0 for box in detector.read(marked))
    assert (found.mask & where).sum() > 0.7 * where.sum()
    for lying in (marked, marked[:, ::-1], np.rot90(marked), np.rot90(marked, 3)):  # mirrored, or turned
        assert detector(np.ascontiguousarray(lying)).mask[lying == 240].mean() > 0.95
    assert not found.mask[180:280, 70:170].any()
    with ThreadPoolExecutor(2) as pool:  # one detector serves all threads
        masks = [other.mask for other in pool.map(detector, [marked, plain] * 5)]
    assert all(np.array_equal(mask, found.mask) for mask in masks[::2]) and not np.any(masks[1::2])
