"""What the command `inspect` does: trained runs and a text in, attention.json, attention.png and attention.html out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attention_zoo.files import plain, read_json, write_atomic
from attention_zoo.inspect.figures import figures
from attention_zoo.inspect.given import folders_of
from attention_zoo.inspect.picture import png, section
from attention_zoo.inspect.probe import calls_of
from attention_zoo.model.saved import load
from attention_zoo.options import Natural, Positive, Text, check_fields
from attention_zoo.schemas import store
from attention_zoo.tracking import Guarded, RunInfo
from attention_zoo.tracking.naming import run_name
from attention_zoo.tracking.tables import heat_map
from attention_zoo.training.building import build
from attention_zoo.training.config import check_tracker


@dataclass
class InspectConfig:
    """conf/inspect.yaml.

    Fields:
        run: folder of a finished run, or a list of them to be compared.
        text: what they read, or @FILE.
        target: of an encoder and a decoder, what the latter has written of it so far, or @FILE; "": the encoder alone.
        ids: whether text and target are numbers of tokens, "5 0 17", as tasks of other vocabularies have them, not
            bytes.
        window: tokens beyond which a token counts as far.
        sinks: first tokens that count as sinks.
        blocks: at most so many on each side of the pooled weights.
        exact: up to so many tokens are asked one by one; see `figures`.
        tracker: which of conf/tracker gets the weights as pictures, in a run of their own; null: none.
        output: folder of the files; null: the first run's.
    """

    run: Any = field(default_factory=list)
    text: Text = ""
    target: Text = ""
    ids: bool = False
    window: Positive = 64
    sinks: Natural = 4
    blocks: Positive = 64
    exact: Natural = 2048
    tracker: Any = None
    output: Text | None = None


def register() -> None:
    """Make the schema known to Hydra, which conf/inspect.yaml names first."""
    store("inspect_schema", InspectConfig)


def inspect(config: InspectConfig) -> Path:
    """Inspect; returns the path of attention.json.

    Raises:
        ValueError: for no run or text, tokens that a model does not know, or a mechanism whose weights cannot be asked
            for.
        OSError: for a file that cannot be read or written, naming it.
    """
    check_fields(InspectConfig, config)
    if config.tracker:
        check_tracker(config.tracker)
    folders = folders_of(config.run)
    text, said = _read("text", config.text, config.ids)
    if not text:
        raise ValueError("text must be at least one token, or @FILE, got none")
    target, _ = _read("target", config.target, config.ids)
    runs = [_of(folder, text, target, config) for folder in folders]
    output = folders[0] if config.output is None else Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    sizes = {"window": config.window, "sinks": config.sinks, "tokens": len(text)}
    found = {"kind": "attention", "text": said, **sizes, "runs": runs}
    picture = png(runs)
    write_atomic(output / "attention.png", picture)
    write_atomic(output / "attention.html", section(runs, picture))
    path = write_atomic(output / "attention.json", json.dumps(plain(found), allow_nan=False))
    if config.tracker:
        _send(found, output, config.tracker)
    return path


def _send(found: Mapping[str, Any], output: Path, tracker: Mapping[str, Any]) -> None:
    """Show the weights in a dashboard; the same runs and text give the same run there."""
    names = [run["name"] for run in found["runs"]]
    identity = hashlib.sha256(json.dumps([names, found["text"], found["tokens"]]).encode()).hexdigest()[:16]
    name = run_name("attention", *names, identity=identity)
    facts, whole = {"task": "attention"}, {"whole": True, "rest": True}
    info = RunInfo(output, name, identity, "attention", output.name, {"runs": names}, print, facts, **whole)
    follower = Guarded(build(tracker, "tracker", info=info), info.notice)
    for title, figure in attention_figures(found):
        follower.figure(title, figure)
    follower.finish(failed=False)


def attention_figures(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A picture of what each head attends to, with its name in a dashboard.

    Args:
        found: what attention.json holds.
    """
    for run in found["runs"]:
        for layer in run["layers"]:
            for head, blocks in enumerate(layer["blocks"]):
                title = f"{run['name']} {layer['layer']} head {head}"
                yield f"attention/{title.replace(' ', '_')}", heat_map(blocks, title=title)


def _read(name: str, given: str, as_ids: bool) -> tuple[list[int], str]:
    """The tokens of a text or a file, and how it begins."""
    text = Path(given[1:]).read_bytes() if given.startswith("@") else given.encode()
    start = text[:200].decode(errors="replace")
    if not as_ids:
        return list(text), start
    words = text.split()
    if wrong := [word for word in words if not word.isdigit()]:
        raise ValueError(f"{name} must be numbers of tokens where ids=true, got {wrong[0].decode(errors='replace')!r}")
    return [int(word) for word in words], start


def _of(folder: Path, text: list[int], target: list[int], config: InspectConfig) -> dict[str, Any]:
    model: Any = load(folder)
    for name, ids, reader in (("text", text, getattr(model, "encoder", model)), ("target", target, model)):
        if not config.ids and ids and reader.vocab != 256:
            raise ValueError(f"{folder}: {name} of bytes is for a model over them (task=text), got one of "
                             f"{reader.vocab} tokens; ids=true takes their numbers")  # fmt: skip
        if max(ids, default=0) >= reader.vocab:
            raise ValueError(f"{name} must be of tokens below {reader.vocab} for {folder}, got {max(ids)}")
    row = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
    how = {"window": config.window, "sinks": config.sinks, "blocks": config.blocks, "exact": config.exact}
    given = torch.tensor([text]), torch.tensor([target]) if target else None
    layers = [figures(call, **how) for call in calls_of(model, *given)]
    return {"name": folder.name, "backend": row.get("backend"), "id": row.get("id"), "layers": layers}
