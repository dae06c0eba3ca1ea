"""What the tests of the data sets share."""

import pytest


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test sees the user's data or cache unless it asks for them."""
    monkeypatch.delenv("IMAML_DATA_DIR", raising=False)
    monkeypatch.setenv("IMAML_CACHE_DIR", str(tmp_path / "cache"))
