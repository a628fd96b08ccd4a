"""Write on from a prompt with a trained model.

    python -m experiments.generate runs/text-full-1a2b3c4d5e6f7081 "def main(" --steps 200

Options are plain flags, unlike the other commands': a prompt is full of what Hydra's override grammar reserves.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import attention_zoo as zoo
from attention_zoo.model.generate import stream


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a finished run, or a file written by zoo.save")
    parser.add_argument("prompt", help="text to go on from; - reads standard input")
    parser.add_argument("--steps", type=int, default=200, help="bytes to write (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k most likely; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw among those that reach p together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill-chunk", type=int, default=None, help="tokens of the prompt read at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    path = given.model / "model.safetensors" if given.model.is_dir() else given.model
    prompt = (sys.stdin.buffer.read() if given.prompt == "-" else given.prompt.encode()) or b"\n"
    try:
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
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print((prompt + bytes(text)).decode(errors="replace"))
    report = f"prefill: {len(prompt):,} tokens, {len(prompt) / (first - start):,.0f} tokens/s"
    if len(text) > 1:
        report += f"; decode: {len(text) - 1:,} tokens, {(len(text) - 1) / (end - first):,.1f} tokens/s"
    print(report, file=sys.stderr)


if __name__ == "__main__":
    main()
