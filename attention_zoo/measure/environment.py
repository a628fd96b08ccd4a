"""Where a figure was measured: what a reader needs to judge it, and nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attention_zoo.measure.identity import source_digest
from attention_zoo.results.row import Environment


def environment(threads: int | None = None) -> Environment:
    """Machine and software of this process, as plain JSON values.

    Args:
        threads: those that were, or should have been, measured with; None: torch's of now.

    Returns:
        cpu (model name), cores (usable by this process), threads (intra-op), wait_policy and spin_count (of OpenMP;
        None: its default), memory_bytes (of the machine), torch, python, platform, package (version), source (digest,
        see `identity.source_digest`), and cuda: None, or device, count, memory_bytes, capability, runtime.
    """
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "memory_bytes": _memory_bytes(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "package": metadata.version("attention-zoo"),
        "source": source_digest(),
        "cuda": _cuda(),
    }


def canonical_device(device: str) -> str:
    """The one way in which a device is written here: "cpu" (also for cpu:0), "cuda" or "cuda:1".

    Raises:
        ValueError: for another kind of device, another CPU than the one that there is, or none.
    """
    try:
        found = torch.device(device) if isinstance(device, str) else None
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, got {device!r}")
    return found.type if found.type == "cpu" else str(found)


def device_name(device: str) -> str:
    """What `identity` should call a device: the product name of the processor, since no two kinds are alike.

    Raises:
        ValueError: for a device that this machine lacks.
    """
    device = canonical_device(device)
    if device == "cpu":
        return _cpu_model()
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={device} needs a CUDA device, but torch {torch.__version__} sees none; use device=cpu"
        )
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device} must be below the number of CUDA devices, {torch.cuda.device_count()}")
    return torch.cuda.get_device_name(device)


def resolved_device(device: str) -> str:
    """The device that a word means: "auto" is the first CUDA device where there is one, else the CPU; cpu:0 is cpu.

    Raises:
        ValueError: for a word that is no device, or one that this machine lacks.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device_name(device)
    return canonical_device(device)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "runtime": torch.version.cuda,
    }
