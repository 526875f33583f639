"""Every form that Ray's pages give addresses in, and clusters that nobody asked for."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpfean.errors import ConfigError, ServiceError
from orchestration.cluster import ray_address
from orchestration.cluster.ray_address import (
    check_head,
    check_this_host,
    find_cluster,
    running_head,
)
from orchestration.settings import Settings

# What is given, and what it is taken for: an address, None for this machine, or what is said.
FORMS: list[tuple[str, str | None, str]] = [
    ("head:6379", "head:6379", ""),
    ("Head.Example.ORG:6379", "head.example.org:6379", ""),
    ("127.0.0.1:6379", "127.0.0.1:6379", ""),
    (" 10.0.0.1:6379\n", "10.0.0.1:6379", ""),
    ("[::1]:6379", "[::1]:6379", ""),
    ("local", None, ""),
    ("", None, ""),
    ("  ", None, ""),
    ("http://host:8265", None, "job server"),
    ("https://host:8265/", None, "ray job submit --address https://host:8265/ --"),
    ("ray://host:10001", None, "client server"),
    ("anyscale://project/cluster", None, "is a URL"),
    ("host", None, "host:6379"),
    ("10.0.0.1", None, "10.0.0.1:6379"),
    ("::1:6379", None, r"brackets: \[::1\]:6379"),
    ("host:port", None, "host:port"),
    ("host:99999", None, "host:port"),
    ("host:0", None, "host:port"),
    (":6379", None, "host:port"),
    ("6379", None, "host:port"),
    ("host:6379/", None, "host:port"),
    ("host:6379?x=1", None, "host:port"),
    ("user@host:6379", None, "host:port"),
    ("[::1:6379", None, "host:port"),
    ("a host:6379", None, "host:port"),
]


@pytest.fixture
def ray_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a head that is started here leaves its address."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of what listens and never answers."""
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        open_socket.listen()
        yield f"127.0.0.1:{open_socket.getsockname()[1]}"


@pytest.mark.parametrize("source", ["--address", "RAY_ADDRESS"])
@pytest.mark.parametrize(("given", "taken", "said"), FORMS)
def test_every_form_is_served_or_named_as_what_it_is(
    given: str, taken: str | None, said: str, source: str, ray_folder: Path
) -> None:
    asked, environment = (given, {}) if source == "--address" else (None, {"RAY_ADDRESS": given})
    if said:
        with pytest.raises(ConfigError, match=said) as refused:
            find_cluster(asked, environment)
        assert str(refused.value).startswith(f"{source} ")
        assert "--address local" in str(refused.value)
    else:
        found = find_cluster(asked, environment)
        assert taken == (None if found is None else str(found))
        assert found is None or found.source == source


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        find_cluster("http://someone:s3cret@host:8265", {})
    assert "s3cret" not in str(refused.value)


def test_auto_is_the_cluster_of_this_machine_or_a_line_that_there_is_none(
    ray_folder: Path, listener: str
) -> None:
    with pytest.raises(ServiceError, match=r'RAY_ADDRESS is "auto".*--address local'):
        find_cluster(None, {"RAY_ADDRESS": "auto"})
    (ray_folder / "ray_current_cluster").write_text(listener)
    assert str(find_cluster("auto", {})) == listener


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_running_head_is_found_and_a_dead_one_is_not(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert running_head() is None
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        there = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(there + "\n")
        found = running_head()
        assert str(found) == there
        assert found is not None
        assert found.source == str(tmp_path / "ray" / "ray_current_cluster")
    assert running_head() is None
    (tmp_path / "ray" / "ray_current_cluster").write_bytes(b"\xff\x00")
    assert running_head() is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")
def test_the_cluster_of_another_user_is_named_and_not_joined_unless_asked_for(
    ray_folder: Path, listener: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = ray_folder / "ray_current_cluster"
    file.write_text(listener)
    os.chown(file, 12345, 12345)
    ray_address.say_once.cache_clear()
    assert find_cluster(None, {}) is None
    assert f"--address {listener}" in caplog.text
    assert str(file) in caplog.text
    assert str(find_cluster("auto", {})) == listener


def test_an_address_where_nothing_listens_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = Settings.resolve(output=tmp_path, environment={"RAY_ADDRESS": there})
        with pytest.raises(ServiceError, match=f"{there} .from RAY_ADDRESS.*--address local"):
            settings.check_address()


def test_what_is_no_head_is_told_in_seconds_with_who_named_it(
    ray_folder: Path, listener: str
) -> None:
    file = ray_folder / "ray_current_cluster"
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        for there in (listener, f"127.0.0.1:{server.server_port}"):
            file.write_text(there)
            found = find_cluster(None, {})
            assert found is not None
            started = time.monotonic()
            with pytest.raises(ServiceError, match="--address local") as refused:
                check_head(found, seconds=2.0)
            assert time.monotonic() - started < 30
            assert f"{there} (from {file})" in str(refused.value)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_in_which_ray_cannot_start_is_refused_with_its_variable(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder, said in (
        (tmp_path / "file", "cannot be written"),
        (tmp_path / "link", "cannot be written"),
        (tmp_path / ("x" * 80), "too long"),
        (Path("relative"), "absolute"),
    ):
        monkeypatch.setenv(variable, str(folder))
        with pytest.raises(ConfigError, match=said) as refused:
            check_this_host()
        assert variable in str(refused.value)
        assert "RAY_TMPDIR" in str(refused.value)
