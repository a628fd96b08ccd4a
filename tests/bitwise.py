"""Digests of what every recorded mechanism computes, case by case, and their comparison with those of another commit.

    python -m tests.bitwise --against COMMIT         # both in the same process settings, on this machine
    python -m tests.bitwise --only longformer steps  # cases whose names hold one of the words

Outputs, choices and gradients are held against each other bit for bit; -0 counts as 0. The other commit is checked out
into a temporary folder and run by the same interpreter, with one thread. What a backend refuses is compared as
refused, not by its words. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attention_zoo as zoo

ROOT = Path(__file__).parents[1]
BACKENDS: dict[str, list[dict[str, Any]]] = {
    "full": [{}, {"positions": "alibi", "kv_heads": 2}, {"positions": "rotary"}],
    "longformer": [
        {"window": 16},
        {"window": 8, "dilation": [1, 1, 2, 3]},
        {"window": 16, "dilation": 2, "positions": "rotary", "kv_heads": 2},
        {"window": 7, "positions": "alibi", "global_projections": "shared"},
        {"window": 600},
    ],
    "bigbird": [
        {"block": 16},
        {"block": 8, "random": 2, "positions": "alibi", "kv_heads": 2},
        {"block": 16, "window_blocks": 5, "random": 0},
        {"block": 16, "plan": "reference"},
        {"block": 16, "plan": "reference_eval"},
    ],
    "reformer": [
        {"chunk": 16},
        {"chunk": 8, "rounds": 2, "attend_across_buckets": False, "correct_duplicates": True},
        {"chunk": 16, "wrap": "reference", "look_ahead": 1},
        {"chunk": 16, "fill": 32},
    ],
    "transformer_xl": [
        {"segment_length": 32, "memory_length": 48},
        {"segment_length": 16, "memory_length": 40, "same_length": True},
        {"segment_length": 32, "memory_length": 16, "initial_memory": "zeros", "clamp_length": 20},
    ],
}
KERNELS = {
    "full": ["auto", "tiles", "sdpa", "dense"],
    "longformer": ["auto", "short", "sdpa", "banded", "tiles", "dense"],
    "bigbird": ["auto", "short", "blocks", "tiles", "dense"],
    "reformer": ["auto", "chunks", "dense"],
    "transformer_xl": ["auto", "shift", "gather"],
}
LENGTHS = [1, 15, 16, 67, 131, 517]
Run = Callable[[], str]
Given = tuple[Tensor | None, ...] | None


def local() -> Any:
    from attention_zoo.attention.reformer_local import ReformerLocal

    return ReformerLocal


def layouts(L: int, B: int = 3) -> Iterator[tuple[str, Any]]:
    yield "none", None
    valid, column = torch.ones(B, L, dtype=torch.bool), torch.arange(L)
    kept = torch.tensor([[L], [-(-2 * L // 3)], [-(-L // 4)]])
    holes = valid.clone()
    holes[0, 1::3] = False
    holes[1, L // 2 :: 2] = False
    document = column[None] // torch.tensor([[max(1, L // 2)], [max(1, L // 5)], [L]])
    flags = torch.rand(B, L, generator=torch.Generator().manual_seed(3)) < 0.06
    first = torch.zeros_like(valid)
    first[:, 0] = True
    yield "all", (valid,)
    yield "right", (column < kept,)
    yield "left", (column >= L - kept,)
    yield "left alike", ((column >= L // 3).expand(B, L).clone(),)
    yield "holes", (holes,)
    yield "packed", (valid, None, document)
    yield "packed alike", (valid, None, document[1:2].expand(B, L).clone())
    yield "short documents", (valid, None, (column // 3).expand(B, L).clone())
    yield "packed left", (column >= L - kept, None, document)
    yield "first global", (valid, first)
    yield "global", (valid, flags)
    yield "global right", (column < kept, flags)
    yield "global holes packed", (holes, flags, document)
    empty = column < kept
    empty[1] = False
    yield "empty row", (empty,)
    yield "start", (valid, None, None, torch.tensor([0, 5, 70]))


def seeded(module: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """Parameters as functions of their names' ends and order, whatever the constructor draws."""
    seen: dict[str, int] = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            end = ".".join(name.split(".")[-2:])
            number = seen[end] = seen.get(end, 0) + 1
            seed = int.from_bytes(hashlib.sha256(f"{end}{number}".encode()).digest()[:6], "big")
            new = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            p.copy_(
                new * (scale * 2 / max(1, p.shape[-1]) ** 0.5 if p.ndim > 1 else 0.2)
                + (1 if p.ndim == 1 and "norm" in name and "weight" in name else 0)
            )
    return module


def digest(*tensors: Tensor | None) -> str:
    h = hashlib.sha256()
    for t in tensors:
        if t is None:
            h.update(b"none")
        else:
            t = t.detach().contiguous()
            t = torch.where(t == 0, torch.zeros_like(t), t) if t.is_floating_point() else t
            h.update(
                str((t.dtype, tuple(t.shape))).encode() + t.view(torch.uint8).numpy().tobytes()
                if t.numel() and t.ndim
                else str(t.tolist()).encode()
            )
    return h.hexdigest()[:16]


def attempt(f: Callable[[], str]) -> str:
    try:
        return f()
    except ValueError as error:
        return f"refused: {type(error).__name__}"


def call(layer: Any, L: int, given: Any, dtype: torch.dtype, train: bool) -> str:
    x = (
        torch.randn(3, L, 32, generator=torch.Generator().manual_seed(L), dtype=torch.float64)
        .to(dtype)
        .requires_grad_(train)
    )
    tokens = None if given is None else zoo.Tokens.of(*given)
    torch.manual_seed(5)
    with torch.set_grad_enabled(train):
        out = layer(x, tokens)
    grads: list[Any] = []
    if train:
        weight = torch.randn(out.hidden.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(
            dtype
        )
        if tokens is not None:
            weight = weight * tokens.valid[..., None]
        names = [p for _, p in sorted(layer.named_parameters())]
        if out.hidden.requires_grad:
            grads = list(torch.autograd.grad((out.hidden * weight).sum(), [x, *names], allow_unused=True))
    return digest(out.hidden, out.choices, *grads)


def steps(layer: Any, L: int, given: Any, cuts: list[int], train: bool) -> str:
    from attention_zoo.testing.case import piece

    x = torch.randn(3, L, 32, generator=torch.Generator().manual_seed(L))
    tokens = zoo.Tokens.all_valid(3, L) if given is None else zoo.Tokens.of(*given)
    state, outs = layer.initial_state(3), []
    with torch.set_grad_enabled(train):
        for a, b in zip([0, *cuts], [*cuts, L]):
            out = layer(x[:, a:b], piece(tokens, a, b), state=state)
            state = out.state
            outs.append(out.hidden)
    return digest(*outs)


def build(name: str, **options: Any) -> Any:
    if name == "reformer.local":
        return local()(dim=32, heads=4, **options)
    return zoo.build(name, dim=32, heads=4, **options)


def layer_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    many = {
        **BACKENDS,
        "reformer.local": [{"chunk": 16}, {"chunk": 8, "look_ahead": 1}, {"chunk": 8, "look_ahead": 1, "fill": 16}],
    }
    kernels = {**KERNELS, "reformer.local": ["auto", "tiles", "dense"]}
    for name, variants in many.items():
        for options, causal in itertools.product(variants, (True, False)):
            for kernel in kernels[name]:
                try:
                    layer = seeded(build(name, causal=causal, kernel=kernel, **options)).eval()
                except ValueError:
                    text = "refused: at build"
                    yield f"{name} {options} {causal} {kernel}", lambda text=text: text
                    continue
                for L in LENGTHS if kernel == "auto" else [67, 131]:
                    for what, given in layouts(L):
                        key = f"{name} {options} causal={causal} kernel={kernel} L={L} {what}"
                        yield (
                            key,
                            lambda layer=layer, L=L, given=given: attempt(
                                lambda: call(layer, L, given, torch.float32, True)
                            ),
                        )
                        if L == 131 and kernel == "auto":
                            yield (
                                key + " eval",
                                lambda layer=layer, L=L, given=given: attempt(
                                    lambda: call(layer, L, given, torch.float32, False)
                                ),
                            )
            for dtype in (torch.float64, torch.bfloat16):
                try:
                    layer = seeded(build(name, causal=causal, **options)).to(dtype).eval()
                except ValueError:
                    continue
                for what, given in layouts(131):
                    key = f"{name} {options} causal={causal} {dtype} {what}"
                    yield (
                        key,
                        lambda layer=layer, given=given, dtype=dtype: attempt(
                            lambda: call(layer, 131, given, dtype, True)
                        ),
                    )
        for options in variants:
            try:
                layer = seeded(build(name, causal=True, **options)).eval()
            except ValueError:
                continue
            for what, given in layouts(99):
                for cuts, train in (
                    ([40, 41, 42, 43, 80], False),
                    ([40, 41, 80], True),
                    ([1, 2, 3, 96, 97, 98], False),
                ):
                    key = f"{name} {options} steps {what} {cuts} {train}"
                    yield (
                        key,
                        lambda layer=layer, given=given, cuts=cuts, train=train: attempt(
                            lambda: steps(layer, 99, given, cuts, train)
                        ),
                    )


def model_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    mixes: list[Any] = [
        "full",
        {"name": "longformer", "window": 16},
        {"name": "bigbird", "block": 16},
        {"name": "bigbird", "block": 16, "extra_global_tokens": 2},
        {"name": "reformer", "chunk": 16},
        {"name": "transformer_xl", "segment_length": 32, "memory_length": 32},
        [{"name": "longformer", "window": 16, "global_projections": "shared"}, {"name": "bigbird", "block": 16}],
        [{"name": "reformer", "chunk": 16}, {"name": "reformer.local", "chunk": 16}],
    ]
    for mix, causal, more in itertools.product(
        mixes,
        (True, False),
        ({}, {"reversible": True}, {"short_conv": 3, "positions": "learned"}, {"positions": "rotary"}),
    ):
        try:
            torch.manual_seed(0)
            net = seeded(zoo.Transformer(attention=mix, vocab=64, dim=32, depth=3, heads=4, causal=causal, **more))
        except ValueError:
            text = "refused: at build"
            yield f"model {mix} {causal} {more}", lambda text=text: text
            continue

        def whole(net=net, given=None, L=131):
            ids = torch.randint(0, 64, (3, L), generator=torch.Generator().manual_seed(1))
            torch.manual_seed(5)
            net.train()
            net.zero_grad()
            out = net(ids, None if given is None else zoo.Tokens.of(*given))
            keep = out.logits if given is None else out.logits[given[0]]
            keep.double().logsumexp(-1).sum().backward()
            return digest(keep, *(p.grad for _, p in net.named_parameters()))

        def running(net=net, given=None):
            net.eval()
            ids = torch.randint(0, 64, (3, 60), generator=torch.Generator().manual_seed(1))
            state, outs = net.initial_state(3), []
            with torch.no_grad():
                for a, b in ((0, 37), (37, 38), (38, 39), (39, 55), (55, 56), (56, 57), (57, 60)):
                    tokens = (
                        None if given is None else zoo.Tokens.of(*(None if g is None else g[:, a:b] for g in given[:3]))
                    )
                    out = net(ids[:, a:b], tokens, state=state)
                    state = out.state
                    outs.append(out.logits if given is None else out.logits[given[0][:, a:b]])
                state = zoo.reorder(state, torch.tensor([2, 0, 0])) if hasattr(zoo, "reorder") else state
                outs.append(net(ids[:, :1], state=state).logits)
            return digest(*outs)

        for what, given in layouts(131):
            yield (
                f"model {mix} {causal} {more} {what}",
                lambda given=given, whole=whole: attempt(lambda: whole(given=given)),
            )
        if causal:
            for what, given in layouts(60):
                yield (
                    f"model {mix} {more} running {what}",
                    lambda given=given, running=running: attempt(lambda: running(given=given)),
                )


def digests(only: Sequence[str]) -> dict[str, str]:
    """Of all cases whose names hold one of the words; all without any."""
    chosen = ((key, run) for key, run in itertools.chain(layer_cases(), model_cases()))
    return {key: run() for key, run in chosen if not only or any(word in key for word in only)}


def of_commit(commit: str, only: Sequence[str]) -> dict[str, str]:
    """The same by the code of another commit, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["git", "worktree", "add", "--detach", folder, commit], cwd=ROOT, check=True, capture_output=True
        )
        try:
            asked = [sys.executable, str(Path(__file__)), "--digests", "--only", *only]
            done = subprocess.run(
                asked, cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, check=False
            )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)
    if done.returncode:
        sys.exit(f"{commit} does not run these cases: {done.stderr[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bitwise", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="COMMIT", help="compare with what this commit computes")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose names hold one of these")
    parser.add_argument("--digests", action="store_true", help="print the digests as JSON")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    mine = digests(given.only)
    if given.digests or not given.against:
        json.dump(mine, sys.stdout, indent=0)
        return
    theirs = of_commit(given.against, given.only)
    differ = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
    for key in differ:
        print(f"{key}: {theirs.get(key)} at {given.against}, {mine.get(key)} here")
    print(f"{len(mine):,} cases, {len(differ):,} differ from {given.against}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
