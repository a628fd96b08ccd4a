"""Random calls of every mechanism, each held to what it means: `python tests/random_calls.py --help`.

Options, layouts and lengths are drawn together, as nobody lists them: what a caller gets must be what `kernel=dense`
gives, what each document gives alone, and what its pieces give one after another with a state between them; in float64,
with gradients, NaN at padding and scores beyond 100. A seed and a mechanism make the same calls again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from launch_options import values_of
from recorded import NEWER, RECORDED
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens, Unsupported
from attention_zoo.contract import Attention
from attention_zoo.registry import abilities

MECHANISMS = [*RECORDED, *NEWER]
BEGIN: dict[str, dict[str, Any]] = {
    "adaptive_span": {"limit": 9, "ramp": 3, "start": 4.3},
    "bigbird": {"block": 4, "random": 1},
    "block_recurrent": {"window": 5, "states": 3},
    "compressive": {"segment_length": 5, "memory_length": 4, "compressed_length": 3, "ratio": 2},
    "h_transformer_1d": {"block": 4},
    "longformer": {"window": 4},
    "reformer": {"chunk": 4, "rounds": 2},
    "transformer_xl": {"segment_length": 5, "memory_length": 4},
}
"""Options that are changed: a few dozen tokens straddle every border."""
SIZES: dict[str, list[Any]] = {
    "block": [1, 2, 4, 5, 8, 24],
    "buckets": [2, 8, [2, 4]],
    "chunk": [1, 2, 4, 7, 32],
    "compressed_length": [1, 3, 32],
    "clamp_length": [2, 20],
    "dilation": [1, 2, [1, 2]],
    "extra_global_tokens": [0, 2],
    "fill": [0, 8],
    "head_width": [3, 8],
    "kv_heads": [1, 2],
    "limit": [1, 5, 40],
    "look_ahead": [0, 1],
    "look_back": [0, 1, 2],
    "memory_length": [0, 2, 7, 64],
    "ramp": [1, 3, 7],
    "random": [0, 1, 5],
    "ratio": [1, 2, 3],
    "rounds": [1, 2, 5],
    "segment_length": [1, 3, 8, 64],
    "sinks": [0, 1, 4],
    "start": [0.0, 2.3, 5.0],
    "states": [1, 4, 20],
    "truncate": [0, 1],
    "window": [1, 3, 5, 9, 40],
    "window_blocks": [1, 3],
}
"""In place of the numbers that are counted; spans end between tokens, where their ramp has a slope that says little."""
KERNELS = {"bigbird": "tiles", "full": "tiles", "longformer": "tiles", "reformer": "chunks"}
"""What runs long calls, which `auto` hardly takes for so few tokens: in a third of the calls."""
LENGTHS = 1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 70
PADDING = "none", "none", "holes", "left", "right", "short", "one long"
PIECES_DIFFER = {"reformer": "tokens that come later change how earlier ones are sorted"}
WHAT = "output", "gradient of the input", "gradient of a parameter"
CLOSE = 1e-9
"""Of the largest number, or of 1."""


@dataclass(frozen=True)
class Call:
    """What is given to a layer, and the weights of what it gives in a loss."""

    name: str
    options: dict[str, Any]
    heads: int
    x: Tensor
    tokens: Tokens
    weight: Tensor
    pieces: list[int]

    def __str__(self) -> str:
        valid, told = self.tokens.valid, {**self.options, "heads": self.heads}
        documents = [len(row[there].unique()) for row, there in zip(self.tokens.document, valid)]
        rows = ["".join(".#"[here] for here in row) for row in valid.tolist()]
        return f"{self.name} {told}, {documents} documents, {int(self.tokens.is_global.sum())} global, {rows}"

    def build(self, **options: Any) -> Attention:
        torch.manual_seed(7)
        layer = zoo.build(self.name, dim=self.x.shape[-1], heads=self.heads, **{**self.options, **options})
        layer = layer.double().eval()
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                if parameter.ndim < 2:  # biases begin at zero
                    g = torch.Generator().manual_seed(number)
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))
        return layer


def draw(rng: random.Random, name: str) -> Call:
    can, values, options = abilities()[name], values_of(name), dict(BEGIN.get(name, {}))
    for key in rng.sample(list(values), min(len(values), rng.choice((0, 1, 1, 2, 3, 4)))):
        words = isinstance(values[key][0], (bool, str))
        options[key] = rng.choice(values[key] if words else SIZES.get(key, values[key]))
    if name in KERNELS and rng.random() < 1 / 3:
        options["kernel"] = KERNELS[name]
    options.setdefault("causal", rng.random() < 0.6 or not can.two_sided)
    heads, rows, length = rng.choice((2, 4)), rng.choice((1, 1, 2, 3)), rng.choice(LENGTHS)
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    valid = _valid(rng.choice(PADDING), rows, length, g)
    documents = rng.choice((1, 1, 2, 5))
    begins = torch.rand(rows, length, generator=g) < (documents - 1) / length
    marked = can.global_tokens != "none" and rng.random() < 0.3
    is_global = (torch.rand(rows, length, generator=g) < 0.15) & valid if marked else None
    x = torch.randn(rows, length, 8 * heads, generator=g, dtype=torch.float64) * rng.choice((1, 1, 30))
    weight = torch.randn(int(valid.sum()), 8 * heads, generator=g, dtype=torch.float64)
    pieces = [0]
    while pieces[-1] < length:
        pieces.append(min(length, pieces[-1] + rng.choice((1, 1, 2, 5, length))))
    tokens = Tokens.of(valid, is_global, begins.long().cumsum(1) if documents > 1 else None)
    return Call(name, options, heads, x.masked_fill(~valid[..., None], torch.nan), tokens, weight, pieces)


def _valid(padding: str, rows: int, length: int, g: torch.Generator) -> Tensor:
    column = torch.arange(length)
    if padding == "none":
        return torch.ones(rows, length, dtype=torch.bool)
    if padding == "holes":
        return torch.rand(rows, length, generator=g) < 0.6
    if padding == "short":
        return (torch.rand(rows, length, generator=g) < 0.9) & (column < length // 2 + 1)
    count = torch.randint(1, length + 1, (rows, 1), generator=g)
    if padding == "one long":
        count = torch.cat([torch.tensor([[length]]), count[1:] // 4 + 1])
    return column >= length - count if padding == "left" else column < count


def differences(call: Call) -> Iterator[str]:
    """Where the call gives something else than it means.

    Raises:
        Unsupported, ValueError, TypeError: where the layer cannot be built, or does not take such tokens.
    """
    layer = call.build()
    ours, valid = _gradients(layer, call), call.tokens.valid
    if not all(each.isfinite().all() for each in ours):
        yield "what stands at padding gets in"
    try:
        defined = _gradients(call.build(kernel="dense"), call)
    except (Unsupported, ValueError):  # no such kernel, or it does not take this
        defined = []
    for number, (one, other) in enumerate(zip(ours, defined)):
        if not _close(one, other):
            yield f"kernel=dense gives another {WHAT[min(number, 2)]}"
            break
    with torch.no_grad():
        whole = layer(call.x, call.tokens).hidden
        if any(not _close(whole[row, at], alone) for row, at, alone in _documents(layer, call)):
            yield "a document alone gives another output"
        state = layer.abilities.state != "none" and layer.causal and not call.tokens.is_global.any()
        if state and call.name not in PIECES_DIFFER and not _close(_in_pieces(layer, call)[valid], whole[valid]):
            yield "pieces give another output"


def _close(one: Tensor, other: Tensor) -> bool:
    most = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    return not one.numel() or float((one - other).abs().max()) <= CLOSE * most


def _gradients(layer: Attention, call: Call) -> list[Tensor]:
    """The output and the gradients of the input and of the parameters."""
    x, valid = call.x.clone().requires_grad_(), call.tokens.valid
    hidden = layer(x, call.tokens).hidden[valid]
    leaves = [x, *layer.parameters()]
    dx, *others = torch.autograd.grad((hidden * call.weight).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [hidden.detach(), dx[valid], *others]


def _documents(layer: Attention, call: Call) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Row and columns of each, and what it gives alone."""
    tokens = call.tokens
    for row in range(len(call.x)):
        for document in tokens.document[row][tokens.valid[row]].unique():
            at = (tokens.valid[row] & (tokens.document[row] == document)).nonzero()[:, 0]
            there = torch.ones(1, len(at), dtype=torch.bool)
            alone = Tokens.of(there, tokens.is_global[row, at][None] if tokens.is_global.any() else None)
            yield row, at, layer(call.x[row, at][None], alone).hidden[0]


def _in_pieces(layer: Attention, call: Call) -> Tensor:
    state, found = layer.initial_state(len(call.x)), []
    for start, stop in zip(call.pieces, call.pieces[1:]):
        tokens = Tokens(*(field[:, start:stop] for field in call.tokens))
        out = layer(call.x[:, start:stop], tokens, state=state)
        state = out.state
        found.append(out.hidden)
    return torch.cat(found, 1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/random_calls.py", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--seconds", type=_seconds, default=60.0, help="how long (default 60)")
    parser.add_argument("--only", nargs="*", choices=MECHANISMS, default=MECHANISMS, help="mechanisms")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng, counts, wrong = random.Random(given.seed), Counter[str](), 0
    until = time.monotonic() + given.seconds
    while time.monotonic() < until:
        call = draw(rng, rng.choice(given.only))
        try:
            found = list(differences(call))
        except (Unsupported, ValueError):
            counts["refused"] += 1
            continue
        counts[call.name] += 1
        for each in found:
            wrong += 1
            print(f"{each}: {call}")
    print(dict(counts), f"{wrong} differences")
    return bool(wrong) or not counts.total() - counts["refused"]


def _seconds(word: str) -> float:
    if not 0 < (found := float(word)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {word}")
    return found


if __name__ == "__main__":
    sys.exit(main())
