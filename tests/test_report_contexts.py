"""What `context` wrote, and evaluation sets beside the result's, as the dashboard's data."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import data_of
from report_rows import quality

from attention_zoo.report import Findings
from attention_zoo.report.again import ReportConfig, report
from attention_zoo.report.contexts import contexts
from attention_zoo.report.data import dashboard


def group(**changes: Any) -> dict[str, Any]:
    reach = [{"share": 0.1, "tokens": 16, "falls": True, "gains": [0.123456789, 0.005]}]
    runs = [
        {"name": name, "backend": name.partition("-")[0], "id": key, "bits_per_byte": [3.0, 2.5, 2.25], "reach": reach,
         "losses": [[1.0], [1.0], [1.0]]}
        for name, key in (("full-a", "full-text-0"), ("reformer-a", None), ("reformer-b", None))
    ]  # fmt: skip
    found = {"kind": "context", "contexts": [8, 16, 24], "positions": 1, "threshold": 0.01, "runs": runs}
    return found | changes


def test_a_report_of_the_folder_draws_it(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(quality("full", "text")) + "\n")
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "context.json").write_text(json.dumps(group()))
    path = report(ReportConfig(runs=str(tmp_path), output=str(tmp_path / "out")))
    assert path is not None
    data = data_of(path.read_text())
    (found,) = data["contexts"]
    assert (found["title"], found["contexts"], found["threshold"]) == ("seen", [8, 16, 24], 0.01)
    assert [(run["key"], run["label"]) for run in found["runs"]] == [
        ("full-text-0", "full"), (None, "reformer-a"), (None, "reformer-b"),
    ]  # fmt: skip
    assert found["runs"][0]["bits"] == [3.0, 2.5, 2.25]
    assert found["runs"][0]["reach"][0]["gains"] == [0.12346, 0.005], "what a chart can show"
    assert not any("losses" in run for run in found["runs"])
    assert {"full", "reformer-a", "reformer-b"} <= set(data["styles"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contexts": [8, 16]}, "full-a: figures must be of 2 contexts"),
        ({"contexts": [8, 24, 16]}, "contexts must be two or more, in rising order"),
        ({"runs": []}, "runs must be one or more"),
        ({"threshold": "much"}, "threshold: "),
        ({"threshold": "nan"}, "threshold: Input should be a finite number"),
        ({"kind": "attention"}, "kind: "),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "context.json").write_text(json.dumps(group(**changes)))
    found = contexts([tmp_path])
    assert found.groups == []
    (left,) = found.left_out
    assert left.where == str(tmp_path / "context.json")
    assert left.what.startswith(said)


def test_a_torn_file_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "context.json").write_text('{"kind": "con')
    (left,) = contexts([tmp_path]).left_out
    assert left.where.endswith("context.json")


def test_sets_beside_the_result_are_drawn_but_not_the_watched_one() -> None:
    position = [[8, 2.0], [24, 1.5]]
    by_set = {
        "validation": {"seq_len": 64, "by_group": {}, "loss_by_position": position},
        "test": {"seq_len": 64, "by_group": {}, "loss_by_position": position},
        "test@longer": {"seq_len": 128, "by_group": {"key": [[1, 1.0, 0.123456789, 5]]}, "loss_by_position": position},
        "held_out": {"seq_len": 64, "by_group": None, "loss_by_position": None},
    }
    scores = {name: {"bits_per_byte": 2.0 + i} for i, name in enumerate(by_set)}
    given = {"state_bytes": 4096, "flops_per_token": 1.5e6}
    row = quality("full", "text", evaluations=scores, by_set=by_set, given=given, seq_len=64,
                  evaluation_tokens_per_second=91_000.0)  # fmt: skip
    (run,) = dashboard(Findings.of([row]))["runs"]
    assert run["others"] == {
        "test@longer": {"length": 128, "groups": {"key": [[1, 1.0, 0.12346, 5]]}, "position": [[8, 24], [2.0, 1.5]]},
        "held_out": {"length": 64, "groups": {}, "position": None},
    }
    assert (run["by_length"], run["trained"]) == ([[64, 128], [3.0, 4.0]], 64)
    names = ("state_bytes", "flops_per_token", "evaluation_tokens_per_second")
    assert [run["n"][name] for name in names] == [4096, 1.5e6, 91_000.0]
