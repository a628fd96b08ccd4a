"""The commands of plain flags, a line each; the others are `work.COMMANDS`."""

from __future__ import annotations

PLAIN = {
    "generate": "continue a prompt with a trained model",
    "abilities": "what each mechanism can do",
    "kernels": "what would run here, and why",
    "about": "paper, released code, ours: one mechanism on a page",
}
