"""Where studies of tests run."""

from pathlib import Path

import pytest

from orchestration.settings import Settings


@pytest.fixture
def where(tmp_path: Path) -> Settings:
    return Settings(
        output=tmp_path / "runs",
        cache_dir=tmp_path / "cache",
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
    )
