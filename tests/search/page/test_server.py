"""Where the page may be served: loopback, or anywhere with a password."""

from __future__ import annotations

import pytest

from cpfean.errors import ConfigError
from cpfean.search.page.server import Place


def place(**changed: object) -> Place:
    given = {"host": "127.0.0.1", "port": 7860, "password": None} | changed
    return Place(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_password(host: str) -> None:
    assert place(host=host).names == {"127.0.0.1", "localhost", "[::1]"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "lab.example", "10.0.0.5"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="--password-file"):
        place(host=host)
    assert place(host=host, password="a long password").names is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"port": 0}, "--port must be from 1"),
        ({"port": 65536}, "--port must be from 1"),
        ({"password": "short"}, "5 characters"),
        ({"password": ""}, "0 characters"),
    ],
)
def test_a_mistake_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        place(**changed)


def test_the_address_is_one_that_a_browser_takes() -> None:
    assert place().url == "http://127.0.0.1:7860"
    assert place(host="::1").url == "http://[::1]:7860"
