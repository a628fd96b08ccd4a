"""The process in which W&B lives, beside the run that it follows.

Started by its path and made of W&B and the standard library alone, so that it is there in seconds and takes little. It
reads one JSON object a line from standard input: first the start, then {"log": figures}, {"summary": values}, tables,
figures, pages and artifacts, and {"finish": exit code}; where the start says that there will be more, another start
follows. It answers in the same way: "imported", "started", "finished", each once a run, and a "problem" wherever W&B
fails. W&B's own process stays in the group of this one, so that one kill ends both; when the run is gone,
both end by themselves.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PROBE_SECONDS = 3.0
AXES = {"step": ("train/*", "evaluate/*", "readings/*"), "tokens": (), "seq_len": ("speed/*", "memory/*")}
"""What charts may have across, and the figures that have it by default."""
CARRIERS = ("filestream", "runfiles", "runupserter", "sender", "fileTransfer")
"""Parts of W&B's own process that bring something to the server, as they sign in its log."""
GONE_SECONDS = 5.0
"""What W&B is given to write down its last figures when the run that it follows has died."""


class InGroup(subprocess.Popen):
    """W&B would give its process a session of its own, in which nothing that ends this one would find it."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **{**named, "start_new_session": False})


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # these speak to the run, which ends this process itself
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # whatever W&B prints, it is no answer
    subprocess.Popen = InGroup  # type: ignore[misc]

    def answer(**what: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody is there any more: `_read` ends this process
            os.write(answers, (json.dumps(what) + "\n").encode())

    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    more = True
    while more and "init" in (start := messages.get()):
        try:
            import wandb

            answer(imported=True)
            run = _open(wandb, start)
        except BaseException as error:  # W&B raises more than it documents, SystemExit included
            answer(problem=line(error))
            return
        answer(started=None if run is None else {"offline": run.offline, "rows": run.starting_step})
        if run is None:
            return
        known = run.starting_step if start["rest"] else 0
        more = _serve(wandb, run, messages, answer, known) and start["more"]
        answer(finished=True)
    with contextlib.suppress(Exception):
        wandb.teardown()


def _read(messages: queue.Queue[dict[str, Any]]) -> None:
    for text in sys.stdin.buffer:
        messages.put(json.loads(text))
    # for a run that is gone; of one that has finished nobody reads any more
    messages.put({"summary": {"status": "lost", "error": "its process was ended from outside"}})
    messages.put({"finish": 1})
    time.sleep(GONE_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(
    wandb: Any, run: Any, messages: queue.Queue[dict[str, Any]], answer: Callable[..., None], known: int
) -> bool:
    """Do as told until the run has finished; the first failure is the last try but for finishing, and the one that is
    told. Whether all went well.

    Args:
        known: rows of figures, the first that will come, that are there already.
    """
    does: dict[str, tuple[Callable[[Any], Any], str]] = {
        "log": (run.log, "takes no more figures"),
        "summary": (run.summary.update, "takes no summary"),
        "table": (lambda given: _table(wandb, run, **given), "takes no table"),
        "figure": (lambda given: _figure(wandb, run, **given), "takes no figure"),
        "page": (lambda given: _page(wandb, run, **given), "takes no report"),
        "artifact": (lambda given: _artifact(wandb, run, **given), "takes no artifact"),
        "finish": (lambda code: _finish(run, code), "does not finish"),
    }
    works = True
    while True:
        (kind, value), *_ = messages.get().items()
        action, what = does[kind]
        if kind == "log" and known > 0:
            known -= 1
        elif works or kind == "finish":
            try:
                action(value)
            except Exception as error:
                if works:
                    answer(problem=f"{what}: {line(error)}")
                works = False
        if kind == "finish":
            return works


def _finish(run: Any, code: int) -> None:
    log = None if run.offline else Path(run.settings.log_internal)
    run.finish(exit_code=code)
    if log is not None and (problem := undelivered(log)) is not None:
        raise ConnectionError(problem)


def undelivered(log: Path) -> str | None:
    """What W&B's process was told off for by the server, and kept to itself; None where that was nothing.

    Args:
        log: that of its process, a JSON object a line.
    """
    with contextlib.suppress(OSError):
        for text in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError):  # no line of the log
                said = json.loads(text)
                if str(said.get("level")).startswith("ERROR") and str(said.get("msg")).startswith(CARRIERS):
                    return f"{said['msg']} {said.get('error') or ''}".strip()
    return None


def _table(wandb: Any, run: Any, name: str, columns: list[str], data: list[list[Any]]) -> None:
    table = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
    # bound by hand it is a file of the run; else W&B makes an artifact of it, and for each row that is logged another
    table.bind_to_run(run, name, run.step)
    run.log({name: table})


def _figure(wandb: Any, run: Any, name: str, figure: Mapping[str, Any]) -> None:
    import plotly.graph_objects

    run.log({name: wandb.Plotly(plotly.graph_objects.Figure(figure))})


def _page(wandb: Any, run: Any, name: str, path: str) -> None:
    run.log({name: wandb.Html(Path(path).read_text(encoding="utf-8"), inject=False)})


def _artifact(wandb: Any, run: Any, name: str, path: str) -> None:
    artifact = wandb.Artifact(name, type="model")
    artifact.add_file(path)
    run.log_artifact(artifact)


def _open(wandb: Any, start: Mapping[str, Any]) -> Any:
    """The W&B run; None where W&B is switched off."""
    mode, shared = start["mode"], dict(start["init"])
    if mode != "offline":
        host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if key_for(wandb, host) else "offline")
            mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        if mode == "disabled":
            return None
        if mode != "offline" and (problem := unreachable(host)) is not None:
            raise ConnectionError(problem)
    limits = {"init_timeout": start["init_timeout"], "finish_timeout": start["finish_timeout"]}
    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, finish_timeout_raises=True, **limits
    )  # fmt: skip
    shared["resume"] = "allow"  # offline, too: parts of a run that are synced later are the same run
    if os.environ.get("WANDB_SWEEP_ID") and not start["whole"]:
        del shared["id"]  # an agent of a sweep has given it one, under which the sweep knows it
    run = wandb.init(mode=mode, settings=settings, **shared)
    for axis, names in AXES.items():
        run.define_metric(axis, hidden=True)
        for name in names:
            run.define_metric(name, step_metric=axis)
    return run


def key_for(wandb: Any, host: str) -> bool:
    """Whether W&B would find an API key without asking."""
    if os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key:
        return True
    place = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entry = netrc.netrc(place).authenticators(urllib.parse.urlsplit(host).hostname or "")
    except (OSError, ValueError, netrc.NetrcParseError):
        return False  # W&B cannot read it either
    return entry is not None


def unreachable(host: str) -> str | None:
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


def line(error: BaseException, most: int = 300) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


if __name__ == "__main__":
    main()
    os._exit(0)  # past W&B's own hooks, which wait for its process without a limit
