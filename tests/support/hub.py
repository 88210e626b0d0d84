"""A Hugging Face hub of one process: repositories in memory, spoken to as `huggingface_hub` speaks to the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
LARGE = (".safetensors", ".gguf")


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """`uploads` counts large files that were sent; `fail` makes the next so many uploads fail.

    `cut` ends the next so many large downloads half way; `sent` counts the bytes of files that went out. `says` is what the
    list of files tells about their sizes, where it lies.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: int = 0
    fail: int = 0
    cut: int = 0
    sent: int = 0
    says: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def file(self, repository: str, name: str, branch: str = "main") -> bytes:
        """What is stored, large files looked up."""
        data = self.repositories[repository].branches[branch][name]
        return self.objects[data[4:].decode()] if data.startswith(b"lfs:") else data

    def commit_of(self, repository: str, branch: str) -> str:
        files = self.repositories[repository].branches[branch]
        return hashlib.sha1(repr((branch, sorted(files.items()))).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if not self._may():
            return self._send({"error": "Invalid credentials"}, 401)
        if parts == ["api", "validate-yaml"]:
            return self._send({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            there = name in self.hub.repositories
            self.hub.repositories.setdefault(
                name, Repository(asked.get("private") or asked.get("visibility") == "private")
            )
            return self._send({"url": f"{self.hub.endpoint}/{name}"}, 409 if there else 200)
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._send({"objects": [self._offer(entry) for entry in json.loads(body)["objects"]]})
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            return self._on_branch("/".join(parts[2:4]), parts[4], parts[5], body)
        return self._send({"error": f"no {self.path}"}, 404)

    def _on_branch(self, name: str, verb: str, branch: str, body: bytes) -> None:
        branches = self.hub.repositories[name].branches
        if verb == "branch":
            there = branch in branches
            branches.setdefault(branch, dict(branches["main"]))
            return self._send({}, 409 if there else 200)
        if verb == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        assert verb == "commit", verb
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                branches[branch][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                branches[branch][entry["value"]["path"]] = b"lfs:" + entry["value"]["oid"].encode()
        commit = self.hub.commit_of(name, branch)
        return self._send(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"}
        )

    def _offer(self, entry: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.hub.endpoint}/upload/{entry['oid']}"
        sent = entry["oid"] in self.hub.objects
        return entry if sent else {**entry, "actions": {"upload": {"href": href}}}

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.fail:
            self.hub.fail -= 1
            return self._send({"error": "full"}, 507)
        self.hub.uploads += 1
        self.hub.objects[self.path.rpartition("/")[2]] = data
        return self._send({})

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._may()):
            return self._send({"error": "Repository not found"}, 401 if found is None else 404, code="RepoNotFound")
        asked = parts[5] if api and len(parts) > 5 else parts[3] if not api else "main"
        branch = next((b for b in found.branches if asked in (b, self.hub.commit_of(name, b))), None)
        if branch is None:
            return self._send({"error": "no revision"}, 404, code="RevisionNotFound")
        commit, files = self.hub.commit_of(name, branch), found.branches[branch]
        if api and "tree" in parts:
            tree = [{"type": "file", "path": f, "size": self._size(name, f, branch), "oid": "0" * 40} for f in files]
            return self._send(tree)
        if api:
            return self._send(
                {
                    "id": name, "sha": commit, "private": found.private,
                    "siblings": [{"rfilename": f, "size": self._size(name, f, branch)} for f in files],
                }
            )  # fmt: skip
        data = self.hub.file(name, "/".join(parts[4:]), branch)
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(data))}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        whole = self.command == "HEAD" or not begin
        if not whole:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        return self._send_bytes(data[0 if whole else begin :], headers, 200 if whole else 206)

    def _size(self, name: str, file: str, branch: str) -> int:
        return self.hub.says.get(file, len(self.hub.file(name, file, branch)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _may(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _send(self, document: Any, status: int = 200, code: str = "") -> None:
        data = json.dumps(document).encode()
        more = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send_bytes(data, more, status)

    def _send_bytes(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "ETag" in headers:
            half = bool(self.hub.cut) and len(data) > 1 << 14
            self.hub.cut -= half
            data = data[: len(data) // 2] if half else data
            self.hub.sent += len(data)
            self.close_connection |= half
        self.wfile.write(data)
