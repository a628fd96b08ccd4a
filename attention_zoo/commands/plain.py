"""The commands of plain flags, a line each; the others are `work.COMMANDS`."""

from __future__ import annotations

PLAIN = {
    "generate": "continue a prompt with a trained model",
    "abilities": "what each mechanism can do",
    "kernels": "what would run here, and why",
    "tasks": "what can be learned here, and how it is judged",
    "about": "paper, released code, ours: one mechanism, or one task, on a page",
}
