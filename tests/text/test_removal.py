"""Text removal: what is found and repainted, what must stay, whole data sets, keras-ocr without its weights.

Plain films with text drawn by OpenCV, whose truth is known; of the demo data one study is rendered.
"""

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import files
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mura_course import cli, data, text_scores, text_worker
from mura_course import text_detection as td
from mura_course import text_removal as tr
from mura_course.errors import DataError, MuraError

STROKES = td.get_detector("strokes")


def film(height=320, width=240, seed=0):
    """Noise on flesh on black, and a bone with a bright, uneven rim: nothing on it is text."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    across = np.abs(x - width / 2 - 6 * np.sin(y / 40)) / width
    grey = (
        12
        + 70 * np.clip(1.25 - 4 * across, 0, 1)
        + 90 * (across < 0.09)
        + 40 * (np.abs(across - 0.085) < 0.012)
    )
    grain = cv2.GaussianBlur(rng.normal(0, 26, (height, width)), (0, 0), 1.2)
    return np.clip(grey + grain * (0.2 + 1.2 * (across < 0.1)) + rng.normal(0, 2, grey.shape), 0, 255).astype(
        np.uint8
    )


def write_on(image, text="L", at=(20, 40), scale=0.8, level=225, thick=2):
    """A copy with the text, and where it is."""
    written = cv2.putText(image.copy(), text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, level, thick, cv2.LINE_AA)
    return written, written != image


# --- Finding and repainting -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "at", "scale"),
    [("L", (20, 40), 0.8), ("R", (200, 300), 0.8), ("12/04/2009", (5, 312), 0.4), ("POST", (190, 14), 0.4)],
)
def test_text_on_dark_ground_is_removed_and_nothing_else_is_touched(text, at, scale):
    plain = film()
    written, where = write_on(plain, text, at, scale, thick=1 + (scale > 0.5))
    clean, found = tr.remove_text(written, STROKES)
    assert (found.mask & where).sum() >= 0.95 * where.sum()
    assert not found.mask[~cv2.dilate(where.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)].any()
    assert np.array_equal(clean[~found.mask], written[~found.mask])
    error = [np.abs(image.astype(int) - plain)[where].mean() for image in (written, clean)]
    assert error[1] < 0.1 * error[0]
    assert len(found.boxes) == 1 and found.boxes[0].source == "strokes"


@pytest.mark.parametrize("seed", range(4))
def test_a_film_without_text_stays_as_it_is(seed):
    plain = film(seed=seed)
    clean, found = tr.remove_text(plain, STROKES)
    assert not found.mask.any() and found.boxes == [] and np.array_equal(clean, plain)


def test_a_plate_with_screws_is_no_text():
    metal = film()
    cv2.line(metal, (120, 120), (128, 220), 255, 9)
    for y in range(125, 220, 18):
        cv2.line(metal, (110, y), (140, y + 3), 255, 3)
    assert not STROKES(metal).mask.any()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(290, 400),  # strokes two pixels wide: an L of one pixel is not told from an edge
    st.integers(290, 400),
    st.integers(0, 999),
    st.sampled_from(["L", "R 3", "L AP"]),
    st.booleans(),
)
def test_wherever_a_marker_stands_in_a_corner_it_is_found(height, width, seed, text, colour):
    size = max(height, width) / 320
    plain = film(height, width, seed) // 4  # dark: nothing competes
    at = (8 + seed % 9, int(30 * size) + seed % 12)
    written, where = write_on(plain, text, at, 0.8 * size, thick=2 if size > 0.9 else 1)
    image = np.repeat(written[..., None], 3, 2) if colour else written
    found = STROKES(image)
    assert (found.mask & where).sum() > 0.9 * where.sum() and found.mask.shape == (height, width)
    flipped = STROKES(np.ascontiguousarray(image[:, ::-1]))
    assert (flipped.mask[:, ::-1] & where).sum() > 0.9 * where.sum()


@pytest.mark.parametrize("image", [np.zeros((5, 5)), np.zeros((5, 5, 4), np.uint8), np.zeros(7, np.uint8)])
def test_what_is_no_film_is_refused(image):
    with pytest.raises(td.TextDetectionError, match="A film is uint8"):
        STROKES(image)


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (9, 9), (700, 40)])
def test_odd_shapes_pass(shape):
    for level in (0, 255):
        assert not STROKES(np.full(shape, level, np.uint8)).mask.any()


def test_an_unknown_detector_lists_those_that_there_are():
    with pytest.raises(td.TextDetectionError, match="keras-ocr, rapidocr, strokes"):
        td.get_detector("tesseract")


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(td.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(td.TextDetectionError, match="needs rapidocr.*pip install rapidocr"):
        td.get_detector("rapidocr")


def test_the_line_mask_is_the_recipes():
    """KL 1.2's recipe, written as it is usually found, on an upright box in keras-ocr's order of corners."""
    box = np.float32([(30, 40), (90, 40), (90, 60), (30, 60)])
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = box
    expected = np.zeros((100, 150), np.uint8)
    ends = [(int((x1 + x2) / 2), int((y1 + y2) / 2)), (int((x0 + x3) / 2), int((y0 + y3) / 2))]
    cv2.line(expected, ends[0], ends[1], 255, int(np.hypot(x2 - x1, y2 - y1)))
    mask = td.line_mask([td.TextBox(box)], (100, 150))
    assert np.array_equal(mask, expected > 0)
    upright = td.TextBox(box[:, ::-1].copy()[[0, 3, 2, 1]])
    assert np.array_equal(td.line_mask([upright], (150, 100)), mask.T)
    assert not td.line_mask([], (9, 9)).any()


def test_inpainting_fills_from_around_and_touches_nothing_else():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (80, 1))
    mask = np.zeros(ramp.shape, bool)
    mask[20:25, 30:60] = mask[70:, 95:] = True
    broken = np.where(mask, 255, ramp).astype(np.uint8)
    for method in tr.METHODS:
        filled = tr.inpaint(broken, mask, method=method)
        assert np.array_equal(filled[~mask], ramp[~mask]) and broken[22, 40] == 255
        assert np.abs(filled.astype(int) - ramp).max() <= 12


@pytest.mark.parametrize("channels", [0, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_mode_is_inpainted_and_grey_stays_grey(channels, dtype):
    plain = film().astype(dtype) * (257 if dtype == np.uint16 else 1)
    mask = np.zeros(plain.shape, bool)
    mask[30:40, 30:50] = True
    image = np.repeat(plain[..., None], channels, axis=2) if channels else plain
    if channels == 4:
        image[..., 3] = 7
    filled = tr.inpaint(image, mask)
    assert filled.dtype == dtype and filled.shape == image.shape
    first = filled[..., 0] if channels else filled
    assert np.array_equal(first[~mask], plain[~mask]) and not np.array_equal(first[mask], plain[mask])
    assert np.array_equal(first, tr.inpaint(plain, mask))
    if channels >= 3:
        assert (filled[..., :3] == first[..., None]).all()
    if channels == 4:
        assert (filled[..., 3] == 7).all()


def test_rapidocr_reads_what_strokes_alone_would_miss_and_no_bone():
    pytest.importorskip("rapidocr")
    detector, plain = td.get_detector("rapidocr"), film()
    faint, where = write_on(plain, "12/04/2009", (5, 312), 0.45, level=60, thick=1)
    marked, letter = write_on(faint, "R", (205, 40))
    found = detector(marked)
    assert {box.source for box in found.boxes} <= {"rapidocr", "strokes"} and {
        "opencv",
        "rapidocr",
    } <= detector.versions.keys()
    assert (found.mask & letter).sum() > 0.9 * letter.sum()
    assert any("2009" in box.text and box.score >= td.OCR_SCORE for box in found.boxes)
    assert (found.mask & where).sum() > 0.7 * where.sum()
    assert not found.mask[60:280, 70:170].any()
    assert not detector(plain).mask.any()


# --- Whole data sets --------------------------------------------------------------------------------


@pytest.fixture
def dataset(mura_folder):
    """A tiny data set whose films are films: every second one with an L, some RGB, one 16-bit."""
    root = mura_folder(truth=True)
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        image = film(130, 110, number)
        if number % 2 == 0:
            image = write_on(image, at=(12, 30))[0]
        image = np.repeat(image[..., None], 3, 2) if number % 3 == 0 else image
        image = image.astype(np.uint16) * 257 if number == 4 else image
        cv2.imwrite(str(file), image)
    return root


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_data_set_is_cleaned_into_a_new_folder(dataset, tmp_path, capsys):
    before, out = contents(dataset), tmp_path / "out"
    assert cli.main(["remove-text", str(dataset), str(out), "--detector", "strokes"]) == 0
    assert "13 films; the detector strokes found text in 7" in capsys.readouterr().out
    assert contents(dataset) == before
    index, original = data.load_index(out, quiet=True), data.load_index(dataset, quiet=True)
    assert index.drop(columns="path").equals(original.drop(columns="path")) and index.attrs["is_demo"]
    for number, path in enumerate(sorted(original["path"])):
        old, new = (cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED) for root in (dataset, out))
        assert old.dtype == new.dtype and old.shape == new.shape
        same = (out / path).read_bytes() == before[path]
        assert same == (number % 2 == 1), path
        assert new[10:32, 10:28].max() < 0.5 * np.iinfo(new.dtype).max
    assert not list(tmp_path.glob("*.partial")) and not list(out.rglob("*.writing"))
    assert {p.name for p in out.iterdir()} - {p.name for p in dataset.iterdir()} == {tr.RECORD, tr.BOXES}


def test_the_record_says_what_was_done(dataset, tmp_path):
    record = tr.clean_dataset(dataset, tmp_path / "out", "strokes", workers=1, progress=False)
    stored = json.loads((tmp_path / "out" / tr.RECORD).read_text())
    boxes = pd.read_csv(tmp_path / "out" / tr.BOXES)
    assert (
        stored.items() >= record.items()
        and stored["detector"] == "strokes"
        and "opencv" in stored["versions"]
    )
    assert (stored["films"], stored["films_with_text"], stored["boxes"]) == (13, 7, len(boxes))
    assert stored["fingerprint"] == data.fingerprint(data.load_index(dataset, quiet=True))
    assert boxes["source"].eq("strokes").all() and boxes["text"].isna().all()
    assert boxes[["x0", "y0"]].max().max() < 35 and boxes[["x2", "y2"]].min().min() > 10
    # An equal call finds it done; another detector is refused.
    assert (
        tr.clean_dataset(dataset, tmp_path / "out", "strokes", progress=False)["finished"]
        == stored["finished"]
    )
    with pytest.raises(tr.TextRemovalError, match="exists already, and not from this order"):
        tr.clean_dataset(dataset, tmp_path / "out", "rapidocr", progress=False)


def test_a_manifest_gets_the_new_checksums(dataset, tmp_path):
    sums = [
        (p, len(b), hashlib.sha256(b).hexdigest()) for p, b in contents(dataset).items() if p.endswith("png")
    ]
    pd.DataFrame(sums, columns=["path", "bytes", "sha256"]).to_csv(dataset / "manifest.csv", index=False)
    tr.clean_dataset(dataset, tmp_path / "out", "strokes", progress=False)
    manifest = pd.read_csv(tmp_path / "out/manifest.csv")
    assert sorted(manifest["path"]) == sorted(path for path, _, _ in sums)
    for row in manifest.itertuples():
        content = (tmp_path / "out" / row.path).read_bytes()
        assert (row.bytes, row.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_never_in_place(dataset, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(dataset)
    for out in (dataset, dataset / "clean", dataset.parent, link / "clean", Path(dataset / "train/..")):
        with pytest.raises(tr.TextRemovalError, match="one in the other"):
            tr.clean_dataset(dataset, out, "strokes", progress=False)
    assert not (dataset / "clean").exists()


def test_unreadable_images_are_listed_together_and_only_they_are_read_again(dataset, tmp_path):
    images = sorted(dataset.rglob("*.png"))
    whole = {file: file.read_bytes() for file in images[:2]}
    images[0].write_bytes(b"")
    images[1].write_bytes(whole[images[1]][:300])
    with pytest.raises(DataError, match=r"(?s)^2 images cannot be read.*empty file.*cut short") as caught:
        tr.clean_dataset(dataset, tmp_path / "out", "strokes", progress=False)
    assert str(images[0]) in str(caught.value) and not (tmp_path / "out").exists()
    for file, content in whole.items():
        file.write_bytes(content)
    assert (
        tr.clean_dataset(dataset, tmp_path / "out", "strokes", progress=False)["films_in_these_seconds"] == 2
    )


def test_another_orders_remains_are_not_touched(dataset, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(tr.TextRemovalError, match="left by another order"):
        tr.clean_dataset(dataset, tmp_path / "out", "strokes", progress=False)
    assert contents(partial).keys() - {"lock"} == {"thesis.txt"}


def test_a_folder_that_cannot_be_written_gives_one_error(dataset, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["remove-text", str(dataset), str(tmp_path / "file/out"), "--detector", "strokes"]) == 1
    assert "Cannot write" in capsys.readouterr().err
    assert cli.main(["remove-text", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert cli.main(["remove-text", str(dataset), str(tmp_path / "out"), "--detector", "x"]) == 1
    assert "no detector 'x'" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_half_way_it_continues_and_leaves_no_process(dataset, tmp_path):
    expected = tmp_path / "expected"
    tr.clean_dataset(dataset, expected, "strokes", progress=False)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    # Every film waits, so that the kill comes in between; the workers are told by their environment.
    start = "import sys; from mura_course import cli; sys.exit(cli.main())"
    command = [sys.executable, "-c", start, "remove-text", str(dataset), str(out)]
    slow = {"MURA_TEST_SLOW": "1", "PYTHONPATH": str(_sluggish(tmp_path))}
    process = subprocess.Popen([*command, "--detector", "strokes"], env=os.environ | slow)
    journal, limit = partial / "done.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and workers
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < limit, "a worker lives on"
        time.sleep(0.02)
    done = len(list(partial.rglob("*.png")))
    assert 3 <= done < 13
    with open(journal, "a") as file:
        file.write('["train/XR_HAND/patient00011/stu')  # as a kill in the middle of a line leaves it
    record = tr.clean_dataset(dataset, out, "strokes", progress=False)
    assert record["films_in_these_seconds"] <= 10
    ours, theirs = contents(out), contents(expected)
    assert {k for k in ours if ours[k] != theirs.get(k)} == {tr.RECORD} and ours.keys() == theirs.keys()


def _sluggish(folder: Path) -> Path:
    """A sitecustomize that makes reading a file slow, in this test's processes alone."""
    (folder / "slow").mkdir()
    (folder / "slow/sitecustomize.py").write_text(
        "import os, time, pathlib\n"
        "if os.environ.get('MURA_TEST_SLOW'):\n"
        "    read = pathlib.Path.read_bytes\n"
        "    def slowly(path):\n"
        "        if path.suffix == '.png': time.sleep(0.15)\n"
        "        return read(path)\n"
        "    pathlib.Path.read_bytes = slowly\n"
    )
    return folder / "slow"


def _children(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listing.stdout.split()]


def _alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


# --- Workers and keras-ocr --------------------------------------------------------------------------


def dies(detector):
    os.write(2, b"out of cheese")
    os._exit(3)


def test_a_worker_answers_tells_errors_and_says_what_it_said_last(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    worker = text_worker.Worker("strokes", threads=1)
    assert worker.versions == STROKES.versions
    written, where = write_on(film())
    assert np.array_equal(worker(text_worker._detect, written).mask, STROKES(written).mask)
    with pytest.raises(td.TextDetectionError, match="A film is uint8"):
        worker(text_worker._detect, np.zeros(3))
    with pytest.raises(td.TextDetectionError, match="(?s)failed.*AttributeError"):
        worker(text_worker._detect, None)
    with pytest.raises(td.TextDetectionError, match=r"(?s)exit code 3.*out of cheese"):
        worker(dies)
    with pytest.raises(td.TextDetectionError, match="exit code 3"):
        worker(text_worker._detect, written)
    with pytest.raises(td.TextDetectionError, match="no detector"):
        text_worker.Worker("nothing")


def test_address_and_checksum_are_those_of_the_installed_keras_ocr():
    source = next(f for f in files("keras-ocr") if str(f) == "keras_ocr/detection.py").read_text()
    named = re.search(rf'"url": "{re.escape(text_worker.WEIGHTS_URL)}".*?"sha256": "(\w+)"', source, re.S)
    assert named[1] == text_worker.WEIGHTS_SHA256


@pytest.fixture
def server(tmp_path):
    """Serves files by path; counts requests."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/missing.h5":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"w" * (1000 if self.path == "/whole.h5" else 400))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


WHOLE = hashlib.sha256(b"w" * 1000).hexdigest()


def test_weights_are_downloaded_once_and_verified(server, tmp_path):
    address, asked = server
    for _ in range(2):
        file = text_worker.craft_weights(f"{address}/whole.h5", WHOLE, tmp_path / "kept")
    assert file.read_bytes() == b"w" * 1000 and asked == ["/whole.h5"]
    assert list((tmp_path / "kept").iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "Not Found"), ("short", "400 bytes"), ("refused", "refused")]
)
def test_weights_that_cannot_be_had_name_file_address_checksum_and_folder(server, tmp_path, name, why):
    url = f"{server[0]}/{name}.h5" if name != "refused" else "http://127.0.0.1:9/refused.h5"
    with pytest.raises(text_worker.WeightsError) as caught:
        text_worker.craft_weights(url, WHOLE, tmp_path / "kept")
    for part in (why, f"{name}.h5", url, WHOLE, str(tmp_path / "kept")):
        assert part in str(caught.value), part
    assert list((tmp_path / "kept").iterdir()) == []


def test_nothing_is_downloaded_where_that_was_not_asked_for(server, tmp_path):
    address, asked = server
    with pytest.raises(text_worker.WeightsError, match=f"not in {tmp_path}.*{WHOLE}.*as whole.h5"):
        text_worker.craft_weights(f"{address}/whole.h5", WHOLE, tmp_path, download=False)
    assert asked == [] and list(tmp_path.iterdir()) == []


def test_a_placed_file_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_OCR_CACHE_DIR", str(tmp_path))
    (tmp_path / "craft_mlt_25k.h5").write_bytes(b"not CRAFT")
    with pytest.raises(
        text_worker.WeightsError, match=r"9 bytes and the checksum .*Delete it\. Download https"
    ) as caught:
        td.get_detector("keras-ocr")
    assert text_worker.WEIGHTS_SHA256 in str(caught.value) and isinstance(caught.value, MuraError)


def save_weights(detector, file):
    detector._detector.model.save_weights(file)


def load_weights(detector, file):
    before = [w.sum() for w in detector._detector.model.get_weights()]
    for weight in detector._detector.model.weights:
        weight.assign(weight * 0)
    detector._detector.model.load_weights(file)
    return np.allclose(before, [w.sum() for w in detector._detector.model.get_weights()])


def keras_module(detector):
    import tensorflow

    return tensorflow.keras.Model.__module__


@pytest.mark.slow
def test_keras_ocr_runs_beside_keras_3(tmp_path, monkeypatch):
    """With weights of the right shape: there are no trained ones to test with."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    loaded = "tensorflow" in sys.modules  # another test of this process may have
    worker = text_worker.Worker("keras-ocr")
    assert worker(keras_module).startswith("tf_keras") and ("tensorflow" in sys.modules) == loaded
    assert not hasattr(np, "sctypes") and "TF_USE_LEGACY_KERAS" not in os.environ
    placed = tmp_path / "craft_mlt_25k.h5"
    worker(save_weights, str(placed))
    assert worker(load_weights, str(placed))
    # From here on as a user: the placed file is verified, then the detector answers.
    checksum = hashlib.sha256(placed.read_bytes()).hexdigest()
    monkeypatch.setattr(
        text_worker, "Worker", lambda name, weights: worker if weights == str(placed) else None
    )
    detector = text_worker.KerasOCR(folder=tmp_path, sha256=checksum)
    assert detector.versions["tf-keras"] and detector.versions["keras-ocr"]
    clean, found = tr.remove_text(film(60, 48), detector)
    assert found.mask.shape == clean.shape == (60, 48) and isinstance(found.boxes, list)
    assert np.array_equal(found.mask, td.line_mask(found.boxes, (60, 48)))


# --- Scores -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory):
    from mura_course.radiographs.dataset import recipe

    root = tmp_path_factory.mktemp("demo")
    made = {"recipe": recipe(), "studies": 60, "seed": 3, "long_side": 160}
    (root / "manifest.json").write_text(json.dumps(made))
    return root


def test_known_films_are_the_data_sets_own(demo_root):
    from mura_course.radiographs import dataset, studies

    study = studies.plan(60, 3)[2]
    stored = {
        path: (shot, row) for path, shot, row in studies.film_study(study, 3, 160, dataset.bone_cache())
    }
    twins = dataset.text_free_twins(demo_root, list(stored))
    films = list(text_scores.known_films(demo_root, list(stored)))
    assert [f.path for f in films] == list(stored)
    for f in films:
        shot, row = stored[f.path]
        image, twin = (a if a.ndim == 2 else a[..., 0] for a in (shot.image, twins[f.path]))
        assert np.array_equal(f.image, image) and np.array_equal(f.twin, twin)
        assert json.loads(row["text_boxes"]) == [list(t) for t in f.texts] and f.patient == study.patient
        for _, x0, y0, x1, y1 in f.texts:
            assert f.text[y0 : y1 + 1, x0 : x1 + 1].any()
        assert 0.03 < f.bone.mean() < 0.7 and f.twin[f.bone].mean() > f.twin[~f.bone].mean()
    (demo_root / "other").mkdir()
    with pytest.raises(DataError, match="holds no demo data of this version"):
        next(text_scores.known_films(demo_root / "other", list(stored)))


def known(path, patient, seed, bone=None):
    plain = film(80, 60, seed)
    image, _ = write_on(plain, "L", (4, 20), 0.5, thick=1)
    area = np.zeros(plain.shape, bool)
    area[:, 20:40] = True
    return text_scores.KnownFilm(path, patient, image, plain, area, ~area, [("L", 4, 8, 14, 22)])


def test_scores_are_what_they_say():
    f = known("a", 1, 0)
    half = f.text & (np.cumsum(f.text).reshape(f.text.shape) % 2 == 0)
    half[50, 25:30] = half[50, 50:54] = True
    clean = np.where(half, f.twin, f.image)
    counts = text_scores.score(f, td.Found([], half), clean)
    assert counts["text removed"] / counts["text"] == pytest.approx(0.5, abs=0.02)
    assert (counts["bone touched"], counts["metal touched"], counts["film touched"]) == (5, 4, 9)
    assert counts["left"] < 0.6 * counts["contrast"] and counts["side letter"] == 1
    perfect = text_scores.score(f, td.Found([], f.text), f.twin)
    assert perfect["left"] == 0 and perfect["ssim after"] == 1 and perfect["square after"] == 0
    assert perfect["side letter found"] == 1 and perfect["film touched"] == 0
    nothing = text_scores.score(f, td.Found([], np.zeros_like(half)), f.image)
    assert nothing["side letter found"] == 0 and nothing["left"] == nothing["contrast"]


def test_the_summary_adds_up_and_its_interval_is_over_patients():
    rows = []
    for number in range(12):
        f = known(str(number), number // 3, number)
        mask = f.text if number < 6 else np.zeros_like(f.text)  # patients 0 and 1 right, 2 and 3 wrong
        rows.append(text_scores.score(f, td.Found([], mask), np.where(mask, f.twin, f.image)))
    scores = pd.DataFrame(rows)
    table = text_scores.summary(scores, samples=500)
    removed = table.loc["text removed"]
    assert removed["value"] == pytest.approx(scores["text removed"].sum() / scores["text"].sum())
    assert removed["low"] == 0 and removed["high"] == 1  # four patients, not twelve films
    assert removed["low"] <= removed["value"] <= removed["high"]
    error = scores["square after"].sum() / scores["their pixels"].sum()
    psnr = table.loc["psnr after"]
    assert psnr["value"] == pytest.approx(10 * np.log10(255**2 / error)) and psnr["low"] <= psnr["value"]
    assert table.loc["ssim after", "value"] == pytest.approx(scores["ssim after"].mean())
    assert "date found" not in table.index and table.loc["side letter found", "n"] == 12
    pd.testing.assert_frame_equal(
        table, text_scores.summary(scores.sample(frac=1, random_state=0), samples=500)
    )


def test_structural_similarity_agrees_with_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a = film(seed=1)
    b = cv2.GaussianBlur(write_on(a, "TEXT")[0], (0, 0), 1.5)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert text_scores.ssim(a, b) == pytest.approx(metrics.structural_similarity(a, b, **options), abs=1e-6)
    assert text_scores.ssim(a, a) == 1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("L", "side letter"),
        ("R AP", "side letter and more"),
        ("04/11/2009", "date"),
        ("POST", "word"),
        ("LEFT", "word"),
    ],
)
def test_kinds_of_marker(text, kind):
    assert text_scores.kind(text) == kind
