"""`python -m attention_zoo [abilities | kernels]`: tables of what there is and what runs here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from attention_zoo import overview


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attention_zoo", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["abilities", "kernels"], default="abilities")
    parser.add_argument("--length", type=int, default=4096, help="tokens, for kernels (default 4096)")
    parser.add_argument("--device", default="cpu", help="for kernels (default cpu)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of a drawn table")
    given = parser.parse_args(arguments)
    if given.what == "abilities":
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
