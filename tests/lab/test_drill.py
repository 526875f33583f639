"""The whole way on several hosts, as a drill: six minutes and more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.drill import FAULTS, Drill, Fault, missing_services, told
from tests.lab.hosts import Lab, missing

pytestmark = [
    pytest.mark.drill,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason=f"the lab needs {missing()}"),
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path / "hosts")
    lab.up()
    yield lab
    lab.down()


@pytest.mark.parametrize(
    ("fault", "with_services"), [*((fault, False) for fault in FAULTS), ("power", True)]
)
def test_a_sweep_outlives_a_host_and_every_record_agrees(
    lab: Lab, fault: Fault, with_services: bool
) -> None:
    """With services: tracking in PostgreSQL, data, checkpoints and artifacts on S3."""
    if with_services and missing_services():
        pytest.skip(f"services need {missing_services()}")
    print(told(Drill(lab, say=print, fault=fault, with_services=with_services).run()))
