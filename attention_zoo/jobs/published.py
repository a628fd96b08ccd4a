"""Published tables that a comparison stands beside, as `published` of conf/compare.yaml says them.

    published:
      rounds:
        title: Accuracy by hashing rounds in evaluation
        source: Kitaev et al. 2020, Reformer, table 2
        task: mqar
        values: {lsh_4: {test@rounds_8: 0.948, test@rounds_4: 0.925}}
        remark: published on duplication of 1,024 tokens

They become rows of their own, so that a file of results holds both sides and any report draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from attention_zoo.options import Finite, Positive, Text, check_fields
from attention_zoo.results.row import Row
from attention_zoo.rules import near, shown


@dataclass
class PublishedTable:
    """One table.

    Fields:
        title: what its figures are.
        source: where they were published.
        task: whose trainings here stand beside it.
        values: backend or variant -> evaluation set -> figure; null: not published, ours alone is shown.
        metric: what the figures are; null: the task's main metric.
        seq_len: of the trainings; null: of any length.
        remark: in what ours differ.
    """

    title: Text = ""
    source: Text = ""
    task: Text = ""
    values: dict[str, dict[str, Finite | None]] = field(default_factory=dict)
    metric: Text | None = None
    seq_len: Positive | None = None
    remark: Text | None = None


def published_tables(given: Mapping[str, Any], backends: Sequence[str]) -> dict[str, PublishedTable]:
    """The tables by name, each checked.

    Args:
        backends: the names that are compared.

    Raises:
        ValueError: naming the table, the rule and the value.
    """
    known, found = [each.name for each in fields(PublishedTable)], {}
    for name, entry in given.items():
        where = f"published.{name}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must be a mapping with title, source, task and values, got {shown(entry)}")
        if unknown := [key for key in entry if key not in known]:
            raise ValueError(
                f"{where}.{unknown[0]} is no option{near(str(unknown[0]), known)}; known: {', '.join(known)}"
            )
        table = PublishedTable(**entry)
        check_fields(PublishedTable, asdict(table), f"{where}.")
        if lacking := [key for key in ("title", "source", "task", "values") if not getattr(table, key)]:
            raise ValueError(f"{where} must say title, source, task and values, got no {lacking[0]}")
        if strange := [backend for backend in table.values if backend not in backends]:
            raise ValueError(f"{where}.values must be of backends or variants that are compared, got {strange[0]}")
        found[str(name)] = table
    return found


def published_rows(tables: Mapping[str, PublishedTable]) -> list[Row]:
    """A row for each figure."""
    return [
        {
            "kind": "published", "backend": backend, "status": "ok", "error": None, "table": table.title,
            "source": table.source, "task": table.task, "seq_len": table.seq_len, "metric": table.metric, "set": name,
            "value": value, "remark": table.remark,
        }
        for table in tables.values()
        for backend, values in table.values.items()
        for name, value in values.items()
    ]  # fmt: skip
