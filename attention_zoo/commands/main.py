"""Which command is meant: the first word."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from attention_zoo_start import again

from attention_zoo.commands.launch import OK, launch
from attention_zoo.commands.plain import PLAIN


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        words: of the command line; default those of this process.
        program: how the command was called, for its help and messages; default attention-zoo and its name.
    """
    given = list(sys.argv[1:] if words is None else words)
    return launch(lambda: _dispatch(given, program), again(given, program))


def _dispatch(words: list[str], program: str | None) -> int:
    from attention_zoo.commands.work import COMMANDS

    if words and words[0] in ("--help", "-h"):
        print(_overview())
        return OK
    name, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("abilities", words)
    program = program or f"attention-zoo {name}"
    if name in COMMANDS:
        from attention_zoo.commands import composed

        return composed.run(name, rest, program)
    if name in PLAIN:
        PLAIN[name].run()(rest, program)
        return OK
    known = [*COMMANDS, *PLAIN]
    near = difflib.get_close_matches(name, known, 1)
    raise ValueError(
        f"the command must be one of {', '.join(known)}, got {name!r}{f'; did you mean {near[0]}?' if near else ''}"
    )


def _overview() -> str:
    from attention_zoo.commands.work import COMMANDS

    about = {name: command.about for name, command in (COMMANDS | PLAIN).items()}
    lines = [f"  {name:11}{text}" for name, text in about.items()]
    return "\n".join([
        "Compare, trust and take home long-context attention.", "",
        "  attention-zoo COMMAND ...", "  attention-zoo COMMAND --help", "", *lines,
    ])  # fmt: skip
