"""`parallel.sequence`: runs whose tokens several processes share are the runs of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, together

XL = ["attention=transformer_xl", "attention.segment_length=8", "attention.memory_length=8"]
RECURRENT = ["attention=block_recurrent", "attention.window=8", "attention.states=4"]
COMPRESSIVE = ["attention=compressive", "attention.segment_length=8", "attention.memory_length=8"]
RUNS: dict[str, list[str]] = {
    "transformer_xl": XL,
    "block_recurrent": RECURRENT,
    "compressive": [*COMPRESSIVE, "attention.compressed_length=4", "attention.ratio=2"],
    "adaptive_span": ["attention=adaptive_span"],
    "full": ["attention=full"],
    "memory_tokens": ["attention=memory_tokens", "attention.segment_length=16", "attention.count=2"],
    "hourglass": ["attention=longformer", "attention.window=8", "model.depth=3", "+model.shorten=1@1 1@2 1@1"],
    "accumulate": [*XL, "trainer.accumulate=2"],
    "recall, padded": ["task=mqar", "task.test_examples=20", "attention=longformer", "attention.window=8"],
    "recomputed blocks": [*XL, "parallel.checkpoint=true"],
    "shared parameters": [*RECURRENT, "parallel.data=fsdp"],
}
REFUSED = {
    "a carried state": (["trainer.carry_state=true", *XL], "trainer.carry_state=true"),
    "compiled blocks": (["parallel.compile=true", *XL], "parallel.compile=true"),
    "recomputed hand-over": (["parallel.checkpoint=true", *RECURRENT], "parallel.checkpoint=true"),
    "hashes": (["attention=reformer"], "hashes are sorted"),
    "a label of a row": (["task=listops", "seq_len=128", "attention=longformer"], "pools all columns"),
}


def ran(size: int, sequence: int, names: list[str], count: int, dtype: str) -> dict[str, Any]:
    cases = [{"words": RUNS[name], "sequence": sequence, "count": count, "dtype": dtype} for name in names]
    return dict(zip(names, together(size, "tests.sequence_training:trained", cases), strict=True))


def check_equal(found: dict[str, Any], within: float) -> None:
    for name, said in found.items():
        assert "refused" not in said, (name, said)
        one, many = said["one"], said["many"]
        for key in ("loss", "norm"):
            assert many[key] == pytest.approx(one[key], rel=within, abs=0), (name, key)
        assert many["tokens"] == one["tokens"], name
        assert [step.keys() for step in many["auxiliary"]] == [step.keys() for step in one["auxiliary"]], name
        for metric, value in one["metrics"].items():
            assert many["metrics"][metric] == pytest.approx(value, rel=10 * within), (name, metric)
        positions = [[at for at, _ in said[way]["by_position"]] for way in ("one", "many")]
        assert positions[0] == positions[1], name


def test_two_processes_train_as_one() -> None:
    check_equal(ran(2, 2, ["transformer_xl", "block_recurrent"], 4, "float64"), 1e-11)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_as_one_for_twenty_steps() -> None:
    check_equal(ran(2, 2, list(RUNS), 20, "float64"), 1e-11)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_as_one_in_float32() -> None:
    check_equal(ran(2, 2, list(RUNS)[:5], 20, "float32"), 1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_rows_and_tokens_are_shared_at_once() -> None:
    check_equal(ran(4, 2, ["transformer_xl", "block_recurrent", "full", "hourglass"], 20, "float64"), 1e-11)


@pytest.mark.slow
@pytest.mark.long
def test_options_that_do_not_go_with_it_are_refused_by_name() -> None:
    cases = [{"words": words, "sequence": 2, "count": 1, "dtype": "float64"} for words, _ in REFUSED.values()]
    found = together(2, "tests.sequence_training:trained", cases)
    for (name, (_, reason)), said in zip(REFUSED.items(), found, strict=True):
        assert reason in said.get("refused", ""), (name, said)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_under_torchrun_says_what_it_sent(tmp_path: Path) -> None:
    """Bytes a token stand in the row, beside time and memory."""
    words = ["task=text", "seq_len=64", "batch=4", "steps=3", "tracker=none", "model=tiny", "trainer.progress=none"]
    words += ["trainer.carry_state=false", "device=cpu", "threads=1", "task.evaluation_rows=2", *XL]
    words += ["model.short_conv=0"]
    rows = []
    for count in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *start, "-m", "experiments.train", *words, f"parallel.sequence={count}"]
        folder = tmp_path / str(count)
        done = subprocess.run(
            [*command, f"output={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (result,) = folder.rglob("result.json")
        rows.append(json.loads(result.read_text()))
    one, two = rows
    assert one["sent_bytes_per_token"] == 0
    layers, width, memory, tokens = 2, 64, 8, 4 * 64
    assert two["sent_bytes_per_token"] == layers * 4 * memory * width * 4 / tokens
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
