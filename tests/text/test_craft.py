"""keras-ocr in a process of its own, and its weights."""

import hashlib
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import files

import numpy as np
import pytest
from text_films import film, save_untrained

from mura_course import weights
from mura_course.errors import TextError, WeightsError
from mura_course.text import craft, get_detector, remove_text
from mura_course.text.boxes import line_mask


def test_address_and_checksum_are_those_of_the_installed_keras_ocr():
    if not (installed := [f for f in files("keras-ocr") or [] if str(f) == "keras_ocr/detection.py"]):
        pytest.skip("keras-ocr is not installed")
    url, digest, _ = weights.PUBLISHED["CRAFT"]
    named = re.search(rf'"url": "{re.escape(url)}".*?"sha256": "(\w+)"', installed[0].read_text(), re.S)
    assert named[1] == digest


def test_missing_weights_raise_the_one_weights_error(tmp_path, monkeypatch):
    """Fault 10: there were two unrelated classes called WeightsError."""
    _, digest, folder = weights.PUBLISHED["CRAFT"]
    known = (url := "http://127.0.0.1:9/refused.h5", digest, folder)
    monkeypatch.setitem(weights.PUBLISHED, "CRAFT", known)
    monkeypatch.setattr(craft, "version", lambda package: "1")
    monkeypatch.setenv("KERAS_OCR_CACHE_DIR", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        get_detector("keras-ocr")
    assert all(part in str(caught.value) for part in ("refused.h5", url, digest, str(tmp_path)))


@pytest.mark.slow
def test_keras_ocr_runs_beside_keras_3(tmp_path, monkeypatch):
    """With weights of the right shape: there are no trained ones to test with."""
    pytest.importorskip("tf_keras")
    loaded, file = "tensorflow" in sys.modules, tmp_path / "craft_mlt_25k.h5"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(save_untrained, str(file)).result().startswith("tf_keras")
    url, _, folder = weights.PUBLISHED["CRAFT"]
    known = (url, hashlib.sha256(file.read_bytes()).hexdigest(), folder)
    monkeypatch.setitem(weights.PUBLISHED, "CRAFT", known)
    monkeypatch.setenv("KERAS_OCR_CACHE_DIR", str(tmp_path))
    detector = get_detector("keras-ocr")
    assert detector.versions.keys() == {"keras-ocr", "tf-keras", "tensorflow"}
    clean, found = remove_text(film(60, 48), detector)
    assert found.mask.shape == clean.shape == (60, 48)
    assert np.array_equal(found.mask, line_mask(found.boxes, (60, 48)))
    # Nothing of it in this process.
    assert ("tensorflow" in sys.modules) == loaded
    assert not hasattr(np, "sctypes") and "TF_USE_LEGACY_KERAS" not in os.environ
    # A process that dies is told, not waited for.
    detector._process.submit(os._exit, 3)
    with pytest.raises(TextError, match="keras-ocr failed"):
        detector(film(60, 48))
