"""The rights in docs/aws: enough for what Ray and this project ask of AWS, and no more.

Ray's provider and our own storage code make their calls, to an EC2 and an S3 that run here, and
each call is held against the documents as AWS would do it.
"""

import fnmatch
import http.server
import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cpfean.errors import ServiceError
from cpfean.storage.check_file import check_file, read_check_file
from cpfean.storage.checkpoints import CheckpointFolder
from tests.orchestration.ec2 import Ec2
from tests.test_cluster_yaml import TEXT, prepared

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "aws"

Policy = dict[str, Any]
REGION, ACCOUNT, BUCKET = "us-west-2", "000000000000", "BUCKET"
PREFIX = f"arn:aws:s3:::{BUCKET}/cpfean/"


def document(name: str) -> Policy:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# How AWS reads a policy, as far as these use it.


def allows(policy: Policy, action: str, resource: str, context: Mapping[str, str]) -> bool:
    """Whether a statement allows it; a condition on what the request does not say fails."""
    matches = fnmatch.fnmatchcase
    return any(
        statement["Effect"] == "Allow"
        and any(matches(action, pattern) for pattern in listed(statement["Action"]))
        and any(matches(resource, pattern) for pattern in listed(statement["Resource"]))
        and all(
            name in context and any(matches(context[name], str(value)) for value in listed(values))
            for test in statement.get("Condition", {}).values()
            for name, values in test.items()
        )
        for statement in policy["Statement"]
    )


# What must not be in them.


def excess(name: str, policy: Policy) -> list[str]:
    """What a document allows beyond the project's own."""
    found = []
    for statement in policy["Statement"]:
        sid = f"{name}, {statement.get('Sid')}"
        conditions = {key for test in statement.get("Condition", {}).values() for key in test}
        if statement["Effect"] != "Allow" or {"NotAction", "NotResource"} & statement.keys():
            found.append(f"{sid}: says what is not allowed, and so allows all else")
            continue
        for action in listed(statement["Action"]):
            if "*" in action:
                found.append(f"{sid}: {action} is more than one action")
            service = action.split(":")[0]
            for resource in listed(statement["Resource"]):
                where = resource.split(":")
                if service == "s3" and not resource.startswith(PREFIX):
                    only_names = action == "s3:GetBucketLocation" or "s3:prefix" in conditions
                    if resource != PREFIX.split("/")[0] or not only_names:
                        found.append(f"{sid}: {action} on {resource}")
                elif resource == "*":
                    if action != "ec2:DescribeInstances" or "aws:RequestedRegion" not in conditions:
                        found.append(f"{sid}: {action} on everything")
                elif service in ("ec2", "ssm") and where[3] != REGION:
                    found.append(f"{sid}: {action} in other regions")
                if action == "iam:PassRole" and (
                    resource != f"arn:aws:iam::{ACCOUNT}:role/cpfean-worker"
                    or "iam:PassedToService" not in conditions
                ):
                    found.append(f"{sid}: hands on {resource}")
                if resource.endswith(":instance/*") and not conditions & {
                    "aws:RequestTag/ray-cluster-name",
                    "aws:ResourceTag/ray-cluster-name",
                    "ec2:CreateAction",
                }:
                    found.append(f"{sid}: {action} on machines that are not ours")
                if resource.endswith(":volume/*") and "ec2:Encrypted" not in conditions:
                    found.append(f"{sid}: disks that are not encrypted")
            for test in statement.get("Condition", {}).values():
                for value in listed(test.get("s3:prefix", [])):
                    if not re.fullmatch(r"cpfean(/\*)?", value):
                        found.append(f"{sid}: sees the names of {value}")
    return found


@pytest.mark.parametrize("name", ["bucket", "autoscaler"])
def test_the_roles_are_allowed_what_is_ours_alone(name: str) -> None:
    assert excess(name, document(name)) == []


def test_only_machines_take_the_roles() -> None:
    (statement,) = document("trust")["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"


def statement(policy: Policy, sid: str) -> dict[str, Any]:
    (found,) = [one for one in policy["Statement"] if one["Sid"] == sid]
    return found


def widen(sid: str, **fields: Any) -> Callable[[Policy], None]:
    return lambda policy: statement(policy, sid).update(fields)


def without_condition(sid: str) -> Callable[[Policy], None]:
    return lambda policy: statement(policy, sid).pop("Condition") and None


WIDENED: dict[str, tuple[str, Callable[[Policy], None]]] = {
    "all of S3": ("bucket", widen("ReadAndWriteUnderThePrefix", Action="s3:*")),
    "every bucket": ("bucket", widen("ReadAndWriteUnderThePrefix", Resource="*")),
    "all of the bucket": (
        "bucket",
        widen("ReadAndWriteUnderThePrefix", Resource="arn:aws:s3:::BUCKET/*"),
    ),
    "names of the whole bucket": ("bucket", without_condition("SeeWhatIsUnderThePrefix")),
    "names of every prefix": (
        "bucket",
        widen("SeeWhatIsUnderThePrefix", Condition={"StringLike": {"s3:prefix": ["*"]}}),
    ),
    "all but one action": ("bucket", widen("ReadAndWriteUnderThePrefix", NotAction="s3:Put")),
    "all of EC2": ("autoscaler", widen("NameAndEndOurs", Action="ec2:*")),
    "the end of other machines": ("autoscaler", without_condition("NameAndEndOurs")),
    "the start of any machine": ("autoscaler", without_condition("StartWorkersAndNothingElse")),
    "plain disks": ("autoscaler", without_condition("WithEncryptedDisks")),
    "machines of every region": ("autoscaler", without_condition("SeeMachines")),
    "machines in every region": (
        "autoscaler",
        widen("NameAndEndOurs", Resource=f"arn:aws:ec2:*:{ACCOUNT}:instance/*"),
    ),
    "any role": ("autoscaler", widen("HandTheWorkersTheirRole", Resource="*")),
    "the role of the head": (
        "autoscaler",
        widen("HandTheWorkersTheirRole", Resource=f"arn:aws:iam::{ACCOUNT}:role/cpfean-head"),
    ),
    "the role for anything": ("autoscaler", without_condition("HandTheWorkersTheirRole")),
}


@pytest.mark.parametrize("name", WIDENED)
def test_a_wider_document_is_seen(name: str) -> None:
    of, spoil = WIDENED[name]
    policy = document(of)
    spoil(policy)
    assert policy != document(of)
    assert excess(of, policy)


def test_the_documents_speak_of_the_same_places_as_the_cluster() -> None:
    urls = re.findall(r"s3://[\w/.-]+", TEXT)
    assert urls
    assert all(url.replace("s3://", "arn:aws:s3:::").startswith(PREFIX) for url in urls)
    text = (FOLDER / "autoscaler.json").read_text(encoding="utf-8")
    assert set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", text)) == {REGION}
    for identifier in re.findall(r"(?:subnet|sg)-\w{17}", TEXT):
        assert identifier in text


# What Ray asks of EC2.


def test_the_head_may_do_all_that_the_autoscaler_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray.autoscaler._private.providers import _get_node_provider_cls
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME

    monkeypatch.setenv("HOME", str(tmp_path))  # `ray up` leaves its SSH key there
    ec2 = Ec2(monkeypatch)
    config = prepared()
    of_ours = _get_node_provider_cls(config["provider"])
    config = of_ours.bootstrap_config(config)

    ec2.calls.clear()  # all of that was done by the user of `ray up`
    provider = of_ours(config["provider"], config["cluster_name"])
    worker = config["available_node_types"]["gpu-worker"]["node_config"]
    for refusal in ("", "InsufficientInstanceCapacity"):
        ec2.refusal = refusal
        name = {TAG_RAY_NODE_NAME: "ray-cpfean-worker", TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
        (id,) = provider.create_node(worker, name, 1)
        provider.non_terminated_nodes({})
        provider.set_node_tags(id, {"ray-node-status": "up-to-date"})
        provider.internal_ip(id)
    provider.terminate_nodes(list(ec2.machines))
    assert ec2.machines == {}

    calls = {name for name, _ in ec2.calls}
    assert calls == {"RunInstances", "DescribeInstances", "CreateTags", "TerminateInstances"}
    policy = document("autoscaler")
    ours = {"aws:ResourceTag/ray-cluster-name": config["cluster_name"]}
    here = {"aws:RequestedRegion": config["provider"]["region"]}
    arn = f"arn:aws:ec2:{REGION}:{ACCOUNT}"
    assert allows(policy, "ec2:DescribeInstances", "*", here)
    for action in ("ec2:CreateTags", "ec2:TerminateInstances"):
        assert allows(policy, action, f"{arn}:instance/i-1", ours)
        assert not allows(policy, action, f"{arn}:instance/i-1", {})
    for request in ec2.requests("RunInstances"):
        for resource, context in launched(request, arn=arn):
            assert allows(policy, "ec2:RunInstances", resource, context), resource
        at_launch = {"ec2:CreateAction": "RunInstances"}
        assert allows(policy, "ec2:CreateTags", f"{arn}:instance/i-1", at_launch)
        image = request["ImageId"].removeprefix("resolve:ssm:")
        parameter = f"arn:aws:ssm:{REGION}::parameter{image}"
        assert allows(policy, "ssm:GetParameters", parameter, {})
        role = f"arn:aws:iam::{ACCOUNT}:role/{request['IamInstanceProfile']['Name']}"
        to = {"iam:PassedToService": "ec2.amazonaws.com"}
        assert allows(policy, "iam:PassRole", role, to)


def launched(request: dict[str, Any], *, arn: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Everything that a request to start machines needs the right to, and what it says of it."""
    tags = {tag["Key"]: tag["Value"] for tag in request["TagSpecifications"][0]["Tags"]}
    profile = request["IamInstanceProfile"]["Name"]
    yield (
        f"{arn}:instance/*",
        {
            **{f"aws:RequestTag/{key}": value for key, value in tags.items()},
            "ec2:InstanceType": request["InstanceType"],
            "ec2:MetadataHttpTokens": request["MetadataOptions"]["HttpTokens"],
            "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/{profile}",
        },
    )
    for disk in request["BlockDeviceMappings"]:
        yield f"{arn}:volume/*", {"ec2:Encrypted": str(disk["Ebs"]["Encrypted"]).lower()}
    for interface in request["NetworkInterfaces"]:
        yield f"{arn}:subnet/{interface['SubnetId']}", {}
        for group in interface["Groups"]:
            yield f"{arn}:security-group/{group}", {}
    yield f"{arn}:network-interface/*", {}
    yield f"{arn}:key-pair/{request['KeyName']}", {}
    yield f"arn:aws:ec2:{REGION}::image/ami-1", {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda request: request.update(InstanceType="p5.48xlarge"),
        lambda request: request["MetadataOptions"].update(HttpTokens="optional"),
        lambda request: request["IamInstanceProfile"].update(Name="admin"),
        lambda request: request["BlockDeviceMappings"][0]["Ebs"].update(Encrypted=False),
        lambda request: request["NetworkInterfaces"][0].update(SubnetId="subnet-1"),
        lambda request: request["NetworkInterfaces"][0].update(Groups=["sg-1"]),
        lambda request: request["TagSpecifications"][0]["Tags"].clear(),
    ],
)
def test_the_head_may_start_nothing_but_workers(spoil: Callable[[dict[str, Any]], None]) -> None:
    request = prepared()["available_node_types"]["gpu-worker"]["node_config"]
    tags = [{"Key": "ray-cluster-name", "Value": "cpfean"}]
    request |= {"KeyName": "ray-autoscaler_us-west-2", "TagSpecifications": [{"Tags": tags}]}
    request = json.loads(json.dumps(request))
    arn, policy = f"arn:aws:ec2:{REGION}:{ACCOUNT}", document("autoscaler")

    def allowed() -> bool:
        needs = launched(request, arn=arn)
        return all(allows(policy, "ec2:RunInstances", *need) for need in needs)

    assert allowed()
    spoil(request)
    assert not allowed()


# What this project asks of S3.

POLICY_OF_BUCKET = json.loads(json.dumps(document("bucket")).replace(BUCKET, "our-bucket"))


def unframed(stream: IO[bytes]) -> bytes:
    """Pieces, each behind a line with its size, up to an empty one."""
    pieces = []
    while size := int(stream.readline().split(b";")[0], 16):
        pieces.append(stream.read(size))
        stream.readline()
    return b"".join(pieces)


class Store(http.server.BaseHTTPRequestHandler):
    """An S3 that refuses what docs/aws/bucket.json does not allow, and notes it down."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    uploads: dict[str, dict[int, bytes]]
    refused: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, True).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        action = self._action(key, query)
        resource = f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")
        said = {"s3:prefix": query["prefix"]} if "prefix" in query else {}
        body = self._body()
        resources = [resource]
        if action == "s3:DeleteObject" and not key:  # many at once, each named in the body
            keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
            resources = [f"{resource}/{one}" for one in keys]
            for one in keys:
                self.objects.pop(one, None)
        if not all(allows(POLICY_OF_BUCKET, action, one, said) for one in resources):
            self.refused.append(f"{action} {resource} {said}")
            error = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            return self._reply(403, error.encode())
        if not key:
            return self._reply(200, self._listing(query) if "prefix" in query else b"<L/>")
        return self._object(key, query, body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

    def _action(self, key: str, query: dict[str, str]) -> str:
        if not key:
            if "location" in query:
                return "s3:GetBucketLocation"
            bucket = {"PUT": "s3:CreateBucket", "POST": "s3:DeleteObject"}
            return bucket.get(self.command, "s3:ListBucket")  # HEAD needs it too
        if self.command == "DELETE":
            return "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
        return "s3:PutObject" if self.command in ("PUT", "POST") else "s3:GetObject"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = unframed(self.rfile)
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        framed = "aws-chunked" in self.headers.get("Content-Encoding", "")
        return unframed(io.BytesIO(body)) if framed else body

    def _listing(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query["prefix"], query.get("delimiter", "")
        keys, folders = [], set()
        for key in sorted(key for key in self.objects if key.startswith(prefix)):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                keys.append(key)
        row = (
            "<Contents><Key>{}</Key><Size>{}</Size><ETag>e</ETag>"
            "<LastModified>2026-11-24T00:00:00.000Z</LastModified></Contents>"
        )
        rows = [row.format(key, len(self.objects[key])) for key in keys]
        rows += [f"<CommonPrefixes><Prefix>{one}</Prefix></CommonPrefixes>" for one in folders]
        name = "http://s3.amazonaws.com/doc/2006-03-01/"
        count = f"<KeyCount>{len(rows)}</KeyCount><IsTruncated>false</IsTruncated>"
        listing = f'<ListBucketResult xmlns="{name}">{count}{"".join(rows)}</ListBucketResult>'
        return listing.encode()

    def _object(self, key: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            name = "http://s3.amazonaws.com/doc/2006-03-01/"
            started = f'<InitiateMultipartUploadResult xmlns="{name}"><UploadId>u</UploadId>'
            self.uploads[key] = {}
            return self._reply(200, f"{started}</InitiateMultipartUploadResult>".encode())
        if "partNumber" in query:
            self.uploads[key][int(query["partNumber"])] = body
            return self._reply(200, b"")
        if self.command == "POST":
            parts = self.uploads.pop(key)
            self.objects[key] = b"".join(parts[number] for number in sorted(parts))
            done = "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
            return self._reply(200, done.encode())
        if self.command == "PUT":
            self.objects[key] = body
            return self._reply(200, b"")
        if self.command == "DELETE":
            self.objects.pop(key, None)
            return self._reply(204, b"")
        if key not in self.objects:
            return self._reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and self.command == "GET":
            first, last = int(part[1]), int(part[2] or len(self.objects[key]))
            return self._reply(206, self.objects[key][first : last + 1])
        return self._reply(200, self.objects[key])

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    class Fresh(Store):
        objects: dict[str, bytes] = {}  # noqa: RUF012
        uploads: dict[str, dict[int, bytes]] = {}  # noqa: RUF012
        refused: list[str] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
        yield Fresh
        server.shutdown()


class Saved:
    """What a checkpoint leaves in its folder, as far as storage cares."""

    def __init__(self, epoch: int) -> None:
        self.state = SimpleNamespace(progress=(epoch, 0), epoch=epoch)

    def save(self, folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(6 * 2**20))  # more than one part of an upload
        (folder / "state.json").write_text("{}")
        sizes = {file.name: {"size": file.stat().st_size} for file in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({"files": sizes}))


def test_a_worker_may_do_all_that_checkpoints_ask_for(store: type[Store]) -> None:
    folder = CheckpointFolder("s3://our-bucket/cpfean/runs/id/trial-000")
    folder.create()
    for epoch in (1, 2, 3):
        saved: Any = Saved(epoch)
        folder.save(saved)
    assert folder.names() == ["epoch-0002", "epoch-0003"]
    with folder.opened("epoch-0003") as copy:
        assert (copy / "weights").stat().st_size == 6 * 2**20
    assert store.refused == []


def test_a_worker_may_do_all_that_data_doctor_and_tracking_ask_for(
    store: type[Store], tmp_path: Path
) -> None:
    import s3fs
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    from cpfean.data.sources import fetch_folder

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("train_ims.npy", "train_caps.txt"):
        store.objects[f"cpfean/data/{name}"] = b"0" * 1000
    folder = fetch_folder(s3fs.S3FileSystem(), "s3://our-bucket/cpfean/data", cache_dir=tmp_path)
    assert {path.name for path in folder.iterdir()} >= {"train_ims.npy", "train_caps.txt"}

    with check_file("s3://our-bucket/cpfean/runs") as token:
        assert read_check_file("s3://our-bucket/cpfean/runs", token) == token

    file = tmp_path / "best_config.toml"
    file.write_text("seed = 1")
    artifacts = S3ArtifactRepository("s3://our-bucket/cpfean/mlflow/run")
    artifacts.log_artifact(str(file))
    assert [found.path for found in artifacts.list_artifacts()] == [file.name]
    assert Path(artifacts.download_artifacts(file.name)).read_text() == "seed = 1"

    # The two ways in which s3fs looks for a bucket: the first is refused, the second does.
    assert {line.split()[0] for line in store.refused} <= {"s3:ListBucket"}
    assert all("our-bucket {}" in line for line in store.refused)


def test_what_is_beside_the_prefix_stays_closed(store: type[Store]) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    store.objects["secrets/key"] = b"x"
    filesystem = s3fs.S3FileSystem()
    with pytest.raises(PermissionError):
        filesystem.cat_file("our-bucket/secrets/key")
    with pytest.raises(PermissionError):
        filesystem.ls("our-bucket/secrets")
    with pytest.raises(ServiceError, match="cannot be written"), check_file("s3://our-bucket/runs"):
        pass
