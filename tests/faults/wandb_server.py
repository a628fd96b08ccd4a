"""A small W&B server on loopback, and everything that a server, or W&B's own process, may do to a run.

The server answers what W&B asks for (GraphQL: the viewer, the run, its files; the file stream; uploads) until its fault
begins. The run followed is real but for its training: figures, a row, the end. It must end with every fault within the
limits that it states, with a line that says what went wrong, and leave no process behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from . import Counts

TITLE = "W&B: servers that refuse, stall, drip or die, its process stopped or killed, wrong settings"
SMALL, LARGE = 2, 60
INIT_SECONDS, FINISH_SECONDS = 3.0, 8.0
LOCAL_SECONDS = 45.0
"""For interpreters that start and W&B's import on a busy machine; not a limit of the product."""

FAULTS = ("refuses", "500", "silent", "drips", "garbage", "closes")
"""What a server does: 401; 500; no answer; a byte a second; no JSON; an end without an answer."""
HURTS = ("stop core", "kill core", "stop all", "kill all")
"""What is done to W&B's processes once the run has begun."""
SETTINGS = (
    {"WANDB_BASE_URL": "nonsense"}, {"WANDB_BASE_URL": "http://[::1"}, {"WANDB_BASE_URL": "http://127.0.0.1:9"},
    {"WANDB_MODE": "banana"}, {"WANDB_API_KEY": "short"}, {"WANDB_DIR": "/proc/nowhere"}, {"WANDB_ENTITY": "a/b:c"},
)  # fmt: skip


class Server:
    """Answers as W&B's server does; with `fault`, from `begins` ("start" or "stream") on as no server should.

    Attributes:
        stream: the bodies of the file stream: history rows and summaries as they arrived.
        runs: by id what was said of a run first: displayName, groupName, jobType, config, ...
        history: by id its rows, summaries: by id the last of them; as a run has them that is continued.
        files: uploaded files by their names in the run, or in an artifact.
        artifacts: the inputs of artifacts that were made.
    """

    def __init__(self, fault: str | None = None, begins: str = "start"):
        self.fault, self.begins, self.stream = fault, begins, list[str]()
        self.runs, self.artifacts = dict[str, dict[str, Any]](), list[dict[str, Any]]()
        self.history, self.summaries = dict[str, list[dict[str, Any]]](), dict[str, dict[str, Any]]()
        self.files, self._names = dict[str, bytes](), dict[str, str]()
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *given: Any) -> None:
                """A test has no use for an access log."""

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                streaming = "file_stream" in self.path
                if streaming:
                    outer.stream.append(body.decode())
                    outer.take(self.path.split("/")[-2], json.loads(body).get("files") or {})
                elif self.command == "PUT":
                    outer.files[outer._names.get(self.path, self.path)] = body
                if outer.fault and (outer.begins == "start" or streaming or len(outer.stream) > 0):
                    outer.misbehave(self)
                    return
                outer.send(self, 200, json.dumps(outer.reply(self.path, body)).encode())

            do_GET = do_POST = do_PUT = do_HEAD = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *given: None  # type: ignore[method-assign]  # clients that are killed
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *given: object) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def take(self, run: str, files: dict[str, Any]) -> None:
        """What a run has streamed: rows from an offset on, and its summary."""
        known = self.history.setdefault(run, [])
        if rows := files.get("wandb-history.jsonl"):
            known[rows["offset"] :] = map(json.loads, rows["content"])
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summaries[run] = json.loads(line)

    def send(self, request: BaseHTTPRequestHandler, code: int, body: bytes) -> None:
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def misbehave(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        match self.fault:
            case "refuses":
                self.send(request, 401, b'{"error": "who are you"}')
            case "500":
                self.send(request, 500, b"{}")
            case "garbage":
                self.send(request, 200, b"<html>\xff not today")
            case "silent":
                self.over.wait()
            case "drips":
                request.send_response(200)
                request.send_header("Content-Length", "100000")
                request.end_headers()
                while not self.over.wait(1.0):
                    request.wfile.write(b" ")
                    request.wfile.flush()
            case "closes":
                request.connection.close()

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        if "graphql" not in path:
            return {"exitcode": None, "limits": {}}
        asked = json.loads(body)
        query, given = asked["query"], asked.get("variables") or {}
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        answer = getattr(self, f"_{found[1]}", None) if found else None
        return {"data": answer(given) if answer else {"model": None, "project": None, "serverInfo": None}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs.setdefault(given["name"], given)
        run = {
            "id": f"id-{given['name']}", "name": given["name"], "displayName": given["displayName"], "description": "",
            "config": "{}", "sweepName": None, "historyLineCount": 0,
            "project": {"id": "UHI=", "name": "p", "entity": {"id": "RW4=", "name": "e"}},
        }  # fmt: skip
        return {"upsertBucket": {"bucket": run, "inserted": True}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["name"]
        if name not in self.runs:
            return {"model": {"id": "UHI=", "name": "p", "entity": {"id": "RW4=", "name": "e"}, "bucket": None}}
        rows = self.history.get(name, [])
        bucket = {
            "id": f"id-{name}", "name": name, "displayName": self.runs[name]["displayName"], "logLineCount": 0,
            "summaryMetrics": json.dumps(self.summaries.get(name, {})), "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsLineCount": 0, "eventsTail": "[]",
            "config": "{}", "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {"id": "UHI=", "name": "p", "entity": {"id": "RW4=", "name": "e"}, "bucket": bucket}}

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "VXNlcg==", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}

    def _url(self, name: str) -> str:
        path = f"/files/{len(self._names)}"
        self._names[path] = name
        return f"{self.url}{path}"

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._url(name)} for name in given["files"]]
        return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"])
        return {"createArtifact": {"artifact": {"id": "QQ==", "state": "PENDING", "artifactSequence": {"id": "Uw=="}}}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "Rg==", "name": "m", "displayName": "m", "uploadUrl": self._url("manifest"), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "TQ==", "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = {"id": "QQ=="}
        nodes = [
            {"node": {
                "id": "Rg==", "name": each["name"], "displayName": each["name"], "uploadUrl": self._url(each["name"]),
                "uploadHeaders": [], "artifact": artifact, "storagePath": each["name"], "uploadMultipartUrls": None,
            }}
            for each in given.get("artifactFiles") or given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append({"committed": True})
        return {"commitArtifact": {"artifact": {"id": "QQ==", "digest": ""}}}


FOLLOWED = """
import json, sys, time
from pathlib import Path
from attention_zoo.tracking import RunInfo, WandbTracker
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
notices = []
run = RunInfo(folder, "full", "0123456789abcdef", "full", "text-64", {"lr": 0.1}, notices.append)
tracker = WandbTracker(run, **options)
while sys.argv[3:] and not (tracker._started or tracker._ended.is_set()):
    time.sleep(0.01)
print("running", flush=True)
sys.stdin.readline()
began = time.monotonic()
for step in range(5):
    tracker.log({"train/loss": 1.0 / (step + 1)}, step)
logged = time.monotonic() - began
tracker.result({"kind": "quality", "status": "ok", "seq_len": 64, "step_seconds": 0.1, "metrics": {"loss": 2.0},
                "loss_by_position": [[0, 3.0], [32, 2.0]]})
tracker.finish(failed=False)
print(json.dumps({"logged": logged, "finished": time.monotonic() - began, "notices": notices}), flush=True)
"""


def follow(
    folder: Path,
    environment: dict[str, str],
    *,
    hurt: str | None = None,
    started: bool = False,
    finish_s: float = 60.0,
) -> dict[str, Any]:
    """A tracked run in a process of its own.

    Args:
        folder: of the run.
        environment: beside that of this process, in which nothing of W&B's counts.
        hurt: one of `HURTS`.
        started: hurt it, or end the run, once W&B has started, not on the way.
        finish_s: what W&B may take at the end of the run.

    Returns:
        logged, finished (seconds), notices, stderr, and left: W&B's processes that outlived the run.

    Raises:
        subprocess.TimeoutExpired: where it does not end.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    clean |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "NO_PROXY": "127.0.0.1", **environment}
    given = json.dumps({"init_timeout": INIT_SECONDS, "finish_timeout": finish_s})
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWED, str(folder), given, *(["wait"] if started else [])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        if hurt is not None:
            found = _processes(process.pid)
            number = signal.SIGSTOP if "stop" in hurt else signal.SIGKILL
            for pid in found if "all" in hurt else found[-1:]:
                os.kill(pid, number)
        output, errors = process.communicate("\n", timeout=finish_s + LOCAL_SECONDS)
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 2.0
    while (left := running(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    lines = output.splitlines()
    return {**(json.loads(lines[-1]) if lines else {}), "stderr": errors, "code": process.returncode, "left": left}


def _processes(parent: int) -> list[int]:
    """W&B's processes under `parent`, outermost first, once its own one is there."""
    deadline = time.monotonic() + LOCAL_SECONDS
    while time.monotonic() < deadline:
        outer = _children(parent)
        inner = [pid for each in outer for pid in _children(each)]
        if any("wandb-core" in command_of(pid) for pid in inner):
            return [*outer, *inner]
        time.sleep(0.05)
    raise AssertionError("no process of W&B was seen")


def _children(parent: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{parent}/task").glob("*/children")
        return sorted(int(pid) for task in tasks for pid in task.read_text().split())
    return []


def command_of(pid: int) -> str:
    """How a process was called; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def running(folder: Path) -> list[int]:
    """Processes of W&B whose home is `folder`."""
    home = f"HOME={folder}\0".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if home in (place / "environ").read_bytes() and place.joinpath("stat").read_text().split(") ")[1][0] != "Z":
                found.append(int(place.name))
    return found


def recorded(folder: Path) -> bytes:
    """All that lies on the disk of the run, online or offline."""
    return b"".join(path.read_bytes() for path in folder.glob("wandb/*run-*/*.wandb"))


def run(count: int, seed: int) -> Counts:
    """Throw `count` faults."""
    found = Counts()
    for number in range(count):
        case = f"wandb {seed}:{number}"
        found.tries += 1
        for way, problem in _throw(random.Random(case)):
            found.failed(way, f"{case}: {problem}")
    return found


def _throw(rng: random.Random) -> Iterator[tuple[str, str]]:
    key = {"WANDB_API_KEY": "0" * 40}
    kind = rng.choice(("server", "server", "hurt", "settings"))
    fault, begins, hurt = rng.choice(FAULTS), rng.choice(("start", "stream")), rng.choice(HURTS)
    settings, online, started = rng.choice(SETTINGS), rng.random() < 0.5, rng.random() < 0.5
    with tempfile.TemporaryDirectory() as place, Server(fault if kind == "server" else None, begins) as server:
        environment = {**key, "WANDB_BASE_URL": server.url}
        if kind == "settings":
            environment |= settings
        elif kind == "hurt" and not online:
            environment = {}
        where = f"{'online' if online else 'offline'}, {'running' if started else 'on the way'}"
        faults = {"server": f"{fault} from the {begins} on", "hurt": f"{hurt}, {where}", "settings": str(settings)}
        said = f"{kind}: {faults[kind]}"
        try:
            row = follow(
                Path(place),
                environment,
                hurt=hurt if kind == "hurt" else None,
                started=started,
                finish_s=FINISH_SECONDS,
            )
        except subprocess.TimeoutExpired:
            yield "hung", said
            return
        if row["code"] != 0:
            yield "lost", f"{said}: the run ended with {row['code']}: {row['stderr'][-300:]}"
            return
        if row["left"]:
            yield "orphan", f"{said}: {row['left']}"
        if row["logged"] > 1.0:
            yield "hung", f"{said}: five lines took {row['logged']:.1f} s"
        if any("\n" in notice for notice in row["notices"]) or row["stderr"]:
            yield "raw", f"{said}: {row['notices']} {row['stderr'][-300:]}"
        if b"train/loss" not in recorded(Path(place)) and not row["notices"]:
            yield "lost", f"{said}: nothing on the disk, and no word about it"
