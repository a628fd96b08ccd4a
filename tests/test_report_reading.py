"""What a report is drawn from: files, folders and single rows; what is damaged is named, and the rest is drawn."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_page import drawn
from report_rows import made_up, portrait, quality, speed, unfinished

from attention_zoo.commands.main import main
from attention_zoo.files import write_json
from attention_zoo.report import Findings, build_report, headline, read, write_csv
from attention_zoo.report.again import ReportConfig, report
from attention_zoo.report.rows import FROM, sift
from attention_zoo.report.summary import remarks
from attention_zoo.results.check import wrong_with

COMMITTED = sorted((Path(__file__).parents[1] / "experiments" / "results").rglob("results.jsonl"))


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_every_row_that_was_ever_committed_is_drawn(path):
    rows = read(path)
    assert rows.left_out == []
    assert len(rows) == len(path.read_text().splitlines())
    ours = [row for row in rows if row["kind"] != "published"]  # which stand in a table of their own
    assert len(drawn(rows)["runs"]) == len(ours)


def test_the_last_row_of_an_identity_counts_within_a_file(tmp_path):
    first, later = speed("full", "sdpa", 256), speed("full", "sdpa", 256, seconds=9.0)
    assert [row["seconds"] for row in read(write(tmp_path / "a.jsonl", first, later))] == [9.0]


def test_files_stand_side_by_side_and_equal_rows_count_once(tmp_path):
    same, mine, theirs = (
        speed("full", "sdpa", 1024),
        speed("full", "sdpa", 256),
        speed("full", "sdpa", 256, seconds=9.0),
    )
    one = write(tmp_path / "laptop" / "results.jsonl", mine)
    two = write(tmp_path / "server" / "results.jsonl", theirs, same)
    three = write(tmp_path / "copy.jsonl", same)
    rows = read([one, two, three])
    assert [(row[FROM], row["length"], row["seconds"]) for row in rows] == [
        ("laptop", 256, mine["seconds"]), ("server", 256, 9.0), ("server", 1024, same["seconds"]),
    ]  # fmt: skip
    assert FROM not in read([two])[0]


def test_a_folder_of_runs_is_read_whole_and_without_doubles(tmp_path):
    runs = [quality("full", "text", seed) for seed in (0, 1)]
    for row in runs:
        write_json(tmp_path / "runs" / row["id"] / "result.json", row)
        write(tmp_path / "runs" / row["id"] / "metrics.jsonl", {"step": 1})
    rows = read(tmp_path / "runs")
    assert list(rows) == runs
    assert read([tmp_path / "runs" / runs[0]["id"]]) == runs[:1]
    assert read(str(tmp_path / "runs" / runs[0]["id"] / "result.json")) == runs[:1]
    cell = speed("full", "sdpa", 256)
    bench = tmp_path / "bench"
    write(bench / "results.jsonl", cell | {"seconds": 1.0}, *runs)
    write_json(bench / "cells" / "x.json", cell)
    write_json(bench / "training" / "a" / "result.json", runs[0])
    found = read(bench)
    assert len(found) == 3
    assert found[0]["seconds"] == cell["seconds"], "a cell's own file is newer than the table"
    assert not any(FROM in row for row in found)
    assert [row[FROM] for row in read(tmp_path)] == ["bench"] * 3, "what stands in both counts in the larger"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no rows"), ('{"kind": "speed"}\n', "row 1: lacks backend, status"),
        ("{\n{}\n", "line 1: is not JSON"), ("7\n\n", "line 1: must hold a JSON object, got int"),
    ],
)  # fmt: skip
def test_a_file_without_a_row_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="at least one row that can be drawn") as caught:
        read(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl', which does not exist"):
        read([tmp_path / "nothing.jsonl"])
    with pytest.raises(ValueError, match=r"a folder without results\.jsonl, result\.json or cells"):
        read(tmp_path)
    for given in (7, [], [None], {"a": 1}):
        with pytest.raises(ValueError, match="results must"):
            read(given)


def test_what_holds_no_row_has_no_say_in_names_and_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a", "b"):
        write_json(tmp_path / name / "result.json", {**quality("full", "text", 0), "id": name})
    (tmp_path / "a" / "cells").mkdir()
    os.mkfifo(tmp_path / "a" / "cells" / "pipe.json")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "result.json").symlink_to("/nowhere/at/all")
    rows = read(tmp_path)
    assert len(rows) == 2
    assert not any(FROM in row for row in rows)
    assert sorted(where.where.rpartition("/")[2] for where in rows.left_out) == ["pipe.json", "result.json"]
    with pytest.raises(ValueError, match="results must be a path or a list of paths, got ''"):
        read("")


def test_damaged_rows_and_files_are_named_and_all_others_are_drawn(tmp_path):
    good = made_up()
    table = write(tmp_path / "results.jsonl", *good[:-1], "{ torn", {"kind": "speed", "backend": 7}, good[-1])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "result.json").write_bytes(b"\xff\x00")
    rows = read(tmp_path)
    assert len(rows) == len(good)
    assert [each.where for each in rows.left_out] == [
        f"{table}, line {len(good)}", f"{table}, row {len(good)}", str(tmp_path / "x" / "result.json"),
    ]  # fmt: skip
    page = build_report(rows, tmp_path / "report.html").read_text()
    said = remarks(Findings.of(rows))
    for each in rows.left_out:
        assert f"<td>{each.what.replace(chr(39), '&#x27;')}</td>" in page
        assert any(str(each) in line for line in said)
    assert "3 rows or files could not be drawn" in page


WRONG = [
    ({"length": "256"}, "length: must be an integer, got '256'"), ({"length": -4}, "length: must be greater"),
    ({"seconds": float("nan")}, "seconds: must be a number, got 'nan'"), ({"causal": 1}, "causal: must be a boolean"),
    ({"kind": "speeed"}, "kind: must be 'speed'"), ({"status": "fine"}, "status: must be 'ok'"),
    ({"environment": []}, "environment: must be a dictionary"), ({"backend": ""}, "backend: "),
    ({"heads": 10**30}, "heads: must be less than"), ({"config": {"x": 10**500}}, "more than 300 digits"),
    ({"threads": True}, "threads: must be an integer, got True"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_what_is_wrong_with_a_row_is_said(change, said):
    rows = sift([speed("full", "sdpa", 256) | change, speed("full", "sdpa", 1024)])
    assert len(rows) == 1
    assert said in rows.left_out[0].what
    assert rows.left_out[0].where == "row 1"


def test_rows_of_newer_versions_are_drawn():
    for row in (speed("full", "sdpa", 256), quality("full", "text"), portrait("full")):
        assert wrong_with({**row, "new": {"key": [1, {"x": None}]}}) is None
    assert wrong_with(unfinished(quality("full", "text"), "failed", "x") | {"task": None, "environment": None}) is None


def test_cells_that_a_spreadsheet_would_run_are_escaped(tmp_path):
    rows = []
    base = quality("full", "text")
    for number, text in enumerate(("=1+1", "+1", "-1", "@x", "\tx", "plain=1")):
        rows.append({**base, "id": str(number), "backend": text, "note": text, "=key": -1.5})
    with open(write_csv(rows, tmp_path / "rows.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["backend"] for line in lines] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "plain=1"]
    assert [line["note"] for line in lines] == [line["backend"] for line in lines]
    assert {line["'=key"] for line in lines} == {"-1.5"}, "a number stays a number"
    assert not any(key.startswith("=") for key in lines[0])


HOSTILE = '"><script>alert(1)</script>&[/red]=\u202e\x1b[31m'


def test_hostile_text_is_text_everywhere(tmp_path):
    named = {"backend": HOSTILE, "task": HOSTILE, "evaluations": {HOSTILE: {"bits_per_byte": 1.0}}}
    rows = [quality("full", "text") | named]
    rows += [speed("full", "sdpa", 1024), speed("full", "sdpa", 256) | {"backend": HOSTILE, "kernel": HOSTILE}]
    rows.append(unfinished(speed("full", "sdpa", 4096), "failed", HOSTILE))
    rows.append({**portrait("full"), "backend": HOSTILE, "abilities": {HOSTILE: HOSTILE}})
    page = build_report(rows, tmp_path / "report.html", title=HOSTILE).read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page, "it would turn the text around"
    assert page.count("<script>") == 2
    assert any("alert(1)" in sentence for sentence in headline(Findings.of(rows)))


def test_the_command_takes_a_folder_and_names_what_is_wrong(tmp_path, capsys):
    for seed in (0, 1):
        write_json(tmp_path / "runs" / f"s{seed}" / "result.json", quality("full", "text", seed))
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "result.json").write_text("{")
    assert main(["report", f"results={tmp_path / 'runs'}"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "! left out: " in told.out
    assert "bad/result.json: is not JSON" in told.out
    assert (tmp_path / "runs" / "report.html").is_file()
    assert (tmp_path / "runs" / "results.csv").is_file()


def test_every_way_to_name_results_works(tmp_path):
    one = write(tmp_path / "one.jsonl", *(quality("full", "text", seed) for seed in (0, 1)))
    two = tmp_path / "runs" / "x" / "result.json"
    write_json(two, quality("longformer", "text"))
    for given in (f"{one}", f"{two}", [f"{one}"], [f"{one}", f"{two}"], f"{tmp_path / 'runs'}"):
        path = report(ReportConfig(results=given, output=str(tmp_path / "out"), title="x"))
        assert path == tmp_path / "out" / "report.html"
    assert report(ReportConfig(results=str(two))).parent == two.parent
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        report(ReportConfig(results=str(one), output=str(tmp_path / "file")))


@pytest.mark.slow
def test_what_the_command_refuses_is_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.report", f"results=[{tmp_path / 'no'}]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: {done.stderr[7:].strip()}\n"
    assert "which does not exist" in done.stderr
