"""A hub on this machine: enough of the HuggingFace hub's API for huggingface_hub to list and fetch files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


@dataclass
class Answer:
    """A refusal or fault in place of an answer."""

    status: int
    code: str = ""
    """X-Error-Code, by which huggingface_hub chooses the kind of error."""
    message: str = ""


@dataclass
class Hub:
    """A repository under one name or several; what a test changes acts on the next request."""

    files: dict[str, bytes]
    repos: tuple[str, ...] = ("owner/name",)
    address: str = ""
    listing: Answer | None = None
    """In place of the repository's listing."""
    fetching: Answer | None = None
    """In place of every file."""
    asked: list[str] = field(default_factory=list)
    """The paths that were asked for below the repositories."""
    fetched: list[str] = field(default_factory=list)
    """The files that were sent."""
    sent: dict[str, bytes] = field(default_factory=dict)
    """By name, what is sent instead of a file whose digest is listed."""
    cut: str = ""
    """The file after whose first bytes the connection ends."""
    tokens: set[str] = field(default_factory=set)
    """The Authorization headers that came with them."""

    def entry(self, name: str) -> dict[str, object]:
        """Return the listed entry of a file; weights and vocabularies are stored with LFS."""
        content = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name.endswith((".safetensors", ".model", ".bin")):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            repo = next((each for each in hub.repos if f"/{each}" in path), "none")
            if repo != "none":  # huggingface_hub also asks for what is no repository's
                hub.asked.append(path)
                hub.tokens.add(self.headers.get("Authorization", ""))
            listed = path.startswith(f"/api/models/{repo}")
            name = path.partition(f"/{repo}/resolve/{COMMIT}/")[2]
            refusal = hub.listing if path.startswith("/api/") else hub.fetching
            if refusal is None and not listed and name not in hub.files:
                refusal = Answer(
                    404, "RepoNotFound" if path.startswith("/api/") else "EntryNotFound", "not found"
                )
            if refusal is not None:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                error = json.dumps({"error": refusal.message}).encode()
                self.send(refusal.status, error, {k: v for k, v in headers.items() if v}, body)
            elif listed and "/tree/" in path:
                self.send(200, json.dumps([hub.entry(name) for name in hub.files]).encode(), {}, body)
            elif listed:
                revision = path.partition("/revision/")[2]
                if revision not in ("", "main", "v1", COMMIT):
                    self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                    return
                siblings = [{"rfilename": name} for name in hub.files]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings}
                self.send(200, json.dumps(info).encode(), {}, body)
            else:
                entry, content = hub.entry(name), hub.sent.get(name, hub.files[name])
                lfs = entry.get("lfs")
                etag = str(lfs["oid"] if isinstance(lfs, dict) else entry["oid"])
                if body:
                    hub.fetched.append(name)
                self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                cut = bool(hub.cut) and self.path.endswith(f"/{hub.cut}")
                self.wfile.write(content[:3] if cut else content)
                self.close_connection = cut

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port while the body lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
