"""Data, checkpoints and records in a real S3 server, which fails behind a proxy."""

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import s3fs
import torch

from cpfean.config import DataConfig
from cpfean.data.sources import resolve_data
from cpfean.data.split import data_fingerprint
from cpfean.errors import ServiceError
from cpfean.records.run_folder import RunFolder
from cpfean.storage import object_store as storage
from cpfean.storage.checkpoints import CheckpointFolder
from cpfean.training.checkpoint import Checkpoint, read_state
from cpfean.training.loop import fit
from orchestration.settings import Settings
from orchestration.study.follower import Follower, Pauses
from orchestration.study.records_copy import CopyFolder, RecordsCopy, fetch_records
from tests.faults import Fault, ObjectStore, Proxy
from tests.lab.hosts import wait_until
from tests.orchestration.samples import TINY, record
from tests.storage.test_checkpoints import Saver, Trained

pytestmark = pytest.mark.slow

OLD, NEW = "AKIAOLDOLDOLDOLD0000", "AKIANEWNEWNEWNEW0000"
EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired: canary-token</Message></Error>"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    store = ObjectStore(tmp_path_factory.mktemp("moto"))
    yield store
    store.stop()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    cache = tmp_path_factory.mktemp("cache")
    trained = Trained()
    fit(
        TINY.with_overrides({"optim.epochs": 1}),
        data_folder=resolve_data(TINY.data, cache_dir=cache),
        cache_dir=cache,
        reporter=trained,
        device=torch.device("cpu"),
    )
    return trained.checkpoint


@pytest.fixture
def proxy(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands before the store; clients know no other address."""
    proxy = Proxy(store.port)
    # Made for another endpoint by an earlier test of this process.
    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    be_known_as(OLD, tmp_path)
    monkeypatch.setitem(
        storage._S3,
        "config_kwargs",
        storage._S3["config_kwargs"] | {"connect_timeout": 1, "read_timeout": 1},
    )
    monkeypatch.setattr(storage, "_ANSWER", 5.0)
    yield proxy
    proxy.close()


def be_known_as(key: str, folder: Path) -> None:
    (folder / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = canary-secret\n"
        "aws_session_token = canary-token\n"
    )


@pytest.fixture
def bucket(store: ObjectStore, proxy: Proxy, tmp_path: Path) -> str:
    name = tmp_path.name.replace("_", "-").lower()[:60].strip("-")
    store.make_bucket(name)
    return name


@pytest.fixture
def saver(bucket: str, checkpoint: Checkpoint) -> Saver:
    return Saver(CheckpointFolder(f"s3://{bucket}/runs/trial"), checkpoint)


def first(line: bytes) -> str:
    return line.split(b"\r\n")[0].decode()


def test_checkpoints_are_kept_and_found(saver: Saver) -> None:
    assert saver.folder.newest_valid() is None
    saver.save(1, 2, 3)
    assert saver.folder.names() == ["epoch-0002", "epoch-0003"]
    assert saver.folder.newest_valid() == "epoch-0003"
    with saver.folder.opened("epoch-0003") as folder:
        assert read_state(folder).epoch == 3


def test_the_manifest_is_sent_last_and_without_it_nothing_is_seen(
    saver: Saver, proxy: Proxy
) -> None:
    sent: list[str] = []

    def noted(head: bytes) -> bool:
        if head.startswith(b"PUT "):
            sent.append(first(head).split()[1].split("?")[0].rsplit("/", 1)[-1])
        return False

    proxy.fault, proxy.only = 500, noted
    saver.save(1)
    assert len(sent) > 4
    assert sent.index("manifest.json") == len(sent) - 1
    proxy.fault = "none"
    saver.save(2)
    # A store that is slow to show what it has taken.
    proxy.fault, proxy.body = 404, b""
    proxy.only = lambda head: "epoch-0002/manifest.json" in first(head)
    assert saver.folder.newest_valid() == "epoch-0001"
    proxy.fault = "none"
    assert saver.folder.newest_valid() == "epoch-0002"


@pytest.mark.parametrize(
    "fault",
    [
        503,
        "lose",
        "refuse",
        *(pytest.param(more, marks=pytest.mark.drill) for more in (500, 429, "reset", "hang")),
    ],
)
def test_a_store_that_fails_for_a_while_delays_an_upload_and_no_more(
    saver: Saver,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    times = 4
    sent: list[str] = []

    def early(head: bytes) -> bool:
        line = first(head)
        if line.startswith("PUT "):
            sent.append(line)
        return "best/model.safetensors" in line and proxy.met < times

    def back(seconds: float) -> None:
        proxy.fault = "none"

    saver.save(1)
    proxy.fault, proxy.only, proxy.body = fault, early, b"<Error><Code>Odd</Code></Error>"
    if fault == "refuse":
        monkeypatch.setattr("cpfean.storage.object_store.time.sleep", back)
    saver.save(2)
    assert saver.folder.newest_valid() == "epoch-0002"
    told = [entry.getMessage() for entry in caplog.records if "delayed" in entry.getMessage()]
    assert len(told) <= 1
    if fault != "refuse":
        assert proxy.met == times
        others = [line for line in sent if "best/model.safetensors" not in line]
        assert len(others) == len(set(others))  # what has arrived is not sent again


def test_a_store_that_stays_away_ends_the_attempt_in_time_and_takes_nothing_with_it(
    saver: Saver,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saver.save(1)
    monkeypatch.setattr("cpfean.storage.object_store._PATIENCE", 2.0)
    # The client's own tries take some seconds, and what is to be told is their outcome.
    monkeypatch.setattr("cpfean.storage.object_store._ANSWER", 60.0)
    proxy.fault, proxy.body = 503, b"<Error><Code>SlowDown</Code></Error>"
    proxy.only = lambda head: "epoch-0002/model.safetensors" in first(head)
    with pytest.raises(ServiceError, match=r"epoch-0002/model.safetensors: .*for 2 s \(SlowDown\)"):
        saver.save(2)
    told = [entry.getMessage() for entry in caplog.records if "delayed" in entry.getMessage()]
    assert len(told) == 1
    assert told[0].endswith("epoch-0002/model.safetensors: delayed, the store says SlowDown")
    proxy.fault = "none"
    assert saver.folder.newest_valid() == "epoch-0001"


def test_credentials_that_expire_are_read_anew(
    saver: Saver, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver.save(1)
    proxy.fault, proxy.body = 403, EXPIRED
    proxy.only = lambda head: OLD.encode() in head
    with pytest.raises(ServiceError, match=r"refuses our credentials .*ExpiredToken") as failure:
        saver.save(2)
    be_known_as(NEW, tmp_path)
    saver.save(2)
    assert saver.folder.newest_valid() == "epoch-0002"
    told = " ".join([str(failure.value), *(entry.getMessage() for entry in caplog.records)])
    for secret in ("canary", OLD, NEW):
        assert secret not in told


def test_a_bucket_that_is_not_there_is_named(proxy: Proxy, checkpoint: Checkpoint) -> None:
    saver = Saver(CheckpointFolder("s3://no-such-bucket/trial"), checkpoint)
    assert saver.folder.newest_valid() is None
    with pytest.raises(ServiceError, match="no such bucket"):
        saver.save(1)


def test_data_are_fetched_as_they_are(store: ObjectStore, proxy: Proxy, tmp_path: Path) -> None:
    local = resolve_data(TINY.data, cache_dir=tmp_path / "made")
    store.make_bucket("data-of-a-test")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.put(str(local), "data-of-a-test/set", recursive=True)
    remote = replace(DataConfig(), path="s3://data-of-a-test/set")
    proxy.fault = "reset"
    proxy.only = lambda head: "_ims.npy" in first(head) and proxy.met < 2
    fetched = resolve_data(remote, cache_dir=tmp_path / "fetched")
    assert proxy.met == 2
    assert data_fingerprint(fetched) == data_fingerprint(local)


@pytest.fixture
def in_bucket(bucket: str, where: Settings) -> Settings:
    return replace(where, storage=f"s3://{bucket}/runs")


def copied(where: Settings) -> tuple[RunFolder, RecordsCopy]:
    """A study with one record, and the copy of it."""
    folder = RunFolder(where.output / "s")
    folder.create({"kind": "sweep"})
    folder.write(record(0, 10.0, state="running"))
    assert where.storage is not None
    place = CopyFolder(where.storage, "s", patience=0.0)
    return folder, RecordsCopy(folder, place, answer_seconds=1.0)


def test_records_are_copied_and_fetched_as_they_were(in_bucket: Settings) -> None:
    fetch_records("s", in_bucket, say=pytest.fail)
    assert not in_bucket.output.exists()
    folder, copy = copied(in_bucket)
    said: list[str] = []
    copy.check()
    follower = Follower([copy], say=said.append)
    follower.start()
    folder.write(second := record(1, 5.0, 6.0, state="running"))
    follower.update(second)
    assert follower.close()
    records, number = folder.records(), folder.id
    shutil.rmtree(in_bucket.output)
    fetch_records("s", in_bucket, say=said.append)
    assert (folder.records(), folder.id) == (records, number)
    (line,) = said
    assert f"fetched from {in_bucket.storage}/studies/s, with 2 trial(s) and 3 epoch(s)" in line


@pytest.mark.parametrize("fault", [503, "refuse", pytest.param("hang", marks=pytest.mark.drill)])
def test_a_store_that_is_away_does_not_hold_a_study_up_and_gets_the_records_later(
    in_bucket: Settings,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
) -> None:
    caplog.set_level(logging.WARNING, logger="cpfean")
    folder, copy = copied(in_bucket)
    said: list[str] = []
    follower = Follower([copy], say=said.append, pauses=Pauses(retry=0.1))
    proxy.fault, proxy.body = fault, b"<Error><Code>SlowDown</Code></Error>"
    began = time.monotonic()
    copy.check()
    follower.start()
    assert time.monotonic() - began < 4
    wait_until(lambda: len(said) > 0, seconds=60, what="the warning")
    folder.write(changed := record(0, 10.0, 20.0, state="running"))
    follower.update(changed)
    proxy.fault = "none"
    assert follower.close()
    assert len(said) == 1
    assert "training goes on" in said[0]
    assert caplog.messages == []  # nor does the store's own client say it again and again
    shutil.rmtree(in_bucket.output)
    fetch_records("s", in_bucket, say=said.append)
    assert [found.epochs for found in folder.records()] == [2]
