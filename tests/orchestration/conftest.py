"""What studies of tests need and what takes seconds to make."""

from pathlib import Path

import pytest

from tests.orchestration.tracking_store import new_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MLflow's database with our experiment and no run; its copies share a folder of files."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    new_store(file)
    return file.read_bytes()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store of the test's own."""
    return new_store(tmp_path / "mlflow.db")
