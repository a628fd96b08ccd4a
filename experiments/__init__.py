"""Thin entry points: python -m experiments.<name> --help."""

from __future__ import annotations

import sys

import attention_zoo_start


def start(name: str) -> None:
    """Run a command as this process, which ends with its exit code."""
    attention_zoo_start.start([name, *sys.argv[1:]], program=f"python -m experiments.{name}")
