"""Extractions on Ray: the same bytes, errors as they are here, nodes that lack what is needed."""

import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from cpfean.errors import DataError, ServiceError
from cpfean.extraction.batches import Batch
from cpfean.extraction.in_process import Threads
from cpfean.extraction.run import extract
from orchestration.cluster.versions import Answer, Look
from orchestration.extraction import OnRay, check_nodes, watch_head
from orchestration.settings import ENVIRONMENT, Settings
from tests.extraction.tiny import Quadrants, files_of, quadrants, write_photographs


class Nodes:
    """Two nodes of a cluster, of which the second has other versions or no such disk."""

    def __init__(self, *, other: Mapping[str, str] | None = None, sees: bool = True) -> None:
        self._other = other or {}
        self._sees = sees

    def living(self) -> dict[str, str]:
        return {"one (10.0.0.1)": "a", "two (10.0.0.2)": "b"}

    def ask(self, nodes: Mapping[str, str], look: Look) -> dict[str, Answer]:
        here = look()
        lacks = {} if self._sees else {"/": "absent"}
        return {"one (10.0.0.1)": here, "two (10.0.0.2)": here | self._other | lacks}


def test_nodes_that_see_everything_are_taken(tmp_path: Path) -> None:
    check_nodes([str(tmp_path), "s3://bucket/photo.jpg"], Nodes())


def test_nodes_that_do_not_see_the_photographs_are_named_with_what_they_lack() -> None:
    with pytest.raises(ServiceError) as refused:
        check_nodes(["/"], Nodes(sees=False))
    assert "\n  two (10.0.0.2) does not see /\n" in str(refused.value)
    assert "one (10.0.0.1)" not in str(refused.value)
    for remedy in ("s3://", "--in-process"):
        assert remedy in str(refused.value)


def test_nodes_with_other_versions_are_refused() -> None:
    with pytest.raises(ServiceError, match=r"two \(10\.0\.0\.2\): torch 1\.0 there"):
        check_nodes(["/"], Nodes(other={"torch": "1.0"}))


def test_a_path_that_is_not_even_here_is_lacking_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"one \(10\.0\.0\.1\) does not see .*gone\.jpg"):
        check_nodes([str(tmp_path / "gone.jpg")], Nodes())


def test_a_head_that_is_gone_ends_the_process_and_one_that_answers_does_not(
    tmp_path: Path,
) -> None:
    told: list[ServiceError] = []
    has_left = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="", address=address)
        watch = threading.Thread(target=watch_head, args=(where, has_left, told.append, 0.01))
        watch.start()
        for _ in range(5):
            head.accept()[0].close()
        assert watch.is_alive()
    watch.join(timeout=60)
    (error,) = told
    assert f"the head at {address}. The same command again goes on." in str(error)
    assert error.exit_code == 5


@pytest.mark.slow
@pytest.mark.long
def test_ray_gives_the_bytes_of_this_process_and_its_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    where = Settings(output=tmp_path, cache_dir=tmp_path / "cache", tracking_uri="")
    photographs = write_photographs(tmp_path / "photos")
    said: list[str] = []
    with OnRay(
        where,
        workers=2,
        make_extractor=quadrants,
        provenance=Quadrants().provenance(),
        say=said.append,
    ) as ray:
        for name, run in (("here", Threads(quadrants, workers=1)), ("on_ray", ray)):
            done = extract(
                photographs,
                tmp_path / name,
                extractor=Quadrants(),
                run=run,
                batch_size=4,
                device=ray.device,
            )
            assert done.made == 13
        (line,) = said
        assert "2 worker(s) of 1 CPU start on this machine" in line
        assert files_of(tmp_path / "on_ray") == files_of(tmp_path / "here")
        gone = Batch(number=0, paths=(str(tmp_path / "gone.jpg"),), key="k")
        with pytest.raises(DataError, match=r"gone\.jpg: cannot be seen"):
            list(ray([gone]))
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert "Warning" not in printed.err + printed.out
