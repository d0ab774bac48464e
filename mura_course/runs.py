"""Runs: fit once, resume after a kill, load ever after.

Writes only below its root, `MURA_RUNS` or else `<cache folder>/runs`; imports no deep-learning framework, but
knows how to save the models of those already imported. A run is a folder,

    <root>/<data>-<fingerprint>/<profile>/<name>-<hash of config and weights>/
        run.json  history.csv  predictions.csv  model.keras or model.pt

written beside and then renamed: whole or absent. Until then there is `<folder>.partial/`, the working folder
of `fit`, which survives a kill. The setup chapter explains where runs lie and how to delete one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import __version__, data, metrics, profiles
from .errors import MuraError

IDENTITY = ("name", "config", "data", "fingerprint", "is_demo", "profile", "weights")
LIBRARIES = ("keras", "tensorflow", "torch", "torchvision", "lightning", "numpy", "pandas", "sklearn", "cv2")

# pandas 3 reads floats exactly by itself, and warns when it is asked to.
_EXACTLY = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}


class RunError(MuraError, ValueError):
    """A run that cannot be made, read or trusted; the message names the folder and the remedy."""


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run, as `fit_or_load` and `load` return it.

    folder: where it lies. info: what run.json holds. history: one row per epoch (`epoch` from 1, `loss`,
    `accuracy`, `auc`, `kappa`, the same with `val_` on the development set, `learning_rate`, `seconds`).
    predictions: index columns + `probability`. was_trained_now: whether this call trained it, or found it.
    """

    folder: Path
    info: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame
    was_trained_now: bool = False

    @property
    def model_path(self) -> Path | None:
        """The saved model, None where the run has none (an ensemble, say)."""
        return self.folder / self.info["model"] if self.info["model"] else None

    def load_model(self, into=None):
        """The trained model: a Keras model, a model of `torch_models`, or any torch module `into`, filled.

        Raises RunError where the file is not what the run wrote, is no model of this framework version, or is
        of another model than `into`.
        """
        if self.model_path is None:
            raise RunError(f"The run {self.folder} has no saved model.")
        _verify(self.folder, self.info, self.model_path.name)
        if self.model_path.suffix == ".pt":
            return self._fill(into)
        try:
            from . import keras_models

            return keras_models.load(self.model_path, self.info["expected_scale"])
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise RunError(
                f"{self.model_path} is whole but cannot be loaded with the libraries installed here (it was "
                f"saved with {self.info['versions']}): {error}. Delete {self.folder} to train it again."
            ) from error

    def _fill(self, module):
        import torch

        if module is None and not self.info.get("architecture"):
            raise RunError(
                f"{self.model_path} holds weights only: load_model(into=<a module like the run's>)."
            )
        if module is None:
            from . import torch_models

            module = torch_models.build(self.info["architecture"])
        try:
            module.load_state_dict(torch.load(self.model_path, map_location="cpu", weights_only=True))
        except (RuntimeError, ValueError) as error:
            other = getattr(module, "architecture", None) or type(module).__name__
            reason = str(error).strip().splitlines()[-1].strip()[:200]
            raise RunError(
                f"{self.model_path} is whole, but of another model: the run's is "
                f"{self.info.get('architecture') or 'another class'}, the module to fill is {other}. Leave "
                f"`into` out, or pass a module like the run's. ({reason})"
            ) from error
        return module

    def describe(self) -> str:
        """One sentence for a chapter: trained now or earlier, on which data, from which weights, how long."""
        info = self.info
        loaded = f"loaded, not trained again (made {info['finished'][:10]})"
        source = f"{info['data']} (synthetic films, not MURA)" if info["is_demo"] else info["data"]
        epochs = f"{info['epochs']} epoch{'s' * (info['epochs'] != 1)} in " if info["epochs"] else ""
        return (
            f"Run {info['name']}: {'trained now' if self.was_trained_now else loaded}; data {source}, "
            f"profile {info['profile']}, {info['weights']} weights; "
            f"{epochs}{duration(info['seconds'])} on {info['device']}."
        )

    def __repr__(self) -> str:
        return f"<{self.describe()}>"


def fit_or_load(
    name: str,
    config: dict,
    fit: Callable[[Path], tuple[Any, pd.DataFrame | None, pd.DataFrame]],
    index: pd.DataFrame | None = None,
    profile: profiles.Profile | None = None,
    weights: str = "random",
    root: str | Path | None = None,
) -> Run:
    """The finished run of this name, config and weights on this data and profile: found, or made by `fit`.

    name: letters, digits, "-" and "_". config: all that changes the result, as plain JSON values.
    fit(workdir) -> (model, history, predictions) is called only where there is no such run. model: a Keras
    model, a torch module, or None; history: a row per epoch, or None; predictions: index columns +
    `probability`. What `fit` leaves in `workdir` survives a kill, and the next call gets the same folder
    (`keras_models.keras_fit` resumes from it). A second process that asks for the same run waits, then loads.
    index, profile: as `data.load_index` and `profiles.current` return them, which is also the default.
    weights: where the initial weights came from, e.g. "random", "ImageNet"; part of the run's identity.

    Raises RunError: a config that is not JSON, a folder of another run, damaged files, no room to write.
    """
    index = data.load_index() if index is None else index
    profile = profile or profiles.current(index)
    identity = _identity(name, config, index, profile, weights)
    folder, made = _folder(identity, root), False
    with _disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_first_process() and not (folder / "run.json").exists():
        made = _take_part(folder, fit)
    if not (folder / "run.json").exists():
        with _lock(_beside(folder, ".lock"), f"Another process is making the run {name}; waiting for it."):
            if not (folder / "run.json").exists():  # unless the process that we waited for has made it
                _make(folder, identity, fit, profile.bootstrap_samples)
                made = True
    if is_first_process():
        shutil.rmtree(_beside(folder, ".partial"), ignore_errors=True)  # a kill after the renaming leaves it
    return _load(folder, identity, was_trained_now=made)


def load(folder: str | Path, index: pd.DataFrame | None = None) -> Run:
    """The finished run in `folder`; with `index`, RunError unless the run was made on exactly these data."""
    return _load(Path(folder), {} if index is None else _data_identity(index))


def list_runs(root: str | Path | None = None) -> pd.DataFrame:
    """One row per run below `root`, finished, interrupted or unreadable, with its scores on test."""
    root = _root(root)
    columns = ["run", "state", "name", "data", "profile", "weights", "epochs", "seconds", "finished", "split"]
    columns += [f"{level}_{m}" for level in ("image", "study") for m in ("accuracy", "auroc", "kappa")]
    rows = []
    for file in sorted([*root.glob("*/*/*/run.json"), *root.glob("*/*/*.partial/interrupted.json")]):
        if file.parent.suffix == ".new":  # left by a kill in the moment of writing
            continue
        row = {"run": str(file.parent.relative_to(root)), "state": "finished"}
        try:
            info = _read_info(file)
        except RunError:
            rows.append(row | {"state": "unreadable"})
            continue
        row |= {key: info.get(key) for key in columns[2:9]}
        scores = info.get("metrics", {})
        split = "test" if "test" in scores else next(iter(scores), None)
        for level in ("image", "study") if split else ():
            row |= {f"{level}_{m}": scores[split][level][m]["value"] for m in ("accuracy", "auroc", "kappa")}
        rows.append(row | ({"split": split} if split else {"state": "interrupted"}))
    return pd.DataFrame(rows, columns=columns)


def diff(a: str | Path, b: str | Path) -> pd.DataFrame:
    """What differs between two runs, or between two roots of runs (before and after regenerating, say).

    Returns columns `run`, `item` (`config.epochs`, `metrics.test.image.auroc`, ...), `a`, `b`, `change`
    (b - a, for numbers) and `within` (for metrics: does b lie in a's 95 % interval?). Runs are paired by
    data, profile, name and config; where only the config differs, by the rest; two single runs in any case.
    A run without a partner is one row, item "run".
    """
    rows = []
    for title, one, other in _pairs(_infos(a), _infos(b)):
        if one is None or other is None:
            rows.append({"run": title, "item": "run", "a": _present(one), "b": _present(other)})
            continue
        flat_a, flat_b = _flat(one), _flat(other)
        for item in sorted(flat_a.keys() | flat_b.keys()):
            value_a, value_b = flat_a.get(item), flat_b.get(item)
            if value_a != value_b:
                rows.append({"run": title, "item": item, "a": value_a, "b": value_b})
                if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (value_a, value_b)):
                    rows[-1] |= {"change": value_b - value_a, "within": _within(one, item, value_b)}
    return pd.DataFrame(rows, columns=["run", "item", "a", "b", "change", "within"])


def duration(seconds: float) -> str:
    """Seconds for a reader: "8.3 s", "3 min 20 s", "2 h 05 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` when the block ends well: whole or absent."""
    beside = _beside(path, ".writing")
    with _disk(path):
        yield beside
        os.replace(beside, path)


def is_first_process() -> bool:
    """False in the second and further processes of one distributed training (torch's DDP), which share a run.

    Lightning, torchrun and Slurm say in the environment which one a process is.
    """
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return not any(os.environ.get(name, "0").strip("0") for name in ranks)


def _take_part(folder: Path, fit: Callable) -> bool:
    """Train along with the first process, which holds the lock and writes; wait until it has written."""
    workdir, finished = _beside(folder, ".partial"), folder / "run.json"
    while not (workdir.exists() or finished.exists()):
        time.sleep(0.1)
    if finished.exists():
        return False
    fit(workdir)
    while not finished.exists():
        if not _beside(folder, ".lock").exists():
            raise RunError(f"The first process has left no lock beside {folder}: it trains another run.")
        time.sleep(0.1)
    return True


# What a run is called and where it lies ---------------------------------------------------------


def _identity(name: str, config: dict, index: pd.DataFrame, profile: profiles.Profile, weights: str) -> dict:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise RunError(f"A run's name becomes a folder: letters, digits, '-' and '_' only, not {name!r}.")
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False, default=lambda value: value.item())
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"The config of run {name} must hold plain values (numbers, text, lists, dicts) only: {error}"
        ) from error
    own = {"name": name, "config": json.loads(text), "profile": profile.name, "weights": weights}
    return own | _data_identity(index)


def _data_identity(index: pd.DataFrame) -> dict:
    if index.empty:
        raise RunError("The index has no rows: there is nothing to train on. Which step left none?")
    if "name" not in index.attrs:
        raise RunError("The index does not say which data it is of. Pass what data.load_index() returned.")
    return {
        "data": index.attrs["name"],
        "is_demo": bool(index.attrs["is_demo"]),
        "fingerprint": data.fingerprint(index),
    }


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("MURA_RUNS") or data.cache_dir() / "runs").expanduser()


def _folder(identity: dict, root: str | Path | None) -> Path:
    source = json.dumps([identity["config"], identity["weights"]], sort_keys=True)
    key = hashlib.sha256(source.encode()).hexdigest()[:8]
    data_folder = f"{identity['data']}-{identity['fingerprint'][:8]}"
    return _root(root) / data_folder / identity["profile"] / f"{identity['name']}-{key}"


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


# Making one -------------------------------------------------------------------------------------


def _make(folder: Path, identity: dict, fit: Callable, samples: int) -> None:
    """Call `fit` and write what it returns; the caller holds the lock."""
    if folder.exists():
        raise RunError(f"{folder} exists but holds no run.json: it is no finished run. Delete it first.")
    workdir = _beside(folder, ".partial")
    with _disk(folder):
        if workdir.exists():
            print(f"Run {identity['name']} was interrupted earlier: going on from {workdir}")
        workdir.mkdir(exist_ok=True)
        with written(workdir / "interrupted.json") as file:
            file.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    start = time.perf_counter()
    result = fit(workdir)
    if not isinstance(result, tuple) or len(result) != 3:
        raise RunError("fit(workdir) must return three things: (model, history, predictions).")
    model, history, predictions = result
    missing = [column for column in ("path", "split") if column not in predictions]
    if missing:
        raise metrics.PredictionsError(f"The predictions lack the index column(s) {', '.join(missing)}.")
    history = pd.DataFrame({"epoch": []}, dtype=int) if history is None else history
    wall = time.perf_counter() - start
    info = identity | {
        "versions": _versions(),
        "device": _device(),
        # A resumed run counts the epochs of its earlier attempts, too.
        "seconds": round(max(wall, float(history["seconds"].sum()) if "seconds" in history else 0.0), 3),
        "epochs": len(history),
        "expected_scale": getattr(model, "expected_scale", None),
        "architecture": getattr(model, "architecture", None),
        "metrics": _scores(predictions, samples),
    }
    _write(folder, info, model, history, predictions)


def _write(folder: Path, info: dict, model, history: pd.DataFrame, predictions: pd.DataFrame) -> None:
    new = _beside(folder, ".new")
    with _disk(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        history.to_csv(new / "history.csv", index=False)
        predictions.to_csv(new / "predictions.csv", index=False)
        info["model"] = _save_model(model, new)
        files = sorted(new.iterdir())
        info["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
        info["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        (new / "run.json").write_text(json.dumps(info, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(new, folder)


def _save_model(model, folder: Path) -> str | None:
    """Save by the framework that made the model: it is imported already, else there were no such model."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if model is None:
        return None
    if keras is not None and isinstance(model, keras.Model):
        model.save(folder / "model.keras")
        return "model.keras"
    if torch is not None and isinstance(model, torch.nn.Module):
        torch.save(model.state_dict(), folder / "model.pt")
        return "model.pt"
    raise RunError(f"fit returned a {type(model).__name__}, not a Keras model, a torch module or None.")


def _scores(predictions: pd.DataFrame, samples: int) -> dict:
    """{split: {level: {metric: {value, low, high}}}} over all body parts; undefined (NaN) becomes null."""
    levels = {"image": metrics.image_report, "study": metrics.study_report}
    scores: dict = {}
    for split, rows in metrics.check(predictions).groupby("split", observed=True):
        for level, report in levels.items():
            overall = report(rows, samples=samples).loc["OVERALL"]
            table = scores.setdefault(str(split), {}).setdefault(level, {})
            table |= {count: int(overall[count, ""]) for count in ("n", "patients", "positives")}
            for metric in metrics.METRICS:
                found = overall[metric][["value", "low", "high"]].items()
                table[metric] = {key: None if math.isnan(number) else number for key, number in found}
    return scores


def _versions() -> dict[str, str]:
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in LIBRARIES}
    own = {"python": platform.python_version(), "mura_course": __version__}
    return own | {name: str(version) for name, version in loaded.items() if version}


def _device() -> str:
    """The accelerator that the imported framework sees, else the processor."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    gpus = tensorflow.config.list_physical_devices("GPU") if tensorflow is not None else []
    if gpus:
        return tensorflow.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores"


@contextlib.contextmanager
def _lock(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file `path`; the kernel lets go of it when the process ends, killed or not."""
    with _disk(path):
        file = open(path, "a+b")
    with file:
        told = False
        while not _try_lock(file):
            if not told:
                print(waiting)
                told = True
            time.sleep(0.1)
        yield


def _try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        # Some network drives have no locks. One process alone is safe without.
        print(f"{file.name} cannot be locked ({error.strerror}): let only one process make this run.")
    return True


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn the disk's errors into one that names the folder and the variable to set."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write {path}: {error.strerror or error}. Make room or allow writing there, or set the "
            "environment variable MURA_RUNS to another folder."
        ) from error


# Reading one ------------------------------------------------------------------------------------


def _load(folder: Path, expected: dict, was_trained_now: bool = False) -> Run:
    info = _read_info(folder / "run.json")
    for key, value in expected.items():
        if info.get(key) != value:
            raise RunError(
                f"The run in {folder} is another one: its {key} is {info.get(key)!r}, not {value!r}. "
                "Its scores would not be those of these data. Delete or move the folder to train anew."
            )
    for name in info["files"]:
        _verify(folder, info, name, thoroughly=name.endswith(".csv"))
    history = pd.read_csv(folder / "history.csv", **_EXACTLY)
    predictions = pd.read_csv(folder / "predictions.csv", **_EXACTLY)
    predictions["body_part"] = pd.Categorical(predictions["body_part"], data.BODY_PARTS)
    for table in (history, predictions):
        table.attrs = {"run": info["name"]} | {key: info[key] for key in metrics.PROVENANCE if key in info}
    return Run(folder, info, history, predictions, was_trained_now)


def _read_info(file: Path) -> dict:
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"There is no run in {file.parent}: {file.name} is missing.") from error
    except (ValueError, OSError) as error:
        raise RunError(f"{file} cannot be read ({error}). Delete {file.parent} to train anew.") from error
    if not isinstance(info, dict) or not set(IDENTITY) <= info.keys():
        raise RunError(f"{file} is not a run's. Delete {file.parent} to train anew.")
    return info


def _verify(folder: Path, info: dict, name: str, thoroughly: bool = True) -> None:
    """RunError unless the file has the size, and `thoroughly` the hash, that it was written with."""
    path, noted = folder / name, info["files"][name]
    if not path.is_file():
        found = "is missing"
    elif path.stat().st_size != noted["bytes"]:
        found = f"has {path.stat().st_size:,} bytes instead of {noted['bytes']:,}"
    elif thoroughly and _sha256(path) != noted["sha256"]:
        found = "was changed after the run"
    else:
        return
    raise RunError(f"{path} {found}. The run cannot be trusted: delete the folder {folder} to train anew.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Comparing --------------------------------------------------------------------------------------


def _infos(place: str | Path) -> dict[tuple[str, str], dict]:
    """{(data/profile/name, hash): info} of one run folder, or of all finished runs below a root."""
    place = Path(place)
    if not place.is_dir():
        raise RunError(f"There is no folder {place}: give a run's folder or a folder of runs.")
    files = [place / "run.json"] if (place / "run.json").exists() else sorted(place.glob("*/*/*/run.json"))
    infos = {}
    for file in files:
        if file.parent.suffix != ".new":
            info = _read_info(file)
            title = f"{info['data']}/{info['profile']}/{info['name']}"
            infos[title, file.parent.name.rpartition("-")[2]] = info
    if not infos:
        raise RunError(f"{place} holds no finished run: give a run's folder or a folder of runs.")
    return infos


def _pairs(a: dict, b: dict) -> Iterator[tuple[str, dict | None, dict | None]]:
    if len(a) == len(b) == 1:  # two single runs are compared whatever they are called
        (title, _), (other, _) = *a, *b
        yield title if title == other else f"{title} | {other}", *a.values(), *b.values()
        return
    for title in sorted({title for title, _ in a.keys() | b.keys()}):
        left = {key: info for (t, key), info in a.items() if t == title}
        right = {key: info for (t, key), info in b.items() if t == title}
        for key in sorted(left.keys() & right.keys()):
            yield f"{title}-{key}", left.pop(key), right.pop(key)
        if len(left) == len(right) == 1:
            yield title, *left.values(), *right.values()
        else:
            yield from ((f"{title}-{key}", info, None) for key, info in left.items())
            yield from ((f"{title}-{key}", None, info) for key, info in right.items())


def _flat(info: dict, prefix: str = "") -> dict[str, Any]:
    """{"config.epochs": 8, "metrics.test.image.auroc": 0.75, ...}, without what differs in any two runs."""
    flat = {}
    for key, value in info.items():
        if prefix + key in ("files", "finished") or prefix.startswith("metrics.") and key in ("low", "high"):
            continue
        item = (prefix + key).removesuffix(".value") if prefix.startswith("metrics.") else prefix + key
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {item: value}
    return flat


def _within(info: dict, item: str, value: float) -> bool | None:
    interval: Any = info
    for key in item.split("."):
        interval = interval.get(key) if isinstance(interval, dict) else None
    if not isinstance(interval, dict) or interval.get("low") is None:
        return None
    return interval["low"] <= value <= interval["high"]


def _present(info: dict | None) -> str:
    return "absent" if info is None else "present"
