"""Where Hydra looks for yaml besides our own conf/: in packages that say so, and in the folders that a job was given.

A package adds tasks, presets, models or any other choice by an entry point of the group `attention_zoo.conf`, whose
value names a package of yaml with the folders of conf/. A folder is given by `--config-dir` or `hydra.searchpath`.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "attention_zoo.conf"
OWN = ("main", "schema", "hydra")
"""Providers of Hydra's and of ours, which every job has."""


class OfPackages(SearchPathPlugin):
    """Appends the packages of the entry points, behind what is ours and what the command line gives."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
            search_path.append(entry.name, f"pkg://{entry.value}")


def register() -> None:
    """Make both known: the packages to Hydra, and the current folder to Python, for classes that yaml there names."""
    Plugins.instance().register(OfPackages)
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def of_this_job() -> list[str]:
    """The override by which a config that a job composes finds what the job itself found; none outside of a job."""
    if not HydraConfig.initialized():
        return []
    packages = {entry.name for entry in entry_points(group=GROUP)}
    given = [
        source for source in HydraConfig.get().runtime.config_sources
        if source.schema in ("file", "pkg") and source.provider not in (*OWN, *packages)
    ]  # fmt: skip
    paths = [
        Path(source.path).resolve().as_uri() if source.schema == "file" else f"pkg://{source.path}" for source in given
    ]
    return [f"hydra.searchpath=[{','.join(paths)}]"] if paths else []
