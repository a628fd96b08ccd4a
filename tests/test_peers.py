"""Others' attention beside ours: that each computes the same, that turns are fair, and what the figures say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.measure.core import Shape
from attention_zoo.measure.nursery import GRACE_S
from attention_zoo.measure.peers import contest, environment, figures
from attention_zoo.measure.peers.adapter import Adapter
from attention_zoo.measure.peers.contender import Lost, Stable
from attention_zoo.measure.peers.contest import run_contest
from attention_zoo.measure.peers.full import Fused
from attention_zoo.measure.peers.matches import Match, heats, matches
from attention_zoo.measure.peers.table import PEERS

TINY = {"heads": 2, "head_width": 8, "threads": 1, "variant": "core"}
CPU = torch.device("cpu")
ATTENTIONS = [name for name, peer in PEERS.items() if issubclass(peer, Adapter)]


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_computes_what_ours_does(peer):
    if PEERS[peer].needs is not None:
        pytest.importorskip(PEERS[peer].module)
    found = PEERS[peer].agreement()
    assert found.holds, found
    assert found.bound <= 1e-6


@pytest.mark.parametrize("length", [41, 61])
@pytest.mark.parametrize("peer", ["hf_longformer", "xl_dense", "materialised", "local_attention"])
def test_lengths_that_fit_no_block_are_filled_up_as_their_library_does(peer, length, monkeypatch):
    monkeypatch.setattr(PEERS[peer], "small_length", length)
    assert PEERS[peer].agreement().holds


def test_a_peer_that_computes_something_else_is_found_out():
    class Sharper(Fused):
        def call(self, *operands):
            q, k, v = operands
            return super().call(1.001 * q, k, v)

    found = Sharper.agreement()
    assert not found.holds
    assert max(found.output, found.gradient) < 0.1  # a small lie


@pytest.mark.parametrize(
    ("peer", "backend", "options", "causal"),
    [
        ("hf_longformer", "longformer", {}, True),
        ("hf_longformer", "longformer", {"dilation": 2}, False),
        ("local_attention", "longformer", {"dilation": 2}, True),
        ("hf_bigbird", "bigbird", {}, True),
        ("hf_bigbird", "bigbird", {"window_blocks": 5}, False),
        ("hf_bigbird", "bigbird", {"block": 32}, False),  # 200 tokens are too few for its sparse attention
        ("hf_reformer", "reformer", {"correct_duplicates": True}, True),
        ("reformer_pytorch", "reformer", {"look_back": 2}, True),
        ("compressive_transformer_pytorch", "compressive", {"compression": "mean"}, True),
        ("compressive_transformer_pytorch", "compressive", {"segment_length": 30}, True),
        ("block_recurrent_pytorch", "block_recurrent", {"bias": False}, True),
        ("block_recurrent_pytorch", "block_recurrent", {"kv_heads": 1, "bias": False, "gate": "lstm"}, True),
        ("block_recurrent_pytorch", "block_recurrent", {"kv_heads": 1, "bias": False, "positions": "rotary"}, True),
    ],
)
def test_what_a_peer_cannot_mirror_is_refused(peer, backend, options, causal):
    pytest.importorskip(PEERS[peer].module)
    layer = zoo.build(backend, dim=16, heads=2, causal=causal, **options)
    with pytest.raises(zoo.Unsupported, match=r"use .* instead"):
        PEERS[peer](layer, Shape(1, 200, CPU, torch.float32))


@pytest.mark.parametrize("variant", ["core", "layer"])
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("peer", ATTENTIONS)
def test_every_peer_is_called_as_a_cell_is(peer, phase, variant):
    adapter = PEERS[peer]
    pytest.importorskip(adapter.module)
    backend = adapter.backend or "full"
    if variant not in adapter.variants:
        pytest.skip(f"measured as {adapter.variants}")
    options = {
        "bigbird": {"block": 8}, "transformer_xl": {"segment_length": 40, "memory_length": 30},
        "block_recurrent": {"kv_heads": 1, "bias": False, "window": 40, "states": 8},
    }.get(backend, {})  # fmt: skip
    causal = adapter.small_causal
    cell = SpeedCell(backend, 150, options=options, batch=3, causal=causal, **{**TINY, "variant": variant})
    work = adapter(cell.build(), cell.shape()).work(variant, phase)
    for _ in range(2):
        work.before()
        work.run()
    leaves = [each for each in work.held() if each.requires_grad]
    assert (phase == "forward_backward") <= any(leaf.grad is not None for leaf in leaves)
    with pytest.raises(zoo.Unsupported, match="phase=decode"):
        adapter(cell.build(), cell.shape()).work(variant, "decode")


# --- who meets whom --------------------------------------------------------------------------------------------------


def cell(backend: str, length: int = 64, **more) -> SpeedCell:
    return SpeedCell(backend, length, **{**TINY, **more})


def test_matches_go_in_the_directions_that_peers_have():
    names = ("longformer", "bigbird", "reformer", "transformer_xl", "compressive", "block_recurrent")
    found = matches([cell(name, 4096) for name in names], quadratic_up_to=1024)
    said = [(m.cell.backend, m.cell.causal, m.cell.length, m.cell.options, m.rivals) for m in found]
    assert said == [
        ("longformer", False, 4096, {}, ("hf_longformer", "local_attention")),
        ("longformer", True, 4096, {"window": 512}, ("local_attention",)),
        ("bigbird", False, 4096, {}, ("hf_bigbird_4_57", "hf_bigbird")),
        ("reformer", True, 4096, {}, ("hf_reformer", "reformer_pytorch")),
        ("transformer_xl", True, 2048, {"segment_length": 2048, "memory_length": 512}, ("xl_dense",)),
        ("transformer_xl", True, 512, {"segment_length": 512, "memory_length": 512}, ("xl_dense", "sdpa")),
        (
            "compressive", True, 4096, {"segment_length": 512, "memory_length": 512},
            ("compressive_transformer_pytorch",),
        ),
        ("block_recurrent", True, 4096, {"kv_heads": 1, "bias": False}, ("block_recurrent_pytorch",)),
    ]  # fmt: skip


def test_options_of_ones_own_are_kept_and_others_peers_left_out():
    given = [cell("longformer", options={"window": 64}), cell("transformer_xl", options={"segment_length": 128})]
    found = matches(given, against=["sdpa"])
    assert [m.cell.options for m in found] == [
        {"window": 64}, {"window": 64}, {"segment_length": 128, "memory_length": 512}
    ]  # fmt: skip
    assert {m.rivals for m in found} == {("sdpa",)}
    with pytest.raises(ValueError, match=r"against must name peers \(sdpa, .*\), got sdap"):
        matches(given, against=["sdap"])


def test_a_backend_that_nobody_knows_meets_the_baselines():
    (match,) = matches([replace(cell("full"), backend="somebodys")])
    assert match.rivals == ("sdpa", "materialised")


def test_the_configuration_names_what_cannot_be_meant():
    def config(**given):
        return BenchmarkConfig(**{"peers": True, "lengths": [64], "device": "cpu", "backends": ["longformer"], **given})

    assert len(config().matches()) == 2
    for given, said in (
        ({"phases": ["decode"]}, "phases must be forward or forward_backward with peers=true"),
        ({"rounds": 0}, "rounds must be an integer of at least 1"),
        ({"backends": ["longformr"]}, "did you mean longformer"),
        ({"against": ["xl_dense"]}, "against and backends must leave a match"),
        ({"options": {"longformer": {"window": 0}}}, "window must be"),
    ):
        with pytest.raises(ValueError, match=said):
            config(**given).matches()


# --- in turns --------------------------------------------------------------------------------------------------------


class Scripted:
    """Contenders that take as long as they are told: seconds and bytes by (peer or None, backend)."""

    def __init__(self, takes, drift=1.0):
        self.takes, self.drift, self.asked, self.slower = takes, drift, [], 1.0

    def __call__(self, pythons, limit):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def start(self, cell, peer, role, *, timeout_s):
        takes = self.takes.get(peer if peer else cell.backend)
        if isinstance(takes, Lost) and role == "check":
            raise takes
        return _Contender(self, peer or cell.backend, role, takes)


class _Contender(SimpleNamespace):
    def __init__(self, stable, name, role, takes):
        super().__init__(stable=stable, name=name, role=role, takes=takes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def ask(self, what=None):
        if self.role == "check":
            wrong = self.takes is None
            return {
                "output": 1.0 * wrong,
                "gradient": 0.0,
                "bound": 1e-9,
                "on": "paper",
                "holds": not wrong,
                "versions": {},
            }
        seconds, size = self.takes
        if self.role == "memory":
            return {"peak_bytes": size, "peak_method": "told"}
        if what == "call":
            self.stable.asked.append(self.name)
            self.stable.slower *= self.stable.drift
            took = seconds * self.stable.slower
            # a machine that slows down slows matrix products too
            rate = 1e9 / self.stable.slower
            return {"seconds": took, "cpu_seconds": took / 2, "matmul_flops_per_second": rate}
        if what == "end":
            return {"resident_bytes": 2 * size, "floor_flops": int(5e8)}
        return {}


def scripted(monkeypatch, takes, **more):
    stable = Scripted(takes, **more)
    monkeypatch.setattr(contest, "Stable", stable)
    return stable


PAIR = [Match(cell("longformer", causal=False), ("hf_longformer", "sdpa"))]


def test_a_pair_is_timed_side_by_side_and_its_ratio_is_told(monkeypatch):
    stable = scripted(monkeypatch, {"longformer": (1.0, 100), "hf_longformer": (4.0, 900), "sdpa": (20.0, 50)})
    told, kept = [], []
    rows = run_contest(PAIR, rounds=3, say=told.append, on_rows=kept.extend)
    assert kept == rows
    assert stable.asked == [
        "longformer", "hf_longformer", "longformer", "sdpa",
        "sdpa", "longformer", "hf_longformer", "longformer",
        "longformer", "hf_longformer", "longformer", "sdpa",
    ]  # fmt: skip
    first, second = rows
    assert (first["against"], first["time_ratio"], first["memory_ratio"]) == ("hf_longformer", 4.0, 9.0)
    assert (second["against"], second["time_ratio"], second["memory_ratio"]) == ("sdpa", 20.0, 0.5)
    assert (first["seconds"], first["their_seconds"], first["rounds"]) == (1.0, 4.0, 3)
    assert (first["resident_ratio"], first["floor_ratio"], first["cpu_time_ratio"]) == (9.0, 2.0, 4.0)
    assert (first["kind"], first["status"], first["backend"]) == ("peer", "ok", "longformer")
    assert first["id"] != second["id"]
    assert any("round 2 of 3" in line for line in told)


def test_a_machine_that_grows_slower_meets_both_alike(monkeypatch):
    """By 2 % a call: 22 % over the run. Medians of each side would be as far apart as their places in the order."""
    scripted(monkeypatch, {"longformer": (1.0, 1), "hf_longformer": (4.0, 1), "sdpa": (20.0, 1)}, drift=1.02)
    rows = run_contest(PAIR, rounds=4)
    assert rows[0]["time_ratio"] == pytest.approx(4.0, rel=0.005)
    assert rows[1]["time_ratio"] == pytest.approx(20.0, rel=0.005)
    assert rows[0]["time_ratio_min"] < 4.0 < rows[0]["time_ratio_max"]
    assert rows[0]["floor_ratio"] == pytest.approx(2.0)  # each call against the matrix products around it


def test_what_is_not_there_or_computes_something_else_is_a_row_and_the_others_go_on(monkeypatch):
    takes = {
        "longformer": (1.0, 1), "hf_longformer": Lost("missing", "pip install something"),
        "local_attention": None, "sdpa": (3.0, 1),
    }  # fmt: skip
    scripted(monkeypatch, takes)
    many = [Match(cell("longformer", causal=False), ("hf_longformer", "local_attention", "sdpa"))]
    missing, wrong, sdpa = run_contest(many, rounds=2)
    assert (missing["status"], missing["error"]) == ("missing", "pip install something")
    assert wrong["status"] == "failed"
    assert "does not compute what ours does: 1.0e+00 apart on paper" in wrong["error"]
    assert missing["time_ratio"] is None
    assert missing["seconds"] == 1.0  # ours is there
    assert (sdpa["status"], sdpa["time_ratio"]) == ("ok", 3.0)


def test_a_baseline_is_timed_once_for_all_of_one_length_and_direction():
    found = heats(matches([cell("longformer"), cell("bigbird"), cell("reformer"), cell("longformer", 32)]))
    assert [(h[0].cell.length, h[0].cell.causal, len(h)) for h in found] == [
        (32, False, 1), (32, True, 1), (64, False, 2), (64, True, 2)
    ]  # fmt: skip


@pytest.mark.slow
def test_real_processes_and_what_is_not_installed():
    pytest.importorskip(PEERS["hf_bigbird"].module)
    many = [Match(cell("bigbird", 1000, causal=False), ("hf_bigbird", "sdpa", "hf_bigbird_4_57"))]
    here, sdpa, older = run_contest(many, rounds=2, timeout_s=120, memory_limit_bytes=2**30)
    assert (here["status"], here["error"]) == ("ok", None)
    assert here["versions"]["transformers"].startswith("5.")
    assert here["agreement"]["output"] < 1e-9
    assert here["time_ratio_min"] <= here["time_ratio"] <= here["time_ratio_max"]
    assert here["memory_ratio"] > 1
    assert here["resident_bytes"] > 0.5 * here["peak_bytes"]
    assert here["floor_ratio"] > 0.5
    assert (sdpa["status"], sdpa["rounds"]) == ("ok", 2)
    assert older["status"] == "missing"
    assert "pip install 'transformers==4.57.6' in an environment of its own" in older["error"]


@pytest.mark.slow
def test_a_side_that_is_too_slow_or_too_large_is_lost_and_says_so():
    given = cell("full", 4096)
    with Stable(memory_limit_bytes=2**28) as stable:
        with stable.start(given, "materialised", "memory", timeout_s=60) as contender:
            with pytest.raises(Lost) as caught:
                contender.ask()
        assert caught.value.status == "oom"
        assert "\n" not in caught.value.reason
        with stable.start(given, "sdpa", "time", timeout_s=60) as contender:
            contender.ask()
            contender._timeout_s = 1e-3 - GRACE_S
            with pytest.raises(Lost) as caught:
                contender.ask("call")
        assert caught.value.status == "timeout"


def test_a_python_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"peer_python must name a peer .*, got 'nobody'"):
        Stable({"nobody": "/bin/sh"})
    with pytest.raises(ValueError, match=r"peer_python\.hf_bigbird must be the path of a Python, got '/nowhere'"):
        Stable({"hf_bigbird": "/nowhere"})


def test_an_environment_is_a_layer_over_this_one(tmp_path, monkeypatch):
    ran = []

    def run(command, **how):
        ran.append(command)
        return SimpleNamespace(stdout=f"{tmp_path}\n")

    monkeypatch.setattr(environment.venv, "create", lambda folder, **how: ran.append(folder))
    monkeypatch.setattr(environment.subprocess, "run", run)
    assert environment.build(tmp_path / "older") == tmp_path / "older" / "bin" / "python"
    assert ran[-1][1:] == ["-m", "pip", "install", "-q", "transformers==4.57.6"]
    lines = (tmp_path / "shared.pth").read_text().splitlines()
    torchs = str(Path(torch.__file__).parents[1])
    assert any(torchs in line for line in lines) or lines  # where torch lies, unless it is layered itself
    assert all(line.startswith("import site; site.addsitedir(") for line in lines)


# --- the figures to reach --------------------------------------------------------------------------------------------


def peer_row(backend="longformer", against="hf_longformer", **more):
    options = more.pop("options", {})
    row = {
        "kind": "peer", "status": "ok", "backend": backend, "against": against, "variant": "core", "title": "T",
        "phase": "forward_backward", "heads": 8, "head_width": 64, "batch": 1, "device": "cpu", "dtype": "float32",
        "threads": 1, "length": 16384, "causal": False, "time_ratio": 5.0, "memory_ratio": 10.0, "floor_ratio": 1.5,
        "config": {"options": options},
    }  # fmt: skip
    return {**row, **more}


def states(rows):
    return {(v.figure.backend, v.figure.against, v.figure.said): v.state for v in figures.verdicts(rows)}


def test_without_rows_every_figure_is_open():
    assert set(states([]).values()) == {"open"}
    assert len(states([])) == len(figures.FIGURES) == 54


def test_a_figure_is_reached_missed_or_open_by_the_rows_of_its_own_setting():
    key = ("longformer ±256", "HF Longformer", "≥ 4× faster")
    assert states([peer_row()])[key] == "reached"
    assert states([peer_row(time_ratio=3.9)])[key] == "missed"
    for other in (
        {"length": 8192}, {"threads": 2}, {"variant": "layer"}, {"status": "failed"}, {"causal": True},
        {"options": {"window": 128}}, {"head_width": 32}, {"dtype": "bfloat16"}, {"time_ratio": None},
    ):  # fmt: skip
        assert states([peer_row(**other)])[key] == "open", other
    floor = ("longformer ±256", "matmul floor", "≤ 2× the floor")
    assert states([peer_row()])[floor] == "reached"
    assert states([peer_row(floor_ratio=2.1)])[floor] == "missed"
    assert states([peer_row(causal=True)])[floor] == "open"


def test_the_best_of_two_peers_counts_and_both_must_be_there():
    key = ("reformer 4 rounds", "best of HF and reformer-pytorch", "≥ 2.5× faster")
    both = [
        peer_row("reformer", "hf_reformer", causal=True, time_ratio=3.0),
        peer_row("reformer", "reformer_pytorch", causal=True, time_ratio=2.4),
    ]
    assert states(both)[key] == "missed"
    assert states(both[:1])[key] == "open"


def test_bytes_may_be_more_than_a_baselines_by_so_much():
    key = ("longformer causal 512", "causal SDPA", "≤ 1.3× its bytes")
    given = {"causal": True, "options": {"window": 512}, "against": "sdpa"}
    assert states([peer_row(**given, memory_ratio=0.8)])[key] == "reached"
    assert states([peer_row(**given, memory_ratio=0.7)])[key] == "missed"


def test_one_of_ours_is_held_to_another_through_the_baseline_that_both_met():
    key = ("h_transformer_1d", "longformer ±256", "≤ 3.5× its time")
    mine, theirs = peer_row("h_transformer_1d", "sdpa", time_ratio=6.0), peer_row("longformer", "sdpa", time_ratio=20.0)
    assert states([mine, theirs])[key] == "reached"
    assert states([mine, {**theirs, "time_ratio": 22.0}])[key] == "missed"
    assert states([mine])[key] == "open"


def test_growth_and_short_lengths_and_rates():
    def speed(length, seconds):
        return {**peer_row("bigbird", kind="speed", length=length), "seconds": seconds, "peak_bytes": 100 * length}

    rows = [speed(4096, 1.0), speed(16384, 4.4), speed(65536, 20.0)]
    found = states(rows)
    assert found["bigbird", "itself, 4k to 64k", "time ~ length^≤1.2"] == "reached"
    assert found["bigbird", "itself, 4k to 64k", "bytes ~ length^≤1.05"] == "reached"
    assert states(rows[:2])["bigbird", "itself, 4k to 64k", "time ~ length^≤1.2"] == "open"
    short = [peer_row("bigbird", "sdpa", length=n, time_ratio=r) for n, r in ((256, 1.0), (512, 0.9), (1024, 0.7))]
    assert states(short)["bigbird", "SDPA, 256 to 1,024", "≤ 1.3× its time"] == "missed"
    assert states(short[:2])["bigbird", "SDPA, 256 to 1,024", "≤ 1.3× its time"] == "open"
    full = 3.5 * 4 * 64 * 8 * 65536**2
    rate = peer_row(
        against="sdpa",
        device="cuda:0",
        dtype="bfloat16",
        threads=8,
        length=65536,
        time_ratio=60.0,
        floor_flops=full / 100,
    )
    assert states([rate])["longformer ±256", "SDPA's FLOP rate, 64k, CUDA, bfloat16", "≥ 50%"] == "reached"
