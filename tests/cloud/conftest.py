"""One emulator of each kind for all tests here; every test has its own folder in the bucket."""

from __future__ import annotations

from pathlib import Path

import bucket_servers
import pytest

from ivr_jax.cloud import inputs


@pytest.fixture(scope="session", params=bucket_servers.SCHEMES)
def bucket(request):
    with bucket_servers.server(request.param):
        yield f"{request.param}://{bucket_servers.BUCKET}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"
