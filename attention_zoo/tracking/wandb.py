"""Weights & Biases: offline unless a key is there; it never makes a run wait for ever and never makes it fail.

    mode       what happens
    auto       online where an API key is found (WANDB_API_KEY, W&B's settings, netrc), otherwise offline;
               WANDB_MODE wins where it is set
    online     online
    offline    into <folder>/wandb, for `wandb sync` or `wandb leet` later

Whatever goes wrong online, the run goes on offline, with one line that says so. The group is the sweep, the job type is
the backend; speed and memory are drawn over `seq_len`, the rest over `step`.
"""

from __future__ import annotations

import netrc
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from attention_zoo.options import OneOf, Text, checked
from attention_zoo.tracking.tracker import RunInfo, Tracker, figures

PROBE_SECONDS = 3.0
MODES = ("auto", "online", "offline")
Timeout = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
"""Seconds, at most a day."""


class WandbTracker(Tracker):
    """One W&B run.

    Args:
        info: of the run.
        mode: "auto", "online" or "offline".
        project: W&B project.
        entity: W&B user or team; None is the key's own.
        group: replaces the sweep as the group.
        tags: of the run.
        init_timeout: seconds to wait for the server at the start.
        finish_timeout: seconds to wait for uploads at the end; what is not uploaded stays in the folder.
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
    ):
        import wandb  # slow to import: only runs that want it pay

        self.notice = info.notice
        self.run: Any = None
        shared: dict[str, Any] = {
            "dir": str(info.folder),
            "project": project,
            "entity": entity,
            "name": info.name,
            "id": info.identity,
            "group": group or info.sweep,
            "job_type": info.backend,
            "tags": list(tags),
            "config": dict(info.config),
        }

        def start(mode: str) -> Any:
            quiet: dict[str, Any] = {"silent": True, "console": "off", "x_disable_stats": True}
            settings = wandb.Settings(init_timeout=init_timeout, finish_timeout=finish_timeout, **quiet)
            if mode == "offline":
                return wandb.init(mode="offline", settings=settings, **shared)
            return wandb.init(mode="online", resume="allow", settings=settings, **shared)

        Path(info.folder).mkdir(parents=True, exist_ok=True)
        host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _key_for(wandb, host) else "offline")
        if mode == "disabled":
            return
        if mode == "online":
            problem = _unreachable(host)
            if problem is None:
                try:
                    self.run = start("online")
                except Exception as error:  # W&B raises more than it documents, and none of it may end a run
                    problem = _line(error)
                    shared["id"] += "-offline"  # W&B holds on to the name of the start that failed
            if problem is not None:
                self.notice(f"W&B: {problem}; this run goes on offline (wandb sync {info.folder}/wandb/offline-run-*)")
        if self.run is None:
            self.run = self._guard(lambda: start("offline"), "does not start")
        if self.run is not None:
            self._guard(self._define, "refused the axes")

    def _define(self) -> None:
        for axis, names in (("step", ("train/*", "evaluate/*")), ("seq_len", ("speed/*", "memory/*"))):
            self.run.define_metric(axis, hidden=True)
            for name in names:
                self.run.define_metric(name, step_metric=axis)

    def _guard(self, action: Callable[[], Any], what: str) -> Any:
        """Do it; where W&B fails, say so once and leave it: the JSONL beside it has everything."""
        try:
            return action()
        except Exception as error:  # W&B raises more than it documents, and none of it may end a run
            self.notice(f"W&B {what}: {_line(error)}; metrics.jsonl has every figure")
            self.run = None
            return None

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        if self.run is not None:
            values = {name: value for name, value in metrics.items() if value is not None}
            self._guard(lambda: self.run.log({"step": step, **values}), "takes no more figures")

    def result(self, row: Mapping[str, Any]) -> None:
        if self.run is not None:
            self._guard(lambda: self.run.log(figures(row)), "takes no more figures")
            summary = {"status": row["status"], **{f"final/{k}": v for k, v in row.get("metrics", {}).items()}}
            if self.run is not None:
                self._guard(lambda: self.run.summary.update(summary), "takes no summary")

    def finish(self, *, failed: bool) -> None:
        if self.run is not None:
            self._guard(lambda: self.run.finish(exit_code=int(failed)), "does not finish")


def _key_for(wandb: Any, host: str) -> bool:
    """Whether W&B would find an API key without asking."""
    if os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key:
        return True
    place = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not place.is_file():
        return False
    try:
        entry = netrc.netrc(place).authenticators(urllib.parse.urlsplit(host).hostname or "")
    except netrc.NetrcParseError:
        return False  # W&B cannot read it either
    return entry is not None


def _unreachable(host: str) -> str | None:
    """Why no connection can be made, found in seconds where W&B's own retries take minutes; None if one can."""
    parts = urllib.parse.urlsplit(host)
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(parts.hostname or ""):
        return None  # the proxy knows; W&B's own time limit holds
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror or error})"
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
