"""Every file under conf/ is composed by something, every key in it has a reader, and the wheel takes it along."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_class, get_object, instantiate
from omegaconf import OmegaConf

import attention_zoo as zoo
from attention_zoo.commands.work import register_all
from attention_zoo.contract import Attention
from attention_zoo.registry import options_of, recipe

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
GROUPED = [file for file in FILES if "/" in file]
ROOTS = [file for file in FILES if "/" not in file]

# a command makes its schema known to Hydra before anything is composed
register_all()


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        yield


def groups_of(root: str) -> list[str]:
    """Groups that a root config names in its defaults."""
    entries = OmegaConf.to_container(OmegaConf.load(CONF / f"{root}.yaml"))["defaults"]  # type: ignore[index,call-overload]
    names = [next(iter(entry)) for entry in entries if isinstance(entry, dict)]
    return [name for name in names if not name.startswith("override ")]


def values(composed: Any) -> dict[str, Any]:
    """Plain values, all interpolations of the file's own resolved."""
    found = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes_and_resolves(root: str) -> None:
    composed = compose(root, return_hydra_config=True)
    OmegaConf.to_container(composed, resolve=False, throw_on_missing=False)
    assert isinstance(composed.hydra.help.template, str)
    assert f"python -m experiments.{root}" in composed.hydra.help.template, "a newcomer wants to see the command"


@pytest.mark.parametrize("file", GROUPED)
def test_every_option_composes_with_each_root_that_has_its_group(file: str) -> None:
    group, _, name = file.rpartition("/")
    users = [root for root in ROOTS if group in groups_of(root)]
    assert users, f"no root config has the group {group}: conf/{file}.yaml is never composed"
    for root in users:
        composed = compose(root, overrides=[f"{group}={name}"])
        assert values(composed)


def targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every component in a config: what has a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}")


def components() -> list[Any]:
    found = []
    for file in GROUPED:
        loaded = OmegaConf.to_container(OmegaConf.load(CONF / f"{file}.yaml"), resolve=False)
        found += [pytest.param(node, id=path.removesuffix(".task")) for path, node in targets(loaded, file)]
    return found


@pytest.mark.parametrize("node", components())
def test_every_key_of_a_component_is_an_option_of_its_target(node: dict[str, Any]) -> None:
    """`**kwargs` reads nothing: a misspelt key must not pass through one."""
    target = get_object(node["_target_"])
    assert node.get("_partial_") is True, "components are partial: run-time values come from the skeleton"
    keys = {key for key in node if not key.startswith("_")}
    owners = [target, *target.__mro__] if isinstance(target, type) else [target]
    known = {
        name
        for owner in owners
        for name, parameter in inspect.signature(owner).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    assert keys <= known, f"{node['_target_']} has no option {', '.join(sorted(keys - known))}"


@pytest.mark.parametrize("name", [*zoo.available(), *zoo.wrappers()])
def test_every_attention_instantiates_as_the_skeleton_does(name: str) -> None:
    node = compose("train", overrides=[f"attention={name}"]).attention
    partial = instantiate(node)
    layer = partial(dim=16, heads=2, causal=recipe(name)[0].declared.causality != "none")
    assert isinstance(layer, get_class(node["_target_"]))
    assert isinstance(layer, Attention)
    hidden = layer(torch.randn(1, 5, 16)).hidden
    assert hidden.shape == (1, 5, 16)
    assert set(values(node)) - {"_target_", "_partial_"} <= set(options_of(name))


@pytest.mark.parametrize("root", ROOTS)
def test_a_misspelt_key_is_refused_by_name(root: str) -> None:
    with pytest.raises(Exception, match="nonesuch"):
        compose(root, overrides=["nonesuch=1"])


@pytest.mark.parametrize(
    ("root", "override"),
    [("train", "seq_len=abc"), ("train", "trainer.clip=much"), ("benchmark", "batch=two"), ("compare", "parallel=x")],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(root: str, override: str) -> None:
    with pytest.raises(Exception, match=override.partition("=")[2]) as caught:
        compose(root, overrides=[override])
    assert override.partition("=")[0].rpartition(".")[2] in str(caught.value)


def test_the_wheel_takes_every_folder() -> None:
    """Each folder of conf/ holds files that the package data patterns of pyproject.toml match."""
    setup = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-dir"]["attention_zoo.conf"] == "conf"
    patterns = setup["package-data"]["attention_zoo.conf"]
    taken = {path for pattern in patterns for path in CONF.glob(pattern)}
    assert taken == set(CONF.rglob("*.yaml"))
    folders = {path.parent for path in (CONF.parent / "attention_zoo").rglob("*.py")}
    moved = setup["package-dir"]
    named = {CONF.parent / moved.get(package, package.replace(".", "/")) for package in setup["packages"]}
    assert named - {CONF} == folders, "pyproject.toml must list each package"
