"""A folder that loads as a small model, for the tests of the command."""

import pytest

from catp_jax import api
from tests.study.answerer import Tiny
from tests.study.command import MINI, Loaded


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A folder that loads as the small model; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", lambda *_, **__: Tiny())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((MINI / "config.json").read_bytes())
    return tmp_path


@pytest.fixture
def no_model(monkeypatch, tiny):
    """Loading a model is the end of the test."""

    def load(*_, **keywords):
        raise Loaded(keywords)

    monkeypatch.setattr(api, "load", load)
    return tiny
