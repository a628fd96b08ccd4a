"""Who has the figures of a followed run: a small file of ours beside what W&B keeps, from the run's first moment on.

state       what is known
begun       W&B may lack something: it was ended, or the run was, or nobody knows
written     offline: W&B has all of it on this disk, and `wandb sync` or `attention-zoo sync` sends it
delivered   W&B's server has all of it

A receipt says all that a run is to be followed with, so that it can be followed again from our own files, whatever W&B
had written by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from attention_zoo.files import Damaged, plain, read_json, write_json

PLACE = "wandb"
"""W&B's own folder in that of a run."""
END = ".receipt.json"
WRITTEN, SYNCED = ".wandb", ".wandb.synced"
"""Ends of W&B's own files: what it has written, and that this was synced."""
State = Literal["begun", "written", "delivered"]


@dataclass(frozen=True)
class Receipt:
    """Of one run.

    Fields:
        id: of the run in W&B.
        of: the run's identity, which its row has.
        parts: how often it was begun or gone on with: of a single one, what W&B has is how it begins.
        state: see above.
        name, backend, sweep, config: as of `RunInfo`; the config is flat.
        options: of the tracker, but for its mode.
    """

    id: str
    state: State = "begun"
    of: str = ""
    parts: int = 1
    name: str = ""
    backend: str = ""
    sweep: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def within(self, folder: str | Path) -> Path:
        """Where it lies, by the folder of its run."""
        return Path(folder) / PLACE / f"{self.id}{END}"

    def write(self, folder: str | Path) -> None:
        """Keep it.

        Raises:
            OSError: naming the file.
        """
        path = self.within(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plain(asdict(self)))


def receipt(folder: str | Path, identity: str) -> Receipt | None:
    """That of a run; None where there is none that can be read.

    Args:
        folder: of the run.
        identity: of the run.
    """
    with suppress(FileNotFoundError, Damaged, ValidationError, OSError):
        return TypeAdapter(Receipt).validate_python(read_json(Receipt(identity).within(folder)))
    return None


def receipts(folder: str | Path, on_bad: Callable[[str], None] = lambda line: None) -> Iterator[tuple[Path, Receipt]]:
    """All beneath a folder, each with the folder of its run, in order.

    Args:
        folder: to look beneath.
        on_bad: told in one line about each file that should be one and is not.
    """
    for place, inner, files in os.walk(folder):
        inner.sort()
        if Path(place).name != PLACE:
            continue
        inner.clear()
        for name in sorted(files):
            if not name.endswith(END):
                continue
            if (found := receipt(Path(place).parent, name.removesuffix(END))) is not None:
                yield Path(place).parent, found
            else:
                on_bad(f"{Path(place) / name} is no receipt of a followed run")


def arrived(folder: str | Path, found: Receipt) -> bool:
    """Whether W&B's server has all of a run: it said so, or `wandb sync` did of what was written offline."""
    if found.state == "written":
        files = _written(folder, found)
        return bool(files) and all(path.with_suffix(SYNCED).exists() for path in files)
    return found.state == "delivered"


def supersede(folder: str | Path, found: Receipt) -> None:
    """Mark what W&B has on this disk of a run as synced: `wandb sync` of it would send a second time what was sent."""
    for path in _written(folder, found):
        path.with_suffix(SYNCED).touch()


def ended(folder: str | Path, identity: str, before: Receipt | None, state: State) -> None:
    """Note how following a run has ended.

    Args:
        folder, identity: of the run.
        before: its receipt of before this part: what W&B lacked then it lacks still.
        state: of this part.
    """
    found = receipt(folder, identity)
    if found is not None:
        order: tuple[State, ...] = ("begun", "written", "delivered")
        then = "delivered" if before is None else before.state
        replace(found, state=min(state, then, key=order.index)).write(folder)


def kept(folder: str | Path, found: Receipt) -> set[Path]:
    """Where W&B itself keeps what it has of a run on this disk."""
    return set(Path(folder).glob(f"{PLACE}/*run-*-{found.id}"))


def _written(folder: str | Path, found: Receipt) -> list[Path]:
    return [path for place in kept(folder, found) for path in place.glob(f"*{WRITTEN}")]
