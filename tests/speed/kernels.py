"""Whether `auto` takes the fastest path of ours: `python -m tests.speed.kernels --help`.

Every kernel that a mechanism has is timed beside what `auto` takes, forward and backward of a bare layer, over batches,
lengths, types, padding and directions. A line is printed, and a row kept, wherever `auto` takes longer than the best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest finds the modules that tests share

import attention_zoo as zoo
from attention_zoo.measure.environment import environment
from speed.predict import once
from speed.setting import Setting, build, work

BATCHES, LENGTHS = (1, 8, 32), (8, 64, 256, 1024, 4096)
CALLS, LONG_S = 3, 0.3
HOPELESS = 3.0
"""A kernel whose first call takes so many times as long as that of `auto` is not called again."""


def grid(name: str, most: int) -> Iterator[Setting]:
    """All settings of a mechanism, of at most so many tokens."""
    directions = (True, False) if zoo.registry.recipe(name)[0].declared.two_sided else (True,)
    for batch, length, dtype, padding, causal in itertools.product(
        BATCHES, LENGTHS, ("float32", "bfloat16"), ("none", "right"), directions
    ):
        if batch * length <= most and (padding == "none" or batch > 1):
            yield Setting(
                name,
                batch=batch,
                length=length,
                heads=4,
                dtype=dtype,
                causal=causal,
                padding=padding,  # type: ignore[arg-type]
            )


def kernels(setting: Setting) -> list[str]:
    """Those that would run it; none of these is `dense`, which is for checking."""
    layer = build(setting)
    said = layer.explain_kernels(setting.length, torch.device("cpu"), getattr(torch, setting.dtype))
    return [name for name, _ in said if name != "dense"]


def beside(setting: Setting) -> dict[str, float]:
    """Seconds of `auto` and of each kernel that runs this, in turns."""
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for name in ["auto", *kernels(setting)]:
        try:
            call = work(setting, build(replace(setting, options={**setting.options, "kernel": name})))
            call()
        except (ValueError, zoo.Unsupported):
            continue
        first[name] = once(call)
        if first[name] <= HOPELESS * first["auto"]:
            calls[name] = call
    took = dict(first)
    for _ in range(1 if first["auto"] > LONG_S else CALLS):
        for name, call in calls.items():
            took[name] = min(took[name], once(call))
    return took


def row(setting: Setting, took: dict[str, float]) -> dict[str, Any]:
    best = min(took, key=lambda name: took[name])
    return {"setting": asdict(setting), "seconds": took, "best": best, "times": round(took["auto"] / took[best], 2)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.speed.kernels", description=__doc__.partition(":")[0])
    parser.add_argument("--only", nargs="*", choices=zoo.available(), default=zoo.available(), help="mechanisms")
    parser.add_argument("--beyond", type=float, default=1.3, help="how many times the best is too much (default 1.3)")
    parser.add_argument("--most", type=int, default=2**13, help="tokens of a call, at most (default 8192)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--output", type=Path, help="JSONL of all rows, behind the environment")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    slow, tried = 0, 0
    out = given.output.open("w") if given.output else None
    if out:
        print(json.dumps({"command": sys.orig_argv[1:], "environment": environment()}), file=out)
    for setting in (each for name in given.only for each in grid(name, given.most)):
        took = beside(setting)
        if len(took) < 2:
            continue
        found = row(setting, took)
        if found["times"] > given.beyond:  # a shared machine: twice, and both have to say so
            again = beside(setting)
            found = row(setting, {name: min(took[name], again.get(name, took[name])) for name in took})
        tried += 1
        if out:
            print(json.dumps(found), file=out, flush=True)
        if found["times"] > given.beyond:
            slow += 1
            said = {name: round(seconds * 1e3, 2) for name, seconds in found["seconds"].items()}
            print(f"{found['times']:5.2f} x  {setting}  {found['best']} is faster: {said} ms", flush=True)
    print(f"{tried} settings, auto beyond {given.beyond:g} times the best of {slow}")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
