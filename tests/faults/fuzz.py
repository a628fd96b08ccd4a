"""Random builds, models and training runs with hostile values among their options: each runs, or gives one clear line.

What is accepted must run forward and backward to finite numbers within seconds; what is refused must be refused by us,
in one line that names an option. Sizes that no machine holds are refused as on a machine of 1 GiB.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import room
from attention_zoo.contract import Attention
from attention_zoo.model.mechanisms import POSITIONS
from attention_zoo.registry import options_of, recipe
from attention_zoo.rules import shown
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.run import run_training

from . import Counts

TITLE = "random builds, models and training configs with hostile values"
SMALL, LARGE = 1_000, 20_000
SECONDS = 5.0
"""Of CPU time, for one tiny case: what takes longer hangs."""
MEMORY = 2**30

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 0.5, 1.5, -1.0, 1e9, 1e-300, 1e308, math.nan, math.inf, -math.inf, 2**31 - 1, 2**31,
    2147483648.0, 2**40, 2**63, 10**30, 10**400, 10**5000, "", "auto", "nan", "1", "1e9", "../x", "x" * 300, "\udcff",
    "a\nb", "\x00", {}, {"name": "rms"}, {"name": 3}, {"name": "rotary", "base": math.nan}, {1: 2}, {"a": {}}, [], [1],
    [1, 2], [0, -1], [[1]], [None], ["full"], [math.nan], (), b"x", object(), 1j,
)  # fmt: skip
PLAIN = tuple(value for value in HOSTILE if not isinstance(value, bytes | complex) and type(value) is not object)
"""Those that a yaml or a command line can hold."""

SOUND: dict[str, tuple[Any, ...]] = {
    "kv_heads": (None, 1, 2), "head_width": (None, 2, 3, 8), "bias": (True, False, "into", "out"),
    "scale": (None, 0.3, 2),
    "positions": (*POSITIONS, {"name": "rotary", "base": 100.0}, {"name": "rotary", "scaling": "linear", "factor": 2}),
    "seed": (0, 7, -3), "window": (1, 3, 500), "dilation": (1, 2, [1, 2]), "global_projections": ("separate", "shared"),
    "block": (1, 3, 64), "window_blocks": (1, 3, 5), "random": (0, 1, 9), "plan": ("uniform", "reference"),
    "extra_global_tokens": (0, 2), "rounds": (1, 2), "chunk": (1, 4, 100), "look_back": (0, 1, 3), "look_ahead": (0, 1),
    "buckets": (None, 2, 4, [2, 4]), "wrap": ("row", "reference"), "key_norm_epsilon": (0.0, 1e-6), "fill": (0, 4),
    "split_above": (2, 64), "hash_seed": (None, 3), "segment_length": (1, 4, 99), "memory_length": (0, 3, 99),
    "clamp_length": (None, 2), "initial_memory": ("empty", "zeros"), "cross": (False, True), "vocab": (5, 11),
    "dim": (4, 8, 12, 16), "depth": (1, 2), "heads": (1, 2, 4), "causal": (True, False), "classes": (None, 3),
    "head": ("lm", "tokens", "classify", "hidden", {"name": "lm", "bias": True}), "pooling": ("mean", "first"),
    "pre_norm": (True, False), "norm": ("layer", "rms", {"name": "rms", "eps": 1e-6}), "ff_mult": (1, 4),
    "feed_forward": ("gelu", "relu", "swiglu", {"name": "swiglu", "width": 5}), "ff_chunks": (1, 3),
    "short_conv": (0, 3),
    "output_dropout": (0.0, 0.2), "embedding": (None, {"scale": 2.0}, {"cutoffs": [3], "divide": 2}),
    "tied": (True, False),
    "reversible": (False, True, "both"), "last_norm": (True, False), "max_length": (64,), "origin": (None, {}),
    "attention": (*zoo.available(), ["longformer", "full"], {"name": "bigbird", "block": 3}),
    "kernel": ("auto", "dense"),
}  # fmt: skip
"""Values that make sense, by option; booleans where none are listed."""
INNER: dict[str, dict[str, tuple[str, ...]]] = {
    "positions": {
        "rotary": ("base", "scaling", "factor", "low_freq_factor", "high_freq_factor", "original_length"),
        "learned": ("scale", "uncounted"), "axial": ("columns", "row_width", "scale"), "sinusoidal": ("base",),
        "alibi": (), "none": (), "odd": (),
    },
    "norm": {"rms": ("eps",), "layer": ("eps",)}, "feed_forward": {"swiglu": ("width", "bias"), "gelu": ("width",)},
    "head": {"lm": ("bias", "transform", "tied_projections"), "classify": ("bias",)},
    "attention": {name: tuple(options_of(name)) for name in zoo.available()},
    "embedding": {"": ("scale", "types", "normed", "dropout", "cutoffs", "divide", "width")},
}  # fmt: skip
"""Options of components that are mappings: option -> name -> its own."""


def run(count: int, seed: int, share: tuple[int, int, int] = (10, 6, 2)) -> Counts:
    """Try `count` cases; `share` of them are layers, models and training runs."""
    found = Counts()
    with tempfile.TemporaryDirectory() as folder, _small_machine(), torch.random.fork_rng(devices=[]):
        texts = Path(folder, "texts")
        texts.mkdir()
        for index in range(6):
            (texts / f"{index}.txt").write_text(f"line {index} of a text, and another\n" * 30)
        for number in range(count):
            case = f"fuzz {seed}:{number}"
            rng = random.Random(case)
            torch.manual_seed(number)
            kind = rng.choices((_layer, _model, _training), share)[0]
            said, act = kind(rng, Path(folder))
            found.tries += 1
            for way, problem in _judged(act):
                found.failed(way, f"{case}: {said}: {problem}"[:1500])
    return found


@contextmanager
def _small_machine() -> Iterator[None]:
    whole = room.memory_bytes
    room.memory_bytes = lambda: MEMORY  # type: ignore[assignment]
    try:
        yield
    finally:
        room.memory_bytes = whole


def _judged(act: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """What is wrong with how a case ended."""

    def late(*_: Any) -> None:
        raise TimeoutError("no end")

    before, began = signal.signal(signal.SIGALRM, late), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        yield from act()
    except TimeoutError:
        yield "hung", "no end"
    except ValueError as error:
        yield from _refusal(str(error), traceback.extract_tb(error.__traceback__)[-1].filename)
    except Exception as error:
        yield "raw", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if (took := time.process_time() - began) > SECONDS:
        yield "hung", f"took {took:.1f} s"


def _refusal(line: str, place: str) -> Iterator[tuple[str, str]]:
    """Ours, in one line of bounded length."""
    if "attention_zoo" not in place:
        yield "raw", f"ValueError of {place}: {line[:300]}"
    elif "\n" in line or not 10 < len(line) < 900:
        yield "raw", f"unclear: {line[:1000]!r}"


def _drawn(rng: random.Random, options: list[str], given: dict[str, Any], hostile: tuple[Any, ...]) -> dict[str, Any]:
    """Up to four sound options and up to two hostile ones."""
    drawn = {key: rng.choice(SOUND.get(key, (True, False))) for key in rng.sample(options, min(4, len(options)))}
    for key in rng.sample(options, rng.choice((0, 1, 1, 2))):
        drawn[key] = rng.choice(hostile)
    if (within := [key for key in options if key in INNER]) and rng.random() < 0.3:
        option = rng.choice(within)
        name = rng.choice(list(INNER[option]))
        inner = {key: rng.choice(hostile) for key in INNER[option][name] if rng.random() < 0.4}
        if name == "rotary" and rng.random() < 0.5:
            inner["scaling"] = rng.choice(("linear", "llama3"))
        drawn[option] = {"name": name, **inner} if name else inner
    if rng.random() < 0.03:
        drawn[rng.choice(("windw", "dims", "Heads", "self", "_x", "kwargs"))] = rng.choice(hostile)
    return {**given, **drawn}


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in options.items())


def _layer(rng: random.Random, folder: Path) -> tuple[str, Callable[[], Iterator[tuple[str, str]]]]:
    name = rng.choice((*zoo.available(), "reformer.local"))
    known = list(options_of(name))
    given = {"dim": rng.choice((4, 8, 12)), "heads": rng.choice((1, 2, 4))}
    if name not in ("transformer_xl",):
        given["causal"] = rng.random() < 0.5
    tiny = recipe(name)[0].tiny if rng.random() < 0.7 else {}
    options = _drawn(rng, known, {**given, **tiny}, HOSTILE)
    length = rng.choice((1, 2, 7, 12))

    def act() -> Iterator[tuple[str, str]]:
        layer = zoo.build(name, **options)
        x = torch.randn(2, length, layer.dim, requires_grad=True)
        yield from _finite(x, layer(x, **_source(layer, x)).hidden, layer.parameters())

    return f"build({name!r}, {_shown(options)}), {length} tokens", act


def _source(layer: Attention, x: Tensor) -> dict[str, Any]:
    if not layer.cross:
        return {}
    return {"source": zoo.Source(x.detach(), zoo.Tokens.all_valid(*x.shape[:2]))}


def _model(rng: random.Random, folder: Path) -> tuple[str, Callable[[], Iterator[tuple[str, str]]]]:
    known = list(inspect.signature(zoo.Transformer).parameters)
    plain = [key for key in known if key not in ("cross", "attention")]
    attention = rng.choice(SOUND["attention"])
    base = {"attention": attention, "vocab": 11, "dim": 8, "heads": 2, "depth": 1 + isinstance(attention, list)}
    options = _drawn(rng, plain if rng.random() < 0.7 else known, base, HOSTILE)
    second = _drawn(rng, plain, base, HOSTILE) if rng.random() < 0.2 else None

    def act() -> Iterator[tuple[str, str]]:
        ids = torch.randint(0, 5, (2, 7))
        model: Any = zoo.Transformer(**options)
        call = {}
        if second is not None:
            encoder = zoo.Transformer(**{**second, "causal": False, "head": "hidden"})
            model = zoo.EncoderDecoder(encoder=encoder, decoder=zoo.Transformer(**{**options, "cross": True}))
            call = {"source": ids}
        elif model.cross:
            call = {"source": zoo.Source(torch.randn(2, 7, model.dim), zoo.Tokens.all_valid(2, 7))}
        out = model(ids, **call)
        yield from _finite(None, out.hidden if out.logits is None else out.logits, model.parameters())

    return f"Transformer({_shown(options)}){'' if second is None else f' behind {_shown(second)}'}", act


def _finite(x: Tensor | None, out: Tensor, parameters: Any) -> Iterator[tuple[str, str]]:
    """Backward, and whether everything is finite."""
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    if not bool(out.isfinite().all()):
        yield "wrong", "the output is not finite"
    slopes = [p.grad for p in parameters if p.grad is not None] + ([] if x is None else [x.grad])
    if not all(bool(slope.isfinite().all()) for slope in slopes if slope is not None):
        yield "wrong", "a gradient is not finite"


SMALL_RUN = (
    "tracker=none", "model.dim=8", "model.depth=1", "model.heads=2", "seq_len=8", "batch=2", "steps=2", "device=cpu",
    "trainer.progress=none", "trainer.eval_every=2", "trainer.checkpoint_every=100",
)  # fmt: skip
OVERRIDES = (
    "a=b=c", "steps=???", "steps=${nothing}", "task=${task}", "optimizer.lr=nan", "seed=[", "trainer.stop_at=inf", "=",
    "+x={a: nan}", "model=3", "~task", "steps=${steps}", "é=1", "task.path=${steps}", "tracker.mode=1", "hybrid=full",
    "attention=full,longformer", "hybrid=[full,{name: nope}]", "threads=100000", "device=gpu:7", "schedule.warmup=2",
)  # fmt: skip
"""Command lines that must be refused."""
_composed: dict[tuple[str, ...], dict[str, Any]] = {}


def _training(rng: random.Random, folder: Path) -> tuple[str, Callable[[], Iterator[tuple[str, str]]]]:
    """A composed config in which a few values, anywhere, were exchanged; or a command line with odd overrides."""
    chosen = (f"attention={rng.choice(zoo.available())}", f"task={rng.choice(('text', 'mqar'))}")
    extra = ("task.pairs=2", "task.test_examples=10")  # a thousand take seconds in batches of two
    if chosen[1] == "task=text":
        extra = (f"task.path={folder / 'texts'}", "task.held_out=null")
    if rng.random() < 0.25:
        override = rng.choice(OVERRIDES)
        line = (*chosen, *SMALL_RUN, override)
        return f"train {override}", lambda: iter([("wrong", "accepted")] if check(compose_training(line)) else [])
    if chosen not in _composed:
        _composed[chosen] = compose_training([*chosen, *SMALL_RUN, *extra])
    if rng.random() < 0.2:
        chosen = (*chosen, "tracker=wandb")
        _composed.setdefault(chosen, compose_training([*chosen, *SMALL_RUN[1:], *extra]))
    config = json.loads(json.dumps(_composed[chosen]))
    changed = []
    for _ in range(rng.choice((1, 1, 2))):
        node, path = config, ""
        while True:
            key = rng.choice([*node, *(["odd"] if rng.random() < 0.05 else [])])
            path += f".{key}"
            if not (isinstance(node.get(key), dict) and node[key] and rng.random() < 0.9):
                break
            node = node[key]
        if path.startswith((".steps", ".seq_len", ".batch", ".task.max_bytes")):
            continue  # large ones are sound, and slow
        node[key] = rng.choice(PLAIN)
        changed.append(f"{path[1:]}={shown(node[key])}")

    def act() -> Iterator[tuple[str, str]]:
        if "tracker=wandb" in chosen:
            check(config)
            return
        place = Path(tempfile.mkdtemp(dir=folder))
        row = run_training(config, place)
        json.dumps(json.loads((place / "result.json").read_text()), allow_nan=False)
        if row["status"] == "ok":
            return
        trace = (place / "error.txt").read_text().splitlines()
        last = next(line for line in reversed(trace) if line.startswith("  File "))
        if any(line.startswith(("ValueError", "attention_zoo")) for line in trace):
            yield from _refusal(row["error"], last)
        else:
            yield "raw", f"{row['status']}: {row['error'][:300]}"

    return f"train {chosen} {changed}", act
