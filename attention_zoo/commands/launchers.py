"""What is set right with a launcher of others before it works: each is somebody else's code, with habits of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from attention_zoo import stopping

RAY_STORE_BYTES = 75 * 2**20
"""The least that Ray takes, and what its launcher takes: a job and its outcome are small."""

CALM = (
    "import sys, warnings; warnings.simplefilter('ignore'); sys.excepthook = lambda kind, error, where: "
    "None if kind is KeyError else print('warning: joblib:', *str(error).split(), file=sys.stderr); "
)
"""Comes first in joblib's resource tracker."""


def start(inner: Launcher) -> None:
    """Make ready for a launcher that is about to launch, from the main thread."""
    name = type(inner).__name__
    if name == "RayLauncher":
        _start_ray(inner)
    elif name == "JoblibLauncher":
        _calm_joblib()


def _start_ray(inner: Any) -> None:
    """Start Ray here before its launcher does: it takes SIGTERM for itself, in C++ even, and would abort this process
    within three seconds, whatever is being saved."""
    import ray

    # workers at nice 15, Ray's default, stand still beside anything else that runs here
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not ray.is_initialized():
        settings: Any = OmegaConf.to_container(inner.ray_cfg.init, resolve=True)
        ray.init(**{"object_store_memory": RAY_STORE_BYTES, **settings})
        stopping.install()


def _calm_joblib() -> None:
    """Have joblib's resource tracker, a process that removes semaphores of dead workers, say nothing of semaphores that
    it does not know. One that was killed is replaced, and the new one knows none of those that there were: it would
    print a traceback for each."""
    from joblib.externals.loky.backend import resource_tracker

    spawn: Any = resource_tracker.spawnv_passfds
    if not hasattr(spawn, "__wrapped__"):
        resource_tracker.spawnv_passfds = _first(CALM, spawn)


def _first(code: str, spawn: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(spawn)
    def spawning(path: str, words: Sequence[str], *more: Any) -> Any:
        *others, last = words
        return spawn(path, [*others, code + last], *more)

    return spawning
