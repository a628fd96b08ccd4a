"""The nursery of fresh processes: imports torch once and forks a child for each call that it is asked for.

A child has run nothing when its work starts: no tensor, no thread, no CUDA context, since this process does nothing but
import, and read text in numpy that children share. Forking spares each cell the 3 to 4 s of CPU time that the imports
take.

Spoken in lines of JSON over a socket. In: {"function": "module:name", "given": its keyword arguments, "seconds"}, and
two descriptors: the child writes what the function returns to the first, and what a mechanism prints goes to the
second. Out: {"ready": true} once, then for each request {"pid": ...} and, when the child has ended, {"exit": code or
minus the signal}.
"""

from __future__ import annotations

import importlib
import json
import os
from contextlib import suppress
from functools import partial
from typing import Any

from attention_zoo.files import plain
from attention_zoo.measure.forked import end_of, fork, link_to_parent
from attention_zoo.measure.identity import source_digest
from attention_zoo.measure.link import Link

FIRST = ("torch.fx.experimental.symbolic_shapes", "attention_zoo.measure.cell")
"""What the first backward would import, and what most calls are of."""


def serve(link: Link) -> None:
    """Fork and wait, request by request, until nobody can ask any more."""
    for name in FIRST:
        importlib.import_module(name)
    source_digest()  # of the code as imported here, should somebody edit it meanwhile
    link.say({"ready": True})
    while (asked := link.hear()) is not None:
        answer, log = link.take_files()
        _import(asked["function"].partition(":")[0], asked["given"])
        work = partial(_answer, asked["function"], asked["given"], answer)
        child = fork(work, log=log, seconds=asked["seconds"], close=[link.fileno()])
        os.close(answer)
        os.close(log)
        link.say({"pid": child})
        link.say({"exit": end_of(child)})


def _import(module: str, given: dict[str, Any]) -> None:
    """A module, what it names and prepares, and what such calls share; what fails is its child's to tell."""
    with suppress(Exception):
        found = importlib.import_module(module)
        for name in getattr(found, "FIRST", ()):
            importlib.import_module(name)
        getattr(found, "prepare", lambda: None)()
        getattr(found, "share", lambda given: None)(given)


def _answer(function: str, given: dict[str, Any], answer: int) -> None:
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(**given)
    with os.fdopen(answer, "w") as file:
        # a line of its own, whatever a mechanism has written to a descriptor that it found open
        file.write("\n" + json.dumps(plain(found), allow_nan=False))


if __name__ == "__main__":
    serve(link_to_parent())
