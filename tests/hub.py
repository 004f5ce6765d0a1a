"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it when RL Zoo pushes and loads a model, and no more."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Model repositories in memory, served on a free port of this machine; only who brings the token may write."""

    TOKEN = "hf_" + 34 * "x"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        route = self.path.split("/")
        repository = "/".join(route[3:5])
        if self.headers["Authorization"] != f"Bearer {Hub.TOKEN}":
            self._fail(401)
        elif self.path == "/api/repos/create":
            repository = "{organization}/{name}".format(**json.loads(body))
            # No repository of the Hub is empty
            self.server.files.setdefault(repository, {".gitattributes": b""})
            self._answer_json({"url": f"{self.server.url}/{repository}"})
        elif self.path == "/api/validate-yaml":
            self._answer_json({"errors": [], "warnings": []})
        elif route[5:] == ["preupload", "main"]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer_json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif route[5:] == ["commit", "main"]:
            self._commit(self.server.files[repository], [json.loads(line) for line in body.splitlines()])
            self._answer_json({"commitUrl": f"{self.server.url}/{repository}/commit/{self._sha}", "commitOid": self._sha})
        else:
            self._fail(404)

    def _commit(self, files: dict[str, bytes], items: list[dict[str, Any]]) -> None:
        header, *additions = items
        self.server.commits.append(header["value"]["summary"])
        files.update({item["value"]["path"]: base64.b64decode(item["value"]["content"]) for item in additions})

    def do_GET(self) -> None:
        # /api/models/<organization>/<name>/<what>/<revision> or /<organization>/<name>/resolve/<revision>/<file>
        route = self.path.partition("?")[0].split("/")
        repository = "/".join(route[3:5] if route[1] == "api" else route[1:3])
        files = self.server.files.get(repository)
        if files is None:
            self._fail(404, "RepoNotFound")
        elif route[1] == "api" and route[5] == "revision":
            self._answer_json({"id": repository, "sha": self._sha, "siblings": [{"rfilename": path} for path in files]})
        elif route[1] == "api":
            self._answer_json([{"type": "file", "path": path, "size": len(files[path]), "oid": ""} for path in files])
        elif (path := "/".join(route[5:])) in files:
            self._answer(files[path], headers={"X-Repo-Commit": self._sha, "ETag": hashlib.sha1(files[path]).hexdigest()})
        else:
            self._fail(404, "EntryNotFound")

    do_HEAD = do_GET

    @property
    def _sha(self) -> str:
        return f"{len(self.server.commits):040x}"

    def _answer_json(self, answer: object) -> None:
        self._answer(json.dumps(answer).encode())

    def _fail(self, status: int, code: str = "") -> None:
        self._answer(b"{}", status, {"X-Error-Code": code, "X-Repo-Commit": self._sha})

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
