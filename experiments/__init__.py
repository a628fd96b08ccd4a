"""Thin entry points: python -m experiments.<name> --help."""

from __future__ import annotations

import sys


def start(name: str) -> None:
    """Run a command as this process, which ends with its exit code."""
    try:
        from attention_zoo.commands.main import main
    except KeyboardInterrupt:  # torch takes a second to load
        sys.stderr.write("stopped by Ctrl-C\n")
        sys.exit(130)
    sys.exit(main([name, *sys.argv[1:]], program=f"python -m experiments.{name}"))
