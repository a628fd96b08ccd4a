"""`python -m attention_zoo [abilities | kernels | about NAME]`: what there is, what runs, a mechanism on a page."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from attention_zoo import overview


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attention_zoo", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["abilities", "kernels", "about"], default="abilities")
    parser.add_argument("name", nargs="?", help="of a mechanism, for about")
    parser.add_argument("--length", type=int, default=4096, help="tokens, for kernels (default 4096)")
    parser.add_argument("--device", default="cpu", help="for kernels (default cpu)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of a drawn table")
    given = parser.parse_args(arguments)
    if (given.what == "about") != (given.name is not None):
        parser.error("about takes the name of a mechanism, and nothing else does")
    if given.what == "about":
        try:
            page = overview.about(given.name)
        except ValueError as error:
            parser.error(str(error))
        print(page) if given.markdown else Console().print(Markdown(page))
    elif given.what == "abilities":
        rows = overview.abilities_rows()
        if given.markdown:
            print(overview.markdown(overview.COLUMNS, rows))
        else:  # on its side: a terminal is narrow
            header, *lines = zip(overview.COLUMNS, *rows)
            _draw(header, lines)
    else:
        columns, found = ("backend", "kernel", "here"), overview.kernel_rows(given.length, given.device)
        print(overview.markdown(columns, found)) if given.markdown else _draw(columns, found)


def _draw(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
