"""A server that answers `wandb sync` as far as it needs, and keeps the history that was uploaded."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Holds runs as W&B's server does: by id, with numbered lines of history."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        """Lines by their number, by run."""
        self.upserts: list[dict[str, Any]] = []
        """What was said of the runs, in its order."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *values: object) -> None: ...

            def do_PUT(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(outer._answer)

            def _answer(self, answer: Any) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                told = answer(self.path, content) if callable(answer) else answer
                body = json.dumps(told).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, content: bytes) -> dict[str, Any]:
        if path.endswith("/graphql"):
            asked = json.loads(content)
            return {"data": self._query(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            lines = self.history.setdefault(path.split("/")[-2], {})
            uploaded = (json.loads(content).get("files") or {}).get("wandb-history.jsonl")
            if uploaded:
                rows = map(json.loads, uploaded["content"])
                lines.update(enumerate(rows, uploaded["offset"]))
        return {}

    def _query(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "dsv3", "entity": {"id": "e", "name": "me"}}
        lines = self.history.get(values.get("name", ""), {})
        bucket = {"id": "b", "name": values.get("name"), "historyLineCount": len(lines), "config": "{}"}
        if "UpsertBucket" in query:
            self.upserts.append(values)
            return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": not lines}}
        if "RunResumeStatus" in query:
            last = json.dumps(lines[max(lines)] if lines else {})
            known = {"summaryMetrics": last, "historyTail": json.dumps([last]), "eventsTail": "[]"}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "tags": [], "wandbConfig": '{"t": 1}'}
            return {"model": project | {"bucket": bucket | known | counts if lines else None}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}
