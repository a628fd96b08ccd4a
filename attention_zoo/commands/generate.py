"""Write on from a prompt with a trained model.

    attention-zoo generate runs/text-full-1a2b3c4d5e6f7081 "def main(" --steps 200
    attention-zoo generate runs/text-full-1a2b3c4d5e6f7081 "def main(" --beams 4
    attention-zoo generate runs/an-encoder-decoder-of-bytes "" --source "what its encoder reads"

Options are plain flags, unlike the other commands': a prompt is full of what Hydra's override grammar reserves.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo.commands.flags import Flags
from attention_zoo.measure.environment import device_name
from attention_zoo.model.generate import stream


def run(words: Sequence[str], program: str) -> None:
    """Write the prompt and what follows it to standard output, and how fast that went to standard error.

    Args:
        words: of the command line, after the command.
        program: how the command was called, for its help.

    Raises:
        ValueError: for a flag or value that is not understood, or a model that does not write bytes.
        OSError: for a file that cannot be read.
    """
    parser = Flags(prog=program, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a finished run, or a file written by zoo.save")
    parser.add_argument("prompt", help="text to go on from; - reads standard input")
    parser.add_argument("--steps", type=int, default=200, help="bytes to write (default 200)")
    parser.add_argument("--source", help="text for the encoder of a model that has one")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="draw among the k most likely; 0: all (default)")
    parser.add_argument("--top-p", type=float, help="draw among those that reach p together (default 0.95)")
    parser.add_argument("--seed", type=int, help="of the draws (default 0)")
    parser.add_argument(
        "--beams", type=int, default=1, help="above 1: search over so many texts, draw none (default 1)"
    )
    parser.add_argument("--length-penalty", type=float, help="power of the length that a sum is divided by (default 1)")
    parser.add_argument("--eos", type=int, help="byte that ends a text (default: none does)")
    parser.add_argument("--prefill-chunk", type=int, default=None, help="tokens of the prompt read at once (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    given = parser.parse_args(words)
    device_name(given.device)  # refuses one that is not there
    path = given.model / "model.safetensors" if given.model.is_dir() else given.model
    # a prompt is bytes: what the shell gave, whether or not they are UTF-8
    prompt = (sys.stdin.buffer.read() if given.prompt == "-" else os.fsencode(given.prompt)) or b"\n"
    model = zoo.load(path, device=given.device)
    if getattr(model, "vocab", None) != 256:
        raise ValueError(f"{path}: generate writes bytes and needs a model over them (task=text)")
    if given.eos is not None and not 0 <= given.eos < 256:
        raise ValueError(f"--eos must be a byte, 0 to 255, got {given.eos}")
    ids = torch.tensor([list(prompt)], device=given.device)
    options = {"steps": given.steps, "eos": given.eos, "cached": model.carries, "prefill_chunk": given.prefill_chunk}
    options |= {"source": _source(model, given.source), **_choosing(given)}
    start = time.perf_counter()
    if given.beams == 1:
        tokens = stream(model, ids, **options)
        text = [int(next(tokens))]
        first = time.perf_counter()
        text += [int(token) for token in tokens]
        end = time.perf_counter()
        report = f"prefill: {len(prompt):,} tokens, {len(prompt) / (first - start):,.0f} tokens/s"
        if len(text) > 1:
            report += f"; decode: {len(text) - 1:,} tokens, {(len(text) - 1) / (end - first):,.1f} tokens/s"
    else:
        text = zoo.generate(model, ids, **options)[0].tolist()
        rate = len(text) / (time.perf_counter() - start)
        report = f"search: {len(text):,} tokens of the best of {given.beams} texts, {rate:,.1f} tokens/s"
    print((prompt + bytes(text)).decode(errors="replace"))
    print(report, file=sys.stderr)


def _choosing(given: Namespace) -> dict[str, Any]:
    """Options that say how each byte is chosen: those that were given, and what such a way takes by default."""
    drawing = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p, "seed": given.seed}
    said = {name: value for name, value in drawing.items() if value is not None}
    search = {} if given.length_penalty is None else {"length_penalty": given.length_penalty}
    if given.beams != 1:
        return {"beams": given.beams, **search, **said}
    if search:
        raise ValueError("--length-penalty needs --beams above 1")
    if given.temperature == 0:
        return {"greedy": True, "seed": given.seed or 0}
    return {"temperature": 0.8, "top_p": 0.95, **said}


def _source(model: Any, text: str | None) -> Tensor | None:
    """What the encoder reads, if there is one."""
    encoder = getattr(model, "encoder", None)
    if (encoder is None) != (text is None):
        raise ValueError("--source is for a model with an encoder, which needs one")
    if encoder is None or text is None:
        return None
    if encoder.vocab != 256 or not text:
        raise ValueError("--source must be text of at least one byte, for an encoder that reads bytes")
    return torch.tensor([list(os.fsencode(text))], device=encoder.embedding.weight.device)
