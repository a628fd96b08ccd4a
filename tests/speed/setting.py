"""What a call looks like: drawn at random, changed a little, and made."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo.contract import Attention
from attention_zoo.registry import recipe

Phase = Literal["training", "prefill", "step"]
Padding = Literal["none", "one", "right", "left", "holes", "any", "one long"]
PHASES: tuple[Phase, ...] = ("training", "prefill", "step")
PADDING: tuple[Padding, ...] = ("none", "none", "none", "one", "right", "left", "holes", "any", "one long")
WIDTHS = (
    (1, 64), (2, 32), (4, 16), (4, 64), (8, 32), (8, 64), (8, 128), (12, 64), (16, 64),
    (1, 128), (2, 256), (3, 80), (5, 48), (6, 96), (8, 40), (32, 32),
)  # fmt: skip
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
ODD_SIZES = (1, 2, 3, 7, 20, 48, 100, 300)
SCORES: tuple[tuple[str, Any], ...] = (
    ("kv_heads", 1),
    ("positions", "rotary"),
    ("positions", "alibi"),
    ("sink_logit", True),
)
"""What changes the scores, each in a tenth of the settings."""


@dataclass(frozen=True)
class Setting:
    """One call of a bare layer.

    Fields:
        name, options: the mechanism and its own options.
        phase: "training" is forward and backward, "prefill" forward into a state, "step" one token behind `length`.
        batch, length, heads, width: of what is given; the model's width is heads · width.
        dtype: "float32" or "bfloat16".
        padding: of the rows; "one" is a single token in the whole batch, "any" three tenths anywhere, and in "one long"
            all rows but the first hold an eighth at most.
        documents: in each row.
        globals: global tokens of each row, anywhere.
    """

    name: str
    phase: Phase = "training"
    batch: int = 1
    length: int = 256
    heads: int = 8
    width: int = 64
    dtype: str = "float32"
    causal: bool = True
    padding: Padding = "none"
    documents: int = 1
    globals: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the whole call."""
        return self.batch * self.length

    def __str__(self) -> str:
        said = [
            self.name, *(f"{key}={value}" for key, value in self.options.items()), self.phase, f"B{self.batch}",
            f"L{self.length}", f"{self.heads}x{self.width}", self.dtype, "causal" if self.causal else "two-sided",
        ]  # fmt: skip
        said += [f"padding {self.padding}"] if self.padding != "none" else []
        said += [f"{self.documents} documents"] if self.documents > 1 else []
        said += [f"{self.globals} global"] if self.globals else []
        return " ".join(said)


def draw(rng: random.Random, name: str, most: int) -> Setting:
    """Any setting of a mechanism, of at most so many numbers (tokens · width of the model) in a call."""
    cls, _ = recipe(name)
    heads, width = rng.choice(WIDTHS)
    length = min(20_000, round(2 ** rng.uniform(0, 14.3)))
    batch = min(64, round(2 ** rng.uniform(0, 6)), max(1, most // (length * heads * width)))
    sizes = rng.choice((SIZES, SIZES, ODD_SIZES))
    own = {key: rng.choice(sizes) for key, value in cls.tiny.items() if type(value) is int}
    options = own if rng.random() < 0.7 else {}
    options |= {key: value for key, value in SCORES if rng.random() < 0.1}
    return Setting(
        name,
        rng.choice(PHASES),
        batch,
        min(length, max(1, most // (heads * width))),
        heads,
        width,
        "bfloat16" if rng.random() < 0.2 else "float32",
        rng.random() < 0.6 or not cls.declared.two_sided,
        rng.choice(PADDING),
        rng.choice((1, 1, 1, 2, 24, 100)),
        rng.choice((0, 0, 0, 1, 4)) if cls.declared.global_tokens != "none" else 0,
        options,
    )


def neighbours(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Small changes, none of which ought to change what a token costs."""
    if setting.length > 1:
        yield "L - 1", replace(setting, length=setting.length - 1)
    yield "L + 1", replace(setting, length=setting.length + 1)
    if setting.padding == "none" and setting.tokens > 1:
        yield "one padded token", replace(setting, padding="one")
    yield "a row more", replace(setting, batch=setting.batch + 1)
    if setting.documents == 1 and setting.length > 8:
        yield "two documents", replace(setting, documents=2)
    if setting.dtype == "float32":
        yield "bfloat16", replace(setting, dtype="bfloat16")


def build(setting: Setting) -> Attention:
    """The layer.

    Raises:
        ValueError, Unsupported: where its sizes do not go together, or it does not do this.
    """
    torch.manual_seed(0)
    layer = zoo.build(
        setting.name, dim=setting.heads * setting.width, heads=setting.heads, causal=setting.causal, **setting.options
    )
    return layer.to(getattr(torch, setting.dtype))


def tokens_of(setting: Setting) -> zoo.Tokens | None:
    """Where its tokens stand; None: nothing need be said."""
    if setting.padding == "none" and setting.documents == 1 and not setting.globals:
        return None
    batch, length = setting.batch, setting.length
    column = torch.arange(length)
    kept = torch.linspace(length, max(1, length // 2), batch).long()[:, None]
    valid = torch.ones(batch, length, dtype=torch.bool)
    if setting.padding == "one":
        valid[-1, -1] = False
    elif setting.padding == "right":
        valid = column < kept
    elif setting.padding == "left":
        valid = column >= length - kept
    elif setting.padding == "holes":
        valid[:, 1::3] = False
    g = torch.Generator().manual_seed(length)
    if setting.padding == "any":
        valid = torch.rand(batch, length, generator=g) < 0.7
    elif setting.padding == "one long":
        valid[1:] = column < torch.randint(1, max(2, length // 8), (batch - 1, 1), generator=g)
    some = torch.rand(length, generator=g).argsort() < setting.globals
    marked = some.expand(batch, length) & valid if setting.globals else None
    document = (column * setting.documents // length).expand(batch, length) if setting.documents > 1 else None
    return zoo.Tokens.of(valid, marked, document)


def work(setting: Setting, layer: Attention) -> Callable[[], object]:
    """What is timed: each call does the same work again."""
    layer.train(setting.phase == "training")  # where hashes are drawn anew, a step has to hash everything
    dtype = getattr(torch, setting.dtype)
    x = torch.randn(setting.batch, setting.length, layer.dim, dtype=dtype)
    tokens = tokens_of(setting)
    if setting.phase == "training":
        x.requires_grad_()
        weight = torch.randn_like(x)
        leaves = [x, *layer.parameters()]

        def train() -> None:
            out = layer(x, tokens)
            torch.autograd.grad((out.hidden * weight).sum(), leaves, allow_unused=True)

        return train

    tokens = tokens or zoo.Tokens.all_valid(setting.batch, setting.length)

    def prefill() -> Any:
        with torch.no_grad():
            return layer(x, tokens, state=layer.initial_state(setting.batch)).state

    if setting.phase == "prefill":
        return prefill
    after, at = prefill(), tokens.next_position
    one: Tensor = torch.randn(setting.batch, 1, layer.dim, dtype=dtype)
    there = torch.ones(setting.batch, 1, dtype=torch.bool)
    document = torch.full((setting.batch, 1), setting.documents - 1)

    def step() -> None:
        nonlocal after, at
        with torch.no_grad():
            after = layer(one, zoo.Tokens.of(there, document=document, start=at), state=after).state
        at = at + 1

    return step
