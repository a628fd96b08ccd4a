"""Components from their configs, with errors that name options by their full keys."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from attention_zoo.options import WrongOption, calls_of
from attention_zoo.settings import one_line


def build(config: Mapping[str, Any], group: str = "", /, **given: Any) -> Any:
    """What a `_target_` stands for, with run-time values added; its own errors, not Hydra's wrapping of them.

    Args:
        group: that the config is of, for errors: they name options by their full keys.
    """
    try:
        made = instantiate({**config, "_partial_": True, "_convert_": "all"})
    except InstantiationException as error:  # of what stands within
        raise ValueError(f"{group or 'config'}: {one_line(error)}") from error
    try:
        inspect.signature(made).bind(**given)
    except TypeError as error:
        raise ValueError(f"{group or 'config'}._target_={config['_target_']} does not fit: {error}") from None
    except ValueError:  # written in C: it has no signature that could be read
        pass
    try:
        return made(**given)
    except ValueError as error:
        if not group or type(error) not in (ValueError, WrongOption):
            raise
        raise ValueError(full_key(str(error), group, made.func, given)) from error


def full_key(text: str, group: str, target: Any, given: Mapping[str, Any]) -> str:
    """An error of a component in which the option that it begins with has its full key."""
    name = re.match(r"\w*", text)[0]  # type: ignore[index]
    own = {option for call in calls_of(target) for option in call.rules} - given.keys()
    mechanism = getattr(given.get("attention"), "func", None)
    if name in own:
        return f"{group}.{text}"
    if mechanism is not None and name in {option for call in calls_of(mechanism) for option in call.rules}:
        return f"attention.{text}"
    return text if text.startswith(group) else f"{group}: {text}"
