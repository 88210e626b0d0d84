from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Fatal
from connito.runtime.settings import ServiceSettings
from pydantic import Field


class Settings(ServiceSettings):
    """A service's own."""

    patience: float = Field(3.0, gt=0, description="how long it waits")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    import os

    for name in list(os.environ):
        if name.startswith("CONNITO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CONNITO_KEY_FILE", str(tmp_path / "key"))
    return monkeypatch


def test_defaults_and_values_from_the_environment(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("CONNITO_PATIENCE", "1.5")
    environment.setenv("CONNITO_S3_SECRET_KEY", "do not show")
    settings = Settings.load()
    assert (settings.patience, settings.key_file, settings.http_port) == (1.5, tmp_path / "key", 0)
    assert "do not show" not in repr(settings)


def test_the_cache_follows_the_desktop_convention(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Settings.load().cache_dir == Path("/somewhere/connito")


def test_everything_that_is_wrong_is_named_at_once(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("CONNITO_KEY_FILE")
    environment.setenv("CONNITO_PATIENCE", "-1")
    environment.setenv("CONNITO_HTTP_PORT", "99999")
    with pytest.raises(Fatal) as caught:
        Settings.load()
    for name in ("CONNITO_KEY_FILE: is not set", "CONNITO_PATIENCE", "CONNITO_HTTP_PORT", "--help"):
        assert name in str(caught.value)


def test_every_setting_is_described() -> None:
    rows = Settings.describe()
    assert [name for name, _, description in rows if not description] == []
    assert ("CONNITO_PATIENCE", "3.0", "how long it waits") in rows
    assert ("CONNITO_KEY_FILE", "required", "file with this service's nkey seed") in rows


def test_an_address_of_another_kind_is_told_without_the_words_of_a_library(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CONNITO_NATS_URL", "http://x:1")
    with pytest.raises(Fatal, match="CONNITO_NATS_URL: 'http://x:1' is not the address of a broker"):
        Settings.load()
