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


def _table(name: str) -> Callable[[], Run]:
    def run() -> Run:
        from attention_zoo.commands import tables

        return lambda words, program: tables.run(name, words, program)

    return run


PLAIN = {
    "generate": Plain("continue a prompt with a trained model", _generate),
    "abilities": Plain("what each mechanism can do", _table("abilities")),
    "kernels": Plain("what would run here, and why", _table("kernels")),
    "tasks": Plain("what can be learned here, and how it is judged", _table("tasks")),
    "about": Plain("paper, released code, ours: one mechanism, or one task, on a page", _table("about")),
}
