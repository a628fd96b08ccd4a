"""The main job end to end: every backend in, one report out, nothing done twice, failures recorded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import attention_zoo as zoo
from attention_zoo.files import read_jsonl, write_json
from attention_zoo.jobs import trainings
from attention_zoo.jobs.compare import CompareConfig, TrainingPlan, register
from attention_zoo.jobs.refused import refused
from attention_zoo.jobs.trainings import Run, finished, run_trainings
from attention_zoo.measure.nursery import Nursery
from attention_zoo.statistics import preset_seeds
from attention_zoo.training.possible import impossible
from attention_zoo.training.run import run_identity


def composed(*overrides: str) -> CompareConfig:
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        found = compose("compare", ["output=unused", *overrides])
    return OmegaConf.to_object(found)  # type: ignore[return-value]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True, text=True, timeout=580, cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )  # fmt: skip


@pytest.mark.slow
def test_smoke_preset_from_start_to_report_and_the_second_call_only_draws(tmp_path):
    asked = ["experiments.compare", "preset=smoke", "backends=[full,transformer_xl]", f"output={tmp_path}"]
    first = command(*asked)
    assert first.returncode == 0, first.stderr[-2000:]
    rows = list(read_jsonl(tmp_path / "results.jsonl"))
    kinds = [(row["kind"], row["backend"], row["status"]) for row in rows]
    assert all(status == "ok" for *_, status in kinds), [row["error"] for row in rows]
    assert kinds.count(("speed", "full", "ok")) == 4, "two kernels, two lengths"
    assert kinds.count(("speed", "transformer_xl", "ok")) == 2
    assert kinds.count(("quality", "transformer_xl", "ok")) == 2
    assert kinds.count(("portrait", "full", "ok")) == 1
    recall = next(row for row in rows if row.get("task") == "mqar" and row["backend"] == "transformer_xl")
    assert recall["config"]["attention"]["segment_length"] == 8, "recall is trained at the small options"
    page = (tmp_path / "report.html").read_text()
    assert "undertrained, no verdict" in page
    assert "no verdict: one seed shows no difference" in page
    assert (tmp_path / "results.csv").read_text().count("\n") == len(rows) + 1
    assert str(tmp_path / "report.html") in first.stdout
    assert "transformer_xl" in first.stdout

    for path in [*tmp_path.glob("cells/*.json"), *tmp_path.glob("training/*/result.json")]:
        os.utime(path, (0, 0))
    second = command(*asked)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "10 of 10 results were finished before and are drawn only" in second.stdout
    assert all(path.stat().st_mtime == 0 for path in tmp_path.glob("cells/*.json"))
    assert all(path.stat().st_mtime == 0 for path in tmp_path.glob("training/*/result.json"))
    assert list(read_jsonl(tmp_path / "results.jsonl")) == rows

    (tmp_path / "report.html").unlink()
    third = command("experiments.report", f"results=[{tmp_path / 'results.jsonl'}]")
    assert third.returncode == 0, third.stderr[-2000:]
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.slow
def test_a_picture_that_fails_alone_is_one_line_and_an_exit_code(tmp_path):
    asked = ["preset=smoke", "backends=[longformer]", "measure.lengths=[16]", "~trainings.text", "~trainings.mqar"]
    done = command("experiments.compare", *asked, "small={longformer: {window: -1}}", f"output={tmp_path}")
    assert done.returncode == 1
    assert done.stderr == "error: 1 of 1 pictures failed\n"
    said = "! longformer, attention picture: failed: ValueError: window must be an integer of at least 1, got -1"
    assert said in done.stdout.splitlines()
    assert {row["status"] for row in read_jsonl(tmp_path / "results.jsonl") if row["kind"] == "speed"} == {"ok"}


def tiny_run(name: str, steps: int = 2, **attention: object) -> Run:
    small = {"model": {"dim": 16}, "task": {"test_examples": 16}, "batch": 4, "device": "cpu", "threads": 1}
    plan = TrainingPlan("mqar", set={**small, "steps": steps}, options={"longformer": attention})
    (run,) = CompareConfig(backends=["longformer"], trainings={"mqar": plan}).runs()
    return Run(name, run.config)


@pytest.mark.slow
def test_a_training_that_fails_or_dies_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    bad = tiny_run("bad")
    bad.config["attention"]["window"] = -1  # a comparison refuses it itself, before any training
    runs = [bad, tiny_run("killed", steps=100_000), tiny_run("good", window=4)]
    children: dict[str, trainings._Child] = {}
    start = trainings._start
    monkeypatch.setattr(trainings, "_start", lambda run, *at: children.setdefault(run.name, start(run, *at)))
    seen = []

    def watch(event):
        seen.append((event.kind, event.run.name if event.run else None))
        if "killed" in children and (tmp_path / "killed" / "metrics.jsonl").exists():
            children["killed"].process.kill()

    bad, killed, good = run_trainings(runs, tmp_path, parallel=3, on_event=watch)
    assert (bad["status"], killed["status"], good["status"]) == ("failed", "lost", "ok")
    assert "window must be" in bad["error"]
    assert killed["error"] == "ended from outside by SIGKILL; the next call does it again"
    assert {row["task"] for row in (bad, killed, good)} == {"mqar"}
    assert good["config"]["attention"]["window"] == 4
    assert ("finished", "good") in seen

    children.clear()
    seen.clear()
    assert run_trainings(runs[2:], tmp_path, on_event=watch) == [good]
    assert seen == [("skipped", "good")]
    assert not children, "no process was started again"


def test_only_a_row_of_the_same_config_code_and_data_counts_as_finished(tmp_path):
    run = tiny_run("one")
    row = {
        "kind": "quality", "id": run_identity(run.config), "backend": "longformer", "status": "ok", "error": None,
        "config": run.config, "metrics": {"loss": 1.0}, "steps": 2, "train_seconds": 1.0, "data": None,
    }  # fmt: skip
    assert finished(run.config, tmp_path) is None, "nothing there"
    write_json(tmp_path / "result.json", row)
    assert finished(run.config, tmp_path) is None, "other data"
    from attention_zoo.training.building import build

    row["data"] = json.loads(json.dumps(build(run.config["task"]).describe(run.config["seq_len"])))
    write_json(tmp_path / "result.json", row)
    assert finished(run.config, tmp_path) is None, "no model"
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    row["model_sha256"] = hashlib.sha256(b"weights").hexdigest()
    write_json(tmp_path / "result.json", row)
    assert finished(run.config, tmp_path) == row
    assert finished({**run.config, "seed": 1}, tmp_path) is None, "another seed"
    assert finished({**run.config, "force": True}, tmp_path) is None
    for status in ("failed", "oom", "timeout", "unsupported"):
        ended = {**row, "status": status, "error": "why"}
        write_json(tmp_path / "result.json", ended)
        assert finished(run.config, tmp_path) == ended, status
        again = finished(run.config, tmp_path, retry="failed")
        assert (again is None) == (status != "unsupported"), status
    write_json(tmp_path / "result.json", {**row, "status": "lost", "error": "killed"})
    assert finished(run.config, tmp_path) is None, "what was killed from outside goes on by itself"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON: it is empty"), ("[1]", "must hold a JSON object"),
        ("{}", "is no row of a training: kind must be quality"),
        ('{"kind": "quality", "backend": "x", "status": 1}', "lacks config, id; status: must be"),
        ('{"kind": "quality", "backend": "x", "status": "ok"}', "lacks config, id"),
        ('{"kind": "quality", "backend": "x", "status": "ok", "id": "", "config": {}, "metrics": [1]}', "id: "),
        ('{"kind": "quality", "backend": "x", "status": "ok", "id": "1", "config": {}, "metrics": [1]}', "metrics: "),
        ('{"kind": "quality", "backend": "x", "status": "ok", "id": "1", "config": {}, "metrics": {}}', "lacks steps"),
    ],
)  # fmt: skip
def test_a_damaged_result_is_named_and_trained_again(tmp_path, content, said):
    (tmp_path / "result.json").write_text(content)
    told = []
    assert finished(tiny_run("one").config, tmp_path, on_bad=told.append) is None
    (line,) = told
    assert str(tmp_path / "result.json") in line
    assert said in line
    assert line.endswith("trained again")


@pytest.mark.parametrize("name", ["../esc", "/absolute", "a/b", "nul\0", "\ud800", "x" * 300, ".hidden"])
def test_a_training_stays_in_its_folder_whatever_its_name(tmp_path, name):
    place = tiny_run(name).within(tmp_path / "training")
    assert place.parent == tmp_path / "training"
    place.mkdir(parents=True)
    assert place != tiny_run(f"{name}-").within(tmp_path / "training")


@pytest.mark.parametrize("preset", ["default", "smoke", "gpu"])
def test_presets_cover_every_backend_both_baselines_and_both_tasks(preset):
    # a device that is not there is refused at once, and the presets shall be tested without one
    here = ["measure.device=cpu", *(f"trainings.{task}.set.device=cpu" for task in ("text", "mqar") if preset == "gpu")]
    config = composed(f"preset={preset}", *here)
    assert config.names() == ["full", "longformer", "bigbird", "reformer", "transformer_xl"]
    assert composed(f"preset={preset}", *here, "backends=null").names() == list(zoo.available())
    runs = config.runs()
    assert {(r.config["task"]["_target_"].rpartition(".")[2], r.config["backend"]) for r in runs} == {
        (task, name) for task in ("Text", "Mqar") for name in config.names()
    }
    assert len({run.name for run in runs}) == len(runs)
    config.measure.backends = config.measured()
    cells = config.measure.cells()
    assert {cell.kernel for cell in cells if cell.backend == "full"} == {"dense", "sdpa"}
    assert {cell.backend for cell in cells} == set(config.names())


def test_choice_of_every_family_is_choice_with_more_backends_and_seeds():
    five, every = composed("preset=choice"), composed("preset=choice_all")
    assert set(five.names()) < set(every.names())
    assert set(every.names()) == set(composed("preset=families").names())
    assert (
        len(every.seeds)
        == preset_seeds(len(every.names()) - 1)
        > len(five.seeds)
        == preset_seeds(len(five.names()) - 1)
    )
    wider = {run.name: run.config for run in composed("preset=choice_all", "seeds=[3]").runs()}
    fewer = composed("preset=choice", "seeds=[3]").runs()
    assert all(wider[run.name] == run.config for run in fewer), "the same trainings, which either may have run"
    for backend in set(every.names()) - set(five.names()) - {"hourglass", "longformer_sinks", "memory_compressed"}:
        assert every.measure.options[backend], "at stated options, as the others"


def test_a_preset_of_many_backends_goes_with_few_of_them():
    config = composed("preset=choice", "backends=[full,reformer]")
    assert {run.config["backend"] for run in config.runs()} == {"full", "reformer"}
    config.measure.backends = config.measured()
    assert {cell.backend for cell in config.measure.cells()} == {"full", "reformer"}


def test_the_default_preset_measures_and_trains_what_it_says():
    config = composed()
    config.measure.backends = config.measured()
    cells = config.measure.cells()
    longest = {(c.backend, c.kernel): max(d.length for d in cells if d.backend == c.backend) for c in cells}
    assert longest["full", "dense"] == longest["full", "sdpa"] == 4096
    assert {length for (backend, _), length in longest.items() if backend != "full"} == {16384}
    assert {(c.heads, c.head_width, c.batch, c.dtype, c.phase, c.variant, c.causal) for c in cells} == {
        (8, 64, 1, "float32", "forward_backward", "layer", True)
    }
    assert sum(plan.seconds for plan in config.trainings.values()) <= 300
    for run in config.runs():
        assert run.config["threads"] == 1
        assert run.config["trainer"]["max_seconds"] is None, "steps are equal: a limit would cut the slower ones short"
        if "mqar" in run.name:
            assert run.config["model"]["short_conv"] == 3
            assert run.config["seq_len"] == 64


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["backends=[longfromer]"], "did you mean longformer"),
        (["+trainings.text.options.longformer.windw=3"], "options of longformer must be among"),
        (["trainings.text.set.steps=abc"], "steps: Value 'abc'"),
        (["+trainings.text.set.task.pth=a"], "trainings.text.set: task.pth is no known option"),
        (["trainings.text.task=texts"], "task must be one of .*text.*, got 'texts'"),
        (["backends=[../up]"], "backends must be one of adaptive_span, bigbird"),
        (
            ["+trainings.text.options.longformr.window=3"],
            "a key of trainings.text.options must be one of",
        ),
        (["+small.longformr.window=3"], "a key of small must be one of adaptive_span"),
        (["+trainings.text.options.full=3"], "trainings.text.options.full must be a mapping, got 3"),
        (["parallel=0"], "parallel must be an integer of at least 1, got 0"),
        (["+variants.wide.backend=longfromer"], "variants.wide.backend must be one of .* did you mean longformer"),
        (["+variants.full.backend=longformer"], "variants must have names of their own, got full"),
        (["+variants.wide={backend: longformer, window: 3}"], "variants.wide: .*window"),
        (["+variants.wide=3"], "variants.wide must be a mapping"),
        (
            ["+variants.w={backend: full, set: {model: {dpth: 3}}}", "backends=[w]"],
            "variants.w.set: model.dpth is no known option",
        ),
        (["+variants.w={backend: full, options: {window: 3}}", "backends=[w]"], "options of full must be among"),
    ],
)
def test_wrong_input_is_one_clear_line_before_anything_runs(overrides, said):
    with pytest.raises(ValueError, match=said) as caught:
        composed("preset=smoke", *overrides).runs()
    assert "\n" not in str(caught.value)


def test_a_variant_is_trained_under_its_name_with_options_and_a_model_of_its_own():
    wide = "{backend: longformer, options: {window: 5}, set: {model: {depth: 3}}}"
    config = composed(
        "preset=smoke", f"+variants.wide={wide}", "backends=[longformer,wide]",
        "+trainings.mqar.options.wide.dilation=2", "trainings.mqar.options.longformer={window: 3}",
    )  # fmt: skip
    assert config.measured() == ["longformer"]
    plain, made = (run.config for run in config.runs() if "mqar" in run.name)
    assert (plain["backend"], made["backend"]) == ("longformer", "wide")
    assert (plain["attention"]["window"], made["attention"]["window"]) == (3, 5)
    assert made["attention"]["name"] == "longformer"
    assert made["attention"]["dilation"] == 2
    assert (plain["model"]["depth"], made["model"]["depth"]) == (2, 3)


def test_what_cannot_be_trained_is_found_before_anything_is_timed():
    small = {"device": "cpu", "threads": 1, "model": {"dim": 16}, "task": {"test_examples": 16}}
    flagged = {**small, "task": {"global_quote": True, "background": "random"}}
    plans = {
        "pair": TrainingPlan("marked", set=small),
        "flags": TrainingPlan("quote", set=flagged),
        "recall": TrainingPlan("mqar", set=small),
    }
    config = CompareConfig(backends=["full", "reformer", "transformer_xl"], trainings=plans)
    found = impossible({run.name: run.config for run in config.runs()})
    assert set(found) == {"pair-transformer_xl-s0", "flags-transformer_xl-s0", "flags-reformer-s0"}
    assert found["pair-transformer_xl-s0"].startswith("transformer_xl: causal=False is not supported")
    assert "global" in found["flags-reformer-s0"]


def test_runs_with_a_result_are_not_asked_whether_they_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(Nursery, "call", lambda self, function, given, timeout_s: dict.fromkeys(given["configs"], "no"))
    one, other = tiny_run("one"), tiny_run("other")
    (tmp_path / "one").mkdir()
    write_json(tmp_path / "one" / "result.json", {})
    assert refused([one, other], tmp_path) == {"other": "no"}
    assert refused([one], tmp_path) == {}


def test_a_misspelt_key_is_refused():
    with pytest.raises(Exception, match="lenghts"):
        composed("measure.lenghts=[1]")
