"""The hermes_* settings, through gunicorn's own Config."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
from gunicorn.config import Config

import hermes_gunicorn  # noqa: F401  (registers the settings)
from hermes_gunicorn.arbiter import configuration
from hermes_gunicorn.arbiter.settings import SETTINGS


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("hermes_loader", "auto", "auto"),
        ("hermes_loader", "object", "object"),
        ("hermes_loader", "bcc", "bcc"),
        ("hermes_strict", True, True),
        ("hermes_strict", "false", False),
        ("hermes_mode", "shared", "shared"),
        ("hermes_keepalive", "always", "always"),
        ("hermes_rescue_after", "0.5", 0.5),
        ("hermes_rescue_after", 0, 0.0),
        ("hermes_hang_threshold", "0.25", 0.25),
        ("hermes_hang_threshold", 0, 0.0),
        ("hermes_hang_threshold", 3600, 3600.0),
    ],
)
def test_good_values_are_kept(name, value, stored):
    cfg = Config()
    cfg.set(name, value)
    assert getattr(cfg, name) == stored


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("hermes_loader", "llvm", "hermes_loader must be one of auto, object, bcc, not 'llvm'"),
        ("hermes_loader", None, "hermes_loader must be one of"),
        ("hermes_strict", "perhaps", "Invalid boolean: perhaps"),
        ("hermes_mode", "epoll", "hermes_mode must be one of auto, kernel, shared, not 'epoll'"),
        ("hermes_keepalive", 5, "hermes_keepalive must be one of auto, always, not 5"),
        ("hermes_rescue_after", -1, "hermes_rescue_after must be 0 to 3600 seconds, not -1"),
        ("hermes_rescue_after", "x", "hermes_rescue_after must be 0 to 3600 seconds, not 'x'"),
        ("hermes_hang_threshold", "soon", "0.001 to 3600 seconds, not 'soon'"),
        ("hermes_hang_threshold", -1, "0.001 to 3600 seconds, not -1"),
        ("hermes_hang_threshold", "nan", "0.001 to 3600 seconds"),
        ("hermes_hang_threshold", 0.0001, "0.001 to 3600 seconds"),
        ("hermes_hang_threshold", True, "0.001 to 3600 seconds, not True"),
        ("hermes_hang_threshold", [], "0.001 to 3600 seconds"),
    ],
)
def test_bad_values_are_refused_in_one_line_that_says_what_to_do(name, value, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        Config().set(name, value)
    assert "\n" not in str(caught.value)


def test_a_configuration_built_before_us_gets_the_settings_from_the_file(monkeypatch):
    cfg = Config()
    for setting in SETTINGS:
        del cfg.settings[setting.name]
    file = ModuleType("__config__")
    file.hermes_hang_threshold = 0.5
    monkeypatch.setitem(sys.modules, "__config__", file)
    configuration.ensure(cfg)
    assert cfg.hermes_hang_threshold == 0.5
    assert cfg.hermes_loader == "auto"


def test_values_set_already_are_left_alone():
    cfg = Config()
    cfg.set("hermes_loader", "bcc")
    configuration.ensure(cfg)
    assert cfg.hermes_loader == "bcc"
