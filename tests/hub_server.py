"""A server on loopback that speaks the part of the Hub's protocol that a merge uses.

Repositories are folders given to `add`; each call is a new commit. Files with tensors are large
files: asked for, they redirect to a second address with a signature, as the Hub's storage does.
Every request is recorded, and faults can be planted.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

PIECE_BYTES = 4096
STALL_S = 0.8


@dataclass
class Request:
    """What came in, and how many bytes of a body went out."""

    method: str
    path: str
    ranged: bool
    authorised: bool
    sent_bytes: int = 0


@dataclass
class Repo:
    """Commits, by hash, of name to bytes; and what branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: object) -> None:
        """Clients that are killed or give up in the middle are what is tested."""


class HubServer:
    """Starts at once; `close` it.

    Attributes:
        endpoint: what HF_ENDPOINT must be.
        requests: all that came, in order.
        faults: (pattern of the file's name, kind), each used once by the next GET that fits. Kinds:
            "500", "429", "short" (the connection ends early), "stall" (nothing comes for a while),
            "other" (other bytes than announced), "full" (not the range, but the whole file).
        sending: called after every piece of a large file that is sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[Request] = []
        self.faults: list[tuple[str, str]] = []
        self.sending: Callable[[str], None] = lambda name: None
        self.lock = threading.Lock()
        self._blobs: dict[str, tuple[str, bytes]] = {}
        self._servers = [_Server(("127.0.0.1", 0), self._handler()) for _ in "ab"]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def close(self) -> None:
        """Stop answering."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Commit the files of `folder` to a branch of a repository; returns the commit's hash."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        repo = self.repos.setdefault(name, Repo())
        commit = hashlib.sha1(repr((name, len(repo.commits), files)).encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs[branch] = commit
        for file, content in files.items():
            self._blobs[hashlib.sha256(content).hexdigest()] = (f"{name}/{file}", content)
        return commit

    def fetched(self) -> list[str]:
        """Large files, as org/name/file, that were asked for whole, in order."""
        return [
            self._blobs[r.path.rpartition("/")[2]][0]
            for r in self.requests
            if r.path.startswith("/storage/") and not r.ranged
        ]

    def env(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this server, and `home` for its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "OMP_NUM_THREADS": "1",
        }

    def sent_bytes(self) -> int:
        """Bytes of large files that went out."""
        return sum(r.sent_bytes for r in self.requests if r.path.startswith("/storage/"))

    def _fault(self, name: str) -> str:
        with self.lock:
            for fault in self.faults:
                if re.search(fault[0], name):
                    self.faults.remove(fault)
                    return fault[1]
        return ""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                ranged, authorised = "Range" in self.headers, "Authorization" in self.headers
                self.record = Request(self.command, path, ranged, authorised)
                with hub.lock:
                    hub.requests.append(self.record)
                if path.startswith("/storage/"):
                    name, content = hub._blobs[path.rpartition("/")[2]]
                    return self.content(name, content, {})
                api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
                file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                found = api or file
                if found is None:
                    return self.refuse(404, "NotFound")
                name = found[1]
                if name in hub.renamed:
                    target = self.path.replace(name, hub.renamed[name], 1)
                    return self.empty(307, {"Location": target})
                repo = hub.repos.get(name)
                if repo is None or (repo.private and not authorised):
                    return self.refuse(404 if authorised else 401, "RepoNotFound")
                revision = found[2] or "main"
                commit = repo.refs.get(revision, revision)
                if commit not in repo.commits:
                    return self.refuse(404, "RevisionNotFound")
                files = repo.commits[commit]
                if api:
                    return self.listing(name, commit, files)
                if repo.gated and not authorised:
                    return self.refuse(403, "GatedRepo")
                if found[3] not in files:
                    return self.refuse(404, "EntryNotFound")
                return self.file(commit, found[3], files[found[3]])

            def listing(self, name: str, commit: str, files: dict[str, bytes]) -> None:
                if hub._fault("api") == "500":
                    return self.refuse(500, "")
                siblings = []
                for file, content in files.items():
                    entry = {"rfilename": file, "size": len(content), "blobId": _git_sha1(content)}
                    if _is_large(file):
                        digest = hashlib.sha256(content).hexdigest()
                        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                    siblings.append(entry)
                body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
                self.content("", json.dumps(body).encode(), {"Content-Type": "application/json"})

            def file(self, commit: str, name: str, content: bytes) -> None:
                headers = {"X-Repo-Commit": commit}
                if not _is_large(name):
                    return self.content(
                        name, content, headers | {"ETag": f'"{_git_sha1(content)}"'}
                    )
                digest = hashlib.sha256(content).hexdigest()
                headers |= {
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(content)),
                    "Location": f"{hub.storage}/storage/{digest}?signature=sealed",
                }
                self.empty(302, headers)

            def content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
                fault = hub._fault(name) if name and self.command == "GET" else ""
                if fault in ("500", "429"):
                    return self.refuse(int(fault), "")
                if fault == "stall":
                    time.sleep(STALL_S)
                if fault == "other":
                    content = content[:-1] + bytes([content[-1] ^ 1])
                total, begin, end = len(content), 0, len(content)
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked and fault != "full":
                    begin, end = int(asked[1]), min(int(asked[2] or total - 1) + 1, total)
                    headers = headers | {"Content-Range": f"bytes {begin}-{end - 1}/{total}"}
                self.send_response(206 if asked and fault != "full" else 200)
                for key, value in (headers | {"Content-Length": str(end - begin)}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                stop = begin + (end - begin) // 2 if fault == "short" else end
                try:
                    for at in range(begin, stop, PIECE_BYTES):
                        piece = content[at : min(at + PIECE_BYTES, stop)]
                        self.wfile.write(piece)
                        self.record.sent_bytes += len(piece)
                        if _is_large(name):
                            hub.sending(name)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                if fault == "short":
                    self.close_connection = True

            def refuse(self, status: int, code: str) -> None:
                self.empty(status, {"X-Error-Code": code} if code else {})

            def empty(self, status: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in (headers | {"Content-Length": "0"}).items():
                    self.send_header(key, value)
                self.end_headers()

        return Handler


def serving(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[HubServer]:
    """A server that huggingface_hub uses in this process, with an empty cache in `home`.

    The libraries read their environment when they are imported, so what they made of it is set.
    Nobody waits between tries.
    """
    import huggingface_hub.file_download
    import huggingface_hub.utils._http
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    import optimer_engine.network

    server = HubServer()
    url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    impatient = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(huggingface_hub.file_download, "time", impatient)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", impatient)
    monkeypatch.setattr(optimer_engine.network, "time", impatient)
    close_session()
    try:
        yield server
    finally:
        close_session()
        server.close()


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
