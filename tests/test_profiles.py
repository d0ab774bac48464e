"""The table of profiles, and which one is chosen."""

from dataclasses import FrozenInstanceError, fields

import pandas as pd
import pytest

from mura_course import profiles
from mura_course.errors import MuraError


def _index(is_demo: bool) -> pd.DataFrame:
    index = pd.DataFrame({"path": []})
    index.attrs["is_demo"] = is_demo
    return index


def test_without_a_choice_the_data_decide(monkeypatch):
    monkeypatch.delenv("MURA_PROFILE", raising=False)
    assert profiles.current().name == "demo"
    assert profiles.current(_index(is_demo=True)).name == "demo"
    assert profiles.current(_index(is_demo=False)).name == "full"
    assert profiles.current(pd.DataFrame()).name == "demo"  # data of unknown origin are not taken for MURA


@pytest.mark.parametrize("choice", ["smoke", "demo", "full", " Smoke "])
@pytest.mark.parametrize("is_demo", [True, False])
def test_the_environment_variable_wins(monkeypatch, choice, is_demo):
    monkeypatch.setenv("MURA_PROFILE", choice)
    assert profiles.current(_index(is_demo)).name == choice.strip().lower()


def test_a_blank_choice_is_none(monkeypatch):
    monkeypatch.setenv("MURA_PROFILE", "  ")
    assert profiles.current(_index(is_demo=False)).name == "full"


def test_an_unknown_profile_is_answered_with_the_valid_names(monkeypatch):
    monkeypatch.setenv("MURA_PROFILE", "fast")
    with pytest.raises(ValueError, match="'fast'.*MURA_PROFILE.*smoke, demo, full") as error:
        profiles.current()
    assert isinstance(error.value, MuraError)


def test_full_has_the_reports_settings():
    full = profiles.get("full")
    assert (full.image_size_cnn, full.funnel_filters, full.cnn_epochs, full.batch_size) == (224, 256, 8, 64)
    assert full.dev_fraction == 0.1
    assert not full.allow_random_weights


def test_smoke_is_nowhere_bigger_than_demo_nor_demo_than_full():
    sizes = [f.name for f in fields(profiles.Profile) if f.type == "int"]
    assert "demo_studies" in sizes
    for name in sizes:
        smoke, demo, full = (getattr(profiles.get(profile), name) for profile in profiles.NAMES)
        assert 0 < smoke <= demo <= full, name


def test_a_profile_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        profiles.get("demo").cnn_epochs = 99


def test_the_table_shows_every_setting_with_its_meaning():
    table = profiles.table()
    assert list(table.columns) == ["smoke", "demo", "full", "meaning"]
    assert set(table.index) == {f.name for f in fields(profiles.Profile)} - {"name"}
    assert table["meaning"].str.len().gt(10).all()
    for name in profiles.NAMES:
        assert all(getattr(profiles.get(name), setting) == value for setting, value in table[name].items())
    assert table.loc["cnn_epochs", "full"] == 8 and isinstance(table.loc["cnn_epochs", "full"], int)
