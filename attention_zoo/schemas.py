"""Schemas of configurations, made known to Hydra so that a mapping of free keys takes any form of override."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf


def store(name: str, schema: type) -> None:
    """Make a dataclass known to Hydra as the first default of a root config.

    Its fields of plain mappings (`dict[str, Any]`: options of a mechanism, which this schema cannot know) take new keys
    in each way that Hydra writes them: `options={longformer: {window: 128}}`, `options.longformer.window=128`, and
    with a leading +. Every other key stays guarded.
    """
    node = OmegaConf.structured(schema)
    _open(node)
    ConfigStore.instance().store(name=name, node=node)


def _open(node: DictConfig) -> None:
    for key in node:
        inner = node._get_node(key)
        if not isinstance(inner, DictConfig) or inner._is_missing() or inner._is_none():
            continue
        if OmegaConf.get_type(inner) is dict:
            if not _holds_schemas(inner):
                OmegaConf.set_struct(inner, False)
        else:
            _open(inner)


def _holds_schemas(node: DictConfig) -> bool:
    """Whether its values are of a schema themselves, whose names a slip of the pen must not add to."""
    return hasattr(node._metadata.element_type, "__dataclass_fields__")
