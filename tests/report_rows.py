"""Made-up result rows in the format of results.jsonl, for tests of the report. No figure here was measured."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from attention_zoo.contract import Abilities
from attention_zoo.measure.identity import source_digest

LENGTHS = (256, 1024, 4096, 16384)
ENVIRONMENT = {
    "cpu": "Made-up CPU", "cores": 2, "threads": 1, "memory_bytes": 16 * 2**30, "torch": "2.13.0", "python": "3.11.7",
    "platform": "Linux x86_64", "package": "0.1.0", "source": source_digest(), "cuda": None,
}  # fmt: skip

# (backend, kernel): seconds and bytes at 1,024 tokens, exponents of both
COSTS = {
    ("full", "dense"): (0.11, 150e6, 1.95, 1.97),
    ("full", "sdpa"): (0.045, 26e6, 1.6, 1.02),
    ("longformer", "auto"): (0.05, 27e6, 1.04, 1.01),
    ("bigbird", "auto"): (0.09, 40e6, 1.06, 1.0),
    ("reformer", "auto"): (0.13, 62e6, 1.08, 1.03),
    ("transformer_xl", "auto"): (0.15, 55e6, 1.02, 1.0),
}
LOSSES = {"full": 2.31, "longformer": 2.33, "bigbird": 2.35, "reformer": 2.52, "transformer_xl": 2.28}
RECALL = {"full": 0.997, "longformer": 0.41, "bigbird": 0.62, "reformer": 0.71, "transformer_xl": 0.55}


def common(kind: str, backend: str, name: str, **config: Any) -> dict[str, Any]:
    return {
        "kind": kind, "id": name, "backend": backend, "status": "ok", "error": None,
        "environment": dict(ENVIRONMENT), "config": config,
    }  # fmt: skip


def speed(backend: str, kernel: str, length: int, **changes: Any) -> dict[str, Any]:
    base_s, base_bytes, time_power, memory_power = COSTS[backend, kernel]
    seconds = base_s * (length / 1024) ** time_power
    row = common("speed", backend, f"{backend}-{kernel}-{length}", options={})
    row |= {
        "variant": "layer", "kernel": kernel, "length": length, "batch": 1, "heads": 8, "head_width": 64, "dim": 512,
        "causal": True, "phase": "forward_backward", "device": "cpu", "dtype": "float32", "threads": 1,
        "seconds": seconds, "seconds_min": 0.96 * seconds, "seconds_max": 1.09 * seconds, "repeats": 5, "warmup": 1,
        "tokens_per_second": length / seconds, "peak_bytes": int(base_bytes * (length / 1024) ** memory_power),
        "reserved_bytes": None, "peak_method": "profiler memory events", "state_bytes": None, "flops": 10**9,
        "matmul_flops_per_second": 6e10, "floor_ratio": 1.9,
    }  # fmt: skip
    return row | changes


def unfinished(row: dict[str, Any], status: str, error: str) -> dict[str, Any]:
    lost = ("seconds", "seconds_min", "seconds_max", "repeats", "warmup", "tokens_per_second", "peak_bytes", "metrics")
    return {**row, **{key: None for key in lost if key in row}, "status": status, "error": error}


def quality(backend: str, task: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    text = task == "text"
    steps, last = 300, (LOSSES[backend] * math.log(2) if text else 8 * (1 - RECALL[backend]))
    last += 0.004 * seed
    metric = {"bits_per_byte": last / math.log(2)} if text else {"accuracy": RECALL[backend] - 0.004 * seed}
    start = math.log(256) if text else 8.0
    row = common("quality", backend, f"{backend}-{task}-{seed}", attention={"name": backend})
    row |= {
        "task": task, "seed": seed, "steps": steps, "seq_len": 512 if text else 64, "batch": 16, "parameters": 812_000,
        "train_seconds": 45.0, "step_seconds": 0.15, "tokens_per_second": 54000.0,
        "curve": [[s, last + (start - last) * math.exp(-s / 70)] for s in range(0, steps + 1, 10)],
        "quality_curve": [[steps // 2, 0.8 * next(iter(metric.values()))], [steps, next(iter(metric.values()))]],
        "stopped": "steps",
        "metrics": {**metric, "loss": last},
        "evaluations": {"test": metric} if text else {
            f"length {n}": {"accuracy": metric["accuracy"] * 64 / n} for n in (64, 128)
        },
        "loss_by_position": [[p, last + 1.2 * math.exp(-p / 40)] for p in range(8, 512, 16)] if text else [],
        "carries_state": backend == "transformer_xl",
    }  # fmt: skip
    return row | changes


def portrait(backend: str, length: int = 48, window: int = 8) -> dict[str, Any]:
    row = common("portrait", backend, f"portrait-{backend}", options={"window": window})
    cells = [["2" if 0 <= i - j <= window else "1" if backend == "transformer_xl" and 0 <= i - j <= 2 * window else "0"
              for j in range(length)] for i in range(length)]  # fmt: skip
    abilities = Abilities("strict", "prefix", True, "any", False, "linear", "linear", "constant", ("none", "rotary"))
    return row | {"length": length, "abilities": asdict(abilities), "pairs": ["".join(line) for line in cells]}


def made_up(seeds: int = 1) -> list[dict[str, Any]]:
    """A whole comparison in which everything went well, but for materialised attention at the longest length."""
    rows = []
    for backend, kernel in COSTS:
        rows += [speed(backend, kernel, n) for n in LENGTHS if backend != "full" or n <= 4096]
    rows.append(unfinished(speed("full", "dense", 16384), "oom_predicted", "predicted: 16.0 GiB of tensors"))
    for task in ("text", "mqar"):
        rows += [quality(backend, task, seed) for backend in LOSSES for seed in range(seeds)]
    return rows + [portrait(backend) for backend in LOSSES]
