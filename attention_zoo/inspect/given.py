"""Which runs are meant: folders that hold a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attention_zoo.model.saved import NAME
from attention_zoo.rules import shown


def folders_of(given: Any) -> list[Path]:
    """The folders that `run=` names.

    Raises:
        ValueError: for none, for what is no folder, or one that holds no model.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    found = list(given) if several else [given]
    if not found:
        raise ValueError("run must be the folder of a finished run, or a list of them, got none")
    for each in found:
        if not isinstance(each, str | Path) or not Path(each).is_dir():
            raise ValueError(f"run must name folders of finished runs, got {shown(each, 80)}, which is no folder")
        if not (Path(each) / NAME).is_file():
            raise ValueError(
                f"run must name folders of finished runs, got {str(each)!r}, which holds no {NAME}; "
                f"status says how far it is"
            )
    return [Path(each) for each in found]
