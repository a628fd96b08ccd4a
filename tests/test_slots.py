"""Processes of trainings: forked one after another from the same server, whatever becomes of either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attention_zoo.jobs import slots, trainings
from attention_zoo.jobs.slots import Slots
from attention_zoo.jobs.trainings import Run, run_trainings
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.servers import Gone, Server

pytestmark = pytest.mark.slow
SLEEP: dict[str, Any] = {"args": ["sleep", "60"]}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """The servers that were started."""
    found: list[Server] = []

    def start(module: str) -> Server:
        found.append(Server(module))
        return found[-1]

    monkeypatch.setattr(slots, "Server", start)
    return found


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "log.txt", os.O_WRONLY | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def test_one_server_serves_one_after_another_and_two_at_a_time_need_two(made, log) -> None:
    with Slots() as some:
        for _ in range(2):
            assert some.start("attention_zoo.jobs.alone:ready", {}, log).wait() == 0
        assert len(made) == 1
        one, two = (some.start("subprocess:run", SLEEP, log) for _ in range(2))
        assert len(made) == 2
        assert one.poll() is two.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            one.wait(0.2)
        one.terminate()
        two.kill()
        assert (one.wait(10), two.wait(10)) == (-signal.SIGTERM, -signal.SIGKILL)
        one.kill()  # it has ended: nobody else is hit
        assert some.start("attention_zoo.jobs.alone:ready", {}, log).wait() == 0
    assert [each._process.poll() for each in made] == [0, 0]


def test_a_function_that_raises_says_so_in_its_log(tmp_path, log) -> None:
    with Slots() as some:
        assert some.start("math:sqrt", {"nothing": 1}, log).wait() == 1
    assert "TypeError" in (tmp_path / "log.txt").read_text()


def test_a_server_that_dies_takes_its_child_along_and_the_next_call_gets_another(made, log) -> None:
    with Slots() as some:
        child = some.start("subprocess:run", SLEEP, log)
        made[0]._process.kill()
        assert child.wait(20) == -signal.SIGKILL
        until = time.monotonic() + 20
        while Path(f"/proc/{child.pid}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{child.pid}").exists()
        assert some.start("attention_zoo.jobs.alone:ready", {}, log).wait() == 0
        made[1]._process.kill()  # between two calls
        made[1]._process.wait()
        assert some.start("attention_zoo.jobs.alone:ready", {}, log).wait() == 0
    assert len(made) == 3


def test_a_training_is_forked_with_what_it_needs(tmp_path, log) -> None:
    """What each would else import and read anew; a part of it that fails is passed over there, and would be slow."""
    asked = (
        "import sys; from attention_zoo import registry; from attention_zoo.measure import worker; "
        "from attention_zoo.tasks import ngrams; text = {'_target_': 'attention_zoo.tasks.Text', 'max_bytes': 60000}; "
        "worker._import('attention_zoo.jobs.trainings', {'config': {'task': text}}); "
        "print(registry._own.cache_info().currsize == len(registry._shipped()), 'scipy.stats' in sys.modules, "
        "len(ngrams._counted))"
    )
    with Slots() as some:
        assert some.start("os:system", {"command": f'{sys.executable} -c "{asked}"'}, log).wait() == 0
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "True True 1"


def test_a_process_that_cannot_be_started_is_a_row(tmp_path, monkeypatch) -> None:
    from test_compare import tiny_run

    def refuse(module: str) -> Server:
        raise Gone(Ended("failed", "no python here"))

    monkeypatch.setattr(slots, "Server", refuse)
    runs: list[Run] = [tiny_run("one"), tiny_run("two")]
    rows = run_trainings(runs, tmp_path, parallel=2)
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all("no python here" in str(row["error"]) for row in rows)
    assert trainings.finished(runs[0].config, tmp_path / "one") is not None
