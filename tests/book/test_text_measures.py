"""Chapter 2's measures of text removal, on films whose text is known."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from text_films import film, write_on

import mura_demo
from mura_course.text import Found

TOP = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("text_removal", TOP / "benchmarks/text_removal.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
scores = SimpleNamespace(**benchmark.measures())


def known(path, patient, seed):
    plain = film(80, 60, seed)
    image, _ = write_on(plain, "L", (4, 20), 0.5, thick=1)
    bone = np.zeros(plain.shape, bool)
    bone[:, 20:40] = True
    return mura_demo.KnownFilm(path, patient, image, plain, bone, [("L", 4, 8, 14, 22)])


def test_scores_are_what_they_say():
    f = known("a", 1, 0)
    part = f.text & (np.cumsum(f.text).reshape(f.text.shape) % 2 == 0)
    part[50, 25:30] = part[50, 50:54] = True
    counts = scores.score(f, Found([], part), np.where(part, f.twin, f.image))
    assert counts["text removed"] / counts["text"] == pytest.approx(0.5, abs=0.02)
    assert (counts["bone touched"], counts["film touched"], counts["side letter"]) == (5, 9, 1)
    assert 0 < counts["square after"] < 0.8 * counts["square before"]
    perfect = scores.score(f, Found([], f.text), f.twin)
    assert perfect["ssim after"] == 1 and perfect["square after"] == 0
    assert perfect["side letter found"] == 1 and perfect["film touched"] == 0
    nothing = scores.score(f, Found([], np.zeros_like(part)), f.image)
    assert [*map(scores.kind, ("L", "R AP", "04/11/2009", "LEFT"))] == [*scores.KINDS]
    assert nothing["side letter found"] == 0 and nothing["square after"] == nothing["square before"]


def test_the_summary_adds_up_and_its_interval_is_over_patients():
    rows = []
    for number in range(12):
        f = known(str(number), number // 3, number)
        mask = f.text if number < 6 else np.zeros_like(f.text)  # patients 0 and 1 right, 2 and 3 wrong
        rows.append(scores.score(f, Found([], mask), np.where(mask, f.twin, f.image)))
    counted = pd.DataFrame(rows)
    table = scores.summary(counted, samples=500)
    removed = table.loc["text removed"]
    assert removed["value"] == pytest.approx(counted["text removed"].sum() / counted["text"].sum())
    assert (removed["low"], removed["high"]) == (0, 1)  # four patients, not twelve films
    error = counted["square after"].sum() / counted["their pixels"].sum()
    psnr = table.loc["psnr after"]
    assert psnr["value"] == pytest.approx(10 * np.log10(255**2 / error)) and psnr["low"] <= psnr["value"]
    assert table.loc["ssim after", "value"] == pytest.approx(counted["ssim after"].mean())
    assert "date found" not in table.index and table.loc["side letter found", "n"] == 12
    shuffled = scores.summary(counted.sample(frac=1, random_state=0), samples=500)
    pd.testing.assert_frame_equal(table, shuffled)
