"""Names, writes, reads, locks and signals: old or new, never half; one owner; stopped at a good place."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

import attention_zoo
from attention_zoo import stopping
from attention_zoo.files import (
    Damaged,
    append_jsonl,
    plain,
    read_json,
    read_jsonl,
    remove_leftovers,
    safe_name,
    write_atomic,
    write_json,
    write_row,
)
from attention_zoo.locks import Busy, owner, owning

HOSTILE = (
    "../up",
    "/abs",
    "a/../../b",
    "nul\0",
    "\ud800",
    "x" * 300,
    "",
    ".",
    "..",
    ".hidden",
    "a b",
    "ü",
    "-rf",
    "a\nb",
)


def test_hostile_names_become_one_component_each_its_own(tmp_path):
    names = [safe_name(text) for text in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    for name in names:
        assert len(name) <= 80
        assert (tmp_path / name).parent == tmp_path
        assert not name.startswith((".", "-"))
        (tmp_path / name).touch()


def test_usual_names_stay():
    assert safe_name("mqar-longformer+full-w=128,s=0") == "mqar-longformer+full-w=128,s=0"
    assert safe_name("x" * 80) == "x" * 80


def test_anything_can_be_written_as_a_row(tmp_path):
    row = {"a": math.nan, "b": [math.inf, -math.inf], "c": {"d": object}, "e": "\ud800", 3: (1, True, None)}
    write_row(tmp_path / "row.json", row)
    read = read_json(tmp_path / "row.json")
    assert read["a"] == "nan"
    assert read["b"] == ["inf", "-inf"]
    assert read["3"] == [1, True, None]
    assert plain({"x": 1.5}) == {"x": 1.5}


def test_a_failed_write_names_the_target_and_leaves_the_old(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(path, {"new": 2})
    assert caught.value.filename == str(path)
    assert read_json(path) == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken" / "a.json", "{}")


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"{", "JSON"), (b"\xff\xfe", "JSON"), (b"[1]", "list"), (b"[" * 100_000, "nested"),
     (b'{"a": NaN}', "NaN")],
)  # fmt: skip
def test_what_is_no_object_is_named(tmp_path, content, word):
    path = tmp_path / "row.json"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=word) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(Damaged, match="directory"):
        read_json(tmp_path)


def test_bad_lines_are_told_and_left_out(tmp_path):
    path, told = tmp_path / "m.jsonl", []
    path.write_bytes(b'{"a": 1}\n\xff\n[2]\n{"a": 3}\n{"cut": ')
    assert list(read_jsonl(path, told.append)) == [{"a": 1}, {"a": 3}]
    assert [str(line) in text for line, text in zip((2, 3), told, strict=True)] == [True, True]


def test_a_torn_line_is_not_glued_on(tmp_path):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"a": 1})
    with open(path, "ab") as file:
        file.write(b'{"torn": ')
    append_jsonl(path, {"a": 2})
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]


def test_short_writes_are_finished(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: whole(handle, data[:3]))
    append_jsonl(tmp_path / "m.jsonl", {"word": "long enough"})
    monkeypatch.undo()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"word": "long enough"}


def test_leftovers_go_and_nothing_else(tmp_path):
    for name in (".row.json.0123abcd", "row.json", ".lock", ".owner.json", ".hidden.txt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden.txt", ".lock", ".owner.json", "row.json"]


BARE = f"""
import sys, types
package = types.ModuleType("attention_zoo")
package.__path__ = {list(attention_zoo.__path__)!r}
sys.modules["attention_zoo"] = package
"""
"""Begins a script that wants a module of the package and not torch, which the package itself would bring."""

HOLDER = f"""{BARE}
import time
from attention_zoo.locks import owning
with owning(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_one_owner_and_a_dead_one_is_followed_at_once(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(Busy, match=f"process {other.pid} on .* works in"), owning(tmp_path):
            pass
        assert owner(tmp_path)["pid"] == other.pid
    finally:
        other.kill()
        other.communicate()
    with owning(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert owner(tmp_path) is None


def test_waiting_for_an_owner_says_so(tmp_path):
    said = []
    with owning(tmp_path), pytest.raises(Busy), owning(tmp_path, wait_s=0.1, notice=said.append):
        pass
    assert "waiting" in said[0]


@pytest.fixture
def _signals():
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_an_exception_with_an_exit_code(number, code):
    with pytest.raises(stopping.Stopped) as caught:
        signal.raise_signal(number)
    assert caught.value.code == code


@pytest.mark.usefixtures("_signals")
def test_a_graceful_stretch_ends_where_it_wants_and_a_second_signal_at_once():
    steps = []

    def work(signals):
        with stopping.graceful() as asked:
            for step in range(5):
                if step < signals:
                    signal.raise_signal(signal.SIGTERM)
                steps.append(step)
                if asked() and signals == 1:
                    raise stopping.Stopped(asked())

    with pytest.raises(stopping.Stopped):
        work(1)
    assert steps == [0]
    with pytest.raises(stopping.Stopped):
        work(2)
    assert steps == [0, 0]
    work(0)
    assert len(steps) == 7


@pytest.mark.usefixtures("_signals")
def test_a_stretch_that_fails_after_a_signal_is_stopped():
    def work():
        with stopping.graceful():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("on the way out")

    with pytest.raises(stopping.Stopped):
        work()


PARENT = f"""
import os, subprocess, sys, time
child = {BARE!r} + "import time; from attention_zoo.stopping import *; die_with_parent(int(sys.argv[1]))"
child += "; time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", child, str(os.getpid())]).pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(1)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
