"""An object store on this machine: objects by HTTP with ranges, as a web server and as S3 send them."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import xxhash


@dataclass
class ObjectStore:
    """Objects by key; what a test changes acts on the next request."""

    objects: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, key and bytes sent of each request."""
    drop: int = 0
    """So many answers to come end after half of their bytes."""
    refuse: dict[str, int] = field(default_factory=dict)
    """By key, a status in place of the object."""
    failing: int = 0
    """So many answers to come are 503."""

    def requests(self) -> Counter[str]:
        """Return the number of GET requests by key."""
        return Counter(key for method, key, _ in self.asked if method == "GET")


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, has_body: bool) -> None:
            key = unquote(urlsplit(self.path).path).lstrip("/")
            content = store.objects.get(key)
            status = store.refuse.get(key, 404 if content is None else 200)
            if store.failing:
                store.failing -= 1
                status = 503
            body = content or b""
            if status == 200 and (asked := self.headers.get("Range")):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(int(last) + 1 if last else len(body), len(body))
                status = 206 if begin < len(body) else 416
                headers = {"Content-Range": f"bytes {begin}-{end - 1}/{len(body)}"}
                body = body[begin:end]
            else:
                headers = {}
            if status >= 400:
                code = {404: "NoSuchKey", 403: "AccessDenied", 416: "InvalidRange"}.get(status, "SlowDown")
                body, headers = f"<Error><Code>{code}</Code></Error>".encode(), {}
            store.asked.append((self.command, key, len(body) if has_body else 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{xxhash.xxh3_64_hexdigest(content or b"")}"')
            self.send_header("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if not has_body:
                return
            if store.drop and status < 400:
                store.drop -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Serve objects until the body ends."""
    store = ObjectStore()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store))
    server.daemon_threads = True
    store.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
