"""The weights of several runs as one picture, a row a layer and a column a head, and as a small page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

SIDE, GAP, TITLE = 160, 12, 14
FIGURES = ("distance", "entropy", "outside", "sinks", "mass", "share")


def png(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG file; darker is more, to the power 1/2, each head by its own largest weight.

    Raises:
        ModuleNotFoundError: without Pillow, saying what to install.
    """
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures of attention need Pillow: pip install pillow") from error
    lines = [(run["name"], layer) for run in runs for layer in run["layers"]]
    widest = max(len(layer["blocks"]) for _, layer in lines)
    image = Image.new("L", (GAP + widest * (SIDE + GAP), GAP + len(lines) * (SIDE + TITLE + GAP)), 255)
    draw = ImageDraw.Draw(image)
    for row, (name, layer) in enumerate(lines):
        top = GAP + row * (SIDE + TITLE + GAP)
        draw.text((GAP, top), f"{name}: {layer['layer']}".encode("ascii", "replace").decode(), fill=0)
        for column, blocks in enumerate(layer["blocks"]):
            peak = max(map(max, blocks)) or 1.0
            shades = bytes(255 - round(255 * max(0.0, cell / peak) ** 0.5) for line in blocks for cell in line)
            small = Image.frombytes("L", (len(blocks[0]), len(blocks)), shades)
            place = GAP + column * (SIDE + GAP), top + TITLE
            image.paste(small.resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
            draw.rectangle((*place, place[0] + SIDE, place[1] + SIDE), outline=128)
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()


def section(runs: Sequence[Mapping[str, Any]], picture: bytes) -> str:
    """A section of HTML: the picture, and a row of figures for each head."""
    head = "".join(f"<th>{name}</th>" for name in ("run", "layer", "head", *FIGURES))
    body = "".join(
        f"<tr><td>{html.escape(run['name'])}</td><td>{html.escape(layer['layer'])}</td><td>{number}</td>"
        + "".join(f"<td>{_said(layer[name], number)}</td>" for name in FIGURES)
        + "</tr>\n"
        for run in runs
        for layer in run["layers"]
        for number in range(len(layer["blocks"]))
    )
    data = base64.b64encode(picture).decode()
    return (
        f'<section id="attention"><h2>What each head attends to</h2>\n<img alt="weights in blocks, queries down, '
        f'keys across" src="data:image/png;base64,{data}">\n<table><tr>{head}</tr>\n{body}</table></section>\n'
    )


def _said(values: Sequence[float] | None, head: int) -> str:
    return "–" if values is None else f"{values[head]:.3f}"
