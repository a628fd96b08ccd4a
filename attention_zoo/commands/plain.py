"""The commands of plain flags, a line each; the others are `work.COMMANDS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Run = Callable[[Sequence[str], str], None]


@dataclass(frozen=True)
class Plain:
    """A command that needs no config.

    Fields:
        about: what it is for, in a line.
        run: gives what does it, with the words after the command and how it was called; imports only then.
    """

    about: str
    run: Callable[[], Run]


def _generate() -> Run:
    from attention_zoo.commands import generate

    return generate.run


def _table(name: str, about: str) -> Plain:
    def run() -> Run:
        from attention_zoo.commands import tables

        return lambda words, program: tables.run(name, about, words, program)

    return Plain(about, run)


PLAIN = {
    "generate": Plain("continue a prompt with a trained model", _generate),
    "abilities": _table("abilities", "what each mechanism can do"),
    "kernels": _table("kernels", "what would run here, and why"),
    "tasks": _table("tasks", "what can be learned here, and how it is judged"),
    "about": _table("about", "paper, released code, ours: one mechanism, or one task, on a page"),
}
