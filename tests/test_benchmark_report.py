"""The page of a benchmark: tables of peers, figures and budgets, and the grids that fill it."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from report_page import ask, drawn
from rich.console import Console

from attention_zoo.jobs.benchmark import benchmark
from attention_zoo.measure.config import BenchmarkConfig, register
from attention_zoo.report import rivals
from attention_zoo.report import rows as results

GRIDS = ("peers", "short", "growth", "cuda", "long_core", "long_layer")
QUICK = {"heads": 2, "head_width": 8, "threads": 1, "device": "cpu", "repeats": 1, "budget_s": 0.01}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_a_whole_plan(grid):
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("benchmark", [f"grid={grid}", "device=cpu", "output=elsewhere"]))
    assert isinstance(config, BenchmarkConfig)
    assert config.output == "elsewhere"  # the command line has the last word
    plan = [match.cell for match in config.matches()] if config.peers else config.cells()
    assert {"longformer", "bigbird"} <= {cell.backend for cell in plan}
    # a recurrence is measured with its projections, which belong to it
    variants = {"long_layer": {"layer"}, "peers": {"core", "layer"}}.get(grid, {"core"})
    assert {cell.variant for cell in plan} == variants
    if grid != "cuda":
        assert {cell.threads for cell in plan} == {1}


@pytest.mark.slow
def test_cells_peers_and_budgets_fill_one_page(tmp_path):
    console = Console(width=200, record=True)
    common = {**QUICK, "head_width": 64, "variant": "core", "output": str(tmp_path)}
    config = BenchmarkConfig(
        backends=["longformer"], baselines=False, lengths=[1024, 2048], budget="96MiB", memory_limit_gib=1, **common
    )
    cell, _, budget = benchmark(config, console)
    assert (cell["kind"], budget["kind"], budget["verified"]) == ("speed", "budget", True)
    assert budget["fits"]["length"] < budget["fails"]["length"]
    rows = benchmark(
        BenchmarkConfig(
            peers=True, rounds=1, backends=["longformer"], against=["sdpa"], lengths=[64], memory_limit_gib=1, **common
        ),
        console,
    )
    assert [(row["kind"], row["status"], row["causal"]) for row in rows] == [
        ("peer", "ok", False),
        ("peer", "ok", True),
    ]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == rows
    said = console.export_text()
    for word in ("× floor", "longest trainable length within 96.0 MiB", "ours and theirs in turns", "memory ratio"):
        assert word in said
    page = (tmp_path / "report.html").read_text()
    for word in (
        "Against other implementations",
        "Figures to reach",
        "Ours and theirs",
        "The longest length within a memory",
        "Time against",
    ):
        assert word in page
    figures = (tmp_path / "figures.md").read_text()
    for word in ("| open |", "# Against other implementations", "SDPA (torch", "# Longest trainable length"):
        assert word in figures


def test_a_budget_needs_something_that_trains_and_a_size(tmp_path):
    common = {**QUICK, "backends": ["full"], "baselines": False, "lengths": [16], "output": str(tmp_path)}
    with pytest.raises(ValueError, match=r"budget must be a size such as 8GiB or 512MiB, got 'much'"):
        benchmark(BenchmarkConfig(budget="much", **common))
    assert not list(tmp_path.iterdir())


def test_a_chart_of_ratios_holds_every_pair_that_was_timed():
    row = {
        "kind": "peer", "backend": "bigbird", "against": "sdpa", "title": "SDPA", "status": "ok", "causal": False,
        "variant": "core", "phase": "forward", "heads": 8, "head_width": 64, "batch": 1, "dtype": "float32",
        "device": "cpu", "threads": 1, "length": 1024, "time_ratio": 12.0, "memory_ratio": 0.5,
        "config": {"options": {}},
    }  # fmt: skip
    many = [row, {**row, "against": "hf_bigbird", "title": "HF BigBird"}, {**row, "length": 2048, "time_ratio": None}]
    data = drawn(many)
    timed = [run for run in data["runs"] if "time_ratio" in run["n"]]
    assert [(run["label"], run["against"], run["n"]["time_ratio"], run["n"]["memory_ratio"]) for run in timed] == [
        ("bigbird", title, 12.0, 0.5) for title in ("SDPA", "HF BigBird")
    ]
    assert ask(data, timed[0], "length") == "1024"


def test_a_peer_that_is_not_installed_is_a_line_that_says_how():
    row = {
        "kind": "peer", "backend": "bigbird", "against": "hf_bigbird", "title": "HF BigBird", "status": "missing",
        "error": "pip install 'transformers>=5.2,<6'", "causal": False, "variant": "core", "heads": 8, "head_width": 64,
        "batch": 2, "dtype": "float32", "device": "cpu", "length": 1024, "seconds": 0.5, "their_seconds": None,
        "time_ratio": None, "time_ratio_min": None, "time_ratio_max": None, "memory_ratio": None,
        "resident_ratio": None, "peak_bytes": 1000, "their_peak_bytes": None, "floor_ratio": None,
        "agreement": None, "versions": None,
        "kernel": "auto", "phase": "forward", "threads": 1, "config": {"options": {"block": 32}},
    }  # fmt: skip
    (cells,) = rivals.peers_table([row]).cells
    ours, tokens, where, against, ratio, *_, takes, theirs, _, _ = cells
    assert (ours, tokens, against, ratio, takes) == ("bigbird (block=32)", "1,024", "HF BigBird", "–", "500 ms")
    assert where == "two-sided, core, forward, 8 × 64, batch 2, float32, cpu, threads 1"
    assert theirs == "not installed: pip install 'transformers>=5.2,<6'"
    assert rivals.fairness([row]) == []
    assert results.what(row) == "bigbird against HF BigBird, core, 1,024 tokens"
