"""The report by its command: a page that follows a sweep, tables as files, and the command that repeats a row."""

from __future__ import annotations

import csv
import http.client
import json
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, browser
from report_page import ask, drawn
from report_rows import LOSSES, made_up, quality, speed, unfinished

from attention_zoo import registry
from attention_zoo.commands.main import main
from attention_zoo.files import append_jsonl, write_json
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.report import Findings, read
from attention_zoo.report.again import ReportConfig, report
from attention_zoo.report.again_by import command_of, word
from attention_zoo.report.cells import Table
from attention_zoo.report.extract import csv_text, latex, tables
from attention_zoo.report.groups import SILENT, flat
from attention_zoo.report.running import running
from attention_zoo.report.serve import Watched, server
from attention_zoo.training.config import TrainConfig, compose_training

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


# --- serving ---------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*paths: Path) -> Iterator[int]:
    """A server of what lies beneath some paths; its port."""
    with server(Watched([str(path) for path in paths], "Live"), 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield found.server_address[1]
        finally:
            found.shutdown()
            thread.join()


def fetched(port: int, path: str, **headers: str) -> tuple[int, bytes, str | None]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    link.request("GET", path, headers=headers)
    answer = link.getresponse()
    found = answer.status, answer.read(), answer.getheader("ETag")
    link.close()
    return found


def begin(folder: Path, *losses: float) -> None:
    for step, loss in enumerate(losses, 1):
        append_jsonl(folder / "metrics.jsonl", {"step": 10 * step, "train/loss": loss, "train/tokens_per_second": 9.0})


def test_a_server_tells_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "text-longformer-0123456789abcdef"
    with serving(tmp_path) as port:
        status, said, first = fetched(port, "/data.json")
        assert (status, json.loads(said)["data"]["runs"]) == (200, [])
        assert fetched(port, "/data.json", **{"If-None-Match": str(first)})[0] == 304
        begin(run, 5.0, 4.0)
        status, said, second = fetched(port, "/data.json", **{"If-None-Match": str(first)})
        assert (status, second != first) == (200, True)
        data = json.loads(said)["data"]
        (running_run,) = data["runs"]
        assert [ask(data, running_run, name) for name in ("mechanism", "task", "status")] == [
            "longformer", "text", "running",
        ]  # fmt: skip
        assert running_run["curve"] == [[10, 20], [5.0, 4.0]]
        assert [task["title"] for task in data["tasks"]] == ["text"]
        write_json(run / "result.json", quality("longformer", "text"))
        data = json.loads(fetched(port, "/data.json")[1])["data"]
        assert [ask(data, each, "status") for each in data["runs"]] == ["ok"]
        page = fetched(port, "/")[1].decode()
        assert "connect-src 'self'" in page
        assert fetched(port, "/../../etc/passwd")[0] == 404
        assert fetched(port, "/data.json", Host="evil.example:80")[0] == 403


def test_a_reader_who_does_not_wait_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, told = threading.Event(), threading.Event()
    page, tell = Watched.page, ThreadingHTTPServer.shutdown_request

    def late(self: Watched) -> str:
        gone.wait(60)
        return page(self)

    def ended(self: ThreadingHTTPServer, request: Any) -> None:
        tell(self, request)
        told.set()

    monkeypatch.setattr(Watched, "page", late)
    monkeypatch.setattr(ThreadingHTTPServer, "shutdown_request", ended)
    with serving(tmp_path) as port:
        link = socket.create_connection(("127.0.0.1", port))
        link.sendall(b"GET /?from=a-link HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as a browser resets it
        link.close()
        gone.set()
        assert told.wait(60)
        assert fetched(port, "/?from=a-link")[0] == 200
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with serving(tmp_path) as port, pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be served"):
        server(Watched([str(tmp_path)], ""), port)


def test_what_is_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    begin(tmp_path / "mqar-full-1")
    (tmp_path / "mqar-full-2").mkdir()
    (tmp_path / "mqar-full-2" / "metrics.jsonl").write_text('{"step": 10, "train/loss": 3.0}\n{"step": 20, "trai')
    (tmp_path / "mqar-full-3").mkdir()
    (tmp_path / "mqar-full-3" / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert [row["curve"] for row in running([tmp_path, tmp_path / "nowhere"])] == [[[10, 3.0]]]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_follows_a_sweep_and_the_reader_stays_where_they_are(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_json(runs / "text-full-1" / "result.json", quality("full", "text"))
    with serving(runs) as port, browser(tmp_path / "browser") as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        tab.run("zoo.state.change({by: 'mechanism', sort: 'score'})")
        tab.until("zoo.by('live').textContent.startsWith('live')")
        tab.click("#search")
        tab.write("text")
        begin(runs / "text-longformer-0123456789abcdef", 5.0, 4.0, 3.5)
        tab.until("zoo.runs.length === 2")
        tab.write(" seed")
        assert tab.run("zoo.by('search').value") == "text seed", "new runs take nobody's focus away"
        tab.run("zoo.state.change({q: ''})")
        assert "running" in tab.run("zoo.by('table').innerText")
        write_json(runs / "text-longformer-0123456789abcdef" / "result.json", quality("longformer", "text"))
        tab.until("zoo.runs.every(run => zoo.ask(run, 'status') === 'ok')")
        assert tab.run("[zoo.state.get().by, zoo.state.get().sort]") == ["mechanism", "score"]
        assert "longformer" in tab.run("zoo.by('summary-content').innerText")
        assert tab.said == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_command_follows_a_sweep_that_really_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    small = ["task=mqar", "task.pairs=2", "task.test_examples=4", "device=cpu", "threads=1", "batch=2", "seq_len=16"]
    words = [*small, "model.dim=16", "steps=400", "trainer.log_every=5", "trainer.eval_every=50", "tracker=none"]
    zoo = [sys.executable, "-m", "attention_zoo"]
    sweep = subprocess.Popen([*zoo, "train", "-m", "seed=0,1,2", *words, f"output={runs}"], stdout=subprocess.DEVNULL)
    page: subprocess.Popen[str] | None = None
    try:
        deadline = time.monotonic() + 300
        while not list(runs.glob("mqar-*/metrics.jsonl")):
            assert sweep.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        page = subprocess.Popen(
            [*zoo, "report", f"runs={runs}", "serve=true", "port=0"], text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert page.stdout is not None
        found = next(found for line in page.stdout if (found := re.search(r"http://\S+", line)))
        with browser(tmp_path / "browser") as tab:
            tab.open(found[0])
            tab.run("window.stayed = true")
            seen = set()
            while time.monotonic() < deadline:
                now = json.loads(tab.run("JSON.stringify(zoo.runs.map(run => [run.key, zoo.ask(run, 'status')]))"))
                seen.add(tuple(sorted(state for _, state in now)))
                if [state for _, state in now] == ["ok"] * 3:
                    break
                time.sleep(0.2)
            assert tab.run("window.stayed") is True, "nobody has loaded the page again"
            assert seen >= {("ok", "ok", "ok")}
            assert any("running" in states for states in seen), "a run is there while it goes on"
            assert len({len(states) for states in seen}) > 1, "rows have come while the page was open"
            lines = tab.run("document.querySelectorAll('.runs tr[data-key]').length")
            assert lines == 3
            assert tab.said == []
        assert sweep.wait(timeout=60) == 0
        page.send_signal(signal.SIGINT)
        assert page.wait(timeout=60) in (0, 130)
    finally:
        for process in (sweep, *([page] if page else [])):
            process.kill()
            process.communicate()


# --- folders and tables ----------------------------------------------------------------------------------------------


def test_folders_stand_side_by_side_and_tables_lie_beside_the_page(tmp_path: Path) -> None:
    for name in ("monday", "tuesday"):
        for row in made_up(2):
            if row["kind"] == "quality":
                row = {**row, "config": {**row["config"], "steps": len(name)}, "id": f"{row['id']}-{name}"}
                write_json(tmp_path / name / row["id"] / "result.json", row)
    both = [str(tmp_path / name) for name in ("monday", "tuesday")]
    path = report(ReportConfig(runs=both, output=str(tmp_path / "out"), title="x"))
    assert path == tmp_path / "out" / "report.html"
    data = drawn(read(both))
    assert {ask(data, run, "sweep") for run in data["runs"]} == {"monday", "tuesday"}
    names = {each.stem for each in (tmp_path / "out" / "tables").iterdir()}
    trained = {"text-512-tokens", "mqar-64-tokens"}
    assert {"summary", *trained, *(f"{name}-verdicts" for name in trained)} == names
    with open(tmp_path / "out" / "tables" / "summary.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][0] == "mechanism"
    assert any(line[0].startswith("longformer (monday") for line in lines)


@pytest.mark.parametrize("given", ["nowhere", "[3]", "[report.html,{a: 1}]"])
def test_runs_that_are_no_folders_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"runs={given}"]) == 2
    assert "runs must be a folder or a list of folders, got" in capsys.readouterr().err


def test_latex_is_escaped_and_flushed() -> None:
    table = Table(["", "time", "why"], [["a_b & c%", "1.5 s", "{~^\\}"], ["#$<", "≈ 2", "so"]], ["marks\nsay"])
    lines = latex(table).splitlines()
    assert lines[:2] == ["% marks say", r"\begin{tabular}{lrl}"]
    assert lines[5] == r"a\_b \& c\% & 1.5 s & \{\textasciitilde{}\textasciicircum{}\textbackslash{}\} \\"
    assert lines[6] == r"\#\$\textless{} & $\approx$ 2 & so \\"
    assert csv_text(Table(["=a"], [["-1"], ["+x"]])) == "'=a\n'-1\n'+x\n"
    held = tables(Findings.of([unfinished(speed("full", "sdpa", 256), "oom", "killed")]))
    assert list(held) == ["summary"]


# --- the command of a row --------------------------------------------------------------------------------------------


def committed(*folders: str) -> list[dict[str, Any]]:
    """One training of each backend and task."""
    rows = [row for folder in folders for row in read(RESULTS / folder) if row["kind"] == "quality"]
    return list({(row["backend"], row["task"], row["seq_len"]): dict(row) for row in rows}.values())


@pytest.mark.parametrize("row", committed("memory_cpu")[:4], ids=lambda row: f"{row['backend']}-{row['task']}")
def test_the_command_of_a_training_composes_its_config(row: dict[str, Any]) -> None:
    words = shlex.split(command_of(row))
    assert words[:3] == ["python", "-m", "experiments.train"]
    silent = SILENT - {"seed"}

    def told(config: dict[str, Any]) -> dict[str, str]:
        return {key: value for key, value in flat(config) if key.split(".")[0] not in silent and key not in silent}

    found, meant = told(compose_training(words[3:])), told(row["config"])
    meant.pop("attention.name")
    newer = set(TrainConfig.__dataclass_fields__) - set(row["config"])  # options that the row's code did not have
    gone = {key for key in found if key == "attention" or key.split(".")[0] in newer}
    found = {key: value for key, value in found.items() if key not in gone}
    assert found == meant


@pytest.mark.parametrize("name", registry.available())
def test_the_command_of_a_single_training_names_its_mechanism(name: str) -> None:
    """Whose config holds a class instead of a name."""
    words = ["task=mqar", "+model.max_length=99", "+evaluate_at.far.seq_len=128", "device=cpu", "tracker=none"]
    option = {"longformer": "attention.window=7", "reformer": "attention.chunk=8"}.get(name)
    config = compose_training([f"attention={name}", *words, *([option] if option else [])])
    said = shlex.split(command_of({**quality(name if name in LOSSES else "full", "mqar"), "config": config}))[3:]
    assert f"attention={name}" in said
    again = compose_training([*said, "tracker=none"])
    assert {**again, "backend": None} == {**config, "backend": None}


def test_the_command_of_a_cell_says_all_that_it_was_measured_with() -> None:
    row = speed("longformer", "auto", 1024, config={"options": {"window": 64}})
    words = dict(each.split("=", 1) for each in shlex.split(command_of(row))[3:])
    assert words["backends"] == "[longformer]"
    assert words["options"] == "{longformer:{window:64}}"
    assert words["phases"] == "[forward_backward]"
    assert set(words) <= set(BenchmarkConfig.__dataclass_fields__)
    assert command_of({**row, "kind": "peer"}) == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        (True, "true"),
        ([1, "a"], "[1,a]"),
        ("true story", '"true story"'),
        ('a"\\', '"a\\"\\\\"'),
        (0.5, "0.5"),
    ],
)
def test_values_are_written_in_the_grammar_of_overrides(value: Any, said: str) -> None:
    assert word(value) == said
