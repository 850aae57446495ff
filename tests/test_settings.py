"""Settings are read when used."""

from fastlens.settings import OFFLINE, SETTINGS


def test_a_setting_is_read_at_each_use(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "Yes")
    assert OFFLINE.is_on()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert OFFLINE.get() == "0" and not OFFLINE.is_on()


def test_every_setting_says_what_it_does():
    assert len({s.name for s in SETTINGS}) == len(SETTINGS) and all(s.meaning for s in SETTINGS)
