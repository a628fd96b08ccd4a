"""Throw the faults and print the table: `python -m tests.faults --help`.

With --output, counts of kinds that are not thrown stay as they are in the file; README's table is made from one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest finds the modules that tests share

from attention_zoo.files import read_json, write_json
from attention_zoo.measure.environment import environment
from faults import WAYS, Counts
from faults.kinds import KINDS

HEAD = ("fault", "tries", "wrong result", "result lost", "raw error", "hung", "process left")


def counted(counts: Counts, *, share: float, seed: int) -> dict[str, Any]:
    """As JSON: what was thrown where, and what it did."""
    here = environment()
    kept = {name: here[name] for name in ("cpu", "torch", "python", "package", "source")}
    ways = {way: counts.count(way) for way in WAYS}
    return {"tries": counts.tries, **ways, "share": share, "seed": seed, "environment": kept}


def together(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Counts of two calls that differ in their seeds; those of other code do not count."""
    if old is None or old["environment"] != new["environment"]:
        return new
    seeds = [*_all(old["seed"]), *_all(new["seed"])]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"--seed must be one that is not counted yet, got {new['seed']} beside {old['seed']}")
    added = {name: old[name] + new[name] for name in ("tries", *WAYS, "share")}
    return {**new, **added, "share": round(added["share"], 6), "seed": seeds}


def _all(seed: int | list[int]) -> list[int]:
    return seed if isinstance(seed, list) else [seed]


def table(found: dict[str, dict[str, Any]]) -> str:
    """As Markdown, in the order of `KINDS`."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += [
        f"| {module.TITLE} | " + " | ".join(f"{found[kind][name]:,}" for name in ("tries", *WAYS)) + " |"
        for kind, module in KINDS.items()
        if kind in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition(":")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the large version's tries (default 1)")
    parser.add_argument("--only", nargs="*", choices=sorted(KINDS), default=list(KINDS), help="kinds of faults")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--output", type=Path, help="JSON file of all counts, which is brought up to date")
    parser.add_argument("--add", action="store_true", help="to the file's counts of the same code, by another seed")
    given = parser.parse_args()
    found: dict[str, Any] = read_json(given.output) if given.output and given.output.exists() else {}
    failed = False
    for kind in given.only:
        began, count = time.monotonic(), max(1, round(KINDS[kind].LARGE * given.share))
        print(f"{kind}: {count:,} tries", end="", file=sys.stderr, flush=True)
        counts = KINDS[kind].run(count, given.seed)
        print(f", {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        for way, case in counts.failures:
            failed = True
            print(f"  {way}: {case}", file=sys.stderr)
        new = counted(counts, share=given.share, seed=given.seed)
        found[kind] = together(found.get(kind), new) if given.add else new
        if given.output:
            write_json(given.output, {name: found[name] for name in KINDS if name in found})
    print(table(found))
    sys.exit(failed)


if __name__ == "__main__":
    main()
