"""A second W&B server, made otherwise: sockets by hand, bodies that are read chunk by chunk, one odd manner a server.

manner       what it does, each as HTTP allows it or as a broken proxy does it
chunked      answers in chunks of a few bytes, headers in odd case
old          HTTP/1.0, without a length: the end of the connection is the end of the answer
slow         a quarter of a second before each answer, headers a piece at a time
busy         429 with Retry-After: 1 to every other request, then the answer
hangs up     closes every third connection after it was asked, without a word
torn         every third answer is half of its JSON, with a length that fits
dies         as `chunked`, and after `lives` requests of the file stream nobody listens any more
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from typing import Any

MANNERS = ("chunked", "old", "slow", "busy", "hangs up", "torn", "dies")
LASTING = ("chunked", "old", "slow", "busy", "hangs up")
"""Those under which everything arrives, given time."""


class Other:
    """A server on loopback.

    Attributes:
        lines: of each run by id its history, from offsets as they were told.
        summary: of each run the last that was told.
        ended: exit codes by run.
        asked: how many requests there were.
    """

    def __init__(self, manner: str, lives: int = 1):
        self.manner, self.lives = manner, lives
        self.lines, self.summary, self.ended = dict[str, dict[int, Any]](), dict[str, Any](), dict[str, int]()
        self.asked = self.streamed = 0
        self._lock, self._open = threading.Lock(), list[socket.socket]()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"

    def __enter__(self) -> Other:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *given: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on connections are refused, and those that are open end."""
        for each in (self._door, *self._open):
            with contextlib.suppress(OSError):  # it has ended
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            self._open.append(client)
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as text:
                while (line := text.readline()).strip():
                    method, path, _ = line.decode().split(" ", 2)
                    headers = {}
                    while header := text.readline().decode().strip():
                        name, _, value = header.partition(":")
                        headers[name.lower()] = value.strip()
                    body = self._body(text, headers)
                    if not self._answer(client, method, path, body):
                        return
        except (OSError, ValueError):
            return  # whoever asked is gone

    def _body(self, text: Any, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return text.read(int(headers.get("content-length", 0)))
        parts = []
        while size := int(text.readline().split(b";")[0], 16):
            parts.append(text.read(size))
            text.readline()
        text.readline()
        return b"".join(parts)

    def _answer(self, client: socket.socket, method: str, path: str, body: bytes) -> bool:
        """Whether the connection stays."""
        with self._lock:
            self.asked += 1
            number = self.asked
            third = number % 3 == 0
            if self.manner == "hangs up" and third:
                return False
            if self.manner == "busy" and number % 2:
                client.sendall(b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
                return True
            answer = json.dumps(self._reply(path, body)).encode()
            if "file_stream" in path:
                self.streamed += 1
            dies = self.manner == "dies" and self.streamed >= self.lives
        if dies:
            self.close()
            return False
        if self.manner == "torn" and third:
            answer = answer[: len(answer) // 2]
        return self._send(client, answer)

    def _send(self, client: socket.socket, answer: bytes) -> bool:
        if self.manner in ("chunked", "dies"):
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-TYPE: application/json\r\nTRANSFER-encoding: chunked\r\n\r\n")
            for at in range(0, len(answer), 7):
                part = answer[at : at + 7]
                client.sendall(b"%x\r\n%s\r\n" % (len(part), part))
            client.sendall(b"0\r\n\r\n")
            return True
        if self.manner == "old":
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + answer)
            return False
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
        if self.manner == "slow":
            time.sleep(0.15)
            for at in range(0, len(head), 20):
                client.sendall(head[at : at + 20])
                time.sleep(0.02)
            head = b""
        client.sendall(head + answer)
        return True

    def _reply(self, path: str, body: bytes) -> Any:
        if stream := re.search(r"/([^/]+)/file_stream", path):
            return self._stream(stream[1], json.loads(body))
        if not path.endswith("/graphql"):
            return {}
        said = json.loads(body)
        given, name = said.get("variables") or {}, re.search(r"\b(?:query|mutation)\s+(\w+)", said["query"])
        owner = {"id": "RU5U", "name": "team"}
        project = {"id": "UFJK", "name": "zoo", "entity": owner}
        match name[1] if name else "":
            case "Viewer":
                who = {"id": "VVNS", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}
                return {"data": {"viewer": who}}
            case "UpsertBucket":
                run = given["name"]
                self.lines.setdefault(run, {})
                bucket = {
                    "id": f"run {run}", "name": run, "displayName": given.get("displayName"), "description": None,
                    "config": given.get("config") or "{}", "sweepName": None, "project": project,
                    "historyLineCount": len(self.lines[run]),
                }  # fmt: skip
                return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            case "RunResumeStatus":
                return {"data": {"model": {**project, "bucket": self._bucket(given["name"])}}}
            case "CreateRunFiles":
                files = [{"name": each, "uploadUrl": f"{self.url}/put/{n}"} for n, each in enumerate(given["files"])]
                return {"data": {"createRunFiles": {"runID": "UlVO", "uploadHeaders": [], "files": files}}}
        return {"data": {"model": None, "project": None, "serverInfo": None}}

    def _bucket(self, run: str) -> Any:
        if run not in self.lines:
            return None
        lines = self.lines[run]
        last = [json.dumps(lines[max(lines)])] if lines else []
        return {
            "id": f"run {run}", "name": run, "displayName": run, "config": "{}", "tags": [], "notes": "",
            "summaryMetrics": json.dumps(self.summary.get(run, {})), "wandbConfig": '{"t": 1}', "logLineCount": 0,
            "historyLineCount": len(lines), "historyTail": json.dumps(last), "eventsLineCount": 0, "eventsTail": "[]",
        }  # fmt: skip

    def _stream(self, run: str, said: dict[str, Any]) -> Any:
        known = self.lines.setdefault(run, {})
        for name, part in (said.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for at, text in enumerate(part["content"], part["offset"]):
                    known[at] = json.loads(text)
            elif name == "wandb-summary.json" and part["content"]:
                self.summary[run] = json.loads(part["content"][-1])
        if said.get("exitcode") is not None:
            self.ended[run] = said["exitcode"]
        return {"limits": {}}
