"""How Ray is started on this machine."""

from typing import Any

import pytest

from cpfean.errors import ServiceError
from orchestration.cluster.connection import connect
from orchestration.settings import Settings


def test_ray_on_this_machine_has_no_dashboard_that_would_take_jobs(
    where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def init(**how: Any) -> None:
        asked.update(how)
        raise RuntimeError("as far as this test goes")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ServiceError, match="as far as"):
        connect(where)
    assert asked["address"] == "local"
    assert asked["include_dashboard"] is False
