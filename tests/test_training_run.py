"""Whole runs: they resume to the same bits, end for the stated reason, and every failure is one row with one line."""

from __future__ import annotations

import copy
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.commands.main import main
from attention_zoo.files import read_jsonl
from attention_zoo.tasks.text import Text
from attention_zoo.tracking import JsonlTracker
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.run import run_folder, run_identity, run_training
from attention_zoo.training.saying import report_line

SMALL = [
    "tracker=none", "device=cpu", "trainer.progress=none", "model.dim=16", "model.heads=2", "model.depth=2",
    "model.ff_mult=2", "model.output_dropout=0.1", "seq_len=12", "batch=4", "steps=12", "trainer.checkpoint_every=5",
    "trainer.eval_every=4", "trainer.log_every=2", "task.held_out=null", "task.evaluation_rows=3", "task.span=3",
]  # fmt: skip
BACKENDS = {
    "full": [],
    "transformer_xl": ["attention.segment_length=5", "attention.memory_length=7"],
    "reformer": [],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So little text that a run of twelve steps passes through more than one epoch."""
    folder = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(bytes(draw.choice(b"abcdefgh \n") for _ in range(70 + 20 * index)))
    return folder


@pytest.fixture(scope="module")
def composed(source: Path) -> dict[str, Any]:
    return compose_training([*SMALL, f"task.path={source}"])


@pytest.fixture
def config(composed: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(composed)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return zoo.load(folder / "model.safetensors").state_dict()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("killed_at", [3, 9])
def test_a_run_cut_off_ends_with_the_same_bits(
    name: str, killed_at: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after the first checkpoint (step 5): mid-epoch, with dropout and a carried state."""
    config = compose_training([*SMALL, f"task.path={source}", f"attention={name}", *BACKENDS[name]])
    whole = run_training(config, tmp_path / "whole")
    assert whole["status"] == "ok", whole["error"]
    assert whole["carries_state"] is True

    class Cut(BaseException):
        pass

    from attention_zoo.training.trainer import Trainer

    step = Trainer.step

    def cut(self: Trainer) -> Any:
        if self.done == killed_at:
            raise Cut
        return step(self)

    monkeypatch.setattr(Trainer, "step", cut)
    with pytest.raises(Cut):
        run_training(config, tmp_path / "cut")
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "result.json").exists()
    row = run_training(config, tmp_path / "cut")
    assert row["resumed_at"] == (None if killed_at < 5 else 5)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    for key in ("curve", "quality_curve", "metrics", "loss_by_position", "steps", "id"):
        assert row[key] == whole[key], key

    def lines(folder: str) -> list[dict[str, Any]]:
        rows = read_jsonl(tmp_path / folder / "metrics.jsonl")
        return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]

    assert lines("cut") == lines("whole"), "what was logged after the checkpoint is not logged twice"


def test_a_killed_process_goes_on_to_the_same_bits(config: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL at any moment leaves a sound checkpoint."""
    config = {**config, "steps": 80, "trainer": {**config["trainer"], "eval_every": 80}}
    script = (
        "import json, sys, torch; torch.set_num_threads(1); torch.use_deterministic_algorithms(True)\n"
        "from attention_zoo.training.run import run_training\n"
        "run_training(json.load(open(sys.argv[1])), sys.argv[2])\n"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "config.json"), str(tmp_path / "cut")])
    checkpoint = tmp_path / "cut" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    row = run_training(config, tmp_path / "cut")
    assert row["resumed_at"] % 5 == 0
    whole = run_training(config, tmp_path / "whole")
    assert (row["curve"], row["metrics"]) == (whole["curve"], whole["metrics"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_checkpoint_of_another_run_is_not_taken(config: dict[str, Any], tmp_path: Path) -> None:
    first = run_training(config, tmp_path / "run")
    other = run_training({**config, "seed": 3}, tmp_path / "run")
    assert other["resumed_at"] is None
    assert other["curve"] != first["curve"]
    assert other["curve"] == run_training({**config, "seed": 3}, tmp_path / "alone")["curve"]


def test_a_finished_run_is_skipped_until_forced_or_changed(config: dict[str, Any], tmp_path: Path) -> None:
    first = run_training(config, tmp_path)
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    assert run_training(config, tmp_path) == first
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "result.json").read_text()) == first
    forced = run_training({**config, "force": True}, tmp_path)
    assert (tmp_path / "result.json").stat().st_mtime_ns != stamp
    assert forced["id"] == first["id"]
    assert forced["curve"] == first["curve"]
    changed = run_training({**config, "seed": 1}, tmp_path)
    assert changed["id"] != first["id"]
    assert changed["curve"] != first["curve"]


def test_the_row_has_all_that_a_report_needs(config: dict[str, Any], tmp_path: Path) -> None:
    row = run_training({**config, "task": {**config["task"], "held_out": "attention_zoo"}}, tmp_path)
    assert row["kind"] == "quality"
    assert (row["backend"], row["task"], row["status"], row["error"]) == ("full", "text", "ok", None)
    assert (row["steps"], row["seq_len"], row["batch"], row["seed"]) == (12, 12, 4, 0)
    assert row["curve"][-1][0] == 12
    assert [step for step, _ in row["quality_curve"]] == [4, 8, 12]
    assert set(row["evaluations"]) == {"validation", "test", "held_out"}
    assert row["metrics"] == row["evaluations"]["test"]
    assert row["evaluations"]["validation"]["bits_per_byte"] == row["quality_curve"][-1][1]
    assert row["loss_by_position"][-1][0] < 36
    loaded = zoo.load(tmp_path / "model.safetensors")
    assert row["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert row["step_seconds"] * 12 == pytest.approx(row["train_seconds"])
    assert row["tokens_per_second"] == pytest.approx(12 * 48 / row["train_seconds"])
    assert sum(row["data"][f"{part}_files"] for part in ("train", "validation", "test")) == 6
    assert row["environment"]["torch"] == torch.__version__
    assert row["stopped"] == "steps"
    json.dumps(row, allow_nan=False)
    assert "bits_per_byte" in report_line(row, tmp_path)


def test_rows_that_go_on_beyond_the_models_positions_are_refused_at_once(
    config: dict[str, Any], tmp_path: Path
) -> None:
    short = {**config, "model": {**config["model"], "positions": "learned", "max_length": 20}}
    row = run_training(short, tmp_path / "carried")
    assert "task.span must be such that rows stay within the model's 20 positions, got 3 segments of 12" in row["error"]
    assert row["refused"]
    alone = {**short, "trainer": {**short["trainer"], "carry_state": False}}
    assert run_training(alone, tmp_path / "alone")["status"] == "ok"


def test_mqar_learns_something_and_carries_nothing(tmp_path: Path) -> None:
    overrides = [o for o in SMALL if not o.startswith("task.")]
    row = run_training(compose_training([*overrides, "task=mqar", "seq_len=16", "task.test_examples=20"]), tmp_path)
    assert row["status"] == "ok", row["error"]
    assert row["carries_state"] is False
    assert 0 <= row["metrics"]["accuracy"] <= 1
    assert row["loss_by_position"] == []


def test_early_stops_say_why(config: dict[str, Any], tmp_path: Path) -> None:
    def stopped(name: str, **options: Any) -> dict[str, Any]:
        return run_training({**config, "trainer": {**config["trainer"], **options}}, tmp_path / name)

    reached = stopped("reached", stop_at=100.0)
    assert reached["steps"] == 4
    assert reached["stopped"].startswith("stop_at: bits_per_byte reached ")
    frozen = run_training(
        {
            **config,
            "optimizer": {**config["optimizer"], "lr": 0.0},
            "trainer": {**config["trainer"], "patience": 2, "eval_every": 2},
        },
        tmp_path / "frozen",
    )
    assert frozen["steps"] == 6
    assert frozen["stopped"].startswith("patience: bits_per_byte has not improved on ")
    timed = stopped("timed", max_seconds=1e-9)
    assert timed["steps"] == 1
    assert timed["stopped"] == "time: 1e-09 s were over after step 1 of 12"
    assert timed["status"] == "ok"


@pytest.mark.parametrize("turned", [False, True])
def test_validation_stops_a_run_and_test_judges_it(
    config: dict[str, Any], tmp_path: Path, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever set the task names first."""
    given = Text.evaluation_sets
    if turned:
        monkeypatch.setattr(Text, "evaluation_sets", lambda *args: dict(reversed(given(*args).items())))
    trainer = {**config["trainer"], "eval_every": 6}
    whole = run_training({**config, "trainer": trainer}, tmp_path / "whole")
    watched, judged = (whole["evaluations"][name]["bits_per_byte"] for name in ("validation", "test"))
    assert (whole["quality_curve"][-1][1], whole["metrics"]["bits_per_byte"]) == (watched, judged)
    assert watched != judged
    between = (watched + judged) / 2  # only one of both gets there
    first = min(value for _, value in whole["quality_curve"])
    row = run_training({**config, "trainer": {**trainer, "stop_at": between}}, tmp_path / "stopped")
    assert row["stopped"].startswith("stop_at: ") == (first <= between)
    assert row["metrics"] == row["evaluations"]["test"]


def test_a_task_with_test_alone_stops_at_nothing_of_it(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Text.evaluation_sets
    monkeypatch.setattr(Text, "evaluation_sets", lambda *args: {"test": given(*args)["test"]})
    assert run_training(config, tmp_path / "whole")["status"] == "ok"
    for option, value in (("stop_at", 3.0), ("patience", 2)):
        row = run_training({**config, "trainer": {**config["trainer"], option: value}}, tmp_path / option)
        assert row["status"] == "failed"
        said = f"trainer.{option} must be null where a task has no validation set to watch, got {value} for text"
        assert said in row["error"]


def test_nan_is_a_failed_row_with_one_line(config: dict[str, Any], tmp_path: Path) -> None:
    config = {**config, "optimizer": {**config["optimizer"], "lr": 1e30}}
    row = run_training(config, tmp_path)
    assert row["status"] == "failed"
    assert "stopped; try a smaller optimizer.lr" in row["error"]
    assert "\n" not in row["error"]
    assert "Traceback" in (tmp_path / "error.txt").read_text()
    assert json.loads((tmp_path / "result.json").read_text()) == row
    assert report_line(row, tmp_path).startswith("full text: failed: ")


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (
            {"batch": 6, "trainer": {"accumulate": 4}},
            "failed",
            "trainer.accumulate must divide batch, got accumulate=4",
        ),
        ({"model": {"heads": 3}}, "failed", "model.heads must divide model.dim, got heads=3 for dim=16"),
        ({"steps": 0}, "failed", "steps must be an integer of at least 1, got 0"),
        ({"seq_len": "abc"}, "failed", "seq_len: Value 'abc' of type 'str' could not be converted to Integer"),
        ({"sequence_length": 3}, "failed", "sequence_length is no option of a training run"),
        ({"trainer": {"patiense": 3}}, "failed", "trainer.patiense is no known option; did you mean patience?"),
        ({"trainer": {"clip": -1.0}}, "failed", "trainer.clip must be a positive number or null, got -1.0"),
        ({"trainer": {"precision": "float16"}}, "failed", "precision=float16 needs a CUDA device"),
        ({"device": "cuda"}, "failed", "device=cuda needs a CUDA device"),
        ({"task": {"path": "/nowhere"}}, "failed", "task.path must be an existing file or folder, got '/nowhere'"),
        ({"attention": "longfromer"}, "failed", "got 'longfromer'; did you mean longformer?"),
        ({"attention": None}, "failed", "attention must be one mechanism; for a stack of several use 'hybrid="),
        ({"hybrid": ["full", "full", "full"]}, "failed", "depth must be at least the number of mechanisms listed, 3"),
        ({"model": {"positions": "alibi"}, "attention": "reformer"}, "unsupported", "reformer: positions=alibi is not"),
        ({"optimizer": {"lr": -1}}, "failed", "optimizer.lr must be a number of at least 0, got -1"),
    ],
)
def test_every_mistake_is_one_line(
    config: dict[str, Any], tmp_path: Path, change: dict[str, Any], status: str, message: str
) -> None:
    if "device" in change and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    merged = {
        key: {**config[key], **value} if isinstance(value, dict) and isinstance(config.get(key), dict) else value
        for key, value in change.items()
    }
    row = run_training({**config, **merged}, tmp_path)
    assert row["status"] == status
    assert message in row["error"]
    assert "\n" not in row["error"]
    assert json.loads((tmp_path / "result.json").read_text())["error"] == row["error"]


def test_running_out_of_memory_is_a_result(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attention_zoo.training.trainer import Trainer

    def refuse(self: Trainer) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Trainer, "step", refuse)
    row = run_training(config, tmp_path)
    assert row["status"] == "oom"
    assert "\n" not in row["error"]
    monkeypatch.undo()
    assert run_training(config, tmp_path)["status"] == "oom", "another try would only repeat it"


def test_a_damaged_checkpoint_fails_until_forced(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    row = run_training(config, tmp_path)
    assert row["status"] == "failed"
    assert row["error"].endswith("is no attention_zoo checkpoint; use force=true to start afresh")
    assert run_training({**config, "force": True}, tmp_path)["status"] == "ok"
    assert not (tmp_path / "error.txt").exists()


def test_a_hybrid_stack_and_a_model_without_state(config: dict[str, Any], tmp_path: Path) -> None:
    hybrid = {**config, "hybrid": [{"name": "longformer", "window": 3}, "full"], "backend": None}
    row = run_training(hybrid, tmp_path / "hybrid")
    assert (row["status"], row["backend"]) == ("ok", "longformer+full")
    stack = zoo.load(tmp_path / "hybrid" / "model.safetensors").stack
    assert [layer.name for layer in stack.attentions] == ["longformer", "full"]
    fresh = run_training({**config, "trainer": {**config["trainer"], "carry_state": False}}, tmp_path / "fresh")
    assert fresh["carries_state"] is False
    assert fresh["metrics"] != row["metrics"]


def test_the_folder_is_a_function_of_config_and_code(config: dict[str, Any]) -> None:
    assert run_folder(config) == run_folder(copy.deepcopy(config))
    assert run_folder(config).name == f"text-full-{run_identity(check(config))}"
    assert run_folder({**config, "seed": 7}) != run_folder(config)
    assert run_folder({**config, "force": True}) == run_folder(config)
    assert run_folder({**config, "output": "/elsewhere"}).name == run_folder(config).name


def test_composing_from_python() -> None:
    config = compose_training(["attention=longformer", "task=mqar", "attention.window=7"])
    assert (config["backend"], config["attention"]["window"], config["seq_len"]) == ("longformer", 7, 64)
    assert compose_training(["task=mqar_zoology"])["task"]["vocab"] == 8192
    for overrides, message in (
        (["attention=longfromer"], "attention must be one of .*full.*, got 'longfromer'; did you mean longformer?"),
        (["seq_len=abc"], r"seq_len: Value 'abc' .* could not be converted to Integer \(from seq_len=abc\)"),
        (["sq_len=3"], "sq_len is no known option; did you mean seq_len?"),
        (["foo"], "Error parsing override 'foo'"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            compose_training(overrides)
        assert "\n" not in str(raised.value)


def test_metrics_are_rewound(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 6}\n{"st')
    JsonlTracker.rewind(tmp_path, 5)
    assert [row["step"] for row in read_jsonl(path)] == [1, 5]


def test_the_command_line_sweeps_and_goes_on_after_a_failure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["attention=full,longformer", "model.heads=3,2", "steps=2"]
    code = main(["train", "-m", f"output={tmp_path}", f"task.path={source}", *SMALL, *words])
    assert code == 2, "some run was refused"
    rows = [json.loads(path.read_text()) for path in tmp_path.glob("text-*/result.json")]
    found = sorted((row["backend"], row["config"]["model"]["heads"], row["status"]) for row in rows)
    assert found == [
        ("full", 2, "ok"),
        ("full", 3, "failed"),
        ("longformer", 2, "ok"),
        ("longformer", 3, "failed"),
    ]
    told = capsys.readouterr().err
    assert told.count("model.heads must divide model.dim, got heads=3 for dim=16") == 2
    assert "Traceback" not in told


def test_the_command_line_tells_a_misspelt_name_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "attention=longfromer"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: attention must be one of ")
    assert told.endswith("got 'longfromer'; did you mean longformer?\n")
    assert told.count("\n") == 1


@pytest.mark.parametrize(("span", "carried"), [(1, False), (2, True)])
def test_rows_of_one_segment_carry_nothing(span: int, carried: bool, source: Path, tmp_path: Path) -> None:
    """Each of them begins anew, so that a state would be made for nobody; the numbers are the same."""
    words = [
        *SMALL,
        f"task.path={source}",
        "attention=transformer_xl",
        *BACKENDS["transformer_xl"],
        f"task.span={span}",
    ]
    row = run_training(compose_training([*words, "model.output_dropout=0"]), tmp_path / "some")
    assert row["status"] == "ok", row["error"]
    assert row["carries_state"] == carried
    never = run_training(
        compose_training([*words, "model.output_dropout=0", "trainer.carry_state=false"]), tmp_path / "none"
    )
    assert (never["metrics"] == row["metrics"]) == (not carried)
