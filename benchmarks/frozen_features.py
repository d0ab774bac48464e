"""Ten epochs on a frozen backbone: end to end as Keras' tutorials do it, against features computed once.

    python benchmarks/frozen_features.py [--backbone EfficientNetLite0] [--size 224] [--films N] [--epochs N]

Both train KL's head (dropout and one output, KL 1.5) on the same films in the same order, with a development
set of a tenth, from an empty folder of features, in one process, in turns (`--rounds`), by default at the
report's size. The seconds hold all that a user waits for: building and tracing the model, the pass over the
films, the epochs. Random weights where the backbone's cannot be downloaded: that changes no time. Prints the
ratio of the medians, and how far the two ways' predictions lie apart. Writes the pixel store and a temporary
folder.
"""

import argparse
import os
import statistics
import tempfile
import time
from unittest import mock

import keras
import numpy as np

from mura_course import data, profiles
from mura_course.data import features
from mura_course.keras_tools import backbones, models, training
from mura_course.recipes import Stage

BATCH, LEARNING_RATE = 64, 1e-3


def datasets(films: int, size: int):
    """The first `films` training films and a tenth as many development films, as KL's data sets."""
    index = data.split_dev(data.load_index(quiet=True), 0.1)
    parts = [("train", films), ("dev", films // 10), ("test", films // 10)]
    few = index.loc[[row for part, count in parts for row in index.index[index["split"].eq(part)][:count]]]
    few.attrs = index.attrs
    store = data.PixelStore.open_or_build(few, size)
    return few, lambda: data.kl_datasets(few, store, batch_size=BATCH, scale="0..255")


def train(model: keras.Model, train_set, dev, epochs: int) -> None:
    training.fit(
        training.compiled(model, Stage(learning_rate=LEARNING_RATE, epochs=epochs)), train_set, dev, epochs
    )


def end_to_end(extractor: keras.Model, head: keras.Model, sets: dict, epochs: int):
    model = models.with_head(extractor, head)
    train(model, sets["train original"], sets["validation"], epochs)
    return training.predict(model, sets["test"])


def features_once(extractor: keras.Model, head: keras.Model, sets: dict, epochs: int):
    names, wrapped = ("train original", "validation", "test"), backbones.KerasExtractor(extractor)
    train_set, dev, test = (features.extract(wrapped, sets[name], progress=False) for name in names)
    train(head, train_set, dev, epochs)
    return training.predict(head, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", choices=backbones.BACKBONES, default="EfficientNetLite0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--films", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    weights = backbones.find_weights(options.backbone, profiles.get("demo"))
    films, sets = datasets(options.films, options.size)
    seconds = {"end to end": [], "features once": []}
    for _ in range(options.rounds):
        found = {}
        for way, taken in seconds.items():
            keras.utils.clear_session()
            keras.utils.set_random_seed(0)
            start = time.perf_counter()
            extractor = backbones.extractor(options.backbone, options.size, weights)
            keras.utils.set_random_seed(0)
            head = models.transfer_head(extractor.output_shape[1])
            run = end_to_end if way == "end to end" else features_once
            batches = sets()  # whose pixels stay where they are
            with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"MURA_CACHE": empty}):
                found[way] = run(extractor, head, batches, options.epochs)["probability"]
            taken.append(time.perf_counter() - start)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    print(f"{options.backbone}, {weights} weights, {options.size} px, {len(films):,} films, ", end="")
    print(f"{options.epochs} epochs, {options.rounds} rounds in turns")
    for way, taken in seconds.items():
        print(f"  {way:<14} {medians[way]:7.1f} s  ({', '.join(f'{t:.1f}' for t in taken)})")
    print(f"  ratio {medians['end to end'] / medians['features once']:.1f} (target 8)")
    apart = np.abs(found["end to end"].to_numpy() - found["features once"].to_numpy()).max()
    print(f"  largest difference of a probability on test after training: {apart:.1e}")


if __name__ == "__main__":
    main()
