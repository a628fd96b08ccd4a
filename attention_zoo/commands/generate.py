"""Write on from a prompt with a trained model.

    attention-zoo generate runs/text-full-1a2b3c4d5e6f7081 "def main(" --steps 200

Options are plain flags, unlike the other commands': a prompt is full of what Hydra's override grammar reserves.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

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
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k most likely; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw among those that reach p together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
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
    ids = torch.tensor([list(prompt)], device=given.device)
    greedy = given.temperature == 0
    tokens = stream(
        model,
        ids,
        steps=given.steps,
        greedy=greedy,
        temperature=1.0 if greedy else given.temperature,
        top_k=0 if greedy else given.top_k,
        top_p=1.0 if greedy else given.top_p,
        seed=given.seed,
        cached=model.carries,
        prefill_chunk=given.prefill_chunk,
    )
    start = time.perf_counter()
    text = [int(next(tokens))]
    first = time.perf_counter()
    text += [int(token) for token in tokens]
    end = time.perf_counter()
    print((prompt + bytes(text)).decode(errors="replace"))
    report = f"prefill: {len(prompt):,} tokens, {len(prompt) / (first - start):,.0f} tokens/s"
    if len(text) > 1:
        report += f"; decode: {len(text) - 1:,} tokens, {(len(text) - 1) / (end - first):,.1f} tokens/s"
    print(report, file=sys.stderr)
