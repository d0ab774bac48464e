"""The Bayesian search of chapter 6; `python -m mura_course.tuning` makes it, alone or with other processes.

KerasTuner proposes the trials and keeps the books, in a folder of the search's own beside the runs. Here
stand the space of KL 1.6, how a trial is trained, and the table of trials. Imports Keras and KerasTuner. The
setup chapter says how several processes or machines share a search.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pandas as pd

from . import chapter, data, keras_models, pixels, runs
from .profiles import Profile

SEED = 1  # not 0, which KerasTuner takes for "draw a seed"
VARIABLES = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")


class SearchError(keras_models.TrainingError, keras_tuner.errors.FatalError):
    """A search that cannot go on. (After other errors KerasTuner goes on, with one result fewer.)"""


def hypermodel(profile: Profile) -> Callable[[keras_tuner.HyperParameters], keras.Model]:
    """build(hp) -> a compiled funnel CNN of the space of KL 1.6, at the profile's size (chapter 6)."""
    side, filters = profile.tuner_image_size, (profile.funnel_filters, profile.funnel_narrowest)

    def build(hp):
        direction = "in" if hp.Boolean("funnel_in", default=True) else "out"
        layers, dropout = hp.Choice("conv_layers", [4, 5]), hp.Choice("dropout", list(profile.tuner_dropouts))
        with keras_models.on_devices(profile):
            model = keras_models.funnel_cnn(direction, layers, dropout, (side, side, 3), *filters)
            watched = keras_models.abnormality_metrics()
            model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=watched)
        return model

    return build


class Oracle(keras_tuner.oracles.BayesianOptimizationOracle):
    """KerasTuner's, which also notes how a trial was `drawn`, and makes interrupted trials anew."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drawn, self.verbose = {}, 0

    def populate_space(self, trial_id: str) -> dict:
        completed = sum(trial.status == "COMPLETED" for trial in self.trials.values())
        # KerasTuner does not keep this state; so a search goes on after a kill as if there had been none.
        self._random_state = np.random.RandomState([self.seed, len(self.trials)])
        proposal = super().populate_space(trial_id)
        self.drawn[trial_id] = "random" if completed < self.num_initial_points else "Bayesian"
        return proposal

    def get_state(self) -> dict:
        return super().get_state() | {"drawn": self.drawn}

    def set_state(self, state: dict) -> None:
        # KerasTuner would wait for processes of the same names to come back. (A chief leaves finished ones.)
        left = [key for key in state["ongoing_trials"].values() if self.trials[key].status == "RUNNING"]
        super().set_state(state | {"retry_queue": state["retry_queue"] + left, "ongoing_trials": {}})
        self.drawn = state["drawn"]


class Search(keras_tuner.Tuner):
    """A search in its folder, `project_dir`, as `open_search` makes it."""

    def run_trial(self, trial, train, dev, epochs: int) -> dict[str, float]:
        """Train one network. Its seed is the trial's number, wherever and whenever it is trained."""
        keras.utils.clear_session()
        keras.utils.set_random_seed(SEED + int(trial.trial_id))
        try:
            model = self.hypermodel.build(trial.hyperparameters)
            history = keras_models.keras_fit(model, train, dev, epochs)
        except Exception as error:
            values = trial.hyperparameters.values
            raise SearchError(f"Trial {trial.trial_id}, {values}, failed: {error}") from error
        best = history.loc[history["val_loss"].idxmin(), ["val_loss", "val_auc"]]
        return {"epochs": len(history), "seconds": float(history["seconds"].sum())} | best.to_dict()

    def search(self, train, dev, epochs: int) -> None:
        """Make the missing trials, or hand them out as a chief; return when all are made."""
        if not isinstance(self.oracle, Oracle):  # a worker: what stands for the oracle asks the chief
            return super().search(train, dev, epochs)
        with runs._lock(Path(self.project_dir, "lock"), "Another process makes this search; waiting for it."):
            self.reload()
            super().search(train, dev, epochs)

    def save(self) -> None:
        if isinstance(self.oracle, Oracle):
            self.oracle.save()

    def reload(self) -> None:
        try:
            if Path(self.project_dir, "oracle.json").exists():
                self.oracle.reload()
        except (ValueError, KeyError, RuntimeError) as error:
            raise SearchError(f"{self.project_dir} is damaged ({error}). Delete it to begin anew.") from error


def open_search(split: pd.DataFrame, profile: Profile, build: Callable | None = None) -> Search:
    """The search of this data, profile and space, as far as it has come, in a folder of its own.

    split: the index with its development split. build: by default `hypermodel(profile)`.
    """
    build, space = build or hypermodel(profile), keras_tuner.HyperParameters()
    build(space)
    config = {name: value for name, value in vars(profile).items() if name.startswith(("tuner_", "funnel_"))}
    config |= {"space": space.get_config()["space"], "seed": SEED, "batch_size": profile.cnn_batch_size}
    folder = runs._folder(runs._identity("funnel_search", config, split, profile, "random"), None)
    trials, initial = profile.tuner_trials, profile.tuner_initial_points
    oracle = Oracle(objective="val_loss", max_trials=trials, num_initial_points=initial, seed=SEED)
    search = Search(oracle, build, directory=str(folder.parent), project_name=folder.name)
    if isinstance(search.oracle, Oracle):
        search.reload()
    return search


def trial_table(search: Search) -> pd.DataFrame:
    """A row per finished trial, in the order of their beginnings: how drawn, its values, what came of it."""
    oracle, rows = search.oracle, []
    for trial_id in oracle.start_order:
        trial = oracle.trials[trial_id]
        if trial.status == "COMPLETED":
            row = {"drawn": oracle.drawn[trial_id]} | trial.hyperparameters.values
            results = ("val_loss", "val_auc", "epochs", "seconds")
            rows.append(row | {name: trial.metrics.get_best_value(name) for name in results})
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="trial"))


def main() -> None:
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if 0 < len(missing) < len(VARIABLES):
        raise SearchError(f"A shared search needs {', '.join(VARIABLES)}; not set: {', '.join(missing)}.")
    profile, index = chapter.start()
    split = data.split_dev(index, profile.dev_fraction)
    store = pixels.PixelStore.open_or_build(split, profile.tuner_image_size)
    sets = pixels.kl_datasets(split, store, batch_size=profile.cnn_batch_size, workers=profile.workers)
    search = open_search(split, profile)
    search.search(sets["train original"], sets["validation"], profile.tuner_epochs)
    if isinstance(search.oracle, Oracle):
        print(trial_table(search).to_string())


if __name__ == "__main__":
    main()
