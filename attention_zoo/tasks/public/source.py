"""Where public data lie: a path of this machine, or a repository of the Hugging Face hub whose files are fetched once.

Nothing is downloaded unless the path says so (`hf:NAME` or `hf:NAME@REVISION`). What is missing is named, with where to
get it from, and so is the file, the line and the rule where a format is not kept.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from attention_zoo.hub import silent
from attention_zoo.rules import shown

HUB = "hf:"


class Source(NamedTuple):
    """Published data.

    Fields:
        task: who asks, as in conf/task/<task>.yaml.
        layout: what has to lie at the path, in words.
        origin: where to get it.
    """

    task: str
    layout: str
    origin: str

    def place(self, path: str | None) -> Path:
        """The file or folder that `task.path` names.

        Raises:
            ValueError: for none, or one that is not there, with where to get the data.
        """
        if path is None:
            raise ValueError(f"task.path must say where the data of {self.task} lie: {self.help()}")
        if path.startswith(HUB):
            return fetched(path.removeprefix(HUB), self)
        place = Path(os.path.expanduser(path))
        try:
            there = bool(path) and (place.is_file() or place.is_dir())
        except (OSError, ValueError):  # a name that the system cannot look up
            there = False
        if not there:
            raise ValueError(
                f"task.path of {self.task} must be an existing file or folder, got {shown(path)}: {self.help()}"
            )
        return place

    def help(self) -> str:
        """What belongs there, and where to get it."""
        return f"it is {self.layout}; get it from {self.origin}"

    def missing(self, place: Path) -> ValueError:
        """The error for a part of the data that is not there."""
        return ValueError(f"{self.task}: {place} is missing from the data: {self.help()}")

    def wrong(self, place: Path | str, rule: str, got: object, where: str = "") -> ValueError:
        """The error for a file that breaks a rule of its format.

        Args:
            where: the line or field, such as "line 3".
        """
        return ValueError(f"{self.task}: {place}{f', {where}' if where else ''}: {rule}, got {shown(got)}")

    def unreadable(self, error: OSError) -> ValueError:
        """The error for a file that the system does not give."""
        return ValueError(f"{self.task}: {error.filename} cannot be read: {error.strerror or error}")


def fetched(name: str, source: Source) -> Path:
    """The local copy of a data set of the Hugging Face hub, fetched where it is not there yet.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION. Its files must be those of the source's own form.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"task.path of {source.task} names the hub, which takes the package huggingface_hub: "
            f"pip install huggingface_hub, or give a local path; {source.help()}"
        ) from None
    repository, _, revision = name.partition("@")
    try:
        with silent():
            return Path(snapshot_download(repository, repo_type="dataset", revision=revision or None))
    except (
        Exception
    ) as error:  # offline, no such repository, one that asks who you are: the library has a type for each
        why = " ".join(str(error).split())[:300] or "no reason given"
        raise ValueError(
            f"task.path of {source.task}: {shown(HUB + name)} cannot be fetched from the hub "
            f"({type(error).__name__}: {why}); without a network give a local path: {source.help()}"
        ) from None
