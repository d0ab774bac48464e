"""metrics.py against scikit-learn, against a bootstrap written out, and against bad predictions."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import pair_by_pair
from scipy.stats import rankdata
from sklearn import metrics as sk

from mura_course import metrics


def make(labels, probabilities, patients=None, parts="HAND", views_per_study=1):
    """Predictions with one row per label; patients default to one per row."""
    patients = np.arange(len(labels)) if patients is None else np.asarray(patients)
    study = [f"patient{p}/study{i // views_per_study}" for i, p in enumerate(patients)]
    columns = {"body_part": parts, "patient": patients, "study": study}
    return pd.DataFrame(columns | {"label": labels, "probability": probabilities})


def simulate(patients, rng):
    """Images of patients whose own offset shifts all their scores: 1-6 views each, true AUROC fixed."""
    views = rng.integers(1, 7, patients)
    patient = np.repeat(np.arange(patients), views)
    label = np.repeat(rng.random(patients) < 0.4, views).astype(int)
    logit = 1.2 * label + np.repeat(rng.standard_normal(patients), views)
    logit = logit + 0.5 * rng.standard_normal(len(patient))
    return make(label, 1 / (1 + np.exp(-logit)), patient)


def reference(label, probability, part=None):
    """scikit-learn's answers, and that of `pair_by_pair`; NaN where there is none."""
    called, nan = np.asarray(probability) > 0.5, float("nan")
    one_call = len(set(label) | set(called)) == 1
    return {
        "accuracy": sk.accuracy_score(label, called),
        "auroc": sk.roc_auc_score(label, probability) if len(set(label)) == 2 else nan,
        "auroc_within": pair_by_pair(label, probability, np.zeros_like(label) if part is None else part),
        "kappa": nan if one_call else sk.cohen_kappa_score(label, called),
        "sensitivity": sk.recall_score(label, called, zero_division=nan),
        "specificity": sk.recall_score(label, called, pos_label=0, zero_division=nan),
        "f1": sk.f1_score(label, called, zero_division=nan),
    }


PROBABILITIES, PARTS = [0.0, 0.2, 0.5, 0.5000001, 0.7, 1.0], ["WRIST", "HAND", "ELBOW"]
row = st.tuples(st.integers(0, 1), st.sampled_from(PROBABILITIES), st.integers(0, 4), st.sampled_from(PARTS))
scored = st.lists(row, min_size=1, max_size=40)


@given(scored)
@settings(max_examples=40, deadline=None)
def test_values_equal_scikit_learn(rows):
    label, probability, patient, part = (list(column) for column in zip(*rows, strict=True))
    report = metrics.image_report(make(label, probability, patient, part), samples=0)
    for metric, expected in reference(label, probability, part).items():
        found = report.loc["OVERALL", (metric, "value")]
        assert found == pytest.approx(expected, nan_ok=True, abs=1e-12), metric
    single = report.drop(index="OVERALL")
    pd.testing.assert_frame_equal(single["auroc"], single["auroc_within"], check_exact=True)


@given(scored, st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_every_resample_equals_scikit_learn_with_weights(rows, seed):
    """The vectorised bootstrap is the same as repeating each patient's rows as often as it was drawn."""
    label, probability, patient, part = (np.array(column) for column in zip(*rows, strict=True))
    _, patient = np.unique(patient, return_inverse=True)
    scorer, patients = metrics.Scorer(make(label, probability, patient, part), 0.5), patient.max() + 1
    for weights in metrics.resample(patients, len(label), 4, np.random.default_rng(seed)):
        found = scorer(weights)
        assert (weights.sum(axis=1) == patients).all()
        for i, drawn in enumerate(weights):
            repeated = np.repeat(np.arange(len(label)), drawn[patient].astype(int))
            for metric, expected in reference(*(c[repeated] for c in (label, probability, part))).items():
                assert found[metric][i] == pytest.approx(expected, nan_ok=True, abs=1e-12), metric


def test_shape_counts_and_provenance():
    predictions = make([0, 1, 1, 0, 1, 0], [0.1, 0.9, 0.4, 0.6, 0.7, 0.2], [1, 1, 2, 2, 3, 3])
    parts = ["WRIST", "WRIST", "HAND", "HAND", "WRIST", "WRIST"]
    predictions["body_part"] = pd.Categorical(parts, ["ELBOW", "HAND", "WRIST"])
    predictions.attrs = {"data": "MURA-demo", "is_demo": True, "weights": "random", "irrelevant": 1}
    report = metrics.image_report(predictions, samples=50)
    assert list(report.index) == ["HAND", "WRIST", "OVERALL"]  # a part with no image has no row
    counts = report[["level", "n", "patients", "positives"]].T.to_numpy().tolist()
    assert counts == [["image"] * 3, [2, 4, 6], [1, 2, 3], [1, 2, 3]]
    assert list(report["auroc"].columns) == ["value", "low", "high", "resamples"]
    assert report.loc["OVERALL", ("accuracy", "value")] == pytest.approx(4 / 6)
    assert {"data": "MURA-demo", "weights": "random"}.items() <= report.attrs.items()
    assert report.attrs["level"] == "image" and "irrelevant" not in report.attrs
    predictions.attrs = {"name": "MURA-v1.1", "is_demo": False}  # as an index says it
    assert metrics.study_report(predictions, samples=5).attrs["data"] == "MURA-v1.1"


def test_study_probability_is_the_mean_over_views():
    probabilities = [0.2, 0.3, 0.95, 0.6, 0.3, 0.3]
    predictions = make([1, 1, 1, 0, 0, 0], probabilities, [1, 1, 1, 2, 2, 2], views_per_study=3)
    studies = metrics.study_predictions(predictions)
    assert studies["probability"].tolist() == pytest.approx([1.45 / 3, 0.4])
    assert studies["views"].tolist() == [3, 3] and studies["label"].tolist() == [1, 0]
    report = metrics.study_report(predictions, samples=20)
    assert report.loc["OVERALL", "n"] == 2 and set(report["level"]) == {"study"}
    assert report.loc["OVERALL", ("auroc", "value")] == 1.0  # by image it is not
    assert metrics.image_report(predictions, samples=20).loc["OVERALL", ("auroc", "value")] < 1
    tied = metrics.study_predictions(predictions.iloc[2:].assign(probability=0.2))  # 1 view and 3 views
    assert tied["probability"].tolist() == [0.2, 0.2]  # the mean of three floats 0.2 is not 0.2


def test_order_of_rows_and_other_parts_change_nothing_and_one_class_is_undefined_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would land in the chapter
        row = metrics.image_report(make([0, 0, 0], [0.1, 0.2, 0.3]), samples=30).loc["OVERALL"]
    for metric in ("auroc", "kappa", "sensitivity", "f1"):
        assert row[metric][["value", "low", "high"]].isna().all() and row[metric]["resamples"] == 0
    assert row["accuracy"][["value", "low", "high"]].tolist() == [1, 1, 1]
    predictions = simulate(40, np.random.default_rng(0))
    predictions["body_part"] = np.where(predictions["patient"] % 2, "HAND", "WRIST")
    report = metrics.image_report(predictions, samples=100)
    shuffled = metrics.image_report(predictions.sample(frac=1, random_state=1), samples=100)
    pd.testing.assert_frame_equal(report, shuffled, check_exact=True)
    alone = metrics.image_report(predictions[predictions["body_part"] == "HAND"], samples=100)
    pd.testing.assert_series_equal(report.loc["HAND"], alone.loc["HAND"], check_exact=True)


def two_models(rng, patients=40):
    """The same images, judged by two models that often agree."""
    first = simulate(patients, rng)
    noise = rng.normal(0, 0.15, len(first))
    second = first.assign(probability=(first["probability"] + noise).clip(0, 1))
    return [table.assign(path=[f"{i}.png" for i in range(len(first))]) for table in (first, second)]


def test_a_paired_difference_is_the_bootstrap_written_out():
    a, b = two_models(np.random.default_rng(0))
    table = metrics.paired_difference(a, b, samples=2000)
    groups, rng = list(a.groupby("patient").indices.values()), np.random.default_rng(5)
    label, p, q = (t.to_numpy() for t in (a["label"], a["probability"], b["probability"]))
    drawn = {"auroc": [], "accuracy": []}
    for _ in range(2000):
        rows = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        y = label[rows]
        ranks = [rankdata(score[rows])[y == 1].sum() for score in (p, q)]
        drawn["auroc"].append((ranks[0] - ranks[1]) / (y.sum() * (1 - y).sum()))
        drawn["accuracy"].append(np.mean((p[rows] > 0.5) == y) - np.mean((q[rows] > 0.5) == y))
    whole = [reference(label, score) for score in (p, q)]
    for metric in metrics.METRICS:
        expected = whole[0][metric] - whole[1][metric]
        assert table.loc[metric, "value"] == pytest.approx(expected, abs=1e-12)
    for metric, values in drawn.items():
        expected = np.percentile(values, [2.5, 97.5])
        np.testing.assert_allclose(table.loc[metric, ["low", "high"]], expected, atol=0.15 * np.ptp(expected))
    separate = metrics.image_report(a, samples=2000)["auroc"].loc["OVERALL"]
    assert np.ptp(table.loc["auroc", ["low", "high"]]) < np.ptp(separate[["low", "high"]])


@given(st.integers(0, 999))
@settings(max_examples=20)
def test_a_paired_difference_has_a_sign_and_no_order(seed):
    rng = np.random.default_rng(seed)
    a, b = two_models(rng, 12)
    forth = metrics.paired_difference(a, b, samples=50)
    back = metrics.paired_difference(b.sample(frac=1, random_state=seed), a, samples=50)
    np.testing.assert_allclose(back["value"], -forth["value"])
    np.testing.assert_allclose(back[["low", "high"]], -forth[["high", "low"]], atol=1e-12)
    seeds = metrics.paired_difference([a, b, b], [b, b, b], samples=50)  # the mean of scores
    np.testing.assert_allclose(seeds.to_numpy()[:, :3], forth.to_numpy()[:, :3] / 3, atol=1e-12)
    same = metrics.paired_difference(a, a, samples=50).dropna()
    assert (same[["value", "low", "high"]] == 0).all(axis=None)
    by_study = metrics.paired_difference(a, b, level="study", samples=0)
    reports = [metrics.study_report(t, samples=0).loc["OVERALL"] for t in (a, b)]
    for metric, value in by_study["value"].items():
        np.testing.assert_allclose(value, reports[0][metric, "value"] - reports[1][metric, "value"])
