"""Weights & Biases: offline unless a key is there; it never makes a run wait for ever and never makes it fail.

    mode       what happens
    auto       online where an API key is found (WANDB_API_KEY, W&B's settings, netrc), otherwise offline;
               WANDB_MODE wins where it is set
    online     online
    offline    into <folder>/wandb, for `wandb sync` or `wandb leet` later

W&B lives in a process of its own (wandb_process.py), which a thread of this one feeds. A server that never answers, a
W&B process that is stopped or crashes, whatever W&B raises or waits for: the run goes on, W&B is given its time and is
then ended, with all that it has started. Whatever goes wrong online, the run goes on offline, with one line that says
so. The group is the sweep, the job type is the backend, the config is flat; speed and memory are drawn over `seq_len`,
the rest over `step` or `tokens`. Its id is the run's identity: a run that goes on later is the same run there. A
receipt (receipts.py) says whether all has arrived; what has not, `attention-zoo sync` sends from our own files.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from attention_zoo.files import plain
from attention_zoo.options import Text, checked
from attention_zoo.rules import OneOf
from attention_zoo.tracking.beside import Beside, park, parked
from attention_zoo.tracking.jsonl import JsonlTracker
from attention_zoo.tracking.naming import flat
from attention_zoo.tracking.receipts import Receipt, ended, kept, receipt
from attention_zoo.tracking.tables import tables
from attention_zoo.tracking.tracker import RunInfo, Tracker, figures

MODES = ("auto", "online", "offline")
LOCAL_SECONDS = 30.0
"""What W&B may take to be imported, and to start where it needs no server. Not the server's time, so no option."""
EXIT_SECONDS = 1.0
"""What W&B may take to go when it has said that it is through."""
STOP_SECONDS = 5.0
"""What W&B is given when the run was asked to stop: schedulers kill soon after they ask."""
Timeout = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False, description="a positive number of seconds")]
"""Seconds, at most a day."""


class WandbTracker(Tracker):
    """One W&B run. It holds a run only at its end, in `finish`: for `finish_timeout` at most, started or not.

    Args:
        info: of the run.
        mode: "auto", "online" or "offline".
        project: W&B project.
        entity: W&B user or team; None is the key's own.
        group: replaces the sweep as the group.
        tags: of the run.
        init_timeout: seconds to wait for the server at the start, while the run goes on.
        finish_timeout: seconds that the run's end waits in all, for a start that is still to come and for uploads; what
            is not uploaded by then stays in the folder, and `attention-zoo sync` sends it.
        artifacts: whether a trained model is uploaded, as an artifact of type "model".
    """

    @checked(prefix="tracker.")
    def __init__(
        self,
        info: RunInfo,
        *,
        mode: Annotated[str, OneOf(*MODES)] = "auto",
        project: Text = "attention-zoo",
        entity: Text | None = None,
        group: Text | None = None,
        tags: Sequence[Text] = (),
        init_timeout: Timeout = 20.0,
        finish_timeout: Timeout = 60.0,
        artifacts: bool = False,
    ):
        self.info, self.mode, self.artifacts = info, mode, artifacts
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        folder = Path(info.folder).absolute()
        self._start: dict[str, Any] = {
            "init": {
                "dir": str(folder),
                "project": project,
                "entity": entity,
                "name": info.name,
                "id": info.identity,
                "group": group or info.sweep,
                "job_type": info.backend,
                "tags": list(tags),
                "config": plain({**flat(info.config), **info.facts, "backend": info.backend}),
            },
            "init_timeout": init_timeout,
            "finish_timeout": 0.8 * finish_timeout,  # then it can say itself what it could not do
            "more": info.more,
            "whole": info.whole,
            "rest": info.rest,
        }
        # an agent of a W&B sweep gives its runs ids of their own
        name = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") and not info.whole else None
        limits = {"init_timeout": init_timeout, "finish_timeout": finish_timeout, "artifacts": artifacts}
        self._before = None if info.whole else receipt(folder, name or info.identity)
        self._lines = JsonlTracker(info).lines
        parts = 1 if self._before is None else self._before.parts + 1
        self._receipt = Receipt(
            name or info.identity, of=info.identity, parts=parts, name=info.name, backend=info.backend,
            sweep=group or info.sweep,
            config=self._start["init"]["config"],
            options={"project": project, "entity": entity, "tags": list(tags), **limits},
        )  # fmt: skip
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process: Beside | None = None
        self._started = self._offline = self._through = self._lacks = False
        self._ended = threading.Event()
        self._closing = threading.Lock()
        self._closed = False
        try:
            self._receipt.write(folder)
        except OSError as error:
            self._say(f"W&B is told, and nothing is kept of what has arrived: {error}")
        threading.Thread(target=self._feed, daemon=True, name="wandb").start()

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        values = {name: value for name, value in metrics.items() if value is not None}
        self._send({"log": {"step": step, **values}})

    def result(self, row: Mapping[str, Any]) -> None:
        self._send({"log": figures(row)})
        summary = {"status": row["status"], "error": row.get("error")}
        self._send({"summary": summary | {f"final/{k}": v for k, v in row.get("metrics", {}).items()}})
        for name, table in tables(row).items():
            self._send({"table": {"name": name, **table._asdict()}})

    def model(self, path: Path) -> None:
        if self.artifacts:
            name = f"{self.info.backend}-{self.info.identity}"
            self._send({"artifact": {"name": name, "path": str(Path(path).absolute())}})

    def page(self, path: Path) -> None:
        self._send({"page": {"name": Path(path).stem, "path": str(Path(path).absolute())}})

    def figure(self, name: str, figure: Mapping[str, Any]) -> None:
        self._send({"figure": {"name": name, "figure": figure}})

    def finish(self, *, failed: bool) -> None:
        self._close(int(failed), self.finish_timeout)

    def stop(self) -> None:
        self._close(1, min(self.finish_timeout, STOP_SECONDS))

    def _close(self, code: int, limit_s: float) -> None:
        called = time.monotonic()
        self._send({"finish": code})
        self._messages.put(None)
        try:
            while not self._ended.wait(0.02):
                if time.monotonic() > called + limit_s:
                    what = "start and finish" if not self._started else "finish"
                    self._say(f"W&B did not {what} within {limit_s:g} s and was ended; {self._cure()}")
                    break
        finally:
            with self._closing:
                self._closed = True
                if self._process is not None and self._through and self.info.more:
                    park(self._process)
                elif self._process is not None:
                    self._process.end(EXIT_SECONDS if self._ended.is_set() else 0.0)
            self._ended.wait(EXIT_SECONDS)  # what is left of a start that never came is tidied up
        if self._through and not self._lacks:
            with contextlib.suppress(OSError):  # then it lacks something, as far as anybody knows
                ended(self.info.folder, self._receipt.id, self._before, "written" if self._offline else "delivered")
        self._tell()

    def _cure(self) -> str:
        """How what W&B did not take reaches it later."""
        return f"attention-zoo sync runs={shlex.quote(str(self.info.folder))} sends it, metrics.jsonl has every figure"

    def _send(self, message: dict[str, Any]) -> None:
        if not self._ended.is_set():
            self._messages.put(plain(message))
        self._tell()

    def _say(self, line: str, *, lacks: bool = True) -> None:
        self._lacks |= lacks
        if not self._closed:  # what is broken by ending it is no news
            self._said.put(line)

    def _tell(self) -> None:
        """Say in the run's own thread what the other one has to say."""
        while not self._said.empty():
            self.info.notice(self._said.get())

    def _feed(self) -> None:
        try:
            process = self._begin()
            alive = process is not None
            while process is not None and alive and (message := self._messages.get()) is not None:
                alive = self._heard(process, wait_s=0.0)
                if alive:
                    process.send(message)
            if process is not None and alive:
                self._heard(process, wait_s=None)
        except Exception as error:  # the end of a thread: whatever it is, the run must hear of it
            self._say(f"W&B has ended ({' '.join(str(error).split())}); {self._cure()}")
        finally:
            self._ended.set()

    def _begin(self) -> Beside | None:
        """A process with a started run: as asked, or offline; None where there is none."""
        waiting = parked()
        for mode in dict.fromkeys((waiting.mode if waiting else self.mode, "offline")):
            with self._closing:
                if self._closed:
                    if waiting is not None:
                        waiting.end(0.0)
                    return None
                self._process = process = waiting or Beside(mode)
                waiting = None
            before = kept(self.info.folder, self._receipt)
            with contextlib.suppress(OSError):  # it has ended already, which is its answer
                process.send(self._start | {"mode": mode})
            answer = process.answer(max(LOCAL_SECONDS, self.init_timeout))
            if "imported" in answer:
                answer = process.answer(LOCAL_SECONDS if mode == "offline" else self.init_timeout)
            if "started" in answer:
                found = answer["started"] or {}
                self._started, self._offline = True, bool(found.get("offline"))
                if self._before is not None and not self._offline and found.get("rows", 0) >= self._lines:
                    self._before = replace(self._before, state="delivered")  # whatever ended before it could say so
                if answer["started"] is None:  # switched off: there is nothing that it lacks
                    self._receipt.within(self.info.folder).unlink(missing_ok=True)
                    return None
                return process
            process.end(0.0)
            for each in (
                kept(self.info.folder, self._receipt) - before
            ):  # nothing is in it, and `wandb sync` of all would stop there
                shutil.rmtree(each, ignore_errors=True)
            problem = answer.get("problem", "no answer in time")
            if mode == "offline":
                self._say(f"W&B does not start: {problem}; {self._cure()}")
            else:
                sync = f"wandb sync {shlex.quote(str(self.info.folder))}/wandb/offline-run-*"
                self._say(f"W&B: {problem}; this run goes on offline ({sync})", lacks=False)
        return None

    def _heard(self, process: Beside, wait_s: float | None) -> bool:
        """Take what W&B has to say, for good where `wait_s` is None; whether more is to come."""
        while answer := process.answer(wait_s):
            if "finished" in answer:
                self._through = True
                return False
            self._say(f"W&B {answer['problem']}; {self._cure()}")
            if "over" in answer:
                return False
        return True
