"""What happens to a run from outside: asked to stop, wanted by two, damaged, out of space. Nothing is lost by it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo import files, stopping
from attention_zoo.files import read_jsonl
from attention_zoo.locks import owning
from attention_zoo.tracking import RunInfo, Tracker
from attention_zoo.training.checkpoint import HEADER, load_checkpoint
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.run import run_folder, run_identity, run_training
from attention_zoo.training.trainer import Trainer

SMALL = [
    "tracker=none", "device=cpu", "trainer.progress=none", "model.dim=16", "model.heads=2", "model.depth=1",
    "model.ff_mult=2", "model.output_dropout=0.1", "seq_len=12", "batch=4", "steps=12", "trainer.checkpoint_every=5",
    "trainer.eval_every=4", "trainer.log_every=2", "task.held_out=attention_zoo", "task.evaluation_rows=2",
    "task.span=2", "task.held_out_bytes=20000",
]  # fmt: skip
TIMES = (
    "train_seconds", "wall_seconds", "scoring_seconds", "step_seconds", "tokens_per_second",
    "evaluation_tokens_per_second", "resumed_at", "peak_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(bytes(draw.choice(b"abcdefgh \n") for _ in range(70 + 20 * index)))
    return compose_training([*SMALL, f"task.path={folder}"])


def changed(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**config, "trainer": {**config["trainer"], **options}}


def left_by(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """Row, logged figures and weights, but for times."""
    row = json.loads((folder / "result.json").read_text())
    lines = [
        {name: value for name, value in line.items() if "per_second" not in name}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]
    return {k: v for k, v in row.items() if k not in TIMES}, lines, (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("reason", ["stop_at", "patience", "time", "steps"])
@pytest.mark.parametrize("written", [False, True], ids=["before its model", "before its result"])
def test_a_run_that_had_ended_is_only_evaluated(
    reason: str, written: bool, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its last checkpoint and its result."""
    options = {"stop_at": {"stop_at": 100.0}, "patience": {"patience": 1}, "time": {"max_seconds": 1e-9}}
    config = changed(config, **options.get(reason, {}))
    if reason == "patience":
        config["optimizer"] = {**config["optimizer"], "lr": 0.0}
    whole = run_training(config, tmp_path / "whole")
    assert whole["stopped"].startswith(reason)
    expected = left_by(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    if not written:
        (tmp_path / "cut" / "model.safetensors").unlink()
        lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[:-1]))
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("trains on"))
    row = run_training(config, tmp_path / "cut")
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["resumed_at"] == whole["steps"]
    assert left_by(tmp_path / "cut") == expected


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "at"), [("SIGTERM", 6), ("SIGUSR1", 3), ("SIGHUP", 11), ("SIGINT", 7)])
def test_who_is_asked_to_stop_finishes_the_step_and_saves(
    name: str, at: int, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """In the step before an evaluation (3, 7, 11), which is put off, and elsewhere."""
    run_training(config, tmp_path / "whole")
    step = Trainer.step

    def asked(self: Trainer) -> Any:
        if self.done == at:
            os.kill(os.getpid(), getattr(signal, name))
        return step(self)

    monkeypatch.setattr(Trainer, "step", asked)
    with pytest.raises(stopping.Stopped) as raised:
        run_training(config, tmp_path / "cut")
    monkeypatch.undo()
    assert raised.value.signal == getattr(signal, name)
    content = load_checkpoint(tmp_path / "cut" / "checkpoint.pt", run_identity(check(config)))
    assert content["trainer"]["step"] == at + 1
    assert content["history"]["settled"] == (at if (at + 1) % 4 == 0 else at + 1)
    assert not (tmp_path / "cut" / "result.json").exists()
    assert run_training(config, tmp_path / "cut")["resumed_at"] == at + 1
    assert left_by(tmp_path / "cut") == left_by(tmp_path / "whole")


def test_a_second_signal_ends_it_at_once(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    def twice(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("goes on")

    monkeypatch.setattr(Trainer, "step", twice)
    with pytest.raises(stopping.Stopped):
        run_training(config, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_one_process_works_in_a_folder(config: dict[str, Any], tmp_path: Path) -> None:
    done = run_training(config, tmp_path)
    kept = (tmp_path / "result.json").read_bytes()
    with owning(tmp_path):
        row = run_training({**config, "force": True}, tmp_path)
    assert row["status"] == "failed"
    assert f"process {os.getpid()} on " in row["error"]
    assert f"works in {tmp_path} since " in row["error"]
    assert (tmp_path / "result.json").read_bytes() == kept
    assert run_training(config, tmp_path) == done


def test_figures_stand_until_the_run_can_be_had_again(config: dict[str, Any], tmp_path: Path) -> None:
    """Model gone and checkpoint damaged: what to do is said, and the row of the finished run is not replaced."""
    whole = run_training(config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("checkpoint.pt", "checkpoint.before.pt"):
        (tmp_path / name).write_bytes(b"damaged")
    told = run_training(config, tmp_path)
    assert told["status"] == "failed"
    assert "force=true" in told["error"]
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == whole["metrics"]
    again = run_training({**config, "force": True}, tmp_path)
    assert (again["metrics"], again["model_sha256"]) == (whole["metrics"], whole["model_sha256"])


def test_settings_of_a_run_do_not_outlive_it(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**config, "steps": 2}
    alone = run_identity(check(config))
    step = Trainer.step

    def meddling(self: Trainer) -> Any:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("high")
        torch.set_default_dtype(torch.float64)
        try:
            return step(self)
        finally:
            torch.set_default_dtype(torch.float32 if self.done < 2 else torch.float64)

    monkeypatch.setattr(Trainer, "step", meddling)
    before = (torch.random.get_rng_state(), random.getstate())
    run_training({**config, "threads": 2}, tmp_path / "two")
    monkeypatch.undo()
    assert torch.get_num_threads() == 1
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    row = run_training(config, tmp_path / "null")
    assert (row["id"], row["environment"]["threads"]) == (alone, 1)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "folder"])
def test_a_finished_run_has_its_model(
    damage: str, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = run_training(config, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    assert row["model_sha256"] == hashlib.sha256(whole).hexdigest()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "flipped":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    elif damage == "folder":
        path.mkdir()
    again = run_training(config, tmp_path)
    if damage == "folder":
        assert again["error"].startswith(f"{path} is a folder, where a run keeps a file; move it away, or use force")
        again = run_training({**config, "force": True}, tmp_path)
        assert again["resumed_at"] is None
    else:
        assert again["resumed_at"] == 12
        assert f"{path} is " in capsys.readouterr().err
        assert len(again["notices"]) == 1
    assert again["status"] == "ok"
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "gone"])
def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(
    damage: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 11, after checkpoints at 5 and 10, and again at 7. What had been logged since is unsaid."""
    run_training(config, tmp_path / "whole")
    step, folder, at = Trainer.step, tmp_path / "cut", [11]

    def killed(self: Trainer) -> Any:
        if self.done in at:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, folder)
    path, body = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes()
    path.write_bytes({
        "empty": b"", "cut": body[: len(body) // 2], "flipped": body[:-9] + b"?" + body[-8:], "foreign": b"PK\x03\x04",
        "gone": body,
    }[damage])  # fmt: skip
    if damage == "gone":
        path.unlink()
    at[:] = [7]
    with pytest.raises(KeyboardInterrupt):  # once more, before it can write another
        run_training(config, folder)
    monkeypatch.undo()
    row = run_training(config, folder)
    assert row["resumed_at"] == 5
    assert left_by(folder)[1:] == left_by(tmp_path / "whole")[1:]


def test_a_torn_checkpoint_is_told_in_one_line(config: dict[str, Any], tmp_path: Path) -> None:
    whole = run_training(config, tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    row = run_training(config, tmp_path)
    assert row["notices"] == [
        f"{tmp_path}/checkpoint.pt is no attention_zoo checkpoint; checkpoint.before.pt, the one before, "
        "is taken: goes on after step 10"
    ]
    assert (row["model_sha256"], row["metrics"]) == (whole["model_sha256"], whole["metrics"])


FOREIGN = {
    "empty": b"", "bytes": b"\xff\xfe\x00", "list": b"[1, 2]", "deep": b"[" * 100_000, "half": b'{"id": "a',
    "object": b'{"step": "x", "id": [1]}', "nan": b'{"step": NaN}\n{"step": 1e999}\n',
}  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_a_damaged_record_is_told_and_run_again(
    name: str, content: str, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**config, "steps": 2}
    (tmp_path / name).write_bytes(FOREIGN[content])
    row = run_training(config, tmp_path)
    assert (row["status"], row["error"]) == ("ok", None)
    if not (name == "metrics.jsonl" and content in ("empty", "bytes", "list", "deep", "half")) and content != "object":
        # a last line without an end is what a crash leaves, and no news
        assert f"{tmp_path / name}" in capsys.readouterr().err
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [2, 2, 2, 2]
    assert run_training(config, tmp_path) == row, "the new record stands"


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "checkpoint.pt"])
def test_a_folder_in_place_of_a_file(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    config = {**config, "steps": 2}
    (tmp_path / name / "inside").mkdir(parents=True)
    row = run_training(config, tmp_path)
    assert row["status"] == "failed"
    assert f"{tmp_path / name} is a folder, where a run keeps a file; move it away, or use force=true" in row["error"]
    forced = run_training({**config, "force": True}, tmp_path)
    assert forced["status"] == "ok"
    assert forced["notices"] == [f"{tmp_path / name} was a folder: it is {name}.aside-1 now"]
    assert (tmp_path / f"{name}.aside-1" / "inside").is_dir(), "what is not ours is not deleted"


class Strange:
    """Something that a safe reader refuses."""


def test_a_sealed_checkpoint_with_a_foreign_body(config: dict[str, Any], tmp_path: Path) -> None:
    config = {**config, "steps": 2}
    run_training(config, tmp_path)
    path = tmp_path / "checkpoint.pt"
    own = load_checkpoint(path, run_identity(check(config)))

    def body(content: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    bodies = [b"", b"PK\x03\x04", b"\x80\x02.", body(Strange()), body([1]), body({}), body({"identity": 3})]
    bodies += [body({**own, name: value}) for name in ("trainer", "history", "random") for value in (None, [1], {})]
    bodies += [body({**own, "lines": "many"}), body({**own, "history": {**own["history"], "more": 1}})]
    weights = dict(own["trainer"]["model"])
    name = next(name for name, tensor in weights.items() if tensor.dim() == 2)
    weights[name] = weights[name].clone().index_fill_(0, torch.tensor([1]), float("nan"))
    bodies.append(body({**own, "trainer": {**own["trainer"], "model": weights}}))
    for content in bodies:
        path.write_bytes(HEADER + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        (tmp_path / "result.json").unlink(missing_ok=True)
        row = run_training(config, tmp_path)
        assert row["status"] == "failed", content[:80]
        assert row["error"].startswith(str(path))
        assert row["error"].endswith("use force=true to start afresh")
        assert "weights_only" not in row["error"]
    assert f"{path}: {name} holds NaN or infinity" in row["error"]
    path.unlink()
    assert run_training(config, tmp_path)["status"] == "ok", "what was wrong with the folder is no result of the run"


def test_a_full_disk_is_one_line_and_older_files_stay(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_training(config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    (tmp_path / "checkpoint.pt").unlink()
    write = os.fdopen

    def full(handle: int, *given: Any, **named: Any) -> Any:
        if os.readlink(f"/proc/self/fd/{handle}").startswith(f"{tmp_path}/.") and failing():
            os.close(handle)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, *given, **named)

    def failing() -> bool:
        return True

    config = {**config, "seed": 1}
    monkeypatch.setattr(files.os, "fdopen", full)
    row = run_training(config, tmp_path)
    assert row["status"] == "failed"
    assert row["error"].startswith(f"{tmp_path}")
    assert "No space left on device" in row["error"]
    assert "\n" not in row["error"]
    for name in ("result.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == before[name]
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*.????????"))
    again = run_training(config, tmp_path)
    assert again["status"] == "ok"
    assert again["id"] != first["id"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True).returncode:
        pytest.skip("only root may mount one; the test before patches the writes instead")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("left", [0, 40_000], ids=["nothing", "less than a checkpoint"])
def test_a_disk_that_is_full_and_then_is_not(
    left: int, config: dict[str, Any], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(config, tmp_path / "whole")
    step, folder = Trainer.step, small_disk / "run"

    def killed(self: Trainer) -> Any:
        if self.done == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, folder)
    monkeypatch.undo()
    before = (folder / "checkpoint.pt").read_bytes()
    assert len(before) > left
    with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert shutil.disk_usage(small_disk).free == 0
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - left)
    row = run_training(config, folder)
    assert (row["status"], row["final"]) == ("failed", False)
    assert row["error"].startswith(f"{folder}/")
    assert row["error"].endswith(": No space left on device")
    assert (folder / "checkpoint.pt").read_bytes() == before
    (small_disk / "filler").unlink()
    assert run_training(config, folder)["resumed_at"] == 5
    assert left_by(folder) == left_by(tmp_path / "whole")


def test_an_output_that_is_a_file_is_one_line(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "run", Path("/proc/nowhere"), Path("a\0b")):
        row = run_training(config, folder)
        assert row["status"] == "failed"
        assert "\n" not in row["error"]
        assert str(folder)[:2] in row["error"] or "null" in row["error"]
    assert (tmp_path / "out").read_text() == "mine"


def test_what_failed_is_kept_until_it_is_to_be_tried_again(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(self: Trainer) -> Any:
        raise RuntimeError("once")

    monkeypatch.setattr(Trainer, "step", wrong)
    first = run_training(config, tmp_path)
    monkeypatch.undo()
    assert (first["status"], first["error"]) == ("failed", "RuntimeError: once")
    assert run_training(config, tmp_path) == first
    assert "ended so before: failed; retry=failed runs it again" in capsys.readouterr().err
    path = tmp_path / "result.json"
    for status in ("oom", "timeout", "failed", "unsupported"):
        path.write_text(json.dumps({**first, "status": status}))
        assert run_training(config, tmp_path)["status"] == status
    assert run_training({**config, "retry": "failed"}, tmp_path)["status"] == "unsupported"
    path.write_text(json.dumps({**first, "status": "lost"}))
    assert run_training(config, tmp_path)["status"] == "ok"
    path.write_text(json.dumps({**first, "status": "timeout"}))
    again = run_training({**config, "retry": "failed"}, tmp_path)
    assert (again["status"], again["id"]) == ("ok", first["id"])
    assert "retry must be one of failed, got 'all'" in run_training({**config, "retry": "all"}, tmp_path)["error"]


HEARD: list[Any] = []


class Ear(Tracker):
    """Hears all, and fails where it is told to."""

    def __init__(self, info: RunInfo, fails: bool = False):
        self.info, self.fails = info, fails
        info.notice("goes elsewhere than asked")

    def log(self, metrics: Any, step: int) -> None:
        if self.fails:
            raise OSError("no\nline")

    def result(self, row: Any) -> None:
        HEARD.append((row["status"], row["error"], (Path(self.info.folder) / "result.json").exists()))

    def finish(self, *, failed: bool) -> None:
        HEARD.append(failed)
        self.info.notice("ends late")

    def stop(self) -> None:
        HEARD.append("stop")


@pytest.fixture
def followed(config: dict[str, Any]) -> dict[str, Any]:
    HEARD.clear()
    return {**config, "steps": 2, "tracker": {"_target_": f"{__name__}.Ear"}}


def test_trackers_hear_when_the_row_is_written(
    followed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = run_training(followed, tmp_path)
    assert HEARD == [("ok", None, True), False]
    assert row["notices"] == ["goes elsewhere than asked", "ends late"]
    assert json.loads((tmp_path / "result.json").read_text()) == row
    told = capsys.readouterr().err
    for line in row["notices"]:
        assert f"full text: {line}\n" in told, "also where trainer.progress is none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"heads": 3}}, "model.heads must divide model.dim, got heads=3 for dim=16"),
        ({"hybrid": ["full", "full"]}, "depth must be at least the number of mechanisms listed, 2"),
        ({"task": {"path": "/nowhere"}}, "task.path must be an existing file or folder, got '/nowhere'"),
    ],
)
def test_failed_runs_reach_the_tracker(
    change: dict[str, Any], message: str, followed: dict[str, Any], tmp_path: Path
) -> None:
    merged = {k: {**followed[k], **v} if isinstance(v, dict) else v for k, v in change.items()}
    row = run_training({**followed, **merged}, tmp_path)
    assert row["status"] == "failed"
    assert message in row["error"]
    assert list(HEARD) == [("failed", row["error"], True), True]


def test_a_tracker_cannot_fail_a_run_nor_miss_its_stop(
    followed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {**followed, "tracker": {**followed["tracker"], "fails": True}}
    row = run_training(failing, tmp_path / "fails")
    assert row["status"] == "ok"
    assert "Ear failed and is left alone: OSError: no line; metrics.jsonl has every figure" in row["notices"]

    def stop(self: Trainer) -> Any:
        raise stopping.Stopped(signal.SIGTERM)

    HEARD.clear()
    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(stopping.Stopped):
        run_training(followed, tmp_path / "stopped")
    assert HEARD == ["stop"]


def test_a_row_can_always_be_written(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"backend": "a\0\ud800", "batch": float("nan"), "tracker": {"x": {1, 2}}, "seed": float("inf")}
    row = run_training({**config, **odd}, tmp_path / "odd")
    assert row["status"] == "failed"
    assert json.loads((tmp_path / "odd" / "result.json").read_text()) == row

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    for number, error in enumerate((SystemExit(0), Mute(), RuntimeError("\ud800"))):

        def ends(self: Trainer, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(Trainer, "step", ends)
        folder = tmp_path / str(number)
        row = run_training(config, folder)
        assert row["status"] == "failed"
        assert json.loads((folder / "result.json").read_text()) == row


def test_leftovers_of_a_killed_writer_go(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.0123abcd").write_bytes(b"half")
    run_training({**config, "steps": 2}, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", "checkpoint.pt", "metrics.jsonl", "model.safetensors", "result.json"]


def test_names_stay_inside_the_output(config: dict[str, Any]) -> None:
    plain = run_folder({**config, "backend": "full"})
    for name in ("x/../../../up", "../esc", "/etc/x", "a\0b", "\ud800", "n" * 300, ""):
        folder = run_folder({**config, "backend": name})
        assert folder.parent == plain.parent
        assert len(folder.name) <= 80
        assert run_folder({**config, "backend": f"{name}!"}) != folder
