"""Steps of decoding beside Hugging Face's Mistral of the same size, in turns: `python -m tests.speed.steps --help`.

Models of two layers with rotary positions (Transformer-XL and Reformer: their own, or none), Mistral with a window that
is as wide as our reach. A prompt of one row is read once, and its state copied to all rows of a batch: what a row holds
does not move the time. A row is kept of each setting: the median of ours over theirs, step by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attention_zoo as zoo
from attention_zoo.measure.environment import environment
from attention_zoo.model.state import reorder

REACH = {"longformer": 257, "bigbird": 256, "transformer_xl": 1024, "reformer": 512}
"""Mistral's window for each."""
WARM = 4
"""Steps of each side that do not count."""


def ours(name: str, dim: int) -> zoo.Transformer:
    positions = "none" if name in ("transformer_xl", "reformer") else "rotary"
    feed_forward = {"name": "swiglu", "width": 4 * dim}
    model = zoo.Transformer(
        attention=name, vocab=256, dim=dim, depth=2, heads=dim // 64, positions=positions, norm="rms",
        feed_forward=feed_forward,
    )  # fmt: skip
    return model.eval()


def theirs(dim: int, window: int) -> Any:
    import transformers

    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=2, num_attention_heads=dim // 64,
        num_key_value_heads=dim // 64, sliding_window=window, max_position_embeddings=1 << 15,
        attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def our_step(model: zoo.Transformer, prompt: torch.Tensor, batch: int) -> Callable[[], None]:
    """One more token for each of so many rows behind the prompt [1, S]."""
    state = model.initial_state(1)
    for some in prompt.split(2048, 1):
        state = model(some, state=state).state
    state, token = reorder(state, torch.zeros(batch, dtype=torch.long)), torch.ones(batch, 1, dtype=torch.long)

    def step() -> None:
        nonlocal state
        state = model(token, state=state).state

    return step


def their_step(model: Any, prompt: torch.Tensor, batch: int) -> Callable[[], None]:
    cache = model(prompt[:, -2048:], use_cache=True).past_key_values  # no more than its window is held
    cache.batch_repeat_interleave(batch)
    token = torch.ones(batch, 1, dtype=torch.long)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    return step


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def beside(first: Callable[[], None], second: Callable[[], None], steps: int) -> dict[str, float]:
    """Seconds of both, in turns, and how many times the second's the first takes."""
    pairs = [(timed(first), timed(second)) for _ in range(WARM + steps)][WARM:]
    a, b = zip(*pairs)
    ratio = statistics.median(x / y for x, y in pairs)
    return {"seconds": statistics.median(a), "peer_seconds": statistics.median(b), "ratio": round(ratio, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.speed.steps", description=__doc__.partition(":")[0])
    parser.add_argument("--only", nargs="*", choices=REACH, default=list(REACH), help="mechanisms")
    parser.add_argument("--dims", nargs="*", type=int, default=[512, 1024], help="widths, heads of 64 each")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 8, 32])
    parser.add_argument("--states", nargs="*", type=int, default=[16, 1024, 8192], help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=40, help="of each side that count (default 40)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--output", type=Path, help="JSONL of all rows, behind the environment")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    out = given.output.open("w") if given.output else None
    if out:
        print(json.dumps({"command": sys.orig_argv[1:], "environment": environment()}), file=out)
    with torch.no_grad():
        for dim in given.dims:
            for name in given.only:
                mine, peer = ours(name, dim), theirs(dim, REACH[name])
                for state in given.states:
                    prompt = torch.randint(0, 256, (1, state))
                    for batch in given.batches:
                        steps = our_step(mine, prompt, batch), their_step(peer, prompt, batch)
                        setting = {"mechanism": name, "dim": dim, "batch": batch, "state": state}
                        row = {**setting, **beside(*steps, given.steps)}
                        print(json.dumps(row), file=out or sys.stdout, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
