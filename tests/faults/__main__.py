"""Throw the faults and print the table: `python -m tests.faults [--share 1.0] [--only KIND ...] [--seed N]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest finds the modules that tests share

from faults import WAYS, Counts
from faults.kinds import KINDS

HEAD = ("fault", "tries", "wrong result", "result lost", "raw error", "hung", "process left")


def table(found: dict[str, Counts]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += [
        f"| {KINDS[kind].TITLE} | {counts.tries:,} | " + " | ".join(f"{counts.count(way):,}" for way in WAYS) + " |"
        for kind, counts in found.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the large version's tries (default 1)")
    parser.add_argument("--only", nargs="*", choices=sorted(KINDS), default=list(KINDS), help="kinds of faults")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    given = parser.parse_args()
    found: dict[str, Counts] = {}
    for kind in given.only:
        began, count = time.monotonic(), max(1, round(KINDS[kind].LARGE * given.share))
        print(f"{kind}: {count:,} tries", end="", file=sys.stderr, flush=True)
        found[kind] = KINDS[kind].run(count, given.seed)
        print(f", {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        for way, case in found[kind].failures:
            print(f"  {way}: {case}", file=sys.stderr)
    print(table(found))
    sys.exit(any(counts.failures for counts in found.values()))


if __name__ == "__main__":
    main()
