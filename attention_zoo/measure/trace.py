"""Where the time of one call goes: a trace for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import torch

from attention_zoo.measure.work import Work


def write_trace(work: Work, path: Path, device: torch.device) -> str:
    """Profile one call and write it; returns the path. Observed calls are slower: read shares, not seconds."""
    # here, since importing it takes as long as many a cell
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    work.before()
    with profile(activities=activities, record_shapes=True) as found:
        work.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found.export_chrome_trace(str(path))
    return str(path)
