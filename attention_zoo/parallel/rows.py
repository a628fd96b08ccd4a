"""Which rows of a batch are whose: neighbouring ones, in the order of the processes."""

from __future__ import annotations

from torch import Tensor

from attention_zoo.parallel.world import Team
from attention_zoo.tasks.task import Batch


def check_divides(batch: int, accumulate: int, team: Team) -> None:
    """Raise a ValueError for rows that cannot be shared out evenly.

    Args:
        batch: rows of a step.
        accumulate: parts that a process splits its rows into.
        team: the processes that share the rows.
    """
    if batch % (team.size * accumulate):
        parts = f" times trainer.accumulate={accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"batch must be a multiple of the {team.size} processes that share its rows{parts}, got {batch}"
        )


def own_rows(rows: int, team: Team) -> slice:
    """Those of this process. Where they do not divide, the first ones have one more, and the last perhaps none."""
    least, more = divmod(rows, team.size)
    start = team.rank * least + min(team.rank, more)
    return slice(start, start + least + (team.rank < more))


def all_of_part(flags: Tensor, parts: int, team: Team) -> list[bool | None]:
    """For each part of this process's rows: whether a flag is set for all its rows and those of the same part
    elsewhere. None where nobody else has rows: whoever has them knows.

    Args:
        flags: [B] bool, of the whole batch.
    """
    if team.size == 1:
        return [None] * parts
    return flags.view(team.size, parts, -1).all(2).all(0).tolist()


def own_part(batch: Batch, team: Team) -> Batch:
    """The batch that this process reads."""
    return batch if team.size == 1 else batch.rows(own_rows(len(batch.ids), team))
