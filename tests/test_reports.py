"""reports.py: scores in words, tables and names, exactly as a page shows them."""

import inspect

import numpy as np
import pandas as pd
import pytest
from making import make_index, make_predictions

from mura_course import metrics, profiles, reports, runs
from mura_course.errors import PredictionsError

INDEX = make_index(patients=200)
TEST = INDEX[INDEX["split"].eq("test")]
GOOD, POOR = make_predictions(TEST, 8, seed=0), make_predictions(TEST, 0, seed=1)
FAIR = make_predictions(TEST, 1, seed=3)


def test_data_and_provenance_are_named_from_an_index_predictions_a_run_or_its_info(tmp_path):
    run = runs.fit_or_load("a", {}, lambda w: (None, None, GOOD), INDEX, profiles.get("smoke"), root=tmp_path)
    report = metrics.image_report(GOOD, samples=2)
    for source in (INDEX, GOOD, report, run, run.info, run.predictions):
        assert reports.data_name(source) == "MURA-demo, synthetic films"
    assert reports.data_name(make_index(name="MURA-v1.1")) == "MURA-v1.1"
    assert reports.data_name(pd.DataFrame()) == "data not stated"
    demo = {"data": "MURA-demo", "is_demo": True, "weights": "random", "profile": "smoke"}
    line = "MURA-demo (synthetic films, not MURA) · study level · random weights · profile smoke"
    assert reports.provenance(demo, "study") == line
    mura = {"data": "MURA-v1.1", "is_demo": False, "weights": "imagenet", "level": "image"}
    assert reports.provenance(mura) == "MURA-v1.1 · image level · imagenet weights"
    assert reports.provenance(mura, weights=False) == "MURA-v1.1 · image level"
    assert reports.provenance({}) == "data not stated · weights not stated"


def test_tables_intervals_and_the_packages_own_source_are_shown():
    table = reports.markdown_table(["model", "n"], [("*Lite0*", 3), ["random", 2.5]])
    assert table.data == "| model | n |\n| --- | --- |\n| *Lite0* | 3 |\n| random | 2.5 |"
    assert reports.interval(0.7512, 0.708, 0.79) == "0.75 [0.71, 0.79]"
    assert reports.interval(0.5, np.nan, np.nan) == "0.50 [no interval]"
    assert reports.interval(np.nan, np.nan, np.nan) == "undefined"
    shown = reports.show_source(metrics.provenance_of, metrics.Scorer.__call__).data
    first, second = shown.removeprefix("```python\n").removesuffix("```").split("```\n\n```python\n")
    assert first == "# mura_course.metrics\n" + inspect.getsource(metrics.provenance_of)
    assert second.startswith("# mura_course.metrics\ndef __call__(self") and "return {" in second


def test_a_report_is_written_with_names_and_intervals():
    report = metrics.image_report(GOOD, samples=100)
    value, low, high, _ = report.loc["OVERALL", "kappa"]
    shown = reports.format_report(report, digits=3)
    assert shown.loc["OVERALL", "Cohen's kappa"] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    assert shown.columns.tolist() == [*metrics.COUNTS, *metrics.METRICS.values()]
    assert shown.index.tolist() == ["HAND", "WRIST", "OVERALL"]
    report = metrics.image_report(POOR.groupby("label").head(1), samples=400)  # two patients: often one class
    drawn = int(report.loc["OVERALL", ("auroc", "resamples")])
    assert 100 < drawn < 300
    assert reports.format_report(report).loc["OVERALL", "AUROC"].endswith(f"({drawn} of 400 resamples)")


def test_several_models_are_scored_and_shown_a_row_each(tmp_path):
    run = runs.fit_or_load("a", {}, lambda w: (None, None, GOOD), INDEX, profiles.get("smoke"), root=tmp_path)
    found = reports.image_reports({"run": run, "poor": POOR}, samples=50)
    pd.testing.assert_frame_equal(found["poor"], metrics.image_report(POOR, samples=50))
    pd.testing.assert_frame_equal(found["run"], metrics.image_report(GOOD, samples=50))
    table = reports.overall(found, digits=1)
    assert table.index.tolist() == ["run", "poor"]
    assert table.loc["poor", "AUROC"] == reports.format_report(found["poor"], 1).loc["OVERALL", "AUROC"]
    by_study = reports.image_reports({"poor": POOR}, 50, level="study")["poor"]
    pd.testing.assert_frame_equal(by_study, metrics.study_report(POOR, samples=50))


def test_a_difference_is_a_number_an_interval_and_a_word():
    table = metrics.paired_difference(GOOD, POOR, samples=200)
    value, low, high, _ = table.loc["auroc"]
    assert low > 0
    assert reports.difference(GOOD, POOR, samples=200) == f"{value:+.3f} [{low:+.3f}, {high:+.3f}]: better"
    assert reports.difference(POOR, GOOD, "accuracy", samples=200).endswith("]: worse")
    assert reports.difference(GOOD, GOOD, samples=20) == "+0.000 [+0.000, +0.000]: no difference shown"
    by_study = reports.format_difference(metrics.paired_difference(GOOD, POOR, "study", samples=20), "f1")
    assert reports.difference(GOOD, POOR, "f1", samples=20, level="study") == f"{by_study}: better"


def test_models_stand_beside_the_floors_that_they_must_beat():
    floors = {"parts": make_predictions(INDEX, 1, seed=10), "noise": make_predictions(INDEX, 0, seed=4)}
    models = {"good": GOOD, "fair": FAIR, "poor": POOR, "same": POOR.assign(probability=0.3)}
    models["reversed"] = GOOD.assign(probability=1 - GOOD["probability"])
    found = reports.against_floors(models, floors, samples=200)
    beside = reports.image_reports({"noise": floors["noise"].loc[TEST.index]}, 200)
    columns = ["AUROC", "AUROC within body part", "Accuracy"]
    assert found.loc["noise", columns].tolist() == reports.overall(beside).loc["noise", columns].tolist()
    assert found.columns.tolist() == [*columns, "learned"]
    assert found["learned"].to_dict() == {
        "good": "yes",
        "fair": "not shown: no better than parts",
        "poor": "no: interval holds 0.5",
        "same": "no: interval holds 0.5",
        "reversed": "no: interval is below 0.5",
        "parts": "floor",
        "noise": "floor",
    }
    one_class = reports.against_floors({"good": GOOD[TEST["label"].eq(0)]}, {}, 50, "study")
    assert one_class["learned"].tolist() == ["not tested here"]
    with pytest.raises(PredictionsError, match="not of the same 40 and 80 images"):
        reports.against_floors({"good": GOOD, "half": GOOD[::2]}, floors, 10)


def test_a_question_that_could_not_be_asked_has_no_verdict():
    constant, normal = POOR.assign(probability=0.4), TEST["label"].eq(0)
    assert reports.difference(GOOD, constant, samples=50).endswith(": not tested here")
    assert reports.difference(GOOD[normal], POOR[normal], samples=50) == "undefined: not tested here"
    strong = {"strong": make_predictions(INDEX, 8, seed=5)}
    words = [reports.difference(GOOD, FAIR, samples=100, floors=floors) for floors in (None, {}, strong)]
    assert [text.partition("]: ")[2] for text in words] == ["better", "better", "not tested here"]
    assert reports.difference(GOOD, POOR, samples=100, floors={}).endswith("]: not tested here")
    for claim in ("better", "worse", "no big difference"):
        for other, floors in ((constant, None), (POOR, None), (FAIR, strong)):
            assert reports.agreement(claim, GOOD, other, samples=100, floors=floors) == "not tested here"


def test_a_claim_about_pretraining_needs_two_pretrained_models():
    a, b = GOOD.copy(), FAIR.copy()
    for weights, verdict in (("imagenet", "agrees"), ("random", "not tested here")):
        a.attrs, b.attrs = GOOD.attrs | {"weights": "imagenet"}, FAIR.attrs | {"weights": weights}
        assert reports.agreement("better", a, b, about_pretraining=True, samples=100) == verdict
        assert reports.agreement("better", a, b, samples=100) == "agrees"
    assert reports.agreement("better", GOOD, FAIR, about_pretraining=True, samples=9) == "not tested here"


def test_a_claim_agrees_disagrees_or_cannot_be_told():
    other = make_predictions(TEST, 1, seed=6)
    claims = [("better", GOOD, FAIR), ("better", FAIR, GOOD), ("worse", FAIR, GOOD), ("better", FAIR, other)]
    answers = [reports.agreement(*claim, samples=100) for claim in claims]
    assert answers == ["agrees", "disagrees", "agrees", "cannot tell"]
    same = [reports.agreement("no big difference", GOOD, b, samples=100) for b in (GOOD, FAIR, GOOD[::-1])]
    assert same == ["agrees", "disagrees", "agrees"]
    assert reports.agreement("no big difference", FAIR, other, samples=100) == "cannot tell"


def test_over_seeds_differences_are_averaged_and_the_fraction_right_has_an_interval_over_patients():
    ours, theirs = ([make_predictions(TEST, signal, seed) for seed in range(3)] for signal in (2, 1))
    each = [metrics.paired_difference(a, b)["value"]["kappa"] for a, b in zip(ours, theirs, strict=True)]
    mean = metrics.paired_difference(ours, theirs)
    assert mean["value"]["kappa"] == pytest.approx(np.mean(each))
    text = f"{reports.format_difference(mean, 'kappa', 2)} over 3 seeds"
    assert reports.over_seeds(ours, theirs, "kappa") == f"{text} ({min(each):+.2f} to {max(each):+.2f})"
    for a, b in ((ours, theirs[:2]), ([], [])):
        with pytest.raises(PredictionsError, match="give as many of each"):
            reports.over_seeds(a, b)
    rows = TEST.groupby("patient").head(1).head(3)
    assert reports.fraction_right(rows, [True] * 3) == "1.000 [1.000, 1.000]"
    # All three draws are the patient who is right in 1 of 27 resamples: more than the upper 2.5 %.
    assert reports.fraction_right(rows, [True, False, False], 5000) == "0.333 [0.000, 1.000]"
