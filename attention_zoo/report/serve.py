"""The dashboard of a sweep that is running: a server on this machine alone, which draws what the folders hold now.

    python -m experiments.report runs=runs serve=true

The page asks every other second whether there is more; what the reader chose, filtered and scrolled to stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from attention_zoo.report.build import document, sections
from attention_zoo.report.contexts import CONTEXT, contexts
from attention_zoo.report.data import dashboard
from attention_zoo.report.inspected import ATTENTION, inspected
from attention_zoo.report.rows import Rows
from attention_zoo.report.running import METRICS, running
from attention_zoo.report.sources import KEPT, RESULT, TABLE, read
from attention_zoo.report.summary import Findings

HOST = "127.0.0.1"
DATA = "/data.json"


class Watched:
    """Files and folders that grow, and what is drawn of them now.

    Args:
        paths: of results, see `sources.read`; nothing needs to be there yet.
        title: on top of the page.
    """

    def __init__(self, paths: Sequence[str], title: str):
        self.paths, self.title = [Path(path) for path in paths], title
        self._lock = threading.Lock()
        self._seen = ""
        self._findings, self._data = Findings.of(Rows()), b""

    def data(self) -> tuple[str, bytes]:
        """A name for what there is now, which changes when anything does, and JSON of {"data", "sections"}."""
        with self._lock:
            self._look()
            return self._seen, self._data

    def page(self) -> str:
        """The whole page as it is now."""
        with self._lock:
            self._look()
            found, data = self._findings, json.loads(self._data)["data"]
        return document(found, self.title, data, live=True)

    def _look(self) -> None:
        seen = hashlib.sha256(repr(sorted(self._marks())).encode()).hexdigest()[:16]
        if seen == self._seen:
            return
        try:
            found = Findings.of(read([str(path) for path in self.paths]))
        except ValueError:  # nothing has ended yet
            found = Findings.of(Rows())
        attention, measured = inspected(self.paths), contexts(self.paths)
        found.rows.left_out += attention.left_out + measured.left_out
        data = dashboard(found, running(self.paths), attention.inspections, measured.groups)
        self._data = json.dumps({"data": data, "sections": sections(found)}).encode()
        self._findings, self._seen = found, seen

    def _marks(self) -> Iterator[tuple[str, int, int]]:
        """Name, time and size of all that could be drawn."""
        for path in self.paths:
            for file in [path] if path.is_file() else _files(path):
                try:
                    known = file.stat()
                except OSError:  # replaced at this moment
                    continue
                yield str(file), known.st_mtime_ns, known.st_size


def _files(folder: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        kept = Path(place).name in KEPT
        for name in names:
            single = kept and name.endswith(".json") and not name.startswith(".")
            if single or name in (TABLE, RESULT, METRICS, ATTENTION, CONTEXT):
                yield Path(place) / name


class _Serving(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is closed or loaded anew does not wait for its answer, which is nobody's fault."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(watched: Watched, port: int) -> ThreadingHTTPServer:
    """A server of the page, on loopback alone; `serve_forever` runs it.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: where the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(403, "this page is for the machine that it runs on")  # a foreign name that points here
            elif path == "/":
                self._answer("text/html; charset=utf-8", watched.page().encode(errors="backslashreplace"))
            elif path == DATA:
                name, data = watched.data()
                if self.headers.get("If-None-Match") == name:
                    self.send_response(304)
                    self.end_headers()
                else:
                    self._answer("application/json", data, name)
            else:
                self.send_error(404)

        def _answer(self, kind: str, data: bytes, name: str | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Content-Type-Options", "nosniff")
            if name:
                self.send_header("ETag", name)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """The terminal is the sweep's."""

    try:
        return _Serving((HOST, port), Handler)
    except OSError as error:
        raise OSError(f"port {port} of {HOST} cannot be served ({error.strerror}); port=0 takes a free one") from error
