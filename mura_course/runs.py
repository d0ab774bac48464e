"""Runs: fit once, go on after a kill, load ever after.

Writes only below its root, `MURA_RUNS` or else ``<cache folder>/runs``, through `disk`. Imports no framework:
each framework's room registers with `save_model` how its models are saved, and loads them itself. The book's
own long trainings are recorded: finished runs in ``book/_runs``, which are used where they fit;
``MURA_RUNS=new`` ignores them, ``MURA_RUNS=record`` makes them. A run is

    <root>/<data>-<fingerprint>/<profile>/<name>-<hash of config and weights>/
        run.json  history.csv  predictions.csv  the model's file

whole or absent. While it is made there is a folder ``<run>.partial``, the working folder of `fit`, which
survives a kill. The setup chapter explains where runs lie and how to delete one.
"""

import contextlib
import copy
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
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from . import __version__, data, disk, metrics, paths, profiles
from .errors import MuraError, RunError, TrainingError, one_of

VARIABLE, ONLY = "MURA_RUNS", "MURA_ONLY"
LEFT_OUT = "not recorded yet, left out"
IDENTITY = ("name", "config", "fingerprint", "data", "is_demo", "profile", "weights")
KEYS = (*IDENTITY, "metrics", "epochs", "seconds", "device", "versions", "model", "files", "finished")
LIBRARIES = ("keras", "tensorflow", "torch", "torchvision", "lightning", "numpy", "pandas", "sklearn", "cv2")
COMPARED = ("keras", "tensorflow", "torch", "numpy")  # whose major version a recorded run depends on

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
    predictions, dev_predictions : DataFrame
        Of the test and of the dev images (maybe none): columns of the index and `probability`.
    was_trained_now : bool
        Whether this call trained it, or found it.
    recorded : bool
        Whether it is one of the book's recorded runs.
    """

    folder: Path
    info: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame
    dev_predictions: pd.DataFrame
    was_trained_now: bool = False
    recorded: bool = False

    def model_file(self) -> Path:
        """Return the saved model's file, its digest checked; RunError where it is none or changed."""
        if self.info["model"] is None:
            live = " It is recorded with its scores only: set MURA_RUNS=new to train it here, model and all."
            raise RunError(f"The run {self.folder} has no saved model." + live * self.recorded)
        return _verified(self.folder, self.info, self.info["model"])

    def describe(self) -> str:
        """One sentence for a chapter: recorded, trained now or loaded, on which data, how long."""
        info, day = self.info, self.info["finished"][:10]
        how = "trained now" if self.was_trained_now else f"loaded (made {day})"
        how = f"recorded on {day}" if self.recorded else how
        source = info["data"] + " (synthetic films, not MURA)" * info["is_demo"]
        start = f"data {source}, profile {info['profile']}, {info['weights']} weights"
        epochs = f"{info['epochs']} epoch{'s' * (info['epochs'] != 1)}"
        return f"Run {info['name']}: {how} on {info['device']}, in {_took(info)}; {start}; {epochs}."


def _took(info: dict[str, Any]) -> str:
    return f"{info['seconds']:.0f} s" if info["seconds"] < 100 else f"{info['seconds'] / 60:.0f} min"


def fit_or_load(
    name: str,
    config: dict[str, Any],
    fit: Callable[[Path], tuple[Any, pd.DataFrame | None, pd.DataFrame]],
    index: pd.DataFrame,
    profile: profiles.Profile,
    weights: str = "random",
    root: str | Path | None = None,
    record: str | bool = False,
) -> Run:
    """Find the finished run of this name, config and weights on this data and profile, or make it by `fit`.

    A reader's own run is found first, then a recorded one; where a recorded one of this name does not fit, a
    sentence says why.

    Parameters
    ----------
    name : str
        Letters, digits, "-" and "_".
    config : dict
        All that changes the result, as plain JSON values (`Recipe.config`).
    fit : callable
        ``fit(workdir) -> (model, history, predictions)``, called only where there is no such run. The model
        is None or of a class that `save_model` knows; the history has a row an epoch, or is None; the
        predictions, of dev and test, have the index's columns and `probability` (kept to 7 digits). What
        `fit` leaves in `workdir` survives a kill, and the next call gets the same folder. A second process
        that asks for the run waits, then loads it.
    index, profile
        As `data.load_index` (or `split_dev`) and `profiles.current` return them.
    weights : str
        Where the initial weights came from: "random" or "imagenet". Part of the run's identity.
    root : path, optional
        The folder of all runs, and no recorded ones; by default ``MURA_RUNS``, else below the cache folder.
    record : {False, "scores", "model"}
        Whether the book records this run, and with its model: a torch module's in float16.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        A config that is not JSON, a folder of another run, damaged files; with ``MURA_RUNS=record``, a run
        that is to be recorded, not there and not named by the regular expression ``MURA_ONLY``.
    TrainingError
        A model that says the same of all images.
    PredictionsError
        Predictions that cannot be scored.
    DiskError
        No room or no permission to write.
    """
    identity = _identity(name, config, index, profile, weights)
    one_of("record", record, (False, "scores", "model"), RunError)
    mode = os.environ.get(VARIABLE) if record and root is None else "new"
    folder = _folder(identity, paths.recorded_runs() if mode == "record" else root)
    workdir, made = folder.with_name(f"{folder.name}.partial"), False
    if not (folder / "run.json").exists():
        if mode not in ("new", "record") and (recorded := _recorded(identity)):
            return load(recorded, identity)
        if mode == "record" and not re.fullmatch(os.environ.get(ONLY) or ".*", name):
            raise RunError(f"Run {name}: {LEFT_OUT}. {ONLY} does not name it.")
        with disk.lock(folder, VARIABLE):
            if made := not (folder / "run.json").exists():  # else the process that we waited for has made it
                kept = record if mode == "record" else "all"
                _make(folder, workdir, identity, fit, profile.bootstrap_samples, kept)
    shutil.rmtree(workdir, ignore_errors=True)  # a kill after the renaming leaves it
    return load(folder, identity, was_trained_now=made)


@functools.singledispatch
def save_model(model: Any, folder: Path) -> str | None:
    """Save a model into `folder` and return the file's name; None has no file.

    ``keras_tools.models`` and ``torch_tools.models`` register their frameworks' classes when imported.
    RunError for a class that nobody registered.
    """
    if model is None:
        return None
    raise RunError(f"Unknown model {type(model).__name__}: import keras_tools.models or torch_tools.models.")


def diff(a: str | Path, b: str | Path) -> pd.DataFrame:
    """Compare the runs in two folders: a row for each item of run.json that differs, columns `a` and `b`.

    Items are named like "config.epochs" or "metrics.test.image.auroc.value". DiskError or RunError for a
    folder that holds no finished run, or a damaged one.
    """
    pairs = _differences(_read_info(Path(a)), _read_info(Path(b)))
    table = pd.DataFrame.from_dict(pairs, orient="index", columns=["a", "b"], dtype=object)
    return table.filter(regex=r"^(?!files\.|finished$|.*\.(low|high)$)", axis=0)


def list_runs(root: str | Path | None = None) -> pd.DataFrame:
    """List the runs below `root`, by default the reader's own and the recorded ones, a row each.

    Columns: `run` (its folder below the root), `recorded`, `state` ("finished", "interrupted", "unreadable"),
    `data`, `profile`, `weights`, `epochs`, `seconds`, `finished`, and the scores on the test set, by image:
    `accuracy`, `auroc`, `kappa`.
    """
    rows, roots = [], [_root(root)] if root else [_root(), paths.recorded_runs()]
    for folder in (folder for place in roots for folder in sorted(place.glob("*/*/[!.]*/"))):
        row: dict[str, Any] = {"run": "/".join(folder.parts[-3:]), "recorded": _is_recorded(folder)}
        try:
            row |= _read_info(folder) | {"state": "finished"}
        except MuraError:
            row["state"] = "interrupted" if folder.suffix == ".partial" else "unreadable"
        rows.append(row)
    scores = {f"metrics.test.image.{name}.value": name for name in ("accuracy", "auroc", "kappa")}
    shown = ["run", "recorded", "state", "data", "profile", "weights", "epochs", "seconds", "finished"]
    return pd.json_normalize(rows).reindex(columns=[*shown, *scores]).rename(columns=scores)


def finished(index: pd.DataFrame, profile: profiles.Profile) -> list[Run]:
    """Load all finished runs on these data in this profile, for the page of results.

    Parameters
    ----------
    index, profile
        As for `fit_or_load`.

    Returns
    -------
    list of Run
        The reader's own runs, then the recorded ones (not with ``MURA_RUNS=new``), each by name. One that
        exists twice is the reader's own, as in `fit_or_load`.

    Raises
    ------
    DiskError, RunError
        A run is damaged.
    """
    identity = _identity("any", {}, index, profile, "random")
    roots = [_root()] + [paths.recorded_runs()] * (os.environ.get(VARIABLE) != "new")
    folders = [_folder(identity, root).parent for root in roots]
    found = {file.parent.name: file.parent for f in folders[::-1] for file in f.glob("[!.]*/run.json")}
    return [load(folder) for folder in sorted(found.values(), key=lambda run: (_is_recorded(run), run.name))]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{"config.stages.0.epochs": (its value in a, in b)}, of all that differs."""
    a, b = _flat(a), _flat(b)
    pairs = {item: (a.get(item, "none"), b.get(item, "none")) for item in {**a, **b}}
    return {item: pair for item, pair in pairs.items() if pair[0] != pair[1]}


def _flat(value: Any, item: str = "") -> dict[str, Any]:
    """{"config": {"stages": [{"epochs": 5}]}} -> {"config.stages.0.epochs": 5}."""
    if not isinstance(value, dict | list):
        return {item: value}
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: v for key, inner in inside for path, v in _flat(inner, f"{item}.{key}".strip(".")).items()}


# What a run is called and where it lies ---------------------------------------------------------


def _identity(name: str, config: dict, index: pd.DataFrame, profile: profiles.Profile, weights: str) -> dict:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise RunError(f"A run's name becomes a folder: letters, digits, '-' and '_' only, not {name!r}.")
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False, default=lambda value: value.item())
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(f"A run's config must hold numbers, text, lists, dicts only: {error}") from error
    if index.empty:
        raise RunError("The index has no rows: there is nothing to train on.")
    of_data = (data.fingerprint(index), index.attrs["name"], index.attrs["is_demo"])
    values = (name, json.loads(text), *of_data, profile.name, weights)
    return dict(zip(IDENTITY, values, strict=True))


def _root(root: str | Path | None = None) -> Path:
    """Return the folder of the reader's own runs: `root`, else ``MURA_RUNS``, else in the cache folder."""
    chosen = os.environ.get(VARIABLE)
    own = None if chosen in ("new", "record") else chosen
    return paths.absolute(root or own or paths.cache_dir() / "runs")


def _folder(identity: dict, root: str | Path | None) -> Path:
    source = json.dumps([identity["config"], identity["weights"]], sort_keys=True)
    key = hashlib.sha256(source.encode()).hexdigest()[:8]
    data_folder = f"{identity['data']}-{identity['fingerprint'][:8]}"
    return _root(root) / data_folder / identity["profile"] / f"{identity['name']}-{key}"


# Recorded ones ----------------------------------------------------------------------------------


def _is_recorded(folder: Path) -> bool:
    return paths.absolute(folder).is_relative_to(paths.recorded_runs())


def _recorded(identity: dict[str, Any]) -> Path | None:
    """Find the recorded run that fits; where only others of this name and profile exist, say what differs."""
    places = paths.recorded_runs().glob(f"*/{identity['profile']}/{identity['name']}-????????/run.json")
    known = [(_unlike(_read_info(place.parent), identity), place.parent) for place in sorted(places)]
    unlike, folder = min(known, key=lambda run: len(run[0]), default=({}, None))
    if unlike and folder:
        info, items = _read_info(folder), list(unlike.items())[:3]
        why = ", ".join(f"{item} {str(a)[:24]} against {str(b)[:24]}" for item, (a, b) in items)
        took = f"the recorded one took {_took(info)} on {info['device']}"
        print(f"No recorded run of {info['name']} fits ({why}). Training now; {took}.")
    return None if unlike else folder


def _unlike(info: dict[str, Any], identity: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find what differs in a recorded run: data, recipe, weights, major versions of installed libraries."""
    there, here = {key: info[key] for key in IDENTITY}, identity.copy()
    for library in sorted({*COMPARED} & info["versions"].keys()):
        with contextlib.suppress(metadata.PackageNotFoundError):  # scores can be read without it
            here[library] = metadata.version(library).split(".")[0]
            there[library] = info["versions"][library].split(".")[0]
    return _differences(there, here)


# Making one -------------------------------------------------------------------------------------


def _make(folder: Path, workdir: Path, identity: dict, fit: Callable, samples: int, kept: Any) -> None:
    """Call `fit` and write what it returns, its model as `kept` says; the caller holds the lock."""
    if folder.exists():
        raise RunError(f"{folder} exists but holds no run.json: it is no finished run. Delete it first.")
    if workdir.exists():
        print(f"Run {identity['name']} was interrupted earlier: going on.")
    disk.workdir(workdir, VARIABLE)
    start = time.perf_counter()
    model, history, predictions = fit(workdir)
    # What is scored is what a file of half the size holds: 7 significant digits.
    floats: Any = predictions.select_dtypes(["float32", "float64"])
    predictions = predictions.assign(**floats.map(lambda value: float(f"{value:.7g}")))
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
    if kept == "model" and hasattr(model, "half"):  # a torch module
        model = copy.deepcopy(model).half()
    with disk.atomic(folder, VARIABLE) as new:
        new.mkdir()
        history.to_csv(new / "history.csv", index=False)
        predictions.to_csv(new / "predictions.csv", index=False)
        info["model"] = None if kept == "scores" else save_model(model, new)
        files = sorted(new.iterdir())
        info["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": disk.digest(f)} for f in files}
        info["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        disk.write_json(new / "run.json", info, VARIABLE)


def _scores(predictions: pd.DataFrame, samples: int) -> dict[str, Any]:
    """{split: {level: {metric: {value, low, high}}}} over all body parts; undefined (NaN) becomes null."""
    scores: dict[str, Any] = {}
    levels = {"image": metrics.image_report, "study": metrics.study_report}
    checked = metrics.check(predictions, ("path", "split"))
    if len(checked) > 1 and checked["probability"].nunique() == 1:
        advice = "Lower the learning rate, choose another seed, or check the scale of the pixels."
        raise TrainingError(f"The model is constant: a dead network. {advice}")
    for split, rows in checked.groupby("split", observed=True):
        for level, report in levels.items():
            overall: Any = report(rows, samples=samples).loc["OVERALL"]
            overall = overall.where(overall.notna(), None)
            counts = {count: int(overall[count].item()) for count in metrics.COUNTS[1:]}
            found = {metric: overall[metric].to_dict() for metric in metrics.METRICS}
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


def load(folder: str | Path, expected: dict[str, Any] | None = None, was_trained_now: bool = False) -> Run:
    """Load the finished run in `folder`; RunError where its run.json says something else than `expected`."""
    folder = Path(folder)
    info = _read_info(folder)
    if other := ", ".join(key for key, value in (expected or {}).items() if info[key] != value):
        raise RunError(f"{folder} holds another run: {other} differ. Delete or move it to train anew.")
    try:
        files = [_verified(folder, info, f"{name}.csv") for name in ("history", "predictions")]
        history, predictions = (pd.read_csv(file, **EXACTLY) for file in files)
        predictions["body_part"] = pd.Categorical(predictions["body_part"], data.BODY_PARTS)
        test, dev = (predictions[predictions["split"] == s].reset_index(drop=True) for s in ("test", "dev"))
        for table in (history, test, dev):
            table.attrs = {"run": info["name"]} | {key: info[key] for key in IDENTITY[2:]}
        run = Run(folder, info, history, test, dev, was_trained_now, _is_recorded(folder))
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
