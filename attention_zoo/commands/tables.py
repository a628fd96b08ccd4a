"""What there is, what runs here, and a mechanism or a task on a page: the commands abilities, kernels, tasks, about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from attention_zoo import overview, registry
from attention_zoo.commands.flags import Flags
from attention_zoo.model.shorten import FORMS
from attention_zoo.rules import near
from attention_zoo.tasks import catalogue


def run(what: str, about: str, words: Sequence[str], program: str) -> None:
    """Print a table or a page.

    Args:
        what: the command.
        about: what it is for, in a line.
        words: of the command line, after the command.
        program: how the command was called, for its help.

    Raises:
        ValueError: for a flag or value that is not understood.
    """
    parser = Flags(prog=program, description=f"{about.capitalize()}.")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of drawing")
    if what == "about":
        parser.add_argument("name", help="of a mechanism or a task")
    elif what == "kernels":
        parser.add_argument("--length", type=int, default=4096, help="tokens (default 4096)")
        parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    given = parser.parse_args(words)
    if what == "about":
        tasks, mechanisms = catalogue.names(), [*registry.available(), *registry.wrappers(), *FORMS, *_companions()]
        if given.name not in (*tasks, *mechanisms):
            known = [*mechanisms, *tasks]
            raise ValueError(
                f"name must be a mechanism ({', '.join(mechanisms)}) or a task ({', '.join(tasks)}), "
                f"got {given.name!r}{near(given.name, known)}"
            )
        page = catalogue.about(given.name) if given.name in tasks else overview.about(given.name)
        print(page) if given.markdown else Console().print(Markdown(page))
    elif what == "tasks":
        listed = catalogue.rows()
        print(overview.markdown(catalogue.COLUMNS, listed)) if given.markdown else _draw(catalogue.COLUMNS, listed)
    elif what == "abilities":
        rows = overview.abilities_rows()
        if given.markdown:
            print(overview.markdown(overview.COLUMNS, rows))
        else:  # on its side: a terminal is narrow
            header, *lines = zip(overview.COLUMNS, *rows)
            _draw(header, lines)
    else:
        columns, found = ("backend", "kernel", "here"), overview.kernel_rows(given.length, given.device)
        print(overview.markdown(columns, found)) if given.markdown else _draw(columns, found)


def _companions() -> list[str]:
    return [f"{name}.{part}" for name in registry.available() for part in registry.recipe(name)[0].companions]


def _draw(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
