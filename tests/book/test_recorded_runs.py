"""The recorded runs: when one is used, what is kept of it, how `make runs` and `runs verify` work."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nbformat
import pandas as pd
import pytest
from making import make_index, make_predictions

from mura_course import cli, data, paths, profiles, runs
from mura_course.errors import RunError
from mura_course.recipes import Recipe, Stage

TOP = Path(__file__).resolve().parents[2]
INDEX = make_index()
HISTORY = pd.DataFrame({"epoch": [1, 2], "loss": [0.7, 0.6], "seconds": [400.0, 440.0]})
CONFIG = {"epochs": 10, "stages": [{"head": [128]}]}


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, TOP / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Net:
    expected_scale, architecture, halved = "0..1", {"layers": 2}, False

    def half(self):
        self.halved = True
        return self


@runs.save_model.register
def _(model: Net, folder: Path) -> str:
    (folder / "model.bin").write_text("half" if model.halved else "whole")
    return "model.bin"


def fitted(workdir, model=None, index=INDEX):
    return model or Net(), HISTORY, make_predictions(index[index["split"].isin(["dev", "test"])])


def never(workdir):
    raise AssertionError("a recorded run exists")


def make(fit=fitted, name="funnel", config=CONFIG, index=INDEX, record="scores", **options):
    return runs.fit_or_load(name, config, fit, index, profiles.get("smoke"), record=record, **options)


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """Recorded runs in a folder of the test's own; ``recording(True)`` makes them, "new" ignores them."""
    monkeypatch.setattr(paths, "recorded_runs", lambda: tmp_path / "_runs")
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))

    def switch(mode):
        monkeypatch.setenv("MURA_RUNS", mode)

    switch("record")
    return switch


def test_a_recorded_run_is_used_unless_one_has_ones_own_or_wants_a_new_one(recording, capsys):
    made = make()
    assert made.recorded and made.was_trained_now and make(never).folder == made.folder
    recording("")
    found = make(never)
    assert (found.recorded, found.was_trained_now, found.folder) == (True, False, made.folder)
    assert found.describe().startswith(f"Run funnel: recorded on {made.info['finished'][:10]} on CPU, ")
    assert " cores, in 14 min; data MURA-demo" in found.describe() and "2 epochs." in found.describe()
    assert set(found.dev_predictions["split"]) == {"dev"} and set(found.predictions["split"]) == {"test"}
    assert make(record=False).was_trained_now  # a live run is trained live
    assert not make(never).recorded  # and is one's own from then on
    recording("new")
    other = make(index=make_index(patients=30))
    assert other.was_trained_now and not other.recorded and "No recorded" not in capsys.readouterr().out
    assert sorted(runs.list_runs()["recorded"]) == [False, False, True]
    assert list(runs.list_runs(paths.recorded_runs())["recorded"]) == [True]


def versions(**changed):
    def change(info):
        info["versions"] |= changed

    return change


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (None, {"config": CONFIG | {"epochs": 5}}, "config.epochs 10 against 5"),
        (
            None,
            {"config": {"epochs": 10, "stages": [{"head": []}]}},
            "config.stages.0.head.0 128 against none",
        ),
        (None, {"weights": "imagenet"}, "weights random against imagenet"),
        (None, {"index": make_index(patients=30)}, "fingerprint "),
        (versions(numpy="0.9"), {}, "numpy 0 against "),
        (versions(pandas="0.9", cv2="1"), {}, None),
        (versions(**{runs.COMPARED[0]: "99.1"}), {}, "keras 99 against 3"),
    ],
)
def test_one_that_does_not_fit_is_not_used_and_a_sentence_says_why(
    recording, capsys, change, options, reason
):
    made = make()
    if change:
        info = json.loads((made.folder / "run.json").read_text())
        change(info)
        (made.folder / "run.json").write_text(json.dumps(info))
    recording("")
    run = make(never if reason is None else fitted, **options)
    said = capsys.readouterr().out
    assert run.recorded == (reason is None) == (said == "")
    if reason:
        assert said.startswith("No recorded run of funnel fits (") and reason in said
        assert "Training now; the recorded one took 14 min on CPU" in said


def test_scores_or_the_model_in_half_precision_are_kept(recording):
    run, net = make(), Net()
    assert run.info["model"] is None and run.info["architecture"] == {"layers": 2}
    with pytest.raises(RunError, match="no saved model.*scores only.*MURA_RUNS=new"):
        run.model_file()
    run = make(lambda w: fitted(w, net), name="kept", record="model")
    assert run.model_file().read_text() == "half" and not net.halved
    assert make(name="own", record=False).model_file().read_text() == "whole"
    recording("new")
    assert make(record="model").model_file().read_text() == "whole"
    with pytest.raises(RunError, match="'model', not 'all'"):
        make(record="all")


@pytest.mark.slow
def test_a_torch_module_in_half_precision_says_nearly_the_same(recording):
    torch = pytest.importorskip("torch")
    from mura_course.torch_tools import models

    net = models.resnet18(weights="random").eval()
    run = make(lambda w: fitted(w, net), record="model")
    assert run.model_file().stat().st_size < 0.51 * 4 * sum(p.numel() for p in net.parameters())
    again, x = models.load(run).eval(), torch.rand(4, 3, 64, 64)
    assert {p.dtype for p in again.parameters()} == {torch.float32} == {p.dtype for p in net.parameters()}
    with torch.inference_mode():
        assert (net(x).sigmoid() - again(x).sigmoid()).abs().max() < 2e-3


# --- make runs ------------------------------------------------------------------------------------------

SETUP = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from making import make_index, make_predictions
from mura_course import paths, profiles, runs
paths.recorded_runs = lambda: Path({root!r})
INDEX = make_index()
def train(name, record="scores"):
    def fit(workdir):
        return None, None, make_predictions(INDEX[INDEX["split"].eq("test")])
    return runs.fit_or_load(name, {{}}, fit, INDEX, profiles.get("smoke"), record=record)
"""
CELLS = [
    "first = train('first')",
    "print(first.predictions)",
    "live = train('live', record=False)",
    "table = {name: train(name) for name in ('a', 'b')}",
    "others = []\nfor name in ('c', 'b'):\n    others.append(train(name))",
    "1 / 0",
    "assert len(table) == 2 and len(others) == 2\ntrain('d')",
]


@pytest.fixture
def script(recording, tmp_path, monkeypatch):
    module = load("scripts/make_runs.py")
    for name in ("MURA_ONLY", "JUPYTER_PREFER_ENV_PATH"):  # the script sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MURA_PROFILE", "smoke")
    setup = SETUP.format(tests=str(TOP / "tests"), root=str(paths.recorded_runs()))
    cells = [nbformat.v4.new_code_cell(source) for source in (setup, *CELLS)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "chapter.ipynb")

    def run(*arguments):
        code = module.main([*arguments, str(tmp_path / "chapter.ipynb")])
        table = runs.list_runs(paths.recorded_runs())
        return code, sorted(Path(run).name.rpartition("-")[0] for run in table["run"])

    run.module = module
    return run


def test_make_runs_trains_what_is_named_goes_on_after_errors_and_shows_them(script, capfd):
    code, made = script("--only", "b,d")
    said = capfd.readouterr()
    assert (code, made) == (1, ["b", "d"]), said.out + said.err
    assert "skipped what needs first" in said.out and "skipped what needs others, table" in said.out
    assert "Left out:\n  first\n  a\n  c\n" in said.out and "FAILED:\n  chapter.ipynb, cell 6" in said.out
    assert "ZeroDivisionError" in said.err and "left out" not in said.err
    code, made = script()
    said = capfd.readouterr()
    assert (code, made) == (1, ["a", "b", "c", "d", "first"])
    assert said.out.count("  made now  ") == 3 and said.out.count("  found     ") == 2


def test_what_a_statement_makes_and_needs(script):
    for source, made, used in (
        ("table['a'] = train(x)", {"table"}, {"table", "train", "x"}),
        ("def f(run):\n    scores = run\n    return scores, table", {"f"}, {"table"}),
        ("for run in table: print(run)", {"run"}, {"table", "print"}),
        ("import a.b as c, d.e", {"c", "d"}, set()),
        ("rows.append([x for x in y])", {"rows"}, {"rows", "y"}),
        ("%matplotlib inline", set(), set()),
    ):
        assert script.module.names(source) == (made, used)


def test_the_page_of_results_finds_every_run_of_its_data_and_profile_once(recording, monkeypatch):
    split, profile = make_index(patients=40), profiles.get("smoke")
    assert runs.finished(split, profile) == []
    make(name="b", index=split), make(name="a", index=split)
    make(name="of_other_data")
    runs.fit_or_load("of_another_profile", CONFIG, fitted, split, profiles.get("demo"), record="scores")
    recording("new")
    make(name="b", index=split), make(name="c", index=split)
    assert [run.info["name"] for run in runs.finished(split, profile)] == ["b", "c"]
    recording("")
    found = runs.finished(split, profile)
    assert [(run.info["name"], run.recorded) for run in found] == [("b", False), ("c", False), ("a", True)]
    (found[0].folder / "history.csv").write_text("changed")
    with pytest.raises(RunError, match="history.csv"):
        runs.finished(split, profile)


# --- mura-course runs verify ------------------------------------------------------------------------------


def test_verify_trains_the_cheapest_anew_and_says_how_far_it_is_off(recording, monkeypatch, capsys):
    split, script = make_index(patients=40), load("scripts/make_runs.py")
    monkeypatch.setattr(data, "load_index", lambda: split)
    monkeypatch.setattr(data, "split_dev", lambda index, fraction: split)
    monkeypatch.setenv("MURA_PROFILE", "smoke")
    one = Stage(learning_rate=1e-3, epochs=2, head=(4,))
    recipe = Recipe(backbone="ResNet18", size=64, parts=("HAND",), stages=(one, replace(one, head=None)))
    assert script.recipe(json.loads(json.dumps(recipe.config()))) == recipe
    signal = {"cheap": 1.0}

    def train(name, recipe, split, profile, weights, **options):
        def fit(workdir):
            rows = make_predictions(split[split["split"].eq("test")], signal[name])
            return Net(), HISTORY.assign(seconds=1.0 if name == "cheap" else 60.0), rows

        return runs.fit_or_load(name, recipe.config(), fit, split, profile, weights, **options)

    fake = ModuleType("mura_course.torch_tools.training")
    fake.train = train
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    signal["dear"] = signal["other"] = 1.0
    for name in signal:
        train(name, recipe, split, profiles.get("smoke"), "random", record="scores")
    make(name="no_recipe", index=split)
    assert script.main(["--verify"]) == 0
    said = capsys.readouterr().out
    assert "Run cheap: recorded on" in said and "dear" not in said
    assert "(may differ by 0.03)" in said and "differ by 0.0000 on average" in said
    signal["cheap"] = 9.0
    recording("")
    assert script.main(["--verify", "--only", "cheap"]) == 1
    assert "differ by 0.0000" not in capsys.readouterr().out
    for name in ("none", "no_recipe"):
        with pytest.raises(SystemExit, match=f"No recorded run .{name}. is of a recipe"):
            script.main(["--verify", "--only", name])


def test_the_command_runs_verify_hands_on_to_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MURA_DATA", str(tmp_path / "absent"))
    assert cli.main(["runs", "verify", "--name", "cheap"]) == 1  # of the script, which finds no data
    monkeypatch.setattr(paths, "recorded_runs", lambda: tmp_path / "site-packages/mura_course/_runs")
    assert cli.main(["runs", "verify"]) == 1 and "clone it" in capsys.readouterr().err


# --- The book's build -------------------------------------------------------------------------------------


def test_executions_depend_on_the_recorded_runs_that_chapters_could_use(recording, monkeypatch, mura_folder):
    cache = load("_ext/execution_cache.py")
    monkeypatch.setenv("MURA_DATA", str(mura_folder("MURA-demo", truth=True)))
    monkeypatch.setenv("MURA_PROFILE", "smoke")
    none = cache.execution_key()
    folder = make().folder
    one = cache.execution_key()
    (folder / "model.bin").write_text("in run.json, by its digest")
    recording("")
    assert none != one == cache.execution_key()
    recording("new")
    assert cache.execution_key() not in (none, one)
    recording("")
    folder.parent.rename(folder.parent.with_name("full"))  # another profile's
    assert cache.execution_key() == none


def test_make_hands_the_names_on(tmp_path):
    command = ["make", "-n", "-C", TOP, "runs", "ONLY=a,b.*", "-o", ".venv/mura-course-installed"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "scripts/make_runs.py --only 'a,b.*'" in said
    assert "make runs " in subprocess.run(["make", "-C", TOP], capture_output=True, text=True).stdout
