"""The small interface that everything which follows a run answers, and the one that stands for several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attention_zoo.options import checked


class RunInfo(NamedTuple):
    """What a tracker needs to know of a run.

    Fields:
        folder: where the run writes.
        name: for human eyes.
        identity: hash of all that matters; the same run continued has the same.
        backend: the mechanism, W&B's job type.
        sweep: what groups runs that belong together.
        config: plain nested values.
        notice: shows one line to the user.
        facts: what the run is of in plain values, such as its task: for filters.
        more: whether another run is followed at once when this one has finished.
        whole: whether all of it is told, whatever was told before.
        rest: whether what is known of it already is how it begins, and is left out.
    """

    folder: Path
    name: str
    identity: str
    backend: str
    sweep: str
    config: Mapping[str, Any]
    notice: Callable[[str], None]
    facts: Mapping[str, Any] = {}
    more: bool = False
    whole: bool = False
    rest: bool = False


class Tracker:
    """Follows one run, from its construction to `finish`. Constructor: (info, **own options)."""

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Take figures of one step; names are `group/metric`, and `tokens` is how many were read so far."""
        raise NotImplementedError

    def result(self, row: Mapping[str, Any]) -> None:
        """Take a result row: a finished run, or a cell of a measurement, whose x-axis is its length."""
        raise NotImplementedError

    def model(self, path: Path) -> None:
        """Take the file of the trained model, which stays where it is."""

    def page(self, path: Path) -> None:
        """Take a report: an HTML file."""

    def figure(self, name: str, figure: Mapping[str, Any]) -> None:
        """Take a picture: a plotly figure as plain values; `name` is `group/name`."""

    def finish(self, *, failed: bool) -> None:
        """Close. Exactly one of `finish` and `stop` is called, once, whatever happened."""
        raise NotImplementedError

    def stop(self) -> None:
        """Close in a hurry: the run was asked to stop, and goes on another time."""
        self.finish(failed=True)


class NoTracker(Tracker):
    """Follows nothing."""

    @checked(prefix="tracker.")
    def __init__(self, info: RunInfo):
        del info

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        pass

    def result(self, row: Mapping[str, Any]) -> None:
        pass

    def finish(self, *, failed: bool) -> None:
        pass


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = trackers

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def result(self, row: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.result(row)

    def model(self, path: Path) -> None:
        for tracker in self.trackers:
            tracker.model(path)

    def page(self, path: Path) -> None:
        for tracker in self.trackers:
            tracker.page(path)

    def figure(self, name: str, figure: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.figure(name, figure)

    def finish(self, *, failed: bool) -> None:
        for tracker in self.trackers:
            tracker.finish(failed=failed)

    def stop(self) -> None:
        for tracker in self.trackers:
            tracker.stop()


class Guarded(Tracker):
    """Another tracker, none of whose errors ends a run: the first is told in one line, and it is left alone.

    Args:
        tracker: any but the run's own record.
        notice: shows one line.
    """

    def __init__(self, tracker: Tracker, notice: Callable[[str], None]):
        self.tracker, self.notice, self.broken = tracker, notice, False

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        self._try(lambda: self.tracker.log(metrics, step))

    def result(self, row: Mapping[str, Any]) -> None:
        self._try(lambda: self.tracker.result(row))

    def model(self, path: Path) -> None:
        self._try(lambda: self.tracker.model(path))

    def page(self, path: Path) -> None:
        self._try(lambda: self.tracker.page(path))

    def figure(self, name: str, figure: Mapping[str, Any]) -> None:
        self._try(lambda: self.tracker.figure(name, figure))

    def finish(self, *, failed: bool) -> None:
        self._try(lambda: self.tracker.finish(failed=failed))

    def stop(self) -> None:
        self._try(self.tracker.stop)

    def _try(self, action: Callable[[], object]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker of somebody else raises
            self.broken = True
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.notice(
                f"{type(self.tracker).__name__} failed and is left alone: {what}; metrics.jsonl has every figure"
            )


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The charted figures of a result row, with `seq_len`, over which speed and memory are drawn."""
    if row["kind"] == "speed":
        phase = row["phase"]
        named = {
            f"speed/{phase}_seconds": row.get("seconds"),
            f"speed/{phase}_tokens_per_second": row.get("tokens_per_second"),
            f"memory/{phase}_peak_bytes": row.get("peak_bytes"),
            f"memory/{phase}_state_bytes": row.get("state_bytes"),
        }
        length = row["length"]
    else:
        named = {
            "speed/step_seconds": row.get("step_seconds"),
            "speed/train_tokens_per_second": row.get("tokens_per_second"),
            "memory/train_peak_bytes": row.get("peak_bytes"),
        }
        length = row["seq_len"]
    return {"seq_len": length} | {name: value for name, value in named.items() if value is not None}
