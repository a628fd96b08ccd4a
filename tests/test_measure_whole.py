"""Cells of whole models: what a step of training takes, and that a shortened stack takes less."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from attention_zoo.contract import Unsupported
from attention_zoo.measure.cell import SpeedCell, run_cell, work_for
from attention_zoo.measure.config import BenchmarkConfig, register
from attention_zoo.measure.kept import _of_no_cell
from attention_zoo.measure.memory import peak_memory
from attention_zoo.measure.peers import figures
from attention_zoo.measure.peers.contest import run_contest
from attention_zoo.measure.peers.hourglass_transformer import LIKE
from attention_zoo.measure.peers.matches import Match, matches
from attention_zoo.measure.peers.table import PEERS
from attention_zoo.report import rivals
from attention_zoo.report import rows as results
from attention_zoo.report.tables import cost_table

TINY = {"heads": 2, "head_width": 8, "threads": 1, "variant": "model", "phase": "train_step"}
SHORT = {"shorten": "1@1 2@4 1@1"}
MIRROR = {key: value for key, value in LIKE.items() if key != "attention"}


def cell(length=32, backend="full", **more):
    return SpeedCell(backend, length, **{**TINY, **more})


@pytest.mark.parametrize("phase", ["forward", "forward_backward", "train_step"])
@pytest.mark.parametrize(("backend", "model"), [("full", SHORT), ("adaptive_span", {"depth": 1}), ("longformer", {})])
def test_a_model_is_a_cell_like_others(backend, model, phase):
    given = cell(backend=backend, model=model, phase=phase, batch=2)
    row = run_cell(given, repeats=1, budget_s=0.0)
    assert row["status"] == "ok", row["error"]
    assert row["peak_bytes"] > 0
    assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
    assert row["floor_flops"] is None
    assert _of_no_cell(row) is None
    assert results.options(row) == model
    said = {"full": "full (shorten=1@1 2@4 1@1)", "adaptive_span": "adaptive_span (depth=1)"}.get(backend, backend)
    assert given.said == said
    assert cost_table("", [(given, row)]).columns[0]._cells[0] == said


def test_a_step_learns_all_parameters():
    given = cell(model=SHORT)
    model = given.measured()
    work, before = work_for(model, given), [p.clone() for p in model.parameters()]
    for _ in range(2):
        work.before()
        work.run()
    assert model.training
    assert all(p.grad is not None for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
    held = 4 * sum(p.numel() for p in model.parameters())
    assert work.held_bytes() >= 3 * held  # with the moments of AdamW


def test_a_shorter_middle_holds_less():
    """Of twelve layers ten over an eighth of the tokens: what is kept for backward is that of 2 + 10 / 8 layers."""
    peaks = []
    for model in ({"depth": 12}, {"shorten": "1@1 10@8 1@1"}):
        given = cell(512, model={**model, "vocab": 4})
        work = work_for(given.measured(), given)
        for _ in range(2):
            work.before()
            work.run()
        work.before()
        peaks.append(peak_memory(work.run).peak_bytes)
    assert peaks[1] < 0.4 * peaks[0]


def test_what_is_no_model_is_refused():
    for given, said in (
        ({"phase": "decode"}, "phase=decode"),
        ({"model": {"head": "hidden"}}, "head=hidden"),
        ({"model": {"shorten": {"name": "funnel", "layout": "1@1 1@2 1@1"}}}, "causal=True"),
    ):
        row = run_cell(cell(**given), repeats=1)
        assert (row["status"], said in row["error"]) == ("unsupported", True), row["error"]
    with pytest.raises(ValueError, match="model must be empty unless variant=model"):
        cell(model=SHORT, variant="layer", phase="forward")
    with pytest.raises(ValueError, match="models must leave dim and causal to the cell"):
        cell(model={"dim": 8, "causal": False}).measured()


def test_the_configuration_takes_a_list_of_models():
    def config(**given):
        return BenchmarkConfig(**{
            "variant": "model", "lengths": [64], "device": "cpu", "backends": ["full"], "baselines": False,
            "phases": ["train_step"], "heads": 2, "head_width": 8, "models": [{"depth": 1}, SHORT], **given,
        })  # fmt: skip

    found = config().cells()
    assert [each.model for each in found] == [{"depth": 1}, SHORT]
    assert len({each.series() for each in found}) == len({each.identity() for each in found}) == 2
    assert [each.model for each in config(models=[]).cells()] == [{}]
    for given, said in (
        ({"models": [{"dpth": 1}]}, "dpth"),
        ({"models": [{"shorten": "2@1"}]}, "shorten must list"),
        ({"models": ["deep"]}, "models must list mappings"),
        ({"variant": "layer"}, "models must be empty unless variant=model"),
    ):
        with pytest.raises(ValueError, match=said):
            config(**given).cells()
    with pytest.raises(ValueError, match="phases must be forward or forward_backward or train_step"):
        config(peers=True, phases=["decode"]).matches()
    with pytest.raises(ValueError, match="phases must be forward or forward_backward with"):
        config(peers=True, variant="core", models=[]).matches()
    (match, _) = config(peers=True).matches()
    assert match.rivals == ("hourglass_transformer",)


@pytest.mark.parametrize("grid", ["model", "model_peers"])
def test_grids_are_whole_plans(grid):
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("benchmark", [f"grid={grid}", "heads=2", "head_width=8"]))
    plan = [match.cell for match in config.matches()] if config.peers else config.cells()
    assert {(each.variant, each.phase, each.threads) for each in plan} == {("model", "train_step", 1)}
    assert any("shorten" in each.model for each in plan)


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["forward", "train_step"])
def test_a_peer_is_called_as_a_model_is(phase):
    given = cell(20, options={"bias": "out"}, model={**MIRROR, **SHORT}, phase=phase)
    work = PEERS["hourglass_transformer"](given.measured(), given.shape()).work("model", phase)
    before = work.held_bytes()
    for _ in range(2):
        work.before()
        work.run()
    assert (work.held_bytes() > 2 * before) == (phase == "train_step")
    with pytest.raises(Unsupported, match="phase=prefill"):
        PEERS["hourglass_transformer"](given.measured(), given.shape()).work("model", "prefill")


def test_models_meet_models_alone():
    found = matches([cell(), cell(backend="longformer"), cell(variant="core", phase="forward")], against=None)
    assert [(m.cell.variant, m.rivals) for m in found] == [
        ("model", ("hourglass_transformer",)),
        ("core", ("sdpa", "materialised")),
    ]
    (both,) = matches([cell(causal=False)])
    assert not both.cell.causal


@pytest.mark.slow
def test_a_contest_of_models():
    given = cell(60, options={"bias": "out"}, model={**MIRROR, **SHORT})
    (row,) = run_contest([Match(given, ("hourglass_transformer",))], rounds=1, timeout_s=120)
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["agreement"]["output"] < 1e-9
    assert row["time_ratio"] > 0
    assert "shorten=1@1 2@4 1@1" in rivals.named(row)


def test_the_figure_is_of_train_steps():
    row = {
        "kind": "peer", "status": "ok", "backend": "full", "against": "hourglass_transformer", "title": "T",
        "variant": "model", "phase": "train_step", "heads": 8, "head_width": 64, "batch": 1, "device": "cpu",
        "dtype": "float32", "threads": 1, "length": 4096, "causal": True, "time_ratio": 1.5, "memory_ratio": 9.0,
        "config": {"options": {"bias": "out"}, "model": {"shorten": "2@1 8@3 2@1"}},
    }  # fmt: skip

    def said(given):
        table = rivals.figures_table([given])
        (found,) = [line for line in table.cells if line[0].startswith("hourglass")]
        return found[-1]

    assert said(row) == "reached"
    assert said({**row, "time_ratio": 0.9}) == "missed"
    assert said({**row, "phase": "forward_backward"}) == "open"
    assert said({**row, "config": {"options": {}, "model": {"shorten": "1@1 1@2 1@1"}}}) == "open"
    assert {each.of["variant"] for each in figures.FIGURES} == {"core", "layer", "model"}
