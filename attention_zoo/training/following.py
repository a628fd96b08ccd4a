"""What a module may ask of whoever trains it, without being known to them: two methods, by name, of any module.

after_step()                     called after each optimizer step: a parameter that has a range is put back into it
readings() -> {name: numbers}    what is worth following while it learns, one number or one for each head; logged at
                                 each evaluation, kept in the row and drawn in the report
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def steps_of(model: nn.Module) -> list[Callable[[], object]]:
    """`after_step` of all modules that have one."""
    found = (getattr(module, "after_step", None) for module in model.modules())
    return [each for each in found if callable(each)]


def readings_of(model: nn.Module) -> dict[str, list[float]]:
    """What the modules say of themselves now, each name behind that of the module."""
    found: dict[str, list[float]] = {}
    for place, module in model.named_modules():
        read = getattr(module, "readings", None)
        for name, value in (read() if callable(read) else {}).items():
            numbers = value if isinstance(value, list | tuple) else [value]
            found[f"{place}.{name}".lstrip(".")] = [float(number) for number in numbers]
    return found
