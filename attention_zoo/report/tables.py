"""A benchmark's tables: costs by length for a terminal, and the page of figures as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.table import Table as RichTable

from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.config import BASELINES
from attention_zoo.measure.derived import Efficiency, costs, efficiency_length, growth_exponent
from attention_zoo.overview import markdown
from attention_zoo.report import rivals, units
from attention_zoo.report.cells import Table
from attention_zoo.results.row import Row


def figures_page(rows: list[Row]) -> str:
    """The page of figures as Markdown."""
    parts = ["# Figures to reach", "", rivals.GOALS, "", _markdown(rivals.figures_table(rows))]
    peers, budgets = rivals.peers_table(rows), rivals.budgets_table(rows)
    if peers.cells:
        said = [f"- {line}" for line in rivals.fairness(rows)]
        parts += ["", "# Against other implementations", "", rivals.FAIR, "", _markdown(peers), "", *said]
    if budgets.cells:
        parts += ["", "# Longest trainable length", "", rivals.BUDGET, "", _markdown(budgets)]
    return "\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    return markdown(table.headers, table.cells)


def terminal_table(title: str, table: Table, without: tuple[str, ...] = ()) -> RichTable:
    """For a terminal: what is the same in all lines goes into the title, and words are never cut."""
    columns = list(zip(*table.cells))
    place = table.headers.index("setting")
    common = columns[place][0].split(", ")
    common = [part for part in common if all(part in cell.split(", ") for cell in columns[place])]
    columns[place] = tuple(
        ", ".join(part for part in cell.split(", ") if part not in common) for cell in columns[place]
    )
    shown = RichTable(
        title=f"{title}; {', '.join(common)}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    kept = [n for n, column in enumerate(columns) if any(column) and table.headers[n] not in without]
    for number in kept:
        words = max(len(word) for cell in columns[number] for word in [*cell.split(), ""])
        shown.add_column(table.headers[number], justify="left" if number <= place else "right", min_width=words)
    for line in zip(*(columns[number] for number in kept)):
        shown.add_row(*line)
    return shown


def cost_table(title: str, measured: Iterable[tuple[SpeedCell, Row]]) -> RichTable:
    """Three lines for each backend and kernel: time, memory, and time as a multiple of its floor."""
    lines: dict[str, dict[int, Row]] = {}
    for cell, row in measured:
        lines.setdefault(cell.said, {})[cell.length] = row
    lengths = sorted({length for line in lines.values() for length in line})
    baselines = [name for name in BASELINES if name in lines]
    caption = (
        "seconds: median; memory: peak of tensors, ≈ predicted, * resident; × floor: of the time that its matrix "
        "products alone would take here; grows: exponent of length; beats: from which length on"
    )
    shown = RichTable(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0
    )
    shown.add_column("backend", no_wrap=True)
    for heading in (*map(str, lengths), "grows", *(f"beats\n{name.partition('/')[2]}" for name in baselines)):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, line in lines.items():
        for quantity, brief in (("seconds", _seconds), ("peak_bytes", _size)):
            mine = costs(line.values(), quantity)
            growth = growth_exponent(mine)
            passes = [efficiency_length(mine, costs(lines[other].values(), quantity)) for other in baselines]
            shown.add_row(
                name if quantity == "seconds" else "",
                *(_brief(line.get(length), brief) for length in lengths),
                "–" if growth is None else f"{growth:.2f}",
                *(_where(each) if each and other != name else "–" for other, each in zip(baselines, passes)),
            )
        shown.add_row("  × floor", *(_brief(line.get(length), _floor) for length in lengths))
    return shown


def _where(found: Efficiency) -> str:
    return str(found).replace("not up to", ">")


def _brief(row: Row | None, words: Callable[[Row], str | None]) -> str:
    if row is None:
        return "–"
    return words(row) or (row["status"] if row["status"] != "ok" else "–")


def _seconds(row: Row) -> str | None:
    return units.seconds(row["seconds"]) if row["status"] == "ok" else None


def _size(row: Row) -> str | None:
    if row["peak_bytes"] is not None:
        return units.size(row["peak_bytes"])
    if row["predicted_bytes"] is not None:
        return f"≈ {units.size(row['predicted_bytes'])}"
    return f"{units.size(row['resident_bytes'])}*" if row["resident_bytes"] is not None else None


def _floor(row: Row) -> str | None:
    return None if row["floor_ratio"] is None else f"{row['floor_ratio']:.2f}"
