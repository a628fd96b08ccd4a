"""Draw settings, time them and list where speed falls apart: `python -m tests.speed --help`.

A line is printed for each outlier as it is found, and a table of the worst at the end. On one thread
seconds are the processor's; other work still shares its caches, so that an outlier is timed twice.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest finds the modules that tests share

import attention_zoo as zoo
from attention_zoo.files import write_json
from attention_zoo.measure.environment import environment
from speed.predict import Machine, timed
from speed.setting import Setting, draw, neighbours

Found = dict[str, Any]
LONG_S = 2.0
"""Settings that take longer by prediction are left out: each is timed some thirty times."""
DRAWS = 30
"""So often a setting is drawn again that a mechanism refuses or that would take too long."""


def outliers(setting: Setting, machine: Machine, beyond: float) -> list[Found]:
    """Of one setting: beside what is predicted, and beside small changes of it.

    Raises:
        ValueError: where the mechanism does not do this, or it would take too long.
    """
    expected = machine.expected(setting)
    if expected is not None and expected > LONG_S:
        raise ValueError(f"{setting} would take {expected:.1f} s")
    took, found = timed(setting), []
    if expected is not None and took > beyond * expected:
        again = timed(setting)
        if again > beyond * expected:
            found.append(_line(setting, "predicted", min(took, again), expected))
    for what, other in neighbours(setting):
        try:
            beside = timed(other)
        except zoo.Unsupported:
            continue
        share, limit = other.batch / setting.batch, beyond * (machine.half(setting) if what == "bfloat16" else 1)
        slow, fast = (other, setting) if beside / share > took else (setting, other)
        if max(beside / share, took) > limit * min(beside / share, took):
            first, second = timed(slow), timed(fast)
            if first / slow.batch > limit * second / fast.batch:
                found.append(_line(slow, what if slow is other else f"without: {what}", first, second))
    return found


def _line(setting: Setting, beside: str, took: float, other: float) -> Found:
    return {
        "times": round(took / other, 2), "setting": str(setting), "beside": beside, "seconds": took, "other": other,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.speed", description=__doc__.partition(":")[0])
    parser.add_argument("--tries", type=int, default=100, help="settings, over all mechanisms in turn (default 100)")
    parser.add_argument("--only", nargs="*", choices=zoo.available(), default=zoo.available(), help="mechanisms")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--beyond", type=float, default=3.0, help="how many times is an outlier (default 3)")
    parser.add_argument("--most", type=int, default=2**21, help="tokens x width of a call, at most (default 2^21)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file of all outliers and of the machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    rng, found, tried = random.Random(given.seed), [], 0
    phases: Counter[str] = Counter()
    for number in tqdm(range(given.tries), unit="setting", disable=None):
        machine = Machine.here()
        for _ in range(DRAWS):
            setting = draw(rng, given.only[number % len(given.only)], given.most)
            try:
                here = outliers(setting, machine, given.beyond)
            except (ValueError, zoo.Unsupported):  # sizes that do not go together, or what this mechanism does not do
                continue
            tried += 1
            phases[setting.phase] += 1
            found += here
            for line in here:
                tqdm.write(f"{line['times']:7.1f} x  {line['setting']}  beside {line['beside']}", file=sys.stdout)
            break
    found.sort(key=lambda line: -line["times"])
    print(f"{tried} settings ({dict(phases)}), {len(found)} outliers beyond {given.beyond:g}")
    if given.output:
        write_json(given.output, {"outliers": found, "settings": tried, "environment": environment()})
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
