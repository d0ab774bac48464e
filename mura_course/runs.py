"""Runs: fit once, go on after a kill, load ever after.

Writes only below its root, `MURA_RUNS` or else ``<cache folder>/runs``, through `disk`. Imports no framework:
each framework's room registers with `save_model` how its models are saved, and loads them itself. A run is

    <root>/<data>-<fingerprint>/<profile>/<name>-<hash of config and weights>/
        run.json  history.csv  predictions.csv  the model's file

whole or absent. While it is made there is a folder ``<run>.partial``, the working folder of `fit`, which
survives a kill. The setup chapter explains where runs lie and how to delete one.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import __version__, data, disk, metrics, paths, profiles
from .errors import MuraError, RunError

VARIABLE = "MURA_RUNS"
IDENTITY = ("name", "config", "data", "fingerprint", "is_demo", "profile", "weights")
KEYS = (*IDENTITY, "metrics", "epochs", "seconds", "device", "versions", "model", "files", "finished")
LIBRARIES = ("keras", "tensorflow", "torch", "torchvision", "lightning", "numpy", "pandas", "sklearn", "cv2")


# pandas 3 reads floats exactly by itself, and warns when it is asked to.
EXACTLY: dict[str, Any] = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}


@dataclass(frozen=True, eq=False)
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
        """Return the saved model's file, its digest checked; RunError where it is none or changed."""
        if self.info["model"] is None:
            raise RunError(f"The run {self.folder} has no saved model.")
        return _verified(self.folder, self.info, self.info["model"])

    def describe(self) -> str:
        """One sentence for a chapter: trained now or earlier, on which data, from which weights, how long."""
        info = self.info
        made = "trained now" if self.was_trained_now else f"loaded (made {info['finished'][:10]})"
        source = info["data"] + " (synthetic films, not MURA)" * info["is_demo"]
        seconds, plural = info["seconds"], "s" * (info["epochs"] != 1)
        took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return (
            f"Run {info['name']}: {made}; data {source}, profile {info['profile']}, "
            f"{info['weights']} weights; {info['epochs']} epoch{plural} in {took} on {info['device']}."
        )


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
        kill, and the next call gets the same folder. A second process that asks for the run waits, then loads
        it.
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
    workdir = folder.with_name(f"{folder.name}.partial")
    if not (folder / "run.json").exists():
        with disk.lock(folder, VARIABLE):
            if not (folder / "run.json").exists():  # unless the process that we waited for has made it
                _make(folder, workdir, identity, fit, profile.bootstrap_samples)
                made = True
    shutil.rmtree(workdir, ignore_errors=True)  # a kill after the renaming leaves it
    return _load(folder, identity, was_trained_now=made)


def load(folder: str | Path, index: pd.DataFrame | None = None) -> Run:
    """Load the finished run in `folder`; with `index`, RunError unless it was made on exactly these data."""
    return _load(Path(folder), {} if index is None else _data_identity(index))


@functools.singledispatch
def save_model(model: Any, folder: Path) -> str | None:
    """Save a model into `folder` and return the file's name; None has no file.

    ``keras_tools.models`` and ``torch_tools.models`` register their frameworks' classes when imported.
    RunError for a class that nobody registered.
    """
    if model is None:
        return None
    raise RunError(f"Unknown model {type(model).__name__}: import keras_tools.models or torch_tools.models.")


def list_runs(root: str | Path | None = None) -> pd.DataFrame:
    """List the runs below `root`, a row each.

    Columns: `run` (its folder below the root), `state` ("finished", "interrupted", "unreadable"), `data`,
    `profile`, `weights`, `epochs`, `seconds`, `finished`, and the scores on the test set, by image:
    `accuracy`, `auroc`, `kappa`.
    """
    root, rows = _root(root), []
    for folder in sorted(entry for entry in root.glob("*/*/[!.]*") if entry.is_dir()):
        row: dict[str, Any] = {"run": str(folder.relative_to(root)), "state": "interrupted"}
        if folder.suffix != ".partial":
            try:
                row |= _read_info(folder) | {"state": "finished"}
            except MuraError:
                row["state"] = "unreadable"
        rows.append(row)
    scores = {f"metrics.test.image.{name}.value": name for name in ("accuracy", "auroc", "kappa")}
    shown = ["run", "state", "data", "profile", "weights", "epochs", "seconds", "finished", *scores]
    return pd.json_normalize(rows).reindex(columns=shown).rename(columns=scores)


def diff(a: str | Path, b: str | Path) -> pd.DataFrame:
    """Compare two runs, or two folders of runs (before and after all results were made anew, say).

    Parameters
    ----------
    a, b : path
        Folders of a run each, or of many.

    Returns
    -------
    DataFrame
        Indexed by run and item of run.json ("config.epochs", "metrics.test.image.auroc.value"): the values
        `a` and `b` of each that differs. Runs are paired by data, profile, name and config, two single runs
        in any case; a run without a partner is one row, its item "state".

    Raises
    ------
    DiskError, RunError
        A folder holds no finished run, or a damaged one.
    """
    old, new = _values(a), _values(b)
    if len(old) == len(new) == 1:
        new.index = old.index
    table = pd.DataFrame({"a": old.stack(), "b": new.stack()}, dtype=object).rename_axis(["run", "item"])
    run, item = (table.index.get_level_values(level) for level in ("run", "item"))
    paired = run.isin(old.index.intersection(new.index))
    said = ~item.str.contains(r"^files\.|^finished$|\.low$|\.high$") & (paired | (item == "state"))
    return table[table["a"].ne(table["b"]) & said]


def _values(place: str | Path) -> pd.DataFrame:
    """Make a row of each finished run, `place` or all below it; a column of each value in run.json."""
    place = Path(place)
    single = (place / "run.json").exists()
    folders = [place] if single else [file.parent for file in place.glob("*/*/[!.]*/run.json")]
    if not folders:
        raise RunError(f"{place} holds no finished run: give a run's folder, or a folder of runs.")
    infos = [_read_info(folder) | {"state": "finished"} for folder in folders]
    names = ["/".join(folder.parts[-3:]) for folder in folders]
    return pd.json_normalize(infos).astype(object).set_axis(names, axis=0)


# What a run is called and where it lies ---------------------------------------------------------


def _identity(name: str, config: dict, index: pd.DataFrame, profile: profiles.Profile, weights: str) -> dict:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise RunError(f"A run's name becomes a folder: letters, digits, '-' and '_' only, not {name!r}.")
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False, default=lambda value: value.item())
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(f"A run's config must hold numbers, text, lists, dicts only: {error}") from error
    own = {"name": name, "config": json.loads(text), "profile": profile.name, "weights": weights}
    return own | _data_identity(index)


def _data_identity(index: pd.DataFrame) -> dict[str, Any]:
    if index.empty:
        raise RunError("The index has no rows: there is nothing to train on.")
    fingerprint = data.fingerprint(index)
    return {"data": index.attrs["name"], "is_demo": index.attrs["is_demo"], "fingerprint": fingerprint}


def _root(root: str | Path | None) -> Path:
    return paths.absolute(root or os.environ.get(VARIABLE) or paths.cache_dir() / "runs")


def _folder(identity: dict, root: str | Path | None) -> Path:
    source = json.dumps([identity["config"], identity["weights"]], sort_keys=True)
    key = hashlib.sha256(source.encode()).hexdigest()[:8]
    data_folder = f"{identity['data']}-{identity['fingerprint'][:8]}"
    return _root(root) / data_folder / identity["profile"] / f"{identity['name']}-{key}"


# Making one -------------------------------------------------------------------------------------


def _make(folder: Path, workdir: Path, identity: dict, fit: Callable, samples: int) -> None:
    """Call `fit` and write what it returns; the caller holds the lock."""
    if folder.exists():
        raise RunError(f"{folder} exists but holds no run.json: it is no finished run. Delete it first.")
    if workdir.exists():
        print(f"Run {identity['name']} was interrupted earlier: going on.")
    disk.workdir(workdir, VARIABLE)
    start = time.perf_counter()
    result = fit(workdir)
    if not isinstance(result, tuple) or len(result) != 3:
        raise RunError("fit(workdir) must return three things: (model, history, predictions).")
    model, history, predictions = result
    history = pd.DataFrame({"epoch": []}, dtype=int) if history is None else history
    # A resumed run counts the epochs of its earlier attempts, too.
    seconds = max(time.perf_counter() - start, float(history.get("seconds", pd.Series(0.0)).sum()))
    versions = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    info = identity | {
        "versions": versions | {"python": platform.python_version(), "mura_course": __version__},
        "device": _device(),
        "seconds": round(seconds, 3),
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


def _scores(predictions: pd.DataFrame, samples: int) -> dict[str, Any]:
    """{split: {level: {metric: {value, low, high}}}} over all body parts; undefined (NaN) becomes null."""
    scores: dict[str, Any] = {}
    levels = {"image": metrics.image_report, "study": metrics.study_report}
    for split, rows in metrics.check(predictions, ("path", "split")).groupby("split", observed=True):
        for level, report in levels.items():
            overall = report(rows, samples=samples).loc[["OVERALL"]].astype(object)
            overall = overall.where(overall.notna(), None)
            counts = {count: int(overall[count].item()) for count in metrics.COUNTS[1:]}
            found = {metric: overall[metric].iloc[0].to_dict() for metric in metrics.METRICS}
            scores.setdefault(str(split), {})[level] = counts | found
    return scores


def _device() -> str:
    """Name the accelerator that the imported framework sees, else the processor."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    if torch and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if tensorflow and (gpus := tensorflow.config.list_physical_devices("GPU")):
        return tensorflow.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return f"CPU, {paths.cores()} cores"


# Reading one ------------------------------------------------------------------------------------


def _load(folder: Path, expected: dict, was_trained_now: bool = False) -> Run:
    info = _read_info(folder)
    if other := ", ".join(key for key, value in expected.items() if info.get(key) != value):
        raise RunError(f"{folder} holds another run: {other} differ. Delete or move it to train anew.")
    try:
        files = [_verified(folder, info, f"{name}.csv") for name in ("history", "predictions")]
        history, predictions = (pd.read_csv(file, **EXACTLY) for file in files)
        predictions["body_part"] = pd.Categorical(predictions["body_part"], data.BODY_PARTS)
        for table in (history, predictions):
            table.attrs = {"run": info["name"]} | {key: info[key] for key in IDENTITY[2:]}
        run = Run(folder, info, history, predictions, was_trained_now)
        run.describe()  # reads what a page reads
    except MuraError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise RunError(f"The run in {folder} is damaged ({error!r}). Delete it to train anew.") from error
    return run


def _read_info(folder: Path) -> dict[str, Any]:
    info = disk.read_json(folder / "run.json", f"Delete {folder} to train anew.")
    if missing := ", ".join(key for key in KEYS if key not in info):
        raise RunError(f"{folder / 'run.json'} lacks {missing}. Delete {folder} to train anew.")
    return info


def _verified(folder: Path, info: dict, name: str) -> Path:
    """Return the file's path; RunError unless its content is what it was."""
    path = folder / name
    if not path.is_file() or disk.digest(path) != info["files"][name]["sha256"]:
        raise RunError(f"{path} is missing or was changed after the run. Delete {folder} to train anew.")
    return path
