"""Runs: fit once, go on after a kill, load ever after.

Writes only below its root, `MURA_RUNS` or else ``<cache folder>/runs``, through `disk`. Imports no framework:
each framework's room registers with `save_model` how its models are saved, and loads them itself. A run is

    <root>/<data>-<fingerprint>/<profile>/<name>-<hash of config and weights>/
        run.json  history.csv  predictions.csv  the model's file

whole or absent. While it is made there is a folder ``<run>.partial``, the working folder of `fit`, which
survives a kill. The setup chapter explains where runs lie and how to delete one.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
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

from . import __version__, data, disk, metrics, paths, profiles
from .errors import MuraError, PredictionsError, RunError, printable

VARIABLE = "MURA_RUNS"
IDENTITY = ("name", "config", "data", "fingerprint", "is_demo", "profile", "weights")
RESULT = ("metrics", "epochs", "seconds", "device", "versions", "model", "files", "finished")
LIBRARIES = ("keras", "tensorflow", "torch", "torchvision", "lightning", "numpy", "pandas", "sklearn", "cv2")

# pandas 3 reads floats exactly by itself, and warns when it is asked to.
EXACTLY: dict[str, Any] = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run, as `fit_or_load` and `load` return it.

    Attributes
    ----------
    folder : Path
        Where it lies.
    info : dict
        What run.json holds: config, data, fingerprint, is_demo, profile, weights, versions, device, seconds,
        epochs, metrics, files, expected_scale, architecture, finished.
    history : DataFrame
        One row an epoch: `epoch` from 1, `loss`, `accuracy`, `auc`, ..., the same with ``val_`` on dev.
    predictions : DataFrame
        Columns of the index and `probability`.
    was_trained_now : bool
        Whether this call trained it, or found it.
    """

    folder: Path
    info: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame
    was_trained_now: bool = False

    def model_file(self) -> Path:
        """The saved model's file, its digest checked; RunError where there is none or it was changed."""
        if self.info["model"] is None:
            raise RunError(f"The run {self.folder} has no saved model.")
        with _damage_named(self.folder):
            return _verified(self.folder, self.info, self.info["model"])

    def describe(self) -> str:
        """One sentence for a chapter: trained now or earlier, on which data, from which weights, how long."""
        info = self.info
        how = (
            "trained now" if self.was_trained_now else f"loaded, not trained again ({info['finished'][:10]})"
        )
        source = f"{info['data']} (synthetic films, not MURA)" if info["is_demo"] else info["data"]
        epochs = f"{info['epochs']} epoch{'s' * (info['epochs'] != 1)} in " if info["epochs"] else ""
        cost = f"{epochs}{duration(info['seconds'])} on {info['device']}"
        start = f"data {source}, profile {info['profile']}, {info['weights']} weights"
        return f"Run {info['name']}: {how}; {start}; {cost}."

    def __repr__(self) -> str:
        return f"<{self.describe()}>"


def fit_or_load(
    name: str,
    config: dict[str, Any],
    fit: Callable[[Path], tuple[Any, pd.DataFrame | None, pd.DataFrame]],
    index: pd.DataFrame | None = None,
    profile: profiles.Profile | None = None,
    weights: str = "random",
    root: str | Path | None = None,
) -> Run:
    """Find the finished run of this name, config and weights on this data and profile, or make it by `fit`.

    Parameters
    ----------
    name : str
        Letters, digits, "-" and "_".
    config : dict
        All that changes the result, as plain JSON values (`Recipe.config`).
    fit : callable
        ``fit(workdir) -> (model, history, predictions)``, called only where there is no such run. The model
        is None or of a class that `save_model` knows; the history has a row an epoch, or is None; the
        predictions have the index's columns and `probability`. What `fit` leaves in `workdir` survives a
        kill, and the next call gets the same folder. A second process that asks for the run waits, then loads.
    index, profile : optional
        As `data.load_index` and `profiles.current` return them, which is also the default.
    weights : str
        Where the initial weights came from: "random" or "imagenet". Part of the run's identity.
    root : path, optional
        The folder of all runs; by default ``MURA_RUNS``, else below the cache folder.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        A config that is not JSON, a folder of another run, damaged files.
    PredictionsError
        Predictions that cannot be scored.
    DiskError
        No room or no permission to write.
    """
    index = data.load_index() if index is None else index
    profile = profile or profiles.current(index)
    identity = _identity(name, config, index, profile, weights)
    folder, made = _folder(identity, root), False
    if not (folder / "run.json").exists():
        with disk.lock(folder, VARIABLE):
            if not (folder / "run.json").exists():  # unless the process that we waited for has made it
                _make(folder, identity, fit, profile.bootstrap_samples)
                made = True
    shutil.rmtree(_partial(folder), ignore_errors=True)  # a kill after the renaming leaves it
    return _load(folder, identity, was_trained_now=made)


def load(folder: str | Path, index: pd.DataFrame | None = None) -> Run:
    """The finished run in `folder`; with `index`, RunError unless the run was made on exactly these data."""
    return _load(Path(folder), {} if index is None else _data_identity(index))


@functools.singledispatch
def save_model(model: Any, folder: Path) -> str | None:
    """Save a model into `folder` and return the file's name; None has no file.

    ``keras_tools.models`` and ``torch_tools.models`` register their frameworks' classes when imported.
    RunError for a class that nobody registered.
    """
    if model is None:
        return None
    raise RunError(
        f"fit returned a {type(model).__name__}, which cannot be saved. Return a Keras model, a torch module or "
        "None, and import mura_course.keras_tools.models or mura_course.torch_tools.models before."
    )


def list_runs(root: str | Path | None = None) -> pd.DataFrame:
    """List the runs below `root`, a row each.

    Columns: `run` (its folder below the root), `state` ("finished", "interrupted", "unreadable"), `name`,
    `data`, `profile`, `weights`, `epochs`, `seconds`, `finished`, and the scores on the test set:
    `image_accuracy`, `image_auroc`, `image_kappa`, `study_accuracy`, ...
    """
    root, rows = _root(root), []
    for file in sorted([*root.glob("*/*/[!.]*/run.json"), *root.glob("*/*/*.partial/interrupted.json")]):
        state = "finished" if file.name == "run.json" else "interrupted"
        try:
            row = _flat(_read_info(file))
        except MuraError:
            row, state = {}, "unreadable"
        rows.append(row | {"run": str(file.parent.relative_to(root)), "state": state})
    columns = ["run", "state", "name", "data", "profile", "weights", "epochs", "seconds", "finished"]
    scores = [(level, metric) for level in ("image", "study") for metric in ("accuracy", "auroc", "kappa")]
    table = pd.DataFrame(rows, columns=columns + [f"metrics.test.{level}.{m}.value" for level, m in scores])
    table.columns = columns + ["_".join(score) for score in scores]
    return table.map(lambda cell: printable(cell) if isinstance(cell, str) else cell)


def diff(a: str | Path, b: str | Path) -> pd.DataFrame:
    """Compare two runs, or two roots of runs (before and after a change, say).

    Returns
    -------
    DataFrame
        A row for each value of run.json that differs: `run`, `item` ("config.epochs",
        "metrics.test.image.auroc.value"), `a`, `b` (None where there is no such item), `change` (b - a, of
        numbers), `low` and `high` (a's 95 % interval, of metrics). Runs are paired by data, profile, name and
        config; two single runs in any case. A run without a partner is one row, item "run".

    Raises
    ------
    RunError
        `a` or `b` holds no finished run.
    DiskError
        A run.json is damaged.
    """
    old, new = _items(a), _items(b)
    if len(old) == len(new) == 1:
        new = dict(zip(old, new.values(), strict=True))
    rows = []
    for run in sorted(old.keys() | new.keys()):
        x, y = old.get(run), new.get(run)
        if x is None or y is None:
            x, y = ({"run": "absent" if items is None else "present"} for items in (x, y))
        for item in sorted(x.keys() | y.keys()):
            ends = (x.get(item.removesuffix("value") + end) for end in ("low", "high"))
            if x.get(item) != y.get(item) and not item.endswith((".low", ".high")):
                rows.append([run, item, x.get(item), y.get(item), *ends])
    table = pd.DataFrame(rows, columns=["run", "item", "a", "b", "low", "high"], dtype=object)
    numbers = table[["a", "b"]].map(lambda value: value if isinstance(value, (int, float)) else None)
    table.insert(4, "change", numbers.astype(float).diff(axis=1)["b"])
    return table


def duration(seconds: float) -> str:
    """Seconds in a reader's words: "8.3 s", "3 min 20 s", "2 h 05 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# What a run is called and where it lies ---------------------------------------------------------


def _identity(name: str, config: dict, index: pd.DataFrame, profile: profiles.Profile, weights: str) -> dict:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise RunError(f"A run's name becomes a folder: letters, digits, '-' and '_' only, not {name!r}.")
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False, default=lambda value: value.item())
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"The config of run {name} must hold numbers, text, lists, dicts only: {error}"
        ) from error
    own = {"name": name, "config": json.loads(text), "profile": profile.name, "weights": weights}
    return own | _data_identity(index)


def _data_identity(index: pd.DataFrame) -> dict[str, Any]:
    if index.empty:
        raise RunError("The index has no rows: there is nothing to train on. Which step left none?")
    if "name" not in index.attrs:
        raise RunError("The index does not say which data it is of. Pass what data.load_index() returned.")
    attrs, fingerprint = index.attrs, data.fingerprint(index)
    return {"data": attrs["name"], "is_demo": bool(attrs["is_demo"]), "fingerprint": fingerprint}


def _root(root: str | Path | None) -> Path:
    return paths.absolute(root or os.environ.get(VARIABLE) or paths.cache_dir() / "runs")


def _folder(identity: dict, root: str | Path | None) -> Path:
    source = json.dumps([identity["config"], identity["weights"]], sort_keys=True)
    key = hashlib.sha256(source.encode()).hexdigest()[:8]
    data_folder = f"{identity['data']}-{identity['fingerprint'][:8]}"
    return _root(root) / data_folder / identity["profile"] / f"{identity['name']}-{key}"


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


# Making one -------------------------------------------------------------------------------------


def _make(folder: Path, identity: dict, fit: Callable, samples: int) -> None:
    """Call `fit` and write what it returns; the caller holds the lock."""
    if folder.exists():
        raise RunError(f"{folder} exists but holds no run.json: it is no finished run. Delete it first.")
    if _partial(folder).exists():
        print(f"Run {identity['name']} was interrupted earlier: going on.")
    workdir = disk.workdir(_partial(folder), VARIABLE)
    disk.write_json(workdir / "interrupted.json", identity, VARIABLE)
    start = time.perf_counter()
    result = fit(workdir)
    if not isinstance(result, tuple) or len(result) != 3:
        raise RunError("fit(workdir) must return three things: (model, history, predictions).")
    model, history, predictions = result
    if missing := [column for column in ("path", "split") if column not in predictions]:
        raise PredictionsError(f"The predictions lack the index column(s) {', '.join(missing)}.")
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


def _write(folder: Path, info: dict, model: Any, history: pd.DataFrame, predictions: pd.DataFrame) -> None:
    with disk.atomic(folder, VARIABLE) as new:
        new.mkdir()
        history.to_csv(new / "history.csv", index=False)
        predictions.to_csv(new / "predictions.csv", index=False)
        info["model"] = save_model(model, new)
        files = sorted(new.iterdir())
        info["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": disk.digest(f)} for f in files}
        info["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        disk.write_json(new / "run.json", info, VARIABLE)


def _scores(predictions: pd.DataFrame, samples: int) -> dict:
    """{split: {level: {metric: {value, low, high}}}} over all body parts; undefined (NaN) becomes null."""
    levels = {"image": metrics.image_report, "study": metrics.study_report}
    scores: dict = {}
    for split, rows in metrics.check(predictions).groupby("split", observed=True):
        for level, report in levels.items():
            overall = report(rows, samples=samples).loc["OVERALL"]
            table = {count: int(overall[count, ""]) for count in ("n", "patients", "positives")}
            for metric in metrics.METRICS:
                found = overall[metric][["value", "low", "high"]].items()
                table[metric] = {key: None if math.isnan(number) else number for key, number in found}
            scores.setdefault(str(split), {})[level] = table
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
    if tensorflow is not None and gpus:
        return tensorflow.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores"


# Reading one ------------------------------------------------------------------------------------


def _load(folder: Path, expected: dict, was_trained_now: bool = False) -> Run:
    info = _read_info(folder / "run.json")
    for key, value in expected.items():
        if info[key] != value:
            raise RunError(
                f"The run in {folder} is another one: its {key} is {info[key]!r}, not {value!r}. "
                "Its scores would not be those of these data. Delete or move the folder to train anew."
            )
    with _damage_named(folder):
        if info["model"]:
            _verified(folder, info, info["model"], thoroughly=False)
        tables = [_verified(folder, info, f"{name}.csv") for name in ("history", "predictions")]
        history, predictions = (pd.read_csv(table, **EXACTLY) for table in tables)
        predictions["body_part"] = pd.Categorical(predictions["body_part"], data.BODY_PARTS)
        for table in (history, predictions):
            table.attrs = {"run": info["name"]} | {
                key: info[key] for key in metrics.PROVENANCE if key in info
            }
        run = Run(folder, info, history, predictions, was_trained_now)
        run.describe()  # reads what a page reads
        return run


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn what a damaged file makes Python raise into one error that names the folder."""
    try:
        yield
    except MuraError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise RunError(f"The run in {folder} is damaged ({error!r}). Delete it to train anew.") from error


def _read_info(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise RunError(f"There is no run in {file.parent}: {file.name} is missing.")
    info = disk.read_json(file, f"Delete {file.parent} to train anew.")
    needed = IDENTITY + (RESULT if file.name == "run.json" else ())
    if missing := [key for key in needed if key not in info]:
        raise RunError(f"{file} lacks {', '.join(missing)}. Delete {file.parent} to train anew.")
    return info


def _verified(folder: Path, info: dict, name: str, thoroughly: bool = True) -> Path:
    """The file's path; RunError unless it has the size, and `thoroughly` the hash, it was written with."""
    path, noted = folder / name, info["files"][name]
    if not path.is_file():
        found = "is missing"
    elif path.stat().st_size != noted["bytes"]:
        found = f"has {path.stat().st_size:,} bytes instead of {noted['bytes']:,}"
    elif thoroughly and disk.digest(path) != noted["sha256"]:
        found = "was changed after the run"
    else:
        return path
    raise RunError(f"{path} {found}. The run cannot be trusted: delete the folder {folder} to train anew.")


def _items(place: str | Path) -> dict[str, dict]:
    """{data/profile/run: {item: value}} of one run folder, or of all finished runs below a root."""
    single, items = Path(place) / "run.json", {}
    for file in [single] if single.exists() else Path(place).glob("*/*/[!.]*/run.json"):
        info = {key: value for key, value in _read_info(file).items() if key not in ("files", "finished")}
        items[f"{info['data']}/{info['profile']}/{file.parent.name}"] = _flat(info)
    if not items:
        raise RunError(f"{place} holds no finished run: give a run's folder or a folder of runs.")
    return items


def _flat(value: Any, item: str = "") -> dict[str, Any]:
    """{"config.epochs": 8, "metrics.test.image.auroc.value": 0.75, ...} of nested dicts and lists."""
    if not isinstance(value, dict | list):
        return {item: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in pairs for k, v in _flat(inner, f"{item}.{key}".lstrip(".")).items()}
