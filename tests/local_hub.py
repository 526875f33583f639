"""A Hugging Face Hub in a folder: it answers what huggingface_hub's own client asks it.

    <root>/<user>/<name>/<commit>/...   the files of each commit; a file `HEAD` names the newest
    <root>/<user>/<name>/tags/<tag>     the commit that a tag or branch names

Weights go up by Git LFS, as from a client without Xet; all else goes up in the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"  # lets one write, and read what is private


class LocalHub:
    """The hub, and what it was asked.

    Attributes:
        root: its folder.
        asked: "METHOD /path" of every request, in order.
        private, gated: repositories that only `TOKEN` may read; that ask for permission first.
        down: answers nothing but 503.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.down = False
        self.url = ""

    def publish(self, repo: str, folder: Path, *, tag: str | None = None) -> str:
        """Puts a folder's files there as a commit; returns it."""
        return self.commit(
            repo,
            {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(files_in(folder))},
            tag=tag,
        )

    def commit(self, repo: str, files: dict[str, bytes], *, tag: str | None = None) -> str:
        """Adds files to what is there."""
        home = self.root / repo
        (home / "tags").mkdir(parents=True, exist_ok=True)
        before = self.resolve(repo, "main")
        digest = hashlib.sha1(f"{before}{sorted(files)}".encode())
        for content in files.values():
            digest.update(content)
        new = digest.hexdigest()
        if before is not None:
            shutil.copytree(home / before, home / new)
        for name, content in files.items():
            path = home / new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (home / new).mkdir(exist_ok=True)
        for name in filter(None, ("main", tag)):
            (home / "tags" / name).write_text(new, encoding="utf-8")
        return new

    def resolve(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None if there is no such repository or revision."""
        home = self.root / repo
        named = home / "tags" / revision
        if named.is_file():
            return named.read_text(encoding="utf-8")
        return revision if (home / revision).is_dir() and revision != "tags" else None

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """That of a process whose client talks to this hub, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | own | ({"HF_TOKEN": token} if token else {})


@contextmanager
def local_hub(root: Path) -> Iterator[LocalHub]:
    hub = LocalHub(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = {
    "POST": {
        r"/api/repos/create": "create",
        r"/api/validate-yaml": "validate",
        rf"/api/models/{_REPO}/preupload/.*": "preupload",
        rf"/{_REPO}\.git/info/lfs/objects/batch": "lfs_batch",
        rf"/api/models/{_REPO}/commit/.*": "take_commit",
    },
    "PUT": {r"/lfs/(?P<oid>\w+)": "lfs_put"},
    "GET": {
        rf"/api/models/{_REPO}/revision/(?P<revision>.+)": "info",
        rf"/api/models/{_REPO}": "info",
        rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)": "tree",
        rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": "resolve_file",
    },
    "HEAD": {rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": "resolve_file"},
}


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _route(self) -> None:
        self._content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self._content = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.down:
            return self._fail(503, "", "away")
        for pattern, name in _ROUTES.get(self.command, {}).items():
            if found := re.fullmatch(pattern, path):
                return getattr(self, f"_{name}")(**found.groupdict())
        return self._fail(404, "", f"no {path}")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, repo: str, revision: str | None) -> str | None:
        """The commit to read; None if that was refused."""
        hub = self.hub
        if not (hub.root / repo).is_dir() or (repo in hub.private and not self._may_write):
            return self._fail(401, "RepoNotFound", "Repository not found")
        if repo in hub.gated:
            return self._fail(403, "GatedRepo", f"Access to model {repo} is restricted")
        commit = hub.resolve(repo, revision or "main")
        if commit is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, repo: str, revision: str | None = None) -> None:
        if commit := self._found(repo, revision):
            self._json({"id": repo, "sha": commit, "siblings": [], "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        if commit := self._found(repo, revision):
            home = self.hub.root / repo / commit
            self._json(
                [
                    {
                        "type": "file",
                        "path": path.relative_to(home).as_posix(),
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in sorted(files_in(home))
                ]
            )

    def _resolve_file(self, repo: str, revision: str, file: str) -> None:
        if commit := self._found(repo, revision):
            path = self.hub.root / repo / commit / file
            if not path.is_file():
                self._fail(404, "EntryNotFound", "Entry not found", commit=commit)
                return
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def _create(self) -> None:
        if not self._may_write:
            self._fail(401, "", "Invalid username or password.")
            return
        plain = json.loads(self._content)
        repo = f"{plain['organization']}/{plain['name']}"
        if (self.hub.root / repo).is_dir():
            told = {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
            self._json(told, status=409)
            return
        self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if plain.get("private") or plain.get("visibility") == "private":
            self.hub.private.add(repo)
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, repo: str) -> None:
        files = json.loads(self._content)["files"]
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in files
                ]
            }
        )

    def _lfs_batch(self, repo: str) -> None:
        objects = json.loads(self._content)["objects"]
        self._json(
            {
                "transfer": "basic",
                "objects": [
                    one | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                    for one in objects
                ],
            }
        )

    def _lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self._content).hexdigest() == oid
        (self.hub.root / "lfs").mkdir(exist_ok=True)
        (self.hub.root / "lfs" / oid).write_bytes(self._content)
        self._answer(200, b"", {})

    def _take_commit(self, repo: str) -> None:
        if not self._may_write:
            self._fail(403, "", "You have no rights to write")
            return
        files = {}
        for line in self._content.splitlines():
            plain = json.loads(line)
            value = plain["value"]
            if plain["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif plain["key"] == "lfsFile":
                files[value["path"]] = (self.hub.root / "lfs" / value["oid"]).read_bytes()
        commit = self.hub.commit(repo, files)
        self._json(
            {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}",
                "hookOutput": "",
            }
        )

    def _json(self, plain: Any, *, status: int = 200) -> None:
        self._answer(status, json.dumps(plain).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, *, commit: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
