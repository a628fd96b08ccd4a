"""Start a Hydra application so that a mistake on the command line costs one line to read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from attention_zoo.settings import one_line

DEBUG = "HYDRA_FULL_ERROR"


def launch(main: Callable[[], Any]) -> None:
    """Call a `@hydra.main` function. What Hydra refuses is told in one line, with exit status 2.

    HYDRA_FULL_ERROR=1 in the environment shows tracebacks instead.
    """
    wanted = os.environ.get(DEBUG) == "1"
    os.environ[DEBUG] = "1"  # Hydra then raises what it would otherwise print over many lines
    try:
        main()
    except Exception as error:
        line = one_line(error, sys.argv[1:])
        if wanted or line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
