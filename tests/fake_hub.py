"""A Hugging Face hub for tests: serves folders over HTTP on 127.0.0.1, and takes commits of small files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

LICENCES = ("cc-by-4.0", "cc0-1.0", "mit", "other", "unknown")  # some of those that the hub knows
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A running hub.

    Attributes:
        url: what HF_ENDPOINT should be.
        fetched: files that were downloaded, in order.
        gated: repositories whose licence has not been accepted.
        private: of repositories that were made here, whether they are private.
        uploaded: what was committed to each repository, by file.
        refuses: a status with which every request to write is answered; 0: none.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.private: dict[str, bool] = {}
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.refuses = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(repositories))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self, repositories: dict[str, Path]) -> type[BaseHTTPRequestHandler]:
        fetched, gated, hub = self.fetched, self.gated, self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(send_body=False)

            def do_GET(self):
                self.answer(send_body=True)

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = self.path.split("?")[0].strip("/").split("/")
                name = "/".join(parts[2:4])
                if hub.refuses:
                    self.refuse("Refused", status=hub.refuses)
                elif parts == ["api", "repos", "create"]:
                    wanted = json.loads(body)
                    name = f"{wanted['organization']}/{wanted['name']}"
                    if name in hub.private:
                        self.send_json({"error": "it is there", "url": f"{hub.url}/{name}"}, status=409)
                        return
                    hub.private[name] = wanted["private"]
                    self.send_json({"url": f"{hub.url}/{name}"})
                elif parts == ["api", "validate-yaml"]:
                    licence = re.search(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
                    named = re.search(r"^license_name: (.*)$", json.loads(body)["content"], re.MULTILINE)
                    wrong = licence is not None and licence[1] not in LICENCES
                    wrong |= named is not None and not re.fullmatch(r"[a-z0-9.-]+", named[1])
                    errors = [{"message": '"license" must be one of a list'}] * wrong
                    self.send_json({"errors": errors, "warnings": []}, status=400 if wrong else 200)
                elif parts[4:5] == ["preupload"]:
                    files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                    self.send_json({"files": [{**file, "shouldIgnore": False} for file in files]})
                else:
                    lines = [json.loads(line) for line in body.splitlines()]
                    files = [line["value"] for line in lines if line["key"] == "file"]
                    held = hub.uploaded.setdefault(name, {})
                    held |= {file["path"]: base64.b64decode(file["content"]) for file in files}
                    self.send_json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

            def send_json(self, content, status: int = 200) -> None:
                headers = {"Content-Type": "application/json"}
                self.send(json.dumps(content).encode(), headers, send_body=True, status=status)

            def answer(self, send_body: bool) -> None:
                parts = self.path.split("?")[0].strip("/").split("/")
                is_api = parts[:2] == ["api", "models"]
                made = "/".join(parts[2:4])
                if is_api and made in hub.private:
                    self.send_json({"id": made, "sha": COMMIT, "private": hub.private[made], "siblings": []})
                    return
                name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
                folder = repositories.get(name)
                if folder is None:
                    self.refuse("RepoNotFound")
                elif name in gated and not is_api:
                    self.refuse("GatedRepo", status=403)
                elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
                    self.refuse("RevisionNotFound")
                elif is_api:
                    files = [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]
                    info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                    self.send(json.dumps(info).encode(), {"Content-Type": "application/json"}, send_body)
                else:
                    file = "/".join(rest[2:])
                    body = (folder / file).read_bytes()
                    etag = hashlib.sha1(body).hexdigest()
                    self.send(body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, send_body)
                    if send_body:
                        fetched.append(file)

            def refuse(self, code: str, status: int = 404) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def send(self, body: bytes, headers: dict[str, str], send_body: bool, status: int = 200) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if send_body:
                    self.wfile.write(body)

        return Handler


def reach(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub take a hub for the real one in this process, with a cache of its own."""
    url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Serves repositories, `owner/name` to folder, while the context lasts."""
    hub = FakeHub(repositories)
    try:
        yield hub
    finally:
        hub.close()
