"""The meters: bytes, seconds, FLOPs, names of results, and what follows from rows."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from recorded import RECORDED
from torch.utils.flop_counter import FlopCounterMode

import attention_zoo as zoo
from attention_zoo.attention.reformer import Reformer
from attention_zoo.measure import cell as cell_module
from attention_zoo.measure import flops, identity, speed
from attention_zoo.measure.cell import SpeedCell, run_cell
from attention_zoo.measure.core import Shape, core_of
from attention_zoo.measure.derived import costs, efficiency_length, growth_exponent, longest_within
from attention_zoo.measure.environment import device_name, environment
from attention_zoo.measure.memory import CPU_METHOD, ResidentPeak, highest_sum, peak_memory
from attention_zoo.measure.speed import matmul_rate, time_call
from attention_zoo.measure.work import prepare

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_peak_of_known_allocations_is_exact():
    def call() -> None:
        first = torch.empty(1000, 250)  # 1,000,000 bytes
        second = torch.empty(500, 250)  # and 500,000 beside it
        del first
        third = torch.empty(100, 250)  # 100,000 that the first one made room for
        del second, third

    memory = peak_memory(call)
    assert memory.peak_bytes == 1_500_000
    assert memory.method == CPU_METHOD
    assert memory.reserved_bytes is None


def test_what_lived_before_does_not_count_and_what_is_returned_does():
    before = torch.ones(1000, 1000)
    assert peak_memory(lambda: before[:10].clone()).peak_bytes == 40_000
    held = [before]

    def releasing() -> torch.Tensor:
        held.clear()
        return torch.empty(25)

    del before
    assert peak_memory(releasing).peak_bytes == 100


def test_temporaries_inside_a_kernel_count():
    x = torch.randn(64, 64, dtype=torch.float64)
    assert peak_memory(lambda: torch.linalg.inv(x)).peak_bytes > 64 * 64 * 8


@pytest.mark.parametrize(
    ("events", "highest"),
    [([], 0), ([(2, -4), (1, 4), (3, 3)], 4), ([(1, -5), (2, 3)], 0), ([(1, 5), (1, -5), (1, 5)], 5)],
)
def test_the_highest_running_sum(events, highest):
    assert highest_sum(events) == highest


def peak_of(kernel: str, length: int, phase: str = "forward_backward") -> int:
    layer = zoo.build("full", dim=32, heads=4, kernel=kernel)
    work = prepare(layer, Shape(1, length, CPU, torch.float32), variant="layer", phase=phase)
    work.before()
    return peak_memory(work.run).peak_bytes


def test_materialised_attention_grows_with_the_square_and_fused_attention_with_length():
    dense = [peak_of("dense", length) for length in (512, 1024)]
    fused = [peak_of("sdpa", length) for length in (1024, 2048, 4096)]
    assert 3.8 < dense[1] / dense[0] < 4.1
    # twice for twice, on top of the kernel's fixed work space, which weighs at this width
    assert (fused[2] - fused[1]) / (fused[1] - fused[0]) == pytest.approx(2, rel=0.02)
    assert dense[1] > 4 * 1024 * 1024 * 4 * 2  # four heads' scores and weights


def test_gradients_are_part_of_the_peak():
    assert peak_of("sdpa", 256, "forward_backward") > 1.5 * peak_of("sdpa", 256, "forward")


def test_each_call_of_a_training_cell_starts_without_gradients():
    layer = zoo.build("full", dim=8, heads=2)
    work = prepare(layer, Shape(1, 5, CPU, torch.float32), variant="layer", phase="forward_backward")
    gradients = []
    for _ in range(2):
        work.before()
        assert all(parameter.grad is None for parameter in layer.parameters())
        work.run()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_training_step_moves_the_weights_and_a_decoding_step_goes_on():
    layer = zoo.build("full", dim=8, heads=2)
    before = layer.to_q.weight.clone()
    shape = Shape(2, 5, CPU, torch.float32)
    work = prepare(layer, shape, variant="layer", phase="train_step")
    work.before()
    work.run()
    assert not torch.equal(layer.to_q.weight, before)
    work = prepare(layer, shape, variant="layer", phase="decode")
    for step in range(3):
        work.before()
        work.run()
        assert work.state().tokens.position[:, -1].tolist() == [5 + step] * 2


def test_the_resident_set_grows_by_what_is_touched_and_what_was_freed_before_counts_again():
    for _ in range(2):
        meter = ResidentPeak()
        held = torch.ones(2**24)  # 64 MiB
        del held
        assert 60 * 2**20 < meter.bytes() < 80 * 2**20
    assert ResidentPeak().bytes() < 2**20


@pytest.mark.parametrize("phase", ["forward", "forward_backward", "train_step"])
def test_what_is_held_between_calls_is_inputs_parameters_and_moments(phase):
    layer = zoo.build("full", dim=8, heads=2)
    parameters = 4 * sum(each.numel() for each in layer.parameters())
    work = prepare(layer, Shape(2, 5, CPU, torch.float32), variant="layer", phase=phase)
    work.before()
    work.run()
    inputs = 2 * 5 * 8 * 4 * (1 if phase == "forward" else 2)  # the gradient that comes in, too
    moments = 2 * parameters + 4 * len(list(layer.parameters())) if phase == "train_step" else 0
    assert work.held_bytes() == parameters + inputs + moments


# --- time ------------------------------------------------------------------------------------------------------------


def test_timing_warms_up_repeats_and_reports_its_spread():
    calls: list[str] = []

    def call() -> None:
        calls.append("call")
        time.sleep(0.02)

    timing = time_call(call, repeats=3, before=lambda: calls.append("before"))
    assert timing.repeats == 3
    assert timing.warmup >= 2
    assert calls == ["before", "call"] * (timing.repeats + timing.warmup)
    assert 0.02 <= timing.seconds_min <= timing.seconds <= timing.seconds_max
    assert timing.cpu_seconds < timing.seconds  # it slept


def test_a_very_long_call_is_made_once(monkeypatch):
    monkeypatch.setattr(speed, "LONG_S", 0.01)
    calls = []
    timing = time_call(lambda: calls.append(time.sleep(0.02)))
    assert (len(calls), timing.repeats, timing.warmup) == (1, 1, 0)
    assert timing.seconds >= 0.02


def test_a_slow_call_is_timed_once_and_its_preparation_is_not_timed():
    timing = time_call(lambda: time.sleep(0.01), repeats=5, budget_s=0.001, before=lambda: time.sleep(0.1))
    assert (timing.repeats, timing.warmup) == (1, 1)
    assert timing.seconds < 0.1


def test_the_matmul_rate_is_that_of_a_computer():
    assert 1e8 < matmul_rate(size=128) < 1e16
    # half precision is timed in float32 on a CPU; if it were not, this would be a hundred times slower
    assert matmul_rate(size=512, dtype=torch.bfloat16) > matmul_rate(size=512) / 10


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_flops_agree_with_torchs_count_on_the_materialised_path():
    layer = zoo.build("full", dim=32, heads=4, causal=False, kernel="dense")
    x = torch.randn(3, 20, 32, requires_grad=True)
    with FlopCounterMode(display=False) as torchs, flops.LinearFlops(layer) as linear:
        out = layer(x).hidden
    attention = flops.attention_flops(flops.count_pairs(layer, 20), batch=3, heads=4, head_width=8)
    assert linear.flops == 4 * 2 * 3 * 20 * 32 * 32
    assert linear.flops + attention == torchs.get_total_flops()
    with FlopCounterMode(display=False) as torchs:
        out.sum().backward()
    assert 2 * (linear.flops + attention) == torchs.get_total_flops()


def test_projections_are_no_longer_counted_after_the_context():
    layer = zoo.build("full", dim=8, heads=2)
    with flops.LinearFlops(layer) as linear:
        layer(torch.randn(1, 3, 8))
    counted = linear.flops
    layer(torch.randn(1, 3, 8))
    assert linear.flops == counted > 0


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_pairs_are_those_of_the_whole_definition(name, length, causal):
    small = {"longformer": {"window": 20}, "bigbird": {"block": 8}}.get(name, {})
    layer = zoo.build(name, dim=8, heads=2, causal=causal, **small)
    tokens = zoo.Tokens.all_valid(1, length)
    seen = (layer.full_bias(tokens, tokens) > -math.inf).double().mean(1)[0]
    assert flops.count_pairs(layer, length) == pytest.approx(float(seen.sum()))
    assert flops.count_pairs(layer, length, last_row_only=True) == pytest.approx(float(seen[-1].sum()))


@pytest.mark.parametrize("options", [{}, {"chunk": 8}, {"chunk": 16, "rounds": 64}], ids=str)
def test_a_step_of_hashed_attention_scores_its_own_windows(options):
    """Not what one token more adds to all: chunks and buckets grow by leaps, and buckets shrink."""
    layer = zoo.build("reformer", dim=8, heads=2, **options)
    assert isinstance(layer, Reformer)
    for length in (1, 2, 64, 65, 513, 1024, 1025, 2048):
        hashing = layer.rounds * sum(layer.factors_for(length)) / 4
        seen = min(length, layer.rounds * 2 * layer.chunk)
        assert flops.count_pairs(layer, length, last_row_only=True) == seen + hashing, length


def test_long_inputs_are_counted_from_a_sample_of_tiles(monkeypatch):
    layer = zoo.build("longformer", dim=8, heads=2, causal=False, window=50)
    exact = flops.count_pairs(layer, 3000)
    monkeypatch.setattr(flops, "EXACT_TILES", 16)
    looked: list[slice] = []
    monkeypatch.setattr(flops, "_seen", lambda *a, original=flops._seen: looked.append(a[2]) or original(*a))
    assert flops.count_pairs(layer, 3000) == pytest.approx(exact)
    assert len(looked) == 16


def test_a_formula_of_the_layers_own_comes_first():
    class Own(type(zoo.build("full", dim=8, heads=2))):
        def pairs(self, length):
            return 3.0 * length

    layer = Own(dim=8, heads=2)
    assert flops.count_pairs(layer, 10) == 30
    assert flops.count_pairs(layer, 10, last_row_only=True) == 3


# --- names of results ------------------------------------------------------------------------------------------------

CONFIG = {"attention": {"window": 4}, "lengths": [1, 2], "trainer": {"progress": "bar", "clip": 1.0}}


def name(config=CONFIG, device="cpu", threads=1):
    return identity.identity(config, device=device, threads=threads)


def test_the_name_follows_what_matters():
    changed = [
        name({**CONFIG, "attention": {"window": 5}}),
        name({**CONFIG, "lengths": [2, 1]}),
        name({**CONFIG, "extra": None}),
        name(device="cuda"),
        name(threads=2),
    ]
    assert len({name(), *changed}) == len(changed) + 1
    assert len(name()) == 16


def test_the_name_ignores_order_and_cosmetics():
    assert name(dict(reversed(CONFIG.items()))) == name()
    assert name({**CONFIG, "tracker": {"mode": "online"}, "output": "elsewhere", "force": True}) == name()
    assert name({**CONFIG, "trainer": {"progress": "none", "clip": 1.0}}) == name()
    assert name({**CONFIG, "trainer": {"progress": "bar", "clip": 2.0}}) != name()
    assert name({**CONFIG, "attention": {"window": 4, "output": "sum"}}) != name()  # cosmetic at the top alone


def test_what_json_cannot_hold_is_refused_by_name():
    with pytest.raises(TypeError, match=r"attention\.window=.* of type Tensor"):
        name({"attention": {"window": torch.zeros(1)}})


def test_the_digest_follows_sources_and_defaults_but_not_charts(tmp_path, monkeypatch):
    package, conf = tmp_path / "attention_zoo", tmp_path / "conf"
    for path, text in [
        (package / "ops" / "dense.py", "x = 1\n"),
        (package / "report" / "page.py", "y = 1\n"),
        (conf / "attention" / "full.yaml", "a: 1\n"),
        (conf / "compare.yaml", "b: 1\n"),
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    places = {"attention_zoo": package, "attention_zoo.conf": conf}
    monkeypatch.setattr(identity.resources, "files", places.__getitem__)
    digest = identity.source_digest.__wrapped__
    first = digest()
    (package / "report" / "page.py").write_text("y = 2\n")
    (conf / "compare.yaml").write_text("b: 2\n")
    assert digest() == first
    (conf / "attention" / "full.yaml").write_text("a: 2\n")
    second = digest()
    (package / "ops" / "dense.py").write_text("x = 2\n")
    third = digest()
    (package / "ops" / "dense.py").rename(package / "ops" / "other.py")
    assert len({first, second, third, digest()}) == 4


def test_the_name_follows_the_source(monkeypatch):
    before = name()
    monkeypatch.setattr(identity, "source_digest", lambda: "other code")
    assert name() != before


def test_a_class_from_elsewhere_brings_its_own_digest():
    assert identity.class_digest(type(zoo.build("full", dim=8, heads=2))) is None
    assert len(identity.class_digest(pytest.Item)) == 16


def test_the_environment_says_what_a_reader_needs():
    here = environment()
    assert here["torch"] == torch.__version__
    assert here["source"] == identity.source_digest()
    assert here["threads"] == torch.get_num_threads()
    assert here["cpu"]
    assert (here["cuda"] is None) == (not torch.cuda.is_available())
    assert device_name("cpu") == here["cpu"]


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_line(device):
    with pytest.raises(ValueError, match="device") as caught:
        device_name(device)
    assert "\n" not in str(caught.value)


# --- what follows from rows ------------------------------------------------------------------------------------------


def test_growth_is_read_off_the_long_end():
    assert growth_exponent({n: 3e-9 * n**2 for n in (256, 1024, 4096)}) == pytest.approx(2)
    fixed = {256: 1.0, 512: 1.0, 1024: 2.0, 2048: 4.0, 4096: 8.0}
    assert growth_exponent(fixed) == pytest.approx(1)
    assert growth_exponent({256: 1.0, 512: math.inf}) is None


LENGTHS = (256, 1024, 4096, 16384)


def test_the_efficiency_length_is_where_the_laws_cross():
    linear = {n: n * 1000.0 for n in LENGTHS}
    square = {n: n * n * 1.0 for n in LENGTHS}
    found = efficiency_length(linear, square)
    assert (found.length, found.why, found.up_to) == (1000, "interpolated", 16384)
    assert str(found) == "1000"
    assert efficiency_length(linear, square, margin=2.0).length == 2000
    never = efficiency_length({256: 9.0, 1024: 9.0}, {256: 1.0, 1024: 2.0, 4096: 99.0})
    assert (never.length, str(never)) == (None, "not up to 1024")
    always = efficiency_length({256: 1.0, 1024: 1.0}, {256: 2.0, 1024: 2.0})
    assert (always.length, str(always)) == (256, "≤ 256")
    assert efficiency_length({256: 1.0}, {512: 1.0}) is None


def test_the_crossing_that_lasts_counts():
    mine, baseline = {1: 9.0, 2: 1.0, 8: 4.0, 32: 4.0}, {1: 2.0, 2: 2.0, 8: 2.0, 32: 8.0}
    assert efficiency_length(mine, baseline).length == 16  # from 8 to 32, not the head start at 2


def test_a_baseline_that_died_is_overtaken_and_a_mechanism_that_died_is_not_ahead():
    died = efficiency_length({256: 9.0, 1024: 9.0}, {256: 1.0, 1024: math.inf})
    assert (died.length, died.why) == (1024, "one failed")
    assert efficiency_length({256: 1.0, 1024: math.inf}, {256: 9.0, 1024: 9.0}).length is None


def test_costs_take_figures_and_tell_want_of_memory_from_want_of_time():
    rows = [
        {"length": 4, "status": "timeout", "seconds": None, "peak_bytes": None},
        {"length": 1, "status": "ok", "seconds": 0.5, "peak_bytes": 10},
        {"length": 2, "status": "failed", "seconds": None, "peak_bytes": None},
        {"length": 8, "status": "oom_predicted", "seconds": None, "peak_bytes": None},
    ]
    assert costs(rows, "seconds") == {1: 0.5, 4: math.inf, 8: math.inf}
    assert costs(rows, "peak_bytes") == {1: 10.0, 8: math.inf}


def test_the_longest_length_is_interpolated_within_and_predicted_beyond():
    square = {n: 1.0 * n * n for n in LENGTHS}
    within = longest_within(square, 2000.0**2)
    assert (within.length, within.verified, within.predicted) == (pytest.approx(2000, abs=1), 1024, False)
    beyond = longest_within(square, 32768.0**2)
    assert (beyond.length, beyond.verified, beyond.predicted) == (pytest.approx(32768, abs=1), 16384, True)
    assert str(beyond).endswith("(predicted)")
    below = longest_within(square, 128.0**2)
    assert (below.length, below.verified) == (pytest.approx(128, abs=1), None)
    flat = longest_within({256: 100.0, 512: 101.0}, 1010.0)
    assert flat.length == 5120  # in proportion at least: inputs alone need that
    assert longest_within({256: 1.0}, 10.0) is None


# --- a cell in this process ------------------------------------------------------------------------------------------

TINY = {"heads": 2, "head_width": 8, "threads": 1}
QUICK = {"repeats": 1, "budget_s": 0.01}


@pytest.fixture(scope="module")
def rate():
    return matmul_rate(size=256)


@pytest.fixture(autouse=True)
def _the_rate_is_measured_once(monkeypatch, rate):
    """It takes longer than a small cell."""
    monkeypatch.setattr(cell_module, "matmul_rate", lambda **_: rate)


PHASES = ["forward", "forward_backward", "train_step", "prefill", "decode"]


@pytest.mark.parametrize(
    ("backend", "phase"),
    [
        (name, phase)
        for name in zoo.available()
        for phase in PHASES
        if name in RECORDED or phase in ("train_step", "decode")  # which do what the others do, and more
    ],
)
def test_every_backend_is_measured_in_every_phase(backend, phase):
    row = run_cell(SpeedCell(backend, 40, phase=phase, **TINY), **QUICK)
    # what carries no state has nothing to decode with, and says so
    carries = zoo.build(backend, dim=16, heads=2).abilities.carry != "none"
    if phase in ("prefill", "decode") and not carries:
        assert row["status"] == "unsupported"
        return
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["peak_bytes"] > 0
    assert (row["state_bytes"] is not None) == (phase in ("prefill", "decode"))
    tokens = 1 if phase == "decode" else 40
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    if row["flops"] is not None:
        assert row["floor_ratio"] == pytest.approx(row["seconds"] * row["matmul_flops_per_second"] / row["floor_flops"])
        assert row["flops"] <= row["floor_flops"] <= 7 / 6 * row["flops"]


def test_core_cells_are_given_queries_keys_and_values():
    layer, core = (run_cell(SpeedCell("full", 64, variant=kind, **TINY), **QUICK) for kind in ("layer", "core"))
    pairs = 64 * 65 / 2
    assert core["flops"] == 3 * 4 * 8 * 2 * pairs
    assert layer["flops"] == core["flops"] + 3 * 4 * 2 * 64 * 16 * 16
    assert core["peak_bytes"] < layer["peak_bytes"]
    # what a backward of linear memory computes again: the scores
    assert core["floor_flops"] == core["flops"] + 2 * 8 * 2 * pairs


@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("backend", RECORDED)
def test_every_recorded_backend_has_a_core(backend, phase):
    row = run_cell(SpeedCell(backend, 40, variant="core", phase=phase, **TINY), **QUICK)
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["flops"] > 0
    assert row["held_bytes"] >= 2 * 40 * 16 * 4
    carried = run_cell(SpeedCell(backend, 40, variant="core", phase="decode", **TINY), **QUICK)
    assert carried["status"] == "unsupported"
    assert "use variant=layer instead" in carried["error"]


def test_a_core_with_a_memory_has_it_in_front_and_counts_its_pairs():
    cell = SpeedCell("transformer_xl", 12, variant="core", options={"segment_length": 6, "memory_length": 4}, **TINY)
    core = core_of(cell.build(), cell.shape())
    q, k, v, r = (tuple(each.shape) for each in core.operands)
    assert (q, k, v, r) == ((1, 2, 12, 8), (1, 2, 16, 8), (1, 2, 16, 8), (10, 2, 8))
    assert core.seen == 6
    seen = sum(4 + at % 6 + 1 for at in range(12))  # the memory, and the segment up to itself
    assert run_cell(cell, **QUICK)["flops"] == 3 * 4 * 8 * 2 * 1.5 * seen


def test_what_has_no_core_is_refused():
    class Bare(type(zoo.build("full", dim=8, heads=2)).__mro__[2]):
        name = "bare"
        declared = zoo.build("full", dim=8, heads=2).declared

    with pytest.raises(zoo.Unsupported, match=r"bare: variant=core is not supported.*use variant=layer"):
        core_of(Bare(dim=8, heads=2), Shape(1, 4, CPU, torch.float32))


def test_a_trace_is_one_that_browsers_read(tmp_path):
    row = run_cell(SpeedCell("full", 16, **TINY), trace=str(tmp_path), **QUICK)
    assert row["trace"] == str(tmp_path / f"{row['id']}.json")
    events = json.loads(Path(row["trace"]).read_text())["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in events)


def test_memory_that_is_not_observed_is_no_figure(monkeypatch):
    assert run_cell(SpeedCell("full", 16, **TINY), observe=False, **QUICK)["peak_bytes"] is None
    monkeypatch.setattr(cell_module, "LONG_S", 0.0)
    row = run_cell(SpeedCell("full", 16, **TINY), **QUICK)
    assert (row["status"], row["peak_bytes"]) == ("ok", None)
    assert row["peak_method"].startswith("resident set: tensors of a call of over 20 s are not observed")
    assert row["resident_bytes"] is not None
    assert costs([row], "peak_bytes") == {}


def test_a_mistake_is_one_line_in_the_row():
    row = run_cell(SpeedCell("longformer", 16, options={"window": -1}, **TINY), **QUICK)
    assert row["status"] == "failed"
    assert row["error"] == "ValueError: window must be an integer of at least 1, got -1"
    assert row["seconds"] is None
    assert row["peak_bytes"] is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"phase": "backwards"}, "phase must be one of forward, .*got 'backwards'"),
        ({"variant": "half"}, "variant must be one of layer, core"),
        ({"dtype": "int8"}, "dtype must be one of float64"),
    ],
)
def test_a_cell_that_means_nothing_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        SpeedCell(**{"backend": "full", "length": 8, **given})


# --- on an accelerator -----------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.cuda
def test_cuda_memory_is_that_of_the_allocator():
    memory = peak_memory(lambda: torch.empty(2**20, device="cuda"), "cuda")
    assert memory.peak_bytes == 4 * 2**20
    assert memory.reserved_bytes >= memory.peak_bytes
    assert "max_memory_allocated" in memory.method


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("backend", zoo.available())
def test_every_backend_is_measured_on_cuda(backend):
    row = run_cell(SpeedCell(backend, 300, device="cuda", **TINY), **QUICK)
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["reserved_bytes"] > 0
