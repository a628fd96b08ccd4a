"""Plain flags, for commands that need no config."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Flags(argparse.ArgumentParser):
    """argparse that tells a mistake in one line, as every other part does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help explains")
