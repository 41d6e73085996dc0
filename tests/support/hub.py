"""A stand-in of the Hugging Face hub's HTTP API, as far as an upload of a model talks to it.

It takes what huggingface_hub sends apart, checks it as the hub does, and keeps the files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

TOKEN = "hf_of_the_test"
USER = "ada"
# What the hub keeps as large files, by its default .gitattributes.
_LARGE = (".safetensors", ".onnx", ".png")
_SAMPLE_BYTES = 512
_PIPELINES = {"unconditional-image-generation", "text-to-image"}
_LICENSES = {"apache-2.0", "cc-by-4.0", "mit", "other"}


class RefusedError(Exception):
    """An answer with an error's status."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **more}


@dataclass
class Model:
    """A repository on the hub."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class HubStandIn:
    """Serves on a free port of this machine while its ``with`` block runs.

    Attributes:
        models: by name, such as ``ada/digits``.
        asked: method and path of each request.
        fault: the status that answers every upload of a large file; None: it is taken.
        refusal: the status that answers every commit; None: it is taken.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fault: int | None = None
        self.refusal: int | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Any:
        """The JSON answer to a request; raises RefusedError."""
        self.asked.append(f"{method} {path}")
        routes = (
            ("POST", r"/api/repos/create", self._create),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)", self._info),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)/tree/main", self._tree),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self._preupload),
            ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self._batch),
            ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/verify", self._verify),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self._commit),
        )
        # The storage behind the hub knows no token: the address that it was given is enough.
        if method == "PUT" and (stored := re.fullmatch(r"/storage/([0-9a-f]{64})", path)):
            return self._store(stored[1], body)
        for of_method, pattern, route in routes:
            if method == of_method and (found := re.fullmatch(pattern, path)):
                if token != TOKEN:
                    raise RefusedError(401, "Invalid username or password.")
                return route(*found.groups(), body)
        raise RefusedError(404, "Not found")

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        owner = asked["organization"] or USER
        assert asked.get("type") in (None, "model"), asked
        assert asked.get("visibility") in (None, "public", "private"), asked
        name = f"{owner}/{asked['name']}"
        if owner != USER:
            raise RefusedError(403, f"You don't have the rights to create a model under {owner}")
        if name in self.models:
            raise RefusedError(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.models[name] = Model(private=asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}"}

    def _model(self, name: str) -> Model:
        if name not in self.models:
            raise RefusedError(404, "Repository not found")
        return self.models[name]

    def _info(self, name: str, body: bytes) -> Any:
        return {"id": name, "private": self._model(name).private, "tags": [], "siblings": []}

    def _tree(self, name: str, body: bytes) -> Any:
        files = self._model(name).files
        return [
            {"type": "file", "path": path, "size": len(held), "oid": hashlib.sha1(held).hexdigest()}
            for path, held in files.items()
        ]

    def _validate(self, body: bytes) -> Any:
        asked = json.loads(body)
        assert asked["repoType"] == "model"
        if found := problems(asked["content"]):
            raise RefusedError(400, "Invalid", errors=[{"message": text} for text in found])
        return {"errors": [], "warnings": []}

    def _preupload(self, name: str, body: bytes) -> Any:
        self._model(name)
        files = json.loads(body)["files"]
        for file in files:
            sample = base64.b64decode(file["sample"], validate=True)
            assert len(sample) == min(file["size"], _SAMPLE_BYTES), file
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
        }

    def _batch(self, name: str, body: bytes) -> Any:
        self._model(name)
        asked = json.loads(body)
        assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
        assert "basic" in asked["transfers"]
        verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify", "header": {}}
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {
                    "upload": {"href": f"{self.url}/storage/{item['oid']}", "header": {}},
                    "verify": verify,
                },
            }
            for item in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> Any:
        if self.fault:
            raise RefusedError(self.fault, "The storage does not take it")
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return {}

    def _verify(self, name: str, body: bytes) -> Any:
        asked = json.loads(body)
        assert len(self.large[asked["oid"]]) == asked["size"]
        return {}

    def _commit(self, name: str, body: bytes) -> Any:
        model = self._model(name)
        if self.refusal:
            raise RefusedError(self.refusal, "A commit has happened since. Please retry.")
        header, *items = [json.loads(line) for line in body.splitlines()]
        assert header["key"] == "header"
        assert header["value"]["summary"]
        files, removed = {}, set()
        for item in items:
            value = item["value"]
            if item["key"] == "deletedFile":
                assert value["path"] in model.files, value
                removed.add(value["path"])
                continue
            if item["key"] == "lfsFile":
                content = self.large.get(value["oid"], b"")
                assert (value["algo"], value["size"]) == ("sha256", len(content)), value
                assert value["path"].endswith(_LARGE)
            else:
                assert (item["key"], value["encoding"]) == ("file", "base64"), item
                content = base64.b64decode(value["content"], validate=True)
            files[value["path"]] = content
        # All of it, or nothing.
        kept = {path: held for path, held in model.files.items() if path not in removed}
        model.files = kept | files
        model.commits.append(header["value"]["summary"])
        oid = hashlib.sha1(body).hexdigest()
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def write(self, name: str, folder: Path) -> None:
        """Write what a model holds into ``folder``, as a download would."""
        for path, content in self.models[name].files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def problems(card: str) -> list[str]:
    """What the hub would not take of a card's metadata."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not front:
        return ["there is no metadata"]
    values = yaml.safe_load(front[1])
    found = []
    if values.get("pipeline_tag", "text-to-image") not in _PIPELINES:
        found.append(f"pipeline_tag {values['pipeline_tag']!r} is unknown")
    if values.get("license", "other") not in _LICENSES:
        found.append(f"license {values['license']!r} must be one of {sorted(_LICENSES)}")
    for entry in values.get("model-index", []):
        assert isinstance(entry["name"], str)
        for result in entry["results"]:
            assert {"type", "name"} <= result["dataset"].keys()
            assert result["task"]["type"] in _PIPELINES
            for metric in result["metrics"]:
                assert isinstance(metric["value"], float)
                assert isinstance(metric["type"], str)
    if not all(isinstance(tag, str) for tag in values.get("tags", [])):
        found.append("tags must be texts")
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        path = self.path.partition("?")[0]
        try:
            body = self._body()
            answer = self.hub.answer(
                self.command, path, body, token if scheme == "Bearer" else None
            )
            self._send(200, answer)
        except RefusedError as refused:
            self._send(refused.status, refused.body)
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            self._send(400, {"error": f"the stand-in found {type(error).__name__}: {error}"})

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
