"""Name -> class and default options. A backend is one yaml in conf/attention/ and the class that it targets.

Third parties add theirs through the entry-point group `attention_zoo.backends`: each entry point names the backend and
loads either the class itself (its defaults are the constructor's) or a mapping in the form of our yaml.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from typing import Any

from omegaconf import OmegaConf

from attention_zoo.contract import Attention, Unsupported

GROUP = "attention_zoo.backends"


def available() -> tuple[str, ...]:
    """Names of all backends, shipped and third-party, sorted."""
    shipped = _shipped()
    foreign = {point.name for point in metadata.entry_points(group=GROUP)}
    return tuple(sorted({*shipped, *foreign}))


@cache
def _shipped() -> tuple[str, ...]:
    folder = resources.files("attention_zoo.conf").joinpath("attention")
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def recipe(name: str) -> tuple[type[Attention], dict[str, Any]]:
    """The class of a backend and its default options.

    Args:
        name: one of `available()`, or "backend.part": a layer that models of a backend mix in and that is none by
            itself, from the backend's `companions`.

    Raises:
        ValueError: for an unknown name, listing the known ones and the nearest.
    """
    backend, _, part = name.partition(".")
    if part and backend in available() and part in (companions := recipe(backend)[0].companions):
        module, _, attribute = companions[part].rpartition(".")
        return _checked(getattr(importlib.import_module(module), attribute), name), {}
    if name in _shipped():
        text = resources.files("attention_zoo.conf").joinpath("attention", f"{name}.yaml").read_text()
        return _split(OmegaConf.to_container(OmegaConf.create(text)), name)
    for point in metadata.entry_points(group=GROUP):
        if point.name == name:
            loaded = point.load()
            return _split(loaded, name) if isinstance(loaded, Mapping) else (_checked(loaded, name), {})
    near = difflib.get_close_matches(name, available(), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"attention must be one of {', '.join(available())}, got {name!r}{hint}")


def _split(entry: Any, name: str) -> tuple[type[Attention], dict[str, Any]]:
    options = {key: value for key, value in entry.items() if key not in ("_target_", "_partial_")}
    module, _, attribute = entry["_target_"].rpartition(".")
    return _checked(getattr(importlib.import_module(module), attribute), name), options


def _checked(found: Any, name: str) -> type[Attention]:
    if not (isinstance(found, type) and issubclass(found, Attention)):
        raise ValueError(f"backend {name!r} must be a subclass of attention_zoo.contract.Attention, got {found!r}")
    return found


def options_of(name: str) -> dict[str, Any]:
    """Every option that `build(name)` takes, with its default; `inspect.Parameter.empty` where it must be given."""
    cls, defaults = recipe(name)
    found: dict[str, Any] = {}
    for owner in (Attention, *reversed(cls.__mro__[: cls.__mro__.index(Attention)])):
        for key, parameter in inspect.signature(owner).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found[key] = parameter.default
    return {**found, **defaults}


def third_party() -> dict[str, dict[str, Any]]:
    """For each backend of another package what our yaml says of our own: target and own options with defaults.

    One that cannot be loaded is warned of and left out: it must not stop the others.
    """
    shared = inspect.signature(Attention).parameters
    found: dict[str, dict[str, Any]] = {}
    for point in metadata.entry_points(group=GROUP):
        try:
            cls, _ = recipe(point.name)
        except Exception as error:
            warnings.warn(f"backend {point.name!r} ({point.value}) cannot be loaded: {error}", stacklevel=2)
            continue
        own = {key: value for key, value in options_of(point.name).items() if key not in shared}
        given = {key: value for key, value in own.items() if value is not inspect.Parameter.empty}
        found[point.name] = {"_target_": f"{cls.__module__}.{cls.__qualname__}", "_partial_": True, **given}
    return found


def build(name: str, *, dim: int, heads: int, causal: bool = True, **options: Any) -> Attention:
    """Build one attention layer.

        layer = build("longformer", dim=512, heads=8, causal=True, window=256)
        hidden = layer(x).hidden            # [B, L, 512]

    Args:
        name: one of `available()`.
        dim: model width E.
        heads: number of heads H.
        causal: whether tokens see only the past.
        options: the mechanism's own; defaults are those of conf/attention/<name>.yaml.

    Raises:
        ValueError: for an unknown name or option, or a value outside its rule.
        Unsupported: for what the mechanism does not declare.
    """
    cls, defaults = recipe(name)
    known = options_of(name)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Unsupported(name, f"option {key}", f"it has no such option{hint}", ", ".join(sorted(known)))
    return cls(dim=dim, heads=heads, causal=causal, **{**defaults, **options})
