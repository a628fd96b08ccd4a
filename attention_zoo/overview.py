"""What there is: abilities of every backend, which kernel would run here and why, and each mechanism on a page.

attention-zoo abilities
attention-zoo kernels          # kernels on this machine, at 4096 tokens
attention-zoo about longformer # paper, released code, ours, how it was checked; options, abilities, kernels
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attention_zoo.contract import Attention, at_least
from attention_zoo.measure.environment import device_name
from attention_zoo.model.shorten import FORMS
from attention_zoo.registry import available, build, is_shipped, options_of, recipe, wrappers

COLUMNS = (
    "backend", "causal", "two-sided", "carries state", "global tokens", "cross", "compute", "memory", "state",
    "positions", "grouped heads",
)  # fmt: skip
LONGEST = 2**24
"""Tokens at which kernels are asked for at most: far beyond what any was run at, and no bytes to speak of."""


def abilities_rows(names: Iterable[str] | None = None) -> list[tuple[str, ...]]:
    """One row of text per backend, in the order of `COLUMNS`, read from what each class declares."""
    rows: list[tuple[str, ...]] = []
    for name in names or (*available(), *wrappers()):
        can = recipe(name)[0].declared
        rows.append((
            name, _causality[can.causality], _yes(can.two_sided), _no(can.carry), _no(can.global_tokens),
            _yes(can.cross), can.compute, can.activations, can.state, ", ".join(can.positions), _yes(can.grouped_heads),
        ))  # fmt: skip
    return rows


_causality = {"strict": "yes", "values": "values never leak", "none": "no"}


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _no(word: str) -> str:
    return "no" if word == "none" else word.replace("_", " ")


def kernel_rows(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str]]:
    """Backend, kernel and verdict ("runs", or why it cannot) for plain causal self-attention over `length` tokens.

    Raises:
        ValueError: for a length outside 1 ... `LONGEST`, or a device that this machine lacks.
    """
    at_least(1, length=length)
    if length > LONGEST:
        raise ValueError(f"length must be at most {LONGEST:,} tokens, got {length:,}")
    device_name(device)
    rows = []
    for name in available():
        if reason := _unbuilt(name):
            rows.append((name, "own", reason))
            continue
        first = True
        for kernel, reason in _built(name).to(device).explain_kernels(length, torch.device(device), dtype):
            rows.append((name, kernel, reason or ("runs, chosen by auto" if first else "runs")))
            first = first and reason is not None
    return rows


def _built(name: str) -> Attention:
    return build(name, dim=64, heads=1, causal=recipe(name)[0].declared.causality != "none")


def _unbuilt(name: str) -> str | None:
    """Why a third-party backend cannot be built as it comes: whatever it raises must not cost the others theirs."""
    if is_shipped(name):
        return None
    try:
        _built(name)
    except Exception as error:
        return f"cannot be built: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def about(name: str) -> str:
    """One mechanism on a page, in Markdown: what its module says of it, its options, abilities and kernels.

    Args:
        name: of a mechanism, a wrapper, or a form of `model.shorten`, which has no abilities or kernels of its own.

    Raises:
        ValueError: for an unknown name.
    """
    if name in FORMS:
        form = FORMS[name]
        rows = [("layout", "must be given", f"layers @ factor against the input, in order, as {form.EXAMPLE}")]
        rows += [(option, str(value), form.MEANINGS[option]) for option, value in form.DEFAULTS.items()]
        options = markdown(("option", "default", "meaning"), rows)
        return "\n\n".join([f"# {name}", inspect.getdoc(form) or "", "## Options of model.shorten", options])
    cls, _ = recipe(name)
    text = inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or "It says nothing of itself."
    (abilities,) = abilities_rows([name])
    parts = [f"# {name}", text, "## Options", markdown(("option", "default", "meaning"), option_rows(name))]
    parts += ["## Abilities", markdown(("ability", "here"), list(zip(COLUMNS, abilities))[1:])]
    if kernels := getattr(_built(name), "kernels", ()):
        kernels = [(kernel.name, kernel.about) for kernel in kernels]
        parts += ["## Kernels, fastest first", markdown(("kernel", "what it is"), kernels)]
    return "\n\n".join(parts)


def option_rows(name: str) -> list[tuple[str, str, str]]:
    """Option, default and meaning: the mechanism's own, then those that all share."""
    cls, _ = recipe(name)
    meanings = meanings_of(cls)
    shared, own = (list(inspect.signature(each).parameters) for each in (Attention, cls))

    def place(option: str) -> tuple[bool, bool, int]:
        return option in shared, option == "kernel", own.index(option) if option in own else len(own)

    ordered = sorted(options_of(name).items(), key=lambda item: place(item[0]))
    return [(key, _default(value), meanings.get(key, "").replace("|", "\\|")) for key, value in ordered]


def meanings_of(cls: type[Attention]) -> dict[str, str]:
    """What a mechanism and its bases say of each option."""
    bases = cls.__mro__[: cls.__mro__.index(Attention) + 1]
    return {option: meaning for owner in reversed(bases) for option, meaning in described(owner).items()}


def _default(value: object) -> str:
    return "must be given" if value is inspect.Parameter.empty else "null" if value is None else str(value)


def described(cls: Any) -> dict[str, str]:
    """What the `Args:` of a class or function, or the `Fields:` of a schema, say of each option."""
    found = re.search(r"^(?:Args|Fields):\n((?: .*\n|\n)+)", (inspect.getdoc(cls) or "") + "\n", re.MULTILINE)
    meanings: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", found[1] if found else "", re.MULTILINE):
        meaning = " ".join(text.split())
        meanings |= dict.fromkeys(names.split(", "), meaning)
    return meanings


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, as the README prints it."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)
